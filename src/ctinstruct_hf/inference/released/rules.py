"""The authors' tensors -> ours, by a table of rules; a name without a rule is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...errors import CTInstructError


@dataclass(frozen=True)
class Rule:
    """How the released tensors whose name matches `pattern` become ours.

    Attributes:
        pattern: regular expression over the whole released name.
        names: our names with the pattern's groups; several where the tensor is cut in equal parts along its first axis;
            none where the release never uses the tensor.
        change: applied to the tensor before it is cut.
    """

    pattern: str
    names: tuple[str, ...]
    change: Callable[[torch.Tensor], torch.Tensor] | None = None


def _summed_channels(weight: torch.Tensor) -> torch.Tensor:
    """[C, 3, k, k] -> [C, 1, k, k]: the release repeats grey slices to 3 channels, which equals the summed kernel."""
    return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)


_TOWER = "model.vision_tower."
_ENCODER = r"visual\.encoder\."
_RESNET = _ENCODER + r"resnet2D\."
_NORM = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_UNET = r"visual\.decoder\."
_QUERY = r"visual\.transformer_decoder\."


def _attention(released: str, ours: str) -> list[Rule]:
    """Rules of a stack of attention layers."""
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
    Rule(_RESNET + r"conv1\.weight", (_TOWER + "encoder.stem.conv.weight",), _summed_channels),
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
# a linear layer per disease in the release, rows of a single layer here; gathered by the converter
HEAD = re.compile(r"(ctrate|rad)_class_heads\.(\d+)\.(weight|bias)")
_COMPILED = [(re.compile(rule.pattern), rule) for rule in RULES]


def our_names(released_name: str) -> list[str]:
    """Our names of a released tensor; none where the release never uses it.

    Raises:
        CTInstructError: for a name without a rule.
    """
    for pattern, rule in _COMPILED:
        match = pattern.fullmatch(released_name)
        if match:
            return [match.expand(name) for name in rule.names]
    raise CTInstructError(f"The released checkpoint has a tensor '{released_name}' that this package does not know.")


def convert_tensor(released_name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """A released tensor as (our name, tensor) pairs."""
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


def released_name(ours: str) -> str:
    """The released name of our tensor, for messages."""
    for rule in RULES:
        for target in rule.names:
            match = re.fullmatch(re.sub(r"\\\\(\d)", r"(.+)", re.escape(target)), ours)
            if match:
                pattern = rule.pattern
                for group in match.groups():  # in order: each replaces the first group that is left
                    pattern = re.sub(r"\((?:[^()]|\([^()]*\))*\)", group.replace("\\", r"\\"), pattern, count=1)
                return pattern.replace("\\", "")
    return ours


__all__ = ["HEAD", "RULES", "Rule", "convert_tensor", "our_names", "released_name"]
