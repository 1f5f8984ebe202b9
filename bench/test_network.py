"""The whole network: forward pass, forward and backward, training step, and inference of a whole recording."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from trgnet.data import Recording
from trgnet.predictor import Predictor
from trgnet.runs import RunInfo
from trgnet.skeleton import SKELETONS

from .agreement import Results, assert_agreement
from .measure import Measure
from .operators import BENCH_SIZE
from .report import BASELINE
from .step import SKELETON_OF, Network

TRAINED = BENCH_SIZE
INFERRED = replace(TRAINED, n=1, t=6000)
TASKS = {
    "forward": Network.forward,
    "forward and backward": Network.forward_backward,
    "training step": Network.step,
}


@lru_cache(maxsize=1)
def agreed_network(provider: str, precision: str) -> Network:
    """The provider's network, once losses and all gradients were found to be the reference's."""
    timed = Network(provider, TRAINED, precision)

    def evaluate(who: str, what: str, dropout: bool) -> Results:
        if (who, what, dropout) == (provider, precision, True):
            return timed.training_results()
        return Network(who, TRAINED, what, dropout=dropout).training_results()

    assert_agreement(evaluate, provider, precision)
    return timed


@lru_cache(maxsize=1)
def baseline_network(precision: str) -> Network:
    return Network(BASELINE, TRAINED, precision)


@pytest.mark.parametrize("task", TASKS)
def test_training(measure: Measure, precision: str, provider: str, task: str):
    network = agreed_network(provider, precision)
    measure(
        lambda: TASKS[task](network),
        section="network",
        what=task,
        provider=provider,
        shape=network.shape,
        precision=precision,
        beside=None if provider == BASELINE else lambda: TASKS[task](baseline_network(precision)),
    )


def test_inference(measure: Measure, precision: str, provider: str):
    timed = Network(provider, INFERRED, precision, training=False)

    def evaluate(who: str, what: str, dropout: bool) -> Results:
        if (who, what) == (provider, precision):
            return timed.inferred_results()
        return Network(who, INFERRED, what, training=False).inferred_results()

    assert_agreement(evaluate, provider, precision)
    measure(
        timed.infer,
        section="network",
        what="inference of a recording",
        provider=provider,
        shape=timed.shape,
        precision=precision,
        beside=None if provider == BASELINE else Network(BASELINE, INFERRED, precision, training=False).infer,
    )


def test_prediction(measure: Measure):
    """From features to the refined timeline; nothing to compare with."""
    size = INFERRED
    network = Network("ours", size, training=False)
    predictor = Predictor(network.model, run_info(size.c, size.v, size.k), network.joint_graph)
    features = 0.1 * np.random.default_rng(2).standard_normal((size.c, size.v, size.t), np.float32)
    recording = Recording("r", features)
    measure(
        lambda: predictor.predict(recording),
        section="network",
        what="prediction of a timeline",
        provider="ours",
        shape=network.shape,
    )


def run_info(channels: int, joints: int, classes: int) -> RunInfo:
    """What a predictor must know of a training that never was."""
    return RunInfo(
        dataset="random",
        classes=tuple(f"class {i}" for i in range(classes)),
        background=None,
        skeleton=SKELETONS[SKELETON_OF[joints]],
        fps=30.0,
        channels=channels,
        embedding_dim=BENCH_SIZE.d,
        recordings={},
        pos_weight=1.0,
        class_weights=None,
        versions={},
        commit=None,
        created="",
    )
