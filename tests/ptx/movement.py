"""Instructions that move values between registers and memory, and those that order what threads do there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .machine import PARAMETER_SIZE, WARP, Decoder, Machine, Step, instruction
from .numbers import DTYPES, RAW, Array
from .program import WIDTHS, Instruction, UnsupportedPTX

ORDERS = {"relaxed", "acquire", "release", "acq_rel", "volatile", "weak"}
SCOPES = {"cta", "gpu", "sys"}
CACHES = {"nc", "ca", "cg", "cs", "L1::evict_last", "L1::evict_first", "L1::no_allocate"}
SHARED = {"shared", "shared::cta"}
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
"""Modifiers of accesses. Orders and scopes change nothing here: every access is done before the next instruction."""


def _space(source: Instruction) -> str:
    """``global``, ``shared`` or ``param``; refuses modifiers that are not known."""
    spaces = {"global", "param"} | SHARED
    known = ORDERS | SCOPES | CACHES | spaces | set(VECTORS) | set(WIDTHS)
    if unknown := set(source.suffixes) - known:
        raise UnsupportedPTX(f"modifiers {sorted(unknown)} of {source.text!r}")
    (space,) = set(source.suffixes) & spaces
    return "shared" if space in SHARED else space


def _chosen(machine: Machine, active: Array | None) -> Array | slice:
    """An index of the active threads."""
    return slice(None) if active is None else np.flatnonzero(active)


def _spread(machine: Machine, values: Array, active: Array | None) -> Array:
    """Values of the active threads at the places of all threads."""
    if active is None:
        return values
    everywhere = np.zeros(machine.threads, values.dtype)
    everywhere[active] = values
    return everywhere


@instruction("ld")
def _load(source: Instruction, decoder: Decoder) -> Step:
    space, size, text = _space(source), WIDTHS[source.type], source.text
    registers = source.vector(0)
    writes = [decoder.write(register) for register in registers]
    if space == "param":
        return _load_parameter(source, decoder)
    address = decoder.address(source.operands[1])

    def step(machine: Machine, active: Array | None) -> None:
        chosen = _chosen(machine, active)
        places = address(machine)[chosen]
        if space == "global":
            values = machine.memory.load(places, size, len(writes), text)
        else:
            blocks, bits = machine.block[chosen], machine.warp_bit[chosen]
            values = machine.shared.load(places, blocks, bits, size, len(writes), text)
        for write, row in zip(writes, values):
            write(machine, _spread(machine, row, active), active)

    return step


def _load_parameter(source: Instruction, decoder: Decoder) -> Step:
    """A parameter by its name, or by an address that was chosen among those of several."""
    dtype, text = RAW[WIDTHS[source.type]], source.text
    address, write = decoder.address(source.operands[1]), decoder.write(source.vector(0)[0])

    def step(machine: Machine, active: Array | None) -> None:
        numbers, rest = np.divmod(address(machine)[_chosen(machine, active)], PARAMETER_SIZE)
        arguments = np.array(machine.arguments, np.uint64)
        if rest.any() or not ((numbers >= 0) & (numbers < len(arguments))).all():
            raise UnsupportedPTX(f"part of a parameter, or none, in {text!r}")
        write(machine, _spread(machine, arguments[numbers].astype(dtype), active), active)

    return step


@instruction("st")
def _store(source: Instruction, decoder: Decoder) -> Step:
    space, size, text = _space(source), WIDTHS[source.type], source.text
    address = decoder.address(source.operands[0])
    reads = [decoder.read(register, f"b{8 * size}") for register in source.vector(1)]

    def step(machine: Machine, active: Array | None) -> None:
        chosen = _chosen(machine, active)
        places = address(machine)[chosen]
        values = np.stack([np.broadcast_to(read(machine), machine.threads)[chosen] for read in reads])
        if space == "global":
            machine.memory.store(places, values, size, text)
        else:
            blocks, bits = machine.block[chosen], machine.warp_bit[chosen]
            _store_shared(machine, places, blocks, bits, values, size, text)

    return step


def _store_shared(
    machine: Machine, places: Array, blocks: Array, bits: Array, values: Array, size: int, text: str
) -> Array:
    """Write to shared memory, also with regard to products in flight; returns the units that were written."""
    units = machine.shared.store(places, blocks, bits, values, size, text)
    if machine.matrix is not None:
        machine.matrix.check_overwritten(units, text)
    return units


UPDATES: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "exch": lambda old, new: new,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
}


@instruction("atom", "red")
def _atomic(source: Instruction, decoder: Decoder) -> Step:
    """``atom{.order}{.scope}.global.operation.type d, [a], b``; threads one after the other."""
    known = ORDERS | SCOPES | {"global"} | set(UPDATES) | set(WIDTHS)
    operations = [part for part in source.suffixes if part in UPDATES]
    if not set(source.suffixes) <= known or "global" not in source.suffixes or len(operations) != 1:
        raise UnsupportedPTX(f"atomic {source.text!r}")
    returns, update = source.name == "atom", UPDATES[operations[0]]
    size, dtype = WIDTHS[source.type], DTYPES[source.type]
    write = decoder.write(source.vector(0)[0]) if returns else None
    address = decoder.address(source.operands[int(returns)])
    read = decoder.read(source.operands[int(returns) + 1], f"b{8 * size}")

    def step(machine: Machine, active: Array | None) -> None:
        chosen = np.arange(machine.threads)[_chosen(machine, active)]
        places = address(machine)
        values = np.broadcast_to(read(machine), machine.threads)
        before = np.zeros(machine.threads, RAW[size])
        for thread in chosen:
            place = places[thread : thread + 1]
            old = machine.memory.load(place, size, 1, source.text)
            before[thread] = old[0, 0]
            new = update(old.view(dtype), values[thread : thread + 1].view(dtype)).astype(dtype)
            machine.memory.store(place, new.view(RAW[size]), size, source.text)
        if write is not None:
            write(machine, before, active)

    return step


@instruction("bar", "barrier", together=None)
def _barrier(source: Instruction, decoder: Decoder) -> Step:
    """``bar.sync 0`` of the whole block; ``bar.warp.sync`` orders a warp, which is always in order here."""
    if source.suffixes == ("warp", "sync"):
        return lambda machine, active: None
    if not set(source.suffixes) <= {"sync", "cta", "aligned"} or source.operands[0] != "0":
        raise UnsupportedPTX(f"barrier {source.text!r}")

    def step(machine: Machine, active: Array | None) -> None:
        if len(source.operands) > 1 and int(source.operands[1]) != machine.block_threads:
            raise UnsupportedPTX(f"{source.text!r}: a barrier of a part of the block")
        machine.shared.barrier(np.unique(machine.block[_chosen(machine, active)]))

    return step


@instruction("fence", "membar")
def _fence(source: Instruction, decoder: Decoder) -> Step:
    """Fences between threads change nothing here; those of the matrix units show them what was written."""
    if source.suffixes[:2] == ("proxy", "async") and source.suffixes[2:] in ((), ("shared::cta",)):
        return lambda machine, active: machine.shared.fence(
            np.unique(machine.block[_chosen(machine, active)])
        )
    if not set(source.suffixes) <= ORDERS | SCOPES | {"sc", "gl"}:
        raise UnsupportedPTX(f"fence {source.text!r}")
    return lambda machine, active: None


@dataclass
class Copies:
    """Asynchronous copies that one instruction started and that were not waited for."""

    threads: Array
    groups: Array
    """The group of each thread's copy: how many groups that thread had closed before."""
    units: Array


class CopyQueue:
    """The copies in flight, and how many groups each thread has closed."""

    def __init__(self, threads: int) -> None:
        self.closed = np.zeros(threads, np.int64)
        self.waiting: list[Copies] = []

    def finish(self, machine: Machine, active: Array | None, behind: int | None) -> None:
        """Wait until the active threads have at most ``behind`` groups in flight; None waits for open ones too."""
        awaited = np.ones(machine.threads, bool) if active is None else active
        remaining = []
        for copies in self.waiting:
            last = self.closed[copies.threads] - (0 if behind is None else behind)
            done = awaited[copies.threads] & ((copies.groups < last) | (behind is None))
            machine.shared.finish_copy(copies.units[done], machine.warp_bit[copies.threads[done]])
            if not done.all():
                remaining.append(Copies(copies.threads[~done], copies.groups[~done], copies.units[~done]))
        self.waiting = remaining


def _copies(machine: Machine) -> CopyQueue:
    if machine.copies is None:
        machine.copies = CopyQueue(machine.threads)
    return machine.copies


@instruction("cp")
def _copy(source: Instruction, decoder: Decoder) -> Step:
    """``cp.async`` from global to shared memory, and its groups."""
    if source.suffixes[0] != "async":
        raise UnsupportedPTX(f"copy {source.text!r}")
    if source.suffixes[1] == "commit_group":
        return _close_group
    if source.suffixes[1] in ("wait_group", "wait_all"):
        behind = int(source.operands[0]) if source.operands else None
        return lambda machine, active: _copies(machine).finish(machine, active, behind)
    return _start_copy(source, decoder)


def _close_group(machine: Machine, active: Array | None) -> None:
    _copies(machine).closed[_chosen(machine, active)] += 1


def _start_copy(source: Instruction, decoder: Decoder) -> Step:
    if not set(source.suffixes[1:]) <= {"ca", "cg", "global"} | SHARED:
        raise UnsupportedPTX(f"copy {source.text!r}")
    to, start = decoder.address(source.operands[0]), decoder.address(source.operands[1])
    size, text = int(source.operands[2], 0), source.text
    read_length = decoder.read(source.operands[3], "u32") if len(source.operands) > 3 else None

    def step(machine: Machine, active: Array | None) -> None:
        threads = np.arange(machine.threads)[_chosen(machine, active)]
        length = np.full(len(threads), size) if read_length is None else None
        if length is None:
            length = np.broadcast_to(read_length(machine), machine.threads)[threads].astype(np.int64)
        if not np.isin(length, (0, size)).all():
            raise UnsupportedPTX(f"{text!r}: a copy of a part of its bytes")
        values = np.zeros((size // 4, len(threads)), np.uint32)
        read = length > 0
        values[:, read] = machine.memory.load(start(machine)[threads][read], 4, size // 4, text)
        blocks, bits = machine.block[threads], machine.warp_bit[threads]
        units = _store_shared(machine, to(machine)[threads], blocks, bits, values, 4, text)
        if len(units) == len(threads):  # else it was out of bounds
            machine.shared.start_copy(units)
            queue = _copies(machine)
            queue.waiting.append(Copies(threads, queue.closed[threads].copy(), units))

    return step


def _rows(machine: Machine, addresses: Array, matrices: int) -> Array:
    """(warps, 8 * matrices) addresses of the rows: those of the first lanes."""
    return addresses.reshape(-1, WARP)[:, : 8 * matrices]


def _matrices(source: Instruction) -> tuple[bool, int]:
    """Whether they are transposed, and how many there are."""
    known = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "b16"} | SHARED
    if not set(source.suffixes) <= known:
        raise UnsupportedPTX(f"matrices {source.text!r}")
    (count,) = {"x1", "x2", "x4"} & set(source.suffixes)
    return "trans" in source.suffixes, int(count[1])


@instruction("ldmatrix", "stmatrix", together=WARP)
def _matrix_rows(source: Instruction, decoder: Decoder) -> Step:
    """8 x 8 matrices of 16-bit elements: lane l has the elements 2 l and 2 l + 1 of each, or of its transpose."""
    transposed, count = _matrices(source)
    loads, text = source.name == "ldmatrix", source.text
    address = decoder.address(source.operands[int(loads)])
    registers = source.vector(0 if loads else 1)
    assert len(registers) == count
    accessors = [decoder.write(r) if loads else decoder.read(r, "b32") for r in registers]

    def step(machine: Machine, active: Array | None) -> None:
        if active is not None and not active.reshape(-1, WARP).all(1)[active.reshape(-1, WARP).any(1)].all():
            raise UnsupportedPTX(f"{text!r}: a part of a warp")
        warps = np.arange(machine.threads // WARP)
        warps = warps if active is None else warps[active.reshape(-1, WARP)[:, 0]]
        rows = _rows(machine, address(machine), count)[warps].reshape(-1)
        blocks, bits = (
            np.repeat(a.reshape(-1, WARP)[warps, 0], 8 * count) for a in (machine.block, machine.warp_bit)
        )
        if loads:
            elements = machine.shared.load(
                rows, blocks, bits, 2, 8, text
            )  # (8 columns, warps * matrices * 8)
            elements = elements.reshape(8, len(warps), count, 8).transpose(1, 2, 3, 0)
            elements = elements.swapaxes(2, 3) if transposed else elements
            pairs = np.ascontiguousarray(elements).view(np.uint32).reshape(len(warps), count, WARP)
            for i, write in enumerate(accessors):
                write(machine, _spread(machine, pairs[:, i].reshape(-1), active), active)
            return
        pairs = np.stack(
            [np.broadcast_to(r(machine), machine.threads).reshape(-1, WARP)[warps] for r in accessors], 1
        )
        elements = np.ascontiguousarray(pairs).view(np.uint16).reshape(len(warps), count, 8, 8)
        elements = elements.swapaxes(2, 3) if transposed else elements
        values = elements.transpose(3, 0, 1, 2).reshape(8, -1)
        _store_shared(machine, rows, blocks, bits, values, 2, text)

    return step
