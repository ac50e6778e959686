"""Model folders that are broken, or are something else: one sentence that names the file and what to do, exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ctinstruct_hf import CTInstructError
from ctinstruct_hf.cli import app
from ctinstruct_hf.inference.folders import file_inside, read_object, weight_files
from ctinstruct_hf.inference.models import load_model, load_stage_one, resolve_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(untrained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(untrained, tmp_path / "model", ignore=shutil.ignore_patterns("*.py")))


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def change(name: str, *keys: str, to: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = inner = json.loads((folder / name).read_text())
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        (folder / name).write_text(json.dumps(values))

    return apply


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def header(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the table of tensors at the beginning of the weights."""

    def apply(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        table = json.loads(content[8 : 8 + length])
        edit(table)
        packed = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(packed)) + packed + content[8 + length :])

    return apply


def tensors(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        values = load_file(folder / WEIGHTS)
        edit(values)
        save_file(values, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def indexed(name: str) -> Callable[[Path], None]:
    """An index whose tensors are in a file of this name."""

    def apply(folder: Path) -> None:
        names = list(load_file(folder / WEIGHTS))
        (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))

    return apply


def swapped(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    for old, new in (("<SEG>", "<x>"), ("<disease_confidence>", "<SEG>"), ("<x>", "<disease_confidence>")):
        text = text.replace(old, new)
    (folder / "tokenizer.json").write_text(text)


def linked(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "elsewhere.safetensors")


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
LENGTHY = "{% for a in range(99999) %}{{ 'abcdefghijklmnopqrstuvwxyz' }}{% endfor %}"
HUGE = "{{ 'a' * 10000000000 }}"
CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    # what is broken -> (how, the file that is named, a part of the sentence)
    "weights cut after a broken download": (cut(WEIGHTS, 100_000), WEIGHTS, "cut short"),
    "weights cut in the header": (cut(WEIGHTS, 500), WEIGHTS, "cut short"),
    "no weights in the file": (cut(WEIGHTS, 0), WEIGHTS, "cut short"),
    "offsets past the end": (
        header(lambda table: table["lm_head.weight" if "lm_head.weight" in table else sorted(table)[-1]].update(data_offsets=[0, 2**40])),
        WEIGHTS, "cut short",
    ),
    "offsets that overlap": (
        header(lambda table: [one.update(data_offsets=[0, 4]) for name, one in table.items() if name != "__metadata__"]),
        WEIGHTS, "cut short",
    ),
    "a page of an error instead of weights": (write(WEIGHTS, "<!DOCTYPE html>" * 9), WEIGHTS, "no safetensors file"),
    "a pointer of Git LFS": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid 1\n"), WEIGHTS, "git lfs pull"),
    "pickled weights": (pickled, "pytorch_model.bin", "may run code"),
    "a tensor is missing": (tensors(lambda values: values.pop(next(iter(values)))), "model", "lack 1 tensors"),
    "a tensor of another shape": (
        tensors(lambda values: values.update({"model.bridger.weight" if "model.bridger.weight" in values else
                                              sorted(values)[0]: torch.zeros(3, 5)})),
        "model", "do not fit each other",
    ),
    "an index that leads out": (indexed("../elsewhere.safetensors"), INDEX, "only plain names"),
    "an index with an absolute path": (indexed("/elsewhere.safetensors"), INDEX, "only plain names"),
    "an index of a file that is not there": (indexed("model-00001-of-00001.safetensors"), INDEX, "not there"),
    "an index without a map": (write(INDEX, "{}"), INDEX, "no weight_map"),
    "an index of numbers": (write(INDEX, '{"weight_map": {"a": 1}}'), INDEX, "only plain names"),
    "an index of pickles": (write(INDEX, '{"weight_map": {"a": "pytorch_model.bin"}}'), INDEX, "only safetensors"),
    "weights that are a link": (linked, WEIGHTS, "link out of"),
    "shards without an index": (
        lambda folder: (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors") and None,
        "model-00001-of-00002.safetensors", "no model.safetensors.index.json",
    ),
    "weights of another name": (
        lambda folder: (folder / WEIGHTS).rename(folder / "weights.safetensors") and None, "weights.safetensors", "does not look for",
    ),
    "weights that are a folder": (
        lambda folder: (folder / WEIGHTS).unlink() or (folder / WEIGHTS).mkdir(), WEIGHTS, "that is a folder",
    ),
    "an index that is a folder": (lambda folder: (folder / INDEX).mkdir(), INDEX, "Is a directory"),
    "an adapter's weights alone": (
        lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.safetensors") and (folder / "config.json").unlink(),
        "model", "an adapter of another model (adapter_config.json",
    ),
    "config of 50 MB": (
        lambda folder: (folder / "config.json").write_text('{"a": "' + "b" * 50_000_000 + '"}') and None, "config.json", "more than 8 MiB",
    ),
    "config with a mark of its encoding": (
        lambda folder: (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()) and None,
        "config.json", "no JSON",
    ),
    "config of several types": (change("config.json", "model_type", to=["ctinstruct"]), "model", "give a CTInstruct model"),
    "structures of numbers": (change("config.json", "structures", to=[1]), "config.json", "structures"),
    "no config": (remove("config.json"), "model", "lacks config.json"),
    "config is no JSON": (write("config.json", "{"), "config.json", "no JSON"),
    "config is a list": (write("config.json", "[1]"), "config.json", "expected a JSON object"),
    "config is no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json", "no JSON"),
    "config is deep": (write("config.json", '{"a":' * 90 + "1" + "}" * 90), "config.json", "deeper than"),
    "config is deeper than Python": (write("config.json", '{"a":' * 99_999 + "1" + "}" * 99_999), "config.json", "deeper"),
    "config without a type": (change("config.json", "model_type", to=None), "model", "no model_type"),
    "config of another model": (change("config.json", "model_type", to="sam2"), "model", "a sam2 model"),
    "a width of words": (change("config.json", "text_config", "hidden_size", to="wide"), "config.json", "hidden_size"),
    "a width that does not fit": (change("config.json", "text_config", "intermediate_size", to=7), "model", "do not fit"),
    "no vision": (change("config.json", "vision_config", to=3), "config.json", ""),
    "a token outside": (change("config.json", "seg_token_id", to=10**9), "config.json", "seg_token_id"),
    "lists of numbers": (change("config.json", "disease_lists", to={"a": [1, 2]}), "config.json", "disease_lists"),
    "a note that is no text": (change("config.json", "note", to=5), "config.json", "note"),
    "generation of words": (change("generation_config.json", "eos_token_id", to="end"), "generation_config.json", "eos_token_id"),
    "generation is no JSON": (write("generation_config.json", "]"), "generation_config.json", "no JSON"),
    "no processor": (remove("processor_config.json"), "processor_config.json", "lacks"),
    "processor is deep": (write("processor_config.json", "[" * 99_999), "processor_config.json", "deeper"),
    "a patch of words": (
        change("processor_config.json", "image_processor", "patch_size", to="big"), "processor_config.json", "",
    ),
    "a window that is none": (
        change("processor_config.json", "image_processor", "hu_window", to=[1]), "processor_config.json", "",
    ),
    "no tokenizer": (remove("tokenizer.json"), "model", ""),
    "tokenizer is cut": (cut("tokenizer.json", 1000), "tokenizer.json", "no JSON"),
    "tokenizer with a bad pattern": (
        change("tokenizer.json", "pre_tokenizer", to={"type": "Split", "pattern": {"Regex": "(((["}, "behavior": "Isolated",
                                                      "invert": False}), "tokenizer.json", "",
    ),
    "tokenizer of another kind": (change("tokenizer.json", "model", to={"type": "Nothing"}), "tokenizer.json", ""),
    "tokenizer with other ids": (swapped, "tokenizer.json", "the id"),
    "other lists of diseases": (change("processor_config.json", "disease_lists", to={"a": ["b"]}), "processor_config.json", "different disease_lists"),
    "tokenizer_config of a list": (write("tokenizer_config.json", "[]"), "tokenizer_config.json", "expected a JSON object"),
    "template does not parse": (write("chat_template.jinja", "{% if %}"), "chat_template.jinja", "line 1"),
    "template fails": (write("chat_template.jinja", "{{ messages.nothing.there }}"), "chat_template.jinja", "no attribute"),
    "template refuses": (write("chat_template.jinja", "{{ raise_exception('no [/x]') }}"), "chat_template.jinja", "no [/x]"),
    "template without images": (write("chat_template.jinja", "hello"), "chat_template.jinja", "0 times for two images"),
    "template without end": (write("chat_template.jinja", ENDLESS), "chat_template.jinja", "does not end within"),
    "template that writes on": (write("chat_template.jinja", LENGTHY), "chat_template.jinja", "writes more than"),
    "template that takes all memory": (write("chat_template.jinja", HUGE), "chat_template.jinja", "MiB"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_broken_folder_is_one_sentence_that_names_the_file(case: str, folder: Path, tmp_path: Path, small_scan: Path) -> None:  # fmt: skip
    damage, file, words = CASES[case]
    damage(folder)
    done = CliRunner().invoke(
        app, ["predict", "-i", str(small_scan), "-o", str(tmp_path / "out"), "--model", str(folder)]
    )
    assert isinstance(done.exception, CTInstructError), (done.exception, done.output)
    sentence = str(done.exception)
    assert file in sentence, sentence
    assert words in sentence, sentence
    assert "\n" not in sentence
    assert len(sentence) < 900
    assert not (tmp_path / "out").exists()


def test_the_process_ends_with_code_2_and_no_traceback(folder: Path, small_scan: Path, tmp_path: Path) -> None:
    cut(WEIGHTS, 100_000)(folder)
    command = [sys.executable, "-m", "ctinstruct_hf.cli", "predict", "-i", str(small_scan), "-o", str(tmp_path / "out")]
    done = subprocess.run([*command, "--model", str(folder)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert f"ctinstruct: {folder / WEIGHTS} is cut short or no safetensors file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_note_with_brackets_is_shown_as_it_is(folder: Path, tmp_path: Path) -> None:
    from ctinstruct_hf.phantoms import make_phantom

    change("config.json", "note", to="Only for [/x] and [red]")(folder)
    scan = tmp_path / "[b] scan [red].nii.gz"
    volume = make_phantom(1, shape=(8, 24, 24)).volume
    import nibabel as nib

    nib.save(volume.to_source(volume.hu), scan)
    arguments = ["predict", "-i", str(scan), "-o", str(tmp_path / "out"), "--model", str(folder), "--segment", "liver"]
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None, done.exception
    assert "Only for [/x] and [red]" in " ".join(done.output.split())
    assert "[b] scan [red].nii.gz" in " ".join(done.output.split())


def test_a_folder_is_found_by_its_place_in_the_home_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    spaced = folder.rename(folder.parent / "my model")
    for name in ("~/my model", f"{spaced}/"):
        assert resolve_model(name).folder == spaced
    with pytest.raises(CTInstructError, match="neither a folder nor a name on the Hub"):
        resolve_model("~/none")


def test_a_template_of_others_writes_what_transformers_writes(folder: Path) -> None:
    from ctinstruct_hf.inference.chat_templates import render_chat
    from ctinstruct_hf.processing.processing_ctinstruct import CHAT_TEMPLATE

    _, processor = load_model(str(folder), "cpu")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Wo? 肝臓 [/x]"}]}]
    expected = processor.apply_chat_template(messages, add_generation_prompt=True)
    (folder / "chat_template.jinja").write_text("{# another #}" + CHAT_TEMPLATE)
    load_model.cache_clear()
    from ctinstruct_hf.inference.models import load_processor

    load_processor.cache_clear()
    other = load_processor(str(folder), None)
    assert other.chat_template != CHAT_TEMPLATE
    assert render_chat(other, messages, add_generation_prompt=True) == expected
    other.chat_template = "{% if 'liver' in messages[0].content %}" + ENDLESS + "{% endif %}fine"
    assert render_chat(other, [{"role": "user", "content": "spleen"}]) == "fine"
    with pytest.raises(CTInstructError, match="does not end within"):  # only this question makes it run without end
        render_chat(other, [{"role": "user", "content": "liver"}])
    assert render_chat(other, [{"role": "user", "content": "lung"}]) == "fine"


def test_what_a_file_names_stays_in_its_folder(folder: Path, tmp_path: Path) -> None:
    for name in ("../a", "/a", "a/b", "..", ".", "", "c:a", "a\\b", 3, None):
        with pytest.raises(CTInstructError, match="only plain names"):
            file_inside(folder, name, "index")
    (folder / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CTInstructError, match="link out of"):
        file_inside(folder, "out", "index")
    # the Hub's cache links from a snapshot to the blobs beside it
    snapshot = tmp_path / "models--me--ct" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--me--ct" / "blobs").mkdir()
    (tmp_path / "models--me--ct" / "blobs" / "abc").write_bytes(b"x")
    (snapshot / WEIGHTS).symlink_to("../../blobs/abc")
    assert file_inside(snapshot, WEIGHTS, "index").read_bytes() == b"x"
    assert weight_files(snapshot)[0] == [snapshot / WEIGHTS]


def test_pickles_are_never_loaded(folder: Path, tmp_path: Path) -> None:
    """Neither by this package, nor where a recipe names a language model or a text encoder."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    from ctinstruct_hf.train.language_models import load_language_model
    from ctinstruct_hf.train.text_encoders import load_text_encoder

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }
    for model, load in (
        (LlamaForCausalLM(LlamaConfig(**sizes)), load_language_model),
        (BertModel(BertConfig(**sizes)), load_text_encoder),
    ):
        place = tmp_path / type(model).__name__
        model.save_pretrained(place)
        (place / WEIGHTS).unlink()
        torch.save({name: Explodes() for name in model.state_dict()}, place / "pytorch_model.bin")
        with pytest.raises(CTInstructError, match="cannot be loaded"):
            load(str(place))


class Explodes:
    """What runs where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("exit 1",)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that are something else than a whole model, by what they are."""
    root = tmp_path_factory.mktemp("others")
    made: dict[str, Path] = {}

    def folder(name: str, **files: dict[str, Any]) -> Path:
        place = made[name] = root / name
        place.mkdir()
        for file, content in files.items():
            (place / f"{file}.json").write_text(json.dumps(content))
        return place

    folder("adapter", adapter_config={"base_model_name_or_path": "/data/base [/x]"})
    folder("adapter_and_config", adapter_config={}, config={"model_type": "ctinstruct"})
    folder("stage_one", config={"model_type": "ctinstruct", "architectures": ["CTInstructForPretraining"]})
    folder("tower", config={"model_type": "ctinstruct_vision"})
    save_file({"model.norm.weight": torch.zeros(1)}, folder("qwen", config={"model_type": "qwen2_vl"}) / WEIGHTS)
    folder("llama", config={"model_type": "llama"})
    folder("checkpoint", config={"model_type": "ctinstruct"}, trainer_state={})
    folder("empty")
    run = folder("run")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text("{}")
    release = folder("release", config={"model_type": "qwen2_vl"})
    save_file({"visual.encoder.x": torch.zeros(1)}, release / WEIGHTS)
    bare = folder("release_without_config")
    save_file({"visual.encoder.x": torch.zeros(1)}, bare / WEIGHTS)
    return made


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter", "an adapter of '/data/base [/x]', not a whole model; merge it"),
        ("adapter_and_config", "an adapter of another model"),
        ("stage_one", "ctinstruct evaluate --model {folder}, or train stage two on it with ctinstruct instruct --vision {folder}"),
        ("tower", "ctinstruct instruct --vision {folder}"),
        ("qwen", "a plain Qwen2-VL"),
        ("llama", "ctinstruct instruct --set language_model={folder}"),
        ("checkpoint", "--resume {folder}"),
        ("empty", "lacks config.json"),
        ("run", "give {folder}/model"),
        ("release", "ctinstruct convert released -i {folder}"),
        ("release_without_config", "ctinstruct convert released -i {folder}"),
    ],
)  # fmt: skip
def test_a_folder_of_something_else_says_what_it_is_and_what_to_do(
    name: str, words: str, others: dict[str, Path], small_scan: Path, tmp_path: Path
) -> None:
    arguments = ["predict", "-i", str(small_scan), "-o", str(tmp_path / "out"), "--model", str(others[name])]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, CTInstructError), done.exception
    assert words.format(folder=others[name]) in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_each_verb_names_the_right_one(others: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    out = ["-o", str(tmp_path / "out")]
    for arguments, words in (
        (["evaluate", "--data", "phantoms:slice:0-2", "--model", str(others["adapter"]), *out], "an adapter of"),
        (["evaluate", "--data", "phantoms:slice:0-2", "--model", str(others["release"]), *out], "convert released"),
        (["calibrate", "--data", "phantoms:slice:0-2", "--model", str(others["stage_one"])], "instruct --vision"),
        (["calibrate", "--data", "phantoms:slice:0-2", "--model", "me/ct"], "is no folder: calibrate writes"),
        (["instruct", "tiny", "--vision", str(others["adapter"]), *out], "an adapter of"),
        (["instruct", "tiny", "--vision", str(others["llama"]), *out], "language_model="),
        (["pretrain", "tiny", "--set", f"model={folder}", *out], "a whole CTInstruct model"),
        (["convert", "released", "-i", str(folder), *out], "a whole CTInstruct model"),
        (["convert", "released", "-i", str(others["qwen"]), *out], "a plain Qwen2-VL"),
        (["publish", str(others["adapter"]), "me/ct", "--dry-run"], "an adapter of"),
        (["card", str(others["release"])], "convert released"),
    ):
        done = CliRunner().invoke(app, arguments)
        assert isinstance(done.exception, CTInstructError), (arguments, done.exception)
        assert words in str(done.exception), (arguments, done.exception)
    with pytest.raises(CTInstructError, match="a whole CTInstruct model"):
        load_stage_one(folder)
    assert not (tmp_path / "out").exists()


def test_json_of_a_model_has_bounds(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [[[{"b": 1}]]]}')
    assert read_object(tmp_path / "a.json") == {"a": [[[{"b": 1}]]]}
    with pytest.raises(CTInstructError, match=r"b\.json cannot be read: No such file"):
        read_object(tmp_path / "b.json")
