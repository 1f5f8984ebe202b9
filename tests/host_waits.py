"""A training on a device that is not there, and what finds out where the host would wait for it.

The meta device stands for a GPU: its tensors have no values, so whoever asks for one is found.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tape import Memory
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trgnet.kernels.operator import Operator
from trgnet.optimizers import builders

from trgnet import step_graphs
from trgnet import trainer as trainer_module
from trgnet.trainer import Trainer

DEVICE = torch.device("meta")
aten = torch.ops.aten
UNREGISTERED = {
    packet.__name__ for packet in (aten._fused_adam_, aten._fused_adamw_, aten._fused_sgd_)
}  # change tensors in place, return nothing, and are not made for meta tensors


class HostWait(Exception):
    """The host would have waited for the device."""


class NoTensorsOfNumbers(TorchFunctionMode):
    """Raises HostWait where numbers become a tensor on the device, which copies them there and waits."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            if kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE:
                raise HostWait(f"{func.__name__}: numbers are copied to the device")
        return func(*args, **kwargs)


class NoWaiting(TorchDispatchMode):
    """Raises HostWait at everything that makes the host wait for the device; `copies=False`: at every copy too.

    Copies from the host must say that they need not be waited for, which they are where the memory is page-locked.
    """

    def __init__(self, copies: bool = True) -> None:
        super().__init__()
        self.copies = copies
        self.seen = 0
        self._numbers = NoTensorsOfNumbers()

    def __enter__(self) -> NoWaiting:
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(tensor.device == DEVICE for tensor in tensors) or kwargs.get("device") == DEVICE:
            self.seen += 1
            fault = self._fault(func, tensors, args, kwargs)
            if fault:
                raise HostWait(f"{func}: {fault}")
        if func.overloadpacket.__name__ in UNREGISTERED:
            return None
        return func(*args, **kwargs)

    def _fault(self, func: Any, tensors: list[Tensor], args: tuple, kwargs: dict) -> str | None:
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._fault_of_copy(func, args, kwargs)
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            return "an index is a mask, whose frames are counted" if masks else None
        if torch.Tag.data_dependent_output in func.tags:
            return "a value is asked for"
        if torch.Tag.dynamic_output_shape in func.tags:
            return "the size of the result depends on values"
        on_host = [tensor for tensor in tensors if tensor.device != DEVICE]
        if any(tensor.dim() for tensor in on_host) or (on_host and func.overloadpacket is aten.where):
            return "a tensor on the host is copied to the device"
        return None

    def _fault_of_copy(self, func: Any, args: tuple, kwargs: dict) -> str | None:
        if func is aten._to_copy.default:
            source, target = args[0].device, kwargs.get("device") or args[0].device
            waits = not kwargs.get("non_blocking", False)
        else:
            target, source = args[0].device, args[1].device
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source == target:
            return None
        if source == DEVICE:
            return "the device is read"
        if not self.copies:
            return "a copy from the host is recorded"
        return "the copy is waited for" if waits else None


@contextmanager
def pretended_gpu(triton: bool = False) -> Iterator[None]:
    """Trainings are set up on the meta device as on a GPU; with `triton`, operators take the kernels they have."""

    def choose(self: Operator, args: tuple, forced: str | None) -> str:
        usable = triton and self.triton is not None and forced in (None, "auto")
        return "triton" if usable and self._obstacle(args) is None else "reference"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "pick_device", lambda *_, **__: DEVICE)
        patch.setattr(trainer_module, "uses_graphs", lambda settings, *_: settings.cuda_graph is True)
        patch.setattr(step_graphs, "CudaMemory", Memory)
        patch.setattr(Trainer, "_autocast", lambda self: nullcontext())  # it knows no meta device
        patch.setattr(builders, "_on_gpu", lambda params: True)
        patch.setattr(Operator, "choose", choose)
        if not triton:
            patch.setattr(builders, "fused_obstacle", lambda tensors: "Triton is not installed")
        for name in ("adam", "sgd"):
            module = sys.modules[f"torch.optim.{name}"]
            patch.setattr(module, "_device_dtype_check_for_fused", lambda parameter: None)
        yield
