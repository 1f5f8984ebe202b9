"""Builds an optimizer or a learning-rate schedule from its name and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimizer of ``torch.optim``.

    On a GPU its step is fused and waits for nothing: the learning rate is a tensor there, which a
    schedule fills in place, and a step with gradients that overflowed in float16 is skipped on the device.

    Args:
        params: parameters or, as every optimizer of torch takes them, groups of lists of them.
        name: ``"adam"`` (weight decay is an L2 term of the gradient), ``"adamw"`` (decoupled weight decay)
            or ``"sgd"`` (with momentum, L2).
        lr: learning rate, per step.
        weight_decay: 0 by default, and honoured when set, by each of them.
        betas: decay rates of Adam's and AdamW's two moving averages; SGD has no use for them.
        momentum: momentum of SGD; Adam and AdamW have no use for it.
        capturable: whether steps may be recorded in a CUDA graph, on a GPU. The result is the same.

    Raises:
        ValueError: for an unknown name, and by torch for numbers outside an optimizer's range.
    """
    params = list(params)
    on_gpu = _on_gpu(params)
    fused = {"fused": True} if on_gpu else {}
    if name == "sgd":
        optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, **fused)
    elif name in ("adam", "adamw"):
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        capturable = capturable and on_gpu
        optimizer = kind(
            params, lr=lr, betas=betas, weight_decay=weight_decay, capturable=capturable, **fused
        )
        optimizer._warned_capturable_if_run_uncaptured = True  # steps of either kind are meant
    else:
        raise ValueError(_unknown("optimizer", name, OPTIMIZERS))
    if on_gpu:
        _keep_on_gpu(optimizer)
    return optimizer


def _on_gpu(params: Sequence[torch.Tensor] | Sequence[dict[str, Any]]) -> bool:
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in params]
    return all(param.is_cuda for group in groups for param in group)


def _keep_on_gpu(optimizer: torch.optim.Optimizer) -> None:
    """Put what a step reads where the step is done."""
    for group in optimizer.param_groups:
        # A schedule computes with the number that it finds under "initial_lr".
        group["initial_lr"] = group["lr"]
        group["lr"] = torch.full((), group["lr"], dtype=torch.float32, device=group["params"][0].device)
        # torch makes the momentum in the first step, and without values where that one is skipped.
        if group.get("momentum"):
            for param in group["params"]:
                optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)


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

    Every step counts, those included that were skipped because a gradient overflowed in float16: to ask whether
    one was would be to wait for the device.

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


def learning_rates(schedule: LambdaLR) -> list[float]:
    """The learning rates of the next step, by parameter group, as numbers; read from no device."""
    return [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]


def training_state(schedule: LambdaLR) -> dict[str, dict[str, Any]]:
    """The states of a schedule and of its optimizer, under "schedule" and "optimizer".

    Learning rates are plain numbers, wherever the optimizer keeps its own: a checkpoint loads with
    ``weights_only=True``, and on another device.
    """
    rates, state = learning_rates(schedule), schedule.optimizer.state_dict()
    groups = [{**group, "lr": rate} for group, rate in zip(state["param_groups"], rates, strict=True)]
    return {
        "optimizer": {**state, "param_groups": groups},
        "schedule": {**schedule.state_dict(), "_last_lr": rates},
    }


def load_training_state(schedule: LambdaLR, state: dict[str, dict[str, Any]]) -> None:
    """Continue from a :func:`training_state`, with the settings and on the device that the optimizer has now.

    Where base learning rates or factors are others than they were, they hold from the next step on.

    Raises:
        KeyError, ValueError, TypeError: it is no such state, or of other parameters.
    """
    optimizer, saved = schedule.optimizer, state["optimizer"]
    base = [group["initial_lr"] for group in optimizer.param_groups]
    kept = ("params", *getattr(optimizer, "group_state", ()))
    groups = [
        {**group, **{name: theirs[name] for name in kept if name in theirs}}
        for group, theirs in zip(optimizer.param_groups, saved["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**saved, "param_groups": groups})
    schedule.load_state_dict(state["schedule"])
    schedule.base_lrs = base
    schedule._last_lr = learning_rates(schedule)
    for group, rate in zip(optimizer.param_groups, schedule._last_lr, strict=True):
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


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
