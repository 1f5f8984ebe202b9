"""Records a training step for predictions of its time: the Triton kernels it launches, and the calls of ATen beside them.

The step is that of :mod:`bench.launches`, on meta tensors. The times of ATen calls are estimates from their bytes and FLOPs,
with rates fitted to a profile of the step (see :mod:`bench.predict`): torch's kernels are not simulated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry
from trgnet.kernels import operator_table, use_backend
from trgnet.kernels.examples import Size
from trgnet.kernels.launch import Launch, record_launches
from trgnet.kernels.self_check import float32_products

from .compiled import PRECISIONS
from .launches import PHASES, TARGET, DeviceCalls, Step


@dataclass(frozen=True)
class Call:
    """One call of ATen."""

    name: str
    moved: int
    """Bytes of its arguments and results."""
    flops: int
    """0 if it is no product of matrices."""
    elements: int
    """Of the largest result."""
    kind: str
    """Arithmetic of a product: float32, tf32 or bfloat16."""

    @property
    def seconds(self) -> float:
        """Estimated time on an H100: that of the memory, of the arithmetic, or of a long sum in few blocks."""
        bandwidth = CACHE_BANDWIDTH if self.moved < CACHED else BANDWIDTH
        memory = self.moved / bandwidth
        if not self.flops:
            return (SUM_START if self.name in SUMS else START) + memory
        rate, step = PRODUCT_RATES[self.kind]
        depth = self.flops / 2 / max(1, self.elements)
        return START + max(memory, self.flops / rate, depth * step)


# Fitted to the totals of a profile of the step on an H100, bench/predictions/measured.json.
BANDWIDTH, CACHE_BANDWIDTH, CACHED = 2.6e12, 4e12, 30e6
"""Bytes per second from DRAM and from L2, and the bytes of a call that are in L2."""
START, SUM_START = 1.7e-6, 6.5e-6
"""Seconds of the smallest call, and of the smallest reduction."""
SUMS = {"sum", "mean", "linalg_vector_norm", "max", "min", "any"}
PRODUCT_RATES = {"float32": (45e12, 37e-9), "tf32": (200e12, 2.5e-9), "bfloat16": (350e12, 1.2e-9)}
"""FLOPs per second of cuBLAS, and seconds for each number that one result is the sum of: results are added up in order."""


@dataclass
class Phase:
    """What one phase of the step starts."""

    launches: list[Launch] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


class _Costs(DeviceCalls):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def started(self, func: Any, args: tuple, kwargs: dict, result: Any) -> None:
        super().started(func, args, kwargs, result)
        outputs = _tensors(result)
        flops = 0
        if func.overloadpacket in flop_registry:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in _tensors((args, kwargs)))
        tf32 = torch.get_float32_matmul_precision() != "highest"
        self.found.append(
            Call(
                func.overloadpacket.__name__,
                _bytes(_tensors((args, kwargs))) + _bytes(outputs),
                flops,
                max((t.numel() for t in outputs), default=0),
                "bfloat16" if narrow else "tf32" if tf32 else "float32",
            )
        )


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _bytes(tensors: list[Tensor]) -> int:
    """Of the memory behind them: what is expanded is read once."""
    total = 0
    for t in tensors:
        repeated = [size for size, stride in zip(t.shape, t.stride()) if stride == 0]
        total += t.numel() * t.itemsize // max(1, torch.Size(repeated).numel())
    return total


_NARROWED_BY_AUTOCAST = {
    torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.linear, torch.conv1d, torch.conv2d, torch.matmul,
    torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip


class _Autocast(TorchFunctionMode):
    """Torch's autocast to bfloat16 as far as products go; there is none for the meta device."""

    def __init__(self, on: list[bool]) -> None:
        super().__init__()
        self.on = on

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.on[0] and func in _NARROWED_BY_AUTOCAST:
            args, kwargs = tree_map_only(
                Tensor, lambda t: t.bfloat16() if t.dtype == torch.float32 else t, (args, kwargs)
            )
        return func(*args, **kwargs)


def record_step(precision: str, size: Size) -> dict[str, Phase]:
    """What a training step starts, by phase."""
    dtype = PRECISIONS[precision]
    step, phases = Step(size), {name: Phase() for name in PHASES}
    with float32_products(precision), use_backend("triton"):
        step.run(lambda name: _recording(phases[name], dtype, name))  # makes the optimizer's state
        phases = {name: Phase() for name in PHASES}
        step.run(lambda name: _recording(phases[name], dtype, name))
    return phases


@contextmanager
def _recording(phase: Phase, dtype: torch.dtype, name: str) -> Iterator[None]:
    autocast = _autocast(dtype) if dtype != torch.float32 and name in ("forward", "losses") else nullcontext()
    with autocast, record_launches(TARGET) as launches, _Costs() as costs:
        yield
    phase.launches += launches
    phase.calls += costs.found


@contextmanager
def _autocast(dtype: torch.dtype) -> Iterator[None]:
    """Autocast of operators and products in PyTorch; off inside of operators, as on a GPU."""
    on = [True]

    @contextmanager
    def without(x: Tensor) -> Iterator[None]:
        before, on[0] = on[0], False
        try:
            yield
        finally:
            on[0] = before

    state = {"autocast_dtype": lambda device: dtype if on[0] else None, "without_autocast": without}
    module = sys.modules[operator_table.__module__]
    with mock.patch.multiple(module, **state, _autocast_state=lambda inputs: nullcontext), _Autocast(on):
        yield
