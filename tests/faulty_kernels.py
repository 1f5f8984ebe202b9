"""Program: the check of an operator one of whose kernels is wrong.

    python tests/faulty_kernels.py FAULT KERNEL DEVICE DESCRIPTOR

The last two arguments are those of ``python -m trgnet.kernels.self_check``. Kernels whose name contains KERNEL get
the fault.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch
from trgnet.kernels import launch as launching
from trgnet.kernels import segment, self_check
from trgnet.kernels.launch import launch

ROUND_OFF = torch.Generator()


def wrong(results: list[torch.Tensor]) -> None:
    results[-1].mul_(1 + 1e-3)


def unsteady(results: list[torch.Tensor]) -> None:
    """Another last bit in every run, as a sum in no fixed order has."""
    noise = torch.rand(results[-1].shape, generator=ROUND_OFF) < 0.5
    results[-1].mul_(1 + noise * torch.finfo(torch.float32).eps)


def out_of_memory(results: list[torch.Tensor]) -> None:
    raise torch.OutOfMemoryError("no memory left")


def error(results: list[torch.Tensor]) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


FAULTS = {
    "wrong": wrong,
    "unsteady": unsteady,
    "error": error,
    "out_of_memory": out_of_memory,
    "abort": lambda results: os.abort(),
    "segfault": lambda results: os.kill(os.getpid(), signal.SIGSEGV),
    "exit": lambda results: os._exit(7),
    "hang": lambda results: time.sleep(600),
}


def main() -> None:
    fault, kernel, *rest = sys.argv[1:]
    if fault == "import":
        raise ImportError("a library is missing")

    def faulty(function: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        launch(function, grid, *args, **options)
        if kernel in function.__name__:
            FAULTS[fault]([a for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()])

    assert segment.launch is launching.launch
    segment.launch = faulty
    self_check.main(rest)


if __name__ == "__main__":
    main()
