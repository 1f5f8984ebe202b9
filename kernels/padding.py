"""Zeros on padded frames, in the passes of CPUs: they cost nothing in a batch that has none."""

from __future__ import annotations

import torch
from torch import Tensor


def real_frames(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A mask in `dtype`, 1 on real frames and 0 on padded ones; None where all frames are real."""
    return None if mask.all() else mask.to(dtype)


def masked(x: Tensor, real: Tensor | None) -> Tensor:
    """x, zero on padded frames: a new tensor, or x itself where there are none."""
    return x if real is None else x * real


def masked_(x: Tensor, real: Tensor | None) -> Tensor:
    """:func:`masked`, in place."""
    return x if real is None else x.mul_(real)
