"""What a half-precision operator computes in float32: sums over time and statistics.

float16 ends at 65504 and counts to 2048; both are short for sums over thousands of frames.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """float32 where ``x`` is in half precision, else its own dtype."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def widened(x: Tensor) -> Tensor:
    """``x`` in :func:`wide_dtype`."""
    return x.to(wide_dtype(x))


# Asked once: dynamo of torch 2.11 cannot trace torch.amp.is_autocast_available. Tensors on other devices, such as meta,
# know no autocast, and asking whether it is on there is an error.
_WITH_AUTOCAST = tuple(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla")
    if torch.amp.is_autocast_available(device)
)


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast converts to on a type of device; None where it is off."""
    on = device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def without_autocast(x: Tensor) -> Any:
    """A block in which autocast, if it is on for the device of ``x``, does not narrow what was widened."""
    device = x.device.type
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)
