"""What the kernels over (features, frames) share: how a sequence is divided, and loads of tiles and weights.

A program works on all features of one tile of frames of a sequence, or of some consecutive ones. So a product with a
square weight is one product of tiles, and a sum over time is a sum over the programs of a sequence, whose parts are added
up in a fixed order. Tiles depend on precision and backend, but programs are not counted by the device's processors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import (
    TILE_LIMIT,
    Target,
    cdiv,
    device_function,
    dot_precision,
    exact_float32,
    power_of_two,
    target_of,
    tl,
    unit,
)

MOST_FEATURES = 64
PROGRAMS = 264
"""As many as the GPUs of today run at a time, twice: more would only leave more parts to be added up."""
MOST_PARTS = 128
"""Of a sequence, where programs have several tiles: every part is read again, by as many programs or by a sum."""


def split(x: Tensor, frames: int, programs: int = PROGRAMS) -> tuple[int, int]:
    """(programs per sequence, tiles of ``frames`` frames per program) for x (N, F, T), none of them empty."""
    n, _, t = x.shape
    tiles = cdiv(t, frames)
    parts = min(tiles, max(1, cdiv(programs, n)), MOST_PARTS)
    steps = cdiv(tiles, parts)
    return cdiv(tiles, steps), steps


def tile_constants(x: Tensor, frames: int) -> dict[str, object]:
    """The constants of a launch on x (N, F, T) with tiles of ``frames`` frames."""
    return {
        "F": x.shape[1], "BF": power_of_two(x.shape[1], 16), "BT": frames, "UNIT": unit(x.shape[2]), "PRECISION": dot_precision(x),
    }  # fmt: skip


def wide_precision(x: Tensor) -> str:
    """``input_precision`` of products of float32 tiles beside x: tf32 where x itself is in half precision."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    return "tf32" if half and target_of(x).backend == "cuda" else dot_precision(x)


def needs_split_products(x: Tensor) -> bool:
    """Whether products take three tf32 ones, whose operands want three times the room."""
    return x.dtype == torch.float32 and exact_float32() and target_of(x).backend == "cuda"


def warps(x: Tensor, threads: int = 256) -> int:
    """Warps that have so many threads."""
    return threads // (64 if target_of(x).backend == "hip" else 32)


def one_warpgroup(x: Tensor) -> bool:
    """Return whether products of weights and tiles of frames take four warps: on Hopper.

    Its matrix instruction multiplies 64 rows with four warps, one warpgroup. More warpgroups divide the columns, and each
    needs at least 16: for eight columns of float32, Triton allocates less shared memory than the instruction reads
    (triton issue 10629). So tiles of 16 frames take four warps, and eight warps take tiles of 32 frames or more.
    ``python -m bench.compiled`` and tests/test_compiled.py look for such instructions in the compiled code.
    """
    return target_of(x) == Target("cuda", 90)


def product_warps(x: Tensor) -> int:
    """Return the warps of kernels that multiply weights with tiles of frames: one warpgroup on Hopper, else 256 threads."""
    return 4 if one_warpgroup(x) else warps(x)


def unsupported_frames(x: Tensor, *_: object) -> str | None:
    """Why there are no kernels for x (N, F, T); None if there are."""
    _, f, t = x.shape
    if f % 8 or not 8 <= f <= MOST_FEATURES:
        return f"there are {f} features; the kernels need a multiple of 8 up to {MOST_FEATURES}"
    if f * t >= TILE_LIMIT:
        return f"{f} features and {t} frames exceed 32-bit offsets within a sequence; split the sequence"
    return None


def split_gradients(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the parameters, which lie behind each other in ``flat``: views of it in its own dtype."""
    parts = flat.split([parameter.numel() for parameter in parameters])
    return [
        part.view(parameter.shape).to(parameter.dtype)
        for part, parameter in zip(parts, parameters, strict=True)
    ]


@device_function
def sequence_and_part(P):
    """Sequence (64 bits wide) and part of it of this program, of P parts per sequence."""
    return (tl.program_id(0) // P).to(tl.int64), tl.program_id(0) % P


@device_function
def load_frames(x_ptr, o_f, t, F, T):
    """Tile [BF, BT] of a sequence (F, T) at frames t, which may be outside of it: there it is zero."""
    inside = (o_f < F)[:, None] & ((t >= 0) & (t < T))[None, :]
    return tl.load(x_ptr + (o_f[:, None] * T + t[None, :]), mask=inside, other=0.0)


@device_function
def store_frames(x_ptr, x, o_f, t, F, T):
    """Store a tile, in the dtype of the tensor."""
    inside = (o_f < F)[:, None] & (t < T)[None, :]
    tl.store(x_ptr + (o_f[:, None] * T + t[None, :]), x.to(x_ptr.dtype.element_ty), mask=inside)


@device_function
def load_real(mask_ptr, t, T):
    """Which of the frames t of a sequence are real: [BT]."""
    inside = (t >= 0) & (t < T)
    return inside & (tl.load(mask_ptr + t, mask=inside, other=0) != 0)


@device_function
def load_vector(ptr, o_f, F):
    """[BF] in float32."""
    return tl.load(ptr + o_f, mask=o_f < F, other=0.0).to(tl.float32)


@device_function
def load_matrix(ptr, o_r, o_c, F, row, column, dtype: tl.constexpr):
    """[BF, BF] of an (F, F) matrix with these strides, in ``dtype``; zero outside."""
    inside = (o_r < F)[:, None] & (o_c < F)[None, :]
    return tl.load(ptr + (o_r[:, None] * row + o_c[None, :] * column), mask=inside, other=0.0).to(dtype)


@device_function
def store_packed(packed_ptr, weight, i, count, BF: tl.constexpr):
    """Store [BF, BF] as number ``i`` of ``count`` packed matrices, and its transpose ``count`` behind it.

    Loaded as they are, without masks and conversions, packed matrices go straight to shared memory.
    """
    o_f = tl.arange(0, BF)
    packed_ptr += i * (BF * BF)
    tl.store(packed_ptr + (o_f[:, None] * BF + o_f[None, :]), weight)
    tl.store(packed_ptr + count * (BF * BF) + (o_f[None, :] * BF + o_f[:, None]), weight)


@device_function
def load_packed(packed_ptr, i: tl.constexpr, BF: tl.constexpr):
    """One of the packed matrices [BF, BF]."""
    o_f = tl.arange(0, BF)
    return tl.load(packed_ptr + (i * (BF * BF) + o_f[:, None] * BF + o_f[None, :]))


@device_function
def store_matrix(ptr, x, o_r, o_c, F, row, column):
    """Store [BF, BF] as an (F, F) matrix with these strides."""
    inside = (o_r < F)[:, None] & (o_c < F)[None, :]
    tl.store(ptr + (o_r[:, None] * row + o_c[None, :] * column), x, mask=inside)


@device_function
def store_gradients(ptr, weight, bias, offset, o_f, F):
    """Store the gradients of a square weight and, ``offset`` behind its start, of a bias."""
    store_matrix(ptr, weight, o_f, o_f, F, F, 1)
    tl.store(ptr + offset + o_f, bias, mask=o_f < F)
