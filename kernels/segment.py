"""Reductions over segments of a batch of sequences, and distances between them.

    mean[s,f]      = 1/max(length[s], 1) * sum_(t = start[s] .. start[s]+length[s]-1) x[batch[s], f, t]
    distance[i,j]  = ||f_i - f_j||_2                      without an (S, S, D) tensor

and their gradients:

    grad_x[n,f,t]  = grad_mean[s,f] / length[s]           s the segment that frame t of sequence n lies in, 0 without one
    grad_f_i       = sum_j w[i,j] (f_i - f_j)             w = (grad_distance + grad_distance^T) / distance, 0 at distance 0

Shapes: x (N, F, T); batch, start, length (S,) int64, ordered by (batch, start), disjoint -> mean (S, F).
f (S, D) -> distance (S, S). A segment mean commutes with a 1x1 convolution, so a wide head is applied to S
rows instead of N*T frames. A segment of length 0 has the mean 0 and no gradient: with such rows at its end (batch N-1,
start T) a table of segments has a fixed size.

Each pass is one launch. Segments differ in length, so the mean's programs loop over the frames of theirs. Its
gradient goes the other way, from frames to segments: every frame finds its segment in the ordered table, by bisection,
so that the gradient is written once, in whole rows, gaps included; a scatter by segment would need a zeroed tensor before.
Distances and their gradients are sums of direct differences: products, as in |a|^2 - 2ab + |b|^2 and in w f, cancel
for near neighbours. Tiles of them (I, J, D) are added up elementwise in float32 and reduced once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from .launch import TILE_LIMIT, cdiv, device_function, kernel, launch, launchable, rows, tl, unit
from .operator import Fused, Operator, check_shapes
from .precision import wide_dtype, widened


def _segment_mean_reference(x: Tensor, batch: Tensor, start: Tensor, length: Tensor) -> Tensor:
    frames = x.shape[0] * x.shape[2]
    first = batch * x.shape[2] + start
    end = first + length
    # Segments and the gaps before, between and behind them take turns, so that no frame is left out.
    edges = torch.stack([first, end], dim=1).flatten()
    lengths = edges.diff(prepend=edges.new_zeros(1), append=edges.new_full((1,), frames))
    by_frame = rearrange(widened(x), "n f t -> (n t) f")
    sums = torch.segment_reduce(by_frame, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)[1::2]
    return (sums / length.clamp(min=1).unsqueeze(1)).to(x.dtype)


def _pairwise_distance_reference(f: Tensor) -> Tensor:
    wide = widened(f)
    # Direct differences: the expansion |a|^2 - 2ab + |b|^2 cancels for near neighbours.
    return torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_flops(x: Tensor, *_: object) -> tuple[int, int]:
    return x.numel(), x.numel()


def _distance_flops(f: Tensor) -> tuple[int, int]:
    s, d = f.shape
    return 3 * s * s * d, 4 * s * s * d


@kernel
def _segment_mean_forward_kernel(
    x_ptr, batch_ptr, start_ptr, length_ptr, mean_ptr, F, T, BF: tl.constexpr, BT: tl.constexpr
):
    i_s, i_f = tl.program_id(0).to(tl.int64), tl.program_id(1)
    o_f, o_t = i_f * BF + tl.arange(0, BF), tl.arange(0, BT)
    length = tl.load(length_ptr + i_s).to(tl.int32)
    x_ptr += (tl.load(batch_ptr + i_s) * F + i_f * BF) * T + tl.load(start_ptr + i_s)
    p_x = x_ptr + tl.arange(0, BF)[:, None] * T + o_t[None, :]
    total = tl.zeros([BF, BT], tl.float32)
    for i in range(0, length, BT):
        inside = (o_f < F)[:, None] & (i + o_t < length)[None, :]
        total += tl.load(p_x + i, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / tl.maximum(length, 1).to(tl.float32)
    tl.store(mean_ptr + i_s * F + o_f, mean.to(mean_ptr.dtype.element_ty), mask=o_f < F)


@kernel
def _segment_mean_backward_kernel(
    grad_ptr, batch_ptr, start_ptr, length_ptr, grad_x_ptr, F, T, NT, S, STEPS, BF: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """``STEPS``: number of binary digits of ``S``."""
    T = T * UNIT
    i_t, i_n, i_f = tl.program_id(0) % NT, (tl.program_id(0) // NT).to(tl.int64), tl.program_id(1)
    o_f, o_t = i_f * BF + tl.arange(0, BF), i_t * BT + tl.arange(0, BT)
    # Number of segments that begin at each frame or before, digit by digit.
    begun = tl.zeros([BT], tl.int32)
    for i in range(0, STEPS):
        more = begun + (1 << (STEPS - 1 - i))
        batch = tl.load(batch_ptr + more - 1, mask=more <= S, other=0)
        start = tl.load(start_ptr + more - 1, mask=more <= S, other=0)
        before = (batch < i_n) | ((batch == i_n) & (start <= o_t))
        begun = tl.where((more <= S) & before, more, begun)
    i_s, any_begun = begun - 1, begun > 0
    batch = tl.load(batch_ptr + i_s, mask=any_begun, other=0)
    start = tl.load(start_ptr + i_s, mask=any_begun, other=0)
    length = tl.load(length_ptr + i_s, mask=any_begun, other=0)
    within = any_begun & (batch == i_n) & (o_t < start + length)
    p_grad = grad_ptr + i_s.to(tl.int64)[None, :] * F + o_f[:, None]
    grad = tl.load(p_grad, mask=(o_f < F)[:, None] & within[None, :], other=0.0).to(tl.float32)
    grad_x = grad / tl.maximum(length, 1).to(tl.float32)[None, :]  # [BF, BT]
    inside = (o_f < F)[:, None] & (o_t < T)[None, :]
    grad_x_ptr += (i_n * F + i_f * BF) * T + i_t * BT
    p_x = grad_x_ptr + tl.arange(0, BF)[:, None] * T + tl.arange(0, BT)[None, :]
    tl.store(p_x, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)


_MEAN_TILE = {"BF": 16, "BT": 128}


def _mean_unsupported(x: Tensor, *_: object) -> str | None:
    if _MEAN_TILE["BF"] * x.shape[2] >= TILE_LIMIT:
        return f"{x.shape[2]} frames exceed 32-bit offsets within a tile; split the sequence"
    return None


def _mean_forward(x: Tensor, batch: Tensor, start: Tensor, length: Tensor) -> tuple[Tensor]:
    _, features, t = x.shape
    mean = x.new_empty(len(batch), features)
    if launchable(x):
        programs = (len(batch), cdiv(features, _MEAN_TILE["BF"]))
        launch(
            _segment_mean_forward_kernel, programs, rows(x), batch, start, length, mean, features, t, **_MEAN_TILE
        )  # fmt: skip
    return (mean,)


def _mean_backward(
    grad: Tensor, x: Tensor, batch: Tensor, start: Tensor, length: Tensor, needed: Sequence[bool]
) -> tuple[Tensor]:
    n, features, t = x.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    if launchable(x):
        tiles, align, segments = cdiv(t, _MEAN_TILE["BT"]), unit(t), len(batch)
        launch(
            _segment_mean_backward_kernel, (n * tiles, cdiv(features, _MEAN_TILE["BF"])), rows(grad), batch, start,
            length, grad_x, features, t // align, tiles, segments, segments.bit_length(), UNIT=align, **_MEAN_TILE,
        )  # fmt: skip
    return (grad_x,)


@device_function
def _load_rows(f_ptr, count, o, d, D):
    """Rows ``o`` behind the pointer, of which there are ``count``, and their columns ``d``; zeros beyond both."""
    inside = (o < count)[:, None] & (d < D)[None, :]
    return tl.load(f_ptr + (o[:, None] * D + d[None, :]), mask=inside, other=0.0).to(tl.float32)


@kernel
def _pairwise_distance_forward_kernel(
    f_ptr, distance_ptr, S, D, B: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr
):
    D = D * UNIT
    i, j = tl.program_id(0).to(tl.int64) * B, tl.program_id(1).to(tl.int64) * B
    o, o_d = tl.arange(0, B), tl.arange(0, BD)
    total = tl.zeros([B, B, BD], tl.float32)
    for d in range(0, D, BD):
        f_i = _load_rows(f_ptr + i * D, S - i, o, d + o_d, D)
        f_j = _load_rows(f_ptr + j * D, S - j, o, d + o_d, D)
        difference = f_i[:, None, :] - f_j[None, :, :]
        total += difference * difference
    distance = tl.sqrt(tl.sum(total, 2))
    inside = (o < S - i)[:, None] & (o < S - j)[None, :]
    tl.store(distance_ptr + i * S + j + (o[:, None] * S + o[None, :]), distance, mask=inside)


@kernel
def _pairwise_distance_backward_kernel(
    grad_ptr, f_ptr, distance_ptr, grad_f_ptr, S, D, B: tl.constexpr, BD: tl.constexpr, UNIT: tl.constexpr
):
    D = D * UNIT
    i = tl.program_id(0).to(tl.int64) * B
    o, d = tl.arange(0, B), tl.program_id(1) * BD + tl.arange(0, BD)
    f_i = _load_rows(f_ptr + i * D, S - i, o, d, D)
    there_ptr, back_ptr, distance_ptr = grad_ptr + i * S, grad_ptr + i, distance_ptr + i * S
    there, back = o[:, None] * S + o[None, :], o[None, :] * S + o[:, None]
    total = tl.zeros([B, B, BD], tl.float32)
    for j in range(0, S, B):
        inside = (o < S - i)[:, None] & (o < S - j)[None, :]
        weight = tl.load(there_ptr + there, mask=inside, other=0.0).to(tl.float32)
        weight += tl.load(back_ptr + back, mask=inside, other=0.0).to(tl.float32)
        distance = tl.load(distance_ptr + there, mask=inside, other=0.0)
        weight = tl.where(distance == 0.0, 0.0, weight / distance)  # [B, B]
        f_j = _load_rows(f_ptr, S - j, o, d, D)
        total += weight[:, :, None] * (f_i[:, None, :] - f_j[None, :, :])
        there_ptr += B
        back_ptr += B * S
        distance_ptr += B
        f_ptr += B * D
    grad_f = tl.sum(total, 1).to(grad_f_ptr.dtype.element_ty)
    inside = (o < S - i)[:, None] & (d < D)[None, :]
    tl.store(grad_f_ptr + i * D + (o[:, None] * D + d[None, :]), grad_f, mask=inside)


_DISTANCE_TILE = {"B": 16, "BD": 32, "num_warps": 8}
"""8192 differences, 32 for each thread."""


def _distance_unsupported(f: Tensor) -> str | None:
    if _DISTANCE_TILE["B"] * max(f.shape) >= TILE_LIMIT:
        return f"{f.shape[0]} rows and {f.shape[1]} columns exceed 32-bit offsets within a tile"
    return None


def _distance_forward(f: Tensor) -> tuple[Tensor]:
    s, d = f.shape
    distance = f.new_empty(s, s, dtype=wide_dtype(f))
    if launchable(f):
        blocks, align = cdiv(s, _DISTANCE_TILE["B"]), unit(d)
        launch(
            _pairwise_distance_forward_kernel, (blocks, blocks), rows(f), distance, s, d // align, UNIT=align,
            **_DISTANCE_TILE,
        )  # fmt: skip
    return (distance,)


def _distance_backward(grad: Tensor, f: Tensor, distance: Tensor, needed: Sequence[bool]) -> tuple[Tensor]:
    s, d = f.shape
    grad_f = torch.empty_like(f, memory_format=torch.contiguous_format)
    if launchable(f):
        programs, align = (cdiv(s, _DISTANCE_TILE["B"]), cdiv(d, _DISTANCE_TILE["BD"])), unit(d)
        launch(
            _pairwise_distance_backward_kernel, programs, rows(grad), rows(f), distance, grad_f, s, d // align,
            UNIT=align, **_DISTANCE_TILE,
        )  # fmt: skip
    return (grad_f,)


SEGMENT_MEAN = Operator(
    _segment_mean_reference,
    _mean_flops,
    Fused(_mean_forward, _mean_backward, differentiable=(0,), unsupported=_mean_unsupported),
)
PAIRWISE_DISTANCE = Operator(
    _pairwise_distance_reference,
    _distance_flops,
    Fused(
        _distance_forward,
        _distance_backward,
        differentiable=(0,),
        saved=(0,),
        unsupported=_distance_unsupported,
    ),
)


def segment_mean(
    x: Tensor, batch: Tensor, start: Tensor, length: Tensor, *, backend: str | None = None
) -> Tensor:
    """Mean of the frames of every segment.

    Args:
        x: Tensor (N, F, T).
        batch, start, length: int64 Tensor (S,). Sequence, first frame and number of frames of each segment; ordered by
            (batch, start) and disjoint. Segments of length 0, whose mean is 0, come last, with batch N-1 and start T:
            they fill a table up to a fixed size. Values are not checked: that would wait for the device.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        Tensor (S, F).

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_shapes("segment_mean", x=(x, "N F T"), batch=(batch, "S"), start=(start, "S"), length=(length, "S"))
    return SEGMENT_MEAN(x, batch, start, length, backend=backend)


def pairwise_distance(f: Tensor, *, backend: str | None = None) -> Tensor:
    """Euclidean distances between all rows of ``f`` (S, D) as an (S, S) tensor; the gradient at 0 is 0.

    The distances of half-precision rows are float32. ``backend``: see :mod:`trgnet.kernels.backend`. Raises ValueError
    unless ``f`` has two axes.
    """
    check_shapes("pairwise_distance", f=(f, "S D"))
    return PAIRWISE_DISTANCE(f, backend=backend)
