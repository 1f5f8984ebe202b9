"""Builds an optimizer or a learning-rate schedule from its name and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

OPTIMIZERS: tuple[str, ...] = ("adam", "adamw", "sgd")
SCHEDULES: tuple[str, ...] = ("constant", "cosine", "linear", "step")
SCHEDULES_OF_ALL_STEPS: tuple[str, ...] = ("cosine", "linear")
"""Those under which another number of steps in all is another learning rate at every step."""


def build_optimizer(
    params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
    *,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
) -> torch.optim.Optimizer:
    """Build an optimizer of ``torch.optim``.

    Args:
        params: parameters or parameter groups, as every optimizer of torch takes them.
        name: ``"adam"`` (weight decay is an L2 term of the gradient), ``"adamw"`` (decoupled weight decay)
            or ``"sgd"`` (with momentum, L2).
        lr: learning rate, per step.
        weight_decay: 0 by default, and honoured when set, by each of them.
        betas: decay rates of Adam's and AdamW's two moving averages; SGD has no use for them.
        momentum: momentum of SGD; Adam and AdamW have no use for it.

    Raises:
        ValueError: for an unknown name, and by torch for numbers outside an optimizer's range.
    """
    if name == "adam":
        return torch.optim.Adam(params, lr=lr, betas=betas, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=weight_decay)
    if name == "sgd":
        return torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    raise ValueError(_unknown("optimizer", name, OPTIMIZERS))


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    steps: int,
    warmup_steps: int = 0,
    final: float = 0.0,
    step_size: int = 1,
    step_factor: float = 0.1,
) -> LambdaLR:
    """Build a schedule that is stepped once after every optimizer step.

    The learning rate of step i (from 0) is the optimizer's own times a factor. During warm-up the factor is
    ``(i + 1) / (warmup_steps + 1)``; after it, with p the share of the remaining steps that is done:

    * ``"constant"``: 1;
    * ``"cosine"``: from 1 to `final` along half a cosine;
    * ``"linear"``: from 1 to `final` along a line;
    * ``"step"``: ``step_factor ** (i // step_size)``.

    The state of the schedule is plain numbers, so a checkpoint of it loads with ``weights_only=True``.

    Args:
        optimizer: its learning rates are taken as those of factor 1.
        name: one of :data:`SCHEDULES`.
        steps: optimizer steps of the whole training, at least 1. Past them the factor stays where it is.
        warmup_steps: steps of linear warm-up, from 0 (none) to `steps`.
        final: factor at the end of "cosine" and "linear".
        step_size: steps between two drops of "step", counted from the start of the training.
        step_factor: what each drop of "step" multiplies the learning rate by.

    Raises:
        ValueError: for an unknown name or numbers out of range.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0 <= warmup_steps <= steps:
        raise ValueError(f"warmup_steps must be between 0 and steps ({steps}), got {warmup_steps}")
    if step_size < 1:
        raise ValueError(f"step_size must be at least 1, got {step_size}")

    after_warmup = _factor(name, steps, warmup_steps, final, step_size, step_factor)

    def factor(step: int) -> float:
        return (step + 1) / (warmup_steps + 1) if step < warmup_steps else after_warmup(step)

    return LambdaLR(optimizer, factor)


def _factor(
    name: str, steps: int, warmup_steps: int, final: float, step_size: int, step_factor: float
) -> Callable[[int], float]:
    def progress(step: int) -> float:
        return min((step - warmup_steps) / max(steps - warmup_steps, 1), 1.0)

    factors: dict[str, Callable[[int], float]] = {
        "constant": lambda step: 1.0,
        "cosine": lambda step: final + (1 - final) * (1 + math.cos(math.pi * progress(step))) / 2,
        "linear": lambda step: 1 + (final - 1) * progress(step),
        "step": lambda step: step_factor ** (step // step_size),
    }
    if name not in factors:
        raise ValueError(_unknown("schedule", name, SCHEDULES))
    return factors[name]


def _unknown(kind: str, name: str, known: tuple[str, ...]) -> str:
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}: expected one of {', '.join(known)}{hint}"
