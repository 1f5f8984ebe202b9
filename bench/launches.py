"""Counts what a training step starts on a GPU, without one, and prints it.

    python -m bench.launches                  # every operator, and the training step by phase
    python -m bench.launches --json FILE      # the same as records

Tensors are on the meta device, which stands for the GPU: they have shapes and no values. Triton kernels are counted
exactly, where they are launched. Calls of ATen, torch's own operations, are counted where they reach the device, all but
those that only make a view or allocate memory. Such a call is at least one kernel: some are several (the backward pass of a
convolution, say), and an optimizer's call for many tensors is one here. So the numbers of kernels are exact for what is
Triton's, and lower bounds for what is torch's. They are those of a step in
float32 without tf32, of every GPU that there are kernels for; autocast adds conversions.

Three columns are compared:

``triton``
    The kernels of this package, on the backend ``triton``.
``plain``
    The references, in plain PyTorch, with torch's own dropout, which is one call forward and one backward.
``reference``
    The backend ``reference`` as it is. Its dropout computes a hash element by element, to draw the masks of the kernels;
    plain PyTorch has no use for that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trgnet.kernels import operator, use_backend
from trgnet.kernels.launch import Target, record_launches

from trgnet import TRGLoss, TRGNet
from trgnet import model as model_module
from trgnet.data import Batch, Recording, collate
from trgnet.skeleton import SKELETONS
from trgnet.text import TextPrior

from .compiled import triton_operators
from .operators import Size, make_case

COLUMNS = ("triton", "plain", "reference")
PHASES = ("forward", "losses", "backward", "optimizer")
DEVICE = torch.device("meta")
TARGET = Target("cuda", 90)
OPERATOR_SIZE = Size(n=2, t=128)
"""Published widths. Counts depend on neither the batch nor the length."""
STEP_SIZE = Size(n=8, t=6000, segments=320)

META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)

aten = torch.ops.aten
ALLOCATIONS = {
    packet.__name__
    for packet in (aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided)
}
VIEWS = {aten._unsafe_view.__name__}
"""Views whose schema does not say so."""
IN_PLACE_ONLY = {aten._fused_adam_.__name__}
"""Change tensors in place, return nothing, and are not made for meta tensors."""


@dataclass
class Counts:
    """What was started: Triton kernels, and calls of ATen, by name."""

    kernels: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        """The least number of kernels that this is on a GPU."""
        return self.kernels.total() + self.calls.total()

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.kernels + other.kernels, self.calls + other.calls)


@dataclass(frozen=True)
class Row:
    """What was counted of one thing, by column."""

    what: str
    triton: Counts
    plain: Counts
    reference: Counts

    def record(self) -> dict[str, Any]:
        """The same as plain dictionaries."""
        return {"what": self.what} | {name: vars(getattr(self, name)) for name in COLUMNS}


class DeviceCalls(TorchDispatchMode):
    """Counts the calls of ATen inside it that start at least one kernel on the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        with self:  # what an operator's launcher calls of torch counts too, and what calls are composed of
            if func.namespace == "trgnet":
                return func.redispatch(META, *args, **kwargs)
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        name = func.overloadpacket.__name__
        result = None if name in IN_PLACE_ONLY else func(*args, **kwargs)
        only_host = func.is_view or name in VIEWS or name in ALLOCATIONS
        if not only_host and _on_device((args, kwargs, result)):
            self.started(func, args, kwargs, result)
        return result

    def started(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        """Count a call that starts a kernel."""
        self.calls[func.overloadpacket.__name__] += 1


def _on_device(values: Any) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.device == DEVICE for leaf in tree_leaves(values))


@contextmanager
def counting() -> Iterator[Counts]:
    """What the block starts; complete when it ends."""
    counts = Counts()
    with record_launches(TARGET) as recorded, DeviceCalls() as mode:
        yield counts
    counts.calls.update(mode.calls)
    counts.kernels.update(launch.name for launch in recorded)


@contextmanager
def column(name: str) -> Iterator[None]:
    """Operators run as the column says."""
    with ExitStack() as stack:
        stack.enter_context(use_backend("triton" if name == "triton" else "reference"))
        if name == "plain":
            for layer in ("attention_layer", "fusion_layer", "dilated_residual"):
                names = operator(layer).reference.__globals__
                stack.enter_context(mock.patch.dict(names, dropout=_torch_dropout))
            stack.enter_context(mock.patch.object(model_module, "channel_mask", _torch_channel_mask))
        yield


def _torch_dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    # As torch.nn.functional.dropout on a GPU; on meta tensors that is several calls.
    return x if seed is None or p == 0.0 else torch.native_dropout(x, p, True)[0]


def _torch_channel_mask(n: int, c: int, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if seed is None else _torch_dropout(seed.new_ones(n, c, dtype=dtype), p, seed)


def operator_counts(name: str, size: Size = OPERATOR_SIZE) -> tuple[Counts, Counts]:
    """What forward and backward of one operator start, with the arguments that the network passes."""
    args = [
        a.detach().to(DEVICE).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in make_case(name, size).network_args
    ]
    with counting() as forward:
        outputs = operator(name)(*args)
    outputs = [out for out in (outputs if isinstance(outputs, tuple) else (outputs,)) if out.requires_grad]
    gradients = [torch.empty_like(out) for out in outputs]
    with counting() as backward:
        torch.autograd.grad(
            outputs, [a for a in args if isinstance(a, Tensor) and a.requires_grad], gradients
        )
    return forward, backward


class Step:
    """A training step of the published configuration: network, losses, fused Adam."""

    def __init__(self, size: Size = STEP_SIZE, device: torch.device = DEVICE) -> None:
        prior = TextPrior(np.ones((size.v, size.d), np.float32), np.ones((size.k, size.d), np.float32))
        self.model = TRGNet(size.c, size.k, SKELETONS["pku"].adjacency(), size.d).train().to(device)
        self.criterion = TRGLoss(prior, pos_weight=1.0).to(device)
        self.joint_graph = prior.joint_graph().to(device)
        self.batch = _batch(size).to(device)
        with _meta_as_gpu():
            self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3, fused=True)

    def run(self, within: Callable[[str], AbstractContextManager[Any]] = lambda phase: nullcontext()) -> None:
        """Do the step, each of PHASES in the context that `within` makes for it."""
        batch = self.batch
        with within("forward"):
            output = self.model(batch.x, batch.mask, self.joint_graph, batch.segments)
        with within("losses"):
            total = self.criterion(output, batch)["total"]
        with within("backward"):
            total.backward()
        with within("optimizer"), _meta_as_gpu():
            self.optimizer.step()
            self.optimizer.zero_grad()


def step_counts(size: Size = STEP_SIZE) -> dict[str, Counts]:
    """What a training step starts, by phase."""
    step, found = Step(size), {}

    @contextmanager
    def within(phase: str) -> Iterator[None]:
        with counting() as found[phase]:
            yield

    step.run(within)  # makes the optimizer's state
    step.run(within)
    return found


def _batch(size: Size) -> Batch:
    """Sequences without padding, cut into segments of equal length."""
    labels = np.arange(size.t) * (size.segments // size.n) // size.t % size.k
    x = np.zeros((size.c, size.v, size.t), np.float32)
    return collate([Recording(f"r{i}", x, labels) for i in range(size.n)], pad_multiple=1)


def _meta_as_gpu() -> AbstractContextManager[Any]:
    """Torch's fused optimizers ask for a GPU by name."""
    adam = sys.modules["torch.optim.adam"]
    return mock.patch.object(adam, "_device_dtype_check_for_fused", lambda parameter: None)


def network_operators() -> list[str]:
    """The operators with kernels that have a forward and a backward pass: not the optimizer's, which works in place."""
    return [name for name in triton_operators() if operator(name).triton.backward is not None]


def operator_rows() -> list[Row]:
    """Every operator with kernels, forward and backward."""
    return _rows(
        {
            name: {
                f"{op} {direction}": counts
                for op in network_operators()
                for direction, counts in zip(("forward", "backward"), operator_counts(op))
            }
            for name in _entered(COLUMNS)
        }
    )


def step_rows(size: Size = STEP_SIZE) -> list[Row]:
    """The phases of the training step, and the whole of it."""
    found = {name: step_counts(size) for name in _entered(COLUMNS)}
    return _rows({name: phases | {"step": sum(phases.values(), Counts())} for name, phases in found.items()})


def _entered(columns: Sequence[str]) -> Iterator[str]:
    for name in columns:
        with column(name):
            yield name


def _rows(found: dict[str, dict[str, Counts]]) -> list[Row]:
    return [Row(what, **{name: found[name][what] for name in COLUMNS}) for what in found[COLUMNS[0]]]


def print_table(title: str, rows: Sequence[Row], console: Console) -> None:
    """Triton's kernels and the calls beside them, and the sum, beside the other columns."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in ("Triton kernels", "ATen calls", "triton", "plain", "reference", "plain / triton"):
        table.add_column(name, justify="right")
    for row in rows:
        ratio = row.plain.total / row.triton.total
        numbers = row.triton.kernels.total(), row.triton.calls.total(), row.triton.total, row.plain.total
        table.add_row(row.what, *map(str, numbers), str(row.reference.total), f"{ratio:.1f}")
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="also write the records, call by call, into this file")
    options = parser.parse_args(arguments)
    import triton

    console = Console(width=120)
    console.print(f"torch {torch.__version__}, triton {triton.__version__}, {date.today()}")
    console.print(
        "Triton kernels are exact; an ATen call is at least one kernel, so sums with such calls are lower bounds."
    )
    operators, size = operator_rows(), STEP_SIZE
    step = step_rows(size)
    print_table("One operator, with all its gradients", operators, console)
    print_table(f"A training step, N={size.n}, T={size.t}, S={size.segments}", step, console)
    if options.json:
        options.json.write_text(json.dumps([row.record() for row in operators + step], indent=1))


if __name__ == "__main__":
    main()
