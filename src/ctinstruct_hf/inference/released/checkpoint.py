"""The file of each tensor of the authors' checkpoint, in any form in which their scripts save it.

Safetensors or pickles (read as tensors only), whole or in shards, in the folder or below it, of DeepSpeed's ZeRO-1 and -2,
under the prefixes of wrappers, and as an adapter (LoRA) over its base. Only headers are read here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...errors import CTInstructError, first_line
from ..folders import ADAPTER, INDEX, file_inside, read_object, some, weight_files
from .shards import CODES, DTYPES

BIN_INDEX = "pytorch_model.bin.index.json"
# the first patterns that match are the weights of a folder
_WEIGHTS = (
    ("model.safetensors",),
    ("model-*.safetensors",),
    (BIN_INDEX,),
    ("pytorch_model*.bin",),
    ("mp_rank_00_model_states.pt",),
    # of an adapter; the authors' scripts save other trained weights beside it as trained_params
    ("adapter_model.safetensors", "adapter_model.bin", "trained_params.safetensors", "non_lora_trainables.bin"),
    ("*.safetensors",),
    ("*.bin", "*.pt"),
)
STAGE_ONE_FILE = "vision_encoder.pth"
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|random_states|zero_pp_rank|bf16_zero).*")
_PICKLE_BYTES = 2**30  # read through a mapping of a pickle before it is opened again, which frees its memory
_SUBFOLDERS = ("ctinstruct", "checkpoint-*", "global_step*")

_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|_fsdp_wrapped_module\.|base_model\.model\.)+")
_LORA = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_LORA_ALPHA = 32  # the release's, without an adapter_config.json


@dataclass(frozen=True)
class Entry:
    """A tensor that is not read yet.

    Attributes:
        file: that holds it.
        dtype: as safetensors names it.
        shape: of the tensor.
        read: reads the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def find_checkpoint(source: Path) -> Path:
    """The file or folder of the weights: `source`, or below it as the authors' scripts save it (`ctinstruct/`, the last
    `checkpoint-N/`, DeepSpeed's `global_stepN/`).

    Raises:
        CTInstructError: without weights.
    """
    if source.is_file():
        return source
    found = _below(source)
    if found is None and (source / STAGE_ONE_FILE).is_file():
        return source / STAGE_ONE_FILE
    if found is None:
        partial = sorted(source.rglob("zero_pp_rank_*_model_states.pt"))
        if partial:
            raise CTInstructError(
                f"{partial[0].parent} holds weights in parts, as ZeRO-3 saves them: join them by DeepSpeed's zero_to_fp32.py."
            )
        raise CTInstructError(
            f"{source} holds no weights: give the folder of the release's safetensors, .bin or .pt files."
        )
    return found


def _below(folder: Path, depth: int = 3) -> Path | None:
    if _files(folder):
        return folder
    for pattern in _SUBFOLDERS if depth else ():
        numbered = sorted(
            (path for path in folder.glob(pattern) if path.is_dir()),
            key=lambda path: int((re.findall(r"\d+", path.name) or [0])[-1]),
        )
        for path in reversed(numbered):
            found = _below(path, depth - 1)
            if found is not None:
                return found
    return None


def _files(folder: Path) -> list[Path]:
    """The weight files of a folder, or only its index of safetensors where there is one."""
    if (folder / INDEX).is_file():
        return [folder / INDEX]
    for patterns in _WEIGHTS:
        found = [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
        found = [path for path in found if not _NO_WEIGHTS.fullmatch(path.name)]
        if found:
            return found
    return []


def read_entries(source: Path, base: Path | None = None, plain: bool = True) -> dict[str, Entry]:
    """{released name: entry} of every tensor.

    Args:
        source: what `find_checkpoint` found.
        base: of an adapter, the model that it changes.
        plain: without the wrappers' parts of the names.

    Raises:
        CTInstructError: for a file that cannot be read, and for an adapter that does not fit.
    """
    folder = source.parent if source.is_file() else source
    files, listed = _listed(source)
    raw: dict[str, Entry] = {}
    for file in files:
        raw.update(_read_safetensors(file) if file.suffix == ".safetensors" else Pickle(file).entries())
    lost = sorted(set(listed) - set(raw))
    if lost:
        raise CTInstructError(f"The index in {folder} lists {len(lost)} tensors that no file holds: {some(lost)}.")
    if not plain:
        return raw
    entries = {_plain_name(name): entry for name, entry in raw.items() if ".original_module." not in name}
    if any(_LORA.fullmatch(name) for name in entries):
        below = {} if base is None else read_entries(find_checkpoint(base))
        # of a plain Qwen2-VL only the language model is the base, not its tower
        below = {name: entry for name, entry in below.items() if not _is_qwen_tower(name)}
        settings = read_object(folder / ADAPTER) if (folder / ADAPTER).exists() else {}
        entries = _with_adapter({**below, **entries}, settings, folder)
    return entries


def _listed(source: Path) -> tuple[list[Path], Iterable[str]]:
    """Files of weights, and the tensors that their index lists."""
    if source.is_file():
        return [source], ()
    (first, *_) = files = _files(source)
    if first.name == INDEX:
        return weight_files(source)
    if first.name != BIN_INDEX:
        return [file_inside(source, file.name, str(source)) for file in files], ()
    listed = read_object(first).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CTInstructError(f"{first} has no weight_map {{tensor: file}}: download or save it again.")
    shards = [file_inside(source, name, str(first)) for name in sorted(set(listed.values()))]
    absent = [shard.name for shard in shards if not shard.is_file()]
    if absent:
        raise CTInstructError(f"{first} names {len(absent)} files that are not there: {some(absent)}.")
    return shards, listed


def _is_qwen_tower(name: str) -> bool:
    return name.startswith(("visual.blocks.", "visual.merger.", "visual.patch_embed."))


def _plain_name(name: str) -> str:
    """A name of the release without the parts that training wrappers and newer versions of Transformers add."""
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"\.base_layer\.|\.modules_to_save\.[^.]+\.", ".", name)
    return re.sub(r"^model\.(language_model\.(?:model\.)?|(?=visual\.))", lambda m: "model." if m[1] else "", name)


def _read_safetensors(file: Path) -> dict[str, Entry]:
    def reader(name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            with safe_open(file, framework="pt") as shard:  # opened each time: its memory is freed with the tensor
                return shard.get_tensor(name)

        return read

    try:
        with safe_open(file, framework="pt") as shard:
            parts = {name: shard.get_slice(name) for name in list(shard.keys())}
            return {
                name: Entry(file, part.get_dtype(), tuple(part.get_shape()), reader(name))
                for name, part in parts.items()
            }
    except Exception as error:
        raise CTInstructError(f"{file.name} is no readable safetensors file: {first_line(error)}.") from error


class Pickle:
    """A file of `torch.save`, of which only tensors are read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._tensors: dict[str, torch.Tensor] | None = None
        self._read = 0

    def entries(self) -> dict[str, Entry]:
        found = {
            name: Entry(self.file, CODES[tensor.dtype], tuple(tensor.shape), lambda name=name: self.read(name))  # type: ignore[misc]
            for name, tensor in self.tensors().items()
        }
        self._tensors = None
        return found

    def read(self, name: str) -> torch.Tensor:
        tensor = self.tensors()[name]
        self._read += tensor.nbytes
        if self._read > _PICKLE_BYTES:
            self._tensors, self._read = None, 0
        return tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        if self._tensors is None:
            contents = _unpickle(self.file)
            for key in ("module", "state_dict", "model"):  # of DeepSpeed, Lightning, others
                if isinstance(contents, dict) and isinstance(contents.get(key), dict):
                    contents = contents[key]
            named = contents.items() if isinstance(contents, dict) else ()
            self._tensors = {str(name): value for name, value in named if isinstance(value, torch.Tensor)}
            if not self._tensors:
                raise CTInstructError(f"{self.file} holds no tensors by name: expected a state_dict.")
        return self._tensors


def _unpickle(file: Path) -> Any:
    try:
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(
                file, map_location="cpu", weights_only=True
            )  # of torch before 1.6, which cannot be mapped
    except Exception as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise CTInstructError(
                f"{file} holds a {foreign[1]} beside tensors and is not read, since that may run code: save its state_dict alone."
            ) from error
        raise CTInstructError(f"{file} is cut short or no file of torch.save: {first_line(error)}.") from error


def _with_adapter(entries: dict[str, Entry], settings: dict[str, Any], folder: Path) -> dict[str, Entry]:
    """The entries with every LoRA merged into its weight."""
    if any("lora_magnitude_vector" in name for name in entries) or settings.get("use_dora"):
        raise CTInstructError(f"{folder} holds a DoRA adapter: merge it with peft's merge_and_unload first.")
    pairs: dict[str, dict[str, Entry]] = {}
    for name, entry in entries.items():
        found = _LORA.fullmatch(name)
        if found:
            pairs.setdefault(f"{found[1]}.weight", {})[found[2]] = entry
    merged = {name: entry for name, entry in entries.items() if not _LORA.fullmatch(name)}
    for name, pair in pairs.items():
        if len(pair) != 2:
            raise CTInstructError(f"{folder} holds only one of the two matrices of LoRA for {name}.")
        if name not in merged:
            raise CTInstructError(
                f"{folder} holds an adapter, but the {name} that it changes is not there: name its base by --base."
            )
        merged[name] = _changed(
            name, merged[name], pair["A"], pair["B"], _scale(name, pair["A"].shape[0], settings), folder
        )
    return merged


def _scale(name: str, rank: int, settings: dict[str, Any]) -> float:
    alpha = settings.get("lora_alpha", _LORA_ALPHA)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.search(rf"(^|\.){pattern}$", name.removesuffix(".weight")):
            alpha = value
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _changed(name: str, entry: Entry, down: Entry, up: Entry, scale: float, folder: Path) -> Entry:
    if len(entry.shape) != 2 or (up.shape[0], down.shape[1]) != entry.shape or up.shape[1] != down.shape[0]:
        raise CTInstructError(
            f"{folder}: LoRA of {list(up.shape)} and {list(down.shape)} does not fit {name} {list(entry.shape)}: it is of another base."
        )

    def read() -> torch.Tensor:
        weight = entry.read()
        change = (up.read().float() @ down.read().float()) * scale
        return (weight.float() + change).to(weight.dtype)

    return Entry(entry.file, entry.dtype, entry.shape, read)
