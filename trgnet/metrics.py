"""Scores of temporal action segmentation: frame accuracy, edit score, segmental F1 and boundary F1.

The conventions are those of the field's common evaluation code, so that numbers compare with the literature:

- Frames labelled IGNORE are taken out of truth, prediction and boundaries, and what remains is joined, before
  anything is counted.
- Frame accuracy counts every other frame, background included.
- A segment is a maximal run of one label. Runs of the background class are no segments.
- Segments end at the next one's first frame; the last one ends at the index of the last frame, so it is taken
  to be one frame shorter than it is. A last segment of a single frame is empty and overlaps nothing.
- Edit score: 1 - Levenshtein distance / length of the longer one, of the two sequences of segment labels; the
  mean over recordings.
- F1@k: in temporal order every predicted segment picks the true segment of its class with the largest
  intersection over union (the earliest of equals). It is a hit if that is at least k % and nobody has hit
  that segment before, and a false alarm otherwise. Hits and misses are summed over recordings.
- Boundaries are the peaks (:func:`trgnet.refine.peaks`, threshold 0.5) of the boundary probability. The true
  boundaries go through the same rule: frame 0 is one, a segment that starts on the last frame has none, and
  of segments that start on consecutive frames none has one, but for frame 0. In temporal order every
  predicted boundary picks the nearest true one (the earlier of equals) and is a hit if that is within the
  tolerance and not taken. Counts are summed over recordings.
- Boundary accuracy is the share of frames that are neither false alarms nor misses.
- F1 = 2 P R / (P + R + 1e-7), with precision P and recall R as fractions.

Whatever has nothing to be divided by is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein

from .data import IGNORE
from .data.labels import run_starts
from .refine import peaks

__all__ = ["OVERLAPS", "SegmentationScores"]

OVERLAPS = (10, 25, 50, 75, 90)
"""Smallest intersection over union of a hit, in percent: the k of F1@k."""

_BOUNDARY_THRESHOLD = 0.5
_F1_EPSILON = 1e-7


class SegmentationScores:
    """Accumulates the scores of any number of recordings.

    Args:
        classes: names of the K classes, by index; at most 255 (255 marks ignored frames).
        background: index of the class that is left out of edit score and F1, if there is one.
        tolerance: how many frames a predicted boundary may be off.

    Attributes:
        confusion: frames by class, int64 (K, K); row = truth, column = prediction.

    Example:
        >>> scores = SegmentationScores(["walk", "run"])
        >>> scores.update(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]))
        >>> scores.compute()["accuracy"]
        75.0
    """

    def __init__(self, classes: Sequence[str], background: int | None = None, tolerance: int = 5) -> None:
        if not 1 <= len(classes) <= IGNORE:
            raise ValueError(
                f"got {len(classes)} classes, expected 1 to {IGNORE} ({IGNORE} marks ignored frames)"
            )
        if background is not None and not 0 <= background < len(classes):
            raise ValueError(f"got background class {background}, expected None or 0 to {len(classes) - 1}")
        if tolerance < 0:
            raise ValueError(f"got a tolerance of {tolerance} frames, expected 0 or more")
        self.classes = tuple(classes)
        self.background = background
        self.tolerance = tolerance
        self.confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        self._recordings = 0
        self._edit = 0.0
        self._segments = _Counts(np.zeros(len(OVERLAPS), dtype=np.int64), 0, 0)
        self._boundaries = _Counts(0, 0, 0)
        self._boundary_frames = 0

    def update(
        self, prediction: np.ndarray, truth: np.ndarray, boundary_probability: np.ndarray | None = None
    ) -> None:
        """Add one recording. A recording without any frame that counts changes nothing.

        Args:
            prediction: class of every frame, integers, shape (T,). Values at ignored frames do not matter.
            truth: class of every frame, integers, shape (T,); frames of IGNORE are left out.
            boundary_probability: shape (T,), after the sigmoid. The boundary scores are those of the
                recordings that came with it.

        Raises:
            TypeError: labels that are not integers.
            ValueError: shapes that differ or are not (T,), labels outside the classes, or boundary values
                outside [0, 1]. Nothing has been counted then.
        """
        prediction, truth = _labels("prediction", prediction), _labels("truth", truth)
        _check_shape("prediction", prediction, truth)
        if boundary_probability is not None:
            boundary_probability = np.asarray(boundary_probability)
            _check_shape("boundary_probability", boundary_probability, truth)

        real = truth != IGNORE
        if not real.all():
            prediction, truth = prediction[real], truth[real]
            boundary_probability = None if boundary_probability is None else boundary_probability[real]
        if truth.size == 0:
            return
        _check_range("prediction", prediction, len(self.classes))
        _check_range("truth", truth, len(self.classes))
        if boundary_probability is not None:
            _check_probability(boundary_probability)

        self._add_frames(prediction, truth)
        self._add_segments(_runs(prediction), _runs(truth))
        if boundary_probability is not None:
            self._add_boundaries(boundary_probability, truth)

    def compute(self) -> dict[str, float]:
        """Scores of all recordings so far, in percent.

        Returns:
            "accuracy", "edit", "f1@10", "f1@25", "f1@50", "f1@75", "f1@90" and, if any recording came with
            boundaries, "boundary_accuracy", "boundary_precision", "boundary_recall" and "boundary_f1".
        """
        scores = {
            "accuracy": 100 * _ratio(np.trace(self.confusion), self.confusion.sum()),
            "edit": 100 * _ratio(self._edit, self._recordings),
        }
        for overlap, hits in zip(OVERLAPS, self._segments.hits, strict=True):
            scores[f"f1@{overlap}"] = 100 * _Counts(hits, *self._segments[1:]).f1()
        if self._boundary_frames:
            hits, predicted, true = self._boundaries
            wrong = (predicted - hits) + (true - hits)
            scores["boundary_accuracy"] = 100 * _ratio(self._boundary_frames - wrong, self._boundary_frames)
            scores["boundary_precision"] = 100 * self._boundaries.precision()
            scores["boundary_recall"] = 100 * self._boundaries.recall()
            scores["boundary_f1"] = 100 * self._boundaries.f1()
        return scores

    def _add_frames(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        classes = len(self.classes)
        cells = np.bincount(truth * classes + prediction, minlength=classes**2)
        self.confusion += cells.reshape(classes, classes)

    def _add_segments(self, predicted: _Runs, true: _Runs) -> None:
        predicted_labels = predicted.label[predicted.label != self.background].tolist()
        true_labels = true.label[true.label != self.background].tolist()
        longer = max(len(predicted_labels), len(true_labels))
        if longer:
            self._edit += 1 - Levenshtein.distance(predicted_labels, true_labels) / longer
        overlap = _claimed_overlaps(predicted, true, self.background)
        hits = np.array([np.count_nonzero(overlap >= k / 100) for k in OVERLAPS])
        self._segments += _Counts(hits, len(predicted_labels), len(true_labels))
        self._recordings += 1

    def _add_boundaries(self, probability: np.ndarray, truth: np.ndarray) -> None:
        predicted = peaks(probability, _BOUNDARY_THRESHOLD)
        true = peaks(np.concatenate([[True], truth[1:] != truth[:-1]]), _BOUNDARY_THRESHOLD)
        hits = _boundary_hits(predicted, true, self.tolerance)
        self._boundaries += _Counts(hits, len(predicted), len(true))
        self._boundary_frames += len(truth)


class _Counts(NamedTuple):
    """Hits among predicted and true items; hits may be an array while counting (one element per overlap)."""

    hits: int | np.ndarray
    predicted: int
    true: int

    def __add__(self, other: _Counts) -> _Counts:
        return _Counts(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))

    def precision(self) -> float:
        return _ratio(self.hits, self.predicted)

    def recall(self) -> float:
        return _ratio(self.hits, self.true)

    def f1(self) -> float:
        precision, recall = self.precision(), self.recall()
        return 2 * precision * recall / (precision + recall + _F1_EPSILON)


class _Runs(NamedTuple):
    """Maximal runs of one label: frames start to end, exclusive (the last end: see the module's text)."""

    label: np.ndarray
    start: np.ndarray
    end: np.ndarray


def _runs(labels: np.ndarray) -> _Runs:
    start = run_starts(labels)
    end = np.concatenate([start[1:], [len(labels) - 1]])
    return _Runs(labels[start], start, end)


def _claimed_overlaps(predicted: _Runs, true: _Runs, background: int | None) -> np.ndarray:
    """Best intersection over union with which each picked true segment is claimed: one number per segment.

    A true segment is hit at some threshold exactly if the best of the predicted segments that pick it reaches
    that threshold, so these numbers give the hits at every threshold. Only segments that share frames are
    compared: between two neighbouring cuts of either sequence lies the intersection of one predicted and one
    true run, which makes fewer pairs than there are runs.
    """
    cuts = np.union1d(predicted.start, true.start)
    p = np.searchsorted(predicted.start, cuts, side="right") - 1
    t = np.searchsorted(true.start, cuts, side="right") - 1
    same = predicted.label[p] == true.label[t]
    if background is not None:
        same &= true.label[t] != background
    cuts, p, t = cuts[same], p[same], t[same]
    if cuts.size == 0:
        return np.zeros(0)

    intersection = np.minimum(predicted.end[p], true.end[t]) - cuts
    union = np.maximum(predicted.end[p], true.end[t]) - np.minimum(predicted.start[p], true.start[t])
    overlap = intersection / np.maximum(union, 1)  # two empty last segments: 0 / 0 counts as 0

    # p and t increase along the pairs; the sort is stable, so the earliest of equal overlaps comes first.
    choice = np.lexsort((-overlap, p))[run_starts(p)]
    return np.maximum.reduceat(overlap[choice], run_starts(t[choice]))


def _boundary_hits(predicted: np.ndarray, true: np.ndarray, tolerance: int) -> int:
    """Number of true boundaries that are the nearest one, within the tolerance, of a predicted boundary."""
    after = np.searchsorted(true, predicted).clip(max=len(true) - 1)
    before = (after - 1).clip(min=0)
    distance_before, distance_after = np.abs(predicted - true[before]), np.abs(true[after] - predicted)
    nearest = np.where(distance_before <= distance_after, before, after)
    near_enough = np.minimum(distance_before, distance_after) <= tolerance
    hit = np.zeros(len(true), dtype=bool)
    hit[nearest[near_enough]] = True
    return int(np.count_nonzero(hit))


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


def _labels(name: str, labels: np.ndarray) -> np.ndarray:
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"got {name} of dtype {labels.dtype}, expected integer class indices, one per frame")
    if labels.ndim != 1:
        raise ValueError(f"got {name} of shape {labels.shape}, expected (T,): add recordings one by one")
    return labels.astype(np.int64, copy=False)


def _check_shape(name: str, values: np.ndarray, truth: np.ndarray) -> None:
    if values.shape != truth.shape:
        raise ValueError(f"got {name} of shape {values.shape}, expected {truth.shape}, that of truth")


def _check_range(name: str, labels: np.ndarray, classes: int) -> None:
    low, high = labels.min(), labels.max()
    if low < 0 or high >= classes:
        raise ValueError(f"got {name} with labels from {low} to {high}, expected 0 to {classes - 1}")


def _check_probability(probability: np.ndarray) -> None:
    low, high = probability.min(), probability.max()
    if not (low >= 0 and high <= 1):  # also catches NaN
        raise ValueError(
            f"got boundary_probability with values from {low} to {high}, expected probabilities in [0, 1]; "
            "logits go through trgnet.refine.sigmoid first"
        )
