"""The parameters that take part in an optimizer step, kept from one step to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import is_, is_not, itemgetter
from typing import Any

from torch import Tensor


@dataclass(slots=True)
class Entry:
    """A parameter that takes part in a step."""

    index: int
    """Among all parameters."""
    group: int
    param: Tensor
    state: dict[str, Any]


class Participants:
    """Parameters with a gradient, and their state.

    Collecting them takes several lookups for each parameter, in Python. :meth:`are_current` instead passes over each list
    in C, so that a step that finds the same objects costs the host little.

    Args:
        groups: the parameter groups of the optimizer.
        grads: the gradient of each parameter, None if it has none.
        state: the state of the optimizer, of every parameter with a gradient.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        self._lists = [list(group["params"]) for group in groups]
        self._present = _present(grads)
        self._states = list(state.values())
        members = [(i, p) for i, params in enumerate(self._lists) for p in params]
        self.entries = [
            Entry(index, group, p, state[p])
            for index, ((group, p), here) in enumerate(zip(members, self._present, strict=True))
            if here
        ]
        self.params = [entry.param for entry in self.entries]
        self._used = [entry.state for entry in self.entries]
        self._steps = self.tensors("step")

    def are_current(
        self,
        groups: Sequence[dict[str, Any]],
        grads: Sequence[Tensor | None],
        state: Mapping[Tensor, dict[str, Any]],
    ) -> bool:
        """Whether a step with these arguments has the same parameters, in the same groups, with the same state."""
        return (
            _present(grads) == self._present
            and len(groups) == len(self._lists)
            and all(_same(group["params"], known) for group, known in zip(groups, self._lists))
            and _same(state.values(), self._states)
            and all(self._used)  # an empty one is to be made
            and _same(self.tensors("step"), self._steps)
        )

    def tensors(self, name: str) -> list[Tensor]:
        """The tensor of that name in the state of each parameter."""
        return list(map(itemgetter(name), self._used))

    def optional_tensors(self, name: str) -> list[Tensor | None]:
        """The same, None for parameters without it."""
        return [state.get(name) for state in self._used]

    def gradients(self, grads: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """Those of the parameters that take part."""
        return grads if len(grads) == len(self.entries) else [g for g in grads if g is not None]


def _present(grads: Sequence[Tensor | None]) -> list[bool]:
    return list(map(is_not, grads, repeat(None)))


def _same(now: Any, then: Sequence[Any]) -> bool:
    """Whether both hold the same objects: == would compare the values of tensors."""
    return len(now) == len(then) and all(map(is_, now, then))
