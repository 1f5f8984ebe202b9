"""Dilated residual layer over time.

    out = (x + dropout(W relu(conv1d(x; kernel 3, dilation d)) + b)) * mask

Shapes: x, out (N, F, T); mask (N, 1, T) bool; convolution (F, F, 3); W (F, F).
Source: Y. Abu Farha, J. Gall, MS-TCN, arXiv 1903.01945.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as functional
from torch import Tensor

from .dropout import check_probability, dropout
from .operator import Operator, check_mask, check_shapes
from .pointwise import pointwise


def _dilated_residual_reference(
    x: Tensor,
    mask: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    seed: Optional[Tensor],
    dilation: int,
    p: float,
) -> Tensor:
    hidden = torch.relu(functional.conv1d(x, conv_weight, conv_bias, padding=dilation, dilation=dilation))
    return (x + dropout(pointwise(hidden, output_weight, output_bias), p, seed)) * mask.to(x.dtype)


def _flops(x: Tensor, *_: object) -> tuple[int, int]:
    n, features, t = x.shape
    return 8 * n * t * features * features, 16 * n * t * features * features


OPERATOR = Operator(_dilated_residual_reference, _flops)


def dilated_residual(
    x: Tensor,
    mask: Tensor,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    dilation: int = 1,
    p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One dilated residual layer.

    Args:
        x: Tensor (N, F, T). Zero on padded frames.
        mask: bool Tensor (N, 1, T). True on real frames.
        conv_weight, conv_bias: Tensor (F, F, 3), (F,).
        output_weight, output_bias: Tensor (F, F), (F,).
        dilation: int, default 1. In frames.
        p: float, default 0.0. Dropout probability, used when ``seed`` is given.
        seed: int64 Tensor (), optional. None switches dropout off.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        Tensor (N, F, T), zero on padded frames.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    check_shapes(
        "dilated_residual",
        x=(x, "N F T"),
        mask=(mask, "N 1 T"),
        conv_weight=(conv_weight, "F F 3"),
        conv_bias=(conv_bias, "F"),
        output_weight=(output_weight, "F F"),
        output_bias=(output_bias, "F"),
        seed=(seed, ""),
    )
    check_mask("dilated_residual", mask)
    check_probability("dilated_residual", "p", p)
    if dilation < 1:
        raise ValueError(f"dilated_residual: dilation is {dilation}, expected at least 1")
    return OPERATOR(
        x, mask, conv_weight, conv_bias, output_weight, output_bias, seed, dilation, p, backend=backend
    )
