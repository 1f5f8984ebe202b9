"""What tensors exist while something runs."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch._C.DispatchKeySet(torch._C.DispatchKey.Meta)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of any tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().size():
                self.elements = max(self.elements, leaf.untyped_storage().size() // leaf.element_size())
        return result


class PeakMemory(TorchDispatchMode):
    """Records the most bytes that the tensors made inside it take at one time; works on the meta device.

    There it also sees what the operators of trgnet make for themselves. Views of the tensors ``given`` to it do not count.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._known: set[int] = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "trgnet" and all(a.is_meta for a in tree_leaves(args) if isinstance(a, Tensor)):
            with self:
                return func.redispatch(META, *args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size


class LargeTensors(TorchDispatchMode):
    """Keeps the storages, of at least ``elements`` elements, that operations make inside it."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)
        }
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in given and storage.size() >= self.elements * leaf.element_size():
                    self.storages[storage._cdata] = storage
        return result


class PoisonedMemory(TorchDispatchMode):
    """Fills every floating-point tensor that is allocated without values with NaN, so that what nobody wrote shows."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        empties = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
        if func._schema.name.removeprefix("aten::") in empties and result.is_floating_point():
            result.fill_(float("nan"))
        return result


class Conversions(TorchDispatchMode):
    """Records the shapes of tensors that are converted to another dtype or device."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return func(*args, **(kwargs or {}))
