"""The emulator of PTX: instructions against NumPy, and the faults that it must find in small programs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from ptx import Deadlock, Findings, GlobalMemory, UnsupportedPTX, launch
from ptx.findings import (
    MISALIGNED,
    NOT_AWAITED,
    NOT_FENCED,
    OUT_OF_BOUNDS,
    RACE,
    UNINITIALISED,
)
from ptx.numbers import bfloat16_to_float32, float32_to_bfloat16, round_to_tf32

REGISTERS = ".reg .pred %p<9>; .reg .b16 %rs<99>; .reg .b32 %r<999>; .reg .b64 %rd<99>;"
WARP = 32


def module(body: str, pointers: int) -> str:
    """A kernel with this body and so many pointers: %rd1, %rd2, ..."""
    parameters = ",\n".join(f"\t.param .u64 .ptr .global .align 1 k_param_{i}" for i in range(pointers))
    loads = "".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];\n" for i in range(pointers))
    return f".visible .entry k(\n{parameters}\n)\n{{\n{REGISTERS}\n{loads}{body}\nret;\n}}\n"


def run(body: str, *arrays: np.ndarray, warps: int = 1, shared: int = 0, blocks: int = 1) -> Findings:
    """Run a body on arrays, which it changes in place."""
    memory = GlobalMemory(Findings())
    addresses = [memory.place(array.view(np.uint8).reshape(-1)) for array in arrays]
    launch(module(body, len(arrays)), (blocks,), addresses, memory, shared=shared, warps=warps)
    for array, address in zip(arrays, addresses):
        array[...] = memory.read(address, array.nbytes).view(array.dtype).reshape(array.shape)
    return memory.findings


def computed(text: str, *operands: np.ndarray, dtype: type = np.uint32) -> np.ndarray:
    """What an instruction computes: result %r1 (%rd80 of 64 bits, %rs1 of 16), operands %r2, %r3, %r4 of 32 bits."""
    out = np.zeros(WARP, dtype)
    inputs = [np.ascontiguousarray(x).view(np.uint32) for x in operands]
    lines = ["mov.u32 %r90, %tid.x;", "mul.wide.u32 %rd90, %r90, 4;"]
    for i in range(len(inputs)):
        lines += [f"add.s64 %rd91, %rd{i + 2}, %rd90;", f"ld.global.b32 %r{i + 2}, [%rd91];"]
    register = {2: "%rs1", 4: "%r1", 8: "%rd80"}[out.itemsize]
    lines += [
        text,
        f"mul.wide.u32 %rd90, %r90, {out.itemsize};",
        "add.s64 %rd91, %rd1, %rd90;",
        f"st.global.b{8 * out.itemsize} [%rd91], {register};",
    ]
    assert not run("\n".join(lines), out, *inputs).found
    return out


RANDOM = np.random.default_rng(0)
BITS = RANDOM.integers(0, 2**32, (3, WARP), dtype=np.uint64).astype(np.uint32)
SIGNED = BITS.view(np.int32)
FLOATS = RANDOM.standard_normal((3, WARP)).astype(np.float32) * 100
FLOATS[0, :4] = np.nan, np.inf, -np.inf, 0.0
FLOATS[1, 2:6] = np.nan, np.nan, 1.0, -0.0
SHIFTS = np.arange(WARP, dtype=np.uint32) * 2  # some beyond the register


def each(function, *operands: np.ndarray) -> list[int]:
    """Python's integers, lane by lane."""
    return [function(*(int(x) for x in lane)) for lane in zip(*operands)]


def mod(values: list[int], bits: int = 32) -> np.ndarray:
    return np.array([value % 2**bits for value in values], f"u{bits // 8}")


INTEGERS = {
    "add.s32 %r1, %r2, %r3": (BITS, lambda: mod(each(int.__add__, *BITS[:2]))),
    "sub.s32 %r1, %r2, 7": (BITS, lambda: mod(each(lambda a: a - 7, BITS[0]))),
    "mul.lo.s32 %r1, %r2, %r3": (BITS, lambda: mod(each(int.__mul__, *BITS[:2]))),
    "mul.hi.u32 %r1, %r2, %r3": (BITS, lambda: mod(each(lambda a, b: a * b >> 32, *BITS[:2]))),
    "mul.hi.s32 %r1, %r2, %r3": (BITS, lambda: mod(each(lambda a, b: a * b >> 32, *SIGNED[:2]))),
    "mad.lo.s32 %r1, %r2, %r3, %r4": (BITS, lambda: mod(each(lambda a, b, c: a * b + c, *BITS))),
    "mul.wide.s32 %rd80, %r2, %r3": (BITS, lambda: mod(each(int.__mul__, *SIGNED[:2]), 64)),
    "mul.wide.u32 %rd80, %r2, %r3": (BITS, lambda: mod(each(int.__mul__, *BITS[:2]), 64)),
    "div.s32 %r1, %r2, %r3": (BITS >> 7, lambda: mod(each(int.__floordiv__, *(BITS >> 7)[:2]))),
    "div.s32 %r1, %r2, -7": (
        BITS,
        lambda: mod(each(lambda a: -(abs(a) // 7) if a > 0 else abs(a) // 7, SIGNED[0])),
    ),
    "rem.s32 %r1, %r2, 7": (
        BITS,
        lambda: mod(each(lambda a: abs(a) % 7 * (1 if a > 0 else -1), SIGNED[0])),
    ),
    "shl.b32 %r1, %r2, %r3": (
        np.stack([BITS[0], SHIFTS]),
        lambda: mod(each(lambda a, b: a << b, BITS[0], SHIFTS)),
    ),
    "shr.u32 %r1, %r2, %r3": (
        np.stack([BITS[0], SHIFTS]),
        lambda: mod(each(lambda a, b: a >> b, BITS[0], SHIFTS)),
    ),
    "shr.s32 %r1, %r2, %r3": (
        np.stack([BITS[0], SHIFTS]),
        lambda: mod(each(lambda a, b: a >> b, SIGNED[0], SHIFTS)),
    ),
    "bfe.u32 %r1, %r2, 5, 9": (BITS, lambda: mod(each(lambda a: a >> 5 & 511, BITS[0]))),
    "bfe.s32 %r1, %r2, 5, 9": (BITS, lambda: mod(each(lambda a: (a >> 5 & 511 ^ 256) - 256, BITS[0]))),
    "prmt.b32 %r1, %r2, %r3, 0x6240U": (
        BITS,
        lambda: mod(
            each(
                lambda a, b: a & 255 | (b & 255) << 8 | (a >> 16 & 255) << 16 | (b >> 16 & 255) << 24,
                *BITS[:2],
            )
        ),
    ),
    "cvt.s64.s32 %rd80, %r2": (BITS, lambda: mod(each(int, SIGNED[0]), 64)),
    "cvt.u64.u32 %rd80, %r2": (BITS, lambda: mod(each(int, BITS[0]), 64)),
    "{ .reg .b16 %half<3>; mov.b32 {%half1, %half2}, %r2; mov.b32 %r1, {%half2, %half1}; }": (
        BITS,
        lambda: mod(each(lambda a: a >> 16 | (a & 65535) << 16, BITS[0])),
    ),
    "mov.b64 %rd70, {%r2, %r3}; mov.b64 {_, %r1}, %rd70": (BITS, lambda: BITS[1]),
    "setp.lt.s32 %p1, %r2, %r3; @!%p1 mov.b32 %r1, 5; @%p1 mov.b32 %r1, 9": (
        BITS,
        lambda: mod(each(lambda a, b: 9 if a < b else 5, *SIGNED[:2])),
    ),
    "setp.lt.u32 %p1, %r2, %r3; selp.b32 %r1, 9, 5, %p1": (
        BITS,
        lambda: mod(each(lambda a, b: 9 if a < b else 5, *BITS[:2])),
    ),
}


@pytest.mark.parametrize("text", INTEGERS)
def test_integer_instructions(text: str):
    operands, expected = INTEGERS[text]
    count = len(set(re.findall(r"%r([234])\b", text)))
    truth = expected()
    np.testing.assert_array_equal(computed(f"{text};", *operands[:count], dtype=truth.dtype), truth)


def float32_of(text: str, *operands: np.ndarray) -> np.ndarray:
    return computed(f"{text};", *operands).view(np.float32)


FLOAT_INSTRUCTIONS = {
    "add.f32 %r1, %r2, %r3": lambda a, b, c: a + b,
    "fma.rn.f32 %r1, %r2, %r3, %r4": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
    "div.full.f32 %r1, %r2, %r3": lambda a, b, c: a / b,
    "max.f32 %r1, %r2, %r3": lambda a, b, c: np.fmax(a, b),
    "max.NaN.f32 %r1, %r2, %r3": lambda a, b, c: np.maximum(a, b),
    "neg.f32 %r1, %r2": lambda a, b, c: -a,
    "ex2.approx.f32 %r1, %r2": lambda a, b, c: np.exp2(a.astype(np.float64)).astype(np.float32),
    "mov.b32 %r1, 0f3FC00000": lambda a, b, c: np.full_like(a, 1.5),
    "setp.ltu.f32 %p1, %r2, %r3; selp.f32 %r1, %r2, 0f00000000, %p1": lambda a, b, c: np.where(
        (a < b) | np.isnan(a + b * 0) | np.isnan(b), a, np.float32(0)
    ),
    "setp.ne.f32 %p1, %r2, %r3; selp.f32 %r1, %r3, 0f00000000, %p1": lambda a, b, c: np.where(
        (a != b) & ~np.isnan(a) & ~np.isnan(b), b, np.float32(0)
    ),
    "setp.num.f32 %p1, %r2, %r3; selp.f32 %r1, %r2, 0f00000000, %p1": lambda a, b, c: np.where(
        np.isnan(a) | np.isnan(b), np.float32(0), a
    ),
    "cvt.rzi.s32.f32 %r5, %r2; cvt.rn.f32.s32 %r1, %r5": lambda a, b, c: np.trunc(
        np.clip(np.nan_to_num(a, posinf=2**31, neginf=-(2**31)), -(2**31), 2**31)
    ).astype(np.float32),
}


@pytest.mark.parametrize("text", FLOAT_INSTRUCTIONS)
@np.errstate(all="ignore")
def test_float32_instructions(text: str):
    count = max(map(int, re.findall(r"%r([234])\b", text)), default=1) - 1
    expected = FLOAT_INSTRUCTIONS[text](*FLOATS)
    np.testing.assert_array_equal(float32_of(text, *FLOATS[: max(count, 1)]), expected)


TIES = np.array(
    [0x3F808000, 0x3F818000, 0x3F800FFF, 0x3F801000, 0xBF801000, 0x7F7FFFFF, 0x7F800000], np.uint32
)


def test_conversions_to_bfloat16_are_pytorchs():
    values = np.concatenate([TIES.view(np.float32), FLOATS.reshape(-1), BITS.reshape(-1).view(np.float32)])
    got = bfloat16_to_float32(float32_to_bfloat16(values))
    np.testing.assert_array_equal(got, torch.from_numpy(values.copy()).bfloat16().float().numpy())
    packed = computed("cvt.rn.bf16x2.f32 %r1, %r2, %r3;", *FLOATS[:2])
    truth = torch.from_numpy(FLOATS[:2].copy()).bfloat16().float().numpy()
    upper, lower = (bfloat16_to_float32((packed >> shift).astype(np.uint16)) for shift in (16, 0))
    np.testing.assert_array_equal(np.stack([upper, lower]), truth)


def test_pairs_of_half_precision_numbers():
    for name, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        a, b = (torch.from_numpy(RANDOM.standard_normal(2 * WARP)).to(dtype) for _ in range(2))
        got = computed(
            f"mul.{name}x2 %r1, %r2, %r3;", *(x.view(torch.int32).numpy() for x in (a, b)), dtype=np.uint32
        )
        assert torch.equal(torch.from_numpy(got.view(np.int32)).view(dtype), a * b)


def test_conversion_to_tf32_rounds_ties_away():
    """10 bits of mantissa: of 1 + 2^-11 and its negative, the number that is larger in size."""
    assert round_to_tf32(TIES[3:5]).tolist() == [0x3F802000, 0xBF802000]
    assert round_to_tf32(TIES[2:3]).tolist() == [0x3F800000]
    assert round_to_tf32(TIES[6:]).tolist() == [0x7F800000]
    values = np.abs(FLOATS[2])
    got = float32_of("cvt.rna.tf32.f32 %r1, %r2", values)
    assert (np.abs(got - values) <= values * 2.0**-11).all()
    assert not (got.view(np.uint32) & 0x1FFF).any()


SHUFFLES = {
    "bfly.b32 %r1, %r2, 5, 31, -1": lambda lane: lane ^ 5,
    "idx.b32 %r1, %r2, 7, 31, -1": lambda lane: lane * 0 + 7,
    "up.b32 %r1, %r2, 3, 0, -1": lambda lane: np.where(lane >= 3, lane - 3, lane),
    "down.b32 %r1, %r2, 3, 31, -1": lambda lane: np.where(lane < 29, lane + 3, lane),
}


def test_a_parameter_is_loaded_from_a_chosen_address():
    out = np.zeros(WARP, np.uint32)
    one, two = np.arange(WARP, dtype=np.uint32), np.arange(WARP, dtype=np.uint32) + 100
    body = """
    mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 7; mul.wide.u32 %rd10, %r1, 4;
    mov.b64 %rd11, k_param_1; mov.b64 %rd12, k_param_2; selp.b64 %rd13, %rd11, %rd12, %p1;
    ld.param.b64 %rd14, [%rd13]; add.s64 %rd14, %rd14, %rd10; ld.global.b32 %r2, [%rd14];
    add.s64 %rd15, %rd1, %rd10; st.global.b32 [%rd15], %r2;
    """
    assert not run(body, out, one, two).found
    assert out.tolist() == [*range(7), *range(107, 100 + WARP)]
    with pytest.raises(UnsupportedPTX, match="part of a parameter"):
        run(body.replace("[%rd13]", "[%rd13+4]"), out, one, two)


@pytest.mark.parametrize("text", SHUFFLES)
def test_shuffles(text: str):
    expected = BITS[0][SHUFFLES[text](np.arange(WARP))]
    np.testing.assert_array_equal(computed(f"shfl.sync.{text};", BITS[0]), expected)


def test_branches_and_loops_of_single_threads():
    """Thread t adds t up to itself; odd ones then multiply by three, in another branch."""
    body = """
        mov.u32 %r1, %tid.x; mov.b32 %r2, 0; mov.b32 %r3, 0;
    $L_loop:
        setp.ge.u32 %p1, %r3, %r1; @%p1 bra $L_done;
        add.s32 %r3, %r3, 1; add.s32 %r2, %r2, %r3; bra.uni $L_loop;
    $L_done:
        and.b32 %r4, %r1, 1; setp.eq.b32 %p2, %r4, 0; @%p2 bra $L_even;
        mul.lo.s32 %r2, %r2, 3; bra.uni $L_end;
    $L_even:
        add.s32 %r2, %r2, 1000;
    $L_end:
        bar.sync 0;
        mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r2;
    """
    out = np.zeros(64, np.uint32)
    assert not run(body, out, warps=2).found
    expected = [t * (t + 1) // 2 * 3 if t % 2 else t * (t + 1) // 2 + 1000 for t in range(64)]
    assert out.tolist() == expected


def test_a_barrier_that_some_threads_never_reach_is_a_deadlock():
    body = """
        mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 32; @%p1 bra $L_other;
        bar.sync 0; bra.uni $L_end;
    $L_other:
        shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; bar.sync 0;
    $L_end:
    """
    with pytest.raises(Deadlock, match="bar.sync 0"):
        run(body, np.zeros(1, np.uint32), warps=2)


def test_atomic_additions_of_all_blocks():
    body = """
        mov.u32 %r1, %tid.x; mov.u32 %r5, %ctaid.x; setp.eq.b32 %p1, %r1, 3;
        @%p1 atom.global.gpu.acq_rel.add.u32 %r2, [%rd1], 2;
        mul.wide.u32 %rd3, %r5, 4; add.s64 %rd4, %rd2, %rd3;
        @%p1 st.global.b32 [%rd4], %r2;
    """
    total, before = np.zeros(1, np.uint32), np.zeros(9, np.uint32)
    assert not run(body, total, before, blocks=9).found
    assert total[0] == 18 and sorted(before.tolist()) == list(range(0, 18, 2))


@pytest.mark.parametrize(
    "text, named",
    [
        ("vote.sync.any.pred %p1, %p2, -1;", "vote.sync.any.pred"),
        ("add.sat.s32 %r1, %r1, %r1;", "sat"),
        ("mov.b32 %r1, %clock;", "clock"),
        ("ld.local.b32 %r1, [%rd1];", "local"),
        ("shfl.sync.bfly.b32 %r1, %r1, 1, 7, -1;", "part of a warp"),
    ],
)
def test_unknown_code_is_an_error_that_names_it(text: str, named: str):
    with pytest.raises(UnsupportedPTX, match=named):
        run(text, np.zeros(1, np.uint32))


# Fragments, as the PTX manual has them: which element of a matrix a lane's register holds.


def fragment(lane: int, register: int, per_register: int, element: int) -> tuple[int, int]:
    """Row and column of an element of A (16 rows)."""
    row = lane // 4 + 8 * (register % 2)
    column = lane % 4 * per_register + element + 4 * per_register * (register // 2)
    return row, column


def packed(values: np.ndarray, kind: str) -> np.ndarray:
    """Bits of elements."""
    if kind == "tf32":
        return values.astype(np.float32).view(np.uint32)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def quarters(*shape: int) -> np.ndarray:
    """Small random numbers that each type has exactly."""
    return np.round(RANDOM.standard_normal(shape) * 4) / 4


@pytest.mark.parametrize("kind, k", [("tf32", 4), ("tf32", 8), ("bf16", 8), ("bf16", 16), ("f16", 16)])
def test_product_of_a_warp(kind: str, k: int):
    per = 1 if kind == "tf32" else 2
    a, b, c = quarters(16, k), quarters(k, 8), quarters(16, 8)
    count = 16 * k // WARP // per
    left, right = np.zeros((WARP, count, per)), np.zeros((WARP, count // 2, per))
    for lane in range(WARP):
        for register in range(count):
            for element in range(per):
                left[lane, register, element] = a[fragment(lane, register, per, element)]
                if register % 2 == 0:
                    n, row = fragment(lane, register, per, element)
                    right[lane, register // 2, element] = b[row, n]
    sums = np.array(
        [[c[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] for i in range(4)] for lane in range(WARP)]
    )
    left, right = (
        np.ascontiguousarray(packed(x, kind)).view(np.uint32).reshape(WARP, -1) for x in (left, right)
    )
    inputs = np.concatenate([left, right, sums.astype(np.float32).view(np.uint32)], 1)
    registers = [f"%r{i + 10}" for i in range(inputs.shape[1])]
    lines = [f"mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, {inputs[0].nbytes}; add.s64 %rd4, %rd1, %rd3;"]
    lines += [f"ld.global.b32 {r}, [%rd4+{4 * i}];" for i, r in enumerate(registers)]
    n, m = left.shape[1], right.shape[1]
    vectors = [
        ", ".join(v) for v in (registers[n + m :], registers[:n], registers[n : n + m], registers[n + m :])
    ]
    operands = ", ".join("{" + v + "}" for v in vectors)
    lines += [f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {operands};"]
    lines += ["mul.wide.u32 %rd5, %r1, 16; add.s64 %rd6, %rd2, %rd5;"]
    lines += [f"st.global.b32 [%rd6+{4 * i}], {r};" for i, r in enumerate(registers[n + m :])]
    out = np.zeros((WARP, 4), np.float32)
    assert not run("\n".join(lines), inputs, out).found
    truth = a @ b + c
    for lane in range(WARP):
        for i in range(4):
            assert out[lane, i] == truth[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2]


@pytest.mark.parametrize("transposed", [False, True])
def test_matrices_of_a_warp_come_and_go(transposed: bool):
    """Lane l has the elements 2 l and 2 l + 1 of a matrix or of its transpose, and stores them where they were."""
    matrices = RANDOM.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    trans = ".trans" if transposed else ""
    body = f"""
        mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mul.wide.u32 %rd4, %r1, 16; add.s64 %rd5, %rd1, %rd4;
        ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd5]; st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
        ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r7, %r8, %r9, %r10}}, [%r2];
        add.s64 %rd6, %rd2, %rd4; st.global.v4.b32 [%rd6], {{%r7, %r8, %r9, %r10}};
        stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r2+512], {{%r7, %r8, %r9, %r10}};
        ld.shared.v4.b32 {{%r3, %r4, %r5, %r6}}, [%r2+512];
        add.s64 %rd7, %rd3, %rd4; st.global.v4.b32 [%rd7], {{%r3, %r4, %r5, %r6}};
    """
    got, back = np.zeros((WARP, 4), np.uint32), np.zeros_like(matrices)
    assert not run(body, matrices, got, back, shared=1024).found
    for i, matrix in enumerate(matrices):
        elements = (matrix.T if transposed else matrix).reshape(-1)
        assert (got[:, i] == elements[::2] | elements[1::2].astype(np.uint32) << 16).all()
    np.testing.assert_array_equal(back, matrices)


# Products of four warps, with operands in shared memory.

WIDTHS = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row by the layout's number in a descriptor."""


def swizzled(address: int, width: int) -> int:
    """CUTLASS's Swizzle<log2(width / 16), 4, 3>, on bytes."""
    return address ^ (address >> 3 & (width // 16 - 1) << 4)


def image(matrix: np.ndarray, mode: int, row_major: bool) -> np.ndarray:
    """(rows, k) elements in a swizzled layout, groups of eight rows (or of eight k) one behind the other."""
    width, item = WIDTHS[mode], matrix.itemsize
    out = np.zeros(matrix.nbytes // item, matrix.dtype)
    for row in range(matrix.shape[0]):
        for k in range(matrix.shape[1]):
            line, place = (row, k) if row_major else (k, row)
            out[swizzled(line * width + place * item, width) // item] = matrix[row, k]
    return out


@dataclass(frozen=True)
class Product:
    """D (64, columns) = A (64, k) B (k, columns) of four warps, from rows of whole lines of a layout."""

    kind: str
    mode: int
    columns: int
    k: int
    right_row_major: bool = True

    @property
    def item(self) -> int:
        return 4 if self.kind == "tf32" else 2

    def operands(self) -> tuple[np.ndarray, np.ndarray]:
        """A (64, k or more), B (columns, k or more); more where a line of the layout is longer."""
        line = WIDTHS[self.mode] // self.item
        a = quarters(64, line)
        return a, quarters(self.columns, line if self.right_row_major else self.k)

    def image(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Shared memory with both."""
        left, right = (packed(x, self.kind).reshape(x.shape) for x in (a, b))
        return np.concatenate(
            [image(left, self.mode, True), image(right, self.mode, self.right_row_major)]
        ).view(np.uint32)

    def program(self, size: int) -> str:
        """%rd1: image of so many bytes, which is copied to shared memory; %rd2: D (threads, columns / 2)."""
        width = WIDTHS[self.mode]
        a, b = (self.mode << 62 | width * 8 >> 4 << 32 | start >> 4 for start in (0, 64 * width))
        flags = "" if self.kind == "tf32" else f", 0, {int(not self.right_row_major)}"
        registers = [f"%r{i + 100}" for i in range(self.columns // 2)]
        stores = "\n".join(f"st.global.b32 [%rd6+{4 * i}], {r};" for i, r in enumerate(registers))
        return f"""
            mov.u32 %r1, %tid.x; shl.b32 %r3, %r1, 4;
        $L_copy:
            setp.ge.u32 %p1, %r3, {size}; @%p1 bra $L_copied;
            cvt.u64.u32 %rd3, %r3; add.s64 %rd4, %rd1, %rd3;
            ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd4];
            st.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
            add.s32 %r3, %r3, 2048; bra.uni $L_copy;
        $L_copied:
            fence.proxy.async.shared::cta;
            bar.sync 0;
            mov.b64 %rd10, {a}; mov.b64 %rd11, {b};
            wgmma.fence.sync.aligned;
            wgmma.mma_async.sync.aligned.m64n{self.columns}k{self.k}.f32.{self.kind}.{self.kind}
                {{{",".join(registers)}}}, %rd10, %rd11, 0, 1, 1{flags};
            wgmma.commit_group.sync.aligned;
            wgmma.wait_group.sync.aligned 0;
            mul.wide.u32 %rd5, %r1, {self.columns * 2}; add.s64 %rd6, %rd2, %rd5;
            {stores}
        """


CASES = [
    *(Product("tf32", mode, 16, 8) for mode in (1, 2, 3)),
    *(Product("bf16", mode, 32, 16) for mode in (1, 2, 3)),
    Product("f16", 1, 64, 16, False),
    Product("bf16", 2, 32, 16, False),
]


@pytest.mark.parametrize("product", CASES, ids=str)
def test_product_of_four_warps(product: Product):
    a, b = product.operands()
    content = product.image(a, b)
    out = np.zeros((128, product.columns // 2), np.float32)
    assert not run(product.program(content.nbytes), content, out, warps=4, shared=content.nbytes).found
    truth = a[:, : product.k] @ b[:, : product.k].T
    for thread in range(128):
        for i in range(product.columns // 2):
            row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
            assert out[thread, i] == truth[row, 8 * (i // 4) + thread % 4 * 2 + i % 2]


# Faults.


def without(program: str, part: str) -> str:
    """The program without its only instruction that begins so."""
    (found,) = re.findall(rf"{re.escape(part)}[^;]*;", program)
    return program.replace(found, "")


def faults_of_product(change: Callable[[str], str], spare: int = 0) -> Findings:
    """What is found in a changed program of a product, with so many bytes of shared memory more than it needs."""
    product = CASES[0]
    content = product.image(*product.operands())
    out = np.zeros((128, product.columns // 2), np.float32)
    program = change(product.program(content.nbytes))
    return run(program, content, out, warps=4, shared=content.nbytes + spare)


@pytest.mark.parametrize(
    "part, kind",
    [
        ("fence.proxy.async", NOT_FENCED),
        ("bar.sync", RACE),
        ("wgmma.fence", NOT_FENCED),
        ("wgmma.wait_group", NOT_AWAITED),
        ("wgmma.commit_group", NOT_AWAITED),
    ],
)
def test_products_without_their_order_are_faults(part: str, kind: str):
    assert kind in faults_of_product(lambda program: without(program, part)).kinds


WAIT = "wgmma.wait_group.sync.aligned 0;"
WRITE = "setp.eq.b32 %p2, %r1, 0; @%p2 st.shared.b32 [0], 0;"


def test_operands_of_products_may_be_overwritten_after_wait_and_barrier():
    def found(order: str) -> set[str]:
        return faults_of_product(lambda program: program.replace(WAIT, order)).kinds

    assert not found(f"{WAIT} bar.sync 0; {WRITE}")
    assert found(f"{WAIT} {WRITE}") == {RACE}
    assert found(f"bar.sync 0; {WRITE} {WAIT}") == {NOT_AWAITED}


def test_operands_beyond_shared_memory_are_faults():
    assert faults_of_product(lambda program: program, spare=-64).kinds == {OUT_OF_BOUNDS}
    assert not faults_of_product(lambda program: program, spare=64).found


SHARE = """
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; xor.b32 %r3, %r2, 128;
    st.shared.b32 [%r2], %r1;
    bar.sync 0;
    ld.shared.b32 %r4, [%r3];
    bar.sync 0;
    st.shared.b32 [%r2], %r4;
    mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r4;
"""
"""Two warps exchange their numbers through shared memory, which each then writes again."""
COPY = """
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; xor.b32 %r3, %r2, 512; mul.wide.u32 %rd4, %r1, 16;
    add.s64 %rd5, %rd1, %rd4; add.s64 %rd6, %rd2, %rd4;
    cp.async.cg.shared.global [%r2], [%rd5], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r3]; st.global.v4.b32 [%rd6], {%r4, %r5, %r6, %r7};
"""
"""Two warps copy numbers to shared memory, and each reads the other's."""


def test_shared_memory_in_order_is_no_fault():
    out, content, copied = np.zeros(64, np.uint32), np.arange(256, dtype=np.uint32), np.zeros(256, np.uint32)
    assert not run(SHARE, out, warps=2, shared=256).found
    assert out.tolist() == [*range(32, 64), *range(32)]
    assert not run(COPY, content, copied, warps=2, shared=1024).found
    assert copied.tolist() == [*range(128, 256), *range(128)]


@pytest.mark.parametrize("which", [0, 1], ids=["before the read", "before the write"])
def test_a_missing_barrier_is_a_race(which: int):
    parts = SHARE.split("bar.sync 0;")
    parts[which] += parts.pop(which + 1)
    program = "bar.sync 0;".join(parts)
    assert run(program, np.zeros(64, np.uint32), warps=2, shared=256).kinds == {RACE}


@pytest.mark.parametrize(
    "changed, kind",
    [
        (without(COPY, "cp.async.wait_group"), NOT_AWAITED),
        (without(COPY, "bar.sync"), RACE),
        (COPY.replace("wait_group 0", "wait_group 1"), NOT_AWAITED),
        (
            COPY.replace("cp.async.commit_group;", "st.shared.b32 [%r2], 0; cp.async.commit_group;"),
            NOT_AWAITED,
        ),
    ],
    ids=["no wait", "no barrier", "waits for too few", "overwritten"],
)
def test_copies_without_their_order_are_faults(changed: str, kind: str):
    content = np.arange(256, dtype=np.uint32)
    assert kind in run(changed, content, np.zeros(256, np.uint32), warps=2, shared=1024).kinds


def test_equal_values_of_several_warps_are_no_race_and_different_ones_are():
    same = "mov.b32 %r1, 7; st.shared.b32 [8], %r1; ld.shared.b32 %r2, [8];"
    assert not run(same, np.zeros(1, np.uint32), warps=2, shared=16).found
    different = same.replace("mov.b32 %r1, 7", "mov.u32 %r1, %tid.x")
    assert RACE in run(different, np.zeros(1, np.uint32), warps=2, shared=16).kinds
    by_thread = "mov.u32 %r1, %tid.x; st.global.b32 [%rd1], %r1;"
    assert run(by_thread, np.zeros(1, np.uint32)).kinds == {RACE}


@pytest.mark.parametrize(
    "body, kind",
    [
        ("ld.shared.b32 %r1, [60];", UNINITIALISED),
        ("st.shared.b32 [64], 1;", OUT_OF_BOUNDS),
        ("mov.b32 %r2, -4; ld.shared.b32 %r1, [%r2];", OUT_OF_BOUNDS),
        ("st.shared.b32 [6], 1;", MISALIGNED),
        ("st.shared.v4.b32 [8], {1, 1, 1, 1};", MISALIGNED),
        ("ld.global.b32 %r1, [%rd1+64];", OUT_OF_BOUNDS),
        ("ld.global.b32 %r1, [%rd1+-4];", OUT_OF_BOUNDS),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1+56];", MISALIGNED),
        ("st.global.b64 [%rd1+64], 1;", OUT_OF_BOUNDS),
        ("mov.b64 %rd2, 0; ld.global.b32 %r1, [%rd2];", OUT_OF_BOUNDS),
        ("cp.async.ca.shared.global [0], [%rd1+64], 4;", OUT_OF_BOUNDS),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [64];", OUT_OF_BOUNDS),
    ],
)
def test_wrong_accesses_are_found(body: str, kind: str):
    array = np.arange(16, dtype=np.uint32)
    found = run(body, array, shared=64)
    assert kind in found.kinds and all(text in module(body, 1) for _, text in found.found)
    assert array.tolist() == list(range(16)), "a wrong access changed a tensor"


def test_a_predicate_keeps_threads_from_wrong_accesses():
    body = """
        mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 16; mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
        mov.b32 %r2, 5; @%p1 ld.global.b32 %r2, [%rd3]; add.s32 %r2, %r2, 1; @%p1 st.global.b32 [%rd3], %r2;
    """
    array = np.arange(16, dtype=np.uint32)
    assert not run(body, array).found and array.tolist() == list(range(1, 17))
