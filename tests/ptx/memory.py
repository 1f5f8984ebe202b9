"""Global and shared memory of the emulator, with what is needed to find wrong accesses.

Both are one array of bytes. An access is by several threads at once: ``addresses`` has one element for each of them, and
values have the shape (elements of a thread, threads).
"""

from __future__ import annotations

import numpy as np

from .findings import MISALIGNED, NOT_AWAITED, NOT_FENCED, OUT_OF_BOUNDS, RACE, UNINITIALISED, Findings
from .numbers import RAW, Array

GUARD = 4096
"""Bytes around every tensor that belong to no other."""
BASE = 0x7F0000000000
"""Address of the first byte of global memory."""
POISON = 0xFF
"""Bytes that were never written; NaN as a floating-point number."""


def _gather(data: Array, places: Array, size: int, count: int) -> Array:
    """(count, n) values of ``size`` bytes from aligned places."""
    view = data.view(RAW[size])
    first = places // size
    return np.stack([view[first + i] for i in range(count)])


def _scatter(data: Array, places: Array, values: Array, size: int) -> bool:
    """Write (count, n) values; whether some thread's value was overwritten by another's that differs."""
    view = data.view(RAW[size])
    first = places // size
    differs = False
    for i, row in enumerate(values):
        view[first + i] = row
    for i, row in enumerate(values):
        differs |= bool((view[first + i] != row).any())
    return differs


def _misaligned(addresses: Array, size: int, count: int) -> Array:
    return addresses % (size * count) != 0


class GlobalMemory:
    """Tensors with guards between them."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self._arrays: list[Array] = []
        self._starts: list[int] = []
        self._top = GUARD
        self._data: Array | None = None

    def place(self, content: Array, alignment: int = 0) -> int:
        """Copy bytes to an address that is ``alignment`` modulo 256, and return it."""
        start = -(-self._top // 256) * 256 + alignment % 256
        self._arrays.append(content)
        self._starts.append(start)
        self._top = start + content.nbytes + GUARD
        self._data = None
        return BASE + start

    def read(self, address: int, size: int) -> Array:
        """Bytes that are there now."""
        start = address - BASE
        return self.data[start : start + size]

    @property
    def data(self) -> Array:
        """All bytes. Tensors must be placed before the first use."""
        if self._data is None:
            self._data = np.full(-(-self._top // 256) * 256, POISON, np.uint8)
            for start, content in zip(self._starts, self._arrays):
                self._data[start : start + content.nbytes] = content
            ends = [start + content.nbytes for start, content in zip(self._starts, self._arrays)]
            self._first = np.array([0, *self._starts], np.int64)
            self._last = np.array([0, *ends], np.int64)
        return self._data

    def load(self, addresses: Array, size: int, count: int, instruction: str) -> Array:
        """(count, n) values; poison where the access is wrong."""
        data, places = self.data, addresses - BASE
        wrong = self._wrong(places, size, count, "read", instruction)
        if wrong is None:
            return _gather(data, places, size, count)
        values = _gather(data, np.where(wrong, 0, places), size, count)
        values[:, wrong] = np.iinfo(RAW[size]).max
        return values

    def store(self, addresses: Array, values: Array, size: int, instruction: str) -> None:
        """Write (count, n) values where the access is right."""
        data, places = self.data, addresses - BASE
        wrong = self._wrong(places, size, len(values), "write", instruction)
        if wrong is not None:
            places, values = places[~wrong], values[:, ~wrong]
        if _scatter(data, places, values, size):
            self.findings.add(RACE, instruction, "threads write different values to one global address")

    def _wrong(self, places: Array, size: int, count: int, verb: str, instruction: str) -> Array | None:
        tensor = np.searchsorted(self._first, places, "right") - 1
        outside = (places < 0) | (places + size * count > self._last[tensor])
        if outside.any():
            where = int(np.flatnonzero(outside)[0])
            before, behind = self._distances(int(places[where]), size * count)
            self.findings.add(
                OUT_OF_BOUNDS,
                instruction,
                f"{int(outside.sum())} threads {verb} global memory {behind} bytes behind one tensor and {before} before another",
            )
        skewed = _misaligned(places, size, count)
        if skewed.any():
            self.findings.add(MISALIGNED, instruction, f"{size * count} bytes at a global address")
        wrong = outside | skewed
        return wrong if wrong.any() else None

    def _distances(self, place: int, size: int) -> tuple[int, int]:
        behind = [place + size - end for end in self._last if end < place + size]
        before = [start - place for start in self._first if start > place]
        return min(before, default=0), min(behind, default=0)


class SharedMemory:
    """Shared memory of several blocks, one behind the other, with what happened to every unit of it.

    A unit is as many bytes as the narrowest access has. Of each it is known which warps have read and written it since
    their block's last barrier, whether it was ever written, whether an asynchronous copy into it is in flight, and whether
    matrix units may not see it yet as no ``fence.proxy.async`` followed its last write.
    """

    def __init__(self, size: int, blocks: int, warps: int, unit: int, findings: Findings) -> None:
        self.size, self.unit, self.findings = size, unit, findings
        self.pitch = -(-size // 16) * 16 + 16
        self.data = np.full(blocks * self.pitch, POISON, np.uint8)
        units = blocks * self.pitch // unit
        mask = np.uint8 if warps <= 8 else np.uint16 if warps <= 16 else np.uint32
        self.readers, self.writers = np.zeros(units, mask), np.zeros(units, mask)
        self.written, self.unfenced = np.zeros(units, bool), np.zeros(units, bool)
        self.in_flight = np.zeros(units, bool)

    def barrier(self, blocks: Array) -> None:
        """Order everything that the blocks did before what they do next."""
        for flags in (self.readers, self.writers):
            flags.reshape(-1, self.pitch // self.unit)[blocks] = 0

    def fence(self, blocks: Array) -> None:
        """Show the matrix units what the blocks wrote."""
        self.unfenced.reshape(-1, self.pitch // self.unit)[blocks] = False

    def load(
        self, addresses: Array, blocks: Array, bits: Array, size: int, count: int, instruction: str
    ) -> Array:
        """(count, n) values; ``bits`` has the bit of each thread's warp."""
        places, wrong = self._places(addresses, blocks, size, count, "read", instruction)
        values = _gather(self.data, places, size, count)
        if wrong is None:
            self.check_read(self.units(places, size * count), bits, instruction)
        else:
            values[:, wrong] = np.iinfo(RAW[size]).max
            self.check_read(self.units(places[~wrong], size * count), bits[~wrong], instruction)
        return values

    def store(
        self, addresses: Array, blocks: Array, bits: Array, values: Array, size: int, instruction: str
    ) -> Array:
        """Write (count, n) values; returns the units that were written."""
        places, wrong = self._places(addresses, blocks, size, len(values), "write", instruction)
        if wrong is not None:
            places, values, bits = places[~wrong], values[:, ~wrong], bits[~wrong]
        units = self.units(places, size * len(values))
        self._check_write(units, bits, instruction)
        if _scatter(self.data, places, values, size):
            self.findings.add(RACE, instruction, "threads write different values to one shared address")
        self._mark(self.writers, units, bits)
        self.written[units] = True
        self.unfenced[units] = True
        return units

    def check_read(self, units: Array, bits: Array, instruction: str) -> None:
        """Find faults of a read of units (n, k) by warps, and remember it."""
        writers = self.writers[units]
        self._check_order((writers != 0) & (writers & bits[:, None] == 0), units, instruction)
        self._check_content(units, instruction)
        self._mark(self.readers, units, bits)

    def check_matrix_read(self, units: Array, bits: Array, instruction: str) -> None:
        """The same of a read by the matrix units for several warps together."""
        self._check_order(self.writers[units] != 0, units, instruction)
        self._check_content(units, instruction)
        if self.unfenced[units].any():
            self.findings.add(
                NOT_FENCED, instruction, "reads what was written without fence.proxy.async behind it"
            )
        self._mark(self.readers, units, bits)

    def _check_order(self, raced: Array, units: Array, instruction: str) -> None:
        if raced.any():
            self._race(raced, units, "reads what another warp wrote", instruction)

    def _check_content(self, units: Array, instruction: str) -> None:
        if self.in_flight[units].any():
            self.findings.add(NOT_AWAITED, instruction, "reads where an asynchronous copy is in flight")
        if (unknown := ~self.written[units]).any():
            address = self._address(units[unknown][0])
            self.findings.add(
                UNINITIALISED, instruction, f"reads shared memory that nobody wrote, at byte {address}"
            )

    def start_copy(self, units: Array) -> None:
        """Mark units that an asynchronous copy writes some time."""
        self.in_flight[units] = True

    def finish_copy(self, units: Array, bits: Array) -> None:
        """The copies of the threads of warps are done: as if the warps wrote the units now."""
        self.in_flight[units] = False
        self.unfenced[units] = True
        self._mark(self.writers, units, bits)

    def finish_matrix_read(self, units: Array, bits: Array) -> None:
        """The matrix units have read: as if the warps read the units now."""
        self._mark(self.readers, units, bits)

    def units(self, places: Array, width: int) -> Array:
        """(n, k) units of ``width`` bytes from each place."""
        return (places // self.unit)[:, None] + np.arange(max(1, width // self.unit))

    def _check_write(self, units: Array, bits: Array, instruction: str) -> None:
        others = ~bits[:, None]
        if (raced := (self.readers[units] & others) != 0).any():
            self._race(raced, units, "writes what another warp read", instruction)
        if (raced := (self.writers[units] & others) != 0).any():
            self._race(raced, units, "writes what another warp wrote", instruction)
        if self.in_flight[units].any():
            self.findings.add(NOT_AWAITED, instruction, "writes where an asynchronous copy is in flight")

    def _race(self, raced: Array, units: Array, what: str, instruction: str) -> None:
        address = self._address(units[raced][0])
        self.findings.add(RACE, instruction, f"{what} since the last barrier, at byte {address}")

    def _address(self, unit: int) -> int:
        return int(unit) * self.unit % self.pitch

    def _mark(self, flags: Array, units: Array, bits: Array) -> None:
        for bit in np.unique(bits):
            flags[units[bits == bit]] |= bit

    def _places(
        self, addresses: Array, blocks: Array, size: int, count: int, verb: str, instruction: str
    ) -> tuple[Array, Array | None]:
        """Positions in the data, 0 of wrong accesses; which those are."""
        wrong = (addresses < 0) | (addresses + size * count > self.size)
        if wrong.any():
            first = int(addresses[wrong][0])
            self.findings.add(
                OUT_OF_BOUNDS, instruction, f"{verb}s shared memory at byte {first} of {self.size}"
            )
        skewed = _misaligned(addresses, size, count)
        if skewed.any():
            self.findings.add(MISALIGNED, instruction, f"{size * count} bytes at a shared address")
            wrong |= skewed
        places = addresses + blocks * self.pitch
        return (np.where(wrong, 0, places), wrong) if wrong.any() else (places, None)
