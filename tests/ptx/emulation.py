"""Runs the Triton kernels of this package on CPU tensors: compiled for a GPU that is not there, and emulated.

Triton's interpreter must be off, so this is for a process of its own (:mod:`.plugin`), not for that of the other tests.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from bench.compiled import ARCHITECTURES, compile_launch

from .findings import Findings
from .machine import launch
from .memory import GlobalMemory
from .numbers import Array

# By name, as the package has a function of the name of one of them.
LAUNCH, OPERATOR, MOMENTS = (
    importlib.import_module(f"trgnet.kernels.{name}") for name in ("launch", "operator", "moment_update")
)
TARGET = ARCHITECTURES["sm_90"]
TRIAL_BLOCKS = 2


@dataclass
class Emulation:
    """The launches of a block of code, and what was found in them."""

    findings: dict[str, Findings] = field(default_factory=dict)
    """By kernel."""
    pointed: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    """By address: tensors that kernels may find in a table of addresses."""

    def launch(
        self,
        function: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 1,
        **constants: Any,
    ) -> None:
        """Run a kernel as :func:`trgnet.kernels.launch.launch` does."""
        if 0 in grid:
            return
        described = LAUNCH._describe(function, grid, arguments, constants, num_warps, num_stages)
        ptx, shared = _code(described)
        present = [a for a in arguments if a is not None]
        self.run(described.name, ptx, grid, present, shared, num_warps)

    def run(
        self,
        name: str,
        ptx: str,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        shared: int,
        warps: int,
        trial: bool = False,
    ) -> Findings:
        """Run the code. A trial runs a few blocks, and neither what it writes nor what is found in it is kept."""
        findings = self.findings.setdefault(name, Findings()) if not trial else Findings()
        pointed = [tensor for reference in self.pointed.values() if (tensor := reference()) is not None]
        tensors = Tensors(findings, pointed, [a for a in arguments if isinstance(a, Tensor)])
        values = [tensors.address(a) if isinstance(a, Tensor) else a for a in arguments]
        blocks = TRIAL_BLOCKS if trial else None
        launch(ptx, grid, values, tensors.memory, shared=shared, warps=warps, most_blocks=blocks)
        if not trial:
            tensors.write_back()
        return findings

    def address(self, tensor: Tensor | None) -> int:
        """The address of a tensor for a table, see ``trgnet.kernels.moment_update``."""
        if tensor is None:
            return 0
        self.pointed[tensor.data_ptr()] = weakref.ref(tensor)
        return tensor.data_ptr()

    @property
    def lines(self) -> list[str]:
        """Every fault, one a line."""
        return [line for name, findings in self.findings.items() for line in findings.lines(name)]


@functools.cache
def _code(described: Any) -> tuple[str, int]:
    """PTX of a launch, and the bytes of shared memory that a block asks for."""
    compiled = compile_launch(described, TARGET)
    return compiled.asm["ptx"], compiled.metadata.shared


@dataclass
class Placed:
    """The bytes of a tensor, or of several of one storage: where they are, here and there."""

    start: int
    content: Array
    address: int = 0


class Tensors:
    """Tensors as global memory has them: what lies between the first and the last byte of a tensor, and guards."""

    def __init__(self, findings: Findings, pointed: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
        self.memory = GlobalMemory(findings)
        tensors = [*pointed, *arguments]
        extents: dict[int, tuple[int, int]] = {}
        for tensor in tensors:
            if tensor.numel():
                storage = tensor.untyped_storage().data_ptr()
                start, end = _extent(tensor)
                known = extents.get(storage, (start, end))
                extents[storage] = min(start, known[0]), max(end, known[1])
        self.tensors = {t.untyped_storage().data_ptr(): t for t in tensors}
        self.placed: dict[int, Placed] = {}
        """By storage."""
        self.tables: dict[int, int] = {}
        """Addresses of tables here, by theirs."""
        for storage, (start, end) in extents.items():
            everything = _bytes(self.tensors[storage])
            content = everything[start - storage : end - storage]
            self.placed[storage] = Placed(start, content, self.memory.place(content, start))
        addresses = {t.data_ptr(): self.address(t) for t in pointed if t.numel()}
        for tensor in arguments:
            if tensor.dtype == torch.int64 and tensor.numel() and addresses:
                self._relocate(tensor, addresses)

    def address(self, tensor: Tensor) -> int:
        """The address of a tensor; one without elements is nowhere."""
        if not tensor.numel():
            return 0
        if tensor.data_ptr() in self.tables:
            return self.tables[tensor.data_ptr()]
        placed = self.placed[tensor.untyped_storage().data_ptr()]
        return placed.address + tensor.data_ptr() - placed.start

    def _relocate(self, table: Tensor, addresses: dict[int, int]) -> None:
        """Replace addresses in a table by those that tensors have here. Kernels do not write to tables."""
        placed = self.placed.pop(table.untyped_storage().data_ptr())
        numbers = self.memory.read(placed.address, placed.content.nbytes).view(np.int64)
        numbers[:] = [addresses.get(int(number), number) for number in numbers]
        self.tables[table.data_ptr()] = placed.address

    def write_back(self) -> None:
        """Copy what kernels wrote into the tensors."""
        for placed in self.placed.values():
            placed.content[:] = self.memory.read(placed.address, placed.content.nbytes)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one."""
    start = tensor.data_ptr()
    return start, start + LAUNCH._span(tensor).length * tensor.element_size()


def _bytes(tensor: Tensor) -> Array:
    """The bytes of a tensor's storage, which they share."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


@contextmanager
def emulated(emulation: Emulation) -> Iterator[Emulation]:
    """Within the block the backend ``triton`` runs on CPU tensors by emulation."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(LAUNCH, "_forced_target", TARGET))
        enter(mock.patch.object(OPERATOR, "obstacle", lambda *_: None))
        enter(mock.patch.object(MOMENTS, "_address", emulation.address))
        for name, module in list(sys.modules.items()):
            if name.startswith("trgnet.kernels.") and vars(module).get("launch") is LAUNCH.launch:
                if module is not LAUNCH:
                    enter(mock.patch.object(module, "launch", emulation.launch))
        yield emulation
