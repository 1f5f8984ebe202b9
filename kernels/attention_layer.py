"""Temporal attention layer: dilated convolution, instance norm, linear attention, two residuals.

    o   = relu(conv1d(x; kernel 3, dilation d))                            local context
    h   = (o - mean_t o) / sqrt(var_t o + 1e-5)              over real frames, biased variance; 0 on padded ones
    Q   = sigmoid(Wq h + bq),  K = sigmoid(Wk h + bk),  U = Wv s + bv      s = source (decoder) or h (encoder)
    att = dropout(Wo concat_heads[ (K U^T)^T Q / (Q . (sum_t K + 1e-6)) ] + bo)
    out = (x + dropout(Wc (scale * att + o) + bc)) * mask

with sums over time taken over real frames, per head. Cost is linear in T: keys and values meet in one
(F/heads, F/heads) matrix per head.

Backward, with r = scale * att + o, A what is attended to, D its normaliser, S = sum_t U K^T and k = sum_t K + 1e-6 of a
head, d1 and d2 the two dropouts:

    g = d2(grad_out * mask),         gr = Wc^T g,         ga = d1(scale * gr),         u = Wo^T ga / D
    gS = sum_t u Q^T,   gk = -sum_t Q (sum over the head of u A),   gQ = S^T u - k (sum over the head of u A)
    gU = gS K,          gK = gS^T U + gk on real frames,            gP = gQ Q (1 - Q) and gK K (1 - K)
    gh = (Wq; Wk)^T gP + Wv^T gU (encoder),   grad_source = Wv^T gU (decoder);   from gr and gh on: dilated_conv.py
    grad_Wc = sum g r^T,  grad_Wo = sum ga A^T,  grad_Wv = sum gU s^T,  grad_(Wq; Wk) = sum gP h^T

Shapes: x, source, out (N, F, T); mask (N, 1, T) bool; weights (F, F), query and key stacked to (2F, F);
convolution (F, F, 3).
Source: arXiv 2503.15126 (linear attention with sigmoid feature map); restriction to real frames is ours.

Forward: the matrices are packed as the products want them; the convolution, which leaves o and parts of its
statistics; K and U, which leave parts of both sums; a sum of these; everything from Q on. Kept for backward are o, the
statistics, the two sums and the packed weights. Backward: from the output to Q, a sum, from there to K, U and h, a sum,
norm and convolution, the gradients of the square weights, a sum. Products of a tile with a weight follow one another
without a loop around them, and what is added up over frames is so in kernels of their own, from operands in memory: one
kernel with the products and the sums of up to four weights' gradients in a loop moves fewer bytes, and spilled 0.3 to
13 kB of registers per thread on every architecture (triton 3.7.1, 2026-11-25; no time was measured yet).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as functional
from einops import rearrange
from torch import Tensor

from .dilated_conv import (
    analytic_dilated_conv,
    analytic_dilated_conv_gradients,
    dilated_conv,
    dilation_arguments,
    launch_dilated_conv_backward,
    load_taps,
    weights_frames,
)
from .dropout import (
    check_probability,
    dropout,
    dropout_arguments,
    dropout_kept,
    dropout_rows,
    dropout_scale,
    dropped,
    only,
)
from .frame_statistics import of_sequence, store_sequence_part, with_tile
from .frame_tiles import (
    PROGRAMS,
    load_frames,
    load_packed,
    load_real,
    load_vector,
    needs_split_products,
    one_warpgroup,
    product_warps,
    sequence_and_part,
    split,
    split_gradients,
    store_frames,
    store_matrix,
    store_packed,
    tile_constants,
    unsupported_frames,
    wide_precision,
)
from .launch import (
    cdiv,
    constant,
    device_function,
    kernel,
    launch,
    launchable,
    power_of_two,
    rows,
    target_of,
    tl,
    unit,
)
from .operator import Fused, Operator, check_mask, check_shapes
from .padding import masked, masked_, real_frames
from .pointwise import analytic_pointwise, pointwise, pointwise_input_gradient, pointwise_parameter_gradients
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
    # Two products: halves of one would be copied as operands of the attention.
    query, key = (
        torch.sigmoid(pointwise(h, *half)) for half in zip(query_key_weight.chunk(2), query_key_bias.chunk(2))
    )
    value = pointwise(h if source is None else source, value_weight, value_bias)
    att = pointwise(_linear_attention(query, key, value, real, heads), attention_weight, attention_bias)
    o = torch.add(o, dropout(att, attention_dropout, seed[0]), alpha=scale)
    return (x + dropout(pointwise(o, output_weight, output_bias), output_dropout, seed[1])) * real


def _instance_norm(x: Tensor, real: Tensor) -> Tensor:
    wide, real = widened(x), widened(real)
    count = real.sum(2, keepdim=True).clamp(min=1)
    mean = (wide * real).sum(2, keepdim=True) / count
    deviation = (wide - mean) * real
    var = deviation.square().sum(2, keepdim=True) / count
    return (deviation * torch.rsqrt(var + NORM_EPS)).to(x.dtype)


def _linear_attention(query: Tensor, key: Tensor, value: Tensor, real: Tensor, heads: int) -> Tensor:
    dtype = query.dtype
    query, key, value = (rearrange(widened(a), "n (h d) t -> n h d t", h=heads) for a in (query, key, value))
    real = widened(real).unsqueeze(1)  # (N, 1, 1, T)
    with without_autocast(query):
        key_value = (value * real) @ key.transpose(2, 3)  # (N, heads, value, key)
        normaliser = (real @ key.transpose(2, 3) + ATTENTION_EPS) @ query  # (N, heads, 1, T)
        attended = key_value @ query / normaliser
    return rearrange(attended, "n h d t -> n (h d) t").to(dtype)


def _flops(x: Tensor, mask: Tensor, source: Optional[Tensor], *rest: object) -> tuple[int, int]:
    n, features, t = x.shape
    heads = rest[12]
    products = 2 * features * features * (3 + 5) + 4 * features * (features // heads) + 2 * features
    return n * t * products, 2 * n * t * products


def _analytic_forward(
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
) -> tuple[Optional[Tensor], ...]:
    real = real_frames(mask, x.dtype)
    attention_kept, output_kept = dropout_kept(x, (attention_dropout, output_dropout), seeds)
    o = analytic_dilated_conv(x, conv_weight, conv_bias, dilation).relu_()
    deviation, rstd = _deviation_and_rstd(o, real)
    # What scales rows of an operand, or a branch, scales its weights instead.
    query_key = analytic_pointwise(deviation, query_key_weight * rstd.mT, query_key_bias).sigmoid_()
    query, key = query_key.chunk(2, 1)
    masked_(key, real)
    moment = torch.bmm(deviation if source is None else source, key.mT)
    if source is None:
        moment.mul_(rstd)
    scale *= dropout_scale(attention_dropout, seeds)
    output_scale = dropout_scale(output_dropout, seeds)
    attended = _attended(moment, query, key, value_weight, value_bias, scale * attention_weight, heads)
    share = _shares(query, attended.normaliser)
    r = only(analytic_pointwise(share, attended.weight, scale * attention_bias), attention_kept).add_(o)
    out = only(analytic_pointwise(r, output_scale * output_weight, output_scale * output_bias), output_kept)
    out = masked_(out.add_(x), real)
    return out, o, rstd, query_key, *attended, r, attention_kept, output_kept, real


def _analytic_backward(
    grad: Tensor,
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
    o: Tensor,
    rstd: Tensor,
    query_key: Tensor,
    key_sum: Tensor,
    moment: Tensor,
    per_head: Tensor,
    weight: Tensor,
    keys: Tensor,
    normaliser: Tensor,
    r: Tensor,
    attention_kept: Optional[Tensor],
    output_kept: Optional[Tensor],
    real: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Optional[Tensor], ...]:
    deviation = _deviation(o, real)
    query, key = query_key.chunk(2, 1)
    scale *= dropout_scale(attention_dropout, seeds)
    output_scale = dropout_scale(output_dropout, seeds)
    scaled_weight = scale * attention_weight
    share = _shares(query, normaliser)

    grad = masked(grad, real)
    g = grad if output_kept is None else grad * output_kept
    grad_output_weight, grad_output_bias = (output_scale * d for d in pointwise_parameter_gradients(g, r))
    gr = pointwise_input_gradient(g, output_scale * output_weight)
    ga = gr if attention_kept is None else gr * attention_kept
    grad_inner_weight, grad_attention_bias = torch.bmm(ga, share.mT), scale * ga.sum((0, 2))

    # From the shares to Q and to the sum of the keys of each head.
    grad_query = torch.bmm(weight.mT, ga).unflatten(1, (heads, -1)).div_(normaliser.unsqueeze(2))
    grad_normaliser = share.unflatten(1, (heads, -1)).mul_(grad_query).sum(2).neg_()
    grad_query = torch.baddbmm(grad_query.flatten(1, 2), keys.mT, grad_normaliser)
    one_head, same_head = _head_patterns(heads, x.shape[1], x.dtype)
    grad_key_sum = (torch.bmm(grad_normaliser, query.mT) * one_head).sum(1)  # (N, F)

    # Through matrices (N, F, F) to K and to what the values are of.
    grad_attention_weight = scale * torch.bmm(grad_inner_weight, per_head.mT).sum(0)
    grad_per_head = pointwise_input_gradient(grad_inner_weight, scaled_weight).mul_(same_head)
    grad_value_weight = torch.bmm(grad_per_head, moment.mT).sum(0)
    grad_value_bias = torch.bmm(grad_per_head, key_sum).sum((0, 2))
    grad_moment = pointwise_input_gradient(grad_per_head, value_weight)
    grad_key_sum += pointwise_input_gradient(grad_per_head, value_bias.unsqueeze(1)).squeeze(1)
    if source is None:
        grad_moment.mul_(rstd)
    grad_key = torch.bmm(grad_moment.mT, deviation if source is None else source)
    grad_key.add_(grad_key_sum.unsqueeze(2))

    gp = torch.empty_like(query_key)
    for half, gradient, value in zip(gp.chunk(2, 1), (grad_query, grad_key), (query, key)):
        torch.ops.aten.sigmoid_backward.grad_input(gradient, value, grad_input=half)
    grad_query_key_weight = (torch.bmm(gp, deviation.mT) * rstd.mT).sum(0)
    grad_query_key_bias = gp.sum((0, 2))
    gh = pointwise_input_gradient(gp, query_key_weight * rstd.mT)
    grad_source = None
    if source is None:
        gh.baddbmm_(grad_moment, key)
    else:
        grad_source = torch.bmm(grad_moment, key)

    # gh is rstd times that of the formula. On padded frames it and the deviation are 0, as g and K are.
    frames = _frames_of(x, real)
    mean = gh.sum(2, keepdim=True) / frames
    along = torch.linalg.vecdot(gh, deviation, dim=2).unsqueeze(2) * rstd.square() / frames
    gz = masked_(gh.addcmul_(deviation, along, value=-1).sub_(mean), real).add_(gr)
    torch.ops.aten.threshold_backward.grad_input(gz, o, 0.0, grad_input=gz)
    grad_x, *of_conv = analytic_dilated_conv_gradients(gz, x, conv_weight, dilation, grad)
    return (
        grad_x, grad_source, *of_conv, grad_query_key_weight, grad_query_key_bias, grad_value_weight, grad_value_bias,
        grad_attention_weight, grad_attention_bias, grad_output_weight, grad_output_bias,
    )  # fmt: skip


class _Attended(NamedTuple):
    """Attention as one matrix per sequence that is applied to shares of the queries: S Q / D = S (Q / D).

    The values are projected behind the sum over time, sum_t (Wv s + bv) K^T = Wv sum_t s K^T + bv k^T, and the matrix is
    multiplied with the projection behind the attention, so that no frame has a value of its own.
    """

    key_sum: Tensor
    """(N, F, 1): k without its 1e-6."""
    moment: Tensor
    """(N, F, F): sum_t s K^T."""
    per_head: Tensor
    """(N, F, F): S, zero between heads."""
    weight: Tensor
    """(N, F, F): Wo S."""
    keys: Tensor
    """(N, heads, F): k of each head, zero elsewhere."""
    normaliser: Tensor
    """(N, heads, T): D."""


def _attended(
    moment: Tensor,
    query: Tensor,
    key: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    attention_weight: Tensor,
    heads: int,
) -> _Attended:
    one_head, same_head = _head_patterns(heads, query.shape[1], query.dtype)
    key_sum = key.sum(2, keepdim=True)
    per_head = torch.baddbmm(
        value_bias.unsqueeze(1) * key_sum.mT, value_weight.expand_as(moment), moment
    ).mul_(same_head)
    weight = torch.bmm(attention_weight.expand_as(per_head), per_head)
    keys = one_head * (key_sum + ATTENTION_EPS).mT
    return _Attended(key_sum, moment, per_head, weight, keys, torch.bmm(keys, query))


def _shares(query: Tensor, normaliser: Tensor) -> Tensor:
    """Q / D, (N, F, T)."""
    query = query.unflatten(1, (normaliser.shape[1], -1))
    return (query / normaliser.unsqueeze(2)).flatten(1, 2)


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _head_patterns(heads: int, features: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Which features each head has, (heads, F), and which pairs of features are of one head, (F, F)."""
    one_head = torch.eye(heads, dtype=dtype, device="cpu").repeat_interleave(features // heads, dim=1)
    return one_head, one_head.mT @ one_head


def _deviation_and_rstd(o: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors of h, the second one (N, F, 1)."""
    deviation = _deviation(o, real)
    var = torch.linalg.vector_norm(deviation, dim=2, keepdim=True).square_() / _frames_of(o, real)
    return deviation, torch.rsqrt(var + NORM_EPS)


def _deviation(o: Tensor, real: Tensor | None) -> Tensor:
    """From the mean over real frames, 0 on padded ones."""
    total = o.sum(2, keepdim=True) if real is None else torch.bmm(o, real.mT)
    return masked_(torch.sub(o, total / _frames_of(o, real)), real)


def _frames_of(o: Tensor, real: Tensor | None) -> Tensor | int:
    """Number of real frames, of each sequence (N, 1, 1) or of all of them, at least 1."""
    return max(1, o.shape[2]) if real is None else real.sum(2, keepdim=True).clamp(min=1)


@device_function
def _normalised(o, mean, rstd, real):
    """h in float32; padded frames are no part of the statistics, and what they give may be too large for anything."""
    return tl.where(real[None, :], (o.to(tl.float32) - mean[:, None]) * rstd[:, None], 0.0)


@device_function
def _sigmoid_product(weight, h, bias, PRECISION: tl.constexpr):
    return tl.sigmoid(tl.dot(weight, h, input_precision=PRECISION) + bias[:, None])


QUERY, KEY, VALUE, ATTENTION, OUTPUT, TAPS = (constant(i) for i in range(6))
"""Places of the square weights and of the three matrices of the convolution among the packed ones."""
MATRICES = 8
TRANSPOSED = constant(MATRICES)
"""Added to them, those of the transposed matrices."""
NORMALISED, ATTENDED, MIXED = (constant(i) for i in range(5, 8))
"""The right operands of the weights' gradients, h, what is attended to and r, behind the five left ones."""


@kernel
def _attention_pack_kernel(
    query_key_ptr, value_ptr, attention_ptr, output_ptr, conv_ptr, packed_ptr, one_head_ptr, HEAD: tl.constexpr,
    F: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """The matrices and the transposed ones in the dtype of the products, zero beyond the last feature.

    one_head is 1 where two features share a head: a product with it is a sum over the head.
    """
    i, o_f = tl.program_id(0), tl.arange(0, BF)
    inside = (o_f < F)[:, None] & (o_f < F)[None, :]
    places = o_f[:, None] * F + o_f[None, :]
    dtype = packed_ptr.dtype.element_ty
    if i < VALUE:
        weight = tl.load(query_key_ptr + i * F * F + places, mask=inside, other=0.0).to(dtype)
    elif i == VALUE:
        weight = tl.load(value_ptr + places, mask=inside, other=0.0).to(dtype)
    elif i == ATTENTION:
        weight = tl.load(attention_ptr + places, mask=inside, other=0.0).to(dtype)
    elif i == OUTPUT:
        weight = tl.load(output_ptr + places, mask=inside, other=0.0).to(dtype)
    else:
        weight = tl.load(conv_ptr + 3 * places + (i - TAPS), mask=inside, other=0.0).to(dtype)
    store_packed(packed_ptr, weight, i, TRANSPOSED, BF)
    if i == 0:
        # Features beyond the last make up heads of their own, so that no sum over a head is 0.
        tl.store(one_head_ptr + (o_f[:, None] * BF + o_f[None, :]), _same_head(o_f, HEAD).to(tl.float32))


@device_function
def _same_head(o_f, HEAD: tl.constexpr):
    """Which pairs of features [BF, BF] share a head."""
    return (o_f // HEAD)[:, None] == (o_f // HEAD)[None, :]


@device_function
def _heads(o_f, F, HEAD: tl.constexpr):
    """The same, of features that there are."""
    return _same_head(o_f, HEAD) & (o_f < F)[:, None] & (o_f < F)[None, :]


@device_function
def _load_heads(ptr, o_f, F, HEAD: tl.constexpr):
    """The matrices (F, HEAD) of all heads as one [BF, BF], zero between heads."""
    places = o_f[:, None] * HEAD + (o_f % HEAD)[None, :]
    return tl.load(ptr + places, mask=_heads(o_f, F, HEAD), other=0.0)


@device_function
def _load_heads_transposed(ptr, o_f, F, HEAD: tl.constexpr):
    places = o_f[None, :] * HEAD + (o_f % HEAD)[:, None]
    return tl.load(ptr + places, mask=_heads(o_f, F, HEAD), other=0.0)


@device_function
def _store_heads(ptr, x, o_f, F, HEAD: tl.constexpr):
    """Store what [BF, BF] holds within heads as matrices (F, HEAD)."""
    tl.store(ptr + (o_f[:, None] * HEAD + (o_f % HEAD)[None, :]), x, mask=_heads(o_f, F, HEAD))


@device_function
def _normalised_and_keys(o, real, stats_ptr, sums_ptr, i_n, o_f, eps, F, HEAD: tl.constexpr):
    """h in the dtype of o, and the sum of keys."""
    stats_ptr += i_n * (2 * F + 1)
    h = _normalised(o, load_vector(stats_ptr, o_f, F), load_vector(stats_ptr + F, o_f, F), real).to(o.dtype)
    return h, load_vector(sums_ptr + i_n * (F * HEAD + F) + F * HEAD, o_f, F) + tl.cast(eps, tl.float32)


@device_function
def _attend(
    h, keys, sums_ptr, packed_ptr, one_head_ptr, query_bias_ptr, o_f, F, HEAD: tl.constexpr, BF: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Q as it rounds to, the normaliser of its head, and what is attended to: [BF, BT] in float32."""
    query = load_packed(packed_ptr, QUERY, BF)
    query = (
        _sigmoid_product(query, h, load_vector(query_bias_ptr, o_f, F), PRECISION).to(h.dtype).to(tl.float32)
    )
    normaliser = tl.dot(load_packed(one_head_ptr, 0, BF), keys[:, None] * query, input_precision=WIDE)
    attended = tl.dot(_load_heads(sums_ptr, o_f, F, HEAD), query, input_precision=WIDE)
    return query, normaliser, attended / normaliser


@kernel
def _attention_conv_kernel(
    x_ptr, mask_ptr, packed_ptr, bias_ptr, o_ptr, parts_ptr, d, T, P, STEPS, F: tl.constexpr, BF: tl.constexpr,
    BT: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, and the parts of its statistics."""
    T, d = T * UNIT, d * STRIDE
    i_n, i_p = sequence_and_part(P)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane = i_n * F * T
    dtype = x_ptr.dtype.element_ty
    weight0, weight1, weight2 = load_taps(packed_ptr, TAPS, BF)
    bias = load_vector(bias_ptr, o_f, F)
    count, mean, squares = 0.0, tl.zeros([BF], tl.float32), tl.zeros([BF], tl.float32)
    for i in range(0, STEPS):
        t = (i_p * STEPS + i) * BT + o_t
        y = dilated_conv(x_ptr + plane, weight0, weight1, weight2, bias, o_f, t, d, F, T, PRECISION)
        o = tl.where(y <= 0.0, 0.0, y).to(dtype)  # a NaN stays one, as in torch.relu
        store_frames(o_ptr + plane, o, o_f, t, F, T)
        real = load_real(mask_ptr + i_n * T, t, T)
        count, mean, squares = with_tile(count, mean, squares, o.to(tl.float32), real)
    store_sequence_part(parts_ptr + tl.program_id(0).to(tl.int64) * (2 * F + 1), count, mean, squares, o_f, F)


@kernel
def _attention_key_value_kernel(
    o_ptr, mask_ptr, source_ptr, packed_ptr, key_bias_ptr, value_bias_ptr, parts_ptr, stats_ptr, sums_ptr, eps, T, P,
    STEPS, HEAD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of o (mean, 1 / deviation, number of frames), and parts of the sums over time of U K^T and K."""
    T = T * UNIT
    i_n, i_p = sequence_and_part(P)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane = i_n * F * T
    dtype = o_ptr.dtype.element_ty
    count, mean, var = of_sequence(parts_ptr + i_n * P * (2 * F + 1), o_f, F, P)
    rstd = 1.0 / tl.sqrt(var + tl.cast(eps, tl.float32))
    if i_p == 0:
        stats_ptr += i_n * (2 * F + 1)
        tl.store(stats_ptr + o_f, mean, mask=o_f < F)
        tl.store(stats_ptr + F + o_f, rstd, mask=o_f < F)
        tl.store(stats_ptr + 2 * F, count)
    key_bias, value_bias = load_vector(key_bias_ptr, o_f, F), load_vector(value_bias_ptr, o_f, F)
    key_value, keys = tl.zeros([BF, BF], tl.float32), tl.zeros([BF], tl.float32)
    for i in range(0, STEPS):
        t = (i_p * STEPS + i) * BT + o_t
        real = load_real(mask_ptr + i_n * T, t, T)
        h = _normalised(load_frames(o_ptr + plane, o_f, t, F, T), mean, rstd, real).to(dtype)
        key = _sigmoid_product(load_packed(packed_ptr, KEY, BF), h, key_bias, PRECISION)
        key = tl.where(real[None, :], key, 0.0).to(dtype)
        if source_ptr is not None:
            h = load_frames(source_ptr + plane, o_f, t, F, T)
        value = (
            tl.dot(load_packed(packed_ptr, VALUE, BF), h, input_precision=PRECISION) + value_bias[:, None]
        ).to(dtype)
        key_value = tl.dot(value, tl.trans(key), key_value, input_precision=PRECISION)
        keys += tl.sum(key.to(tl.float32), 1)
    sums_ptr += tl.program_id(0).to(tl.int64) * (F * HEAD + F)
    _store_heads(sums_ptr, key_value, o_f, F, HEAD)
    tl.store(sums_ptr + F * HEAD + o_f, keys, mask=o_f < F)


@kernel
def _attention_output_kernel(
    x_ptr, mask_ptr, o_ptr, stats_ptr, sums_ptr, packed_ptr, one_head_ptr, query_bias_ptr, attention_bias_ptr,
    output_bias_ptr, attention_seed_ptr, output_seed_ptr, out_ptr, eps, scale, attention_threshold, attention_scale,
    output_threshold, output_scale, T, TILES, HEAD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Everything from Q on, of one tile."""
    T = T * UNIT
    i_n, i_t = sequence_and_part(TILES)
    o_f, t = tl.arange(0, BF), i_t * BT + tl.arange(0, BT)
    plane = i_n * F * T
    real = load_real(mask_ptr + i_n * T, t, T)
    o = load_frames(o_ptr + plane, o_f, t, F, T)
    h, keys = _normalised_and_keys(o, real, stats_ptr, sums_ptr, i_n, o_f, eps, F, HEAD)
    sums_ptr += i_n * (F * HEAD + F)
    _, _, attended = _attend(
        h, keys, sums_ptr, packed_ptr, one_head_ptr, query_bias_ptr, o_f, F, HEAD, BF, PRECISION, WIDE
    )
    y = tl.dot(load_packed(packed_ptr, ATTENTION, BF), attended.to(o.dtype), input_precision=PRECISION)
    y += load_vector(attention_bias_ptr, o_f, F)[:, None]
    if attention_seed_ptr is not None:
        y = dropped(
            y, dropout_rows(attention_seed_ptr, i_n * F + o_f), t, attention_threshold, attention_scale
        )
    y = (tl.cast(scale, tl.float32) * y + o.to(tl.float32)).to(o.dtype)
    y = tl.dot(load_packed(packed_ptr, OUTPUT, BF), y, input_precision=PRECISION)
    y += load_vector(output_bias_ptr, o_f, F)[:, None]
    if output_seed_ptr is not None:
        y = dropped(y, dropout_rows(output_seed_ptr, i_n * F + o_f), t, output_threshold, output_scale)
    y += load_frames(x_ptr + plane, o_f, t, F, T).to(tl.float32)
    store_frames(out_ptr + plane, tl.where(real[None, :], y, 0.0), o_f, t, F, T)


@kernel
def _attention_output_backward_kernel(
    grad_ptr, mask_ptr, o_ptr, stats_ptr, sums_ptr, packed_ptr, one_head_ptr, query_bias_ptr, attention_bias_ptr,
    attention_seed_ptr, output_seed_ptr, gr_ptr, gh_ptr, operands_ptr, grad_sums_ptr, eps, scale, attention_threshold,
    attention_scale, output_threshold, output_scale, N, T, TILES, HEAD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """From the output to r and Q, of one tile: gr, the part of gh that comes from Q, a part of the gradients of both sums,
    and the operands of the weights' gradients on the way."""
    T = T * UNIT
    i_n, i_t = sequence_and_part(TILES)
    o_f, t = tl.arange(0, BF), i_t * BT + tl.arange(0, BT)
    plane, everything = i_n * F * T, N.to(tl.int64) * F * T
    operands_ptr += plane
    real = load_real(mask_ptr + i_n * T, t, T)
    o = load_frames(o_ptr + plane, o_f, t, F, T)
    h, keys = _normalised_and_keys(o, real, stats_ptr, sums_ptr, i_n, o_f, eps, F, HEAD)
    sums_ptr += i_n * (F * HEAD + F)
    store_frames(operands_ptr + NORMALISED * everything, h, o_f, t, F, T)
    query, normaliser, attended = _attend(
        h, keys, sums_ptr, packed_ptr, one_head_ptr, query_bias_ptr, o_f, F, HEAD, BF, PRECISION, WIDE
    )
    store_frames(operands_ptr + ATTENDED * everything, attended, o_f, t, F, T)
    y = tl.dot(load_packed(packed_ptr, ATTENTION, BF), attended.to(o.dtype), input_precision=PRECISION)
    y += load_vector(attention_bias_ptr, o_f, F)[:, None]
    scale = tl.cast(scale, tl.float32)
    if attention_seed_ptr is not None:
        attention_rows = dropout_rows(attention_seed_ptr, i_n * F + o_f)
        y = dropped(y, attention_rows, t, attention_threshold, attention_scale)
    store_frames(operands_ptr + MIXED * everything, scale * y + o.to(tl.float32), o_f, t, F, T)
    # Back to r.
    g = tl.where(real[None, :], load_frames(grad_ptr + plane, o_f, t, F, T).to(tl.float32), 0.0)
    if output_seed_ptr is not None:
        g = dropped(g, dropout_rows(output_seed_ptr, i_n * F + o_f), t, output_threshold, output_scale)
    g = g.to(o.dtype)
    store_frames(operands_ptr + OUTPUT * everything, g, o_f, t, F, T)
    g = tl.dot(load_packed(packed_ptr, TRANSPOSED + OUTPUT, BF), g, input_precision=PRECISION)
    store_frames(gr_ptr + plane, g, o_f, t, F, T)
    # Back to what is attended to.
    g = scale * g
    if attention_seed_ptr is not None:
        g = dropped(g, attention_rows, t, attention_threshold, attention_scale)
    g = g.to(o.dtype)
    store_frames(operands_ptr + ATTENTION * everything, g, o_f, t, F, T)
    u = tl.dot(load_packed(packed_ptr, TRANSPOSED + ATTENTION, BF), g, input_precision=PRECISION) / normaliser
    # Back to both sums and to Q.
    grad_sums_ptr += tl.program_id(0).to(tl.int64) * (F * HEAD + F)
    share = tl.dot(load_packed(one_head_ptr, 0, BF), u * attended, input_precision=WIDE)  # sum over the head
    tl.store(grad_sums_ptr + F * HEAD + o_f, -tl.sum(query * share, 1), mask=o_f < F)
    g = (
        tl.dot(_load_heads_transposed(sums_ptr, o_f, F, HEAD), u, input_precision=WIDE)
        - keys[:, None] * share
    )
    g = (g * query * (1.0 - query)).to(o.dtype)
    store_frames(operands_ptr + QUERY * everything, g, o_f, t, F, T)
    g = tl.dot(load_packed(packed_ptr, TRANSPOSED + QUERY, BF), g, input_precision=PRECISION)
    store_frames(gh_ptr + plane, g, o_f, t, F, T)
    _store_heads(grad_sums_ptr, tl.dot(u, tl.trans(query), input_precision=WIDE), o_f, F, HEAD)


@kernel
def _attention_key_value_backward_kernel(
    mask_ptr, o_ptr, stats_ptr, source_ptr, grad_sums_ptr, packed_ptr, key_bias_ptr, value_bias_ptr, query_gh_ptr, gh_ptr,
    grad_source_ptr, operands_ptr, norm_sums_ptr, N, T, TILES, HEAD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """From K and U to h and the source, of one tile: gh, the gradient of the source, a part of the sums that the norm
    needs, and the operands of the weights' gradients."""
    T = T * UNIT
    i_n, i_t = sequence_and_part(TILES)
    o_f, t = tl.arange(0, BF), i_t * BT + tl.arange(0, BT)
    plane, everything = i_n * F * T, N.to(tl.int64) * F * T
    operands_ptr += plane
    o = load_frames(o_ptr + plane, o_f, t, F, T)
    stats_ptr += i_n * (2 * F + 1)
    real = load_real(mask_ptr + i_n * T, t, T)
    normalised = _normalised(o, load_vector(stats_ptr, o_f, F), load_vector(stats_ptr + F, o_f, F), real)
    h = normalised.to(o.dtype)
    source = h
    if source_ptr is not None:
        source = load_frames(source_ptr + plane, o_f, t, F, T)
    grad_sums_ptr += i_n * (F * HEAD + F)
    # Back to U.
    key = _sigmoid_product(load_packed(packed_ptr, KEY, BF), h, load_vector(key_bias_ptr, o_f, F), PRECISION)
    key = tl.where(real[None, :], key.to(o.dtype).to(tl.float32), 0.0)
    g = tl.dot(_load_heads(grad_sums_ptr, o_f, F, HEAD), key, input_precision=WIDE).to(o.dtype)
    store_frames(operands_ptr + VALUE * everything, g, o_f, t, F, T)
    gh = load_frames(query_gh_ptr + plane, o_f, t, F, T).to(tl.float32)
    g = tl.dot(load_packed(packed_ptr, TRANSPOSED + VALUE, BF), g, input_precision=PRECISION)
    if source_ptr is not None:
        store_frames(grad_source_ptr + plane, g, o_f, t, F, T)
    else:
        gh += g
    # Back to K, whose gradient is 0 where it is: on padded frames.
    value = tl.dot(load_packed(packed_ptr, VALUE, BF), source, input_precision=PRECISION)
    value = (value + load_vector(value_bias_ptr, o_f, F)[:, None]).to(o.dtype).to(tl.float32)
    g = tl.dot(_load_heads_transposed(grad_sums_ptr, o_f, F, HEAD), value, input_precision=WIDE)
    g += load_vector(grad_sums_ptr + F * HEAD, o_f, F)[:, None]
    g = (g * key * (1.0 - key)).to(o.dtype)
    store_frames(operands_ptr + KEY * everything, g, o_f, t, F, T)
    gh += tl.dot(load_packed(packed_ptr, TRANSPOSED + KEY, BF), g, input_precision=PRECISION)
    store_frames(gh_ptr + plane, gh, o_f, t, F, T)
    norm_sums_ptr += tl.program_id(0).to(tl.int64) * (2 * F)
    tl.store(norm_sums_ptr + o_f, tl.sum(gh, 1), mask=o_f < F)
    tl.store(norm_sums_ptr + F + o_f, tl.sum(gh * normalised, 1), mask=o_f < F)


@kernel
def _attention_weights_backward_kernel(
    operands_ptr, source_ptr, parts_ptr, N, T, P, STEPS, COLUMNS, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of the gradients of one square weight and its bias: the sum over frames of one operand times another."""
    T = T * UNIT
    i_n, i_p = sequence_and_part(P)
    i = tl.program_id(1)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane, everything = i_n * F * T, N.to(tl.int64) * F * T
    left_ptr = operands_ptr + plane + i * everything
    right_ptr = (
        operands_ptr + plane + tl.where(i < ATTENTION, NORMALISED, i - ATTENTION + ATTENDED) * everything
    )
    if source_ptr is not None:
        if i == VALUE:
            right_ptr = source_ptr + plane
    gw, gb = tl.zeros([BF, BF], tl.float32), tl.zeros([BF], tl.float32)
    for j in range(0, STEPS):
        t = (i_p * STEPS + j) * BT + o_t
        left = load_frames(left_ptr, o_f, t, F, T)
        gw = tl.dot(left, tl.trans(load_frames(right_ptr, o_f, t, F, T)), gw, input_precision=PRECISION)
        gb += tl.sum(left.to(tl.float32), 1)
    # Behind those of the convolution; the weights of query and key come before their biases.
    parts_ptr += tl.program_id(0).to(tl.int64) * COLUMNS + 3 * F * F + F
    query_or_key = i < VALUE
    weight = tl.where(query_or_key, i * F * F, i * (F * F + F))
    bias = tl.where(query_or_key, 2 * F * F + i * F, weight + F * F)
    store_matrix(parts_ptr + weight, gw, o_f, o_f, F, F, 1)
    tl.store(parts_ptr + bias + o_f, gb, mask=o_f < F)


def _frames(x: Tensor) -> int:
    """Return the frames of a tile: fewer where operands are split, and for AMD where rows are not aligned."""
    aligned = unit(x.shape[2]) > 1
    if needs_split_products(x):
        return 32 if aligned and one_warpgroup(x) else 16
    return 32 if aligned or target_of(x).backend != "hip" else 16


def _dropouts(
    seeds: Tensor | None, attention_dropout: float, output_dropout: float
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[int, float, int, float]]:
    """The seeds of both dropouts, and their thresholds and scales."""
    pair = (None, None) if seeds is None else (seeds[0], seeds[1])
    attention_seed, *attention = dropout_arguments(attention_dropout, pair[0])
    output_seed, *output = dropout_arguments(output_dropout, pair[1])
    return (attention_seed, output_seed), (*attention, *output)


def _forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, f, t = x.shape
    out, o = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    stats = x.new_empty(n, 2 * f + 1, dtype=torch.float32)
    head, width = f // heads, power_of_two(f, 16)
    packed, one_head = x.new_empty(2 * MATRICES, width, width), stats.new_empty(width, width)
    if not launchable(x) or not x.numel():
        return out, o, stats, stats.new_empty(n, f * head + f), packed, one_head
    launch(
        _attention_pack_kernel, (MATRICES,), query_key_weight.contiguous(), value_weight.contiguous(),
        attention_weight.contiguous(), output_weight.contiguous(), conv_weight.contiguous(), packed, one_head, HEAD=head, F=f,
        BF=width,
    )  # fmt: skip
    x, mask, source = rows(x), rows(mask), None if source is None else rows(source.to(x.dtype))
    constants = tile_constants(x, _frames(x)) | {"num_warps": product_warps(x)}
    length, tiles = t // constants["UNIT"], cdiv(t, constants["BT"])
    per_sequence, steps = split(x, constants["BT"])
    programs, division = (n * per_sequence,), (length, per_sequence, steps)
    parts = stats.new_empty(n, per_sequence, 2 * f + 1)
    d, stride = dilation_arguments(dilation)
    launch(
        _attention_conv_kernel, programs, x, mask, packed, conv_bias, o, parts, d, *division, **stride, **constants,
    )  # fmt: skip
    query_bias, key_bias = query_key_bias.chunk(2)
    sums = stats.new_empty(n, per_sequence, f * head + f)
    launch(
        _attention_key_value_kernel, programs, o, mask, source, packed, key_bias, value_bias, parts, stats, sums, NORM_EPS,
        *division, HEAD=head, **constants,
    )  # fmt: skip
    sums = sums.sum(1)
    dropout_seeds, numbers = _dropouts(seeds, attention_dropout, output_dropout)
    launch(
        _attention_output_kernel, (n * tiles,), x, mask, o, stats, sums, packed, one_head, query_bias, attention_bias,
        output_bias, *dropout_seeds, out, ATTENTION_EPS, scale, *numbers, length, tiles, HEAD=head,
        WIDE=wide_precision(x), **constants,
    )  # fmt: skip
    return out, o, stats, sums, packed, one_head


def _backward(
    grad: Tensor,
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
    o: Tensor,
    stats: Tensor,
    sums: Tensor,
    packed: Tensor,
    one_head: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    n, f, t = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_source = None if source is None else torch.empty_like(grad_x)
    columns = 8 * f * f + 6 * f
    if not launchable(x) or not x.numel():
        return grad_x, grad_source, x.new_zeros(columns, dtype=torch.float32)
    x, mask, grad = rows(x), rows(mask), rows(grad)
    source = None if source is None else rows(source.to(x.dtype))
    constants = tile_constants(x, _frames(x)) | {"num_warps": product_warps(x)}
    length, tiles, head = t // constants["UNIT"], cdiv(t, constants["BT"]), f // heads
    chain = {"HEAD": head, "WIDE": wide_precision(x), **constants}
    # The longest chain of products: no room for more split operands.
    first = chain | {"BT": 16 if needs_split_products(x) else constants["BT"]}
    first_tiles = cdiv(t, first["BT"])
    gr, query_gh, gh = (torch.empty_like(x) for _ in range(3))
    operands = x.new_empty(8, n, f, t)
    grad_sums = stats.new_empty(n, first_tiles, f * head + f)
    query_bias, key_bias = query_key_bias.chunk(2)
    dropout_seeds, numbers = _dropouts(seeds, attention_dropout, output_dropout)
    launch(
        _attention_output_backward_kernel, (n * first_tiles,), grad, mask, o, stats, sums, packed, one_head, query_bias,
        attention_bias, *dropout_seeds, gr, query_gh, operands, grad_sums, ATTENTION_EPS, scale, *numbers, n, length,
        first_tiles, **first,
    )  # fmt: skip
    norm_sums = stats.new_empty(n, tiles, 2 * f)
    launch(
        _attention_key_value_backward_kernel, (n * tiles,), mask, o, stats, source, grad_sums.sum(1), packed, key_bias,
        value_bias, query_gh, gh, grad_source, operands, norm_sums, n, length, tiles, **chain,
    )  # fmt: skip
    division = split(x, weights_frames(x), PROGRAMS // 2)
    parts = stats.new_empty(n * division[0], columns)
    gz = query_gh  # which was read for the last time
    launch_dilated_conv_backward(
        grad, mask, x, packed, MATRICES + 5, dilation, gr, (gh, o, stats, norm_sums.sum(1)), gz, grad_x, None, parts,
        division,
    )  # fmt: skip
    launch(
        _attention_weights_backward_kernel, (n * division[0], 5), operands, source, parts, n, length, *division, columns,
        **(constants | {"BT": weights_frames(x)}),
    )  # fmt: skip
    return grad_x, grad_source, parts.sum(0)


def _unpack(computed: Sequence[Tensor], args: Sequence[Any]) -> tuple[Tensor | None, ...]:
    grad_x, grad_source, flat = computed
    return (grad_x, grad_source, *split_gradients(flat, args[3:13]))


OPERATOR = Operator(
    _attention_layer_reference,
    _flops,
    Fused(
        _forward,
        _backward,
        differentiable=(0, 2, *range(3, 13)),
        saved=(1, 2, 3, 4, 5),
        kept=5,
        unpack=_unpack,
        unsupported=unsupported_frames,
    ),
    analytic=Fused(
        _analytic_forward,
        _analytic_backward,
        differentiable=(0, 2, *range(3, 13)),
        saved=tuple(range(1, 14)),
        kept=13,
    ),
)


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
