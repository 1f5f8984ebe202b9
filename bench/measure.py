"""One row of a benchmark: a function of one provider, timed and described.

pytest-benchmark times, stores and compares. What it does not know is added here to a row's ``extra_info``: where it was
measured, sizes, precision, the 20th and 80th percentile of the times, the rates that the median makes of the least bytes
and FLOPs, their shares of what the device was measured to do at most, the memory needed at most beside the inputs, and
in networks and operators the time relative to the baseline's, which runs before every round: a machine may be slower for
minutes, and rows of different minutes would say so of their functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from trgnet.kernels import Cost

from . import device

SECONDS_PER_ROW = 0.4 if device.ON_GPU else 1.0
FEWEST_ROUNDS, FEWEST_PAIRS = 4, 8
MOST_ROUNDS, MOST_WARM_ROUNDS = 20, 1000  # with empty and with full caches


class Deadline:
    """When no further row is begun, so that a run ends in time."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds, self.started = seconds, time.monotonic()

    def check(self) -> None:
        """Skip the test where time is up."""
        if self.seconds is not None and time.monotonic() - self.started > self.seconds:
            pytest.skip(f"not begun: the limit of {self.seconds:.0f} seconds was reached")


class Measure:
    """Times a function and describes the row; the fixture ``measure``."""

    def __init__(self, benchmark: BenchmarkFixture, deadline: Deadline) -> None:
        self.benchmark = benchmark
        deadline.check()

    def __call__(
        self,
        function: Callable[[], object],
        *,
        section: str,
        what: str,
        provider: str,
        shape: Mapping[str, int],
        precision: str = "float32",
        cost: Cost | None = None,
        on_device: bool = True,
        beside: Callable[[], object] | None = None,
    ) -> None:
        """Time `function`, which has been checked.

        Args:
            function: what is timed, with inputs that exist already.
            section, what, provider: where the row stands: its table, its group of rows, its name among them.
            shape: sizes by their symbol.
            precision: one of PRECISIONS, or the dtype of what has no matrix products.
            cost: the least work, the same for every provider.
            on_device: whether it computes with tensors: then caches are emptied before every round, and the peak of the
                memory is measured, in a call of its own.
            beside: the baseline's function, where this is another provider's and caches are emptied.
        """
        synchronised = _synchronised(function)
        benchmark = self.benchmark
        benchmark.group = f"{section}: {what}"
        info = device.facts() | device.run_facts() | {
            "section": section, "what": what, "provider": provider, "shape": dict(shape), "dtype": precision,
        }  # fmt: skip
        if benchmark.disabled:
            benchmark(synchronised)
            return
        peak = device.peak_memory(synchronised) if on_device else None  # warms up as well
        info["peak_memory_bytes"] = peak
        rounds = max(_rounds_in_time(synchronised), FEWEST_PAIRS if beside else FEWEST_ROUNDS)
        rounds = min(rounds, MOST_ROUNDS if on_device else MOST_WARM_ROUNDS)
        evict = device.evict_caches if on_device else lambda: None
        baseline = _Timed(beside) if beside else None

        def setup() -> None:
            evict()
            if baseline:
                baseline()
                evict()

        benchmark.pedantic(synchronised, setup=setup, rounds=rounds, warmup_rounds=1)
        times = benchmark.stats.stats.data
        info |= dict(zip(("p20", "p80"), np.percentile(times, (20, 80)).tolist()))
        if baseline:
            info["relative_time"] = float(np.median(np.divide(times, baseline.seconds[-rounds:])))
        benchmark.extra_info |= info | rates(cost, benchmark.stats["median"], precision)


class _Timed:
    """A function that writes down how long its calls took."""

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.seconds = _synchronised(function), []

    def __call__(self) -> None:
        started = time.perf_counter()
        self.function()
        self.seconds.append(time.perf_counter() - started)


def _synchronised(function: Callable[[], object]) -> Callable[[], None]:
    def call() -> None:
        function()
        device.synchronize()

    return call


def rates(cost: Cost | None, seconds: float, precision: str) -> dict[str, float]:
    """What a time makes of the least bytes and FLOPs; nothing where they are not known."""
    if cost is None:
        return {}
    bandwidth, arithmetic = cost.bytes / seconds, cost.flops / seconds
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "GB/s": bandwidth / 1e9,
        "GFLOP/s": arithmetic / 1e9,
        "share_of_copy_bandwidth": bandwidth / device.copy_bandwidth(),
        "share_of_matrix_rate": arithmetic / device.matrix_rate(precision),
    }


def _rounds_in_time(function: Callable[[], object]) -> int:
    started = time.perf_counter()
    function()
    return int(SECONDS_PER_ROW / (time.perf_counter() - started))
