"""Measures the host time of operators and of a training step, without a GPU, and prints it.

    python -m bench.host                  # every operator, and the training step by phase
    python -m bench.host --json FILE      # the same as records

Host time is what Python, the dispatcher and autograd take before kernels are launched; a GPU waits for it in
training steps that are not replayed as CUDA graphs. Here tensors are on the CPU and tiny, so that operations of PyTorch
take about as long to compute as they would to launch, and Triton's launches do nothing: what Triton and the driver
take for one is not in these times. Two ways to call an operator are timed in turns:

``op``
    The ``torch.library`` op, as compilers need it.
``plain``
    The autograd.Function that ordinary calls take.

Other programs on the machine disturb both alike: compare the columns, not the microseconds of two runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trgnet.kernels import operator, use_backend
from trgnet.kernels.launch import record_launches

from .launches import TARGET, Step, network_operators
from .operators import Size, make_case

TINY = Size(n=1, c=1, t=16, hops=2, segments=4, d=8)
"""Published features and joints, which the kernels are for; everything else as small as can be."""
CPU = torch.device("cpu")
ROUNDS = {"operator": 200, "step": 10}
OPERATOR_MODULE, LAUNCH_MODULE = "trgnet.kernels.operator", "trgnet.kernels.launch"


@dataclass(frozen=True)
class Row:
    """The median host time of one thing in microseconds, by the way operators are called."""

    what: str
    op: float
    plain: float


@contextmanager
def called(way: str) -> Iterator[None]:
    """Operators run on their kernels, which are not launched, and are called as an op or as a plain function."""
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton"))
        stack.enter_context(record_launches(TARGET))
        stack.enter_context(mock.patch(f"{LAUNCH_MODULE}._describe", lambda *_: None))
        stack.enter_context(
            mock.patch(f"{LAUNCH_MODULE}._INTERPRETED", True)
        )  # so that CPU tensors are taken
        if way == "op":
            stack.enter_context(mock.patch(f"{OPERATOR_MODULE}._is_eager", lambda args: False))
        yield


def in_turns(task: Callable[[], dict[str, float]], rounds: int) -> list[Row]:
    """Time the parts of `task`, which it returns in seconds, in `rounds` calls of each kind that take turns."""
    found: dict[str, dict[str, list[float]]] = {"op": {}, "plain": {}}
    for _ in range(rounds + 1):
        for way, times in found.items():
            with called(way):
                for what, seconds in task().items():
                    times.setdefault(what, []).append(1e6 * seconds)
    # The first call of each kind makes what is made once.
    return [Row(what, *(median(found[way][what][1:]) for way in ("op", "plain"))) for what in found["op"]]


def operator_task(name: str, size: Size = TINY) -> Callable[[], dict[str, float]]:
    """Forward and backward of one operator, with the arguments that the network passes."""
    args = [
        a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in make_case(name, size).network_args
    ]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def task() -> dict[str, float]:
        start = time.process_time()
        outputs = operator(name)(*args)
        forward = time.process_time()
        outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if o.requires_grad]
        gradients = [torch.empty_like(out) for out in outputs]
        between = time.process_time()
        torch.autograd.grad(outputs, wanted, gradients)
        return {f"{name} forward": forward - start, f"{name} backward": time.process_time() - between}

    return task


def step_task(size: Size = TINY) -> Callable[[], dict[str, float]]:
    """The phases of a training step, and the whole of it."""
    step = Step(size, CPU)

    def task() -> dict[str, float]:
        found: dict[str, float] = {}

        @contextmanager
        def within(phase: str) -> Iterator[None]:
            start = time.process_time()
            yield
            found[phase] = time.process_time() - start

        step.run(within)
        return found | {"step": sum(found.values())}

    return task


def operator_rows(rounds: int = ROUNDS["operator"]) -> list[Row]:
    """Every operator with kernels, forward and backward."""
    return [row for name in network_operators() for row in in_turns(operator_task(name), rounds)]


def step_rows(rounds: int = ROUNDS["step"], size: Size = TINY) -> list[Row]:
    """The training step by phase."""
    return in_turns(step_task(size), rounds)


def print_table(title: str, rows: list[Row], console: Console) -> None:
    """Microseconds and their ratio."""
    table = Table(title=title, title_justify="left")
    for heading in ("", "op", "plain", "op / plain"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in rows:
        table.add_row(row.what, f"{row.op:,.0f}", f"{row.plain:,.0f}", f"{row.op / row.plain:.2f}")
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="also write the records into this file")
    parser.add_argument(
        "--rounds", type=int, help="calls of each kind (default: 200 of an operator, 10 of a step)"
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console = Console(width=120)
    console.print(
        f"torch {torch.__version__}, {date.today()}: host time in microseconds, without a GPU and launches"
    )
    rounds = {what: options.rounds or count for what, count in ROUNDS.items()}
    operators, step = operator_rows(rounds["operator"]), step_rows(rounds["step"])
    print_table("One operator, with all its gradients", operators, console)
    print_table(f"A training step, N={TINY.n}, T={TINY.t}, S={TINY.segments}", step, console)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in operators + step], indent=1))


if __name__ == "__main__":
    main()
