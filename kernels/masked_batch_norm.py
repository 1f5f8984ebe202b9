"""Batch normalisation over real frames, with residual, ReLU and mask in the same operator.

    out = mask * relu(weight * (x - mean) / sqrt(var + eps) + bias + residual)

In training ``mean`` and ``var`` (biased) are those of the batch, per channel over joints and *real* frames;
in evaluation they are the running statistics. Padded frames count nowhere and come out as 0.

Shapes: x, residual, out (N, F, V, T); mask (N, 1, T) bool; weight, bias, mean, var (F,).
Source: S. Ioffe, C. Szegedy, arXiv 1502.03167; the restriction to real frames is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from .operator import Operator, check_mask, check_shapes
from .precision import wide_dtype, widened, without_autocast


def _masked_batch_norm_reference(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Optional[Tensor],
    mean: Optional[Tensor],
    var: Optional[Tensor],
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, real = widened(x), mask.unsqueeze(1).to(wide_dtype(x))  # (N, F, V, T), (N, 1, 1, T)
    if mean is None or var is None:
        mean, var = _statistics(wide, real)
    scale = weight * torch.rsqrt(var + eps)
    out = torch.addcmul((bias - mean * scale).view(-1, 1, 1), wide, scale.view(-1, 1, 1))
    if residual is not None:
        out = out + residual
    return (torch.relu(out) * real).to(x.dtype), mean.detach().clone(), var.detach().clone()


def _statistics(
    x: Tensor, real: Tensor, total: Callable[[Tensor], Tensor] = lambda local: local
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel; `total` makes sums over all processes of those of this one."""
    count = total(real.sum() * x.shape[2]).clamp(min=1)
    with without_autocast(x):
        # A sum over frames as a matrix product writes no tensor of the size of x.
        per_joint = x.flatten(1, 2) @ real.squeeze(1).transpose(1, 2)  # (N, F*V, 1)
    mean = total(rearrange(per_joint, "n (f v) 1 -> f (n v)", f=x.shape[1]).sum(1)) / count
    deviation = (x - mean.view(-1, 1, 1)) * real
    return mean, total(deviation.square().sum((0, 2, 3))) / count


class _Total(torch.autograd.Function):
    """Sum over the processes of a group; so is the gradient, as everybody's loss depends on everybody's part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def synchronised_statistics(
    x: Tensor, mask: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over the real frames of all processes of a group, and their number.

    Pass them to :func:`masked_batch_norm` as `running`: they are differentiable, and the gradients flow to the
    other processes' inputs too. Every process of the group must call it, and run backward through it.

    Args:
        x: Tensor (N, F, V, T) of this process.
        mask: bool Tensor (N, 1, T).
        group: the processes.

    Returns:
        mean, var: Tensor (F,).
        count: Tensor (). Values of each channel that they are of.
    """

    def total(local: Tensor) -> Tensor:
        return _Total.apply(local, group)

    real = mask.unsqueeze(1).to(wide_dtype(x))
    return *_statistics(widened(x), real, total), total(mask.sum() * x.shape[2])


def _flops(x: Tensor, *_: object) -> tuple[int, int]:
    return 8 * x.numel(), 14 * x.numel()


OPERATOR = Operator(_masked_batch_norm_reference, _flops, statistics=2)


def masked_batch_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    running: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise every channel over joints and real frames; add the residual; ReLU; mask.

    Args:
        x: Tensor (N, F, V, T).
        mask: bool Tensor (N, 1, T). True on real frames.
        weight, bias: Tensor (F,).
        residual: Tensor (N, F, V, T), optional. Added before the ReLU.
        running: (mean, var), each (F,), optional. Statistics to use (evaluation). By default those of the batch
            are computed (training).
        eps: float, default 1e-5.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        out: Tensor (N, F, V, T).
        mean, var: Tensor (F,). The statistics used, without gradient; ``var`` is the biased one. For the caller's
            running averages.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    check_shapes(
        "masked_batch_norm",
        x=(x, "N F V T"),
        mask=(mask, "N 1 T"),
        weight=(weight, "F"),
        bias=(bias, "F"),
        residual=(residual, "N F V T"),
        mean=(running[0] if running else None, "F"),
        var=(running[1] if running else None, "F"),
    )
    check_mask("masked_batch_norm", mask)
    mean, var = running if running else (None, None)
    return OPERATOR(x, mask, weight, bias, residual, mean, var, eps, backend=backend)
