"""Program: how often Triton's just-in-time compiler compiles each kernel over a sweep of lengths, as JSON.

    python tests/compilations.py OPERATOR...

Runs forward and backward of the operators at fifty lengths, and counts the calls of the compiler for the kernels that each
launches. Without a GPU Triton is told that an H100 is there, and what the compiler would do is left out: what is counted is
what a user with a GPU would wait for.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton.compiler
from operators import arguments, converted
from trgnet.kernels import launch, operator
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

LENGTHS = range(100, 150)
ROWS = ("pairwise_distance",)
"""Operators without time: their number of rows is swept."""


class PretendedDriver:
    """What Triton asks a driver for before it starts a kernel."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def pretend_a_gpu() -> None:
    driver.set_active(PretendedDriver())
    launch._forced_target = launch.Target("cuda", 90)
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only
    triton.compiler.compile = lambda *args, **options: SimpleNamespace(result=lambda: None)


def run(name: str, length: int, device: str) -> None:
    n, t = (length, 1) if name in ROWS else (2, length)
    args = converted(arguments(name, n, t, 25, 16), torch.float32, device)
    operator(name).triton_passes(args, torch.ones_like)


def compilations(name: str, device: str) -> dict[str, int]:
    """Kernel that the operator launches, wherever it stands -> versions of it that the sweep compiles."""
    with launch.record_launches() as recorded:
        run(name, LENGTHS[0], device)
    kernels: set[JITFunction] = {started.kernel for started in recorded}
    for kernel in kernels:
        kernel.device_caches.clear()  # an operator before may share it
    for length in LENGTHS:
        run(name, length, device)
    return {
        kernel.__name__: sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels
    }


if __name__ == "__main__":
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        pretend_a_gpu()
    device = "cuda" if on_gpu else "cpu"
    print(json.dumps({name: compilations(name, device) for name in sys.argv[1:]}))
