"""Boundary refinement against the published values and against the same rule written frame by frame."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from trgnet.refine import peaks, refine, sigmoid

GOLDEN = Path(__file__).parent / "golden"


def naive_peaks(probability: np.ndarray, threshold: float) -> list[int]:
    found = [0]
    for t in range(1, len(probability) - 1):
        here = probability[t]
        if here >= threshold and here > probability[t - 1] and here > probability[t + 1]:
            found.append(t)
    return found


def naive_refine(class_logits: np.ndarray, boundary_logits: np.ndarray, threshold: float) -> list[int]:
    n_classes, frames = class_logits.shape
    probability = [1 / (1 + math.exp(-float(b))) for b in boundary_logits]
    cuts = [*naive_peaks(probability, threshold), frames]
    result = []
    for start, end in pairwise(cuts):
        votes = [0] * n_classes
        for t in range(start, end):
            votes[max(range(n_classes), key=lambda k: class_logits[k, t])] += 1
        sums = [math.fsum(class_logits[k, start:end]) for k in range(n_classes)]
        winner = max(range(n_classes), key=lambda k: (votes[k], sums[k]))
        result += [winner] * (end - start)
    return result


@pytest.mark.parametrize("name", ["metrics", "metrics_background"])
def test_published_values(name: str) -> None:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as golden:
        sequences = [key.removeprefix("labels") for key in golden.files if key.startswith("labels")]
        assert len(sequences) >= 2
        for i in sequences:
            refined = refine(golden[f"logits{i}"], golden[f"boundary_logits{i}"], threshold=0.5)
            np.testing.assert_array_equal(refined, golden[f"refined{i}"])


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 17, 63, 200])
@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_the_frame_by_frame_rule(frames: int, classes: int, dtype: type) -> None:
    rng = np.random.default_rng(frames * 10 + classes)
    for _ in range(20):
        # Few distinct values, whose sums are exact: plateaus in the boundaries, ties of votes and of sums.
        class_logits = (rng.integers(-3, 3, (classes, frames)) / 2).astype(dtype)
        boundary_logits = rng.integers(-3, 4, frames).astype(dtype)
        for threshold in (0.0, 0.3, 0.5, 0.9, 1.0):
            refined = refine(class_logits, boundary_logits, threshold=threshold)
            assert refined.dtype == np.int64
            expected = naive_refine(class_logits, boundary_logits, threshold)
            np.testing.assert_array_equal(refined, expected)


@pytest.mark.parametrize("frames", [6_000, 100_000])
def test_long_sequences(frames: int) -> None:
    rng = np.random.default_rng(frames)
    truth = np.repeat(rng.integers(0, 5, frames // 50), 50)
    class_logits = rng.standard_normal((5, frames)) + 2 * (truth == np.arange(5)[:, None])
    boundary_logits = rng.standard_normal(frames)
    boundary_logits[::50] += 8
    np.testing.assert_array_equal(
        refine(class_logits, boundary_logits), naive_refine(class_logits, boundary_logits, 0.5)
    )


@pytest.mark.parametrize(
    ("probability", "expected"),
    [
        ([0.9], [0]),
        ([0.1, 0.9], [0]),
        ([0.1, 0.9, 0.1], [0, 1]),
        ([0.9, 0.8, 0.1], [0]),
        ([0.1, 0.9, 0.9, 0.1], [0]),
        ([0.1, 0.4, 0.1, 0.1], [0]),
        ([0.1, 0.5, 0.1, 0.9], [0, 1]),
    ],
    ids=["one frame", "last frame", "peak", "falling", "plateau", "all below", "at the threshold"],
)
def test_peaks(probability: list[float], expected: list[int]) -> None:
    assert peaks(np.array(probability), 0.5).tolist() == expected


def test_without_boundaries_the_whole_sequence_is_one_piece() -> None:
    class_logits = np.array([[2.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(refine(class_logits, np.full(3, -9.0)), [1, 1, 1])


def test_a_tie_goes_to_the_larger_sum_even_if_all_sums_are_negative() -> None:
    class_logits = np.array([[-1.0, -9.0], [-2.0, -1.0], [-9.0, -9.0]])
    np.testing.assert_array_equal(refine(class_logits, np.zeros(2)), [1, 1])


def test_inputs_are_left_alone() -> None:
    rng = np.random.default_rng(0)
    class_logits, boundary_logits = rng.standard_normal((3, 40)), rng.standard_normal(40)
    class_logits.setflags(write=False)
    boundary_logits.setflags(write=False)
    refine(class_logits, boundary_logits)
    peaks(sigmoid(boundary_logits), 0.7)


def test_sigmoid_is_exact_and_never_overflows() -> None:
    with np.errstate(all="raise", under="ignore"):
        values = sigmoid(np.array([-1e4, -700.0, -2.0, 0.0, 2.0, 1e4]))
    expected = [0.0, math.exp(-700), 1 / (1 + math.exp(2)), 0.5, 1 / (1 + math.exp(-2)), 1.0]
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert sigmoid(np.float32([20, 21])).tolist() == sorted(set(sigmoid(np.float32([20, 21])).tolist()))


@pytest.mark.parametrize(
    ("class_shape", "boundary_shape", "message"),
    [
        ((2, 3, 8), (8,), "one by one"),
        ((3, 0), (0,), "K, T >= 1"),
        ((3, 8), (7,), r"boundary logits of shape \(7,\)"),
        ((3, 8), (1, 8), r"boundary logits of shape \(1, 8\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(class_shape: tuple, boundary_shape: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refine(np.zeros(class_shape), np.zeros(boundary_shape))


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="class logits hold NaN"):
        refine(np.array([[0.0, np.nan]]), np.zeros(2))
    with pytest.raises(ValueError, match="boundary logits hold NaN"):
        refine(np.zeros((1, 2)), np.array([0.0, np.inf]))
    with pytest.raises(ValueError, match="threshold 50"):
        refine(np.zeros((1, 2)), np.zeros(2), threshold=50)
    with pytest.raises(ValueError, match="T >= 1"):
        peaks(np.zeros(0), 0.5)
