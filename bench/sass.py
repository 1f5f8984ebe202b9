"""Reads the machine code (SASS) of a compiled NVIDIA kernel, and checks what must not be in it.

``read(cubin, shared)`` disassembles a kernel with the tools that come with Triton; no GPU is needed. ``faults(code)`` names what
would be wrong on a GPU and is visible without running the code:

- registers that spill to local memory, and local accesses in general,
- shared accesses at constant addresses beyond the shared memory that the kernel asks for,
- tensor-core instructions of eight columns (``HGMMA.64x8x*``): Triton does not allocate the padding that the
  hardware reads for them (triton issue 10629).

:mod:`bench.sass_run` executes the integer part of the same code, for addresses that are not constant.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

SHARED_BASE = 0x400
"""Shared memory of a block begins here on Hopper: the system keeps what is below."""
EIGHT_COLUMNS = re.compile(r"HGMMA\.64x8x")
"""Instructions that no kernel may contain, see :func:`trgnet.kernels.frame_tiles.one_warpgroup`."""

_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_PREDICATE = re.compile(r"!?U?P[T\d]\b")
_REGISTER = re.compile(r"\b(UR|R)(\d+|Z)\b")
_ENDS = {"EXIT", "RET"}
_NO_RESULT = {
    "STG", "STS", "STSM", "STL", "ST", "RED", "BRA", "BRX", "EXIT", "RET", "CALL", "NOP", "BAR", "BSSY", "BSYNC", "WARPGROUP", "FENCE", "MEMBAR",
    "WARPSYNC", "LDGDEPBAR", "DEPBAR", "ERRBAR", "CCTL", "LDGSTS", "SYNCS", "BPT", "YIELD", "NANOSLEEP", "R2P", "BREAK",
    "ARRIVES", "UTMALDG", "UTMASTG", "UTMACMDFLUSH", "UTMACCTL", "WARPGROUPSET", "ELECT", "KILL", "PREEXIT", "ACQBULK",
}  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@!P0 LDG.E.128 R4, desc[UR8][R2.64]`` has the opcode LDG with modifiers E and 128."""

    address: int
    guard: str | None
    """Predicate that it is executed under, without the ``@``."""
    name: str
    operands: tuple[str, ...]

    @cached_property
    def opcode(self) -> str:
        """The name without modifiers."""
        return self.name.split(".")[0]

    @cached_property
    def modifiers(self) -> frozenset[str]:
        return frozenset(self.name.split(".")[1:])

    @cached_property
    def width(self) -> int:
        """Bytes that a thread accesses, if this is an access to memory."""
        sizes = (("256", 32), ("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1))
        if self.opcode in ("LDSM", "STSM"):
            return 4 * self.matrices
        # "16" alone is the element of a packed operation.
        return next(
            (size for name, size in sizes if name in self.modifiers), 2 if "16" in self.modifiers else 4
        )

    @cached_property
    def matrices(self) -> int:
        """8 x 8 matrices that LDSM or STSM moves."""
        return 4 if "4" in self.modifiers else 2 if "2" in self.modifiers else 1

    @cached_property
    def shape(self) -> tuple[int, int, int] | None:
        """Rows, columns and depth of a product on the tensor cores."""
        if self.opcode == "HGMMA":
            return tuple(map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", self.name).groups()))
        if self.opcode in ("HMMA", "IMMA"):
            digits = re.search(r"\.(168)(\d+)|\.(884)", self.name)
            return (16, 8, int(digits.group(2))) if digits.group(2) else (8, 8, 4)
        return None

    @cached_property
    def target(self) -> str | None:
        """Label that a branch or call goes to."""
        match = re.search(r"`\((\.L\w+)\)", " ".join(self.operands))
        return match.group(1) if match else None

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """Labels that a branch by a table goes to."""
        return tuple(re.findall(r"\.L\w+", ",".join(self.operands))) if self.opcode == "BRX" else ()

    @cached_property
    def results(self) -> tuple[str, ...]:
        """Registers and predicates that it writes."""
        if self.opcode in _NO_RESULT:
            return ()
        found, operands = [], list(self.operands)
        while operands and _PREDICATE.fullmatch(operands[0]):
            found.append(operands.pop(0))
        if self.opcode.removeprefix("U") in ("ISETP", "FSETP", "HSETP2", "PLOP3", "DSETP", "FCHK"):
            return tuple(found[: 1 if self.opcode == "FCHK" else 2])
        if operands:
            found += _consecutive(operands.pop(0), self._result_registers)
        # IADD3 and LEA write carries behind their result.
        if self.opcode.removeprefix("U") in ("IADD3", "LEA"):
            for operand in operands:
                if not _PREDICATE.fullmatch(operand):
                    break
                found.append(operand)
        return tuple(found)

    @cached_property
    def _result_registers(self) -> int:
        if self.opcode == "HGMMA":
            return self.shape[1] // (2 if "F32" in self.modifiers else 4)
        if self.opcode in ("HMMA", "IMMA"):
            return 4 if "F32" in self.modifiers or self.opcode == "IMMA" else 2
        if self.opcode in ("LDSM",):
            return self.matrices
        if self.opcode in ("LDG", "LDS", "LDL", "LD", "ATOMG", "ATOMS"):
            return max(1, self.width // 4)
        wide = "WIDE" in self.modifiers or "64" in self.modifiers or "F64" in self.modifiers
        double = self.opcode in ("DADD", "DMUL", "DFMA", "CS2R") and "32" not in self.modifiers
        return 2 if wide or double else 1

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Registers and predicates that it reads."""
        found = [] if self.guard is None else [self.guard.lstrip("!")]
        skipped = 0 if self.opcode in _NO_RESULT else 1
        for operand in self.operands:
            if _PREDICATE.fullmatch(operand):
                found.append(operand.lstrip("!"))
                continue
            if skipped:  # the result
                skipped -= 1
                continue
            found += self._operand_registers(operand)
        return tuple(
            dict.fromkeys(r for r in found if not r.endswith(("Z", "PT")) and r not in ("PT", "UPT"))
        )

    def _operand_registers(self, operand: str) -> Iterator[str]:
        for match in _REGISTER.finditer(operand):
            count = 2 if operand[match.end() :].startswith(".64") or "gdesc" in operand else 1
            if self.opcode in ("STG", "STS", "STSM", "ST", "STL") and operand == self.operands[-1]:
                count = max(1, self.width // 4)
            elif self.opcode == "HGMMA" and match.group(1) == "R":
                count = 4 if operand == self.operands[1] else self._result_registers
            elif self.opcode == "HMMA":
                count = 4
            elif "WIDE" in self.modifiers and operand == self.operands[-1]:
                count = 2
            yield from _consecutive(match.group(), count)


def _consecutive(register: str, count: int) -> list[str]:
    match = _REGISTER.search(register)
    if match is None or match.group(2) == "Z":
        return []
    return [f"{match.group(1)}{int(match.group(2)) + i}" for i in range(count)]


@dataclass(frozen=True)
class Code:
    """A kernel's instructions, and what it asks of the hardware."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    """Index of the instruction behind each label."""
    registers: int = 0
    stack: int = 0
    """Bytes of the stack and of local memory, for a thread."""
    shared: int = 0
    """Bytes of shared memory, for a block."""
    tables: bytes = b""
    """Constant bank 2, which has the tables of branches."""

    @cached_property
    def names(self) -> list[str]:
        """Names of the instructions with their modifiers, in order."""
        return [instruction.name for instruction in self.instructions]

    @cached_property
    def blocks(self) -> list[Block]:
        """Basic blocks in order of address, with the indices of their successors."""
        ends = {i + 1 for i, one in enumerate(self.instructions) if one.opcode in {"BRA", "BRX", *_ENDS}}
        starts = sorted({0, *ends, *self.labels.values()} - {len(self.instructions)})
        number = {start: i for i, start in enumerate(starts)}
        blocks = [Block(start, end) for start, end in zip(starts, [*starts[1:], len(self.instructions)])]
        for block in blocks:
            block.successors += [number[i] for i in self._next(block.end - 1) if i in number]
        return blocks

    def _next(self, i: int) -> Iterator[int]:
        one = self.instructions[i]
        if one.opcode == "BRA":
            yield self.labels[one.target]
        yield from (self.labels[label] for label in one.targets)
        conditional = one.guard is not None or any(map(_PREDICATE.fullmatch, one.operands))
        if one.opcode not in {"BRA", "BRX", *_ENDS} or conditional:
            yield i + 1

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """Natural loops: blocks of each, by the number of the block that it begins with."""
        before = self._predecessors
        found: dict[int, set[int]] = {}
        for tail, dominators in self._dominators.items():
            for head in set(self.blocks[tail].successors) & dominators:
                body, todo = found.setdefault(head, {head}), [tail]
                while todo:
                    block = todo.pop()
                    if block not in body:
                        body.add(block)
                        todo += before[block]
        # Behind the last instruction stands a branch to itself.
        return {h: b for h, b in found.items() if b != {h} or self.blocks[h].end - self.blocks[h].start > 1}

    @cached_property
    def _predecessors(self) -> dict[int, list[int]]:
        before: dict[int, list[int]] = {0: []}
        todo = [0]
        while todo:
            block = todo.pop()
            for after in self.blocks[block].successors:
                if after not in before:
                    before[after] = []
                    todo.append(after)
                if block not in before[after]:
                    before[after].append(block)
        return before

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """Blocks that every path to a reachable block runs through, itself included."""
        before = self._predecessors
        found = {block: set(before) for block in before} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in sorted(set(before) - {0}):
                new = set.intersection(*(found[b] for b in before[block])) | {block}
                changed |= new != found[block]
                found[block] = new
        return found


@dataclass
class Block:
    """Instructions from ``start`` to before ``end``, which are executed one after another."""

    start: int
    end: int
    successors: list[int] = field(default_factory=list)


def parse(text: str, **facts: Any) -> Code:
    """The code in a listing of ``nvdisasm -c``; ``facts`` are further fields of :class:`Code`."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := _LABEL.match(line):
            labels[match.group(1)] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            address, guard, name, operands = match.groups()
            guard = guard and guard.removeprefix("@")
            split = tuple(o.strip().replace(".reuse", "") for o in operands.split(",")) if operands else ()
            instructions.append(Instruction(int(address, 16), guard, name, split))
    if not instructions:
        raise ValueError("found no instructions in the listing; expected the output of nvdisasm -c")
    return Code(tuple(instructions), labels, **facts)


def read(cubin: bytes, shared: int = 0) -> Code:
    """Disassemble a compiled kernel that asks for ``shared`` bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = tool("cuobjdump", "-res-usage", str(file))
        listing = tool("nvdisasm", "-c", str(file))
        tables = _constants(tool("nvdisasm", str(file))) if "c[0x2]" in listing else b""
    registers, stack, local = map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage).groups())
    return parse(listing, registers=registers, stack=stack + local, shared=shared, tables=tables)


def _constants(listing: str) -> bytes:
    """The bytes of constant bank 2 in a listing with data."""
    section = listing.partition(".nv.constant2.")[2].partition("//-----")[0]
    return bytes(int(byte, 16) for line in re.findall(r"\.byte\s+(.*)", section) for byte in line.split(","))


def tool(name: str, *args: str) -> str:
    """Output of one of the NVIDIA tools that come with Triton."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    run = subprocess.run([program, *args], capture_output=True, text=True, check=True)
    return run.stdout + run.stderr


def faults(code: Code) -> list[str]:
    """What must not be, each with the address of its first instruction."""
    found: dict[str, int] = {}
    if code.stack:
        found[f"spills {code.stack} bytes to local memory"] = 0
    for one in code.instructions:
        for fault in _faults_of(one, code.shared):
            found.setdefault(fault, one.address)
    return [f"{fault} (at {address:#06x})" for fault, address in found.items()]


def _faults_of(one: Instruction, shared: int) -> Iterator[str]:
    if EIGHT_COLUMNS.match(one.name):
        yield f"has a tensor-core instruction of eight columns, which reads beyond its tile: {one.name}"
    if one.opcode in ("LDL", "STL"):
        yield f"accesses local memory: {one.name}"
    # ptxas waits for copies with a load that has no result.
    if one.opcode in ("LDS", "STS", "LDSM", "STSM", "ATOMS") and one.operands[0] != "RZ":
        address = constant_address(one)
        if address is not None and not SHARED_BASE <= address <= SHARED_BASE + shared - one.width:
            place = address - SHARED_BASE
            yield f"accesses shared memory at {place} to {place + one.width} of {shared} bytes: {one.name}"


def constant_address(one: Instruction) -> int | None:
    """Address of a shared access if the instruction says it all; None where a register has a part of it."""
    (place,) = [o for o in one.operands if o.startswith("[")][:1]
    terms = place.strip("[]").split("+")
    numbers = [int(t, 16) for t in terms if re.fullmatch(r"-?0x[0-9a-f]+", t)]
    registers = [t for t in terms if _REGISTER.match(t) and not t.startswith(("RZ", "URZ"))]
    return None if registers else sum(numbers)
