"""Per-frame labels and the segments in them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from trgnet.kernels import IGNORE


def run_starts(values: np.ndarray) -> np.ndarray:
    """Index of the first element of every run of equal values; there must be at least one value."""
    return np.concatenate([[0], np.flatnonzero(values[1:] != values[:-1]) + 1])


def segments_of(labels: np.ndarray) -> list[tuple[int, int, int]]:
    """The maximal runs of one label, without the runs of `IGNORE`.

    Args:
        labels: integers (T,), real frames only.

    Returns:
        (start, length, label) of each segment, in order.

    Raises:
        ValueError: `labels` is not a vector of integers.
    """
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers (T,), got {labels.dtype} {labels.shape}")
    if len(labels) == 0:
        return []
    cuts = [*run_starts(labels).tolist(), len(labels)]
    runs = [(start, end - start, int(labels[start])) for start, end in pairwise(cuts)]
    return [run for run in runs if run[2] != IGNORE]


def boundaries_of(labels: np.ndarray) -> np.ndarray:
    """1 at the first frame of each segment (see `segments_of`), 0 elsewhere: float32 (T,)."""
    boundaries = np.zeros(len(labels), dtype=np.float32)
    boundaries[[start for start, _, _ in segments_of(labels)]] = 1
    return boundaries
