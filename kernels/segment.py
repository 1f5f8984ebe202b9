"""Reductions over segments of a batch of sequences, and distances between them.

    mean[s,f]      = 1/length[s] * sum_(t = start[s] .. start[s]+length[s]-1) x[batch[s], f, t]
    distance[i,j]  = ||f_i - f_j||_2                      without an (S, S, D) tensor

Shapes: x (N, F, T); batch, start, length (S,) int64, ordered by (batch, start), disjoint -> mean (S, F).
f (S, D) -> distance (S, S). A segment mean commutes with a 1x1 convolution, so a wide head is applied to S
rows instead of N*T frames.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .operator import Operator, check_shapes
from .precision import widened


def _segment_mean_reference(x: Tensor, batch: Tensor, start: Tensor, length: Tensor) -> Tensor:
    frames = x.shape[0] * x.shape[2]
    first = batch * x.shape[2] + start
    end = first + length
    # Segments and the gaps before, between and behind them take turns, so that no frame is left out.
    edges = torch.stack([first, end], dim=1).flatten()
    lengths = edges.diff(prepend=edges.new_zeros(1), append=edges.new_full((1,), frames))
    rows = rearrange(widened(x), "n f t -> (n t) f")
    sums = torch.segment_reduce(rows, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)[1::2]
    return (sums / length.clamp(min=1).unsqueeze(1)).to(x.dtype)


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
    return SEGMENT_MEAN(x, batch, start, length, backend=backend)


def pairwise_distance(f: Tensor, *, backend: str | None = None) -> Tensor:
    """Euclidean distances between all rows of ``f`` (S, D) as an (S, S) tensor; the gradient at 0 is 0.

    ``backend``: see :mod:`trgnet.kernels.backend`. Raises ValueError unless ``f`` has two axes.
    """
    check_shapes("pairwise_distance", f=(f, "S D"))
    return PAIRWISE_DISTANCE(f, backend=backend)
