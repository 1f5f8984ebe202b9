"""Number formats: how the bits of a register are read as numbers, and written.

Registers are arrays of unsigned integers of their width, one element a thread; predicates are arrays of bool.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RAW = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
"""Unsigned integers by bytes."""

KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
DTYPES = {
    f"{kind}{8 * size}": np.dtype(f"{KINDS[kind]}{size}")
    for kind in KINDS
    for size in (1, 2, 4, 8)
    if (kind, size) != ("f", 1)
}
"""NumPy's dtype of every type that NumPy has."""


def bfloat16_to_float32(bits: Array) -> Array:
    """The value of 16-bit patterns."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float32_to_bfloat16(values: Array) -> Array:
    """The nearest 16-bit patterns, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded.astype(np.uint16))


def round_to_tf32(bits: Array) -> Array:
    """float32 patterns with 10 bits of mantissa: the nearest, ties away from zero (``cvt.rna.tf32``)."""
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def tf32_to_float32(bits: Array) -> Array:
    """What matrix units read of float32 patterns: the low 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def float16_to_float32(bits: Array) -> Array:
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def float32_to_float16(values: Array) -> Array:
    return np.asarray(values).astype(np.float16).view(np.uint16)


def halves(bits: Array) -> Array:
    """(2, n): the lower and the upper 16 bits."""
    return np.stack([bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)])


def joined(parts: Array) -> Array:
    """32-bit patterns of (lower, upper) 16 bits."""
    return parts[0].astype(np.uint32) | (parts[1].astype(np.uint32) << np.uint32(16))


_DECODERS: dict[str, Callable[[Array], Array]] = {
    "f16": float16_to_float32,
    "bf16": bfloat16_to_float32,
    "f16x2": lambda bits: float16_to_float32(halves(bits)),
    "bf16x2": lambda bits: bfloat16_to_float32(halves(bits)),
    "tf32": tf32_to_float32,
    "pred": lambda bits: bits,
}
_ENCODERS: dict[str, Callable[[Array], Array]] = {
    "f16": float32_to_float16,
    "bf16": float32_to_bfloat16,
    "f16x2": lambda values: joined(float32_to_float16(values)),
    "bf16x2": lambda values: joined(float32_to_bfloat16(values)),
    "pred": lambda values: values,
}


def decode(bits: Array, kind: str) -> Array:
    """Numbers of a type from bits of its width; float32 where NumPy lacks the type, (2, n) of a pair."""
    decoder = _DECODERS.get(kind)
    return bits.view(DTYPES[kind]) if decoder is None else decoder(bits)


def encode(values: Array, kind: str) -> Array:
    """Bits of numbers of a type."""
    encoder = _ENCODERS.get(kind)
    if encoder is not None:
        return encoder(values)
    dtype = DTYPES[kind]
    return np.ascontiguousarray(values, dtype).view(RAW[dtype.itemsize])
