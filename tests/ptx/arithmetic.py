"""Instructions that compute: registers in, registers out, every thread for itself.

A new one is a line in the table, :func:`computation`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .machine import WARP, Decoder, Machine, Step, instruction
from .numbers import DTYPES, RAW, Array, encode, round_to_tf32
from .program import WIDTHS, Instruction, UnsupportedPTX

Rule = Callable[[Instruction], tuple[str, Sequence[str], Callable[..., Array]]]
"""Of an instruction: the type of its result, the types of its operands, and the function."""


def computation(*names: str, modifiers: str = "") -> Callable[[Rule], Rule]:
    """Declare instructions by a rule. A modifier other than the named ones is refused."""

    def declare(rule: Rule) -> Rule:
        def build(source: Instruction, decoder: Decoder) -> Step:
            _refuse_others(source, modifiers)
            result, kinds, function = rule(source)
            if "ftz" in source.suffixes:
                function = _flushing(function)
            if len(kinds) != len(source.operands) - 1:
                raise UnsupportedPTX(f"{source.text!r}: expected {len(kinds)} operands")
            reads = [decoder.read(operand, kind) for operand, kind in zip(source.operands[1:], kinds)]
            write = decoder.write(source.operands[0])

            def step(machine: Machine, active: Array | None) -> None:
                write(machine, encode(function(*[read(machine) for read in reads]), result), active)

            return step

        instruction(*names)(build)
        return rule

    return declare


def _refuse_others(source: Instruction, modifiers: str) -> None:
    for suffix in source.suffixes:
        if suffix not in WIDTHS and suffix not in ("ftz", *modifiers.split()):
            raise UnsupportedPTX(f"modifier .{suffix} of {source.text!r}")


def _flushing(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function with float32 numbers that are too small for the normal format as zeros, in and out."""
    return lambda *operands: _flushed(function(*map(_flushed, operands)))


def _flushed(x: Array) -> Array:
    if x.dtype != np.float32:
        return x
    return np.where(np.abs(x) < np.finfo(x.dtype).tiny, np.copysign(np.float32(0), x), x)


def _alike(function: Callable[..., Array], operands: int) -> Rule:
    """The rule of a function whose result and operands have the instruction's type."""
    return lambda source: (source.type, (source.type,) * operands, function)


def _bits(kind: str) -> str:
    """The type of plain bits that is as wide."""
    return kind if kind == "pred" else f"b{8 * WIDTHS[kind]}"


def _bitwise(function: Callable[..., Array], operands: int) -> Rule:
    return lambda source: (_bits(source.type), (_bits(source.type),) * operands, function)


for _name, _function in {"add": np.add, "sub": np.subtract}.items():
    computation(_name, modifiers="rn")(_alike(_function, 2))
for _name, _function in {"neg": np.negative, "abs": np.abs}.items():
    computation(_name)(_alike(_function, 1))
for _name, _function in {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}.items():
    computation(_name)(_bitwise(_function, 2))
computation("not")(_bitwise(np.invert, 1))


@computation("min", "max", modifiers="NaN")
def _extreme(source: Instruction) -> Any:
    keeps_nan = "NaN" in source.suffixes or not source.type.startswith(("f", "bf"))
    functions = {"min": np.minimum, "max": np.maximum} if keeps_nan else {"min": np.fmin, "max": np.fmax}
    return source.type, (source.type,) * 2, functions[source.name]


def _twice(kind: str) -> str:
    """The integer type of twice the width."""
    return f"{kind[0]}{16 * WIDTHS[kind]}"


def _high_product(kind: str) -> Callable[[Array, Array], Array]:
    bits = 8 * WIDTHS[kind]
    if bits == 64:
        return lambda x, y: np.array(
            [(int(a) * int(b)) >> 64 for a, b in np.broadcast(x, y)], dtype=DTYPES[kind]
        )
    wide = DTYPES[_twice(kind)]
    return lambda x, y: ((x.astype(wide) * y.astype(wide)) >> wide.type(bits)).astype(DTYPES[kind])


@computation("mul", modifiers="lo hi wide rn")
def _multiply(source: Instruction) -> Any:
    kind = source.type
    if "wide" in source.suffixes:
        wide = DTYPES[_twice(kind)]
        return _twice(kind), (kind, kind), lambda x, y: x.astype(wide) * y.astype(wide)
    function = _high_product(kind) if "hi" in source.suffixes else np.multiply
    return kind, (kind, kind), function


@computation("mad", modifiers="lo wide")
def _multiply_add(source: Instruction) -> Any:
    kind = source.type
    if "wide" in source.suffixes:
        wide = DTYPES[_twice(kind)]
        return (
            _twice(kind),
            (kind, kind, _twice(kind)),
            lambda x, y, z: x.astype(wide) * y.astype(wide) + z,
        )
    return kind, (kind,) * 3, lambda x, y, z: x * y + z


@computation("fma", modifiers="rn")
def _fused_multiply_add(source: Instruction) -> Any:
    # The product is exact in float64; the sum is rounded there first, which differs from the hardware very rarely.
    wide = np.longdouble if source.type == "f64" else np.float64
    return (
        source.type,
        (source.type,) * 3,
        lambda x, y, z: (x.astype(wide) * y.astype(wide) + z.astype(wide)).astype(x.dtype),
    )


@computation("div", modifiers="full rn approx")
def _divide(source: Instruction) -> Any:
    kind = source.type
    return kind, (kind, kind), np.divide if kind[0] == "f" else _truncated_quotient


def _truncated_quotient(x: Array, y: Array) -> Array:
    x, y = np.broadcast_arrays(x, y)
    quotient = np.zeros(x.shape, x.dtype)  # the hardware leaves a division by 0 undefined
    np.floor_divide(x, y, out=quotient, where=y != 0)
    inexact = (y != 0) & (quotient * y != x) & ((x < 0) != (y < 0))
    return quotient + inexact.astype(x.dtype)


@computation("rem")
def _remainder(source: Instruction) -> Any:
    kind = source.type
    return kind, (kind, kind), lambda x, y: x - y * _truncated_quotient(x, y)


def _rounded_once(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """The function in float64, rounded to float32: the approximations of the hardware are off by a little more."""
    return lambda x: function(x.astype(np.float64)).astype(x.dtype)


FUNCTIONS = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rcp": np.reciprocal,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@computation(*FUNCTIONS, modifiers="approx rn")
def _approximate(source: Instruction) -> Any:
    return source.type, (source.type,), _rounded_once(FUNCTIONS[source.name])


@computation("shl", "shr")
def _shift(source: Instruction) -> Any:
    kind = source.type
    bits = 8 * WIDTHS[kind]
    shift = {"shl": np.left_shift, "shr": np.right_shift}[source.name]
    keeps_sign = source.name == "shr" and kind[0] == "s"

    def function(x: Array, by: Array) -> Array:
        shifted = shift(x, np.minimum(by, bits - 1).astype(x.dtype))
        return shifted if keeps_sign else np.where(by >= bits, 0, shifted).astype(x.dtype)

    return kind, (kind, "u32"), function


@computation("bfe")
def _extract_field(source: Instruction) -> Any:
    kind, bits = source.type, 8 * WIDTHS[source.type]

    def function(x: Array, start: Array, length: Array) -> Array:
        start, length = start.astype(np.int64) & 255, length.astype(np.int64) & 255
        if (start + length > bits).any() or (length == 0).any():
            raise UnsupportedPTX(f"{source.text!r}: a field that is empty or beyond the register")
        up = (bits - start - length).astype(x.dtype)
        return (x << up) >> (bits - length).astype(x.dtype)

    return kind, (kind, "u32", "u32"), function


@computation("selp")
def _select(source: Instruction) -> Any:
    kind = _bits(source.type)
    return kind, (kind, kind, "pred"), lambda x, y, chosen: np.where(chosen, x, y)


def _unordered(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Also true where a number is NaN."""
    return lambda x, y: function(x, y) | np.isnan(x) | np.isnan(y)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda x, y: ~(np.isnan(x) | np.isnan(y)),
    "nan": lambda x, y: np.isnan(x) | np.isnan(y),
}
COMPARISONS |= {f"{name}u": _unordered(COMPARISONS[name]) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


@instruction("setp")
def _compare(source: Instruction, decoder: Decoder) -> Step:
    """``setp.comparison{.combination}.type p{|q}, a, b{, c}``."""
    name, *others = (suffix for suffix in source.suffixes if suffix != "ftz")
    combine = next((COMBINATIONS[part] for part in others if part in COMBINATIONS), None)
    if name not in COMPARISONS or not {*others[:-1]} <= {*COMBINATIONS}:
        raise UnsupportedPTX(f"comparison {source.text!r}")
    compare = COMPARISONS[name]
    if name == "ne" and source.type.startswith(("f", "bf")):
        compare = _ordered(compare)
    compare = _flushing(compare) if "ftz" in source.suffixes else compare
    x, y = (decoder.read(operand, source.type) for operand in source.operands[1:3])
    third = decoder.read(source.operands[3], "pred") if combine else None
    writes = [decoder.write(p.strip()) for p in str(source.operands[0]).split("|")]
    pair = source.type.endswith("x2")
    if pair != (len(writes) == 2):
        raise UnsupportedPTX(f"{source.text!r}: two predicates are for pairs of numbers only")

    def step(machine: Machine, active: Array | None) -> None:
        result = compare(x(machine), y(machine))
        if combine is not None:
            result = combine(result, third(machine))
        for write, part in zip(writes, result if pair else [result]):
            write(machine, part, active)

    return step


def _ordered(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Only true where no number is NaN."""
    return lambda x, y: function(x, y) & ~(np.isnan(x) | np.isnan(y))


@computation("prmt")
def _permute_bytes(source: Instruction) -> Any:
    def function(x: Array, y: Array, selector: Array) -> Array:
        if (selector & np.uint32(0x8888)).any():
            raise UnsupportedPTX(f"{source.text!r}: bytes filled with a sign")
        both = x.astype(np.uint64) | (y.astype(np.uint64) << np.uint64(32))
        result = np.zeros(np.broadcast_shapes(x.shape, y.shape, selector.shape), np.uint32)
        for i in range(4):
            chosen = ((selector >> np.uint32(4 * i)) & np.uint32(7)).astype(np.uint64)
            byte = (both >> (np.uint64(8) * chosen)) & np.uint64(255)
            result |= byte.astype(np.uint32) << np.uint32(8 * i)
        return result

    return "b32", ("b32",) * 3, function


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@computation("cvt", modifiers="rn rna rni rzi rmi rpi")
def _convert(source: Instruction) -> Any:
    result, kind = source.suffixes[-2:]
    if result == "tf32":
        if "rna" not in source.suffixes:
            raise UnsupportedPTX(f"rounding of {source.text!r}")
        return "b32", ("b32",), round_to_tf32
    if result.endswith("x2"):  # the first operand becomes the upper half
        return result, (kind, kind), lambda upper, lower: np.stack(np.broadcast_arrays(lower, upper))
    rounding = next((ROUNDINGS[part] for part in source.suffixes if part in ROUNDINGS), None)
    from_float, to_float = (name.startswith(("f", "bf")) for name in (kind, result))
    if from_float and not to_float:
        if rounding is None:
            raise UnsupportedPTX(f"rounding of {source.text!r}")
        return result, (kind,), lambda x: _to_integer(rounding(x), DTYPES[result])
    if from_float and rounding is not None:
        return result, (kind,), rounding
    if to_float:
        wide = np.float64 if result == "f64" else np.float32
        return result, (kind,), lambda x: x.astype(wide)
    return result, (kind,), lambda x: x.astype(DTYPES[result])


def _to_integer(x: Array, dtype: np.dtype) -> Array:
    """The nearest number that the integer type has; 0 for NaN."""
    limits = np.iinfo(dtype)
    inside = np.clip(
        np.nan_to_num(x.astype(np.float64), posinf=np.inf, neginf=-np.inf), limits.min, limits.max
    )
    whole = inside.astype(dtype)
    return np.where(inside >= float(limits.max), dtype.type(limits.max), whole)


@instruction("mov")
def _move(source: Instruction, decoder: Decoder) -> Step:
    """A copy, or a register put together from parts, or taken apart."""
    kind = _bits(source.type)
    whole = WIDTHS[kind]
    to, value = source.operands
    if isinstance(to, tuple):
        return _take_apart(to, decoder.read(value, kind), whole // len(to), decoder)
    write = decoder.write(to)
    if isinstance(value, tuple):
        size = whole // len(value)
        parts = [decoder.read(part, f"b{8 * size}") for part in value]

        def put_together(machine: Machine, active: Array | None) -> None:
            bits = sum(
                part(machine).astype(RAW[whole]) << RAW[whole](8 * size * i) for i, part in enumerate(parts)
            )
            write(machine, bits, active)

        return put_together
    read = decoder.read(value, kind)
    return lambda machine, active: write(machine, read(machine), active)


def _take_apart(to: tuple[str, ...], read: Callable, size: int, decoder: Decoder) -> Step:
    writes = [decoder.write(part) for part in to]

    def step(machine: Machine, active: Array | None) -> None:
        bits = read(machine)
        for i, write in enumerate(writes):
            write(machine, (bits >> bits.dtype.type(8 * size * i)).astype(RAW[size]), active)

    return step


SOURCES: dict[str, Callable[[Array, Array], Array]] = {
    "bfly": lambda lane, by: lane ^ by,
    "idx": lambda lane, by: by,
    "up": lambda lane, by: lane - by,
    "down": lambda lane, by: lane + by,
}


@instruction("shfl", together=WARP)
def _shuffle(source: Instruction, decoder: Decoder) -> Step:
    """``shfl.sync.mode.b32 d{|p}, a, b, c, mask``, for whole warps."""
    _, mode, _ = source.suffixes
    to, value, by, bound, members = source.operands
    if bound != ("0" if mode == "up" else "31") or members not in ("-1", "0xffffffff"):
        raise UnsupportedPTX(f"{source.text!r}: a part of a warp")
    register, _, predicate = str(to).partition("|")
    write = decoder.write(register)
    write_predicate = decoder.write(predicate) if predicate else None
    read, read_by = decoder.read(value, "b32"), decoder.read(by, "u32")
    lane = np.arange(WARP)

    def step(machine: Machine, active: Array | None) -> None:
        bits = np.broadcast_to(read(machine), machine.threads).reshape(-1, WARP)
        distance = np.broadcast_to(read_by(machine), machine.threads).reshape(-1, WARP).astype(np.int64)
        chosen = SOURCES[mode](lane, distance & 31)
        valid = (chosen >= 0) & (chosen < WARP)
        taken = np.take_along_axis(bits, np.where(valid, chosen, lane), 1)
        write(machine, taken.reshape(-1), active)
        if write_predicate is not None:
            write_predicate(machine, valid.reshape(-1), active)

    return step
