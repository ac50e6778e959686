"""The authors' checkpoint -> a folder that `from_pretrained` loads, tensor by tensor."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from ...errors import CTInstructError, cannot_load, first_line
from ...files import whole_folder
from ...modeling.configuration_ctinstruct import CTInstructConfig
from ...modeling.modeling_ctinstruct import CTInstructForConditionalGeneration
from ...modeling.saving_ctinstruct import MODEL_AUTO_MAP, add_auto_map, copy_code
from ...processing.processing_ctinstruct import CTInstructProcessor
from ..chat_templates import QWEN2_VL_TEMPLATE
from ..folders import ADAPTER, TOKENIZER_FILES, WEIGHT_FILES, check_json_files, identify, read_object, require
from .checkpoint import Entry, find_checkpoint, read_entries
from .download import check_space, download
from .rules import HEAD, convert_tensor
from .settings import ADDED_TOKENS, HEADS, check_names, config_of, image_processor_of_release
from .shards import DTYPES, Packer, Writer, as_it_is

LANGUAGE_MODEL = "Qwen/Qwen2-VL-7B-Instruct"  # of the release, whose tokenizer it uses
_QWEN_WORDS = 151657  # before the release's own tokens
_SMALL_FILES = ("config.json", "generation_config.json", ADAPTER, "*.index.json", *TOKENIZER_FILES)
RELEASE_FILES = tuple(
    prefix + name
    for prefix in ("", "ctinstruct/")
    for name in (*_SMALL_FILES, *WEIGHT_FILES, "trained_params.safetensors", "pytorch_model*.bin")
)


def convert_released(
    source: str | Path,
    output: Path,
    tokenizer: str | Path | None = None,
    progress: Callable[[str], None] = lambda step: None,
    *,
    base: str | Path | None = None,
    revision: str | None = None,
    origin: str | None = None,
    packer: Callable[[CTInstructConfig], Packer] | None = None,
) -> Path:
    """The release's weights -> a folder that `from_pretrained` loads.

    Tensor by tensor: about a gigabyte is in memory at a time.

    Args:
        source: folder or file of the weights as `checkpoint.find_checkpoint` takes them, or a name on the Hub.
        output: the folder to write.
        tokenizer: its folder or name on the Hub; by default the one beside the weights, else Qwen2-VL's.
        progress: called with the name of each step.
        base: of an adapter, the folder or name of the model that it changes; by default that in adapter_config.json.
        revision: of a name on the Hub.
        origin: name and commit of the weights, kept in the config.
        packer: from the model's config, how its weights are quantised; not quantised by default.

    Raises:
        CTInstructError: for unknown or missing tensors, all by name, and for a disk without room; nothing is written then.
    """
    source, origin = _local(source, revision, progress, origin)
    weights = find_checkpoint(source)
    folder = weights.parent if weights.is_file() else weights
    entries = read_entries(weights, _base_of(folder, base, progress))
    if not any(name.startswith("visual.encoder.") for name in entries) and identify(folder)[0] != "nothing":
        require(folder, "release", "other", "adapter", argument="input")
    settings_file = folder / "config.json"
    settings = read_object(settings_file) if settings_file.exists() else {}
    try:
        config = config_of(entries, settings)
    except CTInstructError:
        raise
    except Exception as error:  # the file may hold values of any type
        raise CTInstructError(f"{settings_file} cannot be used: {first_line(error)}.") from error
    check_names(entries, config)
    words = _find_tokenizer(tokenizer, (folder, source), entries["model.embed_tokens.weight"].shape[0], progress)
    check_space({output: sum(entry.nbytes for entry in entries.values())}, f"'{output}'")
    packing = None if packer is None else packer(config)
    with whole_folder(output) as draft:
        write_shards(entries, config, Writer(draft, as_it_is if packing is None else packing.pack), progress)
        config.architectures = ["CTInstructForConditionalGeneration"]
        config.dtype = DTYPES[entries["model.embed_tokens.weight"].dtype]
        config.converted_from = origin
        if packing is not None:
            config.quantization_config = packing.settings
        config.save_pretrained(draft)
        add_auto_map(draft / "config.json", MODEL_AUTO_MAP["CTInstructForConditionalGeneration"])
        copy_code(Path(inspect.getfile(CTInstructForConditionalGeneration)), draft)
        progress("processor")
        write_processor(words, config, draft)
    return output


def _local(
    source: str | Path, revision: str | None, progress: Callable[[str], None], origin: str | None
) -> tuple[Path, str | None]:
    """The folder or file of the weights, and their origin: name and commit on the Hub."""
    path = Path(source).expanduser()
    if path.exists():
        return path, origin
    found = download(str(source), revision, RELEASE_FILES, progress, argument="input")
    return found, f"{source}@{found.name}"


def _base_of(folder: Path, base: str | Path | None, progress: Callable[[str], None]) -> Path | None:
    """The folder of an adapter's base; None without an adapter or a name of its base."""
    if not (folder / ADAPTER).exists() and base is None:
        return None
    name = base or read_object(folder / ADAPTER).get("base_model_name_or_path")
    if not name:
        return None
    path = Path(str(name)).expanduser()
    if path.exists():
        return path
    patterns = ("config.json", *WEIGHT_FILES)
    return download(str(name), None, patterns, progress, argument="base")


def _find_tokenizer(
    given: str | Path | None, folders: Sequence[Path], vocabulary: int, progress: Callable[[str], None]
) -> Path | None:
    """The folder of the tokenizer; None for a checkpoint of another vocabulary than Qwen2-VL's.

    Raises:
        CTInstructError: where it cannot be loaded.
    """
    if given is not None:
        path = Path(given).expanduser()
        return path if path.exists() else download(str(given), None, TOKENIZER_FILES, progress, argument="tokenizer")
    for folder in folders:
        if has_tokenizer(folder):
            return folder
    try:
        return download(LANGUAGE_MODEL, None, TOKENIZER_FILES, progress, argument="tokenizer")
    except CTInstructError as error:
        if vocabulary < _QWEN_WORDS:
            return None
        raise CTInstructError(
            f"{folders[0]} holds no tokenizer, and {first_line(error)}. Name a folder that has one by --tokenizer."
        ) from error


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "vocab.json").exists()


def write_shards(
    entries: dict[str, Entry], config: CTInstructConfig, writer: Writer, progress: Callable[[str], None]
) -> None:
    """All tensors under our names, the diagnosis heads, a layer per disease in the release, at the end."""
    ordered = sorted(entries.items(), key=lambda item: (str(item[1].file), item[0]))
    for number, (name, entry) in enumerate(ordered, start=1):
        if HEAD.fullmatch(name):
            continue
        progress(f"tensor {number} of {len(ordered)}")
        for target, tensor in convert_tensor(name, entry.read()):
            writer.add(target, tensor)
    for name, tensor in gather_heads(entries, config).items():
        writer.add(name, tensor)
    writer.close()


def gather_heads(entries: dict[str, Entry], config: CTInstructConfig) -> dict[str, torch.Tensor]:
    """The release's linear layers per disease as rows of a single layer."""
    lists = config.disease_lists or {}

    def rows(part: str) -> Iterator[torch.Tensor]:
        for released, ours in sorted(HEADS.items(), key=lambda item: item[1]):
            for index in range(len(lists[ours])):
                yield entries[f"{released}_class_heads.{index}.{part}"].read()

    return {f"disease_head.{part}": torch.cat(list(rows(part))) for part in ("weight", "bias")}


def write_processor(source: Path | None, config: CTInstructConfig, folder: Path) -> None:
    """The release's preparation, tokens and chat template.

    Args:
        source: folder of the tokenizer; without it only the image processor is written.
        config: of the model.
        folder: to write to.
    """
    image_processor = image_processor_of_release()
    if source is None:
        image_processor.save_pretrained(folder)
        warnings.warn(
            "There is no tokenizer: only the image processor is written. Name a tokenizer to get the whole processor.",
            stacklevel=2,
        )
        return
    check_json_files(source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise cannot_load("tokenizer", str(source), error) from error
    tokenizer.add_special_tokens({"additional_special_tokens": list(ADDED_TOKENS)}, replace_extra_special_tokens=False)
    ids = {
        "<SEG>": config.seg_token_id,
        "<disease_confidence>": config.disease_token_id,
        "<|image_pad|>": config.image_token_id,
    }
    for token, expected in ids.items():
        found = tokenizer.convert_tokens_to_ids(token)
        if found != expected:
            raise CTInstructError(
                f"The tokenizer in {source.name} gives {token} the id {found}, the model uses {expected}."
            )
    tokenizer.padding_side = "left"
    template = tokenizer.chat_template
    if not isinstance(template, str) or "vision_start" not in template:
        template = QWEN2_VL_TEMPLATE
    CTInstructProcessor(
        image_processor, tokenizer, chat_template=template, disease_lists=config.disease_lists
    ).save_pretrained(folder)
