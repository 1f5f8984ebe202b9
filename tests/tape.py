"""What a CUDA graph does, on the CPU: operations are recorded with the addresses that they had, and done again there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Terms = dict[str, Tensor]


class Tape:
    """Stands for :class:`trgnet.step_graphs.CudaCapture`.

    Recording leaves every tensor as it was, and the random numbers too. A replay runs no Python of what was recorded:
    the numbers among its arguments are those of then, and results are written to where they were then.

    With `most_operations` a recording of more of them fails, as one does that runs out of memory.
    """

    def __init__(self, most_operations: float = math.inf) -> None:
        self.log: list[str] = []
        self.operations = 0
        self._most = most_operations

    def __call__(self, function: Callable[[], Terms]) -> Callable[[], Terms]:
        self.log.append("record")
        generator, recorder = torch.get_rng_state(), _Recorder(self._most)
        try:
            with recorder:
                outputs = function()
        finally:
            torch.set_rng_state(generator)
            recorder.undo()
        self.operations = recorder.operations

        def replay() -> Terms:
            self.log.append("replay")
            recorder.repeat()
            return outputs

        return replay


class Memory:
    """Stands for :class:`trgnet.step_graphs.CudaMemory`: how many bytes are left, and how many a step takes."""

    def __init__(self, device: torch.device | None = None, left: float = math.inf, taken: int = 0) -> None:
        self.left, self.taken = left, taken

    def free(self) -> float:
        return self.left

    def measured(self, function: Callable[[], Terms]) -> tuple[Terms, int]:
        return function(), self.taken


class _Recorder(TorchDispatchMode):
    """Records operations below autograd, and what tensors from outside held before."""

    def __init__(self, most_operations: float) -> None:
        super().__init__()
        self._most = most_operations
        self._done: list[
            tuple[Any, tuple, dict, Any]
        ] = []  # keeps all tensors, so that no address is used twice
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self.operations == self._most:
            raise torch.OutOfMemoryError("out of memory")
        for argument, value in zip(func._schema.arguments, args):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._keep(_tensors(value))
        result = func(*args, **kwargs)
        self._made |= {_address(tensor) for tensor in _tensors(result)} - _addresses((args, kwargs))
        self._done.append((func, args, kwargs, result))
        return result

    @property
    def operations(self) -> int:
        return len(self._done)

    def _keep(self, tensors: list[Tensor]) -> None:
        for tensor in tensors:
            if _address(tensor) not in self._made and id(tensor) not in self._before:
                self._before[id(tensor)] = (tensor, tensor.detach().clone())

    def undo(self) -> None:
        with torch.no_grad():
            for tensor, value in reversed(self._before.values()):  # several may be views of one
                tensor.copy_(value)

    def repeat(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, result in self._done:
                known = _addresses((args, kwargs))
                for place, value in zip(_tensors(result), _tensors(func(*args, **kwargs))):
                    if _address(place) not in known:
                        place.copy_(value)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _addresses(values: Any) -> set[int]:
    return {_address(tensor) for tensor in _tensors(values)}
