"""Convolution blocks that the towers and the segmentation decoder share, and the initial weights of all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """The memory order in which 2D convolutions are fastest; values unchanged. [N, C, H, W]."""
    return images.contiguous(memory_format=torch.channels_last)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention in the interface of Transformers: [B, heads, L, d] in, ([B, L, heads, d], weights) out."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def fastest_layout(images: torch.Tensor) -> torch.Tensor:
    """Channels last, but for the small maps of float32 on a CPU, whose wide kernels run faster channels first."""
    small = images.shape[-1] * images.shape[-2] <= 256 and images.dtype == torch.float32
    if small and images.device.type == "cpu":
        return images.contiguous()
    return channels_last(images)


def is_plain(conv: nn.Module) -> bool:
    """False where the convolution's weights are not simply there (an adapter, offloaded weights): only its own call
    knows them then."""
    return type(conv) in (nn.Conv2d, nn.Conv3d) and not hasattr(conv, "_hf_hook") and not conv.weight.is_meta


def needs_plain_forward(module: nn.Module) -> bool:
    """True where gradients or a graph are wanted: then nothing is folded, cut in chunks or changed in place."""
    return module.training or torch.is_grad_enabled() or torch.compiler.is_compiling()


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, activation.

    In inference the norm is folded into the convolution, so that one pass over the pixels is saved: equal up to
    rounding. The folded weights are kept until a parameter changes.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, activation: str | None = None) -> None:
        super().__init__()
        self.conv = conv
        norm = nn.BatchNorm2d if isinstance(conv, nn.Conv2d) else nn.BatchNorm3d
        self.norm = norm(conv.out_channels)
        self.activation = activation
        self._folded: tuple[Any, torch.Tensor, torch.Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_folded": None}

    def folded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the one convolution that equals convolution and norm in inference."""
        norm, weight = self.norm, self.conv.weight
        sources = (weight, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        state = tuple(
            (id(source), 0 if source.is_inference() else source._version, source.dtype, source.device)
            for source in sources
        )
        if self._folded is None or self._folded[0] != state:
            scale = norm.weight.float() * torch.rsqrt(norm.running_var.float() + norm.eps)
            bias = norm.bias.float() - norm.running_mean.float() * scale
            folded = weight.float() * scale.view(-1, *[1] * (weight.ndim - 1))
            self._folded = (state, folded.to(weight.dtype), bias.to(weight.dtype))
        return self._folded[1], self._folded[2]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if needs_plain_forward(self) or not is_plain(self.conv):
            hidden = self.norm(self.conv(images))
        else:
            weight, bias = self.folded()
            convolve = F.conv2d if weight.ndim == 4 else F.conv3d
            hidden = convolve(images, weight, bias, self.conv.stride, self.conv.padding)
        if self.activation == "relu":
            return F.relu(hidden, inplace=not torch.is_grad_enabled())
        if self.activation == "leaky_relu":
            return F.leaky_relu(hidden, 0.01, inplace=not torch.is_grad_enabled())
        return hidden


class Bottleneck(GradientCheckpointingLayer):
    """1 x 1, 3 x 3 with the stride, 1 x 1, added to the input. [N, C, H, W] both ways."""

    def __init__(self, in_channels: int, planes: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.reduce = ConvNorm(nn.Conv2d(in_channels, planes, 1, bias=False), "relu")
        self.spatial = ConvNorm(nn.Conv2d(planes, planes, 3, stride=stride, padding=1, bias=False), "relu")
        self.expand = ConvNorm(nn.Conv2d(planes, out_channels, 1, bias=False))
        self.shortcut = None
        if stride != 1 or in_channels != out_channels:
            self.shortcut = ConvNorm(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        residual = images if self.shortcut is None else self.shortcut(images)
        hidden = self.expand(self.spatial(self.reduce(images)))
        if torch.is_grad_enabled():
            return F.relu(hidden + residual)
        return F.relu_(hidden.add_(residual))


def init_weights(module: nn.Module, deviation: float) -> None:
    """Initial weights of the layer types of this package; leaves alone what was loaded."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        if module.groups > 1:
            init.normal_(module.weight, std=deviation)
        else:
            init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.ConvTranspose2d):
        # each output pixel of a stride-k, size-k transposed convolution sums over in_channels
        init.normal_(module.weight, std=module.in_channels**-0.5)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, std=deviation)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        init.normal_(module.weight, std=deviation)
    elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d | nn.LayerNorm):
        if module.weight is not None:
            init.ones_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d):
            init.zeros_(module.running_mean)
            init.ones_(module.running_var)
            init.zeros_(module.num_batches_tracked)
