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


def without_autocast(x: Tensor) -> Any:
    """A block in which autocast, if it is on for the device of ``x``, does not narrow what was widened."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
