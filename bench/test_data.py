"""From raw arrays to batches: preparation beside the published formulation, augmentation, collation."""

from __future__ import annotations

import numpy as np
import pytest

from trgnet.config import AugmentConfig
from trgnet.data import Recording, augment, collate
from trgnet.data.shared_layout import SHARED_DATASETS

from . import published_data
from .measure import Measure
from .operators import BENCH_SIZE
from .step import random_labels

LARA = SHARED_DATASETS["LARA"].preparation
RAW_FRAMES = 24_000  # two minutes at 200 Hz
PREPARE = {
    "published": published_data.features,
    "published, whole arrays": published_data.features_by_arrays,
    "ours": LARA.features,
}


@pytest.mark.parametrize("by", PREPARE)
def test_preparation(measure: Measure, by: str):
    shape = {"c": LARA.channels, "t": RAW_FRAMES, "v": LARA.joints, "m": LARA.persons}
    raw = np.random.default_rng(0).standard_normal(tuple(shape.values()), np.float32)
    raw[:, :100] = raw[:, -50:] = 0
    np.testing.assert_array_equal(PREPARE[by](raw), PREPARE["published"](raw))
    measure(
        lambda: PREPARE[by](raw),
        section="data",
        what="preparation of a LARa recording",
        provider=by,
        shape=shape,
        on_device=False,
    )


@pytest.mark.parametrize("what", ["augmentation", "collation"])
def test_batch(measure: Measure, what: str):
    """What is done for every batch of training; nothing to compare with."""
    size = BENCH_SIZE
    rng = np.random.default_rng(0)
    recordings = [
        Recording(
            f"r{i}",
            rng.standard_normal((size.c, size.v, size.t), np.float32),
            random_labels(rng, size.t, size.k),
        )
        for i in range(size.n)
    ]
    probabilities = AugmentConfig().model_dump()

    def augmented() -> list[Recording]:
        draws = np.random.default_rng(1)
        return [augment(recording, draws, axis=1, **probabilities) for recording in recordings]

    measure(
        augmented if what == "augmentation" else lambda: collate(recordings),
        section="data",
        what=f"{what} of a batch",
        provider="ours",
        shape={"n": size.n, "c": size.c, "v": size.v, "t": size.t},
        on_device=False,
    )
