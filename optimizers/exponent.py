"""Schedules of the exponent of SMES, with the protocol of torch's learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Exponent = Callable[[int], Any]


@dataclass
class Constant:
    """alpha at every step."""

    alpha: float

    def __call__(self, step: int) -> float:
        return self.alpha


@dataclass
class Linear:
    """From start to end along a line, over `steps` steps."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass
class Cosine:
    """From start to end along half a cosine, over `steps` steps."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        share = min(step / self.steps, 1.0)
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * share)) / 2


@dataclass
class Cyclic:
    """From low to high and back along a cosine, again every `period` steps."""

    low: float
    high: float
    period: int

    def __call__(self, step: int) -> float:
        return self.low + (self.high - self.low) * (1 - math.cos(2 * math.pi * step / self.period)) / 2


class ExponentSchedule:
    """Sets ``alpha`` of an optimizer's groups, stepped as a schedule of torch: once after every optimizer step or epoch.

        schedule = ExponentSchedule.cyclic(optimizer, low=0.3, high=0.7, period=1000)
        for batch in data:
            ...
            optimizer.step()
            schedule.step()

    Exponents that are tensors are filled in place, so that they stay in force in a captured graph.

    Args:
        optimizer: one whose groups have an ``alpha``.
        function: from the number of steps done to alpha (or to a pair, for GatedSMES); one for all groups, or a list of
            one for each.
        last_epoch: steps done so far; -1: none.

    Raises:
        TypeError: not an optimizer.
        ValueError: groups without alpha, or as many functions as there are not groups.

    Source: a cyclic exponent, arXiv 2509.04713 (abstract).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        function: Exponent | Sequence[Exponent],
        last_epoch: int = -1,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        if any("alpha" not in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no exponent: its groups lack alpha")
        groups = len(optimizer.param_groups)
        self.functions = [function] * groups if callable(function) else list(function)
        if len(self.functions) != groups:
            raise ValueError(f"Expected {groups} functions, but got {len(self.functions)}")
        self.optimizer = optimizer
        self.last_epoch = last_epoch
        self.step()

    @classmethod
    def constant(cls, optimizer: torch.optim.Optimizer, alpha: float) -> ExponentSchedule:
        """The same exponent at every step."""
        return cls(optimizer, Constant(alpha))

    @classmethod
    def linear(
        cls, optimizer: torch.optim.Optimizer, start: float, end: float, steps: int
    ) -> ExponentSchedule:
        """From `start` to `end` along a line over `steps` steps (at least 1), then `end`."""
        return cls(optimizer, Linear(start, end, _positive("steps", steps)))

    @classmethod
    def cosine(
        cls, optimizer: torch.optim.Optimizer, start: float, end: float, steps: int
    ) -> ExponentSchedule:
        """From `start` to `end` along half a cosine over `steps` steps (at least 1), then `end`."""
        return cls(optimizer, Cosine(start, end, _positive("steps", steps)))

    @classmethod
    def cyclic(
        cls, optimizer: torch.optim.Optimizer, low: float, high: float, period: int
    ) -> ExponentSchedule:
        """From `low` to `high` and back along a cosine, again every `period` steps (at least 1)."""
        return cls(optimizer, Cyclic(low, high, _positive("period", period)))

    def step(self, epoch: int | None = None) -> None:
        """Go on to the next exponent, or to that of step ``epoch``."""
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        for group, function in zip(self.optimizer.param_groups, self.functions):
            _set_alpha(group, function(self.last_epoch))

    def exponents(self) -> list[Any]:
        """The exponents of the next step, by group, as the functions give them; read from no device."""
        return [function(self.last_epoch) for function in self.functions]

    def get_last_alpha(self) -> list[Any]:
        """The exponents of the groups as they are in force."""
        return [group["alpha"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: the step, and the settings of functions that are objects; those of plain functions are not saved."""
        return {
            "last_epoch": self.last_epoch,
            "functions": [dict(vars(f)) if hasattr(f, "__dict__") else {} for f in self.functions],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; its exponents are in force at once."""
        for function, settings in zip(self.functions, state_dict["functions"], strict=True):
            if settings:
                vars(function).update(settings)
        self.step(state_dict["last_epoch"])


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def _set_alpha(group: dict[str, Any], alpha: Any) -> None:
    """Set the exponent, in place where it is a tensor; where there is a pair, one number is for both."""
    old = group["alpha"]
    if isinstance(old, (tuple, list)):
        new = alpha if isinstance(alpha, (tuple, list)) else (alpha, alpha)
        group["alpha"] = tuple(_filled(o, n) for o, n in zip(old, new, strict=True))
    else:
        group["alpha"] = _filled(old, alpha)


def _filled(old: Any, new: Any) -> Any:
    if not isinstance(old, Tensor):
        return new
    with torch.no_grad():
        old.fill_(new)
    return old
