"""Dilated convolution of kernel size 3 over frames, as a part of other operators.

    y[n,o,t] = bias[o] + sum_(g,j) weight[o,g,j] x[n,g,t + (j - 1) d]            zero outside of the sequence

Backward, with gz the gradient of y:

    grad_x[n,g,t] = sum_(o,j) weight[o,g,j] gz[n,o,t - (j - 1) d],   grad_bias[o] = sum gz
    grad_weight[o,g,j] = sum_(n,t) gz[n,o,t - (j - 1) d] x[n,g,t]

Where y is followed by ReLU and instance norm, whose output is h, gz is computed on the way from the gradient gr behind the
norm's residual and gh of h:

    gz = (gr + rstd (gh - mean_t gh - h mean_t(gh h))) [y > 0]                   means over real frames

Two kernels: one makes grad_x tile by tile, the other adds up the gradients of the parameters, one matrix per program. In one
kernel the three sums of matrices leave no room for a second program per processor, and each step waits for memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .frame_tiles import (
    load_frames,
    load_packed,
    load_real,
    load_vector,
    needs_split_products,
    product_warps,
    sequence_and_part,
    store_frames,
    store_matrix,
    tile_constants,
)
from .launch import cdiv, device_function, kernel, launch, tl, unit


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
def load_taps(packed_ptr, first: tl.constexpr, BF: tl.constexpr):
    """Return the three matrices [BF, BF] of a convolution from packed ones, of which they are number ``first`` and on."""
    return (
        load_packed(packed_ptr, first, BF),
        load_packed(packed_ptr, first + 1, BF),
        load_packed(packed_ptr, first + 2, BF),
    )


@device_function
def dilated_conv(x_ptr, weight0, weight1, weight2, bias, o_f, t, d, F, T, PRECISION: tl.constexpr):
    """The convolution of a sequence at frames t: [BF, BT] in float32."""
    y = tl.dot(weight0, load_frames(x_ptr, o_f, t - d, F, T), input_precision=PRECISION)
    y = tl.dot(weight1, load_frames(x_ptr, o_f, t, F, T), y, input_precision=PRECISION)
    y = tl.dot(weight2, load_frames(x_ptr, o_f, t + d, F, T), y, input_precision=PRECISION)
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
    grad_ptr, mask_ptr, packed_ptr, gr_ptr, gh_ptr, o_ptr, stats_ptr, sums_ptr, gz_ptr, grad_x_ptr, d, T, TILES,
    FIRST: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_x of one tile, which the gradient of the output also reaches directly where the frame is real; and gz, where it is
    not given. The transposed taps are number FIRST and on of the packed matrices."""
    T, d = T * UNIT, d * STRIDE
    i_n, i_t = sequence_and_part(TILES)
    o_f, t = tl.arange(0, BF), i_t * BT + tl.arange(0, BT)
    plane = i_n * F * T
    gr_ptr += plane
    mask_ptr += i_n * T
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
    grad_x = _direct(grad_ptr + plane, mask_ptr, o_f, t, F, T)
    for j in tl.static_range(0, 3):
        gz = _gradient(gr_ptr, norm, o_f, t + (1 - j) * d, F, T)
        grad_x = tl.dot(load_packed(packed_ptr, FIRST + j, BF), gz, grad_x, input_precision=PRECISION)
        if j == 1:
            if gz_ptr is not None:
                store_frames(gz_ptr + plane, gz, o_f, t, F, T)
    store_frames(grad_x_ptr + plane, grad_x, o_f, t, F, T)


@kernel
def _dilated_conv_weights_kernel(
    gz_ptr, x_ptr, gc_ptr, hidden_ptr, parts_ptr, d, T, P, STEPS, COLUMNS, F: tl.constexpr, BF: tl.constexpr,
    BT: tl.constexpr, UNIT: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A part of the gradient of one tap, or, the fourth, of the square weight between ``hidden`` and what has the gradient
    ``gc``; and of their biases."""
    T, d = T * UNIT, d * STRIDE
    i_n, i_p = sequence_and_part(P)
    j = tl.program_id(1)
    o_f, o_t = tl.arange(0, BF), tl.arange(0, BT)
    plane = i_n * F * T
    left_ptr, right_ptr, shift = gz_ptr + plane, x_ptr + plane, (1 - j) * d
    if gc_ptr is not None:
        if j == 3:
            left_ptr, right_ptr, shift = gc_ptr + plane, hidden_ptr + plane, 0 * d
    gw, gb = tl.zeros([BF, BF], tl.float32), tl.zeros([BF], tl.float32)
    for i in range(0, STEPS):
        t = (i_p * STEPS + i) * BT + o_t
        left = load_frames(left_ptr, o_f, t + shift, F, T)
        gw = tl.dot(left, tl.trans(load_frames(right_ptr, o_f, t, F, T)), gw, input_precision=PRECISION)
        gb += tl.sum(left.to(tl.float32), 1)
    parts_ptr += tl.program_id(0).to(tl.int64) * COLUMNS
    # One store of each: Triton 3.7 fails where two branches use the sum.
    square = j == 3
    weight, row, column = (
        tl.where(square, 3 * F * F + F, j),
        tl.where(square, F, 3 * F),
        tl.where(square, 1, 3),
    )
    store_matrix(parts_ptr + weight, gw, o_f, o_f, F, row, column)
    bias = tl.where(square, 4 * F * F + F, 3 * F * F)
    # The frames of the middle tap are not shifted: none is left out.
    tl.store(parts_ptr + bias + o_f, gb, mask=(o_f < F) & ((j == 1) | square))


def dilation_arguments(d: int) -> tuple[int, dict[str, int]]:
    """A dilation as kernels are told it: divided by its unit, and the unit, as for lengths."""
    return d // unit(d), {"STRIDE": unit(d)}


def weights_frames(x: Tensor) -> int:
    """Return the frames of a tile of sums over frames: fewer for split operands and rows that are not aligned."""
    return 16 if needs_split_products(x) and unit(x.shape[2]) == 1 else 32


def launch_dilated_conv_backward(
    grad: Tensor,
    mask: Tensor,
    x: Tensor,
    packed: Tensor,
    first: int,
    d: int,
    gr: Tensor,
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    gz: Tensor | None,
    grad_x: Tensor,
    square: tuple[Tensor, Tensor] | None,
    parts: Tensor,
    division: tuple[int, int],
) -> None:
    """Write the gradient of x, and those of weight and bias into the first columns of ``parts`` (programs, columns).

    ``packed`` has the transposed taps from ``first`` on. ``gr`` is gz itself, or, with ``norm`` = (gh, y, statistics of the
    norm, sums over time of gh and gh h (N, 2F)), what reaches y beside the norm; gz is then written to ``gz``. ``square``:
    the gradient behind a square weight and its operand; its gradients follow in the columns. ``division`` is that of
    :func:`.frame_tiles.split` in tiles of ``weights_frames(x)``.
    """
    n, _, t = x.shape
    per_sequence, steps = division
    constants = tile_constants(x, weights_frames(x)) | {"num_warps": product_warps(x)}
    d, stride = dilation_arguments(d)
    length, tiles = t // constants["UNIT"], cdiv(t, constants["BT"])
    launch(
        _dilated_conv_backward_kernel, (n * tiles,), grad, mask, packed, gr, *(norm or (None, None, None, None)), gz,
        grad_x, d, length, tiles, FIRST=first, **stride, **constants,
    )  # fmt: skip
    launch(
        _dilated_conv_weights_kernel, (n * per_sequence, 3 + (square is not None)), gr if gz is None else gz, x,
        *(square or (None, None)), parts, d, length, per_sequence, steps, parts.shape[1], **stride, **constants,
    )  # fmt: skip
