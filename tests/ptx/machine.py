"""Runs a program: blocks of threads in lock step, with numpy over all threads.

Blocks of a grid are run many at a time, as one array of threads. Threads that took different branches are run one path after
the other, those that are behind first, so that they meet again. An instruction of a whole warp, of four warps or of a block
waits until all of its threads are there.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .findings import Findings
from .memory import GlobalMemory, SharedMemory
from .numbers import RAW, Array, decode
from .program import WIDTHS, Instruction, Operand, Program, UnsupportedPTX, parse

WARP = 32
WARPS_OF_MATRIX = 4
"""Warps that do a wgmma together."""
THREADS = 8192
"""Threads that run at a time: enough for numpy, few enough for the cache."""

Step = Callable[["Machine", "Array | None"], None]
"""Runs one instruction for the threads that the mask names; None for all."""
Reader = Callable[["Machine"], Array]

BUILDERS: dict[str, Callable[[Instruction, Decoder], Step]] = {}
"""By name of an instruction: makes what runs it. The modules of this package fill it."""
GROUPS: dict[str, int | None] = {}
"""Threads that must do an instruction together; None for the whole block. One that is not here has 1."""


def instruction(*names: str, together: int | None = 1) -> Callable[[Callable], Callable]:
    """Declare the builder of instructions, and how many threads must do them together."""

    def declare(builder: Callable[[Instruction, Decoder], Step]) -> Callable:
        for name in names:
            BUILDERS[name] = builder
            GROUPS[name] = together
        return builder

    return declare


class Deadlock(Exception):
    """Threads wait for each other."""


@dataclass(frozen=True)
class Decoded:
    """An instruction that is ready to run."""

    step: Step | None
    """None of a branch."""
    target: int
    """Where a branch goes."""
    group: int | None
    predicate: int | None
    negated: bool
    source: Instruction
    reads: frozenset[int]
    writes: frozenset[int]


class Decoder:
    """Translates instructions; knows the registers by number."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.numbers: dict[str, int] = {}
        self.parameters = {name: i for i, (name, _) in enumerate(program.parameters)}
        self.decoded = [self._decode(i) for i in program.instructions]
        names = [(i.source.name, *i.source.suffixes) for i in self.decoded]
        self.unit = min((_shared_width(name) for name in names), default=4)

    def number(self, register: str) -> int:
        """The place of a register."""
        self.program.width(register)
        return self.numbers.setdefault(register, len(self.numbers))

    def read(self, operand: Operand, kind: str) -> Reader:
        """What reads an operand as numbers of a type: an element a thread, or one for all of them."""
        if not isinstance(operand, str):
            raise UnsupportedPTX(f"a vector {operand} where a value is needed")
        width = WIDTHS[kind]
        if operand in SPECIAL:
            special = SPECIAL[operand]
            return lambda machine: decode(special(machine).astype(RAW[width]), kind)
        if self.program.is_register(operand):
            return self._read_register(self.number(operand), self.program.width(operand), width, kind)
        if operand in self.parameters:
            bits = self.parameters[operand] * PARAMETER_SIZE
        else:
            bits = _constant(operand, width)
        constant = decode(np.array([bits], RAW.get(width, np.bool_)), kind)
        return lambda machine: constant

    def _read_register(self, number: int, has: int, width: int, kind: str) -> Reader:
        if has == width:
            return lambda machine: decode(machine.registers[number], kind)
        return lambda machine: decode(machine.registers[number].astype(RAW[width]), kind)

    def address(self, operand: Operand) -> Reader:
        """What reads the int64 address of ``[register + offset]``."""
        found = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]", str(operand))
        if found is None:
            raise UnsupportedPTX(f"address {operand}")
        base, offset = found[1], int(found[2] or "0", 0)
        width = self.program.width(base) if self.program.is_register(base) else 4
        read = self.read(base, f"u{8 * width}")
        return lambda machine: np.broadcast_to(read(machine).astype(np.int64) + offset, machine.threads)

    def write(self, register: Operand) -> Callable[[Machine, Array, Array | None], None]:
        """What writes bits into a register, those of other widths cut or extended with zeros."""
        if register == "_":
            return lambda machine, bits, active: None
        if not isinstance(register, str):
            raise UnsupportedPTX(f"a vector {register} where a register is needed")
        number, width = self.number(register), self.program.width(register)
        dtype = np.dtype(RAW.get(width, np.bool_))

        def write(machine: Machine, bits: Array, active: Array | None) -> None:
            if bits.dtype != dtype:
                bits = bits.astype(dtype)
            if bits.shape != (machine.threads,):
                bits = np.broadcast_to(bits, machine.threads)
            if active is not None:
                bits = np.where(active, bits, machine.registers[number])
            machine.registers[number] = bits

        return write

    def _decode(self, source: Instruction) -> Decoded:
        if source.name not in BUILDERS and source.name not in BRANCHES:
            raise UnsupportedPTX(f"instruction {source.text!r}; add it to tests/ptx")
        branch = source.name in BRANCHES
        reads, writes = _registers(source, self)
        return Decoded(
            step=None if branch else BUILDERS[source.name](source, self),
            target=self._target(source) if branch else 0,
            group=1 if branch else GROUPS[source.name],
            predicate=None if source.predicate is None else self.number(source.predicate),
            negated=source.negated,
            source=source,
            reads=reads,
            writes=writes,
        )

    def _target(self, source: Instruction) -> int:
        if source.name != "bra":
            return len(self.program.instructions)
        return self.program.labels[source.operands[0]]


BRANCHES = ("bra", "ret", "exit")
STORES = ("st", "stmatrix", "red", "bar", "barrier", "cp", "fence", "membar")
"""Instructions that write no register."""


def _registers(source: Instruction, decoder: Decoder) -> tuple[frozenset[int], frozenset[int]]:
    """Numbers of the registers that an instruction reads and writes; wgmma's are known to wgmma."""
    if source.name == "wgmma":
        return frozenset(), frozenset()
    named = [re.findall(r"[%\w]+", str(operand)) for operand in source.operands]
    numbers = [{decoder.number(n) for n in names if decoder.program.is_register(n)} for names in named]
    if source.name in STORES or not numbers:
        return frozenset().union(*numbers), frozenset()
    return frozenset().union(*numbers[1:]), frozenset(numbers[0])


def _shared_width(name: tuple[str, ...]) -> int:
    """Bytes of the narrowest access to shared memory that an instruction may do."""
    if name[0] in ("ld", "st") and any(part.startswith("shared") for part in name):
        return WIDTHS[name[-1]]
    if name[0] == "wgmma" and ("bf16" in name or "f16" in name):
        return 2
    return 4


SPECIAL: dict[str, Callable[[Machine], Array]] = {
    "%tid.x": lambda machine: machine.thread,
    "%tid.y": lambda machine: np.zeros(1, np.uint32),
    "%tid.z": lambda machine: np.zeros(1, np.uint32),
    "%laneid": lambda machine: machine.thread % WARP,
    "%ntid.x": lambda machine: np.full(1, machine.block_threads, np.uint32),
} | {
    f"%{name}ctaid.{axis}": functools.partial(
        lambda machine, many, i: (
            np.full(1, machine.grid[i], np.uint32) if many else machine.block_index[i][machine.block]
        ),
        many=name == "n",
        i=i,
    )
    for name in ("", "n")
    for i, axis in enumerate("xyz")
}
"""Special registers."""
PARAMETER_SIZE = 8
"""Bytes between the addresses that parameters have here."""
SYMBOLS = {"global_smem": 0, "true": 1, "false": 0}
"""Addresses by name; Triton has one array of shared memory. And the two predicates that have a name."""


def _constant(text: str, width: int) -> int:
    """Bits of a number."""
    if text in SYMBOLS:
        return SYMBOLS[text]
    if re.fullmatch(r"0[fd][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        raise UnsupportedPTX(f"operand {text!r}")
    value = int(text.rstrip("U"), 0)
    return value & (2 ** (8 * width) - 1) if width else value != 0


class Machine:
    """The state of some blocks of a launch."""

    def __init__(
        self,
        decoder: Decoder,
        blocks: Sequence[tuple[int, int, int]],
        grid: tuple[int, int, int],
        arguments: Sequence[int],
        memory: GlobalMemory,
        shared: int,
        warps: int,
        findings: Findings,
    ) -> None:
        self.decoder, self.grid, self.arguments = decoder, grid, arguments
        self.memory, self.findings = memory, findings
        self.blocks, self.warps, self.block_threads = len(blocks), warps, warps * WARP
        self.threads = self.blocks * self.block_threads
        number = np.arange(self.threads)
        self.thread = (number % self.block_threads).astype(np.uint32)
        self.block = number // self.block_threads
        self.block_index = np.array(blocks, np.uint32).T
        self.shared = SharedMemory(shared, self.blocks, warps, decoder.unit, findings)
        self.warp_bit = np.left_shift(1, number // WARP % warps).astype(self.shared.readers.dtype)
        self.registers: list[Array] = [
            np.zeros(self.threads, RAW.get(decoder.program.width(name), np.bool_)) for name in decoder.numbers
        ]
        self.at = np.zeros(self.threads, np.int64)
        """Next instruction of each thread."""
        self.matrix: Any = None
        """State of the matrix units, see matrix.py; None before their first instruction."""
        self.copies: Any = None
        """State of asynchronous copies, see movement.py; None before the first."""

    def run(self) -> None:
        """Run until every thread has ended."""
        while (chosen := self._choose()) is not None:
            self._advance(*chosen)

    def _choose(self) -> tuple[int, Array | None, int] | None:
        """The next instruction, the threads that do it (None for all), and where other threads wait."""
        end = len(self.decoder.decoded)
        places = np.unique(self.at)
        for place in places[places < end]:
            here = self.at == place
            ready = here & self._complete(int(place), here)
            if ready.any():
                others = self.at[~ready]
                ahead = others[others > place]
                return (
                    int(place),
                    None if ready.all() else ready,
                    int(ahead.min()) if len(ahead) else end,
                )
        if (places < end).any():
            waits = "; ".join(self.decoder.decoded[p].source.text for p in places[places < end])
            raise Deadlock(f"threads wait for each other at: {waits}")
        return None

    def _complete(self, place: int, here: Array) -> Array:
        """The threads whose group is here as a whole; threads that have ended are not waited for."""
        group = self.decoder.decoded[place].group
        group = self.block_threads if group is None else group
        present = here | (self.at >= len(self.decoder.decoded))
        return np.repeat(present.reshape(-1, group).all(1), group)

    def _advance(self, place: int, active: Array | None, limit: int) -> None:
        """Run instructions until the threads branch apart, or meet others or have to wait for them."""
        decoded, first = self.decoder.decoded, place
        while place < limit:
            code = decoded[place]
            if active is not None and code.group != 1 and place != first:
                break
            mask = self._mask(code, active)
            if code.step is None:
                taken = _count(mask, self.threads)
                if taken == _count(active, self.threads):
                    place = code.target
                    continue
                place += 1
                if taken:
                    self._move(active, place)
                    self.at[mask] = code.target
                    return
                continue
            if mask is None or mask.any():
                if self.matrix is not None:
                    self.matrix.check_registers(self, code, mask)
                code.step(self, mask)
            place += 1
        self._move(active, place)

    def _mask(self, code: Decoded, active: Array | None) -> Array | None:
        if code.predicate is None:
            return active
        mask = self.registers[code.predicate]
        mask = ~mask if code.negated else mask
        mask = mask if active is None else mask & active
        return None if mask.all() else mask

    def _move(self, active: Array | None, place: int) -> None:
        if active is None:
            self.at[:] = place
        else:
            self.at[active] = place


def _count(mask: Array | None, threads: int) -> int:
    return threads if mask is None else int(mask.sum())


@functools.lru_cache(maxsize=64)
def decoded(ptx: str) -> Decoder:
    """The program of a module, ready to run."""
    from . import arithmetic, matrix, movement  # noqa: F401  fill the table of instructions

    return Decoder(parse(ptx))


def launch(
    ptx: str,
    grid: Sequence[int],
    arguments: Sequence[int | float],
    memory: GlobalMemory,
    *,
    shared: int,
    warps: int,
    most_blocks: int | None = None,
) -> Findings:
    """Run a kernel, see the module; returns what was found in ``memory.findings``.

    Args:
        ptx: The module.
        grid: Blocks along up to three axes.
        arguments: Addresses, integers and floats in the order of the kernel's parameters. Triton's scratch memory follows
            them, which no kernel here uses: its addresses are 0.
        memory: What the addresses point to.
        shared: Bytes of shared memory that a block has asked for.
        warps: Warps of a block.
        most_blocks: Run the first blocks only.
    """
    decoder = decoded(ptx)
    grid = (*grid, 1, 1)[:3]
    blocks = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    blocks = blocks[:most_blocks]
    parameters = decoder.program.parameters
    values = [_argument(a, kind) for a, (_, kind) in zip(arguments, parameters)]
    values += [0] * (len(parameters) - len(values))
    at_once = max(1, THREADS // (warps * WARP))
    with np.errstate(all="ignore"):
        for i in range(0, len(blocks), at_once):
            some = blocks[i : i + at_once]
            Machine(decoder, some, grid, values, memory, shared, warps, memory.findings).run()
    return memory.findings


def _argument(value: int | float, kind: str) -> int:
    if kind == "f32":
        return int(np.float32(value).view(np.uint32))
    if kind == "f64":
        return int(np.float64(value).view(np.uint64))
    return int(value) & (2 ** (8 * WIDTHS[kind]) - 1)
