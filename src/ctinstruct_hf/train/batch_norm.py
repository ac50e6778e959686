"""Batch norm over several processes: with a few volumes each, statistics of all of them together are steadier."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import CTInstructError

MODES = ("local", "synchronised", "frozen")


def set_batch_norm(model: nn.Module, mode: str) -> nn.Module:
    """`local` leaves batch norms as they are; `synchronised` takes statistics over all processes (torch's SyncBatchNorm
    on GPUs, the same by all-reduce elsewhere); `frozen` keeps the running statistics. Names of weights stay.

    Raises:
        CTInstructError: for another mode.
    """
    if mode not in MODES:
        raise CTInstructError(f"batch_norm is '{mode}': use one of {', '.join(MODES)}.")
    if mode == "synchronised" and torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if mode == "synchronised":
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = ReducedBatchNorm2d
            elif type(module) is nn.BatchNorm3d:
                module.__class__ = ReducedBatchNorm3d
    if mode == "frozen":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
                module.train = lambda mode=True, module=module: module  # type: ignore[assignment, misc, method-assign]
    return model


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is summed too."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class _Reduced:
    """A batch norm whose training statistics are those of all processes together."""

    def forward(self: Any, images: torch.Tensor) -> torch.Tensor:
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(images)  # type: ignore[misc]
        axes = [axis for axis in range(images.ndim) if axis != 1]
        values = images.double()  # sums over processes in double: they are added in another order than in one
        count = values.new_tensor([values.numel() / values.shape[1]])
        total = _SumOverProcesses.apply(count)
        mean = _SumOverProcesses.apply(values.sum(axes)) / total
        shape = [1, -1, *[1] * (images.ndim - 2)]
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(axes)) / total
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * total / (total - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        normal = centred * torch.rsqrt(variance.view(shape) + self.eps)
        return (normal.to(images.dtype) * self.weight.view(shape) + self.bias.view(shape)).to(images.dtype)


class ReducedBatchNorm2d(_Reduced, nn.BatchNorm2d):
    pass


class ReducedBatchNorm3d(_Reduced, nn.BatchNorm3d):
    pass
