"""Times what the host does in an optimizer step, without a GPU, beside torch's fused optimizers.

    python -m bench.optimizer_host                 # TRG-Net's parameters; --json FILE writes the records

A step on a GPU takes the device some microseconds, so what counts for many small tensors is how soon the host has started
it. Here nothing is computed. The one launch of this package is left out. Torch's ``_fused_sgd_`` and ``_fused_adam_`` get as
many empty tensors, so that their time is that of a call without its launches, of which there are several; the call that
counts Adam's steps is left out. The tensors are on the CPU.

Gradients are the same tensors in every step, or others, in other memory, as backward passes make them after
``zero_grad()``. The optimizers take turns. Times are medians over the rounds of the thread's CPU time; ratios are medians
over the rounds too. ``python -m bench optimizers`` measures the whole step where there is a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from unittest import mock

os.environ.setdefault("TRITON_INTERPRET", "1")  # for kernels on CPU tensors; read when they are declared

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.optim import SGD, Adam
from trgnet.kernels.moment_update import MomentTable
from trgnet.optimizers import LCAM, SMES, GatedSMES

from .optimizers import LOSS_GATED, OPTIONS, trg_net

FUSED = {"fused": True, **OPTIONS}
LIVE = {"capturable": True, **FUSED}
FAMILIES = {
    "momentum": {
        "torch SGD": lambda p: SGD(p, momentum=0.9, **FUSED),
        "LCAM": lambda p: LCAM(p, **FUSED),
        "LCAM, capturable": lambda p: LCAM(p, **LIVE),
    },
    "second moment": {
        "torch Adam": lambda p: Adam(p, **FUSED),
        "SMES": lambda p: SMES(p, **FUSED),
        "SMES, capturable": lambda p: SMES(p, **LIVE),
        "gated SMES": lambda p: GatedSMES(p, **FUSED),
        "gated SMES, capturable": lambda p: GatedSMES(p, **LIVE),
    },
}
"""The first of each family is what the others are compared with."""


@dataclass(frozen=True)
class Row:
    """Host time of one optimizer's step, and its ratio to that of torch's."""

    family: str
    optimizer: str
    gradients: str
    microseconds: float
    ratio: float


class Timed:
    """An optimizer on parameters with two sets of gradients."""

    def __init__(
        self, make: Callable[[list[Tensor]], torch.optim.Optimizer], shapes: list[torch.Size]
    ) -> None:
        self.params = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
        self.grads = [[torch.zeros(shape) for shape in shapes] for _ in range(2)]
        self.optimizer = make(self.params)
        self.arguments = {"loss": torch.ones(())} if isinstance(self.optimizer, LOSS_GATED) else {}
        for use in (0, 1):
            self.step(use)

    def step(self, use: int) -> float:
        """Microseconds of a step with one set of gradients."""
        for p, grad in zip(self.params, self.grads[use]):
            p.grad = grad
        start = time.thread_time()
        self.optimizer.step(**self.arguments)
        return 1e6 * (time.thread_time() - start)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Optimizers do everything but start their kernels."""

    def nothing(*args: object, **kwargs: object) -> None: ...

    torchs = {
        "_fused_sgd_": _on_empty_tensors(torch._fused_sgd_, 3),
        "_fused_adam_": _on_empty_tensors(torch._fused_adam_, 5),
        "_foreach_add_": nothing,
    }
    kernels = sys.modules[MomentTable.__module__]
    with mock.patch.object(kernels, "launch", nothing), mock.patch.multiple(torch, **torchs):
        yield


def _on_empty_tensors(function: Callable[..., None], count: int) -> Callable[..., None]:
    """The function, called with empty tensors in its first ``count`` lists."""
    empty: list[list[Tensor]] = []

    def call(*lists: list[Tensor], **options: object) -> None:
        if not empty:
            empty.extend([torch.empty(0) for _ in tensors] for tensors in lists[:count])
        function(*empty, *lists[count:], **options)

    return call


def host_times(shapes: list[torch.Size], rounds: int) -> list[Row]:
    """One row for each optimizer and kind of gradients."""
    rows = []
    with without_kernels():
        for family, makes in FAMILIES.items():
            timed = [Timed(make, shapes) for make in makes.values()]
            for gradients in ("same", "new"):
                uses = [i % 2 if gradients == "new" else 1 for i in range(rounds)]
                times = list(zip(*([each.step(use) for each in timed] for use in uses), strict=True))
                rows += [
                    Row(family, name, gradients, median(own), median(x / t for x, t in zip(own, times[0])))
                    for name, own in zip(makes, times)
                ]
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.optimizer_host", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=200, help="default: 200")
    parser.add_argument("--json", type=Path, help="also write the records into this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    shapes = trg_net()
    rows = host_times(shapes, options.rounds)
    table = Table(
        title=f"Host time of a step without a GPU: {len(shapes)} tensors, launches left out; torch {torch.__version__}, "
        f"{date.today()}",
        title_justify="left",
    )
    for name in ("", "optimizer", "gradients"):
        table.add_column(name)
    for name in ("us", "of torch's"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row.family, row.optimizer, row.gradients, f"{row.microseconds:.0f}", f"{row.ratio:.0%}")
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
