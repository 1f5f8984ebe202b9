"""Runs the integer part of a kernel's machine code on the CPU, for its addresses, loops and masks.

Float arithmetic is not computed: its results are unknown (None), and so is what is loaded from float tensors. All that
decides how often an instruction is executed and which address it accesses is integer arithmetic on sizes, strides and
program ids. It is executed exactly, for some blocks of the grid at once: every register is an array with an entry for each
thread of these blocks. An unknown value in an address or in the condition of a loop is an error that says where.

``run(code, launch)`` returns a :class:`Trace`. It has, for every instruction, how many warps executed it, and for accesses
to memory the 32-byte sectors and the shared-memory cycles with their bank conflicts. An access outside of the tensors or of
the shared memory is a fault of the trace: ``Trace.faults``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .sass import SHARED_BASE, Code, Instruction

WARP = 32
SECTOR = 32
"""Bytes that caches and DRAM move at least."""
PARAMETERS = 0x210
"""Offset of the first parameter in constant bank 0 on Hopper."""
MOST_STEPS = 3_000_000
"""Instructions of one run; more means a loop that does not end."""

Value = Any
"""np.ndarray of uint32 or bool with an entry per thread; None if unknown."""
U32, U64, I32, I64 = np.uint32, np.uint64, np.int32, np.int64


@dataclass(frozen=True)
class Buffer:
    """A tensor argument: its size in bytes, and its contents as uint8, where addresses or loops depend on them."""

    name: str
    size: int
    contents: np.ndarray | None = None
    fill: int | None = None
    """Value of every byte, instead of contents."""


@dataclass
class Access:
    """What one memory instruction moved, summed over the warps that executed it."""

    warps: int = 0
    lanes: int = 0
    sectors: int = 0
    """32-byte sectors of global memory, for every warp anew."""
    first: int = 0
    """Those of them that the block had not accessed before."""
    lines: int = 0
    """128-byte lines of global memory, for every warp anew."""
    cycles: int = 0
    """Cycles of the shared memory, 128 bytes each at best."""


@dataclass
class Trace:
    """What a sample of the blocks of a launch executed."""

    blocks: int
    warps: int
    """Warps of a block."""
    executed: np.ndarray
    """Warps that executed each instruction, over all sampled blocks."""
    accesses: dict[int, Access] = field(default_factory=dict)
    touched: dict[tuple[str, str], float] = field(default_factory=dict)
    """Mean number of different sectors that a block touches, by (buffer, "load" or "store")."""
    path: list[int] = field(default_factory=list)
    """Indices of the instructions that the first warp of the first sampled block executed, in order."""
    faults: list[str] = field(default_factory=list)
    assumed: set[int] = field(default_factory=set)
    """Addresses of branches on unknown values, taken as not taken."""


class UnknownValue(ValueError):
    """An address or a loop depends on a value that is not known."""


def run(
    code: Code, grid: tuple[int, ...], warps: int, parameters: list[tuple[int, Any]], samples: int = 4
) -> Trace:
    """Run ``samples`` blocks of the grid.

    ``parameters`` are (bytes, value) in order; a value is a number or a :class:`Buffer`.
    """
    return _Run(code, grid, warps, parameters, samples).run()


def sampled(count: int, samples: int) -> list[int]:
    """Numbers below ``count``, spread evenly without a common stride."""
    if count <= samples:
        return list(range(count))
    golden = (math.sqrt(5) - 1) / 2
    return sorted({int((0.5 + i * golden) % 1 * count) for i in range(samples)})


class _Run:
    def __init__(self, code: Code, grid: tuple[int, ...], warps: int, parameters: list, samples: int) -> None:
        self.code = code
        grid = (*grid, 1, 1, 1)[:3]
        self.numbers = np.array(sampled(math.prod(grid), samples))
        self.warps, self.threads = warps, warps * WARP
        self.size = len(self.numbers) * self.threads
        self.block = np.repeat(np.arange(len(self.numbers)), self.threads)
        ids = np.repeat(self.numbers, self.threads)
        thread = np.tile(np.arange(self.threads), len(self.numbers)).astype(U32)
        self.special = {
            "SR_CTAID.X": ids % grid[0], "SR_CTAID.Y": ids // grid[0] % grid[1], "SR_CTAID.Z": ids // (grid[0] * grid[1]),
            "SR_TID.X": thread, "SR_TID.Y": 0 * thread, "SR_TID.Z": 0 * thread, "SR_LANEID": thread % WARP,
            "SR_CgaCtaId": 0 * thread, "SRZ": 0 * thread,
        }  # fmt: skip
        self.special = {name: value.astype(U32) for name, value in self.special.items()}
        self.constants = np.zeros(4096, np.uint8)
        self.constants[:24].view(U32)[:] = (self.threads, 1, 1, *grid)
        self.buffers: dict[int, Buffer] = {}
        self._place(parameters)
        self.registers: dict[str, Value] = {}
        self.zero, self.true = np.zeros(self.size, U32), np.ones(self.size, bool)
        self.shared = np.zeros((len(self.numbers), SHARED_BASE + code.shared + 1024), np.uint8)
        self.written = np.zeros(self.shared.shape, bool)
        self.trace = Trace(len(self.numbers), warps, np.zeros(len(code.instructions), I64))
        self.sectors: dict[tuple[int, str], np.ndarray] = {}
        self.decoded: list[Callable[[], None] | None] = [None] * len(code.instructions)
        self.mask: np.ndarray | None = None
        self.counted: dict[Any, Any] = {}
        self.known = False  # whether shared memory has any known value
        self.index = {one.address: i for i, one in enumerate(code.instructions)}

    def _place(self, parameters: list) -> None:
        at = PARAMETERS
        for i, (size, value) in enumerate(parameters):
            at = -(-at // size) * size
            if isinstance(value, Buffer):
                self.buffers[i + 1] = value
                value = ((i + 1) << 36) + 0xF0000000  # additions of offsets carry
            raw = (
                np.float32(value).tobytes()
                if isinstance(value, float)
                else int(value).to_bytes(size, "little", signed=True)
            )
            self.constants[at : at + size] = np.frombuffer(raw, np.uint8)
            at += size

    # Control flow: threads that are at the same instruction are a group, with registers of its own: what one path loads
    # must not hide what another one knows. The group that is furthest behind runs until it meets the next one.

    def run(self) -> Trace:
        waiting: list[tuple[int, np.ndarray, dict[str, Value]]] = [(0, self.true.copy(), {})]
        steps, instructions = 0, self.code.instructions
        while waiting:
            at, mask = self._next_group(waiting)
            until = waiting[-1][0] if waiting else len(instructions)
            warps = int(mask.reshape(-1, WARP).any(1).sum())
            first = bool(mask[:WARP].any())
            while True:
                one = instructions[at]
                self.trace.executed[at] += warps
                steps += 1
                if steps > MOST_STEPS:
                    raise UnknownValue(f"no end after {steps} instructions, at {one.address:#x}: {one.name}")
                if first:
                    self.trace.path.append(at)
                if one.opcode in ("BRA", "BRX", "EXIT", "RET", "CALL"):
                    waiting += [
                        (to, threads, dict(self.registers)) for to, threads in self._branch(at, one, mask)
                    ]
                    break
                action = self.decoded[at]
                if action is None:
                    action = self.decoded[at] = _decode(self, one, at)
                action()
                at += 1
                if at >= until:
                    waiting.append((at, mask, self.registers))
                    break
        self._count_touched()
        return self.trace

    def _next_group(self, waiting: list[tuple[int, np.ndarray, dict[str, Value]]]) -> tuple[int, np.ndarray]:
        """Take the groups that are furthest behind, all of them at one instruction, and make them one."""
        waiting.sort(key=lambda group: -group[0])
        at, mask, registers = waiting.pop()
        while waiting and waiting[-1][0] == at:
            _, others, theirs = waiting.pop()
            for name in registers.keys() | theirs.keys():
                mine, other = registers.get(name), theirs.get(name)
                if mine is not other:
                    registers[name] = _apply(np.where, mask, mine, other)
            mask = mask | others
        self.registers, self.mask = registers, None if mask.all() else mask
        return at, mask

    def _branch(self, at: int, one: Instruction, mask: np.ndarray) -> list[tuple[int, np.ndarray]]:
        condition = self.true if one.guard is None else self.predicate(one.guard)
        for operand in one.operands:
            if re.fullmatch(r"!?U?P[T\d]", operand) and condition is not None:
                value = self.predicate(operand)
                condition = None if value is None else condition & value
        if condition is None:
            self._assume(at, one)
            condition = ~self.true
        taken, rest = mask & condition, mask & ~condition
        groups = [(at + 1, rest)] if rest.any() else []
        if one.opcode == "EXIT" or not taken.any():
            return groups
        if one.opcode in ("RET", "BRX"):
            return groups + self._computed_branch(one, taken)
        return groups + [(self.code.labels[one.target], taken)]

    def _computed_branch(self, one: Instruction, taken: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """RET R20: to an address; BRX R4 -0x410: so far from the next instruction."""
        register, *offset = one.operands[0].split()[:2]
        address = self.value(register)
        if address is None:
            raise UnknownValue(f"branch to an unknown address at {one.address:#06x}: {one.name}")
        if one.opcode == "BRX":
            address = address.view(I32) + (one.address + 16 + int(offset[0], 16))
        return [(self.index[int(a)], taken & (address == a)) for a in np.unique(address[taken])]

    def _assume(self, at: int, one: Instruction) -> None:
        if one.opcode == "BRA" and self.code.labels[one.target] <= at:
            raise UnknownValue(
                f"the loop that ends at {one.address:#x} depends on a value that is not known; give the contents of the "
                "tensor that it is loaded from"
            )
        self.trace.assumed.add(one.address)

    # Operands.

    def value(self, operand: str) -> Value:
        """The 32 bits of an operand."""
        return self._reader(operand)()

    def _reader(self, operand: str) -> Callable[[], Value]:
        if operand.startswith("-") and not re.match(r"-(0x)?\d|-INF|-QNAN", operand):
            inner = self._reader(operand[1:])
            return lambda: _apply(lambda a: (~a) + U32(1), inner())
        if operand.startswith("~"):
            inner = self._reader(operand[1:])
            return lambda: _apply(np.invert, inner())
        if match := re.fullmatch(r"(U?R)(\d+|Z)(\.64)?(\.X\d+)?", operand):
            if match.group(2) == "Z":
                return lambda: self.zero
            name = match.group(1) + match.group(2)
            return lambda: self.registers.get(name)
        if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand):
            number = self.constants[int(match.group(1), 16) :][:4].view(U32)[0]
            return self._same(number)
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return self._same(int(operand, 16) & 0xFFFFFFFF)
        if re.fullmatch(r"-?\d+", operand):
            return self._same(int(operand) & 0xFFFFFFFF)
        return lambda: None

    def _same(self, number: int) -> Callable[[], Value]:
        value = np.full(self.size, number, U32)
        return lambda: value

    def pair(self, operand: str) -> Value:
        """The 64 bits of an operand that is two registers."""
        if match := re.fullmatch(r"(-|~)?(U?R)(\d+)(\.64)?", operand):
            sign, kind, number, _ = match.groups()
            low, high = (self.registers.get(f"{kind}{int(number) + i}") for i in range(2))
            if low is None or high is None:
                return None
            value = low.astype(U64) | high.astype(U64) << U64(32)
            return ~value + U64(1) if sign == "-" else ~value if sign == "~" else value
        if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", operand):
            return np.full(self.size, self.constants[int(match.group(1), 16) :][:8].view(U64)[0], U64)
        if re.fullmatch(r"-?0x[0-9a-f]+", operand):
            return np.full(self.size, int(operand, 16) & (2**64 - 1), U64)
        return _apply(lambda a: a.astype(U64), self.value(operand))

    def predicate(self, operand: str) -> Value:
        name = operand.lstrip("!")
        value = self.true if name in ("PT", "UPT") else self.registers.get(name)
        return ~value if operand.startswith("!") and value is not None else value

    def write(self, name: str, value: Value, guard: str | None) -> None:
        """Store a result where the guard holds."""
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if guard is not None:
            value = self._merged(value, self.registers.get(name), self.predicate(guard))
        self.registers[name] = value

    def _merged(self, value: Value, old: Value, condition: Value) -> Value:
        active = condition if condition is None or self.mask is None else condition[self.mask]
        if active is not None and not active.any():
            return old
        if active is not None and active.all():
            return value
        if condition is None or value is None:
            return None
        # A register that has no known value elsewhere is used under the same guard only.
        return np.where(condition, value, value.dtype.type(0) if old is None else old)

    def write_pair(self, name: str, value: Value, guard: str | None) -> None:
        if name in ("RZ", "URZ"):
            return
        kind, number = re.fullmatch(r"(U?R)(\d+)", name).groups()
        low = None if value is None else value.astype(U32)
        high = None if value is None else (value >> U64(32)).astype(U32)
        self.write(name, low, guard)
        self.write(f"{kind}{int(number) + 1}", high, guard)

    # Memory.

    def active(self, one: Instruction, *more: str) -> np.ndarray:
        """Threads that execute an access; all where that depends on data."""
        where = self.true if self.mask is None else self.mask
        for guard in (one.guard, *more):
            if guard is not None and (condition := self.predicate(guard)) is not None:
                where = where & condition
        return where

    def address(self, operand: str, one: Instruction) -> np.ndarray:
        """Addresses of [R2.64+UR4+0x10], with desc[UR8] before it or without."""
        total = np.zeros(self.size, I64)
        for term in operand.split("][")[-1].split("[")[-1].rstrip("]").split("+"):
            if re.fullmatch(r"-?0x[0-9a-f]+", term):
                total += int(term, 16)
                continue
            value = self.pair(term) if term.endswith(".64") else self.value(term)
            if value is None:
                raise UnknownValue(
                    f"unknown address at {one.address:#06x}: {one.name} {', '.join(one.operands)}; give the contents of the "
                    "tensor that it is loaded from"
                )
            scale = re.search(r"\.X(\d+)", term)
            total += value.astype(I64) * int(scale.group(1) if scale else 1)
        return total

    def global_access(
        self, at: int, one: Instruction, place: str, kind: str, *guards: str
    ) -> tuple[np.ndarray, np.ndarray]:
        where, addresses = self.active(one, *guards), self.address(place, one)
        access = self.trace.accesses.setdefault(at, Access())
        access.warps += int(where.reshape(-1, WARP).any(1).sum())
        access.lanes += int(where.sum())
        if where.any():
            sectors, lines = self._cached(
                "global", addresses & ~127, addresses, where, one.width, _sectors_and_lines
            )
            access.sectors += sectors
            access.lines += lines
            access.first += self._touch(one, addresses, where, kind)
        return addresses, where

    def _cached(
        self,
        what: str,
        base: np.ndarray,
        addresses: np.ndarray,
        where: np.ndarray,
        width: int,
        count: Callable,
    ) -> Any:
        """Loops repeat accesses at other places; what counts is how addresses lie to each other."""
        key = what, width, (addresses - base[0]).tobytes(), where.tobytes()
        if key not in self.counted:
            self.counted[key] = count(addresses, where, width)
        return self.counted[key]

    def _touch(self, one: Instruction, addresses: np.ndarray, where: np.ndarray, kind: str) -> int:
        """Mark the sectors as accessed; how many were not before."""
        tensors, new = addresses[where] >> 36, 0
        for number in tensors[:1] if (tensors == tensors[0]).all() else np.unique(tensors):
            here = where & (addresses >> 36 == number)
            buffer = self.buffers.get(int(number))
            offsets = addresses[here] - (int(number) << 36) - 0xF0000000
            if buffer is None or offsets.min() < 0 or offsets.max() + one.width > buffer.size:
                which = "no tensor" if buffer is None else f"{buffer.name} of {buffer.size} bytes"
                self._fault(
                    f"{one.name} at {one.address:#06x} accesses bytes {offsets.min()} to "
                    f"{offsets.max() + one.width} of {which}"
                )
                continue
            key = int(number), kind
            if key not in self.sectors:
                self.sectors[key] = np.zeros((self.trace.blocks, -(-buffer.size // SECTOR)), bool)
            marks, places = self.sectors[key], (self.block[here], offsets // SECTOR)
            fresh = ~marks[places]
            if fresh.any():
                new += len(np.unique(places[0][fresh] << 40 | places[1][fresh]))
                marks[places] = True
        return new

    def _fault(self, text: str) -> None:
        if text not in self.trace.faults:
            self.trace.faults.append(text)

    def _count_touched(self) -> None:
        for (number, kind), marks in self.sectors.items():
            self.trace.touched[self.buffers[number].name, kind] = float(marks.sum()) / self.trace.blocks

    def load(self, at: int, one: Instruction) -> None:
        place = next(o for o in one.operands if "[" in o)
        addresses, where = self.global_access(at, one, place, "load")
        result = one.operands[0] if not one.operands[0].startswith(("P", "UP")) else one.operands[1]
        for i in range(max(1, one.width // 4)):
            value = self._loaded(addresses + 4 * i, where, min(4, one.width), one)
            self.write(_next(result, i), value, one.guard)

    def _loaded(self, addresses: np.ndarray, where: np.ndarray, width: int, one: Instruction) -> Value:
        if not where.any():
            return self.zero
        numbers = addresses[where] >> 36
        buffer = self.buffers.get(int(numbers[0]))
        if buffer is None or (numbers != numbers[0]).any():
            return None
        if buffer.fill is not None:
            return np.full(self.size, int.from_bytes(bytes([buffer.fill] * width), "little"), U32)
        if buffer.contents is None:
            return None
        offsets = np.clip(addresses - (int(numbers[0]) << 36) - 0xF0000000, 0, buffer.size - width)
        data = buffer.contents[offsets[:, None] + np.arange(width)].astype(U32)
        value = (data << (np.arange(width) * 8).astype(U32)).sum(1, dtype=U32)
        if "S8" in one.modifiers:
            value = value.astype(np.int8).astype(I32).astype(U32)
        return value

    def shared_access(
        self, at: int, one: Instruction, place: str, width: int, lanes: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Count an access of ``width`` bytes a thread; ``lanes`` replaces the threads that take part."""
        where = self.active(one) if lanes is None else lanes & self.active(one)
        addresses = self.address(place, one) & 0xFFFFFF
        access = self.trace.accesses.setdefault(at, Access())
        access.warps += int(where.reshape(-1, WARP).any(1).sum())
        access.lanes += int(where.sum())
        if where.any():
            access.cycles += self._cached("shared", addresses & ~127, addresses, where, width, bank_cycles)
            low, high = addresses[where].min(), addresses[where].max() + width
            if low < SHARED_BASE or high > SHARED_BASE + self.code.shared:
                self._fault(
                    f"{one.name} at {one.address:#06x} accesses shared memory at {low - SHARED_BASE} to "
                    f"{high - SHARED_BASE} of {self.code.shared} bytes"
                )
        return addresses, where

    def load_shared(self, at: int, one: Instruction) -> None:
        addresses, where = self.shared_access(at, one, one.operands[1], one.width)
        if not self.known:
            for result in one.results:
                self.write(result, None, one.guard)
            return
        addresses = np.clip(addresses, 0, self.shared.shape[1] - 32)
        for i in range(max(1, one.width // 4)):
            width = min(4, one.width)
            bytes_at = (self.block[:, None], addresses[:, None] + 4 * i + np.arange(width))
            known = self.written[bytes_at].all(1)
            value = None
            if where.any() and known[where].all():
                data = self.shared[bytes_at].astype(U32)
                value = (data << (np.arange(width) * 8).astype(U32)).sum(1, dtype=U32)
                if "S8" in one.modifiers:
                    value = value.astype(np.int8).astype(I32).astype(U32)
                if "S16" in one.modifiers:
                    value = value.astype(np.int16).astype(I32).astype(U32)
            self.write(_next(one.operands[0], i), value, one.guard)

    def store_shared(self, at: int, one: Instruction) -> None:
        addresses, where = self.shared_access(at, one, one.operands[0], one.width)
        addresses = np.clip(addresses, 0, self.shared.shape[1] - 32)[where]
        for i in range(max(1, one.width // 4)):
            width = min(4, one.width)
            value = self.value(_next(one.operands[-1], i))
            self.known |= value is not None
            if not self.known:
                continue
            bytes_at = (self.block[where][:, None], addresses[:, None] + 4 * i + np.arange(width))
            self.written[bytes_at] = value is not None
            if value is not None:
                self.shared[bytes_at] = (value[where][:, None] >> (np.arange(width) * 8).astype(U32)).astype(
                    np.uint8
                )

    def matrices(self, at: int, one: Instruction) -> None:
        """LDSM and STSM: threads give the addresses of rows of 16 bytes, eight for each matrix."""
        place = next(o for o in one.operands if "[" in o)
        lanes = self.special["SR_LANEID"] < 8 * one.matrices
        addresses, where = self.shared_access(at, one, place, 16, lanes)
        if one.opcode == "STSM":
            addresses = np.clip(addresses, 0, self.shared.shape[1] - 32)[where]
            self.written[self.block[where][:, None], addresses[:, None] + np.arange(16)] = False
        for result in one.results:
            self.write(result, None, one.guard)

    def load_store_shared(self, at: int, one: Instruction) -> None:
        """LDGSTS: from global to shared memory."""
        into, source, *guards = one.operands
        guards = [g for g in guards if re.fullmatch(r"!?U?P[T\d]", g)]
        self.global_access(at, one, source, "load", *guards)
        access = self.trace.accesses[at]
        before = access.warps, access.lanes
        addresses, where = self.shared_access(at, one, into, one.width)
        access.warps, access.lanes = before  # counted once
        addresses = np.clip(addresses, 0, self.shared.shape[1] - 32)[where]
        self.written[self.block[where][:, None], addresses[:, None] + np.arange(one.width)] = False


def _next(register: str, i: int) -> str:
    match = re.fullmatch(r"(U?R)(\d+|Z)(\..*)?", register)
    if match is None or match.group(2) == "Z":
        return "RZ" if match else register
    return f"{match.group(1)}{int(match.group(2)) + i}"


def _different(units: np.ndarray, where: np.ndarray) -> int:
    """Number of different units, warp by warp."""
    by_warp = np.sort(np.where(where, units, -1).reshape(-1, WARP), axis=1)
    steps = (np.diff(by_warp, axis=1) != 0) & (by_warp[:, 1:] >= 0)
    return int(steps.sum() + (by_warp[:, 0] >= 0).sum())


def _sectors_and_lines(addresses: np.ndarray, where: np.ndarray, width: int) -> tuple[int, int]:
    return _different(addresses // SECTOR, where), _different(addresses // 128, where)


def bank_cycles(addresses: np.ndarray, where: np.ndarray, width: int) -> int:
    """Cycles of the 32 banks of four bytes: 8- and 16-byte accesses go half a warp and a quarter at a time."""
    group = WARP * 4 // max(4, width)
    words = max(1, width // 4)
    rows = np.where(where, addresses // 4, -1).reshape(-1, group)
    rows = rows[(rows >= 0).any(1)]
    every = np.where(rows[:, :, None] >= 0, rows[:, :, None] + np.arange(words), -1).reshape(len(rows), -1)
    every = np.sort(every, axis=1)
    new = np.ones(every.shape, bool)
    new[:, 1:] = np.diff(every, axis=1) != 0
    new &= every >= 0
    counts = np.zeros((len(rows), 32), I64)
    row, column = np.nonzero(new)
    np.add.at(counts, (row, every[row, column] % 32), 1)
    return int(counts.max(1).sum())


def _apply(function: Callable[..., Value], *values: Value) -> Value:
    return None if any(value is None for value in values) else function(*values)


def _decode(run: _Run, one: Instruction, at: int) -> Callable[[], None]:
    """What executes an instruction; one that is not known makes its results unknown."""
    base = one.opcode
    memory = {
        "LDG": run.load, "LD": run.load, "LDS": run.load_shared, "STS": run.store_shared, "LDSM": run.matrices,
        "STSM": run.matrices, "LDGSTS": run.load_store_shared,
    }  # fmt: skip
    if base in memory:
        return lambda: memory[base](at, one)
    if base in ("STG", "ST", "RED", "ATOMG"):
        place = next(o for o in one.operands if "[" in o)
        return lambda: (
            run.global_access(at, one, place, "store"),
            [run.write(r, None, one.guard) for r in one.results],
        )
    plain = base[1:] if base.startswith("U") and base[1:] in _OPERATIONS else base
    if plain in _OPERATIONS and (make := _OPERATIONS[plain](run, one)) is not None:
        return make
    results, guard = one.results, one.guard
    return lambda: [run.write(result, None, guard) for result in results]


def _split(one: Instruction) -> tuple[list[str], list[str]]:
    """Carry predicates behind the result, and the operands."""
    carries, operands = [], list(one.operands[1:])
    while operands and re.fullmatch(r"U?P[T\d]", operands[0]):
        carries.append(operands.pop(0))
    return carries, operands


def _mov(run: _Run, one: Instruction) -> Callable[[], None]:
    read, result = run._reader(one.operands[1]), one.operands[0]
    return lambda: run.write(result, read(), one.guard)


def _constant(run: _Run, one: Instruction) -> Callable[[], None] | None:
    result, place = one.operands
    match = re.fullmatch(r"c\[0x([02])\]\[(?:(U?R\d+)\+?)?(0x[0-9a-f]+)?\]", place)
    if match is None or one.width < 4:
        return None
    bank, register, offset = match.group(1), match.group(2), int(match.group(3) or "0", 16)
    words = run.constants.view(U32) if bank == "0" else np.frombuffer(run.code.tables, U32)

    def load() -> None:
        base = run.zero if register is None else run.value(register)
        for i in range(one.width // 4):
            value = _apply(
                lambda b, at: words[(b + at) // U32(4) % U32(len(words))], base, U32(offset + 4 * i)
            )
            run.write(_next(result, i), value, one.guard)

    return load


def _special(run: _Run, one: Instruction) -> Callable[[], None]:
    result, name = one.operands
    value = run.special.get(name)
    if one.opcode == "CS2R" and "32" not in one.modifiers:
        return lambda: [
            run.write(_next(result, i), run.zero if value is not None and i else value, one.guard)
            for i in range(2)
        ]
    return lambda: run.write(result, value, one.guard)


def _half_constants(run: _Run, one: Instruction) -> Callable[[], None] | None:
    """HFMA2 -RZ, RZ, a, b: moves two half-precision numbers, which ptxas uses for integers too."""
    if one.operands[1:3] != ("-RZ", "RZ"):
        return None
    try:
        halves = [np.float16(float(o)).view(np.uint16) for o in one.operands[3:5]]
    except ValueError:
        return None
    value = run._same(int(halves[0]) << 16 | int(halves[1]))
    return lambda: run.write(one.operands[0], value(), one.guard)


def _imad(run: _Run, one: Instruction) -> Callable[[], None]:
    carries, operands = _split(one)
    result, unsigned = one.operands[0], "U32" in one.modifiers
    reads = [run._reader(o) for o in operands[:2]]

    def product() -> Value:
        kind = U64 if unsigned else I64
        values = [
            _apply(lambda v: v.astype(U64) if unsigned else v.view(I32).astype(I64), read()) for read in reads
        ]
        return _apply(lambda a, b: (a * b).astype(kind).view(U64), *values)

    def low() -> None:
        a, b, c = reads[0](), reads[1](), run.value(operands[2])
        value = _apply(lambda a, b, c: a * b + c, a, b, c)
        if "X" in one.modifiers:
            value = _apply(lambda v, p: v + p.astype(U32), value, run.predicate(operands[3]))
        run.write(result, value, one.guard)

    def wide() -> None:
        value = _apply(lambda p, c: p + c, product(), run.pair(operands[2]))
        if carries:
            run.write(carries[0], None, one.guard)
        run.write_pair(result, value, one.guard)

    def high() -> None:
        value = _apply(lambda p, c: ((p + c) >> U64(32)).astype(U32), product(), run.pair(operands[2]))
        run.write(result, value, one.guard)

    return wide if "WIDE" in one.modifiers else high if "HI" in one.modifiers else low


def _iadd3(run: _Run, one: Instruction) -> Callable[[], None]:
    carries, operands = _split(one)
    result = one.operands[0]
    if "64" in one.modifiers:
        return lambda: run.write_pair(
            result, _apply(lambda a, b, c: a + b + c, *(run.pair(o) for o in operands[:3])), one.guard
        )
    terms = [
        (
            o.startswith("-") and not o.startswith("-0x"),
            run._reader(o[1:] if o.startswith("-") and not o.startswith("-0x") else o),
        )
        for o in operands[:3]
    ]
    ins = operands[3:] if "X" in one.modifiers else []

    def add() -> None:
        total: Value = np.zeros(run.size, U64)
        for negative, read in terms:
            value = read()
            if value is not None:
                value = (~value).astype(U64) + U64(1) if negative else value.astype(U64)
            total = _apply(lambda t, v: t + v, total, value)
        for name in ins:
            total = _apply(lambda t, p: t + p.astype(U64), total, run.predicate(name))
        for i, name in enumerate(carries):
            run.write(name, _apply(lambda t, n: (t >> U64(32)) > n, total, U64(i)), one.guard)
        run.write(result, _apply(lambda t: t.astype(U32), total), one.guard)

    return add


def _viadd(run: _Run, one: Instruction) -> Callable[[], None]:
    a, b = (run._reader(o) for o in one.operands[1:3])
    return lambda: run.write(one.operands[0], _apply(lambda x, y: x + y, a(), b()), one.guard)


def _lea(run: _Run, one: Instruction) -> Callable[[], None]:
    carries, operands = _split(one)
    result, shift_at = one.operands[0], 3 if "HI" in one.modifiers and "SX32" not in one.modifiers else 2
    shift = U64(int(operands[shift_at], 16))
    ins = operands[shift_at + 1 :]
    a, b = run._reader(operands[0]), run._reader(operands[1])
    c = run._reader(operands[2]) if shift_at == 3 else None

    def low() -> None:
        total = _apply(lambda x, y: ((x.astype(U64) << shift) & U64(0xFFFFFFFF)) + y.astype(U64), a(), b())
        for name in carries:
            run.write(name, _apply(lambda t: t >> U64(32) != 0, total), one.guard)
        run.write(result, _apply(lambda t: t.astype(U32), total), one.guard)

    def high() -> None:
        x = a()
        upper = _apply(lambda v: v.view(I32) >> 31, x) if c is None else c()
        both = _apply(lambda low, high: low.astype(U64) | high.astype(U32).astype(U64) << U64(32), x, upper)
        total = _apply(lambda v, y: ((v << shift) >> U64(32)) + y.astype(U64), both, b())
        for name in ins if "X" in one.modifiers else ():
            total = _apply(lambda t, p: t + p.astype(U64), total, run.predicate(name))
        for name in carries:
            run.write(name, _apply(lambda t: t >> U64(32) != 0, total), one.guard)
        run.write(result, _apply(lambda t: t.astype(U32), total), one.guard)

    return high if "HI" in one.modifiers else low


def _shf(run: _Run, one: Instruction) -> Callable[[], None]:
    result, low, by, high = one.operands[0], *(run._reader(o) for o in one.operands[1:4])
    left, kinds = "L" in one.modifiers, one.modifiers
    wide = bool(kinds & {"U64", "S64"})
    signed = bool(kinds & {"S32", "S64"})

    def shift() -> None:
        def compute(lo: np.ndarray, s: np.ndarray, hi: np.ndarray) -> np.ndarray:
            # Only the word that counts was given for shifts of 32 bits.
            both = lo.astype(U64) | hi.astype(U64) << U64(32)
            limit = 64 if wide else 32
            amount = (s & U32(limit - 1) if "W" in kinds else np.minimum(s, limit)).astype(U64)
            if left:
                moved = np.where(amount >= 64, U64(0), both << np.minimum(amount, U64(63)))
                return ((moved >> U64(32)) if "HI" in kinds else moved).astype(U32)
            amount = np.minimum(amount, U64(63))
            moved = (both.view(I64) >> amount.astype(I64)).view(U64) if signed else both >> amount
            return ((moved >> U64(32)) if "HI" in kinds else moved).astype(U32)

        run.write(result, _apply(compute, low(), by(), high()), one.guard)

    return shift


def _lop3(run: _Run, one: Instruction) -> Callable[[], None]:
    results, operands = [], list(one.operands)
    while re.fullmatch(r"U?P[T\d]", operands[0]):
        results.append(operands.pop(0))
    result, *rest = operands
    a, b, c = (run._reader(o) for o in rest[:3])
    table = int(rest[3], 16)

    def logic() -> None:
        value = _apply(lambda x, y, z: _lookup(table, x, y, z), a(), b(), c())
        for name in results:
            run.write(name, _apply(lambda v: v != 0, value), one.guard)
        run.write(result, value, one.guard)

    return logic


def _lookup(table: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The bits that a truth table of eight entries gives for three."""
    fast = {
        0xC0: lambda: a & b,
        0xFC: lambda: a | b,
        0x3C: lambda: a ^ b,
        0x33: lambda: ~b,
        0xF8: lambda: a | b & c,
    }
    if table in fast:
        return fast[table]()
    total = np.zeros_like(a)
    for i in range(8):
        if table >> i & 1:
            total |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return total


def _plop3(run: _Run, one: Instruction) -> Callable[[], None]:
    first, second, a, b, c, *tables = one.operands

    def logic() -> None:
        values = [run.predicate(o) for o in (a, b, c)]
        for name, table in zip((first, second), tables):
            # Threads whose known inputs decide it are known, whatever the others are.
            run.write(name, _three_valued(int(table, 16), values, run), one.guard)

    return logic


def _three_valued(table: int, values: list[Value], run: _Run) -> Value:
    unknown = [i for i, value in enumerate(values) if value is None]
    outcomes = []
    for bits in range(2 ** len(unknown)):
        filled = list(values)
        for k, i in enumerate(unknown):
            filled[i] = run.true if bits >> k & 1 else ~run.true
        outcomes.append(_lookup(table, *filled) if table not in (0, 255) else np.full(run.size, table == 255))
    return outcomes[0] if all(np.array_equal(outcomes[0], o) for o in outcomes) else None


_COMPARE = {
    "GT": np.greater,
    "GE": np.greater_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "EQ": np.equal,
    "NE": np.not_equal,
}


def _isetp(run: _Run, one: Instruction) -> Callable[[], None] | None:
    first, second, left, right, other, *extended = one.operands
    name = next(iter(one.modifiers & set(_COMPARE)), None)
    combine = next(iter(one.modifiers & {"AND", "OR", "XOR"}), None)
    if name is None or combine is None:
        return None
    a, b = run._reader(left), run._reader(right)
    join = {"AND": np.logical_and, "OR": np.logical_or, "XOR": np.logical_xor}[combine]

    def compare() -> None:
        x, y = a(), b()
        if "U32" not in one.modifiers:
            x, y = _apply(lambda v: v.view(I32), x), _apply(lambda v: v.view(I32), y)
        found = _apply(_COMPARE[name], x, y)
        if extended:
            low = run.predicate(extended[0])
            strict = {"GE": np.greater, "LE": np.less}.get(name, _COMPARE[name])
            if name == "NE":
                found = _apply(lambda p, q, r: (p != q) | r, x, y, low)
            else:
                found = _apply(lambda p, q, r: (strict(p, q) & (p != q)) | ((p == q) & r), x, y, low)
        with_other = run.predicate(other)
        # A value that does not matter may be unknown.
        if combine == "AND" and found is None and with_other is not None and not with_other.any():
            found = with_other
        if combine == "AND" and with_other is None and found is not None and not found.any():
            with_other = found
        run.write(first, _apply(join, found, with_other), one.guard)
        run.write(second, _apply(lambda f, o: join(~f, o), found, with_other), one.guard)

    return compare


def _select(run: _Run, one: Instruction) -> Callable[[], None]:
    result, left, right, condition = one.operands
    a, b = run._reader(left), run._reader(right)

    def select() -> None:
        which = run.predicate(condition)
        x, y = a(), b()
        if which is not None and which.all():
            value = x
        elif which is not None and not which.any():
            value = y
        else:
            value = _apply(np.where, which, x, y)
        run.write(result, value, one.guard)

    return select


def _least(run: _Run, one: Instruction) -> Callable[[], None]:
    """IMNMX and VIMNMX a, b, p: the lesser where p holds. VIADDMNMX: of a + b and c."""
    result, *operands, condition = one.operands
    reads = [run._reader(o) for o in operands]
    kind = U32 if "U32" in one.modifiers else I32

    def least() -> None:
        values = [read() for read in reads]
        if len(values) == 3:
            values = [_apply(lambda x, y: x + y, *values[:2]), values[2]]
        which = run.predicate(condition)
        value = _apply(
            lambda x, y, p: np.where(p, np.minimum(x.view(kind), y.view(kind)), np.maximum(x.view(kind), y.view(kind))).view(U32),
            *values, which,
        )  # fmt: skip
        run.write(result, value, one.guard)

    return least


def _prmt(run: _Run, one: Instruction) -> Callable[[], None] | None:
    result, low, selector, high = one.operands
    if not selector.startswith("0x") or one.modifiers - {"IDX"}:
        return None
    a, b = run._reader(low), run._reader(high)
    digits = [int(selector, 16) >> 4 * i & 15 for i in range(4)]

    def permute() -> None:
        values = (a(), b())
        total: Value = np.zeros(run.size, U32)
        for i, digit in enumerate(digits):
            source = values[digit >> 2 & 1]
            byte = _apply(lambda s, n: s >> n & U32(0xFF), source, U32(8 * (digit & 3)))
            if digit & 8:
                byte = _apply(lambda v: (v >> U32(7)) * U32(0xFF), byte)
            total = _apply(lambda t, v, n: t | v << n, total, byte, U32(8 * i))
        run.write(result, total, one.guard)

    return permute


def _sgxt(run: _Run, one: Instruction) -> Callable[[], None] | None:
    result, source, bits = one.operands
    if not bits.startswith("0x"):
        return None
    read, shift = run._reader(source), 32 - int(bits, 16)
    kind = U32 if "U32" in one.modifiers else I32
    return lambda: run.write(
        result, _apply(lambda v: ((v << U32(shift)).view(kind) >> kind(shift)).view(U32), read()), one.guard
    )


def _iabs(run: _Run, one: Instruction) -> Callable[[], None]:
    read = run._reader(one.operands[1])
    return lambda: run.write(
        one.operands[0], _apply(lambda v: np.abs(v.view(I32)).view(U32), read()), one.guard
    )


def _to_float(run: _Run, one: Instruction) -> Callable[[], None] | None:
    """I2F.RP: rounded up, as divisions by a size that is not constant begin."""
    if "RP" not in one.modifiers:
        return None
    read, unsigned = run._reader(one.operands[1]), "U32" in one.modifiers

    def convert(v: np.ndarray) -> np.ndarray:
        exact = (v if unsigned else v.view(I32)).astype(np.float64)
        near = exact.astype(np.float32)
        return (
            np.where(near < exact, np.nextafter(near, np.float32(np.inf)), near).astype(np.float32).view(U32)
        )

    return lambda: run.write(one.operands[0], _apply(convert, read()), one.guard)


def _reciprocal(run: _Run, one: Instruction) -> Callable[[], None] | None:
    if "RCP" not in one.modifiers:
        return None
    read = run._reader(one.operands[1])

    def invert(v: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):
            return (np.float32(1) / v.view(np.float32)).astype(np.float32).view(U32)

    return lambda: run.write(one.operands[0], _apply(invert, read()), one.guard)


def _to_integer(run: _Run, one: Instruction) -> Callable[[], None] | None:
    if "TRUNC" not in one.modifiers or "U32" not in one.modifiers:
        return None
    read = run._reader(one.operands[1])

    def convert(v: np.ndarray) -> np.ndarray:
        return np.clip(
            np.nan_to_num(v.view(np.float32).astype(np.float64), posinf=2**32 - 1), 0, 2**32 - 1
        ).astype(U32)

    return lambda: run.write(one.operands[0], _apply(convert, read()), one.guard)


def _predicates_to_register(run: _Run, one: Instruction) -> Callable[[], None] | None:
    result, names, source, bits = one.operands
    if names not in ("PR", "UPR") or not bits.startswith("0x"):
        return None
    chosen = [i for i in range(7) if int(bits, 16) >> i & 1]
    read, kept = run._reader(source), U32(0xFFFFFFFF ^ int(bits, 16))
    prefix = names[:-1]

    def pack() -> None:
        value = _apply(lambda v: v & kept, read())
        for i in chosen:
            value = _apply(
                lambda v, p, n: v | p.astype(U32) << n, value, run.registers.get(f"{prefix}{i}"), U32(i)
            )
        run.write(result, value, one.guard)

    return pack


def _register_to_predicates(run: _Run, one: Instruction) -> Callable[[], None] | None:
    names, source, bits = one.operands
    match = re.fullmatch(r"(U?R)(\d+)(?:\.B(\d))?", source)
    if match is None or not bits.startswith("0x"):
        return None
    read, shift = run._reader(match.group(1) + match.group(2)), 8 * int(match.group(3) or 0)

    def unpack() -> None:
        value = read()
        for i in range(7):
            if int(bits, 16) >> i & 1:
                found = _apply(lambda v, n: (v >> n & U32(1)) != 0, value, U32(shift + i))
                run.write(f"{names[:-1]}{i}", found, one.guard)

    return unpack


def _shuffle(run: _Run, one: Instruction) -> Callable[[], None] | None:
    predicate, result, source, by, _ = one.operands
    read, amount = run._reader(source), run._reader(by)
    lane = run.special["SR_LANEID"].astype(I64)
    first = np.arange(run.size) - lane

    def move() -> None:
        value, distance = read(), amount()
        target = None
        if value is not None and distance is not None:
            step = distance.astype(I64)
            ways = {"BFLY": lane ^ step, "IDX": step, "UP": lane - step, "DOWN": lane + step}
            target = next(ways[m] for m in one.modifiers if m in ways)
            target = np.where((target >= 0) & (target < WARP), target, lane)
            value = value[first + target]
        else:
            value = None
        run.write(predicate, None, one.guard)
        run.write(result, value, one.guard)

    return move


def _never(run: _Run, one: Instruction) -> Callable[[], None]:
    """FCHK: whether a division of floats needs the slow path, which ordinary numbers do not."""
    return lambda: run.write(one.operands[0], ~run.true, one.guard)


_OPERATIONS: dict[str, Callable[[_Run, Instruction], Callable[[], None] | None]] = {
    "MOV": _mov, "R2UR": _mov, "LDC": _constant, "S2R": _special, "S2UR": _special, "CS2R": _special,
    "HFMA2": _half_constants, "IMAD": _imad, "IADD3": _iadd3, "VIADD": _viadd, "IADD": _viadd, "LEA": _lea, "SHF": _shf,
    "LOP3": _lop3, "PLOP3": _plop3, "ISETP": _isetp, "SEL": _select, "FSEL": _select, "VIMNMX": _least,
    "IMNMX": _least, "VIADDMNMX": _least, "PRMT": _prmt, "SGXT": _sgxt, "IABS": _iabs, "I2F": _to_float,
    "MUFU": _reciprocal, "F2I": _to_integer, "P2R": _predicates_to_register, "R2P": _register_to_predicates,
    "SHFL": _shuffle, "FCHK": _never,
}  # fmt: skip
