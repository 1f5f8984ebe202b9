"""Reads PTX, NVIDIA's assembly language, as Triton writes it: one kernel in one module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

Operand = str | tuple[str, ...]
"""A register, number, symbol or ``[address]``; a tuple is a vector ``{a, b}``."""

WIDTHS = {"pred": 0} | {f"{kind}{8 * size}": size for kind in "busf" for size in (1, 2, 4, 8)}
WIDTHS |= {"bf16": 2, "f16x2": 4, "bf16x2": 4, "tf32": 4}
"""Bytes of a value of each type; 0 for predicates."""


class UnsupportedPTX(Exception):
    """The emulator lacks something that the code contains."""


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@predicate name.suffix.suffix operands``."""

    name: str
    suffixes: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str
    predicate: str | None = None
    negated: bool = False

    @property
    def type(self) -> str:
        """The last suffix, which is the type of most instructions."""
        return self.suffixes[-1]

    def vector(self, position: int) -> tuple[str, ...]:
        """The operand as a tuple, with one element where it is not a vector."""
        operand = self.operands[position]
        return operand if isinstance(operand, tuple) else (operand,)


@dataclass
class Program:
    """A kernel: its instructions, and where its labels point."""

    parameters: list[tuple[str, str]]
    """(name, type) in order."""
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    """Bytes of every register, by its name without the number; 0 for predicates."""

    def is_register(self, name: str) -> bool:
        """Whether a register of this name is declared."""
        return name in self.widths or name.rstrip("0123456789") in self.widths

    def width(self, register: str) -> int:
        """Bytes of a register; 0 for a predicate."""
        if not self.is_register(register):
            raise UnsupportedPTX(f"no register {register!r} is declared")
        return self.widths.get(register, self.widths.get(register.rstrip("0123456789")))


def parse(text: str) -> Program:
    """Read a module with one kernel."""
    head, _, rest = text.partition("\n{")
    parameters = re.findall(r"\.param \.(\w+)[^\n]*?(\w+_param_\d+)", head)
    program = Program([(name, kind) for kind, name in parameters])
    for statement in _statements(rest.partition("\n}")[0]):
        if statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.instructions)
        elif statement.startswith(".reg"):
            _declare(program, statement)
        elif statement.startswith(".") and not statement.startswith(".pragma"):
            raise UnsupportedPTX(f"directive {statement!r}")
        elif not statement.startswith("."):
            program.instructions.append(_instruction(statement))
    return program


def _statements(body: str) -> Iterator[str]:
    """Labels with their colon, directives and instructions, without comments and the braces of scopes."""
    pending = ""
    for line in body.split("\n"):
        line = line.partition("//")[0].strip()
        if re.fullmatch(r"\$?\w+:", line):
            yield line
        elif not line.startswith((".loc", ".file")):
            *complete, pending = f"{pending} {line}".split(";")
            yield from filter(None, map(_without_scope, complete))
            pending = _without_scope(pending)
    if pending:
        raise UnsupportedPTX(f"no end of the statement {pending!r}")


def _without_scope(statement: str) -> str:
    """The statement without the braces of scopes before it."""
    return re.sub(r"^[\s{}]+", "", statement).strip()


def _declare(program: Program, statement: str) -> None:
    kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
    for name in names.split(","):
        program.widths[re.sub(r"<\d+>", "", name.strip())] = WIDTHS[kind]


def _instruction(statement: str) -> Instruction:
    found = re.fullmatch(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
    if found is None:
        raise UnsupportedPTX(f"cannot read {statement!r}")
    negation, predicate, opcode, operands = found.groups()
    name, *suffixes = opcode.split(".")
    return Instruction(
        name, tuple(suffixes), tuple(_operands(operands)), statement, predicate, negation == "!"
    )


def _operands(text: str) -> Iterator[Operand]:
    for operand in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", text):
        if operand.startswith("{"):
            yield tuple(part.strip() for part in operand.strip("{}").split(","))
        else:
            yield operand.strip()
