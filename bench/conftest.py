"""Options and fixtures of the benchmarks; see :mod:`bench`."""

from __future__ import annotations

import os

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from trgnet.versions import versions

from . import device
from .measure import Deadline, Measure
from .providers import PRECISIONS, PROVIDERS, allow_tf32


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("trgnet")
    group.addoption(
        "--providers",
        default=None,
        help=f"comma-separated, of {','.join(PROVIDERS)}; on a CPU all but `compiled` unless it is named",
    )
    group.addoption("--limit", type=float, default=None, help="seconds after which no further row is begun")


def pytest_configure(config: pytest.Config) -> None:
    named = config.getoption("--providers", default=None)
    unknown = set(named.split(",") if named else ()) - set(PROVIDERS)
    if unknown:
        raise pytest.UsageError(f"--providers: got {sorted(unknown)}, expected some of {','.join(PROVIDERS)}")
    allow_tf32(False)
    config.stash[_DEADLINE] = Deadline(config.getoption("--limit", default=None))


_DEADLINE = pytest.StashKey[Deadline]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with an argument `provider` or `precision` runs for each of them."""
    if "provider" in metafunc.fixturenames:
        named = metafunc.config.getoption("--providers", default=None)
        default = PROVIDERS if device.ON_GPU else tuple(p for p in PROVIDERS if p != "compiled")
        metafunc.parametrize("provider", named.split(",") if named else default)
    if "precision" in metafunc.fixturenames:
        metafunc.parametrize("precision", PRECISIONS)


@pytest.fixture
def measure(benchmark: BenchmarkFixture, pytestconfig: pytest.Config) -> Measure:
    return Measure(benchmark, pytestconfig.stash[_DEADLINE])


def pytest_benchmark_update_machine_info(config: object, machine_info: dict) -> None:
    """Add what decides a timing to the JSON file."""
    machine_info |= device.facts() | device.run_facts() | {
        "cores": os.cpu_count(),
        "versions": versions(),
        "copy_bandwidth": device.copy_bandwidth(),
        "matrix_rate": {precision: device.matrix_rate(precision) for precision in PRECISIONS},
    }  # fmt: skip
