"""The scores of one recording, beside the loops in which such scores are written."""

from __future__ import annotations

import numpy as np
import pytest

from trgnet.metrics import SegmentationScores

from . import published_metrics
from .measure import Measure
from .step import random_labels

FRAMES, CLASSES = 6000, 52
NAMES = [f"class {k}" for k in range(CLASSES)]
FLICKERS = {"few segments": 0, "many segments": 180}
"""How often the prediction leaves the right label for three frames."""


def recording(flickers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction, truth and boundary probability: a prediction that is five frames late."""
    rng = np.random.default_rng(0)
    truth = random_labels(rng, FRAMES, CLASSES)
    prediction = np.roll(truth, 5)
    for frame in rng.choice(FRAMES - 3, flickers):
        prediction[frame : frame + 3] = rng.integers(CLASSES)
    distance = np.abs(np.arange(FRAMES)[:, None] - np.flatnonzero(np.diff(truth))).min(axis=1)
    return prediction, truth, np.maximum(0.1, 0.9 - 0.2 * distance)


def ours(prediction: np.ndarray, truth: np.ndarray, boundary: np.ndarray) -> dict[str, float]:
    scores = SegmentationScores(NAMES)
    scores.update(prediction, truth, boundary)
    return scores.compute()


def published(*arrays: np.ndarray) -> dict[str, float]:
    return published_metrics.scores(*([array] for array in arrays), NAMES, None)


SCORES = {"published": published, "ours": ours}


@pytest.mark.parametrize("by", SCORES)
@pytest.mark.parametrize("what", FLICKERS)
def test_scores(measure: Measure, what: str, by: str):
    arrays = recording(FLICKERS[what])
    assert published(*arrays) == pytest.approx(ours(*arrays), rel=0, abs=1e-10)
    measure(
        lambda: SCORES[by](*arrays),
        section="metrics",
        what=f"scores of a recording, {what}",
        provider=by,
        shape={"t": FRAMES, "k": CLASSES, "segments": 1 + int(np.count_nonzero(np.diff(arrays[0])))},
        precision="int64",
        on_device=False,
    )
