"""The published formulation of the scores: the baseline of :mod:`trgnet.metrics`.

Written from the conventions, in the plain loops that are common in evaluation code: labels are mapped to
class names frame by frame; frames are compared and segments found one frame after another; the edit score
fills the whole table of the Levenshtein distance, element by element; every predicted segment is compared
with all true ones, and all of it, the search for segments included, once for each overlap. How the published
code finds boundaries is not known; here it is frame by frame. What would be divided by zero is 0. The
confusion matrix is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trgnet.data import IGNORE

OVERLAPS = (10, 25, 50, 75, 90)
TOLERANCE = 5
THRESHOLD = 0.5
EPSILON = 1e-7

Segments = tuple[list[str], list[int], list[int]]
"""Class names, first frames, ends; the last end is the index of the last frame."""


def scores(
    predictions: Sequence[np.ndarray],
    truths: Sequence[np.ndarray],
    boundary_probabilities: Sequence[np.ndarray],
    classes: Sequence[str],
    background: int | None,
) -> dict[str, float]:
    """Scores of all recordings in percent: the keys and values of `SegmentationScores.compute`.

    Args:
        predictions, truths: class of every frame, integers (T,), one array per recording; frames whose truth
            is 255 are left out.
        boundary_probabilities: (T,), one array per recording.
        classes: names of the K classes.
        background: class that is left out of edit score and F1, or None.
    """
    names = dict(enumerate(classes))
    background_name = None if background is None else names[background]
    correct, total, edit, recordings = 0, 0, 0.0, 0
    segment_counts = {k: np.zeros(3) for k in OVERLAPS}
    boundary_counts = np.zeros(3)

    for prediction, truth, probability in zip(predictions, truths, boundary_probabilities, strict=True):
        real = truth != IGNORE
        prediction, truth, probability = prediction[real], truth[real], probability[real]
        if len(truth) == 0:
            continue
        for t in range(len(truth)):
            total += 1
            if prediction[t] == truth[t]:
                correct += 1
        edit += edit_score(prediction, truth, names, background_name)
        recordings += 1
        for k in OVERLAPS:
            segment_counts[k] += segment_hits(prediction, truth, k / 100, names, background_name)
        boundary_counts += boundary_hits(probability, truth)

    result = {"accuracy": 100 * ratio(correct, total), "edit": 100 * ratio(edit, recordings)}
    for k in OVERLAPS:
        result[f"f1@{k}"] = 100 * f1(*segment_counts[k])
    if total > 0:
        hits, false_alarms, misses = boundary_counts
        result["boundary_accuracy"] = 100 * ratio(total - false_alarms - misses, total)
        result["boundary_precision"] = 100 * ratio(hits, hits + false_alarms)
        result["boundary_recall"] = 100 * ratio(hits, hits + misses)
        result["boundary_f1"] = 100 * f1(hits, false_alarms, misses)
    return result


def segments(frames: np.ndarray, names: dict[int, str], background: str | None) -> Segments:
    labels, starts, ends = [], [], []
    frame_names = [names[frames[t]] for t in range(len(frames))]
    last = frame_names[0]
    if last != background:
        labels.append(last)
        starts.append(0)
    for t in range(len(frame_names)):
        if frame_names[t] != last:
            if frame_names[t] != background:
                labels.append(frame_names[t])
                starts.append(t)
            if last != background:
                ends.append(t)
            last = frame_names[t]
    if last != background:
        ends.append(len(frame_names) - 1)
    return labels, starts, ends


def edit_score(
    prediction: np.ndarray, truth: np.ndarray, names: dict[int, str], background: str | None
) -> float:
    predicted = segments(prediction, names, background)[0]
    true = segments(truth, names, background)[0]
    longer = max(len(predicted), len(true))
    return 1 - levenshtein(predicted, true) / longer if longer else 0.0


def levenshtein(a: list[str], b: list[str]) -> float:
    table = np.zeros((len(a) + 1, len(b) + 1))
    for i in range(len(a) + 1):
        table[i, 0] = i
    for j in range(len(b) + 1):
        table[0, j] = j
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            if a[i - 1] == b[j - 1]:
                table[i, j] = table[i - 1, j - 1]
            else:
                table[i, j] = min(table[i - 1, j], table[i, j - 1], table[i - 1, j - 1]) + 1
    return table[-1, -1]


def segment_hits(
    prediction: np.ndarray, truth: np.ndarray, overlap: float, names: dict[int, str], background: str | None
) -> tuple[int, int, int]:
    """Hits, false alarms and misses at one overlap."""
    labels, starts, ends = segments(prediction, names, background)
    true_labels, true_starts, true_ends = segments(truth, names, background)
    true_starts, true_ends = np.array(true_starts), np.array(true_ends)
    taken = np.zeros(len(true_labels))
    hits = false_alarms = 0
    for i in range(len(labels)):
        if len(true_labels) == 0:
            false_alarms += 1
            continue
        intersection = np.minimum(ends[i], true_ends) - np.maximum(starts[i], true_starts)
        union = np.maximum(ends[i], true_ends) - np.minimum(starts[i], true_starts)
        same = np.array([labels[i] == true_labels[j] for j in range(len(true_labels))])
        iou = intersection / np.maximum(union, 1) * same
        best = iou.argmax()
        if iou[best] >= overlap and not taken[best]:
            hits += 1
            taken[best] = 1
        else:
            false_alarms += 1
    return hits, false_alarms, len(true_labels) - int(taken.sum())


def boundary_hits(probability: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    """Hits, false alarms and misses within the tolerance."""
    starts = np.zeros(len(truth))
    starts[0] = 1
    for t in range(1, len(truth)):
        if truth[t] != truth[t - 1]:
            starts[t] = 1
    predicted, true = peaks(probability), peaks(starts)
    taken = np.zeros(len(true))
    hits = false_alarms = 0
    for t in predicted:
        distances = [abs(t - other) for other in true]
        nearest = int(np.argmin(distances))
        if distances[nearest] <= TOLERANCE and not taken[nearest]:
            hits += 1
            taken[nearest] = 1
        else:
            false_alarms += 1
    return hits, false_alarms, len(true) - int(taken.sum())


def peaks(values: np.ndarray) -> list[int]:
    """Frame 0 and all frames of at least the threshold that are larger than both neighbours."""
    found = [0]
    for t in range(1, len(values) - 1):
        if values[t] >= THRESHOLD and values[t] > values[t - 1] and values[t] > values[t + 1]:
            found.append(t)
    return found


def f1(hits: float, false_alarms: float, misses: float) -> float:
    precision, recall = ratio(hits, hits + false_alarms), ratio(hits, hits + misses)
    return 2 * precision * recall / (precision + recall + EPSILON)


def ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
