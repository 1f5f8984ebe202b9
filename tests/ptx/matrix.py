"""Matrix units: ``mma.sync`` of a warp, and ``wgmma`` of four warps, which runs by itself until it is waited for.

Products are summed up in float64 and rounded to float32 once, so they are a little more accurate than the hardware's.
The layouts are those of the PTX manual, "Matrix fragments" and "Asynchronous warpgroup-level matrix instructions".
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import numpy as np

from .findings import NOT_AWAITED, NOT_FENCED, OUT_OF_BOUNDS, PADDING
from .machine import WARP, WARPS_OF_MATRIX, Decoded, Decoder, Machine, Step, instruction
from .numbers import RAW, Array, decode
from .program import WIDTHS, Instruction, UnsupportedPTX

GROUP = WARP * WARPS_OF_MATRIX
READ_COLUMNS = 16
"""Columns that the hardware reads at least of a tile in tf32, even where the instruction has eight (triton #10629).

The descriptors of such tiles have no distance to the next eight columns: they are taken to follow at once."""

Places = tuple[tuple[Array, Array], ...]
"""Of each register of a fragment: rows and columns of its elements (lanes, elements of a register)."""


@functools.lru_cache
def _left_places(kind: str, k: int) -> Places:
    """A (16, k) of one warp."""
    per_register = 4 // WIDTHS[kind]
    lane = np.arange(WARP)[:, None]
    column = (lane & 3) * per_register + np.arange(per_register)
    return tuple(
        (np.broadcast_to((lane >> 2) + row, column.shape), column + start)
        for start in range(0, k, 4 * per_register)
        for row in (0, 8)
    )


@functools.lru_cache
def _right_places(kind: str, k: int) -> Places:
    """B (k, 8) of one warp: as A's, transposed."""
    return tuple((column, row) for row, column in _left_places(kind, k)[::2])


@functools.lru_cache
def _result_places(columns: int) -> Places:
    """D (16, columns) of one warp; a register has one element."""
    lane = np.arange(WARP)[:, None]
    return tuple(
        ((lane >> 2) + row, 2 * (lane & 3) + column + start)
        for start in range(0, columns, 8)
        for row in (0, 8)
        for column in (0, 1)
    )


def _assemble(registers: list[Array], places: Places, shape: tuple[int, int], kind: str) -> Array:
    """(warps, *shape) of registers (warps, lanes) of bits."""
    matrix = np.zeros((len(registers[0]), *shape), np.float32)
    for bits, (row, column) in zip(registers, places, strict=True):
        values = decode(bits, kind) if WIDTHS[kind] == 4 else decode(_split(bits), kind)
        matrix[:, row, column] = values.reshape(*bits.shape, -1)
    return matrix


def _split(bits: Array) -> Array:
    """(..., 2) 16-bit elements of 32-bit registers, the lower first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(*bits.shape, 2)


def _element_kind(source: Instruction) -> str:
    kinds = [part for part in source.suffixes if part in ("tf32", "bf16", "f16")]
    if len(kinds) != 2 or kinds[0] != kinds[1] or "f32" not in source.suffixes:
        raise UnsupportedPTX(f"types of {source.text!r}")
    return kinds[0]


def _shape(source: Instruction) -> tuple[int, int, int]:
    (found,) = (m for part in source.suffixes if (m := re.fullmatch(r"m(\d+)n(\d+)k(\d+)", part)))
    return tuple(map(int, found.groups()))


@instruction("mma", together=WARP)
def _mma(source: Instruction, decoder: Decoder) -> Step:
    """``mma.sync.aligned.m16n8k_.row.col.f32.type.type.f32 d, a, b, c``."""
    (_, _, k), kind = _shape(source), _element_kind(source)
    if source.suffixes[:2] != ("sync", "aligned") or source.suffixes[3:5] != ("row", "col"):
        raise UnsupportedPTX(f"form of {source.text!r}")
    writes = [decoder.write(register) for register in source.vector(0)]
    a, b, c = ([decoder.read(r, "b32") for r in source.vector(i)] for i in (1, 2, 3))

    def step(machine: Machine, active: Array | None) -> None:
        def matrix(reads: list, places: Places, shape: tuple[int, int], kind: str) -> Array:
            registers = [np.broadcast_to(read(machine), machine.threads).reshape(-1, WARP) for read in reads]
            return _assemble(registers, places, shape, kind)

        product = matrix(a, _left_places(kind, k), (16, k), kind).astype(np.float64) @ matrix(
            b, _right_places(kind, k), (k, 8), kind
        )
        result = (product + matrix(c, _result_places(8), (16, 8), "f32")).astype(np.float32)
        for write, (row, column) in zip(writes, _result_places(8), strict=True):
            write(machine, result[:, row, column].reshape(-1).view(np.uint32), active)

    return step


@dataclass
class Products:
    """Products that one instruction started and that were not waited for."""

    groups: Array
    """Numbers of the groups of four warps."""
    closed: Array
    """How many batches of products each had closed before."""
    units: Array
    """(groups, n) units of shared memory that they read."""
    reads: frozenset[int]
    writes: frozenset[int]
    """Registers."""


class MatrixUnits:
    """The products in flight, and the registers that wgmma may not use yet."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.closed = np.zeros(machine.threads // GROUP, np.int64)
        self.waiting: list[Products] = []
        self.unfenced = set(range(len(machine.registers)))
        """Registers that were written since the last ``wgmma.fence``."""

    def check_registers(self, machine: Machine, code: Decoded, active: Array | None) -> None:
        """Find uses of registers by another instruction while products are in flight."""
        if code.source.name != "mov":  # LLVM copies operands behind the fence, which ptxas knows to undo
            self.unfenced |= code.writes
        for products in self.waiting:
            reads, writes = code.reads & products.writes, code.writes & (products.writes | products.reads)
            if (reads or writes) and np.isin(products.groups, _groups(machine, active)).any():
                verb = "reads" if reads else "writes"
                what = f"{verb} a register of a product that is not waited for"
                machine.findings.add(NOT_AWAITED, code.source.text, what)

    def check_overwritten(self, units: Array, instruction: str) -> None:
        """Find writes of shared memory that products in flight read."""
        for products in self.waiting:
            if np.isin(units, products.units).any():
                what = "writes shared memory that a product reads that is not waited for"
                self.machine.findings.add(NOT_AWAITED, instruction, what)

    def check_start(self, source: Instruction, reads: frozenset[int], writes: frozenset[int]) -> None:
        """Find registers of a product that were not fenced, or belong to another one in flight."""
        if self.unfenced & (reads | writes):
            self.machine.findings.add(NOT_FENCED, source.text, "uses registers that no wgmma.fence follows")
        for products in self.waiting:
            if reads & products.writes or writes & products.reads:
                what = "uses registers of a product that is not waited for"
                self.machine.findings.add(NOT_AWAITED, source.text, what)

    def wait(self, groups: Array, behind: int) -> None:
        """Wait until the groups have at most ``behind`` batches in flight."""
        remaining = []
        for products in self.waiting:
            done = np.isin(products.groups, groups) & (
                products.closed < self.closed[products.groups] - behind
            )
            bits = _group_bits(self.machine, products.groups[done])
            self.machine.shared.finish_matrix_read(products.units[done], bits)
            if not done.all():
                left = (a[~done] for a in (products.groups, products.closed, products.units))
                remaining.append(Products(*left, products.reads, products.writes))
        self.waiting = remaining


def _groups(machine: Machine, active: Array | None) -> Array:
    """Numbers of the groups of four warps that have active threads."""
    groups = np.arange(machine.threads // GROUP)
    return groups if active is None else groups[active.reshape(-1, GROUP).any(1)]


def _group_bits(machine: Machine, groups: Array) -> Array:
    """The bits of all warps of each group."""
    warps = machine.warp_bit.reshape(-1, WARPS_OF_MATRIX, WARP)[groups, :, 0]
    return np.bitwise_or.reduce(warps, axis=1)


def _units(machine: Machine) -> MatrixUnits:
    if machine.matrix is None:
        machine.matrix = MatrixUnits(machine)
    return machine.matrix


@instruction("wgmma", together=GROUP)
def _wgmma(source: Instruction, decoder: Decoder) -> Step:
    """The product, and the instructions that order products."""
    what = source.suffixes[0]
    if what == "mma_async":
        return _Product(source, decoder)
    if what == "fence":
        return lambda machine, active: _units(machine).unfenced.clear()
    if what == "commit_group":
        return _close_batch
    if what == "wait_group":
        behind = int(source.operands[0])
        return lambda machine, active: _units(machine).wait(_groups(machine, active), behind)
    raise UnsupportedPTX(source.text)


def _close_batch(machine: Machine, active: Array | None) -> None:
    _units(machine).closed[_groups(machine, active)] += 1


ROW_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of the layouts that a descriptor names; the first is not swizzled."""


def tile_addresses(descriptors: Array, rows: int, k: int, item: int, row_major: bool) -> Array:
    """(tiles, rows, k) byte addresses of the elements of operands in shared memory.

    Args:
        descriptors: Matrix descriptors.
        rows: Rows of A, columns of B.
        k: Length of the products.
        item: Bytes of an element.
        row_major: Whether consecutive elements are those of one row ("K-major"); else those of one k.
    """
    fields = descriptors.astype(np.uint64)
    start, leading, stride = (
        ((fields >> np.uint64(shift)) & np.uint64(0x3FFF)).astype(np.int64)[:, None, None] << 4
        for shift in (0, 16, 32)
    )
    modes = np.unique(fields >> np.uint64(62))
    if len(modes) != 1 or ((fields >> np.uint64(49)) & np.uint64(7)).any():
        raise UnsupportedPTX(
            "descriptors of one instruction differ in their layout, or have an offset of the base"
        )
    width = ROW_BYTES[int(modes[0])]
    stride = np.where(stride == 0, 8 * width, stride)
    row, column = np.arange(rows)[:, None], np.arange(k)
    if row_major:
        address = start + row // 8 * stride + row % 8 * width + column * item
    else:
        many = width // item
        address = (
            start + row // many * leading + column // 8 * stride + column % 8 * width + row % many * item
        )
    # Units of 16 bytes change places by the number of the row of 128 bytes that they are in.
    return address ^ (((address >> 7) & (width // 16 - 1)) << 4)


class _Product:
    """``wgmma.mma_async.sync.aligned.m64n_k_.f32.type.type d, a, b, scale, 1, 1{, transpose a}{, transpose b}``."""

    def __init__(self, source: Instruction, decoder: Decoder) -> None:
        self.source, self.kind = source, _element_kind(source)
        _, self.columns, self.k = _shape(source)
        self.item = WIDTHS[self.kind]
        result, left, right, scale, *signs = source.operands
        transposed = [flag == "1" for flag in signs[2:]]
        if signs[:2] != ["1", "1"]:
            raise UnsupportedPTX(f"signs of {source.text!r}")
        self.left_transposed = not isinstance(left, tuple) and bool(transposed) and transposed[0]
        self.right_transposed = bool(transposed) and transposed[-1]
        self.writes = [decoder.write(register) for register in result]
        self.reads = [decoder.read(register, "b32") for register in result]
        self.scale = decoder.read(scale, "pred")
        self.right = decoder.read(right, "b64")
        self.left_registers = self.left = None
        used = ()
        if isinstance(left, tuple):
            self.left_registers, used = [decoder.read(register, "b32") for register in left], left
        else:
            self.left = decoder.read(left, "b64")
        self.registers = tuple(frozenset(map(decoder.number, names)) for names in (used, result))

    def __call__(self, machine: Machine, active: Array | None) -> None:
        units, groups = _units(machine), _groups(machine, active)
        units.check_start(self.source, *self.registers)
        right, read = self._operand(machine, groups, self.right, self.columns, self.right_transposed)
        if self.left is None:
            left = self._fragment(
                machine, groups, self.left_registers, _left_places(self.kind, self.k), self.k
            )
        else:
            left, left_read = self._operand(machine, groups, self.left, 64, self.left_transposed)
            read = np.concatenate([read, left_read], 1)
        if self.kind == "tf32" and self.columns < READ_COLUMNS:
            self._check_padding(machine, groups)
        machine.shared.check_matrix_read(read, _group_bits(machine, groups), self.source.text)
        places = _result_places(self.columns)
        before = self._fragment(machine, groups, self.reads, places, self.columns, "f32")
        scale = np.broadcast_to(self.scale(machine), machine.threads).reshape(-1, GROUP)[groups, 0]
        result = left.astype(np.float64) @ right.swapaxes(1, 2).astype(np.float64)
        result = (result + np.where(scale[:, None, None], before, 0)).astype(np.float32)
        by_warp = result.reshape(-1, 16, self.columns)
        for write, (row, column) in zip(self.writes, places, strict=True):
            write(machine, self._everywhere(machine, groups, by_warp[:, row, column]), active)
        units.waiting.append(Products(groups, units.closed[groups].copy(), read, *self.registers))

    def _everywhere(self, machine: Machine, groups: Array, values: Array) -> Array:
        """Bits of values of the groups' threads at the places of all threads."""
        bits = np.zeros((machine.threads // GROUP, GROUP), np.uint32)
        bits[groups] = np.ascontiguousarray(values).view(np.uint32).reshape(-1, GROUP)
        return bits.reshape(-1)

    def _fragment(
        self,
        machine: Machine,
        groups: Array,
        reads: list,
        places: Places,
        columns: int,
        kind: str | None = None,
    ) -> Array:
        """(groups, 64, columns) of registers: each warp has 16 rows."""
        registers = [
            np.broadcast_to(read(machine), machine.threads).reshape(-1, GROUP)[groups].reshape(-1, WARP)
            for read in reads
        ]
        return _assemble(registers, places, (16, columns), kind or self.kind).reshape(-1, 64, columns)

    def _addresses(self, machine: Machine, groups: Array, descriptor, rows: int, transposed: bool) -> Array:
        descriptors = np.broadcast_to(descriptor(machine), machine.threads).reshape(-1, GROUP)[groups, 0]
        return tile_addresses(descriptors, rows, self.k, self.item, not transposed)

    def _operand(
        self, machine: Machine, groups: Array, descriptor, rows: int, transposed: bool
    ) -> tuple[Array, Array]:
        """(groups, rows, k) numbers from shared memory, and the units that they are read from."""
        shared = machine.shared
        address = self._addresses(machine, groups, descriptor, rows, transposed)
        beyond = address + self.item > shared.size
        if beyond.any():
            what = f"reads shared memory at byte {int(address.max())} of {shared.size}"
            machine.findings.add(OUT_OF_BOUNDS, self.source.text, what)
        block = machine.block.reshape(-1, GROUP)[groups, 0][:, None, None]
        place = np.where(beyond, 0, address) + block * shared.pitch
        bits = shared.data.view(RAW[self.item])[place // self.item]
        return decode(bits, self.kind), shared.units(place.reshape(-1), self.item).reshape(len(groups), -1)

    def _check_padding(self, machine: Machine, groups: Array) -> None:
        address = self._addresses(machine, groups, self.right, READ_COLUMNS, self.right_transposed)
        last, size = int(address.max()) + self.item, machine.shared.size
        what = (
            f"the hardware reads {READ_COLUMNS} columns of a tile of {self.columns}, up to byte {last} of {size} of "
            "shared memory; Triton allocates no padding"
        )
        machine.findings.add(OUT_OF_BOUNDS if last > size else PADDING, self.source.text, what)
