"""Predicts, without a GPU, how long every Triton kernel takes on an H100 at the published size.

    python -m bench.predict                                   # every operator and precision, and the training step
    python -m bench.predict --operator attention_layer --precision tf32      # seconds to a minute: to compare designs
    python -m bench.predict --operator fusion_layer --against FILE           # beside records of --json
    python -m bench.predict --json FILE                       # the same as records
    python -m bench.predict --step --precision bfloat16       # only the training step
    python -m bench.predict --check [--operator NAME]         # exit code 1 if a kernel became 10 % slower by prediction
    python -m bench.predict --store                           # renew the stored predictions, where that is meant
    python -m bench.predict --measured FILE                   # beside measured times, as those in bench/predictions

Kernels are recorded with their arguments and compiled for sm_90. The integer part of their machine code is executed for
some blocks of the grid (:mod:`bench.sass_run`): that gives loops, addresses, masks, sectors of memory and bank conflicts.
Then one multiprocessor is simulated (:mod:`bench.sass_time`). Nothing depends on the names of kernels, so that a new one
needs no entry; contents of integer tensors are in :func:`integers`. The times of torch's own calls in the training step
are estimates from their bytes and FLOPs (:mod:`bench.step_time`).

What is printed are predictions, not measurements. The header says how far off they were for the kernels in
bench/predictions/measured.json, whose ratios were taken when the model was fitted, with the code that was measured.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from trgnet.kernels.examples import Size
from trgnet.kernels.launch import Launch, Span, interpreted

from . import compiled, sass, sass_run, sass_time
from .compiled import Job, triton_operators
from .step_time import record_step

SIZE = Size(n=8, t=6000, segments=320)
ARCHITECTURE = "sm_90"
FOLDER = Path(__file__).parent / "predictions"
STORED = FOLDER / "stored.json"
"""What --store wrote."""
MEASURED = FOLDER / "measured.json"
"""Times measured on an H100, with their source; the numbers of :class:`bench.sass_time.Machine` were fitted to them."""
TOLERANCE = 0.1
"""A kernel may become slower by this share of its prediction."""
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
            whole = (
                None
                if value.dtype.is_floating_point or value.dtype == torch.bool
                else integers(name, value.length, size)
            )
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
        built = compiled.compile_launch(launch, compiled.ARCHITECTURES[ARCHITECTURE])
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
            operator, launch.name, precision, 1, launch.grid, launch.num_warps, code.registers, code.shared,
            found.occupancy, 1e6 * found.seconds, 1e6 * found.floor, found.limiter,
            {name: 1e6 * seconds for name, seconds in found.resources.items()}, _conflicts(code, trace),
            tuple(sass.faults(code) + trace.faults),
        )  # fmt: skip
    return replace(_ROWS[known], operator=operator, precision=precision)


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
    return [replace(row, launches=counts[known]) for known, row in rows.items()]


@dataclass(frozen=True)
class StepRow:
    """One Triton kernel, or all calls of one function of ATen, in a training step."""

    precision: str
    what: str
    kind: str
    """kernel or call"""
    count: int
    microseconds: float
    """Of all of them."""
    floor: float = 0.0


def step_rows(precision: str, size: Size = SIZE) -> list[StepRow]:
    """Predict the training step; what takes longest comes first."""
    phases = record_step(precision, size).values()
    alike: dict[Any, list[Launch]] = {}
    for launch in (launch for phase in phases for launch in phase.launches):
        tensors = tuple(value for _, value in launch.arguments if isinstance(value, Span))
        alike.setdefault((launch.compilation, launch.grid, tensors), []).append(launch)
    rows: dict[tuple[str, str], list[float]] = {}
    for launches in alike.values():
        # Layers differ in their dilation only: one stands for all.
        row = predict("step", precision, launches[len(launches) // 2], size)
        _add(rows, ("kernel", row.kernel), len(launches), row.microseconds, row.floor)
    for call in (call for phase in phases for call in phase.calls):
        _add(rows, ("call", call.name), 1, 1e6 * call.seconds, 0.0)
    found = [
        StepRow(precision, what, kind, int(n), us, floor) for (kind, what), (n, us, floor) in rows.items()
    ]
    return sorted(found, key=lambda row: -row.microseconds)


def _add(
    rows: dict[tuple[str, str], list[float]], key: tuple[str, str], count: int, each: float, floor: float
) -> None:
    total = rows.setdefault(key, [0, 0.0, 0.0])
    total[0] += count
    total[1] += count * each
    total[2] += count * floor


def _job(job: tuple[str | None, str]) -> list[Row] | list[StepRow]:
    torch.set_num_threads(1)
    operator, precision = job
    return step_rows(precision) if operator is None else operator_rows(operator, precision)


def predict_all(jobs: Iterable[tuple[str | None, str]], processes: int) -> tuple[list[Row], list[StepRow]]:
    """Predict in several processes; an operator of None is the training step. In the order of the jobs."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        found = [row for rows in pool.map(_job, list(jobs), chunksize=1) for row in rows]
    return [row for row in found if isinstance(row, Row)], [row for row in found if isinstance(row, StepRow)]


def totals(rows: Iterable[Row]) -> dict[str, float]:
    """Microseconds of all launches of each kernel, by :attr:`Row.key`."""
    found: dict[str, float] = {}
    for row in rows:
        found[row.key] = found.get(row.key, 0.0) + row.launches * row.microseconds
    return found


def changes(rows: Iterable[Row], stored: dict[str, float]) -> tuple[list[str], list[str]]:
    """Kernels that became slower than the stored prediction allows, or have none; and those that became faster."""
    worse, better = [], []
    for key, now in totals(rows).items():
        if key not in stored:
            worse.append(f"{key}: has no stored prediction; run python -m bench.predict --store")
        elif now > stored[key] * (1 + TOLERANCE):
            worse.append(
                f"{key}: {now:.1f} us, {now / stored[key]:.2f} of the stored {stored[key]:.1f} us; make it as fast again, "
                "or, if it is meant, run python -m bench.predict --store"
            )
        elif now < stored[key] * (1 - TOLERANCE):
            better.append(f"{key}: {now:.1f} us, {now / stored[key]:.2f} of the stored {stored[key]:.1f} us")
    return worse, better


@dataclass(frozen=True)
class Fit:
    """Predicted by measured times of kernels."""

    ratios: dict[str, float]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios.values())

    @property
    def spread(self) -> tuple[float, float]:
        """The ratios that four fifths of the kernels lie between."""
        tenths = statistics.quantiles(self.ratios.values(), n=10)
        return tenths[0], tenths[-1]

    def __str__(self) -> str:
        low, high = self.spread
        return (
            f"{len(self.ratios)} kernels: predicted / measured has the median {self.median:.2f}; "
            f"four fifths lie between {low:.2f} and {high:.2f}"
        )


def fit(rows: Iterable[StepRow], measured: dict[str, Any]) -> Fit:
    """Compare predictions of the step's kernels with measured ones (the format of MEASURED)."""
    times = {(p, name): us for p, kernels in measured["kernels"].items() for name, (_, us) in kernels.items()}
    found = {(row.precision, row.what): row.microseconds for row in rows if row.kind == "kernel"}
    return Fit({f"{p} {name}": found[p, name] / us for (p, name), us in times.items() if (p, name) in found})


def print_table(rows: Iterable[Row], console: Console, against: dict[str, float]) -> None:
    """One row for each kernel of each operator."""
    columns = ("operator", "kernel", "precision", "grid", "warps", "regs", "shared", "blocks/SM", "us", "floor", "x floor",
               "limiter", *sass_time.LIMITERS[:-1], "conflicts")  # fmt: skip
    table = Table(*columns, *(["all", "before", "ratio"] if against else []))
    now = totals(rows)
    for row in rows:
        cells = [
            row.operator, row.kernel, row.precision, "x".join(map(str, row.grid)), str(row.warps), str(row.registers),
            str(row.shared), str(row.occupancy), f"{row.microseconds:.1f}", f"{row.floor:.1f}",
            f"{row.microseconds / max(row.floor, 0.01):.1f}", row.limiter,
            *(f"{row.resources[name]:.1f}" for name in sass_time.LIMITERS[:-1]), f"{row.conflicts:.1f}",
        ]  # fmt: skip
        if against:
            before = against.get(row.key)
            cells += (
                [f"{now[row.key]:.1f}", f"{before:.1f}", f"{now[row.key] / before:.2f}"]
                if before
                else ["", "", ""]
            )
        table.add_row(*cells, style="red" if row.faults else None)
    console.print(table)


def print_step(precision: str, rows: list[StepRow], console: Console, most: int = 25) -> None:
    """The training step: what takes longest, and its sum."""
    table = Table(
        "", "kind", "count", "us", "share", "floor", title=f"Training step, {precision}", title_justify="left"
    )
    total, count = sum(row.microseconds for row in rows), sum(row.count for row in rows)
    for row in rows[:most]:
        floor = f"{row.floor:.0f}" if row.floor else ""
        share = f"{row.microseconds / total:.1%}"
        table.add_row(row.what, row.kind, str(row.count), f"{row.microseconds:.0f}", share, floor)
    rest = rows[most:]
    if rest:
        table.add_row(
            "others", "", str(sum(r.count for r in rest)), f"{sum(r.microseconds for r in rest):.0f}", "", ""
        )
    kernels = sum(row.microseconds for row in rows if row.kind == "kernel")
    table.add_row("Triton kernels", "", "", f"{kernels:.0f}", f"{kernels / total:.1%}", "")
    table.add_row("device time", "", str(count), f"{total:.0f}", "", "")
    table.add_row("CUDA graph", "", "", f"{total + 1e6 * count * sass_time.H100.launch:.0f}", "", "")
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    rows, step = predict_all(_jobs(options), options.processes)
    console = Console(width=260)
    _print_header(console)
    if rows:
        print_table(rows, console, totals(_records(options.against)) if options.against else {})
    for precision in options.precision if step else ():
        print_step(precision, [row for row in step if row.precision == precision], console)
    if options.json:
        found = {"kernels": [asdict(row) for row in rows], "step": [asdict(row) for row in step]}
        options.json.write_text(json.dumps(found, indent=1))
    if options.measured:
        _print_fit(fit(step, json.loads(options.measured.read_text())), console)
    if options.store:
        _store(rows)
    faults = [f"{row.kernel}, {row.precision}: {fault}" for row in rows for fault in row.faults]
    if options.check:
        worse, better = changes(rows, stored()["microseconds"])
        faults += worse
        for line in better:
            console.print(f"faster: {line}")
    for fault in faults:
        console.print(fault, style="red")
    return int(bool(faults))


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.predict", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--operator", action="append", choices=_operators(), help="only these, and no training step")
    add("--step", action="store_true", help="only the training step")
    add("--precision", action="append", choices=PRECISIONS, help="default: all")
    add("--json", type=Path, help="also write the records into this file")
    add("--against", type=Path, help="records of --json to compare operators with")
    add("--check", action="store_true", help="exit code 1 if a kernel is slower than stored")
    add("--store", action="store_true", help="renew the stored predictions that --check compares with")
    add("--measured", type=Path, help="compare the step's kernels with the measured times in this file")
    add("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    options.step = options.step or options.measured is not None
    if options.step and (options.operator or options.store or options.check or options.against):
        parser.error(
            "--step and --measured are about the step: leave out --operator, --against, --store and --check"
        )
    import triton

    if options.check and stored()["triton"] != triton.__version__:
        parser.error(f"predictions are stored for triton {stored()['triton']}, this is {triton.__version__}")
    options.precision = options.precision or list(PRECISIONS)
    return options


def _operators() -> list[str]:
    return [name for name in triton_operators() if name not in IN_PLACE]


def _jobs(options: argparse.Namespace) -> list[tuple[str | None, str]]:
    """(operator, precision); the step, which takes longest, begins first."""
    names = [] if options.step else options.operator or _operators()
    step = [] if options.operator or options.check or options.store else [None]
    return [(name, precision) for name in (*step, *names) for precision in options.precision]


def _print_header(console: Console) -> None:
    import triton

    measured = json.loads(MEASURED.read_text())
    console.print(f"PREDICTIONS for an H100, not measurements. triton {triton.__version__}, {date.today()}")
    console.print(
        f"Calibrated with {measured['machine']}, {measured['date']}: {Fit(measured['predicted / measured'])}."
    )


def _print_fit(compared: Fit, console: Console) -> None:
    console.print("Predicted / measured:")
    for name, ratio in compared.ratios.items():
        console.print(f"  {ratio:.2f} {name}")
    console.print(str(compared))


def _store(rows: list[Row]) -> None:
    """Renew the stored predictions of these kernels; those of operators and precisions that were left out stay."""
    import triton

    renewed = {(row.operator, row.precision) for row in rows}
    others = stored()["microseconds"] if stored()["triton"] == triton.__version__ else {}
    kept = {key: us for key, us in others.items() if tuple(key.split()[:2]) not in renewed}
    kept |= {key: round(us, 3) for key, us in totals(rows).items()}
    text = {"triton": triton.__version__, "microseconds": dict(sorted(kept.items()))}
    STORED.write_text(json.dumps(text, indent=1) + "\n")


def stored() -> dict[str, Any]:
    """The predictions in the repository: of which release of Triton, and microseconds by Row.key."""
    return json.loads(STORED.read_text())


def _records(file: Path) -> list[Row]:
    return [Row(**record) for record in json.loads(file.read_text())["kernels"]]


if __name__ == "__main__":
    sys.exit(main())
