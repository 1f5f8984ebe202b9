"""Spatio-temporal fusion layer: a two-layer network on temporal features plus a spatial projection.

    out = (W2 dropout(gelu(W1 x + spatial + b1)) + b2 + x) * mask            exact GELU

``spatial`` is the layer's own projection of its spatial group, already multiplied through to the hidden
width; W1 likewise holds every product that has no non-linearity in between (see trgnet.model).

Shapes: x, spatial, out (N, F, T); mask (N, 1, T) bool; W1, W2 (F, F); b1, b2 (F,).
Source: arXiv 2503.15126 (spatio-temporal fusion of DSFM); the folding of its linear maps is ours.
"""

from __future__ import annotations

from typing import Optional

import torch.nn.functional as functional
from torch import Tensor

from .dropout import check_probability, dropout
from .operator import Operator, check_mask, check_shapes
from .pointwise import pointwise


def _fusion_layer_reference(
    x: Tensor,
    spatial: Tensor,
    mask: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    seed: Optional[Tensor],
    p: float,
) -> Tensor:
    hidden = functional.gelu(pointwise(x, weight1, bias1) + spatial)
    return (pointwise(dropout(hidden, p, seed), weight2, bias2) + x) * mask.to(x.dtype)


def _flops(x: Tensor, *_: object) -> tuple[int, int]:
    n, features, t = x.shape
    return 4 * n * t * features * features, 8 * n * t * features * features


OPERATOR = Operator(_fusion_layer_reference, _flops)


def fusion_layer(
    x: Tensor,
    spatial: Tensor,
    mask: Tensor,
    *,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Fuse a spatial projection into temporal features through a residual two-layer network.

    Args:
        x, spatial: Tensor (N, F, T).
        mask: bool Tensor (N, 1, T). True on real frames.
        weight1, weight2: Tensor (F, F), with bias1, bias2 (F,).
        p: float, default 0.0. Dropout probability of the hidden layer, used when ``seed`` is given.
        seed: int64 Tensor (), optional. None switches dropout off.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        Tensor (N, F, T), zero on padded frames.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    check_shapes(
        "fusion_layer",
        x=(x, "N F T"),
        spatial=(spatial, "N F T"),
        mask=(mask, "N 1 T"),
        weight1=(weight1, "F F"),
        bias1=(bias1, "F"),
        weight2=(weight2, "F F"),
        bias2=(bias2, "F"),
        seed=(seed, ""),
    )
    check_mask("fusion_layer", mask)
    check_probability("fusion_layer", "p", p)
    return OPERATOR(x, spatial, mask, weight1, bias1, weight2, bias2, seed, p, backend=backend)
