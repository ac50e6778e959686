"""Publishing with the real `huggingface_hub` client against a stand-in of the Hub, and loading back from it."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.data.prepared import import_jsonl, load_rows
from ctinstruct_hf.data.share import shareable_rows
from ctinstruct_hf.hub.publish import check_repository, make_plan
from tests.hub.stand_in import Hub, running


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as one:
        yield one


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(untrained, target, ignore=shutil.ignore_patterns("__pycache__"))
    (target / "training_args.bin").write_bytes(b"pickle")
    (target / "checkpoint-3").mkdir()
    (target / "README.md").write_text("an old card")
    return target


def run(hub: Hub, tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_TOKEN": "hf_test", "HF_HOME": str(tmp_path / "home"),
                   "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def ctinstruct(hub: Hub, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(hub, tmp_path, sys.executable, "-m", "ctinstruct_hf.cli", *arguments)


def test_a_dry_run_shows_what_would_go_and_sends_nothing(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done = ctinstruct(hub, tmp_path, "publish", str(folder), "me/ct", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert "private" in done.stdout
    assert "stays here: checkpoint-3, training_args.bin" in done.stdout
    assert "pipeline_tag: image-text-to-text" in done.stdout
    assert not hub.asked


def test_a_published_model_loads_back_with_its_own_code(hub: Hub, folder: Path, tmp_path: Path) -> None:
    done = ctinstruct(hub, tmp_path, "publish", str(folder), "me/ct")
    assert done.returncode == 0, (done.stderr, hub.asked)
    kept = hub.repositories["me/ct"]
    assert kept["private"] is True
    assert set(kept["files"]) == {path.name for path in folder.iterdir() if path.is_file()} - {"training_args.bin"}
    assert b"never a diagnosis" in kept["files"]["README.md"]
    assert kept["files"]["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    code = (
        "import sys; sys.modules['ctinstruct_hf'] = None\n"  # as on a machine without this package
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "processor = AutoProcessor.from_pretrained('me/ct', trust_remote_code=True)\n"
        "model = AutoModelForImageTextToText.from_pretrained('me/ct', trust_remote_code=True)\n"
        "print(type(model).__name__, type(processor).__name__)"
    )
    loaded = run(hub, tmp_path, sys.executable, "-c", code)
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    assert loaded.stdout.split() == ["CTInstructForConditionalGeneration", "CTInstructProcessor"]


def test_a_refusal_is_one_sentence(hub: Hub, folder: Path, tmp_path: Path) -> None:
    hub.refuses = 403
    done = ctinstruct(hub, tmp_path, "publish", str(folder), "me/ct")
    assert done.returncode == 2
    assert "The Hub does not take me/ct: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not hub.repositories["me/ct"]["files"]


def test_what_is_no_whole_model_is_refused_before_anything_is_sent(folder: Path, tmp_path: Path) -> None:
    (folder / "vision_ctinstruct.py").unlink()
    with pytest.raises(CTInstructError, match=r"modeling_ctinstruct\.py needs vision_ctinstruct\.py"):
        make_plan(folder, "card")
    (folder / "modeling_ctinstruct.py").unlink()
    with pytest.raises(CTInstructError, match=r"lacks modeling_ctinstruct\.py"):
        make_plan(folder, "card")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CTInstructError, match=r"it lacks \*\.safetensors"):
        make_plan(folder, "card")
    with pytest.raises(CTInstructError, match="does not exist"):
        make_plan(tmp_path / "none", "card")
    with pytest.raises(CTInstructError, match="write user/name"):
        check_repository("../../etc")


def test_only_what_a_model_is_made_of_goes(folder: Path, tmp_path: Path) -> None:
    allowed = [name for name, _ in make_plan(folder, "card").files]
    stays = ["token.json", ".hidden.json", "trainer_state.json", "train.py", "notes.txt", "optimizer.safetensors",
             "patients.json", "vocabulary.model", "my.jinja", "complete.json", "recipe.json", ".env"]  # fmt: skip
    for name in stays:
        (folder / name).write_text("secret")
    (tmp_path / "secret.json").write_text("{}")
    (folder / "linked.json").symlink_to(tmp_path / "secret.json")
    (folder / "scores.json").write_text('{"tasks": []}')
    plan = make_plan(folder, "card")
    assert [name for name, _ in plan.files if name != "scores.json"] == allowed
    assert {*stays, "linked.json (a link)", "checkpoint-3", "training_args.bin"} == set(plan.left)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "modeling_ctinstruct.py", "scores.json", "merges.txt"]
)
def test_links_of_a_model_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    if (folder / name).exists():
        (folder / name).rename(tmp_path / "secret")
    else:
        (tmp_path / "secret").write_text("{}")
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CTInstructError, match="a link"):
        make_plan(folder, "card")


def test_a_path_of_this_machine_in_the_settings_is_refused(folder: Path) -> None:
    for file, key in (("config.json", "_name_or_path"), ("tokenizer_config.json", "tokenizer_file")):
        before = (folder / file).read_text()
        (folder / file).write_text(json.dumps({**json.loads(before), key: "/home/jane.roe/model"}))
        with pytest.raises(CTInstructError, match=f"{key} is a path of this machine") as error:
            make_plan(folder, "card")
        assert "jane" not in str(error.value)
        (folder / file).write_text(before)
    make_plan(folder, "card")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.nii.gz").write_bytes(b"0")
    lines = [
        {"id": f"jane-roe/{number}", "task": "question", "split": split, "source": "mine", "patient": "Jane Roe",
         "images": [{"path": str(scans / "a.nii.gz")}],
         "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
                      {"role": "assistant", "content": [{"type": "text", "text": "There."}]}]}
        for number, split in enumerate(("train", "train", "test"))
    ]  # fmt: skip
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    import_jsonl(file, tmp_path / "mine")
    return tmp_path / "mine"


def test_rows_go_to_the_hub_without_paths_and_patients_and_come_back(hub: Hub, rows: Path, tmp_path: Path) -> None:
    scans = tmp_path / "scans"
    done = ctinstruct(hub, tmp_path, "data", "publish", str(rows), "me/rows", "--root", str(scans), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "instructions: test 1, train 2" in done.stdout
    assert not hub.asked
    done = ctinstruct(hub, tmp_path, "data", "publish", str(rows), "me/rows", "--root", str(scans))
    assert done.returncode == 0, (done.stderr, hub.asked)
    kept = hub.repositories["datasets/me/rows"]
    assert kept["private"] is True
    card = kept["files"]["README.md"].decode()
    assert card.startswith("---\n")
    assert "config_name: instructions" in card
    assert "never a diagnosis" in card
    for content in kept["files"].values():
        for secret in (b"Jane Roe", b"jane-roe", b"mine.jsonl", str(tmp_path).encode()):
            assert secret not in content
    tables = [pq.read_table(io.BytesIO(content)) for name, content in kept["files"].items() if name.endswith("parquet")]
    sent = [row for table in tables for row in table.to_pylist()]
    assert {row["id"] for row in sent} == {"row-000001", "row-000002", "row-000003"}
    assert {row["patient"] for row in sent} == {"patient-000001"}
    assert {row["images"][0]["path"] for row in sent} == {"file-000001.nii.gz"}
    other = tmp_path / "elsewhere"
    mapping = rows / "published.json"
    assert mapping.stat().st_mode & 0o077 == 0
    done = ctinstruct(
        hub, tmp_path, "data", "fetch", "me/rows", "--root", str(other), "-o", str(tmp_path / "back"), "--mapping", str(mapping)
    )  # fmt: skip
    assert done.returncode == 0, (done.stderr, hub.asked)
    back = list(load_rows(tmp_path / "back", "instructions", "train"))
    assert [row["images"][0]["path"] for row in back] == [str(other / "a.nii.gz")] * 2
    assert len({row["patient"] for row in back}) == 1
    assert [row["messages"] for row in back] == [row["messages"] for row in load_rows(rows, "instructions", "train")]


def test_numbers_of_rows_are_kept_and_follow_no_order(tmp_path: Path) -> None:
    names = [f"patient-of-{number:03d}" for number in range(40)]

    def prepared(count: int) -> Path:
        lines = [
            {"id": f"{name}/0", "task": "question", "split": "train", "source": "mine", "patient": name,
             "images": [{"path": str(tmp_path / f"{name}.nii.gz")}],
             "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
                          {"role": "assistant", "content": [{"type": "text", "text": "There."}]}]}
            for name in names[:count]
        ]  # fmt: skip
        (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        shutil.rmtree(tmp_path / "set" / "instructions", ignore_errors=True)
        import_jsonl(tmp_path / "rows.jsonl", tmp_path / "set")
        return tmp_path / "set"

    rows, first = shareable_rows(prepared(30), tmp_path)
    sent = rows["instructions"]["train"]
    assert [row["id"] for row in sent] == [f"row-{number:06d}" for number in range(1, 31)]
    for part, known in first.items():
        assert list(known.values()) != [known[name] for name in sorted(known)], part  # the order of names is not kept
    (tmp_path / "set" / "published.json").write_text(json.dumps(first))
    shutil.rmtree(tmp_path / "set" / ".arrow", ignore_errors=True)
    _, second = shareable_rows(prepared(40), tmp_path)
    for part, known in first.items():
        assert known.items() <= second[part].items()
        assert len(set(second[part].values())) == 40


def test_a_text_with_its_patients_name_stays_here(tmp_path: Path) -> None:
    for text, goes in (("There, Mrs. ROE, Jane.", False), ("There, Jane.", True)):
        line = {"id": "a", "task": "question", "split": "train", "source": "mine", "patient": "Roe^Jane",
                "images": [{"path": str(tmp_path / "a.nii.gz")}],
                "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where?"}]},
                             {"role": "assistant", "content": [{"type": "text", "text": text}]}]}  # fmt: skip
        (tmp_path / "rows.jsonl").write_text(json.dumps(line))
        import_jsonl(tmp_path / "rows.jsonl", tmp_path / str(goes))
        if goes:
            shareable_rows(tmp_path / str(goes), tmp_path)
            continue
        with pytest.raises(CTInstructError, match="holds its patient's name") as error:
            shareable_rows(tmp_path / str(goes), tmp_path)
        assert "Roe" not in str(error.value)


def test_rows_of_files_elsewhere_are_refused(hub: Hub, rows: Path, tmp_path: Path) -> None:
    for options, told in (
        ([], "give the folder of the data"),
        (["--root", str(tmp_path / "other")], "which is not in"),
    ):
        done = ctinstruct(hub, tmp_path, "data", "publish", str(rows), "me/rows", *options)
        assert done.returncode == 2
        assert told in done.stderr
    assert not hub.asked
    done = ctinstruct(hub, tmp_path, "data", "fetch", "me/nothing", "-o", str(tmp_path / "back"))
    assert done.returncode == 2
    assert "me/nothing cannot be fetched" in done.stderr
    assert not (tmp_path / "back").exists()
