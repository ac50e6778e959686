"""Which model a folder holds and whether its files are sound, before any of it is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import CTInstructError, first_line

BUNDLED = "bundled"  # the bundled model's name wherever a model is named
BUNDLED_MODEL = Path(__file__).parents[1] / "assets" / "ctinstruct-tiny"
ADAPTER = "adapter_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
# files that loading a model reads; none is unpickled or executed
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "calibration.json",
    *TOKENIZER_FILES,
    *WEIGHT_FILES,
)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER, ADAPTER_WEIGHTS)
_MOST_BYTES, _MOST_DEPTH = 2**23, 64  # of a JSON file
_LARGE = {"tokenizer.json": 2**28, "vocab.json": 2**28, INDEX: 2**28}  # of files that list words or tensors
# other weight files -> why they are not read
_OTHERS = {
    "model-*-of-*.safetensors": f"a part, but no {INDEX} that lists the parts: download the folder again",
    "*.safetensors": "a name that loading does not look for",
    "pytorch_model*.bin": "which is not read since it may run code",
}
# content of a folder -> (its description, what to do with it)
_USES = {
    "stage two": (
        "a whole CTInstruct model",
        "use it as --model of ctinstruct predict, app and evaluate, or as model of a stage-two recipe",
    ),
    "stage one": (
        "a stage-one model, which cannot write",
        "score it with ctinstruct evaluate --model {folder}, or train stage two on it with ctinstruct instruct --vision {folder}",
    ),
    "tower": ("a vision tower alone", "train stage two on it with ctinstruct instruct --vision {folder}"),
    "release": (
        "the authors' checkpoint",
        "bring it into this format with ctinstruct convert released -i {folder} -o NEW_FOLDER",
    ),
    "language model": (
        "a {detail} model, which knows no CT",
        "it can be the language model of stage two: ctinstruct instruct --set language_model={folder} --vision STAGE_ONE",
    ),
    "Qwen2-VL": (
        "a plain Qwen2-VL, which knows no CT",
        "its text part can be the language model of stage two: ctinstruct instruct --set language_model={folder} --vision STAGE_ONE; "
        "or bring the authors' weights, which go on from it, into this format with ctinstruct convert released",
    ),
    "adapter": (
        "an adapter of {detail}, not a whole model",
        "merge it (peft's merge_and_unload, then save_pretrained of model and processor) and give that folder; the folder "
        "model that ctinstruct instruct writes is merged already, or, with save: adapter, has the model's config and processor",
    ),
    "checkpoint": (
        "a checkpoint of a training run",
        "go on training with --resume {folder}, or give the folder model of the run, which it writes at its end",
    ),
    "run": ("the folder of a training run", "give {folder}/model"),
    "other": ("a {detail} model", "give a CTInstruct model"),
    "nothing": ("no model: it lacks config.json", "give a folder that save_pretrained or ctinstruct instruct wrote"),
}


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object of bounded size and depth.

    Raises:
        CTInstructError: for any other file.
    """
    try:
        most = _LARGE.get(path.name, _MOST_BYTES)
        if path.stat().st_size > most:
            raise CTInstructError(f"{path} has more than {most >> 20} MiB: it is no file of a model.")
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)
    except OSError as error:
        raise CTInstructError(f"{path} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise CTInstructError(
            f"{path} is nested deeper than {_MOST_DEPTH} levels: it is no file of a model."
        ) from error
    except ValueError as error:
        if "text" in locals() and text.startswith("version https://git-lfs"):
            raise _pointer(path) from error
        raise CTInstructError(f"{path} is no JSON ({first_line(error)}): download or save it again.") from error
    if not isinstance(value, dict):
        raise CTInstructError(f"{path} holds a {type(value).__name__}: expected a JSON object.")
    level: list[Any] = [value]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return value
    raise CTInstructError(f"{path} is nested deeper than {_MOST_DEPTH} levels: it is no file of a model.")


def _is_pointer(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(23) == b"version https://git-lfs"
    except OSError:
        return False


def _pointer(path: Path) -> CTInstructError:
    return CTInstructError(f"{path} is a pointer of Git LFS, not the file itself: run git lfs pull in its folder.")


def file_inside(folder: Path, name: Any, source: str) -> Path:
    """A file that another file of the folder names.

    Args:
        folder: in which it must lie.
        name: in the other file; must be a plain name.
        source: the other file, for messages.

    Raises:
        CTInstructError: where it leads out of the folder, by its name or as a link. The Hub's cache links from a snapshot
            to its blobs beside it, which are inside.
    """
    plain = (
        isinstance(name, str)
        and bool(name)
        and PurePosixPath(name).name == name != ".."
        and not set(name) & set("\\:\0")
    )
    if not plain:
        raise CTInstructError(f"{source} names the file {str(name)[:80]!r}: only plain names beside it are read.")
    path = folder / name
    home = folder.resolve()
    home = next((parent.parents[1] for parent in (home, *home.parents) if parent.parent.name == "snapshots"), home)
    if not path.resolve().is_relative_to(home):
        raise CTInstructError(f"{source} names {name}, which is a link out of {folder}: put the file itself there.")
    return path


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files of a folder, and its index {tensor: file}, empty without one.

    Raises:
        CTInstructError: without weights, for an unreadable index, and where a file that it names is absent or elsewhere.
    """
    index = folder / INDEX
    if adapter_base(folder) is not None:
        return [file_inside(folder, ADAPTER_WEIGHTS, str(folder))], {}
    if not index.exists():
        whole = folder / "model.safetensors"
        if whole.is_file():
            return [file_inside(folder, whole.name, str(folder))], {}
        found = "that is a folder" if whole.is_dir() else "none is there"
        for pattern, why in _OTHERS.items():
            others = sorted(path.name for path in folder.glob(pattern) if path.is_file())
            found = f"it has {others[0]}, {why}" if others and found == "none is there" else found
        raise CTInstructError(f"{folder} lacks model.safetensors ({found}): save the model with save_pretrained.")
    listed = read_object(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CTInstructError(f"{index} has no weight_map {{tensor: file}}: download or save it again.")
    files = [file_inside(folder, name, str(index)) for name in sorted(set(map(_hashable, listed.values())), key=str)]
    wrong = [file.name for file in files if file.suffix != ".safetensors"]
    if wrong:
        raise CTInstructError(f"{index} names {some(wrong)}: only safetensors files are read.")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CTInstructError(f"{index} names {len(absent)} files that are not there: {some(absent)}.")
    return files, listed


def _hashable(name: Any) -> Any:
    return name if isinstance(name, str | int | float | type(None)) else repr(name)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor; only the files' headers are read, which must cover the files exactly.

    Raises:
        CTInstructError: for a file that is cut short or no safetensors file, and for tensors that no file holds.
    """
    from safetensors import safe_open

    files, listed = weight_files(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in list(shard.keys()):
                    shapes[name] = tuple(shard.get_slice(name).get_shape())
        except Exception as error:
            if _is_pointer(file):
                raise _pointer(file) from error
            raise CTInstructError(
                f"{file} is cut short or no safetensors file ({first_line(error)}): download or save it again."
            ) from error
    lost = sorted(set(listed) - set(shapes))
    if lost:
        raise CTInstructError(f"{folder / INDEX} lists {len(lost)} tensors that no file holds: {some(lost)}.")
    return shapes


def some(names: Iterable[str], most: int = 20) -> str:
    """The first names of many, with how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def adapter_base(folder: Path) -> str | None:
    """The model, by name or folder, that the adapters of a folder belong to, as `ctinstruct instruct` writes them with `save: adapter`:
    beside config and processor; None for any other folder.

    Raises:
        CTInstructError: where a config cannot be read.
    """
    needed = (ADAPTER, "config.json", "processor_config.json")
    if not all((folder / name).exists() for name in needed):
        return None
    base = read_object(folder / ADAPTER).get("base_model_name_or_path")
    ours = read_object(folder / "config.json").get("model_type") == "ctinstruct"
    return base if ours and isinstance(base, str) and base else None


def identify(folder: Path) -> tuple[str, str]:
    """The content of a folder, a key of `_USES`, and a detail for the sentence on it.

    Raises:
        CTInstructError: where its config.json cannot be read.
    """
    if adapter_base(folder) is not None:
        return "stage two", ""
    if (folder / ADAPTER).exists():
        base = read_object(folder / ADAPTER).get("base_model_name_or_path")
        return "adapter", f"'{base}'" if isinstance(base, str) and base else "another model"
    if not (folder / "config.json").exists():
        if (folder / "model" / "config.json").exists():
            return "run", ""
        if any(folder.glob("adapter_model.*")):
            return "adapter", "another model (adapter_config.json, which says of which, is missing)"
        return ("release", "") if _is_release(folder) else ("nothing", "")
    config = read_object(folder / "config.json")
    model_type = config.get("model_type")
    if model_type == "ctinstruct":
        classes = config.get("architectures")
        if isinstance(classes, list) and "CTInstructForPretraining" in classes:
            return "stage one", ""
        if (folder / "trainer_state.json").exists() and not (folder / "processor_config.json").exists():
            return "checkpoint", ""
        return "stage two", ""
    if model_type == "ctinstruct_vision":
        return "tower", ""
    if _is_release(folder):
        return "release", ""
    if model_type is None:
        return "other", "nameless (its config.json has no model_type)"
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    if model_type == "qwen2_vl":
        return "Qwen2-VL", ""
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    writes = isinstance(model_type, str) and model_type in known
    return "language model" if writes else "other", str(model_type)[:40]


def _is_release(folder: Path) -> bool:
    """Whether the tensors have the released names; False where they cannot be read."""
    try:
        if (folder / INDEX).exists():
            names: Iterable[str] = read_object(folder / INDEX).get("weight_map") or ()
        else:
            names = tensor_shapes(folder) if (folder / "model.safetensors").exists() else ()
        return is_released_names(names)
    except CTInstructError:
        return False


def is_released_names(names: Iterable[Any]) -> bool:
    """Whether tensors have the names of the authors' release."""
    return any(str(name).startswith(("visual.encoder.", "ctrate_class_heads.")) for name in names)


def require(folder: Path, *wanted: str, argument: str = "model") -> str:
    """The content of a folder, which must be one of `wanted`, see `identify`.

    Raises:
        CTInstructError: for other content, with what can be done with it.
    """
    what, detail = identify(folder)
    if what not in wanted:
        name, advice = (part.format(folder=folder, detail=detail) for part in _USES[what])
        raise CTInstructError(f"{argument} '{folder}' cannot be loaded: it is {name}; {advice}.")
    return what


def check_json_files(folder: Path) -> None:
    """Every JSON file that loading reads is an object.

    Raises:
        CTInstructError: naming the first file that is not.
    """
    for name in MODEL_FILES:
        if name.endswith(".json") and os.path.lexists(folder / name):
            read_object(folder / name)


__all__ = [
    "ADAPTER_FILES",
    "BUNDLED",
    "BUNDLED_MODEL",
    "MODEL_FILES",
    "adapter_base",
    "check_json_files",
    "file_inside",
    "identify",
    "read_object",
    "require",
    "some",
    "tensor_shapes",
    "weight_files",
]  # fmt: skip
