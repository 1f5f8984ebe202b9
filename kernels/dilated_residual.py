"""Dilated residual layer over time.

    out = (x + dropout(W h + b)) * mask,    h = relu(y),   y = conv1d(x; kernel 3, dilation d)

Backward, with gc the gradient behind the product:

    gc = dropout(grad * mask),   gz = (W^T gc) [y > 0],   grad_W = sum_(n,t) gc h^T,   grad_b = sum_(n,t) gc
    grad_x = grad * mask + what the convolution gives back of gz: see :mod:`.dilated_conv`

Shapes: x, out (N, F, T); mask (N, 1, T) bool; convolution (F, F, 3); W (F, F).
Source: Y. Abu Farha, J. Gall, MS-TCN, arXiv 1903.01945.

Forward: one launch packs the matrices as the products want them, one does the rest. Backward computes y again, which is
cheaper than to keep it. It wants gz at frames of other programs: one launch makes it, one makes grad_x of it, and one the
parts of the gradients of the parameters, one row for each program, which are added up last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as functional
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
from .frame_tiles import (
    PROGRAMS,
    load_frames,
    load_packed,
    load_real,
    load_vector,
    needs_split_products,
    product_warps,
    sequence_and_part,
    split,
    split_gradients,
    store_frames,
    store_packed,
    tile_constants,
    unsupported_frames,
)
from .launch import cdiv, constant, kernel, launch, launchable, power_of_two, rows, tl
from .operator import Fused, Operator, check_mask, check_shapes
from .padding import masked, masked_, real_frames
from .pointwise import analytic_pointwise, pointwise, pointwise_input_gradient, pointwise_parameter_gradients


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


def _analytic_forward(
    x: Tensor,
    mask: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    seed: Optional[Tensor],
    dilation: int,
    p: float,
) -> tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]]:
    (kept,) = dropout_kept(x, (p,), seed)
    h = analytic_dilated_conv(x, conv_weight, conv_bias, dilation).relu_()
    scale = dropout_scale(p, seed)
    out = only(analytic_pointwise(h, scale * output_weight, scale * output_bias), kept)
    real = real_frames(mask, x.dtype)
    return masked_(out.add_(x), real), h, kept, real


def _analytic_backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    seed: Optional[Tensor],
    dilation: int,
    p: float,
    h: Tensor,
    kept: Optional[Tensor],
    real: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    grad = masked(grad, real)
    g = grad if kept is None else grad * kept
    scale = dropout_scale(p, seed)
    grad_output_weight, grad_output_bias = (scale * d for d in pointwise_parameter_gradients(g, h))
    gz = pointwise_input_gradient(g, scale * output_weight)
    torch.ops.aten.threshold_backward.grad_input(gz, h, 0.0, grad_input=gz)
    of_conv = analytic_dilated_conv_gradients(gz, x, conv_weight, dilation, grad)
    return *of_conv, grad_output_weight, grad_output_bias


OUTPUT, TAPS = constant(0), constant(1)
"""Places of the square weight and of the three matrices of the convolution among the packed ones."""
MATRICES = 4
TRANSPOSED = constant(MATRICES)
"""Added to them, those of the transposed matrices."""


@kernel
def _dilated_residual_pack_kernel(weight_ptr, conv_ptr, packed_ptr, F: tl.constexpr, BF: tl.constexpr):
    """The matrices and the transposed ones in the dtype of the products, zero beyond the last feature."""
    i, o_f = tl.program_id(0), tl.arange(0, BF)
    inside = (o_f < F)[:, None] & (o_f < F)[None, :]
    places = o_f[:, None] * F + o_f[None, :]
    dtype = packed_ptr.dtype.element_ty
    if i == OUTPUT:
        weight = tl.load(weight_ptr + places, mask=inside, other=0.0).to(dtype)
    else:
        weight = tl.load(conv_ptr + 3 * places + (i - TAPS), mask=inside, other=0.0).to(dtype)
    store_packed(packed_ptr, weight, i, TRANSPOSED, BF)


@kernel
def _dilated_residual_forward_kernel(
    x_ptr, mask_ptr, packed_ptr, conv_bias_ptr, bias_ptr, seed_ptr, out_ptr, threshold, scale, d, T, P, STEPS,
    F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    T, d = T * UNIT, d * STRIDE
    i_n, i_p = sequence_and_part(P)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane = i_n * F * T
    dtype = x_ptr.dtype.element_ty
    weight0, weight1, weight2 = load_taps(packed_ptr, TAPS, BF)
    weight = load_packed(packed_ptr, OUTPUT, BF)
    conv_bias, bias = load_vector(conv_bias_ptr, o_f, F), load_vector(bias_ptr, o_f, F)
    if seed_ptr is not None:
        dropout_keys = dropout_rows(seed_ptr, i_n * F + o_f)
    for i in range(0, STEPS):
        t = (i_p * STEPS + i) * BT + o_t
        y = dilated_conv(x_ptr + plane, weight0, weight1, weight2, conv_bias, o_f, t, d, F, T, PRECISION)
        hidden = tl.where(y <= 0.0, 0.0, y).to(dtype)  # a NaN stays one, as in torch.relu
        out = tl.dot(weight, hidden, input_precision=PRECISION) + bias[:, None]
        if seed_ptr is not None:
            out = dropped(out, dropout_keys, t, threshold, scale)
        out += load_frames(x_ptr + plane, o_f, t, F, T).to(tl.float32)
        real = load_real(mask_ptr + i_n * T, t, T)
        store_frames(out_ptr + plane, tl.where(real[None, :], out, 0.0), o_f, t, F, T)


@kernel
def _dilated_residual_backward_kernel(
    grad_ptr, x_ptr, mask_ptr, packed_ptr, conv_bias_ptr, seed_ptr, gc_ptr, hidden_ptr, gz_ptr, threshold, scale, d, T,
    TILES, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """gc, h and gz of one tile."""
    T, d = T * UNIT, d * STRIDE
    i_n, i_t = sequence_and_part(TILES)
    o_f, t = tl.arange(0, BF), i_t * BT + tl.arange(0, BT)
    plane = i_n * F * T
    dtype = x_ptr.dtype.element_ty
    weight0, weight1, weight2 = load_taps(packed_ptr, TAPS, BF)
    conv_bias = load_vector(conv_bias_ptr, o_f, F)
    y = dilated_conv(x_ptr + plane, weight0, weight1, weight2, conv_bias, o_f, t, d, F, T, PRECISION)
    store_frames(hidden_ptr + plane, tl.where(y <= 0.0, 0.0, y), o_f, t, F, T)
    real = load_real(mask_ptr + i_n * T, t, T)
    gc = tl.where(real[None, :], load_frames(grad_ptr + plane, o_f, t, F, T).to(tl.float32), 0.0)
    if seed_ptr is not None:
        gc = dropped(gc, dropout_rows(seed_ptr, i_n * F + o_f), t, threshold, scale)
    gc = gc.to(dtype)
    store_frames(gc_ptr + plane, gc, o_f, t, F, T)
    gz = tl.dot(load_packed(packed_ptr, TRANSPOSED + OUTPUT, BF), gc, input_precision=PRECISION)
    store_frames(gz_ptr + plane, tl.where(y > 0.0, gz, 0.0), o_f, t, F, T)


def _forward(
    x: Tensor,
    mask: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    seed: Optional[Tensor],
    dilation: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    n, f, t = x.shape
    out, width = torch.empty_like(x, memory_format=torch.contiguous_format), power_of_two(f, 16)
    packed = x.new_empty(2 * MATRICES, width, width)
    if launchable(x) and x.numel():
        launch(
            _dilated_residual_pack_kernel, (MATRICES,), output_weight.contiguous(), conv_weight.contiguous(), packed, F=f,
            BF=width,
        )  # fmt: skip
        x, mask = rows(x), rows(mask)
        split_products = needs_split_products(x)
        # What compiles without spills on every architecture (python -m bench.compiled).
        constants = tile_constants(x, 32 if split_products else 64)
        per_sequence, steps = split(x, constants["BT"])
        seed, *dropout_numbers = dropout_arguments(p, seed)
        d, stride = dilation_arguments(dilation)
        launch(
            _dilated_residual_forward_kernel, (n * per_sequence,), x, mask, packed, conv_bias, output_bias, seed, out,
            *dropout_numbers, d, t // constants["UNIT"], per_sequence, steps,
            num_warps=product_warps(x) if split_products else 4, **stride, **constants,
        )  # fmt: skip
    return out, packed


def _backward(
    grad: Tensor,
    x: Tensor,
    mask: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    seed: Optional[Tensor],
    dilation: int,
    p: float,
    packed: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and those of the parameters in one tensor of float32."""
    n, f, t = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    columns = 4 * f * f + 2 * f
    if not launchable(x) or not x.numel():
        return grad_x, x.new_zeros(columns, dtype=torch.float32)
    grad, x, mask = rows(grad), rows(x), rows(mask)
    constants = tile_constants(x, weights_frames(x))
    tiles = cdiv(t, constants["BT"])
    gc, hidden, gz = (torch.empty_like(x) for _ in range(3))
    seed, *dropout_numbers = dropout_arguments(p, seed)
    d, stride = dilation_arguments(dilation)
    launch(
        _dilated_residual_backward_kernel, (n * tiles,), grad, x, mask, packed, conv_bias, seed, gc, hidden, gz,
        *dropout_numbers, d, t // constants["UNIT"], tiles, num_warps=product_warps(x), **stride, **constants,
    )  # fmt: skip
    division = split(x, weights_frames(x), PROGRAMS // 2)
    parts = x.new_empty(n * division[0], columns, dtype=torch.float32)
    launch_dilated_conv_backward(
        grad, mask, x, packed, MATRICES + 1, dilation, gz, None, None, grad_x, (gc, hidden), parts, division
    )
    return grad_x, parts.sum(0)


def _unpack(computed: tuple[Tensor, Tensor], args: Sequence[object]) -> tuple[Tensor, ...]:
    grad_x, flat = computed
    return grad_x, *split_gradients(flat, args[2:6])


OPERATOR = Operator(
    _dilated_residual_reference,
    _flops,
    Fused(
        _forward,
        _backward,
        differentiable=(0, 2, 3, 4, 5),
        saved=(1,),
        kept=1,
        unpack=_unpack,
        unsupported=unsupported_frames,
    ),
    analytic=Fused(
        _analytic_forward, _analytic_backward, differentiable=(0, 2, 3, 4, 5), saved=(1, 2, 3), kept=3
    ),
)


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
