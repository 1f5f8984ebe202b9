"""The published formulations that the scores and the preparation are timed against give the same results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench import published, published_data, published_metrics, step
from bench.operators import Size
from trgnet.data import IGNORE
from trgnet.data.labels import boundaries_of
from trgnet.data.shared_layout import SHARED_DATASETS
from trgnet.metrics import OVERLAPS, SegmentationScores
from trgnet.refine import sigmoid

GOLDEN = Path(__file__).parent / "golden"
LARA = SHARED_DATASETS["LARA"].preparation
Recordings = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


def recording(rng: np.random.Generator, frames: int, classes: int, longest: int) -> tuple[np.ndarray, ...]:
    """Prediction, truth and boundary probability; the prediction is the truth with faults."""
    truth = np.repeat(rng.integers(0, classes, frames), rng.integers(1, longest + 1, frames))[:frames]
    share = rng.choice([0.0, 0.02, 0.3])
    late = np.roll(truth, rng.integers(-4, 5))
    prediction = np.where(rng.random(frames) < share, rng.integers(0, classes, frames), late)
    # Few different values make plateaus and values at the threshold.
    return prediction, truth, rng.integers(0, 9, frames) / 8


def assert_same_scores(recordings: Recordings, classes: int, background: int | None) -> dict[str, float]:
    names = [f"class {k}" for k in range(classes)]
    ours = SegmentationScores(names, background)
    for each in recordings:
        ours.update(*each)
    expected = ours.compute()
    got = published_metrics.scores(*zip(*recordings, strict=True), names, background)
    assert list(got) == list(expected)
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=0, abs=1e-10), key
    return got


@pytest.mark.parametrize("seed", range(30))
def test_scores_of_random_recordings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(1, 8))
    background = int(rng.integers(classes)) if seed % 2 else None
    recordings = [
        recording(rng, int(rng.integers(1, 300)), classes, int(rng.integers(1, 40))) for _ in range(4)
    ]
    if seed % 3 == 0:
        recordings = [(p, np.where(rng.random(len(t)) < 0.2, IGNORE, t), b) for p, t, b in recordings]
    assert_same_scores(recordings, classes, background)


@pytest.mark.parametrize(
    ("prediction", "truth", "background"),
    [
        ([1, 1, 1, 1], [1, 1, 1, 1], None),  # one segment each
        ([1], [1], None),  # its only segment is empty
        ([0, 0, 0], [1, 1, 1], 0),  # no predicted segment
        ([1, 1, 1], [0, 0, 0], 0),  # no true segment
        ([0, 0], [0, 0], 0),  # neither
        ([0, 0, 1], [0, 0, 1], None),  # a last segment of one frame
        ([0, 1, 2], [IGNORE, IGNORE, IGNORE], None),  # nothing counts
        ([0, 0, 1, 1, 0, 0], [0, 0, IGNORE, IGNORE, 0, 0], None),  # what remains is joined
        ([0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0], None),  # two claims on one segment
    ],
)
def test_scores_of_single_segments(prediction: list, truth: list, background: int | None) -> None:
    boundary = np.linspace(0, 1, len(truth))
    assert_same_scores([(np.array(prediction), np.array(truth), boundary)], 3, background)


@pytest.mark.parametrize("name", ["metrics", "metrics_background"])
def test_scores_of_the_published_code(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
        sequences = range(sum(key.startswith("labels") for key in golden.files))
        recordings = [
            (golden[f"refined{i}"], golden[f"labels{i}"], sigmoid(golden[f"boundary_logits{i}"]))
            for i in sequences
        ]
        background = 0 if golden["background"] else None
        got = assert_same_scores(recordings, golden["logits0"].shape[0], background)
        keys = ["accuracy", "edit", *(f"f1@{k}" for k in OVERLAPS)]
        np.testing.assert_allclose([got[key] for key in keys], golden["refined_scores"], rtol=0, atol=1e-10)


def test_scores_count_what_is_wrong() -> None:
    truth = np.repeat([0, 1, 2, 0], 25)
    prediction = np.repeat([0, 2, 1, 0], [25, 20, 30, 25])
    boundary = np.zeros(100)
    boundary[[20, 56, 75]] = 0.9
    got = assert_same_scores([(prediction, truth, boundary)], 3, None)
    assert got["accuracy"] == pytest.approx(55)
    assert got["edit"] == 50
    # Of four segments each, the first and the last match; the third shares 5 of 50 frames with its class.
    assert got["f1@50"] == pytest.approx(50, abs=1e-4)
    # Of 0, 20, 56 and 75 those at 0, 20 and 75 are within 5 frames of 0, 25, 50 and 75.
    assert got["boundary_recall"] == got["boundary_precision"] == 75
    assert got["boundary_accuracy"] == 98


@pytest.mark.parametrize("function", [published_data.features, published_data.features_by_arrays])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("frames", "lead", "trail"),
    [(1, 0, 0), (2, 0, 0), (101, 0, 0), (100, 0, 0), (103, 9, 14), (64, 3, 0), (33, 0, 32), (10, 5, 5)],
)
def test_features(function, dtype: str, frames: int, lead: int, trail: int) -> None:
    rng = np.random.default_rng(frames)
    raw = rng.normal(0, 100, (6, frames, 19, 1)).astype(dtype)
    raw[:, :lead] = raw[:, frames - trail :] = 0
    raw[:, frames // 2] = 0  # zero frames between the others count
    before = raw.copy()
    got, expected = function(raw), LARA.features(raw)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    assert got.shape == (12, 19, -(-frames // 4))
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(raw, before)


def test_features_are_displacements_and_relative_coordinates() -> None:
    raw = np.zeros((6, 9, 19, 1))
    raw[:, 2:8] = np.arange(2, 8)[:, None, None] ** 2 * np.arange(1, 20)[:, None]
    got = published_data.features(raw)
    np.testing.assert_array_equal(got[0, 2], [0, (25 - 16) * 3, 0])
    np.testing.assert_array_equal(got[6, 2], [0, 16 * 3 - 16, 0])


@pytest.mark.parametrize("frames", [1, 4, 61, 400])
def test_labels_and_boundaries(frames: int) -> None:
    rng = np.random.default_rng(frames)
    labels = np.repeat(rng.integers(0, 8, frames), rng.integers(1, 30, frames))[:frames]
    kept, boundaries = published_data.labels_and_boundaries(labels)
    np.testing.assert_array_equal(kept, labels[:: LARA.stride])
    np.testing.assert_array_equal(boundaries, boundaries_of(kept))
    assert boundaries.dtype == np.float32


def test_a_training_step_keeps_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for a GPU. Only the labels of segments are found on the host."""
    size = Size(n=2, t=300, k=4, d=16)
    labels = step._batch(size).labels
    assert len(published._segments(labels).T) > 4
    monkeypatch.setattr(step, "DEVICE", torch.device("meta"))
    network = step.Network("published", size)
    read = published._segments
    monkeypatch.setattr(published, "_segments", lambda on_device: read(labels))
    terms = network.backward()
    network.optimizer.step()
    assert {term.device.type for term in terms.values()} == {"meta"}
    assert all(p.grad.device.type == "meta" for p in network.network.parameters())
