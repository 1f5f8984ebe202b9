"""Reductions over segments of a batch of sequences, and distances between them.

    mean[s,f]      = 1/length[s] * sum_(t = start[s] .. start[s]+length[s]-1) x[batch[s], f, t]
    distance[i,j]  = ||f_i - f_j||_2                      without an (S, S, D) tensor

Shapes: x (N, F, T); batch, start, length (S,) int64, ordered by (batch, start), disjoint -> mean (S, F).
f (S, D) -> distance (S, S). A segment mean commutes with a 1x1 convolution, so a wide head is applied to S
rows instead of N*T frames.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .operator import Operator, check_shapes


def _segment_mean_reference(x: Tensor, batch: Tensor, start: Tensor, length: Tensor) -> Tensor:
    n, features, t = x.shape
    first = batch * t + start
    frame = torch.arange(n * t, device=x.device)
    # The segment that starts last at or before a frame owns it, unless it ended; row S takes the rest.
    owner = torch.searchsorted(first, frame, right=True) - 1
    ended = (owner < 0) | (frame >= (first + length)[owner.clamp(min=0)])
    owner = torch.where(ended, len(first), owner)
    rows = x.transpose(1, 2).reshape(n * t, features)
    total = rows.new_zeros(len(first) + 1, features).index_add(0, owner, rows)[:-1]
    return total / length.to(x.dtype).unsqueeze(1)


def _pairwise_distance_reference(f: Tensor) -> Tensor:
    # Direct differences: the expansion |a|^2 - 2ab + |b|^2 cancels for near neighbours.
    return torch.cdist(f, f, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_flops(x: Tensor, *_: object) -> tuple[int, int]:
    return x.numel(), x.numel()


def _distance_flops(f: Tensor) -> tuple[int, int]:
    s, d = f.shape
    return 3 * s * s * d, 4 * s * s * d


SEGMENT_MEAN = Operator(_segment_mean_reference, _mean_flops)
PAIRWISE_DISTANCE = Operator(_pairwise_distance_reference, _distance_flops)


def segment_mean(
    x: Tensor, batch: Tensor, start: Tensor, length: Tensor, *, backend: str | None = None
) -> Tensor:
    """Mean of the frames of every segment.

    Args:
        x: Tensor (N, F, T).
        batch, start, length: int64 Tensor (S,). Sequence, first frame and number of frames (>= 1) of each
            segment; ordered by (batch, start) and disjoint. Values are not checked: that would wait for the
            device.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        Tensor (S, F).

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_shapes("segment_mean", x=(x, "N F T"), batch=(batch, "S"), start=(start, "S"), length=(length, "S"))
    if len(start) == 0:
        return x.new_zeros(0, x.shape[1])
    return SEGMENT_MEAN(x, batch, start, length, backend=backend)


def pairwise_distance(f: Tensor, *, backend: str | None = None) -> Tensor:
    """Euclidean distances between all rows of ``f`` (S, D) as an (S, S) tensor; the gradient at 0 is 0.

    ``backend``: see :mod:`trgnet.kernels.backend`. Raises ValueError unless ``f`` has two axes.
    """
    check_shapes("pairwise_distance", f=(f, "S D"))
    return PAIRWISE_DISTANCE(f, backend=backend)
