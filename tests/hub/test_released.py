"""The authors' checkpoint from the Hub or from any of the forms in which it is saved: recognised, fetched, converted."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_client import point_to
from safetensors.torch import load_file
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.hub.released import convert_released
from ctinstruct_hf.inference import models
from ctinstruct_hf.inference.models import load_model, resolve_model
from tests.hub import released_folders as forms
from tests.hub.stand_in import COMMIT, Hub, running

NAME, QWEN = "JiayuLei/CTInstruct", "Qwen/Qwen2-VL-7B-Instruct"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub with the small released repository, and empty caches."""
    with running() as one:
        point_to(monkeypatch, one.address, tmp_path / "hub")
        monkeypatch.setenv("CTINSTRUCT_CACHE", str(tmp_path / "converted"))
        yield one
    models._snapshot.cache_clear()


def publish(hub: Hub, folder: Path, name: str = NAME) -> None:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.repositories[name] = {"private": False, "files": files}


@pytest.fixture
def released(hub: Hub, tmp_path: Path) -> Hub:
    folder = tmp_path / "repository"
    forms.safetensors_shards(folder, forms.released_tensors())
    forms.write_tokenizer(folder)
    publish(hub, folder)
    return hub


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    forms.whole_safetensors(folder / "release", forms.released_tensors())
    forms.write_tokenizer(folder / "release")
    return convert_released(folder / "release", folder / "model")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def weights_asked(hub: Hub) -> list[str]:
    return [line for line in hub.asked if line.startswith("GET") and line.split()[1].endswith(("safetensors", ".bin"))]


def test_predict_recognises_fetches_and_converts_the_authors_model_once(
    released: Hub, converted: Path, small_scan: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["predict", "-i", str(small_scan), "--segment", "liver", "--model", NAME, "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, (done.exception, done.output)
    assert "is the authors' checkpoint: its files are downloaded and converted once" in caplog.text
    found = json.loads((tmp_path / "out" / "findings.json").read_text())
    assert (found["model"], found["model_commit"]) == (NAME, COMMIT)
    folder = resolve_model(NAME).folder
    assert folder.is_relative_to(tmp_path / "converted")
    assert json.loads((folder / "config.json").read_text())["converted_from"] == f"{NAME}@{COMMIT}"
    same(weights(folder), weights(converted))
    assert len(weights_asked(released)) == 3
    for cached in (models._snapshot, models.load_processor, models.load_model):
        cached.cache_clear()
    assert load_model(NAME, "cpu")[0].config._commit_hash == COMMIT
    assert len(weights_asked(released)) == 3


def test_without_network_the_converted_model_is_used(
    released: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = resolve_model(NAME).folder
    asked = len(released.asked)
    models._snapshot.cache_clear()
    assert resolve_model(NAME, COMMIT).folder == folder
    assert len(released.asked) == asked  # a commit never changes
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub")
    assert resolve_model(NAME).folder == folder


@pytest.mark.parametrize("form", forms.FORMS, ids=lambda form: form.__name__)
def test_every_form_of_the_checkpoint_gives_the_same_weights(
    form: Callable[[Path, forms.Tensors], None], converted: Path, tmp_path: Path
) -> None:
    form(tmp_path / "release", forms.released_tensors())
    forms.write_tokenizer(tmp_path / "release")
    convert_released(tmp_path / "release", tmp_path / "model")
    same(weights(tmp_path / "model"), weights(converted))
    assert (tmp_path / "model" / "processor_config.json").exists()
    assert not (tmp_path / "model" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("by_option", [False, True])
def test_lora_goes_into_its_base(by_option: bool, converted: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    merged = forms.lora_and_base(tmp_path, forms.released_tensors())
    forms.write_tokenizer(tmp_path / "adapter")
    options: dict[str, Any] = {}
    if by_option:
        settings = tmp_path / "adapter" / "adapter_config.json"
        settings.write_text(settings.read_text().replace(str(tmp_path / "qwen"), "/where/it/was/trained"))
        options["base"] = tmp_path / "qwen"
    convert_released(tmp_path / "adapter", tmp_path / "model", **options)
    found, before = weights(tmp_path / "model"), weights(converted)
    for name, tensor in found.items():
        source = name.replace("model.language_model.", "model.")
        torch.testing.assert_close(tensor, merged[source] if "_proj.weight" in name else before[name])
    changed = "model.language_model.layers.1.self_attn.v_proj.weight"
    assert not torch.allclose(found[changed], before[changed])


def test_an_adapter_without_its_base_says_what_is_missing(tmp_path: Path) -> None:
    forms.lora_and_base(tmp_path, forms.released_tensors())
    settings = tmp_path / "adapter" / "adapter_config.json"
    settings.write_text("{}")
    with pytest.raises(CTInstructError, match="name its base by --base"):
        convert_released(tmp_path / "adapter", tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_stage_one_file_becomes_a_stage_one_folder(tmp_path: Path, converted: Path) -> None:
    """`ctinstruct/` beside `vision_encoder.pth`: the model by the folder, with a word on the file; stage one by the file."""
    from transformers import BertConfig, BertModel

    source = tmp_path / "checkpoint"
    forms.safetensors_shards(source / "ctinstruct", forms.released_tensors())
    forms.write_tokenizer(source / "ctinstruct")
    forms.stage_one_file(source / "vision_encoder.pth", forms.released_tensors())
    encoder = tmp_path / "encoder"
    config = BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=160
    )
    BertModel(config).save_pretrained(encoder)
    forms.write_tokenizer(encoder)
    whole = CliRunner().invoke(app, ["convert", "released", "-i", str(source), "-o", str(tmp_path / "model")])
    assert whole.exit_code == 0, (whole.exception, whole.output)
    assert "vision_encoder.pth is stage one" in whole.output.replace("\n", "")
    same(weights(tmp_path / "model"), weights(converted))
    done = CliRunner().invoke(
        app,
        ["convert", "released", "-i", str(source / "vision_encoder.pth"), "-o", str(tmp_path / "one"),
         "--text-encoder", str(encoder)],
    )  # fmt: skip
    assert done.exit_code == 0, (done.exception, done.output)
    network, image_processor, _ = models.load_stage_one(tmp_path / "one", "cpu")
    assert image_processor.fit == "released"
    assert torch.equal(network.text_projection.weight, torch.eye(48))
    whole_weights, stage_one = weights(converted), weights(tmp_path / "one")
    for name in (
        "vision_tower.encoder.stages.2.0.reduce.conv.weight",
        "vision_tower.attention.slice_layers.1.attention.key.weight",
    ):
        assert torch.equal(stage_one[name], whole_weights[f"model.{name}"])
    name = "segmentation_decoder.layers.1.attention.query.weight"
    assert torch.equal(stage_one[name], whole_weights[name])
    torch.save({"module.cls_head.weight": torch.zeros(1)}, tmp_path / "other.pth")
    done = CliRunner().invoke(
        app, ["convert", "released", "-i", str(tmp_path / "other.pth"), "-o", str(tmp_path / "two")]
    )
    assert "holds no visual_encoder" in str(done.exception)


def test_words_come_from_qwen_where_the_repository_has_none(released: Hub, tmp_path: Path) -> None:
    files = released.repositories[NAME]["files"]
    words = {name: files.pop(name) for name in ("tokenizer.json", "tokenizer_config.json")}
    with pytest.raises(CTInstructError, match=f"tokenizer '{QWEN}' cannot be loaded: Repository not found"):
        resolve_model(NAME)
    assert not list((tmp_path / "converted").rglob("config.json"))
    released.repositories[QWEN] = {"private": False, "files": words}
    assert "<SEG>" in load_model(NAME, "cpu")[1].tokenizer.get_vocab()
    assert not [line for line in weights_asked(released) if QWEN in line]


class Harm:
    def __reduce__(self) -> Any:
        return (exec, ("raise SystemExit('run')",))


def code_in_a_pickle(folder: Path) -> None:
    forms.write_config(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"visual.encoder.x": Harm()}))


def half_a_pickle(folder: Path) -> None:
    forms.whole_pickle(folder, forms.released_tensors())
    file = folder / "pytorch_model.bin"
    file.write_bytes(file.read_bytes()[:-5000])


def parts_of_zero_3(folder: Path) -> None:
    forms.write_config(folder)
    torch.save({}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def a_shard_less(folder: Path) -> None:
    forms.bin_shards(folder, forms.released_tensors())
    (folder / "pytorch_model-00002-of-00003.bin").unlink()


def no_full_tokenizer(folder: Path) -> None:
    """With the vocabulary of Qwen2-VL, whose tokenizer is then the one to have."""
    tensors = forms.released_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(151664, 64, dtype=torch.bfloat16)
    forms.whole_safetensors(folder, tensors)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (code_in_a_pickle, "pytorch_model.bin (holds|is cut short)"),
        (half_a_pickle, "pytorch_model.bin is cut short or no file of torch.save"),
        (parts_of_zero_3, "zero_to_fp32.py"),
        (a_shard_less, "names 1 files that are not there: pytorch_model-00002-of-00003.bin"),
        (no_full_tokenizer, f"holds no tokenizer, and tokenizer '{QWEN}' cannot be loaded.*--tokenizer"),
        (lambda folder: folder.mkdir(), "holds no weights"),
    ],
    ids=lambda one: getattr(one, "__name__", "-"),
)
def test_a_checkpoint_that_cannot_be_converted_is_told_in_a_sentence(
    make: Callable[[Path], None], words: str, hub: Hub, tmp_path: Path
) -> None:
    make(tmp_path / "release")
    done = CliRunner().invoke(
        app, ["convert", "released", "-i", str(tmp_path / "release"), "-o", str(tmp_path / "out")]
    )
    assert isinstance(done.exception, CTInstructError), (done.exception, done.output)
    with pytest.raises(CTInstructError, match=words):
        raise done.exception
    assert "\n" not in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_a_broken_connection_is_taken_up_where_it_broke(released: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 2**16)
    released.cut = {"model-00002-of-00003.safetensors"}
    resolve_model(NAME)
    size = len(released.repositories[NAME]["files"]["model-00002-of-00003.safetensors"])
    again = [line for line in weights_asked(released) if "bytes=" in line]
    assert len(again) == 1
    assert int(again[0].split("bytes=")[1].split("-")[0]) in range(1, size)


def test_half_a_download_is_told_and_gone_on_with(
    released: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    released.refused = {"model-00002-of-00003.safetensors"}
    with pytest.raises(CTInstructError, match=r"the download stopped .*not given out today.* goes on where it stopped"):
        resolve_model(NAME)
    point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub")
    monkeypatch.setattr(models, "_SECONDS", 0.5)
    with pytest.raises(CTInstructError, match=r"not whole in the cache.*not finished and goes on where it stopped"):
        resolve_model(NAME)
    point_to(monkeypatch, released.address, tmp_path / "hub")
    released.refused, released.asked = set(), []
    resolve_model(NAME)
    assert {line.rpartition("/")[2] for line in weights_asked(released)} == {"model-00002-of-00003.safetensors"}


def test_too_little_disk_is_told_before_anything_is_fetched(
    released: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**8))
    with pytest.raises(CTInstructError, match=r"needs 0\.3 GB on the disk of .*, which has 0\.1 GB free"):
        resolve_model(NAME)
    assert not weights_asked(released)
    forms.whole_safetensors(tmp_path / "release", forms.released_tensors())
    forms.write_tokenizer(tmp_path / "release")
    with pytest.raises(CTInstructError, match=r"0\.1 GB free"):
        convert_released(tmp_path / "release", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((403, "GatedRepo", "Access to model is restricted."), "Access to model is restricted. Ask for access at"),
        ((404, "RepoNotFound", "Repository not found"), "Repository not found. Check the name"),
        (None, "no folder here, and not or not whole in the cache"),
    ],
)
def test_convert_says_why_a_name_cannot_be_fetched(
    answer: tuple[int, str, str] | None, words: str, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if answer is None:
        point_to(monkeypatch, "http://127.0.0.1:9", tmp_path / "hub")
    else:
        hub.answers[NAME] = answer
    done = CliRunner().invoke(app, ["convert", "released", "-i", NAME, "-o", str(tmp_path / "out")])
    assert words in str(done.exception), done.exception
    assert "\n" not in str(done.exception)


def test_convert_takes_a_name_on_the_hub_in_a_subfolder(hub: Hub, converted: Path, tmp_path: Path) -> None:
    forms.safetensors_shards(tmp_path / "repository" / "ctinstruct", forms.released_tensors())
    forms.write_tokenizer(tmp_path / "repository" / "ctinstruct")
    publish(hub, tmp_path / "repository")
    done = CliRunner().invoke(app, ["convert", "released", "-i", NAME, "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, (done.exception, done.output)
    same(weights(tmp_path / "out"), weights(converted))
    same(weights(resolve_model(NAME).folder), weights(converted))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["converted_from"] == f"{NAME}@{COMMIT}"
