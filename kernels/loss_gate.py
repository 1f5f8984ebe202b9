"""The loss gate: which of two phases an optimizer step is in, from its loss and an average of the losses before.

    average <- the average with this loss in it
    phase   <- 0 where loss < average, strictly, else 1

The average is that of an epoch or of the whole run (one rule: who starts an epoch resets it), of the last losses that
fit into a window, or exponential:

    mean:    average <- average + (loss - average) / count
    window:  the same until the window is full, then average <- average + (loss - oldest) / size
    ema:     average <- loss at first, then average + (loss - average) / (1 / share)

A loss that is not finite changes nothing. The first loss equals its average, so it chooses phase 1.

The control block holds the gate, float32 on the device: a step decides without asking the host. The average is kept as
the sum of two float32 numbers, the second of them the rounding error of the first, so that a decision does not depend
on how many losses came before. PyTorch and Triton do the same operations in the same order, and agree bit for bit on
every device: with additions and IEEE divisions alone. A multiplication would be fused with the addition after it by
Triton's compiler, and not by PyTorch.

Source: LCAM, arXiv 2309.02130, and its public code.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from .launch import device_function, tl

AVERAGES = ("mean", "window", "ema")
CONTROL = 8
"""Length of a control block: average, its rounding error, count, phase, steps in phase 0, in phase 1, place in the window
where the next loss goes, and one that is free."""
AVERAGE, REST, COUNT, PHASE, LOW_STEPS, HIGH_STEPS, PLACE = range(7)


def new_control(device: torch.device | str = "cpu") -> Tensor:
    """The control block (8,) of a gate that has seen no loss: phase 1."""
    control = torch.zeros(CONTROL, device=device)
    control[PHASE] = 1.0
    return control


def reset_average(control: Tensor, history: Optional[Tensor] = None) -> None:
    """Forget the losses, as at the start of an epoch; the phase stays."""
    control[:PHASE].zero_()
    control[PLACE].zero_()
    if history is not None:
        history.zero_()


def observed(
    control: Tensor, history: Optional[Tensor], loss: Tensor, average: str, share: float
) -> tuple[Tensor, Optional[Tensor]]:
    """The control block and the window after ``loss``.

    Args:
        control: Tensor (8,), float32.
        history: Tensor (W,), float32: the losses of a window; None for the other averages.
        loss: Tensor (), float32.
        average: one of :data:`AVERAGES`.
        share: weight of the newest loss in "ema".
    """
    mean, rest, count, place = control[AVERAGE], control[REST], control[COUNT], control[PLACE]
    distance = loss - mean - rest

    def number(value: float) -> Tensor:
        # torch divides by a tensor; by a Python number it multiplies with the reciprocal, on a GPU.
        return torch.full_like(loss, value)

    if average == "ema":
        change = torch.where(count == 0, distance, distance / (number(1.0) / number(share)))
    else:
        change = distance / (count + 1)
    after = history
    if average == "window":
        size = history.numel()
        oldest = history.gather(0, place.long()[None])[0]  # an index of one element would be read by the host
        change = torch.where(count < size, change, (loss - oldest) / number(size))
        is_place = torch.arange(size, device=history.device) == place
        after = torch.where(torch.isfinite(loss) & is_place, loss, history)
        place = torch.where(place + 1 < size, place + 1, 0)
        count = torch.clamp(count, max=size - 1)
    new_mean, new_rest = _two_sum(mean, rest + change)
    phase = torch.where(loss - new_mean < new_rest, 0.0, 1.0)
    new = torch.stack([new_mean, new_rest, count + 1, phase, control[LOW_STEPS], control[HIGH_STEPS], place,
                       control[PLACE + 1]])  # fmt: skip
    return torch.where(torch.isfinite(loss), new, control), after


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and its rounding error, exactly (D. Knuth, TAOCP 2, 4.2.2)."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


def stepped(control: Tensor, phase: Tensor) -> Tensor:
    """The control block after a step in ``phase`` (())."""
    counted = control.clone()
    counted[LOW_STEPS] += 1 - phase
    counted[HIGH_STEPS] += phase
    return counted


@device_function
def two_sum(a, b):
    """The rounded sum and its rounding error, exactly."""
    s = a + b
    b_part = s - a
    return s, (a - (s - b_part)) + (b - b_part)


@device_function
def is_finite(x):
    return tl.abs(x) < float("inf")


@device_function
def observe(mean, rest, count, phase, place, loss, history_ptr, window, share, KIND: tl.constexpr):
    """(average, rest, count, phase, place) after ``loss``; the window itself is not written."""
    distance = loss - mean - rest
    if KIND == "ema":
        change = tl.where(
            count == 0, distance, tl.div_rn(distance, tl.div_rn(1.0, tl.cast(share, tl.float32)))
        )
    else:
        change = tl.div_rn(distance, count + 1)
    new_place, new_count = place, count + 1
    if KIND == "window":
        size = tl.cast(window, tl.float32)
        oldest = tl.load(history_ptr + place.to(tl.int32))
        change = tl.where(count < size, change, tl.div_rn(loss - oldest, size))
        new_place = tl.where(place + 1 < size, place + 1, 0.0)
        new_count = tl.minimum(count, size - 1) + 1
    new_mean, new_rest = two_sum(mean, rest + change)
    new_phase = tl.where(loss - new_mean < new_rest, 0.0, 1.0)
    ok = is_finite(loss)
    return (
        tl.where(ok, new_mean, mean),
        tl.where(ok, new_rest, rest),
        tl.where(ok, new_count, count),
        tl.where(ok, new_phase, phase),
        tl.where(ok, new_place, place),
    )
