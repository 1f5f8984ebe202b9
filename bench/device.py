"""The device that is measured: what it is, how to wait for it, and how fast it moves and multiplies at most."""

from __future__ import annotations

import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trgnet.versions import checkout_commit, versions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"

MIB = 1 << 20
COPIED = 1024 * MIB if ON_GPU else 128 * MIB
"""Bytes that are copied to measure the bandwidth: many times a cache."""
EDGE = 8192 if ON_GPU else 1536
"""Rows and columns of the matrices that are multiplied to measure the rate."""
EVICTED = 256 * MIB if ON_GPU else 64 * MIB
"""Bytes that are written to drive what a round needs out of the last cache."""
EVICTION = "frac"
"""In the name of the kernel that writes them, and of no other: a profile is told from its own work by it."""


def synchronize() -> None:
    """Wait until the device has done everything it was given."""
    if ON_GPU:
        torch.cuda.synchronize()


@lru_cache(maxsize=1)
def _evicting() -> torch.Tensor:
    return torch.zeros(EVICTED // 4, device=DEVICE)


def evict_caches() -> None:
    """Leave nothing of what comes next in the last cache."""
    _evicting().frac_()
    synchronize()


def peak_memory(function: Callable[[], object]) -> int:
    """Bytes of tensors that `function` needs at most, beside those that exist before it: what the allocator gave out."""
    if ON_GPU:
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()  # negative where memory is given back
        peak = max(peak, current)
    return peak


def kernels(function: Callable[[], object], calls: int = 1) -> list[tuple[str, int, float]]:
    """Kernels and copies that calls start: name, number and seconds of one call, the longest first. On a CPU, operations."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if ON_GPU else activity.CPU]) as profile:
        for _ in range(calls):
            function()
        synchronize()
    attribute = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    rows = [(e.key, e.count / calls, getattr(e, attribute) / 1e6 / calls) for e in profile.key_averages()]
    return sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])


def host_time(function: Callable[[], object], rounds: int = 20) -> float:
    """Median seconds until a call returns, while the device may still work."""
    times = []
    for _ in range(rounds):
        synchronize()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return median(times)


def free_memory() -> int:
    """Bytes that can be had without swapping."""
    if ON_GPU:
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@lru_cache(maxsize=1)
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy or change in place, whichever is faster.

    (A CPU reads what it writes over, and what is changed in place is read anyway.)
    """
    source = torch.ones(COPIED // 4, device=DEVICE)
    target = torch.empty_like(source)
    times = _median_time(lambda: target.copy_(source)), _median_time(source.neg_)
    return 2 * COPIED / min(times)


@lru_cache
def matrix_rate(precision: str) -> float:
    """FLOP per second of a large matrix product in a precision; float32 by the settings of the process."""
    dtype = getattr(torch, precision, torch.float32)
    a, b = (torch.randn(EDGE, EDGE, device=DEVICE).to(dtype) for _ in range(2))
    return 2 * EDGE**3 / _median_time(lambda: a @ b)


def _median_time(function: Callable[[], object], rounds: int = 9) -> float:
    times = []
    for _ in range(rounds + 2):
        synchronize()
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times[2:])


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """What every row says of where it was measured."""
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else _cpu_name(),
        "driver": _driver(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": versions()["triton"],
    }


@lru_cache(maxsize=1)
def run_facts() -> dict[str, Any]:
    """Date, and the commit that was measured, with "+" where files differ from it; None outside of a clone."""
    commit = checkout_commit()
    if commit is not None:
        status = ["git", "-C", Path(__file__).parents[1], "status", "--porcelain", "-uno"]
        changed = subprocess.run(status, capture_output=True, text=True, check=True).stdout
        commit = commit[:12] + ("+" if changed else "")
    return {"commit": commit, "date": date.today().isoformat()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Of an NVIDIA GPU; a CPU has none, and AMD's comes with the kernel."""
    if not ON_GPU or shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.splitlines()[0]
