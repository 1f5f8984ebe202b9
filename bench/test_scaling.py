"""Time and memory of the training step and of inference against the size, one axis at a time.

A series ends where its next size, by the time and memory of the one before, would take longer than SECONDS_PER_CALL or
more than SHARE_OF_MEMORY of the free memory. The row is skipped then and says so.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from . import device
from .agreement import Results, assert_agreement
from .measure import Measure
from .operators import Size
from .step import Network

BASE = Size(t=1000)
AXES: dict[str, tuple[Size, tuple[int, ...]]] = {
    "t": (replace(BASE, n=1), (500, 1000, 2000, 4000, 8000, 16_000, 32_000, 100_000)),
    "n": (BASE, (1, 2, 4, 8, 16, 32)),
    "v": (BASE, (11, 19, 25)),
    "k": (BASE, (8, 52, 130)),
}
"""Axis: the size that is varied along it, and the values there."""
SCALED = ("published", "reference", "ours") if device.ON_GPU else ("published", "ours")
TASKS = {"training step": Network.step, "inference": Network.infer}
SECONDS_PER_CALL = 4.0
SHARE_OF_MEMORY = 0.6

_last: dict[tuple[str, str, str], tuple[int, float, int]] = {}
"""Of every series, the size that was measured last: value, seconds, bytes."""


@pytest.mark.parametrize("by", SCALED)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "axis, value", [(axis, value) for axis, (_, values) in AXES.items() for value in values]
)
def test_scaling(measure: Measure, task: str, by: str, axis: str, value: int):
    size = replace(AXES[axis][0], **{axis: value})
    series = task, by, axis
    _check_affordable(series, value)
    assert_same_function(size, by, training=task == "training step")
    network = Network(by, size, training=task == "training step")
    measure(
        lambda: TASKS[task](network),
        section="scaling",
        what=f"{task} against {axis.upper()}",
        provider=by,
        shape=network.shape,
    )
    benchmark = measure.benchmark
    benchmark.extra_info["axis"] = axis
    if benchmark.enabled:
        peak = benchmark.extra_info["peak_memory_bytes"]
        _last[series] = value, benchmark.stats["median"], peak


def _check_affordable(series: tuple[str, str, str], value: int) -> None:
    if series not in _last:
        return
    smaller, seconds, peak = _last[series]
    seconds, peak = seconds * value / smaller, peak * value / smaller
    free = device.free_memory()
    if seconds > SECONDS_PER_CALL or peak > SHARE_OF_MEMORY * free:
        pytest.skip(f"would take about {seconds:.0f} s a call and {peak / 1e9:.1f} GB of {free / 1e9:.1f}")


def assert_same_function(size: Size, provider: str, training: bool) -> None:
    """The provider computes the reference's function at the widths of `size`, one short sequence."""
    short = replace(size, n=1, t=200)

    def evaluate(who: str, precision: str, dropout: bool) -> Results:
        network = Network(who, short, precision, dropout=dropout, training=training)
        return network.training_results() if training else network.inferred_results()

    assert_agreement(evaluate, provider, "float32")
