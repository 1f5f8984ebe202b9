"""Predicts, without a GPU, how long every Triton kernel takes on an H100 at the published size.

    python -m bench.predict                                   # every operator and precision, and the training step
    python -m bench.predict --operator attention_layer --precision tf32      # seconds to a minute: to compare designs
    python -m bench.predict --operator fusion_layer --against FILE           # beside records of --json
    python -m bench.predict --json FILE                       # the same as records
    python -m bench.predict --store                           # renew the predictions that tests compare with

Kernels are recorded with what they are launched with, compiled for sm_90, and their machine code is run and simulated:
its integer part is executed for some blocks of the grid (:mod:`bench.sass_run`), which gives loops, addresses, masks,
sectors of memory and bank conflicts exactly; one multiprocessor is then simulated (:mod:`bench.sass_time`). Nothing depends
on the names of kernels. What is printed are predictions, not measurements: the header says how far off they are for kernels
that were measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from trgnet.kernels.launch import Launch, Span, interpreted

from . import compiled, sass, sass_run, sass_time
from .compiled import Job, triton_operators
from .operators import Size

SIZE = Size(n=8, t=6000, segments=320)
ARCHITECTURE = "sm_90"
PRECISIONS = ("float32", "tf32", "bfloat16")
IN_PLACE = {"moment_update"}
"""Operators that are left out: their kernels find tensors through a table of pointers, which has no values here."""


@dataclass(frozen=True)
class Row:
    """One kernel as one operator launches it; several launches with equal arguments are one row."""

    operator: str
    kernel: str
    precision: str
    launches: int
    grid: tuple[int, ...]
    warps: int
    registers: int
    shared: int
    occupancy: int
    microseconds: float
    """Predicted time of one launch."""
    floor: float
    """Microseconds that DRAM needs for the tensors, each once."""
    limiter: str
    resources: dict[str, float]
    """Microseconds that each resource is needed for."""
    conflicts: float
    """Shared-memory cycles divided by those without bank conflicts."""
    faults: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Names the row among those of other versions of the code."""
        return f"{self.operator} {self.precision} {self.kernel}"


def integers(name: str, count: int, size: Size) -> np.ndarray | None:
    """Contents of integer tensors that addresses or loops depend on, by parameter; None where nothing does."""
    per_sequence = size.segments // size.n
    frames = size.t // per_sequence
    known = {
        "labels_ptr": lambda: np.random.default_rng(0).integers(0, size.k, count),
        "batch_ptr": lambda: np.arange(size.n).repeat(per_sequence),
        "start_ptr": lambda: np.tile(np.arange(per_sequence) * frames, size.n),
        "length_ptr": lambda: np.full(count, frames),
    }
    return known[name]().astype(np.int64) if name in known else None


def parameters(launch: Launch, size: Size) -> list[tuple[int, Any]]:
    """(bytes, value) of each parameter of the machine code, in order."""
    types, found = dict(launch.types), []
    for name, value in launch.arguments:
        if isinstance(value, Span):
            item = value.dtype.itemsize
            whole = None if value.dtype.is_floating_point or value.dtype == torch.bool else integers(name, value.length, size)
            contents = None if whole is None else whole.view(np.uint8)
            # Nothing is padded: masks are true.
            fill = 1 if value.dtype == torch.bool else None
            found.append((8, sass_run.Buffer(name, value.length * item, contents, fill)))
        else:
            found.append((8 if types[name] in ("i64", "fp64") else 4, value))
    return [*found, (8, 0), (8, 0)]  # scratch memory, which no kernel has


_CODES: dict[Any, sass.Code] = {}


def code_of(launch: Launch) -> sass.Code:
    """The machine code of a launch."""
    if launch.compilation not in _CODES:
        built = compiled._compiled(launch, compiled.ARCHITECTURES[ARCHITECTURE])
        _CODES[launch.compilation] = sass.read(built.asm["cubin"], built.metadata.shared)
    return _CODES[launch.compilation]


def trace_of(launch: Launch, size: Size = SIZE) -> sass_run.Trace:
    """What some blocks of a launch execute."""
    return sass_run.run(code_of(launch), launch.grid, launch.num_warps, parameters(launch, size))


_ROWS: dict[Any, Row] = {}


def predict(operator: str, precision: str, launch: Launch, size: Size = SIZE) -> Row:
    """Predict one launch."""
    known = launch.compilation, launch.grid, launch.arguments
    if known not in _ROWS:
        code, trace = code_of(launch), trace_of(launch, size)
        sizes = {name: v.length * v.dtype.itemsize for name, v in launch.arguments if isinstance(v, Span)}
        found = sass_time.predict(code, trace, launch.grid, sizes)
        _ROWS[known] = Row(
            operator, name_of(launch), precision, 1, launch.grid, launch.num_warps, code.registers, code.shared,
            found.occupancy, 1e6 * found.seconds, 1e6 * found.floor, found.limiter,
            {name: 1e6 * seconds for name, seconds in found.resources.items()}, _conflicts(code, trace),
            tuple(sass.faults(code) + trace.faults),
        )  # fmt: skip
    return _ROWS[known]


def name_of(launch: Launch) -> str:
    """The kernel's name as the tables have it."""
    return launch.kernel.__name__.strip("_").removesuffix("_kernel")


def _conflicts(code: sass.Code, trace: sass_run.Trace) -> float:
    """Cycles of the shared memory by those of accesses without conflicts."""
    needed = taken = 0.0
    for i, access in trace.accesses.items():
        if access.cycles:
            one = code.instructions[i]
            width = 16 * one.matrices / 4 if one.opcode in ("LDSM", "STSM") else one.width
            taken += access.cycles
            needed += access.warps * max(1.0, width / 4)
    return taken / needed if needed else 1.0


def operator_rows(operator: str, precision: str, size: Size = SIZE) -> list[Row]:
    """Predict what forward and backward of an operator launch, in order; equal launches are one row."""
    counts: dict[Any, int] = {}
    rows: dict[Any, Row] = {}
    for launch in compiled.recorded(Job(operator, precision, ARCHITECTURE, size)):
        known = launch.compilation, launch.grid, launch.arguments
        counts[known] = counts.get(known, 0) + 1
        rows[known] = predict(operator, precision, launch, size)
    return [Row(**{**vars(row), "launches": counts[known]}) for known, row in rows.items()]


def _job(job: tuple[str, str]) -> list[Row]:
    torch.set_num_threads(1)
    return operator_rows(*job)


def predict_all(jobs: Iterable[tuple[str, str]], processes: int) -> list[Row]:
    """Predict in several processes; in the order of the jobs."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return [row for rows in pool.map(_job, list(jobs), chunksize=1) for row in rows]


def print_table(rows: Iterable[Row], console: Console, against: dict[str, float]) -> None:
    """One row for each kernel."""
    columns = ("operator", "kernel", "precision", "grid", "warps", "regs", "shared", "blocks/SM", "us", "floor", "x floor",
               "limiter", *sass_time.LIMITERS[:-1], "conflicts")  # fmt: skip
    table = Table(*columns, *(["before", "ratio"] if against else []))
    for row in rows:
        cells = [
            row.operator, row.kernel, row.precision, "x".join(map(str, row.grid)), str(row.warps), str(row.registers),
            str(row.shared), str(row.occupancy), f"{row.microseconds:.1f}", f"{row.floor:.1f}",
            f"{row.microseconds / max(row.floor, 0.01):.1f}", row.limiter,
            *(f"{row.resources[name]:.1f}" for name in sass_time.LIMITERS[:-1]), f"{row.conflicts:.1f}",
        ]  # fmt: skip
        if against:
            before = against.get(row.key)
            cells += [f"{before:.1f}", f"{row.microseconds / before:.2f}"] if before else ["", ""]
        table.add_row(*cells, style="red" if row.faults else None)
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    names = [name for name in triton_operators() if name not in IN_PLACE]
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.split("\n\n")[0])
    parser.add_argument("--operator", action="append", choices=names, help="default: all")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default: all")
    parser.add_argument("--json", type=Path, help="also write the records into this file")
    parser.add_argument("--against", type=Path, help="records of --json to compare with")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    jobs = [(name, precision) for name in options.operator or names for precision in options.precision or PRECISIONS]
    import triton

    rows = predict_all(jobs, options.processes)
    console = Console(width=250)
    console.print(
        f"Predictions for an H100, not measurements. triton {triton.__version__}, {date.today()}, microseconds of one launch"
    )
    print_table(rows, console, _times(options.against))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    for row in rows:
        for fault in row.faults:
            console.print(f"{row.kernel}, {row.precision}: {fault}", style="red")
    return int(any(row.faults for row in rows))


@lru_cache
def _times(file: Path | None) -> dict[str, float]:
    """Microseconds of all launches of each kernel, by Row.key."""
    times: dict[str, float] = {}
    for record in json.loads(file.read_text()) if file else ():
        row = Row(**record)
        times[row.key] = times.get(row.key, 0.0) + row.microseconds
    return times


if __name__ == "__main__":
    sys.exit(main())
