"""The authors' checkpoint -> this format. Every tensor has a rule; an unknown or missing name is refused."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from ..errors import CTInstructError, cannot_load, first_line
from ..files import whole_folder
from ..inference.chat_templates import QWEN2_VL_TEMPLATE
from ..inference.folders import INDEX, check_json_files, file_inside, identify, read_object, require, weight_files
from ..inference.folders import some as _some
from ..modeling.configuration_ctinstruct import CT_RATE_DISEASES, RAD_CHESTCT_DISEASES, CTInstructConfig
from ..modeling.modeling_ctinstruct import CTInstructForConditionalGeneration
from ..modeling.saving_ctinstruct import MODEL_AUTO_MAP, add_auto_map, copy_code
from ..processing.image_processing_ctinstruct import CTInstructImageProcessor
from ..processing.processing_ctinstruct import CTInstructProcessor


@dataclass(frozen=True)
class Rule:
    """How the released tensors whose name matches `pattern` become ours.

    Attributes:
        pattern: regular expression over the whole released name.
        names: our names with the pattern's groups; several where one tensor is cut in equal parts along its first
            axis; none where the release never uses the tensor.
        change: what happens to the tensor before.
    """

    pattern: str
    names: tuple[str, ...]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def _one_channel(weight: torch.Tensor) -> torch.Tensor:
    """Grey slices are repeated to 3 channels in the release: equal to one channel with the summed kernel."""
    return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)


_TOWER = "model.vision_tower."
_ENCODER = r"visual\.encoder\."
_RESNET = _ENCODER + r"resnet2D\."
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_UNET = r"visual\.decoder\."
_QUERY = r"visual\.transformer_decoder\."


def _attention(released: str, ours: str) -> list[Rule]:
    """Rules of one of the two stacks of attention layers."""
    layer = _ENCODER + released + r"\.layers\.(\d+)\."
    target = _TOWER + f"attention.{ours}_layers." + r"\1."
    return [
        Rule(layer + r"0\.dsconv\.(weight|bias)", (target + r"position.conv.\2",)),
        Rule(layer + r"1\.q_scale", (target + "attention.query_scale",)),
        Rule(layer + r"1\.k_scale", (target + "attention.key_scale",)),
        Rule(layer + r"1\.norm\.gamma", (target + "attention.norm.weight",)),
        Rule(layer + r"1\.to_q\.weight", (target + "attention.query.weight",)),
        Rule(layer + r"1\.to_kv\.weight", (target + "attention.key.weight", target + "attention.value.weight")),
        Rule(layer + r"1\.to_out\.weight", (target + "attention.out.weight",)),
        Rule(layer + r"2\.0\.(weight|bias)", (target + r"feed_forward.norm.\2",)),
        Rule(layer + r"2\.1\.weight", (target + "feed_forward.up.weight",)),
        Rule(layer + r"2\.4\.weight", (target + "feed_forward.down.weight",)),
        Rule(_ENCODER + released + r"\.norm_out\.gamma", (_TOWER + f"attention.{ours}_norm.weight",)),
        # constants of zeros, and a norm of cross-attention that self-attention does not use
        Rule(_ENCODER + released + r"\.norm_out\.beta", ()),
        Rule(layer + r"1\.norm\.beta", ()),
        Rule(layer + r"1\.context_norm\.(gamma|beta)", ()),
    ]


def _up_block(released: str, ours: str) -> list[Rule]:
    block = _UNET + released + r"\."
    target = f"segmentation_decoder.{ours}."
    rules = [Rule(block + r"transp_conv\.conv\.weight", (target + "up.weight",))]
    for index, name in ((1, "first"), (2, "second")):
        rules.append(Rule(block + rf"conv_block\.conv{index}\.conv\.weight", (target + f"{name}.conv.weight",)))
        rules.append(
            Rule(
                block + rf"conv_block\.norm{index}\.{_NORM}", (target + f"{name}.norm." + rf"\{block.count('(') + 1}",)
            )
        )
    return rules


def _bottleneck() -> list[Rule]:
    rules = []
    for stage in range(1, 5):
        block = _RESNET + rf"layer{stage}\.(\d+)\."
        target = _TOWER + f"encoder.stages.{stage - 1}." + r"\1."
        for index, name in ((1, "reduce"), (2, "spatial"), (3, "expand")):
            rules.append(Rule(block + rf"conv{index}\.weight", (target + f"{name}.conv.weight",)))
            rules.append(Rule(block + rf"bn{index}\.{_NORM}", (target + f"{name}.norm." + r"\2",)))
        rules.append(Rule(block + r"downsample\.0\.weight", (target + "shortcut.conv.weight",)))
        rules.append(Rule(block + rf"downsample\.1\.{_NORM}", (target + r"shortcut.norm.\2",)))
    return rules


_LAYER = _QUERY + r"layers\.(\d+)\."
_OUR_LAYER = r"segmentation_decoder.layers.\1."
RULES: list[Rule] = [
    Rule(_RESNET + r"conv1\.weight", (_TOWER + "encoder.stem.conv.weight",), _one_channel),
    Rule(_RESNET + rf"bn1\.{_NORM}", (_TOWER + r"encoder.stem.norm.\1",)),
    *_bottleneck(),
    Rule(_RESNET + r"fc\.(weight|bias)", ()),  # the ImageNet classifier
    *_attention("enc_spatial_transformer", "patch"),
    *_attention("enc_temporal_transformer", "slice"),
    Rule(
        _ENCODER + r"spatial_rel_pos_bias\.net\.([01])\.0\.(weight|bias)",
        (_TOWER + r"attention.position_bias.layers.\1.\2",),
    ),
    Rule(_ENCODER + r"spatial_rel_pos_bias\.net\.2\.(weight|bias)", (_TOWER + r"attention.position_bias.out.\1",)),
    Rule(r"visual\.bridger\.([02])\.(weight|bias)", (r"model.bridger.\1.\2",)),
    *_up_block("decoder_vit", "token_block"),
    *(rule for index in range(4) for rule in _up_block(f"decoder{index + 1}", f"blocks.{index}")),
    Rule(_UNET + r"transp_conv\.conv\.weight", ("segmentation_decoder.last_up.weight",)),
    Rule(r"visual\.projection_layer\.([02])\.(weight|bias)", (r"segmentation_decoder.fuse.\1.\2",)),
    Rule(
        _LAYER + r"multihead_attn\.in_proj_(weight|bias)",
        tuple(_OUR_LAYER + f"attention.{part}." + r"\2" for part in ("query", "key", "value")),
    ),
    Rule(_LAYER + r"multihead_attn\.out_proj\.(weight|bias)", (_OUR_LAYER + r"attention.out.\2",)),
    Rule(_LAYER + r"linear1\.(weight|bias)", (_OUR_LAYER + r"up.\2",)),
    Rule(_LAYER + r"linear2\.(weight|bias)", (_OUR_LAYER + r"down.\2",)),
    Rule(_LAYER + r"norm1\.(weight|bias)", ()),  # of a self-attention that the release leaves out
    Rule(_LAYER + r"norm2\.(weight|bias)", (_OUR_LAYER + r"attention_norm.\2",)),
    Rule(_LAYER + r"norm3\.(weight|bias)", (_OUR_LAYER + r"feed_forward_norm.\2",)),
    Rule(_QUERY + r"norm\.(weight|bias)", (r"segmentation_decoder.norm.\1",)),
    Rule(r"visual\.qwen2biolord\.(weight|bias)", (r"segmentation_query.\1",)),
    Rule(r"visual\.mask_embed_proj\.([02])\.(weight|bias)", (r"segmentation_decoder.mask_embedding.\1.\2",)),
    Rule(r"model\.((?:embed_tokens|layers|norm)\..*)", (r"model.language_model.\1",)),
    Rule(r"lm_head\.weight", ("lm_head.weight",)),
]
# one linear layer per disease in the release, rows of one here; gathered by the converter
HEAD = re.compile(r"(ctrate|rad)_class_heads\.(\d+)\.(weight|bias)")
_COMPILED = [(re.compile(rule.pattern), rule) for rule in RULES]


def our_names(released_name: str) -> list[str]:
    """Names of this package that one released tensor fills; none where the release never uses it.

    Raises:
        CTInstructError: for a name without a rule.
    """
    for pattern, rule in _COMPILED:
        match = pattern.fullmatch(released_name)
        if match:
            return [match.expand(name) for name in rule.names]
    raise CTInstructError(f"The released checkpoint has a tensor '{released_name}' that this package does not know.")


def convert_tensor(released_name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """One released tensor as the tensors of ours that it fills."""
    for pattern, rule in _COMPILED:
        match = pattern.fullmatch(released_name)
        if match is None:
            continue
        if not rule.names and released_name.endswith(".beta") and bool((tensor != 0).any()):
            raise CTInstructError(f"'{released_name}' is not zero; the release's norms have no bias.")
        if rule.change is not None:
            tensor = rule.change(tensor)
        parts = tensor.chunk(len(rule.names)) if len(rule.names) > 1 else [tensor] * len(rule.names)
        for name, part in zip(rule.names, parts, strict=True):
            yield match.expand(name), part.contiguous()
        return
    our_names(released_name)


# the release's own lists in the order of its heads, and their positive weights
_HEADS = {"ctrate": "ct_rate", "rad": "rad_chestct"}
POSITIVE_WEIGHTS = {
    "ct_rate": [
        7.36,
        2.60,
        8.33,
        13.17,
        3.03,
        6.04,
        2.94,
        4.15,
        2.90,
        1.19,
        1.72,
        2.74,
        7.44,
        12.44,
        8.6,
        4.69,
        9.00,
        11.68,
    ],
    "rad_chestct": [0.93, 0.42, 7.92, 5.31, 7.78, 5.15, 2.69, 2.39, 0.26, 0.86, 6.71, 4.01, 11.03, 6.19, 5.31, 13.23],
}
# added to Qwen2-VL's tokenizer, in this order, from id 151657 on
ADDED_TOKENS = (
    "<SEG>",
    "<binary_answer>",
    "<multiple_choice>",
    "<report_generation>",
    "<segmentation>",
    "<diagnosis>",
    "<disease_confidence>",
)
# Qwen2-VL-7B-Instruct, for what neither the tensors' shapes nor the folder's config tell
_QWEN2_VL = {
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "mrope_section": [16, 24, 24],
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}
_TOKEN_IDS = {
    "image_token_id": 151655,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "seg_token_id": 151657,
    "disease_token_id": 151663,
}


@dataclass(frozen=True)
class Entry:
    """Where one released tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_entries(folder: Path) -> dict[str, Entry]:
    """Name -> place of every tensor in a folder's safetensors files; only their headers are read."""
    index = folder / INDEX
    files, listed = weight_files(folder) if index.exists() else ([], {})
    if not files:
        files = [folder / "model.safetensors"] if (folder / "model.safetensors").exists() else []
        files = files or sorted(folder.glob("model-*.safetensors")) or sorted(folder.glob("*.safetensors"))
        files = [file_inside(folder, file.name, str(folder)) for file in files]
    if not files:
        raise CTInstructError(f"{folder} holds no safetensors file: give the folder of the release's shards.")
    entries: dict[str, Entry] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in list(shard.keys()):
                    part = shard.get_slice(name)
                    entries[name] = Entry(file, part.get_dtype(), tuple(part.get_shape()))
        except Exception as error:
            raise CTInstructError(f"{file.name} is no readable safetensors file: {first_line(error)}.") from error
    lost = sorted(set(listed) - set(entries))
    if lost:
        raise CTInstructError(f"{index.name} lists {len(lost)} tensors that no shard holds: {_some(lost)}.")
    return entries


def released_name(ours: str) -> str:
    """The released name of one of our tensors, for messages."""
    for rule in RULES:
        for target in rule.names:
            match = re.fullmatch(re.sub(r"\\\\(\d)", r"(.+)", re.escape(target)), ours)
            if match:
                groups = iter(match.groups())
                pattern = re.sub(r"\((?:[^()]|\([^()]*\))*\)", lambda _, parts=groups: next(parts), rule.pattern)
                return pattern.replace("\\", "")
    return ours


def config_of(entries: dict[str, Entry], settings: dict[str, Any]) -> CTInstructConfig:
    """The config that the tensors' shapes tell, with the folder's own config for what they do not."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in entries:
            raise CTInstructError(f"The released checkpoint lacks '{name}'.")
        return entries[name].shape

    def count(pattern: str) -> int:
        found = {int(match[1]) for name in entries if (match := re.match(pattern, name))}
        return max(found) + 1 if found else 0

    resnet, tower = "visual.encoder.resnet2D.", "visual.encoder.enc_spatial_transformer.layers.0."
    planes = [shape(f"{resnet}layer{stage}.0.conv1.weight")[0] for stage in range(1, 5)]
    expansion = shape(f"{resnet}layer1.0.conv3.weight")[0] // planes[0]
    head_dim = shape(tower + "1.q_scale")[0]
    width = shape(tower + "1.to_q.weight")[1]
    inner = shape(tower + "2.4.weight")[1]
    vision = {
        "attention_layout": "released",
        "stem_channels": shape(resnet + "conv1.weight")[0],
        "bottleneck_planes": planes,
        "bottleneck_expansion": expansion,
        "stage_depths": [count(rf"visual\.encoder\.resnet2D\.layer{stage}\.(\d+)\.") for stage in range(1, 5)],
        "num_attention_heads": shape(tower + "1.to_q.weight")[0] // head_dim,
        "attention_head_dim": head_dim,
        "num_patch_attention_layers": count(r"visual\.encoder\.enc_spatial_transformer\.layers\.(\d+)\."),
        "num_slice_attention_layers": count(r"visual\.encoder\.enc_temporal_transformer\.layers\.(\d+)\."),
        # the inner width is floor(width x multiple x 2 / 3); half a step up, so that rounding cannot lose one
        "feed_forward_multiple": 4.0 if inner == int(4 * width * 2 / 3) else (inner + 0.5) * 3 / (2 * width),
    }
    segmentation = settings.get("segmentation", {})
    text_width = shape("visual.projection_layer.0.weight")[0]
    decoder = {
        "feature_channels": [vision["stem_channels"], *(plane * expansion for plane in planes)],
        "hidden_size": text_width,
        "num_hidden_layers": count(r"visual\.transformer_decoder\.layers\.(\d+)\."),
        "num_attention_heads": segmentation.get("decoder_heads", 8),
        "intermediate_size": shape("visual.transformer_decoder.layers.0.linear1.weight")[0],
        "mask_hidden_size": shape("visual.mask_embed_proj.0.weight")[0],
        "last_map_size": shape("visual.decoder.decoder_vit.transp_conv.conv.weight")[-1],
    }
    lists = {}
    for released, ours, diseases in (
        ("ctrate", "ct_rate", CT_RATE_DISEASES),
        ("rad", "rad_chestct", RAD_CHESTCT_DISEASES),
    ):
        heads = count(rf"{released}_class_heads\.(\d+)\.")
        if heads != len(diseases):
            raise CTInstructError(
                f"The checkpoint has {heads} {released}_class_heads, the release has {len(diseases)}."
            )
        lists[ours] = list(diseases)
    tokens = {name: settings.get(name, default) for name, default in _TOKEN_IDS.items()}
    tokens["disease_token_id"] = settings.get("disease_confidence_token_id", tokens["disease_token_id"])
    text = {**settings, **(settings.get("text_config") or {})}
    return CTInstructConfig(
        vision_config=vision,
        segmentation_config=decoder,
        text_config=_text_config(text, shape, count, tied="lm_head.weight" not in entries),
        bridger="mlp",
        image_token_order="slices",
        answer_positions="sequential",
        disease_lists=lists,
        disease_positive_weights=POSITIVE_WEIGHTS,
        disease_loss_dtype="bfloat16",
        **tokens,
    )


def _text_config(
    text: dict[str, Any], shape: Callable[[str], tuple[int, ...]], count: Callable[[str], int], tied: bool
) -> dict[str, Any]:
    """Qwen2-VL's language model: sizes from the tensors, rope and heads from the config."""
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    queries = shape("model.layers.0.self_attn.q_proj.weight")[0]
    keys = shape("model.layers.0.self_attn.k_proj.weight")[0]
    heads = int(text.get("num_attention_heads") or queries // _QWEN2_VL["head_dim"])  # type: ignore[operator]
    vocabulary, width = shape("model.embed_tokens.weight")
    end = text.get("eos_token_id", 151645)
    pad = text.get("pad_token_id", 151643)
    return {
        "model_type": "qwen2_vl_text",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape("model.layers.0.mlp.gate_proj.weight")[0],
        "num_hidden_layers": count(r"model\.layers\.(\d+)\."),
        "num_attention_heads": heads,
        "num_key_value_heads": keys * heads // queries,
        "rms_norm_eps": text.get("rms_norm_eps", _QWEN2_VL["rms_norm_eps"]),
        "max_position_embeddings": text.get("max_position_embeddings", _QWEN2_VL["max_position_embeddings"]),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope.get("rope_theta", text.get("rope_theta", _QWEN2_VL["rope_theta"])),
            "mrope_section": rope.get("mrope_section", _QWEN2_VL["mrope_section"]),
        },
        "tie_word_embeddings": tied,
        "bos_token_id": text.get("bos_token_id") if (text.get("bos_token_id") or 0) < vocabulary else None,
        "eos_token_id": end if not isinstance(end, int) or end < vocabulary else None,
        "pad_token_id": pad if pad is None or pad < vocabulary else None,
    }


def check_names(entries: dict[str, Entry], config: CTInstructConfig) -> None:
    """Every tensor has a rule, and every one of our parameters a tensor.

    Raises:
        CTInstructError: listing the names that are unknown or missing.
    """
    unknown, filled = [], set()
    for name in entries:
        if HEAD.fullmatch(name):
            continue
        try:
            filled.update(our_names(name))
        except CTInstructError:
            unknown.append(name)
    with torch.device("meta"):
        expected = {
            name: tensor.shape for name, tensor in CTInstructForConditionalGeneration(config).state_dict().items()
        }
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    heads = [
        f"{released}_class_heads.{index}.{kind}"
        for released, ours in _HEADS.items()
        for index in range(len((config.disease_lists or {})[ours]))
        for kind in ("weight", "bias")
    ]
    missing = [released_name(name) for name in expected if name not in filled and not name.startswith("disease_head.")]
    missing = sorted({*missing, *(name for name in heads if name not in entries)})
    if unknown or missing:
        parts = []
        if unknown:
            parts.append(f"{len(unknown)} unknown: {_some(sorted(unknown))}")
        if missing:
            parts.append(f"{len(missing)} missing: {_some(missing)}")
        raise CTInstructError("The checkpoint is not the released one; of its tensors " + "; ".join(parts) + ".")


class ShardWriter:
    """A safetensors file written tensor by tensor: the header first, then each tensor's bytes, never two at once."""

    def __init__(self, path: Path, layout: dict[str, tuple[str, tuple[int, ...]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape) in layout.items():
            size = math.prod(shape) * _SIZES[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        packed = json.dumps(header, separators=(",", ":")).encode()
        packed += b" " * (-len(packed) % 8)
        self.size = offset
        self.names = list(layout)
        self.file = open(path, "wb")  # noqa: SIM115 -- closed by close()
        self.file.write(struct.pack("<Q", len(packed)) + packed)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """The next tensor, which must be the next name of the layout."""
        if not self.names or self.names[0] != name:
            raise CTInstructError(f"'{name}' is written out of order.")
        self.names.pop(0)
        flat = tensor.contiguous().view(-1)
        if flat.numel():
            self.file.write(memoryview(flat.view(torch.uint8).numpy()))

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def convert_released(
    source: Path,
    output: Path,
    tokenizer: str | Path | None = None,
    tell: Callable[[str], None] = lambda step: None,
) -> Path:
    """The release's shards -> a folder that `from_pretrained` loads.

    Shard by shard and tensor by tensor: at most one shard is mapped and one tensor copied at a time.

    Args:
        source: folder with the release's safetensors shards, its `config.json` and its tokenizer.
        output: the folder to write.
        tokenizer: where the tokenizer lies, if not in `source`.
        tell: called with the name of each step.

    Raises:
        CTInstructError: where tensors are unknown or missing, all of them by name; nothing is written then.
    """
    entries = read_entries(source)
    if not any(name.startswith("visual.encoder.") for name in entries) and identify(source)[0] != "nothing":
        require(source, "release", "other", argument="input")
    settings_file = source / "config.json"
    settings = read_object(settings_file) if settings_file.exists() else {}
    try:
        config = config_of(entries, settings)
    except CTInstructError:
        raise
    except Exception as error:  # values of any type are in it
        raise CTInstructError(f"{settings_file} cannot be used: {first_line(error)}.") from error
    check_names(entries, config)
    with whole_folder(output) as draft:
        write_shards(entries, config, draft, tell)
        config.architectures = ["CTInstructForConditionalGeneration"]
        config.dtype = getattr(
            torch, {"F32": "float32", "F16": "float16"}.get(entries["model.embed_tokens.weight"].dtype, "bfloat16")
        )
        config.save_pretrained(draft)
        add_auto_map(draft / "config.json", MODEL_AUTO_MAP["CTInstructForConditionalGeneration"])
        copy_code(Path(inspect.getfile(CTInstructForConditionalGeneration)), draft)
        tell("processor")
        write_processor(Path(tokenizer) if tokenizer else source, config, draft)
    return output


def write_shards(
    entries: dict[str, Entry], config: CTInstructConfig, folder: Path, tell: Callable[[str], None]
) -> None:
    """One of our shards per released one, and the diagnosis heads, which the release spreads, in a last one."""
    files = sorted({entry.file for entry in entries.values()})
    total = len(files) + 1
    weight_map: dict[str, str] = {}
    heads: dict[tuple[str, int, str], torch.Tensor] = {}
    size = 0
    for number, file in enumerate(files, start=1):
        tell(f"shard {number} of {len(files)}")
        names = [name for name, entry in entries.items() if entry.file == file]
        layout: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name in names:
            if HEAD.fullmatch(name):
                continue
            targets = our_names(name)
            shape = entries[name].shape
            if targets and targets[0].endswith("encoder.stem.conv.weight"):
                shape = (shape[0], 1, *shape[2:])
            if len(targets) > 1:
                shape = (shape[0] // len(targets), *shape[1:])
            layout.update(dict.fromkeys(targets, (entries[name].dtype, shape)))
        path = folder / f"model-{number:05d}-of-{total:05d}.safetensors"
        writer = ShardWriter(path, layout)
        with safe_open(file, framework="pt") as shard:
            for name in names:
                match = HEAD.fullmatch(name)
                if match:
                    heads[match[1], int(match[2]), match[3]] = shard.get_tensor(name).clone()
                    continue
                for target, tensor in convert_tensor(name, shard.get_tensor(name)):
                    writer.write(target, tensor)
                    weight_map[target] = path.name
        writer.close()
        size += writer.size
    merged = {
        f"disease_head.{kind}": torch.cat(
            [
                heads[released, index, kind]
                for released, ours in sorted(_HEADS.items(), key=lambda item: item[1])
                for index in range(len((config.disease_lists or {})[ours]))
            ]
        )
        for kind in ("weight", "bias")
    }
    path = folder / f"model-{total:05d}-of-{total:05d}.safetensors"
    save_file(merged, path, metadata={"format": "pt"})
    weight_map.update(dict.fromkeys(merged, path.name))
    size += sum(tensor.numel() * tensor.element_size() for tensor in merged.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def write_processor(source: Path, config: CTInstructConfig, folder: Path) -> None:
    """The release's preparation, tokens and chat template. Without a tokenizer, the image processor alone."""
    image_processor = CTInstructImageProcessor(fit="released", axes="file", intensity="zscore", max_patches=6)
    if not (source / "tokenizer.json").exists() and not (source / "vocab.json").exists():
        image_processor.save_pretrained(folder)
        warnings.warn(
            f"{source.name} holds no tokenizer: only the image processor is written. Name one to get the whole processor.",
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
