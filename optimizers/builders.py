"""Builds an optimizer or a learning-rate schedule from its name and plain numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from trgnet.kernels.moment_update import fused_obstacle
from trgnet.kernels.verification import auto_verified

from .exponent import ExponentSchedule
from .lcam import LCAM
from .smes import SMES, GatedSMES

OPTIMIZERS: tuple[str, ...] = ("adam", "adamw", "sgd", "lcam", "smes", "gated_smes")
SCHEDULES: tuple[str, ...] = ("constant", "cosine", "linear", "step")
SCHEDULES_OF_ALL_STEPS: tuple[str, ...] = ("cosine", "linear")
"""Those under which another number of steps in all is another learning rate at every step."""
EXPONENT_SCHEDULES: tuple[str, ...] = ("constant", "linear", "cosine", "cyclic")


def build_optimizer(
    params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
    *,
    name: str,
    lr: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    momentum: float = 0.9,
    momenta: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    alpha: float = 0.5,
    alphas: tuple[float, float] | None = None,
    average: str = "epoch",
    gate: str = "next",
    window: int = 100,
    smoothing: float = 0.98,
    capturable: bool = False,
) -> torch.optim.Optimizer:
    """Build an optimizer of ``torch.optim`` or of this package.

    What an optimizer has no use for is ignored. Torch's own are fused. On a GPU a step waits for nothing: the learning rate
    is a tensor there, which a schedule fills in place, and a step with gradients that overflowed in float16 is skipped on the
    device. Those of this package need Triton for that, and are fused then; without it they work on lists of tensors, and in
    float16 torch's GradScaler waits for the device before each of their steps.

    Args:
        params: parameters or, as every optimizer of torch takes them, groups of lists of them.
        name: ``"adam"`` (weight decay is an L2 term of the gradient), ``"adamw"`` (decoupled weight decay),
            ``"sgd"`` (with momentum, L2), ``"lcam"``, ``"smes"`` or ``"gated_smes"`` (:class:`~trgnet.optimizers.LCAM`,
            :class:`~trgnet.optimizers.SMES`, :class:`~trgnet.optimizers.GatedSMES`; L2).
        lr: learning rate, per step.
        weight_decay: 0 by default, and honoured when set, by each of them.
        betas: decay rates of the two moving averages of Adam, AdamW and SMES; GatedSMES takes the second.
        momentum: momentum of SGD.
        momenta: those of LCAM, and first decay rates of GatedSMES: where the loss is below its average, and otherwise.
        eps: added to the denominator of Adam, AdamW, SMES and GatedSMES.
        alpha: exponent of SMES and GatedSMES.
        alphas: two exponents of GatedSMES, chosen as `momenta` are; None: `alpha` for both.
        average, gate, window, smoothing: how the loss decides, in LCAM and GatedSMES.
        capturable: whether steps may be recorded in a CUDA graph, on a GPU. The result is the same. Those of this
            package's optimizers always may.

    Raises:
        ValueError: for an unknown name, and by torch for numbers outside an optimizer's range.
    """
    params = list(params)
    on_gpu = _on_gpu(params)
    if name in ("lcam", "smes", "gated_smes"):
        gated = {
            "momenta": momenta,
            "average": average,
            "gate": gate,
            "window": window,
            "smoothing": smoothing,
        }
        options = {
            "lcam": gated,
            "smes": {"betas": betas, "eps": eps, "alpha": alpha},
            "gated_smes": {**gated, "beta2": betas[1], "eps": eps, "alpha": alphas or alpha},
        }[name]
        return _moment_optimizer(params, name, lr, on_gpu, weight_decay=weight_decay, **options)
    if name == "sgd":
        optimizer = torch.optim.SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    elif name in ("adam", "adamw"):
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
        capturable = capturable and on_gpu
        optimizer = kind(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, capturable=capturable, fused=True
        )
        optimizer._warned_capturable_if_run_uncaptured = True  # steps of either kind are meant
    else:
        raise ValueError(_unknown("optimizer", name, OPTIMIZERS))
    if on_gpu:
        _keep_on_gpu(optimizer)
    return optimizer


def _moment_optimizer(
    params: Sequence[torch.Tensor] | Sequence[dict[str, Any]],
    name: str,
    lr: float,
    on_gpu: bool,
    **options: Any,
) -> torch.optim.Optimizer:
    kind = {"lcam": LCAM, "smes": SMES, "gated_smes": GatedSMES}[name]
    if not on_gpu:
        return kind(params, lr=lr, **options)
    groups = params if isinstance(params[0], dict) else [{"params": params}]
    # A schedule computes with the number that it finds under "initial_lr"; "lr" becomes a tensor.
    groups = [{"initial_lr": group.get("lr", lr), **group} for group in groups]
    tensors = _tensors(params)
    fused = fused_obstacle(tensors) is None and auto_verified("moment_update", tensors)
    return kind(groups, lr=lr, capturable=True, fused=fused, foreach=not fused, **options)


def _tensors(params: Sequence[torch.Tensor] | Sequence[dict[str, Any]]) -> list[torch.Tensor]:
    groups = [entry["params"] if isinstance(entry, dict) else [entry] for entry in params]
    return [param for group in groups for param in group]


def _on_gpu(params: Sequence[torch.Tensor] | Sequence[dict[str, Any]]) -> bool:
    return all(param.is_cuda for param in _tensors(params))


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


def build_exponent_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    alpha: float | tuple[float, float],
    steps: int,
    final: float = 0.5,
    period: int = 1,
) -> ExponentSchedule:
    """Build a schedule of SMES's exponent that is stepped once after every optimizer step.

    Args:
        optimizer: one whose groups have an ``alpha``.
        name: one of :data:`EXPONENT_SCHEDULES`: always `alpha`; from `alpha` to `final` along a line, or along half a
            cosine; from `alpha` to `final` and back along a cosine, again and again.
        alpha: the exponent of the first step; a pair (for GatedSMES) can only be constant.
        steps: optimizer steps of the whole training, at least 1. Past them "linear" and "cosine" stay at `final`.
        final: the other exponent.
        period: steps from `alpha` to `final` and back in "cyclic", at least 1.

    Raises:
        ValueError: for an unknown name, numbers out of range, a pair that is to change, or an optimizer without exponent.
    """
    if name == "constant":
        return ExponentSchedule.constant(optimizer, alpha)
    if isinstance(alpha, (tuple, list)):
        raise ValueError(f"a pair of exponents can only be constant, got {alpha} for a {name!r} schedule")
    if name == "linear":
        return ExponentSchedule.linear(optimizer, alpha, final, steps)
    if name == "cosine":
        return ExponentSchedule.cosine(optimizer, alpha, final, steps)
    if name == "cyclic":
        return ExponentSchedule.cyclic(optimizer, alpha, final, period)
    raise ValueError(_unknown("exponent schedule", name, EXPONENT_SCHEDULES))


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
