"""A model by its folder or its name on the Hub: one snapshot for processor and weights, looked at before it is loaded."""

from __future__ import annotations

import functools
import logging
import os
import queue
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from .. import _auto  # noqa: F401  # the Auto classes know ours wherever a model is loaded
from ..errors import CTInstructError, cannot_load, first_line
from ..modeling.configuration_ctinstruct import CTInstructConfig
from ..modeling.modeling_ctinstruct import SPECIAL_TOKENS, CTInstructForConditionalGeneration
from ..modeling.pretraining_ctinstruct import CTInstructForPretraining
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..processing.processing_ctinstruct import CTInstructProcessor
from .calibration import read_calibration
from .chat_templates import check_template
from .folders import (
    ADAPTER_FILES,
    BUNDLED,
    BUNDLED_MODEL,
    MODEL_FILES,
    WEIGHT_FILES,
    adapter_base,
    check_json_files,
    read_object,
    require,
    some,
    tensor_shapes,
    weight_files,
)
from .precision import choose_precision, explaining_memory, find_device
from .released.cache import LAYOUT_FILES, converted, is_converted, is_released, layout_file

logger = logging.getLogger(__name__)
UNTRAINED = "The model has random weights: it shows how things work, its answers mean nothing."
_FETCHED = [*MODEL_FILES, *ADAPTER_FILES]
_SECONDS = 8  # that the Hub has to answer which commit a name stands for


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model's files are on this machine.

    Attributes:
        folder: of the files; for a name on the Hub its snapshot in the cache.
        name: as given; the folder's name for the bundled model.
        commit: of the snapshot, 40 hexadecimal digits; None for a folder.
    """

    folder: Path
    name: str
    commit: str | None = None


def resolve_model(
    model: str | Path | None = None,
    revision: str | None = None,
    argument: str = "model",
    progress: Callable[[str], None] | None = None,
) -> ResolvedModel:
    """Find a model's files, and fetch them where they are not in the cache.

    The Hub is asked once which commit the name stands for. Where it does not answer within seconds, or refuses, the copy
    in the cache is used. A `model` in the authors' layout is converted once, see `released.cache.converted`.

    Args:
        model: a folder or a name on the Hub; the bundled model by default, and by the name `bundled`.
        revision: a branch, tag or commit of a name on the Hub.
        argument: what the name was given as, for messages.
        progress: called with lines on how far a download and a conversion are.

    Raises:
        CTInstructError: where there is no such model; what the Hub says about it.
    """
    if model is None or (str(model) == BUNDLED and not os.path.isdir(BUNDLED)):
        if revision is not None:
            raise CTInstructError(f"revision '{revision}' needs a model that is a name on the Hub.")
        if not (BUNDLED_MODEL / "config.json").exists():
            raise CTInstructError("The bundled model is missing: install the package again, or name a model.")
        return ResolvedModel(BUNDLED_MODEL, BUNDLED_MODEL.name)
    name = os.path.expanduser(str(model))
    if os.path.isdir(name):
        if revision is not None:
            raise CTInstructError(
                f"revision '{revision}' is for a name on the Hub, but {argument} '{name}' is a folder."
            )
        return ResolvedModel(Path(name), name)
    if os.path.exists(name):
        raise CTInstructError(f"{argument} '{name}' is a file: give the folder that it is in.")
    found = _snapshot(name, revision, argument)
    if argument == "model" and found.commit and is_released(found.folder):
        return replace(found, folder=converted(name, found.commit, progress))
    return found


@functools.lru_cache(maxsize=16)
def _snapshot(name: str, revision: str | None, argument: str) -> ResolvedModel:
    """A name on the Hub, the same commit for the whole life of the process."""
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise cannot_load(argument, name, error, " Name a revision by --revision." if "@" in name else "") from error
    found = _cached(name, revision)
    whole = found is not None and (_has_weights(found) or (is_released(found) and is_converted(name, found.name)))
    if found is not None and whole and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return ResolvedModel(found, name, found.name)  # a commit never changes
    try:
        latest = _within(_SECONDS, lambda: HfApi().model_info(name, revision=revision, timeout=_SECONDS))
        files = [entry.rfilename for entry in latest.siblings or []]
        patterns = list(_FETCHED)
        index = layout_file(files)
        if index is not None:
            layout = Path(hf_hub_download(name, index, revision=latest.sha))
            if is_released(layout.parents[index.count("/")]):  # its weights come where they are wanted
                patterns = [
                    pattern
                    for pattern in (*_FETCHED, *LAYOUT_FILES)
                    if pattern not in (*WEIGHT_FILES[:2], ADAPTER_FILES[1])
                ]
        wanted = [file for file in files if any(fnmatchcase(file, pattern) for pattern in patterns)]
        if found is None or found.name != latest.sha or not all((found / file).exists() for file in wanted):
            found = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except Exception as error:  # of the client, of its HTTP library, of the network
        if found is None:
            hint = " It is no folder here and not in the cache." if not hasattr(error, "response") else ""
            raise cannot_load(argument, name, error, hint) from error
        reason = first_line(error)
        logger.warning("The Hub gives no answer on %s (%s): commit %s of the cache is used.", name, reason, found.name)
    return ResolvedModel(found, name, found.name)


def _has_weights(folder: Path) -> bool:
    try:
        return bool(weight_files(folder)[0])
    except CTInstructError:
        return False


def _cached(name: str, revision: str | None) -> Path | None:
    """The snapshot of a revision in the cache of the Hub's client."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", ADAPTER_FILES[0], *LAYOUT_FILES):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return Path(found).parents[file.count("/")]
    return None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns. The limit of an HTTP client counts each address and each try anew, this one does not.

    Raises:
        TimeoutError: after so many seconds; the call goes on in a thread that nobody waits for.
    """
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"the Hub does not answer within {seconds:g} seconds") from None
    if error is not None:
        raise error
    return result


@functools.lru_cache(maxsize=4)
def load_processor(model: str | None = None, revision: str | None = None) -> CTInstructProcessor:
    """The processor of a model, by folder or name; the bundled model's by default. The last four are kept.

    Args:
        model, revision: see `resolve_model`.

    Raises:
        CTInstructError: where there is no such model, or a file of it cannot be used: which, and why.
    """
    folder = resolve_model(model, revision).folder
    require(folder, "stage two")
    check_json_files(folder)
    if not (folder / "processor_config.json").exists():
        raise CTInstructError(
            f"{folder} lacks processor_config.json: save the processor there too, by save_pretrained."
        )
    with _explaining(folder):
        processor = CTInstructProcessor.from_pretrained(folder, trust_remote_code=False)
        _try_image_processor(processor.image_processor)
        config: Any = CTInstructConfig.from_pretrained(folder)
        _check_config(config)
    _check_pair(config, processor, folder)
    check_template(processor.chat_template, folder)
    return processor


@functools.lru_cache(maxsize=2)
def load_model(
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
) -> tuple[CTInstructForConditionalGeneration, CTInstructProcessor]:
    """A model and its processor, ready to answer; the last two are kept.

    Args:
        model, revision: see `resolve_model`.
        device: cpu, cuda, cuda:1, mps …; cuda where there is one.
        dtype, quantize: see `precision.choose_precision`.

    Raises:
        CTInstructError: where there is no such model, device or dtype, a file of the model cannot be used, or it does not fit.
    """
    resolved = resolve_model(model, revision)
    processor = load_processor(model, revision)
    shapes = check_weights(resolved.folder)
    before = read_object(resolved.folder / "config.json").get("quantization_config")
    precision = choose_precision(resolved.name, shapes, device, dtype, quantize, before)
    if precision.note is not None:
        logger.warning(precision.note)
    explaining = explaining_memory(resolved.name, shapes, precision.device, precision.dtype, quantize)
    with explaining, _explaining(resolved.folder):
        network: Any = read_network(resolved.folder, **precision.loading())
        if before is not None:
            precision.cast(network)
        _check_generation(network)
    network.config._commit_hash = resolved.commit
    network.calibration = read_calibration(resolved.folder)
    return network.eval().optimize_for_inference(), processor


def read_network(folder: Path, **loading: Any) -> Any:
    """The network of a folder in training mode as it was saved; adapters are merged into the model that they belong to.

    Args:
        folder: what `resolve_model` found.
        loading: of `from_pretrained`, as `dtype` and `quantization_config`.
    """
    base = adapter_base(folder)
    options = {"use_safetensors": True, "trust_remote_code": False, **loading}
    if base is None:
        return CTInstructForConditionalGeneration.from_pretrained(folder, **options)
    from peft import PeftModel

    config = CTInstructConfig.from_pretrained(folder)  # what was taught beside the weights, as its structures
    network: Any = CTInstructForConditionalGeneration.from_pretrained(
        resolve_model(base).folder, config=config, **options
    )
    merged: Any = PeftModel.from_pretrained(network, str(folder)).merge_and_unload()
    merged.config.name_or_path = str(folder)
    return merged


def load_stage_one(
    folder: Path, device: str | None = None
) -> tuple[CTInstructForPretraining, CTInstructImageProcessor, Any]:
    """A stage-one model in float32, its image processor and the tokenizer of its text encoder.

    Args:
        folder: what `resolve_model` found.
        device: as for `load_model`.

    Raises:
        CTInstructError: where the folder is something else, or a file of it cannot be used.
    """
    from transformers import AutoTokenizer

    require(folder, "stage one")
    check_json_files(folder)
    target = find_device(device)
    check_weights(folder, CTInstructForPretraining)
    with _explaining(folder):
        network: Any = CTInstructForPretraining.from_pretrained(folder, use_safetensors=True, trust_remote_code=False)
        image_processor = CTInstructImageProcessor.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return network.to(target).eval().optimize_for_inference(), image_processor, tokenizer


def first_bad(model: torch.nn.Module) -> str | None:
    """The name of the first weight or running statistic with NaN or infinity in it."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_floating_point() and value.device.type != "meta" and not bool(torch.isfinite(value).all()):
            return name
    return None


def notes_on(config: Any) -> list[str]:
    """What must be said of a model wherever its answers are shown."""
    return [note for note in (None if config.trained else UNTRAINED, config.note) if note]


def model_name(config: Any) -> str:
    """A model's name without the path of this machine, and whether it is trained."""
    folder = Path(str(config.name_or_path or "model"))
    name = folder.name
    if folder.parent.name == "snapshots":  # in the cache of the Hub's client
        name = folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return name if config.trained else f"{name} (untrained)"


def check_weights(folder: Path, kind: type[Any] = CTInstructForConditionalGeneration) -> dict[str, tuple[int, ...]]:
    """The weights are whole, and have every tensor of the model in its shape; nothing is loaded for it.

    Args:
        folder: what `resolve_model` found.
        kind: the class of the model; of adapters the model that they belong to is looked at.

    Returns:
        {tensor: shape}, of a quantised folder as they lie there.

    Raises:
        CTInstructError: naming the file, or the tensors.
    """
    base = adapter_base(folder)
    shapes = tensor_shapes(folder)
    if base is not None:
        return check_weights(resolve_model(base).folder, kind)
    with _explaining(folder):
        config = CTInstructConfig.from_pretrained(folder)
        _check_config(config)
        with torch.device("meta"):
            network = kind(config)
    if getattr(config, "quantization_config", None) is not None:  # its tensors are packed
        return shapes
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    missing = sorted(set(expected) - set(shapes))
    if missing:
        raise CTInstructError(
            f"{folder}: its safetensors files lack {len(missing)} tensors of the model: {some(missing)}."
        )
    wrong = [
        f"{name} is {list(shapes[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if shapes[name] != shape
    ]
    if wrong:
        raise CTInstructError(f"{folder}: weights and config.json do not fit each other: {some(wrong, 5)}.")
    return shapes


def _check_config(config: Any) -> None:
    """Fields that are first looked at while answering.

    Raises:
        CTInstructError: for values of a wrong type.
    """
    lists = config.disease_lists
    sound = isinstance(lists, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists.values()
    )
    if not sound:
        raise CTInstructError("disease_lists must be {name: [diseases]}")
    for name, kind in (("note", str | None), ("trained", bool), ("names_masks", bool)):
        if not isinstance(getattr(config, name), kind):  # type: ignore[arg-type]
            raise CTInstructError(f"{name} is {getattr(config, name)!r}, a {type(getattr(config, name)).__name__}")
    taught = config.structures
    if taught is not None and not (isinstance(taught, list) and all(isinstance(name, str) for name in taught)):
        raise CTInstructError("structures must be a list of names")
    vocabulary = config.text_config.vocab_size
    for name in SPECIAL_TOKENS:
        value = getattr(config, name)
        if not isinstance(value, int) or not 0 <= value < vocabulary:
            raise CTInstructError(f"{name} is {value!r}, expected a number from 0 to {vocabulary - 1}")


def _check_pair(config: Any, processor: CTInstructProcessor, folder: Path) -> None:
    """Tokenizer and model mean the same by a token, processor and model by a head.

    Raises:
        CTInstructError: where they do not; answers would be wrong without a word.
    """
    for name, token in SPECIAL_TOKENS.items():
        found = processor.tokenizer.convert_tokens_to_ids(token)
        if found != getattr(config, name):
            raise CTInstructError(
                f"{folder / 'tokenizer.json'} gives {token} the id {found}, but config.json says {getattr(config, name)}: "
                "save tokenizer and model together."
            )
    if processor.disease_lists and processor.disease_lists != config.disease_lists:
        raise CTInstructError(
            f"{folder / 'processor_config.json'} and config.json have different disease_lists: save both together."
        )


def _check_generation(network: CTInstructForConditionalGeneration) -> None:
    settings: Any = network.generation_config
    settings.validate()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "num_beams"):
        value = getattr(settings, name, None)
        values = value if isinstance(value, list) and name.endswith("_token_id") else [value]
        if not all(one is None or (isinstance(one, int) and one >= 0) for one in values):
            raise CTInstructError(f"generation_config.json: {name} is {value!r}, expected a whole number")


def _try_image_processor(image_processor: Any) -> None:
    """Prepare a small picture, which needs every setting."""
    image_processor([torch.zeros(1, 8, 8)], spacing=[(1.0, 1.0, 1.0)], return_tensors="pt")


def _is_failure(error: BaseException) -> bool:
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"  # of a library in Rust


@contextmanager
def _explaining(folder: Path) -> Iterator[None]:
    """Loading from a folder; whatever goes wrong becomes a sentence on the file at fault, found by reading each alone."""
    try:
        yield
    except BaseException as error:
        if not _is_failure(error) or isinstance(error, torch.OutOfMemoryError):
            raise
        raise _explained(folder, error) from error


def _explained(folder: Path, error: BaseException) -> CTInstructError:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, GenerationConfig

    parts: list[tuple[str, Callable[[], Any]]] = [
        ("config.json", lambda: _check_config(CTInstructConfig.from_pretrained(folder))),
        ("generation_config.json", lambda: GenerationConfig.from_pretrained(folder)),
        ("tokenizer.json", lambda: Tokenizer.from_file(str(folder / "tokenizer.json"))),
        ("tokenizer_config.json", lambda: AutoTokenizer.from_pretrained(folder, trust_remote_code=False)),
        ("processor_config.json", lambda: _try_image_processor(CTInstructImageProcessor.from_pretrained(folder))),
    ]
    for name, read in parts:
        try:
            if (folder / name).exists():
                read()
        except BaseException as reason:
            if not _is_failure(reason):
                raise
            return CTInstructError(f"{folder / name} cannot be used: {first_line(reason)}.")
    if isinstance(error, CTInstructError):
        return CTInstructError(f"{folder}: {first_line(error)}.")
    return cannot_load("model", str(folder), error)


__all__ = ["ResolvedModel", "check_weights", "first_bad", "load_model", "load_processor", "load_stage_one",
           "model_name", "notes_on", "resolve_model"]  # fmt: skip
