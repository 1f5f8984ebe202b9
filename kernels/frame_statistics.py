"""Statistics over real frames from those of parts, for kernels that see a tensor tile by tile.

A part is what one program saw of one channel: the number of its real values, their mean, and the sum of their squared
deviations from it. Parts lie in a tensor (3, F, P) of float32 and combine without cancellation:

    mean = sum_i count_i mean_i / count,    count var = sum_i deviation_i + count_i (mean_i - mean)^2

Parts of a sequence's own statistics lie in a tensor (N, P, 2 F + 1): means, deviations, count.

Source: T. F. Chan, G. H. Golub, R. J. LeVeque, Algorithms for computing the sample variance, 1983.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import device_function, kernel, launch, launchable, tl


@device_function
def store_moments(parts_ptr, i_p, count, mean, squares, channels, m_channels, F, P):
    """Store part ``i_p`` of channels: their number of real values, mean, and sum of squared deviations, each [C]."""
    place = parts_ptr + channels.to(tl.int64) * P + i_p
    plane = F.to(tl.int64) * P
    tl.store(place, tl.zeros_like(mean) + count, mask=m_channels)
    tl.store(place + plane, mean, mask=m_channels)
    tl.store(place + 2 * plane, squares, mask=m_channels)


@device_function
def store_rows_part(parts_ptr, i_p, values, real, channels, m_channels, F, P, count):
    """Store part ``i_p`` of channels from values (C, X), of which the ``count`` columns ``real`` [X] count."""
    values = tl.where(real[None, :], values, 0.0)
    mean = tl.sum(values, 1) / tl.maximum(count, 1.0)  # [C]
    deviation = tl.where(real[None, :], values - mean[:, None], 0.0)
    store_moments(parts_ptr, i_p, count, mean, tl.sum(deviation * deviation, 1), channels, m_channels, F, P)


@device_function
def with_tile(count, mean, squares, values, real):
    """Statistics [X] of what came before and of a tile (X, Y) with its real columns [Y]."""
    added = tl.sum(real.to(tl.float32))
    values = tl.where(real[None, :], values, 0.0)
    mean_added = tl.sum(values, 1) / tl.maximum(added, 1.0)
    deviation = tl.where(real[None, :], values - mean_added[:, None], 0.0)
    share = added / tl.maximum(count + added, 1.0)
    distance = mean_added - mean
    squares += tl.sum(deviation * deviation, 1) + distance * distance * count * share
    return count + added, mean + distance * share, squares


@device_function
def store_sequence_part(parts_ptr, count, mean, squares, o_f, F):
    """Store one part of a sequence's statistics."""
    tl.store(parts_ptr + o_f, mean, mask=o_f < F)
    tl.store(parts_ptr + F + o_f, squares, mask=o_f < F)
    tl.store(parts_ptr + 2 * F, count)


@device_function
def of_sequence(parts_ptr, o_f, F, P):
    """Number of real frames (at least 1), mean and biased variance [X] of a sequence from its P parts."""
    # 16 parts at a time: one after the other, each would wait for the one before to be loaded.
    o_p = tl.arange(0, 16)
    row = 2 * F + 1
    count, total = tl.zeros([16], tl.float32), tl.zeros_like(o_f).to(tl.float32)
    for i in range(0, P, 16):
        m_p = i + o_p < P
        place = parts_ptr + (i + o_p) * row
        added = tl.load(place + 2 * F, mask=m_p, other=0.0)
        mean = tl.load(place[:, None] + o_f[None, :], mask=m_p[:, None] & (o_f < F)[None, :], other=0.0)
        count += added
        total += tl.sum(added[:, None] * mean, 0)
    n = tl.maximum(tl.sum(count), 1.0)
    total = total / n
    squares = tl.zeros_like(total)
    for i in range(0, P, 16):
        m_p = i + o_p < P
        place = parts_ptr + (i + o_p) * row
        inside = m_p[:, None] & (o_f < F)[None, :]
        added = tl.load(place + 2 * F, mask=m_p, other=0.0)
        distance = tl.load(place[:, None] + o_f[None, :], mask=inside, other=0.0) - total[None, :]
        own = tl.load(place[:, None] + F + o_f[None, :], mask=inside, other=0.0)
        squares += tl.sum(own + added[:, None] * distance * distance, 0)
    return n, total, squares / n


@kernel
def _combine_parts_kernel(parts_ptr, mean_ptr, var_ptr, F, P, BP: tl.constexpr):
    i_f = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP)
    row = parts_ptr + i_f * P
    plane = F.to(tl.int64) * P
    count, total = tl.zeros([BP], tl.float32), tl.zeros([BP], tl.float32)
    for i in range(0, P, BP):
        m_p = i + o_p < P
        b_count = tl.load(row + i + o_p, mask=m_p, other=0.0)
        count += b_count
        total += b_count * tl.load(row + plane + i + o_p, mask=m_p, other=0.0)
    n = tl.maximum(tl.sum(count), 1.0)
    mean = tl.sum(total) / n
    squares = tl.zeros([BP], tl.float32)
    for i in range(0, P, BP):
        m_p = i + o_p < P
        b_count = tl.load(row + i + o_p, mask=m_p, other=0.0)
        distance = tl.load(row + plane + i + o_p, mask=m_p, other=0.0) - mean
        squares += tl.load(row + 2 * plane + i + o_p, mask=m_p, other=0.0) + b_count * distance * distance
    tl.store(mean_ptr + i_f, mean)
    tl.store(var_ptr + i_f, tl.sum(squares) / n)


def combined(parts: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Mean and biased variance (F,), (F,) of the parts (3, F, P), if there are any."""
    if parts is None:
        return None, None
    _, features, count = parts.shape
    mean, var = parts.new_empty(features), parts.new_empty(features)
    if launchable(parts):
        launch(_combine_parts_kernel, (features,), parts, mean, var, features, count, BP=512)
    return mean, var


def new_parts(x: Tensor, features: int, count: int) -> Tensor:
    """Room for ``count`` parts of each channel."""
    return x.new_empty(3, features, count, dtype=torch.float32)
