"""Spatio-temporal fusion layer: a two-layer network on temporal features plus a spatial projection.

    out = (W2 h + b2 + x) * mask,   h = dropout(gelu(z)),   z = W1 x + spatial + b1       exact GELU: gelu(z) = z Phi(z)

``spatial`` is the layer's own projection of its spatial group, already multiplied through to the hidden
width; W1 likewise holds every product that has no non-linearity in between (see trgnet.model).

Backward:

    g = grad * mask,   gz = dropout(W2^T g) gelu'(z),   gelu'(z) = Phi(z) + z phi(z)
    grad_x = W1^T gz + g,   grad_spatial = gz,   grad_W1 = sum_(n,t) gz x^T,   grad_b1 = sum_(n,t) gz
    grad_W2 = sum_(n,t) g h^T,   grad_b2 = sum_(n,t) g

Shapes: x, spatial, out (N, F, T); mask (N, 1, T) bool; W1, W2 (F, F); b1, b2 (F,).
Source: arXiv 2503.15126 (spatio-temporal fusion of DSFM); the folding of its linear maps is ours.

One launch forward. Backward computes z again: one launch, whose programs leave parts of the gradients of the parameters,
and one sum over them. To the kernels it does not matter what padded frames hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as functional
from torch import Tensor

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
from .frame_tiles import (
    load_frames,
    load_matrix,
    load_real,
    load_vector,
    needs_split_products,
    one_warpgroup,
    product_warps,
    sequence_and_part,
    split,
    split_gradients,
    store_frames,
    store_gradients,
    tile_constants,
    unsupported_frames,
    warps,
)
from .launch import device_function, kernel, launch, launchable, planes, rows, target_of, tl, unit
from .operator import Fused, Operator, check_mask, check_shapes
from .padding import masked, masked_, real_frames
from .pointwise import analytic_pointwise, pointwise, pointwise_input_gradient, pointwise_parameter_gradients


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


def _analytic_forward(
    x: Tensor,
    spatial: Tensor,
    mask: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    seed: Optional[Tensor],
    p: float,
) -> tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
    (kept,) = dropout_kept(x, (p,), seed)
    z = analytic_pointwise(x, weight1, bias1).add_(spatial)
    out = analytic_pointwise(only(functional.gelu(z), kept), dropout_scale(p, seed) * weight2, bias2)
    real = real_frames(mask, x.dtype)
    return masked_(out.add_(x), real), z, kept, real


def _analytic_backward(
    grad: Tensor,
    x: Tensor,
    spatial: Tensor,
    mask: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    seed: Optional[Tensor],
    p: float,
    z: Tensor,
    kept: Optional[Tensor],
    real: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = dropout_scale(p, seed)
    g = masked(grad, real)
    grad_weight2, grad_bias2 = pointwise_parameter_gradients(g, only(functional.gelu(z), kept))
    gz = only(pointwise_input_gradient(g, scale * weight2), kept)
    torch.ops.aten.gelu_backward.grad_input(gz, z, grad_input=gz)
    grad_weight1, grad_bias1 = pointwise_parameter_gradients(gz, x)
    grad_x = torch.baddbmm(g, weight1.mT.expand(len(gz), -1, -1), gz)
    return grad_x, gz, grad_weight1, grad_bias1, grad_weight2.mul_(scale), grad_bias2


@device_function
def _load_real_frames(x_ptr, real, o_f, t, F, T):
    """As :func:`.load_frames`, zero on padded frames."""
    x = load_frames(x_ptr, o_f, t, F, T)
    return tl.where(real[None, :], x, tl.zeros_like(x))


@device_function
def _normal_distribution(z):
    """Phi."""
    return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@kernel
def _fusion_layer_forward_kernel(
    x_ptr, spatial_ptr, mask_ptr, weight1_ptr, bias1_ptr, weight2_ptr, bias2_ptr, seed_ptr, out_ptr, threshold, scale,
    spatial_stride, T, P, STEPS, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    T = T * UNIT
    i_n, i_p = sequence_and_part(P)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane = i_n * F * T
    dtype = x_ptr.dtype.element_ty
    spatial_ptr += i_n * spatial_stride * UNIT
    weight1 = load_matrix(weight1_ptr, o_f, o_f, F, F, 1, dtype)
    weight2 = load_matrix(weight2_ptr, o_f, o_f, F, F, 1, dtype)
    bias1, bias2 = load_vector(bias1_ptr, o_f, F), load_vector(bias2_ptr, o_f, F)
    if seed_ptr is not None:
        dropout_keys = dropout_rows(seed_ptr, i_n * F + o_f)
    for i in range(0, STEPS):
        t = (i_p * STEPS + i) * BT + o_t
        real = load_real(mask_ptr + i_n * T, t, T)
        x = _load_real_frames(x_ptr + plane, real, o_f, t, F, T)
        z = tl.dot(weight1, x, input_precision=PRECISION) + bias1[:, None]
        z += _load_real_frames(spatial_ptr, real, o_f, t, F, T).to(tl.float32)
        h = z * _normal_distribution(z)
        if seed_ptr is not None:
            h = dropped(h, dropout_keys, t, threshold, scale)
        out = tl.dot(weight2, h.to(dtype), input_precision=PRECISION) + bias2[:, None] + x.to(tl.float32)
        store_frames(out_ptr + plane, tl.where(real[None, :], out, 0.0), o_f, t, F, T)


@kernel
def _fusion_layer_backward_kernel(
    grad_ptr, x_ptr, spatial_ptr, mask_ptr, weight1_ptr, bias1_ptr, weight2_ptr, seed_ptr, grad_x_ptr, grad_spatial_ptr,
    parts_ptr, threshold, scale, spatial_stride, T, P, STEPS, PASSES: tl.constexpr, F: tl.constexpr, BF: tl.constexpr,
    BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """In up to three PASSES over the frames of a program: gradients of x and spatial, of the first weight, of the second."""
    T = T * UNIT
    i_n, i_p = sequence_and_part(P)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane = i_n * F * T
    dtype = x_ptr.dtype.element_ty
    spatial_ptr += i_n * spatial_stride * UNIT
    bias1 = load_vector(bias1_ptr, o_f, F)
    if seed_ptr is not None:
        dropout_keys = dropout_rows(seed_ptr, i_n * F + o_f)
    gw1, gb1 = tl.zeros([BF, BF], tl.float32), tl.zeros([BF], tl.float32)
    gw2, gb2 = tl.zeros([BF, BF], tl.float32), tl.zeros([BF], tl.float32)
    for PASS in tl.static_range(0, PASSES):
        for i in range(0, STEPS):
            t = (i_p * STEPS + i) * BT + o_t
            real = load_real(mask_ptr + i_n * T, t, T)
            x = _load_real_frames(x_ptr + plane, real, o_f, t, F, T)
            weight = load_matrix(weight1_ptr, o_f, o_f, F, F, 1, dtype)
            z = tl.dot(weight, x, input_precision=PRECISION) + bias1[:, None]
            z += _load_real_frames(spatial_ptr, real, o_f, t, F, T).to(tl.float32)
            distribution = _normal_distribution(z)
            grad = _load_real_frames(grad_ptr + plane, real, o_f, t, F, T)
            if PASS == 0 or PASS < PASSES - 1:
                weight = load_matrix(weight2_ptr, o_f, o_f, F, 1, F, dtype)
                gz = tl.dot(weight, grad.to(dtype), input_precision=PRECISION)
                if seed_ptr is not None:
                    gz = dropped(gz, dropout_keys, t, threshold, scale)
                density = 0.3989422804014327 * tl.exp2(-0.7213475204444817 * z * z)  # phi
                gz = gz * (distribution + z * density)
                if PASS == 0:
                    store_frames(grad_spatial_ptr + plane, gz, o_f, t, F, T)
                    weight = load_matrix(weight1_ptr, o_f, o_f, F, 1, F, dtype)
                    grad_x = tl.dot(weight, gz.to(dtype), grad.to(tl.float32), input_precision=PRECISION)
                    store_frames(grad_x_ptr + plane, grad_x, o_f, t, F, T)
                if PASS == PASSES - 2 or PASSES == 1:
                    gw1 = tl.dot(gz.to(dtype), tl.trans(x), gw1, input_precision=PRECISION)
                    gb1 += tl.sum(gz, 1)
            if PASS == PASSES - 1:
                h = z * distribution
                if seed_ptr is not None:
                    h = dropped(h, dropout_keys, t, threshold, scale)
                gw2 = tl.dot(grad.to(dtype), tl.trans(h.to(dtype)), gw2, input_precision=PRECISION)
                gb2 += tl.sum(grad.to(tl.float32), 1)
    parts_ptr += tl.program_id(0).to(tl.int64) * (2 * F * F + 2 * F)
    store_gradients(parts_ptr, gw1, gb1, F * F, o_f, F)
    store_gradients(parts_ptr + F * F + F, gw2, gb2, F * F, o_f, F)


# Tiles and passes by what compiles without spills on every architecture (python -m bench.compiled). The operands of
# three-fold tf32 products want the most room; rows that are not aligned want more than others.


def _forward_frames(x: Tensor) -> int:
    if unit(x.shape[2]) == 1:
        return 16
    return 32 if needs_split_products(x) else 64


def _backward_form(x: Tensor) -> tuple[int, int, int]:
    """Return the frames of a tile, the passes and the warps."""
    few = 4 if x.shape[1] <= 32 else product_warps(x)
    if needs_split_products(x):
        return (32 if unit(x.shape[2]) > 1 and one_warpgroup(x) else 16), 3, few
    target = target_of(x)
    if target.backend == "cuda" and 90 <= target.arch < 120:
        return 32, 1, 4 if x.shape[1] <= 32 else warps(x)
    return 32, 2, few


def _forward(
    x: Tensor,
    spatial: Tensor,
    mask: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    seed: Optional[Tensor],
    p: float,
) -> tuple[Tensor]:
    n, _, t = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if launchable(x) and x.numel():
        x, spatial, mask = rows(x), planes(spatial), rows(mask)
        constants = tile_constants(x, _forward_frames(x))
        per_sequence, steps = split(x, constants["BT"])
        seed, *dropout_numbers = dropout_arguments(p, seed)
        launch(
            _fusion_layer_forward_kernel, (n * per_sequence,), x, spatial, mask, weight1.contiguous(), bias1,
            weight2.contiguous(), bias2, seed, out, *dropout_numbers, spatial.stride(0) // constants["UNIT"],
            t // constants["UNIT"], per_sequence, steps, num_warps=product_warps(x) if needs_split_products(x) else 4,
            **constants,
        )  # fmt: skip
    return (out,)


def _backward(
    grad: Tensor,
    x: Tensor,
    spatial: Tensor,
    mask: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    seed: Optional[Tensor],
    p: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x and spatial, and those of the parameters in one tensor of float32."""
    n, f, t = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_spatial = torch.empty_like(spatial, memory_format=torch.contiguous_format)
    columns = 2 * f * f + 2 * f
    if not launchable(x) or not x.numel():
        return grad_x, grad_spatial, x.new_zeros(columns, dtype=torch.float32)
    grad, x, spatial, mask = rows(grad), rows(x), planes(spatial), rows(mask)
    frames, passes, num_warps = _backward_form(x)
    constants = tile_constants(x, frames)
    per_sequence, steps = split(x, constants["BT"])
    parts = x.new_empty(n * per_sequence, columns, dtype=torch.float32)
    seed, *dropout_numbers = dropout_arguments(p, seed)
    launch(
        _fusion_layer_backward_kernel, (n * per_sequence,), grad, x, spatial, mask, weight1.contiguous(), bias1,
        weight2.contiguous(), seed, grad_x, grad_spatial, parts, *dropout_numbers,
        spatial.stride(0) // constants["UNIT"], t // constants["UNIT"], per_sequence, steps, PASSES=passes,
        num_warps=num_warps, **constants,
    )  # fmt: skip
    return grad_x, grad_spatial, parts.sum(0)


def _unpack(computed: tuple[Tensor, Tensor, Tensor], args: Sequence[object]) -> tuple[Tensor, ...]:
    *sequences, flat = computed
    return *sequences, *split_gradients(flat, args[3:7])


OPERATOR = Operator(
    _fusion_layer_reference,
    _flops,
    Fused(
        _forward, _backward, differentiable=(0, 1, 3, 4, 5, 6), unpack=_unpack, unsupported=unsupported_frames
    ),
    analytic=Fused(
        _analytic_forward, _analytic_backward, differentiable=(0, 1, 3, 4, 5, 6), saved=(1, 2, 3), kept=3
    ),
)


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
