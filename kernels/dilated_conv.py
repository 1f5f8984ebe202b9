"""Dilated convolution of kernel size 3 over frames, as a part of other operators.

    y[n,o,t] = bias[o] + sum_(g,j) weight[o,g,j] x[n,g,t + (j - 1) d]            zero outside of the sequence

Backward, with gz the gradient of y:

    grad_x[n,g,t] = sum_(o,j) weight[o,g,j] gz[n,o,t - (j - 1) d],   grad_bias[o] = sum gz
    grad_weight[o,g,j] = sum_(n,t) gz[n,o,t - (j - 1) d] x[n,g,t]

Both want gz at the same three places, so one pass gives both. Where y is followed by ReLU and instance norm, whose output
is h, gz is computed on the way from the gradient gr behind the norm's residual and gh of h:

    gz = (gr + rstd (gh - mean_t gh - h mean_t(gh h))) [y > 0]                   means over real frames
"""

from __future__ import annotations

import torch
from torch import Tensor

from .frame_tiles import (
    load_frames,
    load_matrix,
    load_real,
    load_vector,
    needs_split_products,
    product_warps,
    sequence_and_part,
    store_frames,
    store_matrix,
    tile_constants,
    warps,
)
from .launch import device_function, kernel, launch, target_of, tl, unit


def analytic_dilated_conv(x: Tensor, weight: Tensor, bias: Tensor, d: int) -> Tensor:
    """y, as a product per tap in the analytic passes: torch's convolution takes longer on a CPU."""
    past, present, future = (tap.expand(len(x), -1, -1) for tap in weight.permute(2, 0, 1).contiguous())
    early, late = _apart(d, x.shape[2])
    y = torch.bmm(present, x).add_(bias.view(-1, 1))
    # Not baddbmm_: where its result is a part of the frames, torch multiplies sequence by sequence.
    y[..., late].add_(torch.bmm(past, x[..., early]))
    y[..., early].add_(torch.bmm(future, x[..., late]))
    return y


def analytic_dilated_conv_gradients(
    gz: Tensor, x: Tensor, weight: Tensor, d: int, residual: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`analytic_dilated_conv` by x, to which `residual` is added, by weight and by bias."""
    past, present, future = (tap.expand(len(x), -1, -1) for tap in weight.permute(2, 1, 0).contiguous())
    early, late = _apart(d, x.shape[2])
    gz_early, gz_late = gz[..., early], gz[..., late]
    grad_x = torch.baddbmm(residual, present, gz)
    grad_x[..., early].add_(torch.bmm(past, gz_late))
    grad_x[..., late].add_(torch.bmm(future, gz_early))
    pairs = (gz_late, x[..., early]), (gz, x), (gz_early, x[..., late])
    by_tap = x.new_empty(3, len(x), *weight.shape[:2])
    for product, (g, of) in zip(by_tap, pairs):
        torch.bmm(g, of.mT, out=product)
    return grad_x, by_tap.sum(1).permute(1, 2, 0), gz.sum((0, 2))


def _apart(d: int, t: int) -> tuple[slice, slice]:
    """The frames that have one d frames later within the sequence, and those later ones."""
    d = min(d, t)
    return slice(0, t - d), slice(d, t)


@device_function
def load_dilated_weights(weight_ptr, o_f, F, dtype: tl.constexpr):
    """The three matrices [BF, BF] of a weight (F, F, 3)."""
    return (
        load_matrix(weight_ptr, o_f, o_f, F, 3 * F, 3, dtype),
        load_matrix(weight_ptr + 1, o_f, o_f, F, 3 * F, 3, dtype),
        load_matrix(weight_ptr + 2, o_f, o_f, F, 3 * F, 3, dtype),
    )


@device_function
def dilated_conv(x_ptr, weight0, weight1, weight2, bias, o_f, t, d, F, T, PRECISION: tl.constexpr):
    """The convolution of a sequence at frames t: [BF, BT] in float32."""
    y = tl.dot(weight0, load_frames(x_ptr, o_f, t - d, F, T), input_precision=PRECISION)
    y = tl.dot(weight1, load_frames(x_ptr, o_f, t, F, T), y, input_precision=PRECISION)
    y = tl.dot(weight2, load_frames(x_ptr, o_f, t + d, F, T), y, input_precision=PRECISION)
    return y + bias[:, None]


@device_function
def dilated_conv_by_taps(x_ptr, weight_ptr, bias, o_f, t, d, F, T, PRECISION: tl.constexpr):
    """The same, with one matrix at a time: for kernels that have no room for three."""
    y = tl.zeros([o_f.shape[0], t.shape[0]], tl.float32)
    for j in range(0, 3):
        weight = load_matrix(weight_ptr + j, o_f, o_f, F, 3 * F, 3, x_ptr.dtype.element_ty)
        y = tl.dot(weight, load_frames(x_ptr, o_f, t + (j - 1) * d, F, T), y, input_precision=PRECISION)
    return y + bias[:, None]


@device_function
def _gradient(gr_ptr, norm, o_f, t, F, T):
    """gz at frames t."""
    gh_ptr, o_ptr, mask_ptr, mean, rstd, mean_g, mean_gh = norm
    gz = load_frames(gr_ptr, o_f, t, F, T)
    if gh_ptr is not None:
        o = load_frames(o_ptr, o_f, t, F, T).to(tl.float32)
        h = (o - mean[:, None]) * rstd[:, None]
        gh = load_frames(gh_ptr, o_f, t, F, T).to(tl.float32)
        behind = gz.to(tl.float32) + rstd[:, None] * (gh - mean_g[:, None] - h * mean_gh[:, None])
        gz = tl.where(load_real(mask_ptr, t, T)[None, :] & (o > 0.0), behind, 0.0).to(gz.dtype)
    return gz


@device_function
def _direct(grad_ptr, mask_ptr, o_f, t, F, T):
    """What reaches x beside the convolution, at frames t."""
    grad = load_frames(grad_ptr, o_f, t, F, T).to(tl.float32)
    return tl.where(load_real(mask_ptr, t, T)[None, :], grad, 0.0)


@kernel
def _dilated_conv_backward_kernel(
    grad_ptr, mask_ptr, x_ptr, weight_ptr, gr_ptr, gh_ptr, o_ptr, stats_ptr, sums_ptr, grad_x_ptr, parts_ptr, d, T, P,
    STEPS, COLUMNS, APART: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
    STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the output reaches x directly where the frame is real, and through the convolution.

    APART: the gradients of the three matrices one after the other, for operands that want much room.
    """
    T, d = T * UNIT, d * STRIDE
    i_n, i_p = sequence_and_part(P)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane = i_n * F * T
    grad_ptr += plane
    x_ptr += plane
    gr_ptr += plane
    dtype = x_ptr.dtype.element_ty
    mask_ptr += i_n * T
    parts_ptr += tl.program_id(0).to(tl.int64) * COLUMNS
    mean, rstd, mean_g, mean_gh = None, None, None, None
    if gh_ptr is not None:
        gh_ptr += plane
        o_ptr += plane
        stats_ptr += i_n * (2 * F + 1)
        mean, rstd = load_vector(stats_ptr, o_f, F), load_vector(stats_ptr + F, o_f, F)
        count = tl.load(stats_ptr + 2 * F)
        sums_ptr += i_n * (2 * F)
        mean_g, mean_gh = load_vector(sums_ptr, o_f, F) / count, load_vector(sums_ptr + F, o_f, F) / count
    norm = gh_ptr, o_ptr, mask_ptr, mean, rstd, mean_g, mean_gh
    gb = tl.zeros([BF], tl.float32)
    if APART:
        for i in range(0, STEPS):
            t = (i_p * STEPS + i) * BT + o_t
            grad_x = _direct(grad_ptr, mask_ptr, o_f, t, F, T)
            for j in range(0, 3):
                gz = _gradient(gr_ptr, norm, o_f, t + (1 - j) * d, F, T)
                weight = load_matrix(weight_ptr + j, o_f, o_f, F, 3, 3 * F, dtype)
                grad_x = tl.dot(weight, gz, grad_x, input_precision=PRECISION)
            store_frames(grad_x_ptr + plane, grad_x, o_f, t, F, T)
        for j in range(0, 3):
            gw = tl.zeros([BF, BF], tl.float32)
            for i in range(0, STEPS):
                t = (i_p * STEPS + i) * BT + o_t
                gz = _gradient(gr_ptr, norm, o_f, t + (1 - j) * d, F, T)
                gw = tl.dot(gz, tl.trans(load_frames(x_ptr, o_f, t, F, T)), gw, input_precision=PRECISION)
                if j == 1:
                    gb += tl.sum(gz.to(tl.float32), 1)
            store_matrix(parts_ptr + j, gw, o_f, o_f, F, 3 * F, 3)
    else:
        weight0 = load_matrix(weight_ptr, o_f, o_f, F, 3, 3 * F, dtype)
        weight1 = load_matrix(weight_ptr + 1, o_f, o_f, F, 3, 3 * F, dtype)
        weight2 = load_matrix(weight_ptr + 2, o_f, o_f, F, 3, 3 * F, dtype)
        gw0, gw1 = tl.zeros([BF, BF], tl.float32), tl.zeros([BF, BF], tl.float32)
        gw2 = tl.zeros([BF, BF], tl.float32)
        for i in range(0, STEPS):
            t = (i_p * STEPS + i) * BT + o_t
            gz0 = _gradient(gr_ptr, norm, o_f, t + d, F, T)
            gz1 = _gradient(gr_ptr, norm, o_f, t, F, T)
            gz2 = _gradient(gr_ptr, norm, o_f, t - d, F, T)
            grad_x = _direct(grad_ptr, mask_ptr, o_f, t, F, T)
            grad_x = tl.dot(weight0, gz0, grad_x, input_precision=PRECISION)
            grad_x = tl.dot(weight1, gz1, grad_x, input_precision=PRECISION)
            grad_x = tl.dot(weight2, gz2, grad_x, input_precision=PRECISION)
            store_frames(grad_x_ptr + plane, grad_x, o_f, t, F, T)
            x = tl.trans(load_frames(x_ptr, o_f, t, F, T))  # [BT, BF]
            gw0 = tl.dot(gz0, x, gw0, input_precision=PRECISION)
            gw1 = tl.dot(gz1, x, gw1, input_precision=PRECISION)
            gw2 = tl.dot(gz2, x, gw2, input_precision=PRECISION)
            gb += tl.sum(gz1.to(tl.float32), 1)
        store_matrix(parts_ptr, gw0, o_f, o_f, F, 3 * F, 3)
        store_matrix(parts_ptr + 1, gw1, o_f, o_f, F, 3 * F, 3)
        store_matrix(parts_ptr + 2, gw2, o_f, o_f, F, 3 * F, 3)
    tl.store(parts_ptr + 3 * F * F + o_f, gb, mask=o_f < F)


def dilation_arguments(d: int) -> tuple[int, dict[str, int]]:
    """A dilation as kernels are told it: divided by its unit, and the unit, as for lengths."""
    return d // unit(d), {"STRIDE": unit(d)}


def conv_backward_frames(x: Tensor) -> int:
    """Frames of a tile of the backward kernel: fewer for split operands and rows that are not aligned."""
    return 16 if needs_split_products(x) and unit(x.shape[2]) == 1 else 32


def launch_dilated_conv_backward(
    grad: Tensor,
    mask: Tensor,
    x: Tensor,
    weight: Tensor,
    d: int,
    gr: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    grad_x: Tensor,
    parts: Tensor,
    division: tuple[int, int],
) -> None:
    """Write the gradient of x, and of weight and bias into the first columns of ``parts`` (programs, columns).

    ``gr`` is gz itself, or, with ``norm`` = (gh, y, statistics of the norm, sums over time of gh and gh h (N, 2F)), what
    reaches y beside the norm. ``division`` is that of :func:`.frame_tiles.split` in tiles of ``conv_backward_frames(x)``.
    """
    n, _, t = x.shape
    per_sequence, steps = division
    constants = tile_constants(x, conv_backward_frames(x))
    d, stride = dilation_arguments(d)
    short = target_of(x).backend == "hip" or unit(t) == 1
    split_products = needs_split_products(x)
    apart = split_products or (norm is not None and short)
    launch(
        _dilated_conv_backward_kernel, (n * per_sequence,), grad, mask, x, weight, gr,
        *(norm or (None, None, None, None)), grad_x, parts, d, t // constants["UNIT"], per_sequence, steps,
        parts.shape[1], APART=apart, num_warps=product_warps(x) if split_products else warps(x),
        **stride, **constants,
    )  # fmt: skip
