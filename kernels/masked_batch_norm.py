"""Batch normalisation over real frames, with residual, ReLU and mask in the same operator.

    out = mask * relu(weight * (x - mean) / sqrt(var + eps) + bias + residual)

In training ``mean`` and ``var`` (biased) are those of the batch, per channel over joints and *real* frames;
in evaluation they are the running statistics. Padded frames count nowhere and come out as 0.

Shapes: x, residual, out (N, F, V, T); mask (N, 1, T) bool; weight, bias, mean, var (F,).
Source: S. Ioffe, C. Szegedy, arXiv 1502.03167; the restriction to real frames is ours.
"""

from __future__ import annotations

from typing import Optional

import torch
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


def _statistics(x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel."""
    count = (real.sum() * x.shape[2]).clamp(min=1)
    with without_autocast(x):
        # A sum over frames as a matrix product writes no tensor of the size of x.
        per_joint = x.flatten(1, 2) @ real.squeeze(1).transpose(1, 2)  # (N, F*V, 1)
    mean = rearrange(per_joint, "n (f v) 1 -> f (n v)", f=x.shape[1]).sum(1) / count
    deviation = (x - mean.view(-1, 1, 1)) * real
    return mean, deviation.square().sum((0, 2, 3)) / count


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
