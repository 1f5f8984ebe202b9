"""Boundary refinement: the boundary branch says where the pieces are, the class branch what they hold.

The rule is that of the boundary-aware segmentation literature, by which TRG-Net (arXiv 2503.15126) is scored:

1. A frame is a boundary when its boundary probability is at least the threshold and strictly larger than both
   neighbours'. The first frame is always a boundary and any other last frame never is. A plateau of equal
   values has no peak.
2. The boundaries cut the sequence into pieces. Every frame of a piece takes the class that most of its frames
   have by their own argmax; among classes with equally many frames, the one whose logits sum up highest over
   the piece, and among those with equal sums the first.
"""

from __future__ import annotations

import numpy as np

__all__ = ["peaks", "refine", "sigmoid"]


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Logistic function in float64, without overflow for any finite or infinite input; the shape is kept."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, dtype=np.float64)))


def peaks(probability: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Frames at which a new segment starts.

    Args:
        probability: boundary probability, shape (T,) with T >= 1, values in [0, 1]. Not modified.
        threshold: smallest probability that may be a boundary.

    Returns:
        Increasing frame indices, int64. Frame 0 always comes first; see the module's text for the rule.

    Raises:
        ValueError: the array is empty or not one-dimensional.
    """
    probability = np.asarray(probability)
    if probability.ndim != 1 or probability.size == 0:
        raise ValueError(
            f"got boundary probabilities of shape {probability.shape}, expected (T,) with T >= 1"
        )
    inner = probability[1:-1]
    is_peak = (inner >= threshold) & (inner > probability[:-2]) & (inner > probability[2:])
    return np.concatenate([[0], np.flatnonzero(is_peak) + 1])


def refine(class_logits: np.ndarray, boundary_logits: np.ndarray, *, threshold: float = 0.5) -> np.ndarray:
    """Give every piece between two predicted boundaries one class.

    Args:
        class_logits: shape (K, T), T >= 1: one sequence, its real frames only. Not modified.
        boundary_logits: shape (T,), before the sigmoid. Not modified.
        threshold: smallest boundary probability that may cut, in [0, 1].

    Returns:
        Class of every frame, int64, shape (T,).

    Raises:
        ValueError: shapes that do not fit together, no frame, logits that are not finite, or a threshold
                outside [0, 1].
    """
    class_logits, boundary_logits = np.asarray(class_logits), np.asarray(boundary_logits)
    _check(class_logits, boundary_logits, threshold)
    classes, frames = class_logits.shape
    starts = peaks(sigmoid(boundary_logits), threshold)
    lengths = np.diff(starts, append=frames)
    piece = np.repeat(np.arange(len(starts)), lengths)
    votes = np.bincount(piece * classes + class_logits.argmax(axis=0), minlength=len(starts) * classes)
    votes = votes.reshape(len(starts), classes)
    sums = np.add.reduceat(class_logits, starts, axis=1, dtype=np.float64).T
    in_front = votes == votes.max(axis=1, keepdims=True)
    winner = np.where(in_front, sums, -np.inf).argmax(axis=1)
    return np.repeat(winner, lengths)


def _check(class_logits: np.ndarray, boundary_logits: np.ndarray, threshold: float) -> None:
    if class_logits.ndim != 2 or class_logits.size == 0:
        raise ValueError(
            f"got class logits of shape {class_logits.shape}, expected (K, T) with K, T >= 1; "
            "refine the sequences of a batch one by one"
        )
    if boundary_logits.shape != class_logits.shape[1:]:
        raise ValueError(
            f"got boundary logits of shape {boundary_logits.shape}, "
            f"expected {class_logits.shape[1:]} to match class logits of shape {class_logits.shape}"
        )
    for name, logits in (("class", class_logits), ("boundary", boundary_logits)):
        if not np.isfinite(logits).all():
            raise ValueError(f"the {name} logits hold NaN or infinite values, expected finite numbers")
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"got threshold {threshold}, expected a probability in [0, 1]")
