"""The published formulation of LARa's preparation: the baseline of :mod:`trgnet.data.preparation`.

Written from the description of the features, in plain loops: the range of frames that are not all zero is
searched from both ends, displacements are taken frame by frame and coordinates relative to a joint joint by
joint, all of it at 200 Hz, before every fourth frame is kept. How much of that are loops in the published
code is not known, so :func:`features_by_arrays` computes the same without any: it too prepares every frame
before it keeps a fourth of them.

Symbols: C channels, T frames, V joints, M persons.
"""

from __future__ import annotations

import numpy as np

REFERENCE_JOINT = 0
STRIDE = 4


def features(raw: np.ndarray) -> np.ndarray:
    """Raw (C, T, V, M = 1) at 200 Hz -> features (2C, V, T/4) at 50 Hz, float32: displacements first."""
    return _kept(displacements(raw), relative_coordinates(raw))


def features_by_arrays(raw: np.ndarray) -> np.ndarray:
    """As :func:`features`, without loops over frames and joints."""
    shown = (raw != 0).any(axis=(0, 2, 3))
    moved = np.zeros_like(raw)
    if shown.any():
        start, end = shown.argmax(), len(shown) - shown[::-1].argmax()
        moved[:, start : end - 1] = raw[:, start + 1 : end] - raw[:, start : end - 1]
    return _kept(moved, raw - raw[:, :, REFERENCE_JOINT : REFERENCE_JOINT + 1])


def labels_and_boundaries(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (T,) at 200 Hz -> labels and boundaries (T/4,) at 50 Hz; a boundary is a segment's first frame.

    The boundaries are those of the kept labels.
    """
    kept = labels[::STRIDE]
    boundaries = np.zeros(len(kept), np.float32)
    boundaries[0] = 1
    for t in range(1, len(kept)):
        if kept[t] != kept[t - 1]:
            boundaries[t] = 1
    return kept, boundaries


def displacements(raw: np.ndarray) -> np.ndarray:
    """x_(t+1) - x_t from the first to the last frame that is not all zero; 0 on the last one and outside."""
    moved = np.zeros_like(raw)
    start, end = valid_range(raw)
    for t in range(start, end - 1):
        moved[:, t] = raw[:, t + 1] - raw[:, t]
    return moved


def valid_range(raw: np.ndarray) -> tuple[int, int]:
    """First frame that is not all zero and the one after the last such; (T, T) where all are."""
    start, end = 0, raw.shape[1]
    while start < end and not raw[:, start].any():
        start += 1
    while end > start and not raw[:, end - 1].any():
        end -= 1
    return start, end


def relative_coordinates(raw: np.ndarray) -> np.ndarray:
    relative = np.zeros_like(raw)
    for v in range(raw.shape[2]):
        relative[:, :, v] = raw[:, :, v] - raw[:, :, REFERENCE_JOINT]
    return relative


def _kept(moved: np.ndarray, relative: np.ndarray) -> np.ndarray:
    """Both (C, T, V, 1) -> (2C, V, T/4)."""
    joined = np.concatenate([moved, relative], axis=0)
    joined = joined.transpose(3, 0, 2, 1)  # (M, C, V, T)
    joined = joined.reshape(-1, *joined.shape[2:])
    return np.ascontiguousarray(joined[:, :, ::STRIDE], dtype=np.float32)
