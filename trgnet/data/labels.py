"""Per-frame labels and the segments in them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from trgnet.kernels import IGNORE

from ..errors import UserError


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


TOLERATED_FRAMES, TOLERATED_SHARE = 2, 0.01
"""Frames and labels of a recording may differ in number by that much, whichever is more."""


def cut_to_shorter(frames: int, labels: int, where: str) -> int:
    """The number of frames that features and labels of a recording have in common.

    Args:
        frames: number of frames.
        labels: number of labels.
        where: the recording, and the files that the numbers are of, for the message.

    Returns:
        The smaller number. Whoever cuts something off warns about it.

    Raises:
        UserError: the numbers differ by more than 2 and by more than 1 % of the larger.
    """
    if abs(frames - labels) > max(TOLERATED_FRAMES, TOLERATED_SHARE * max(frames, labels)):
        raise UserError(
            f"{where}: got {frames} frames, but {labels} labels; expected one label per frame (up to "
            f"{TOLERATED_FRAMES} frames or {TOLERATED_SHARE:.0%} more or less are cut off)"
        )
    return min(frames, labels)
