"""Temporal attention layer: dilated convolution, instance norm, linear attention, two residuals.

    o   = relu(conv1d(x; kernel 3, dilation d))                            local context
    h   = (o - mean_t o) / sqrt(var_t o + 1e-5)                            over real frames, biased variance
    Q   = sigmoid(Wq h + bq),  K = sigmoid(Wk h + bk),  U = Wv s + bv      s = source (decoder) or h (encoder)
    att = dropout(Wo concat_heads[ (K U^T)^T Q / (Q . (sum_t K + 1e-6)) ] + bo)
    out = (x + dropout(Wc (scale * att + o) + bc)) * mask

with sums over time taken over real frames, per head. Cost is linear in T: keys and values meet in one
(F/heads, F/heads) matrix per head.

Shapes: x, source, out (N, F, T); mask (N, 1, T) bool; weights (F, F), query and key stacked to (2F, F);
convolution (F, F, 3).
Source: arXiv 2503.15126 (linear attention with sigmoid feature map); restriction to real frames is ours.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from .dropout import check_probability, dropout
from .operator import Operator, check_mask, check_shapes
from .pointwise import pointwise
from .precision import widened, without_autocast

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-6


def _attention_layer_reference(
    x: Tensor,
    mask: Tensor,
    source: Optional[Tensor],
    conv_weight: Tensor,
    conv_bias: Tensor,
    query_key_weight: Tensor,
    query_key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    attention_weight: Tensor,
    attention_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    seeds: Optional[Tensor],
    dilation: int,
    heads: int,
    scale: float,
    attention_dropout: float,
    output_dropout: float,
) -> Tensor:
    seed = (None, None) if seeds is None else (seeds[0], seeds[1])
    real = mask.to(x.dtype)
    o = torch.relu(functional.conv1d(x, conv_weight, conv_bias, padding=dilation, dilation=dilation))
    h = _instance_norm(o, real)
    query, key = torch.sigmoid(pointwise(h, query_key_weight, query_key_bias)).chunk(2, dim=1)
    value = pointwise(h if source is None else source, value_weight, value_bias)
    att = pointwise(_linear_attention(query, key * real, value, heads), attention_weight, attention_bias)
    o = scale * dropout(att, attention_dropout, seed[0]) + o
    return (x + dropout(pointwise(o, output_weight, output_bias), output_dropout, seed[1])) * real


def _instance_norm(x: Tensor, real: Tensor) -> Tensor:
    wide, real = widened(x), widened(real)
    count = real.sum(2, keepdim=True).clamp(min=1)
    mean = (wide * real).sum(2, keepdim=True) / count
    centred = wide - mean
    var = (centred * real).square().sum(2, keepdim=True) / count
    return (centred * torch.rsqrt(var + NORM_EPS)).to(x.dtype)


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    dtype = query.dtype
    query, key, value = (rearrange(widened(a), "n (h d) t -> n h d t", h=heads) for a in (query, key, value))
    with without_autocast(query):
        key_value = value @ key.transpose(2, 3)  # (N, heads, value, key)
        normaliser = (key.sum(3) + ATTENTION_EPS).unsqueeze(2) @ query  # (N, heads, 1, T)
        attended = key_value @ query / normaliser
    return rearrange(attended, "n h d t -> n (h d) t").to(dtype)


def _flops(x: Tensor, mask: Tensor, source: Optional[Tensor], *rest: object) -> tuple[int, int]:
    n, features, t = x.shape
    heads = rest[12]
    products = 2 * features * features * (3 + 5) + 4 * features * (features // heads) + 2 * features
    return n * t * products, 2 * n * t * products


OPERATOR = Operator(_attention_layer_reference, _flops)


def attention_layer(
    x: Tensor,
    mask: Tensor,
    source: Tensor | None = None,
    *,
    conv_weight: Tensor,
    conv_bias: Tensor,
    query_key_weight: Tensor,
    query_key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    attention_weight: Tensor,
    attention_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    dilation: int = 1,
    heads: int = 4,
    scale: float = 1.0,
    attention_dropout: float = 0.0,
    output_dropout: float = 0.0,
    seeds: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """One temporal attention layer, encoder form (``source`` None) or decoder form.

    Args:
        x: Tensor (N, F, T). Zero on padded frames.
        mask: bool Tensor (N, 1, T). True on real frames.
        source: Tensor (N, F, T), optional. What the values are projected from (decoder form); the normalised
            features by default.
        conv_weight, conv_bias: Tensor (F, F, 3), (F,).
        query_key_weight, query_key_bias: Tensor (2F, F), (2F,). Query rows first.
        value_weight, attention_weight, output_weight: Tensor (F, F), with biases (F,). Value projection,
            projection after the attention, projection before the outer residual.
        dilation: int, default 1. Of the convolution, in frames.
        heads: int, default 4. Divides F.
        scale: float, default 1.0. Weight of the attention branch.
        attention_dropout, output_dropout: float, default 0.0. Used when ``seeds`` is given.
        seeds: int64 Tensor (2,), optional. Of the two dropouts; None switches both off.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        Tensor (N, F, T), zero on padded frames.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    name = "attention_layer"
    sizes = check_shapes(
        name,
        x=(x, "N F T"),
        mask=(mask, "N 1 T"),
        source=(source, "N F T"),
        conv_weight=(conv_weight, "F F 3"),
        conv_bias=(conv_bias, "F"),
        query_key_weight=(query_key_weight, "2F F"),
        query_key_bias=(query_key_bias, "2F"),
        value_weight=(value_weight, "F F"),
        value_bias=(value_bias, "F"),
        attention_weight=(attention_weight, "F F"),
        attention_bias=(attention_bias, "F"),
        output_weight=(output_weight, "F F"),
        output_bias=(output_bias, "F"),
        seeds=(seeds, "2"),
    )
    check_mask(name, mask)
    check_probability(name, "attention_dropout", attention_dropout)
    check_probability(name, "output_dropout", output_dropout)
    if sizes["2F"] != 2 * sizes["F"] or sizes["F"] % heads or dilation < 1:
        raise ValueError(
            f"{name}: expected 2F query and key rows, F divisible by heads and dilation >= 1, got "
            f"F={sizes['F']}, {sizes['2F']} query and key rows, heads={heads}, dilation={dilation}"
        )
    return OPERATOR(
        x,
        mask,
        source,
        conv_weight,
        conv_bias,
        query_key_weight,
        query_key_bias,
        value_weight,
        value_bias,
        attention_weight,
        attention_bias,
        output_weight,
        output_bias,
        seeds,
        dilation,
        heads,
        scale,
        attention_dropout,
        output_dropout,
        backend=backend,
    )
