"""Dropout masks from a counter-based generator.

Element (n, c, t) of a mask depends only on the seed and on n, c and t. So a recomputed backward pass sees
the mask of the forward pass without storing it, padding a batch further changes no mask, and an
implementation on any device can draw the same one.

    key       = hash(hash(lower half of the seed) xor upper half)
    row[i]    = hash(key xor i),    i = n * C + c
    keep[i,t] = hash(row[i] xor hash(t + 2^30)) >= p * 2^32

``hash`` is the 32-bit finalizer "lowbias32" (C. Wellons, Prospecting for Hash Functions, 2018): shift-xor
16, multiply 0x7feb352d, shift-xor 15, multiply 0x846ca68b, shift-xor 16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .launch import constant, device_function, tl

_FRAME_OFFSET = 1 << 30  # frames and rows count in separate ranges, so that hash(t) never meets hash(i)
_KERNEL_FRAME_OFFSET = constant(_FRAME_OFFSET)


def dropout(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Zero elements of ``x`` (N, C, T) with probability ``p`` and scale the others by 1 / (1 - p).

    ``seed`` is a 0-dim int64 tensor on the device of ``x``; None switches dropout off.
    """
    if seed is None or p == 0.0:
        return x
    row = _rows(seed, x.shape[0] * x.shape[1]).view(*x.shape[:2], 1)
    frame = hash_bits(torch.arange(x.shape[2], dtype=torch.int32, device=x.device) + _FRAME_OFFSET)
    return x * _scaled_mask(hash_bits(row ^ frame), p, x.dtype)


def dropout_kept(x: Tensor, probabilities: Sequence[float], seeds: Tensor | None) -> list[Tensor | None]:
    """Which elements of ``x`` (N, C, T) each of several dropouts keeps, as uint8; None for one that is off.

    ``seeds`` (S,) belong to the S probabilities, or () to one. On a CPU only. What is kept is yet to be scaled, see
    :func:`dropout_scale`.
    """
    if seeds is None or not any(probabilities):
        return [None] * len(probabilities)
    n, c, t = x.shape
    # Vectors as short as these cost what their calls cost, which numpy's do less of than torch's.
    halves = seeds.reshape(-1, 1).contiguous().numpy().view(np.uint32)  # the lower one first
    keys = lowbias32(lowbias32(halves[:, 0]) ^ halves[:, 1])
    rows = _hashed_once_more(keys[:, None] ^ np.arange(n * c, dtype=np.uint32))
    bits = _second_step(rows.view(-1, n, c, 1) ^ _frame_bits(t))
    return [None if p == 0.0 else _kept(of_mask, p) for of_mask, p in zip(bits, probabilities)]


@lru_cache(maxsize=8)
def _frame_bits(t: int) -> Tensor:
    return _hashed_once_more(np.arange(t, dtype=np.uint32) + _FRAME_OFFSET)


def _hashed_once_more(x: np.ndarray) -> Tensor:
    """The hash, and the first step of the next one: that step is linear, so of a xor it is the xor of both."""
    bits = lowbias32(x)
    return torch.from_numpy((bits ^ (bits >> 16)).view(np.int32))


def _kept(bits: Tensor, p: float) -> Tensor:
    """Where a hash, whose last step is to be done, is at least p * 2^32; changes the bits."""
    threshold = _threshold(p)
    # The last step changes the lower 16 bits alone, of which a comparison with a multiple of 2^16 sees nothing.
    if threshold % 2**16 != 0:
        bits = _last_step(bits)
    return bits.ge_(threshold).to(torch.uint8)


def only(x: Tensor, kept: Tensor | None) -> Tensor:
    """x in place, zero where :func:`dropout_kept` says that it is not kept."""
    return x if kept is None else x.mul_(kept)


def dropout_scale(p: float, seed: Tensor | None) -> float:
    """1 / (1 - p), or 1 where dropout is off."""
    return 1.0 if seed is None else 1.0 / (1.0 - p)


def channel_mask(n: int, c: int, p: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Factors (N, C) of whole (n, c) planes: 0 with probability ``p``, else 1 / (1 - p). None where dropout is off."""
    if seed is None or p == 0.0:
        return None
    return _scaled_mask(_rows(seed, n * c).view(n, c), p, dtype)


def dropout_arguments(p: float, seed: Tensor | None) -> tuple[Tensor | None, int, float]:
    """What a kernel is told: the seed (None: no dropout, which then costs nothing), the threshold and the scale."""
    return (None if p == 0.0 else seed), _threshold(p), 1.0 / (1.0 - p)


@device_function
def dropout_rows(seed_ptr, rows):
    """Hashed rows [X] of the mask of a kernel."""
    seed = tl.load(seed_ptr)
    key = kernel_hash(kernel_hash(seed.to(tl.uint32)) ^ (seed >> 32).to(tl.uint32))
    return kernel_hash(key ^ rows.to(tl.uint32))


@device_function
def dropped(x, rows, t, threshold, scale):
    """The dropout of x [X, Y], of hashed rows [X] (:func:`dropout_rows`) and frames t [Y]."""
    bits = kernel_hash(rows[:, None] ^ kernel_hash((t + _KERNEL_FRAME_OFFSET).to(tl.uint32))[None, :])
    return tl.where(bits.to(tl.int32, bitcast=True) >= threshold, x * tl.cast(scale, tl.float32), 0.0)


def lowbias32(x):
    """The hash of uint32 numbers, of numpy or of a kernel."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


kernel_hash = device_function(lowbias32)


def check_probability(operator_name: str, name: str, p: float) -> None:
    """Raise ValueError unless 0 <= p < 1."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{operator_name}: {name} is {p}, expected a probability in [0, 1)")


def _rows(seed: Tensor, count: int) -> Tensor:
    # A 64-bit seed enters as its two halves, so that seeds differing only in the upper one differ too.
    key = hash_bits(hash_bits(_low_half(seed)) ^ _low_half(seed >> 32))
    return hash_bits(key ^ torch.arange(count, dtype=torch.int32, device=seed.device))


def _low_half(value: Tensor) -> Tensor:
    """The lower 32 bits of an int64 tensor as int32 (two's complement)."""
    return ((value + 2**31) % 2**32 - 2**31).to(torch.int32)


def _scaled_mask(bits: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    # In place, as integers: on a CPU twice as fast as by way of a bool tensor.
    return bits.ge_(_threshold(p)).to(dtype).div_(1.0 - p)


def _threshold(p: float) -> int:
    """int32 bits are uniform on [-2^31, 2^31): the same comparison as unsigned bits >= p * 2^32."""
    return min(round(p * 2**32), 2**32 - 1) - 2**31


def hash_bits(x: Tensor) -> Tensor:
    """lowbias32 on int32 tensors; the masks make torch's arithmetic right shift a logical one."""
    return _last_step(_second_step(_last_step(x)))


def _second_step(x: Tensor) -> Tensor:
    """The middle of lowbias32, with both multiplications; changes x."""
    x.mul_(0x7FEB352D)
    return (x >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(x).mul_(0x846CA68B - 2**32)


def _last_step(x: Tensor) -> Tensor:
    """The last step of lowbias32, which is the first one too."""
    return (x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x)
