"""Scores against the published values and against the same conventions written frame by frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from trgnet.data import IGNORE
from trgnet.metrics import OVERLAPS, SegmentationScores
from trgnet.refine import sigmoid

GOLDEN = Path(__file__).parent / "golden"
SEGMENT_KEYS = ["accuracy", "edit", *(f"f1@{k}" for k in OVERLAPS)]
BOUNDARY_KEYS = ["boundary_accuracy", "boundary_precision", "boundary_recall", "boundary_f1"]


def naive_ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def naive_f1(hits: int, predicted: int, true: int) -> float:
    precision, recall = naive_ratio(hits, predicted), naive_ratio(hits, true)
    return 100 * 2 * precision * recall / (precision + recall + 1e-7)


def naive_segments(labels: list[int], background: int | None) -> list[tuple[int, int, int]]:
    """(label, start, end) of every run that is not background."""
    segments, start = [], 0
    for t in range(1, len(labels) + 1):
        if t == len(labels) or labels[t] != labels[start]:
            if labels[start] != background:
                segments.append((labels[start], start, t - 1 if t == len(labels) else t))
            start = t
    return segments


def naive_edit_distance(a: list[int], b: list[int]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(row[-1] + 1, above[j] + 1, above[j - 1] + (x != y)))
    return row[-1]


def naive_overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    if a[0] != b[0]:
        return 0.0
    intersection = min(a[2], b[2]) - max(a[1], b[1])
    return intersection / (max(a[2], b[2]) - min(a[1], b[1])) if intersection > 0 else 0.0


def naive_hits(predicted: list, true: list, threshold: float) -> int:
    taken: set[int] = set()
    for segment in predicted:
        overlaps = [naive_overlap(segment, other) for other in true]
        if overlaps and max(overlaps) >= threshold:
            taken.add(overlaps.index(max(overlaps)))
    return len(taken)


def naive_peaks(values: list[float]) -> list[int]:
    return [0] + [
        t for t in range(1, len(values) - 1) if values[t] >= 0.5 and values[t - 1] < values[t] > values[t + 1]
    ]


def naive_boundary_hits(predicted: list[int], true: list[int], tolerance: int) -> int:
    taken: set[int] = set()
    for t in predicted:
        distances = [abs(t - other) for other in true]
        nearest = distances.index(min(distances))
        if distances[nearest] <= tolerance:
            taken.add(nearest)
    return len(taken)


def naive_scores(recordings: list, background: int | None, tolerance: int) -> dict[str, float]:
    right = frames = edit = counted = 0
    segment_counts = {k: [0, 0, 0] for k in OVERLAPS}
    boundary_counts, boundary_frames = [0, 0, 0], 0
    for prediction, truth, probability in recordings:
        real = [t for t in range(len(truth)) if truth[t] != IGNORE]
        if not real:
            continue
        prediction, truth = [int(prediction[t]) for t in real], [int(truth[t]) for t in real]
        right += sum(p == t for p, t in zip(prediction, truth, strict=True))
        frames += len(truth)
        predicted, true = naive_segments(prediction, background), naive_segments(truth, background)
        longer = max(len(predicted), len(true))
        if longer:
            edit += 1 - naive_edit_distance([s[0] for s in predicted], [s[0] for s in true]) / longer
        counted += 1
        for k, counts in segment_counts.items():
            counts[0] += naive_hits(predicted, true, k / 100)
            counts[1] += len(predicted)
            counts[2] += len(true)
        if probability is not None:
            starts = [float(t == 0 or truth[t] != truth[t - 1]) for t in range(len(truth))]
            predicted_cuts, true_cuts = (
                naive_peaks([float(probability[t]) for t in real]),
                naive_peaks(starts),
            )
            boundary_counts[0] += naive_boundary_hits(predicted_cuts, true_cuts, tolerance)
            boundary_counts[1] += len(predicted_cuts)
            boundary_counts[2] += len(true_cuts)
            boundary_frames += len(truth)
    scores = {"accuracy": 100 * naive_ratio(right, frames), "edit": 100 * naive_ratio(edit, counted)}
    scores |= {f"f1@{k}": naive_f1(*counts) for k, counts in segment_counts.items()}
    if boundary_frames:
        hits, predicted_count, true_count = boundary_counts
        wrong = predicted_count + true_count - 2 * hits
        scores["boundary_accuracy"] = 100 * (boundary_frames - wrong) / boundary_frames
        scores["boundary_precision"] = 100 * hits / predicted_count
        scores["boundary_recall"] = 100 * hits / true_count
        scores["boundary_f1"] = naive_f1(*boundary_counts)
    return scores


def random_labels(rng: np.random.Generator, frames: int, classes: int, longest: int) -> np.ndarray:
    lengths = rng.integers(1, longest + 1, frames)
    return np.repeat(rng.integers(0, classes, frames), lengths)[:frames]


def disturbed(rng: np.random.Generator, labels: np.ndarray, classes: int, share: float) -> np.ndarray:
    """The labels a few frames late, with a share of their frames drawn anew."""
    shifted = np.roll(labels, rng.integers(-3, 4))
    return np.where(rng.random(len(labels)) < share, rng.integers(0, classes, len(labels)), shifted)


@pytest.mark.parametrize("name", ["metrics", "metrics_background"])
@pytest.mark.parametrize("kind", ["frame", "refined"])
def test_published_values(name: str, kind: str) -> None:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
        sequences = [key.removeprefix("labels") for key in golden.files if key.startswith("labels")]
        classes = [f"class {k}" for k in range(golden["logits0"].shape[0])]
        scores = SegmentationScores(classes, background=0 if golden["background"] else None)
        for i in sequences:
            prediction = golden[f"logits{i}"].argmax(0) if kind == "frame" else golden[f"refined{i}"]
            scores.update(prediction, golden[f"labels{i}"], sigmoid(golden[f"boundary_logits{i}"]))
        got = scores.compute()
        assert list(got) == SEGMENT_KEYS + BOUNDARY_KEYS
        np.testing.assert_allclose(
            [got[k] for k in SEGMENT_KEYS], golden[f"{kind}_scores"], rtol=0, atol=1e-10
        )
        np.testing.assert_allclose(
            [got[k] for k in BOUNDARY_KEYS], golden["boundary_scores"], rtol=0, atol=1e-10
        )
        np.testing.assert_array_equal(scores.confusion, golden[f"{kind}_confusion"])


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_frame_by_frame_conventions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 7))
    background = int(rng.integers(classes)) if seed % 2 else None
    tolerance = int(rng.integers(0, 7))
    recordings = []
    for _ in range(6):
        frames, longest = int(rng.integers(1, 150)), int(rng.integers(1, 30))
        truth = random_labels(rng, frames, classes, longest)
        prediction = disturbed(rng, truth, classes, share=rng.choice([0.0, 0.05, 0.5]))
        probability = rng.integers(0, 8, frames) / 7 if rng.random() < 0.8 else None
        if seed % 3 == 0:
            truth = np.where(rng.random(frames) < 0.2, IGNORE, truth)
        recordings.append((prediction, truth, probability))

    scores = SegmentationScores([str(k) for k in range(classes)], background, tolerance)
    for recording in recordings:
        scores.update(*recording)
    expected = naive_scores(recordings, background, tolerance)
    got = scores.compute()
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, abs=1e-10), key


@pytest.mark.parametrize("frames", [6_000, 100_000])
def test_memory_grows_with_the_frames_and_not_with_pairs_of_segments(frames: int) -> None:
    # Every frame a segment: a table of all pairs would take 10^10 numbers at 100,000 frames.
    truth = np.arange(frames) % 2
    scores = SegmentationScores(["a", "b"])
    scores.update(truth, truth, np.full(frames, 0.5))
    got = scores.compute()
    assert got["accuracy"] == got["edit"] == 100
    # The last segment is a single frame, which is empty by the field's convention and cannot be hit.
    assert got["f1@90"] == pytest.approx(naive_f1(frames - 1, frames, frames), abs=1e-10)


def test_order_of_recordings_does_not_matter_and_counts_add_up() -> None:
    rng = np.random.default_rng(7)
    recordings = [(rng.integers(0, 3, n), random_labels(rng, n, 3, 9)) for n in (50, 71, 120)]
    forward, backward = SegmentationScores("abc"), SegmentationScores("abc")
    for recording in recordings:
        forward.update(*recording)
    for recording in reversed(recordings):
        backward.update(*recording)
    assert forward.compute() == pytest.approx(backward.compute(), abs=1e-12)
    assert forward.confusion.sum() == 241
    assert forward.confusion.dtype == np.int64


def test_confusion_has_truth_in_rows() -> None:
    scores = SegmentationScores("abc")
    scores.update(np.array([1, 1, 2]), np.array([0, 0, 2]))
    np.testing.assert_array_equal(scores.confusion, [[0, 2, 0], [0, 0, 0], [0, 0, 1]])


def test_padding_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    truth, prediction, probability = random_labels(rng, 90, 4, 12), rng.integers(0, 4, 90), rng.random(90)
    plain, padded = SegmentationScores("abcd"), SegmentationScores("abcd")
    plain.update(prediction, truth, probability)
    padded.update(
        np.pad(prediction, (0, 30), constant_values=77),
        np.pad(truth, (0, 30), constant_values=IGNORE),
        np.pad(probability, (0, 30), constant_values=9.0),
    )
    assert plain.compute() == padded.compute()


def test_of_equal_overlaps_the_earliest_is_picked() -> None:
    truth = np.repeat([0, 1, 0, 1], [10, 2, 42, 6])
    # The first segment overlaps both true ones of its class by a third; the third one needs the later of them.
    prediction = np.repeat([0, 1, 0, 1], [30, 1, 23, 6])
    scores = SegmentationScores("ab")
    scores.update(prediction, truth)
    assert scores.compute()["f1@25"] == pytest.approx(75, abs=1e-5)


def test_perfect_prediction() -> None:
    truth = np.repeat([0, 2, 1], 20)
    boundaries = np.zeros(60)
    boundaries[[0, 20, 40]] = 1
    scores = SegmentationScores("abc")
    scores.update(truth, truth, boundaries)
    assert scores.compute() == pytest.approx(dict.fromkeys(SEGMENT_KEYS + BOUNDARY_KEYS, 100), abs=1e-5)


class TestDegenerateCases:
    def test_nothing_added(self) -> None:
        assert SegmentationScores("ab").compute() == dict.fromkeys(SEGMENT_KEYS, 0.0)

    @pytest.mark.parametrize("frames", [0, 5])
    def test_recording_without_a_frame_that_counts(self, frames: int) -> None:
        scores = SegmentationScores("ab")
        truth = np.full(frames, IGNORE)
        scores.update(truth, truth, np.ones(frames))
        assert scores.compute() == dict.fromkeys(SEGMENT_KEYS, 0.0)
        right = np.repeat([0, 1], 10)
        scores.update(right, right)
        assert scores.compute()["edit"] == 100

    @pytest.mark.parametrize(
        ("prediction", "truth", "accuracy"),
        [([0, 0, 0, 0], [0, 1, 1, 0], 50), ([0, 1, 1, 0], [0, 0, 0, 0], 50), ([0, 0], [0, 0], 100)],
        ids=["nothing predicted", "nothing true", "neither"],
    )
    def test_background_only(self, prediction: list[int], truth: list[int], accuracy: float) -> None:
        scores = SegmentationScores("ab", background=0)
        scores.update(np.array(prediction), np.array(truth))
        assert scores.compute() == dict.fromkeys(SEGMENT_KEYS, 0.0) | {"accuracy": accuracy}

    def test_last_segment_of_one_frame_is_never_hit(self) -> None:
        labels = np.array([0, 0, 0, 1])
        scores = SegmentationScores("ab")
        scores.update(labels, labels)
        assert scores.compute()["f1@10"] == pytest.approx(50, abs=1e-5)

    def test_one_frame(self) -> None:
        scores = SegmentationScores("ab")
        scores.update(np.array([1]), np.array([1]), np.array([0.2]))
        got = scores.compute()
        assert (got["accuracy"], got["edit"], got["f1@10"], got["boundary_accuracy"]) == (100, 100, 0, 100)


class TestBadInput:
    @pytest.mark.parametrize("bad", [np.zeros(3), np.zeros(3, bool), np.array(["a"] * 3)])
    def test_labels_that_are_not_integers(self, bad: np.ndarray) -> None:
        scores = SegmentationScores("ab")
        with pytest.raises(TypeError, match=f"prediction of dtype {bad.dtype}"):
            scores.update(bad, np.zeros(3, int))
        with pytest.raises(TypeError, match="truth of dtype"):
            scores.update(np.zeros(3, int), bad)

    @pytest.mark.parametrize(
        ("prediction", "truth", "probability", "message"),
        [
            ([0, 1], [0, 1, 1], None, r"prediction of shape \(2,\), expected \(3,\)"),
            ([[0, 1]], [0, 1], None, "one by one"),
            ([0, 2], [0, 1], None, "prediction with labels from 0 to 2, expected 0 to 1"),
            ([0, IGNORE], [0, 1], None, "prediction with labels from 0 to 255"),
            ([0, 1], [-1, 1], None, "truth with labels from -1 to 1"),
            ([0, 1], [0, 1], [0.5], r"boundary_probability of shape \(1,\)"),
            ([0, 1], [0, 1], [0.5, 3.0], "sigmoid"),
            ([0, 1], [0, 1], [0.5, np.nan], "expected probabilities"),
        ],
    )
    def test_arrays_that_do_not_fit(self, prediction, truth, probability, message: str) -> None:
        scores = SegmentationScores("ab")
        with pytest.raises(ValueError, match=message):
            scores.update(
                np.array(prediction), np.array(truth), None if probability is None else np.array(probability)
            )
        assert scores.compute() == dict.fromkeys(SEGMENT_KEYS, 0.0)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([],), "got 0 classes"),
            ((["a"] * 256,), "got 256 classes"),
            ((["a", "b"], 2), "background class 2"),
            ((["a", "b"], None, -1), "-1 frames"),
        ],
    )
    def test_settings(self, arguments: tuple, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SegmentationScores(*arguments)
