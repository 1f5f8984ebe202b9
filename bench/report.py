"""What a stored run says: tables, comparison with another run, fitted exponents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

BASELINE = "published"
"""The provider that the others of a group are compared with; where it is missing, the first."""


@dataclass(frozen=True)
class Row:
    """One measured function of one provider; `info` is what :class:`bench.measure.Measure` says of it."""

    name: str
    median: float
    info: dict[str, Any]

    @property
    def group(self) -> tuple[str, str, str]:
        """Section, function and precision."""
        return self.info["section"], self.info["what"], self.info["dtype"]

    def relative_time(self, baseline: Row) -> float:
        """That of rounds that took turns with the baseline's, where there are such; else that of the medians."""
        in_turns = baseline.info["provider"] == BASELINE and "relative_time" in self.info
        return self.info["relative_time"] if in_turns else self.median / baseline.median


@dataclass(frozen=True)
class Run:
    """A stored run: its rows and what it says of the machine."""

    rows: tuple[Row, ...]
    machine: dict[str, Any]

    @property
    def title(self) -> str:
        """Where and when."""
        facts = self.machine
        driver = f", driver {facts['driver']}" if facts["driver"] else ""
        return (
            f"{facts['device']}, {facts['threads']} threads{driver}, torch {facts['torch']}, triton {facts['triton']}, "
            f"commit {facts['commit']}, {facts['date']}"
        )

    @property
    def ceilings(self) -> str:
        """What the device was measured to do at most."""
        rates = ", ".join(
            f"{rate / 1e12:.3g} TFLOP/s {name}" for name, rate in self.machine["matrix_rate"].items()
        )
        return f"copies {self.machine['copy_bandwidth'] / 1e9:.3g} GB/s, multiplies matrices with {rates}"


def load(path: str | Path) -> Run:
    """Read what pytest-benchmark stored.

    Raises:
        ValueError: the file holds no run of these benchmarks.
    """
    stored = json.loads(Path(path).read_text())
    try:
        rows = [Row(b["fullname"], b["stats"]["median"], b["extra_info"]) for b in stored["benchmarks"]]
        run = Run(tuple(rows), stored["machine_info"])
        for row in rows:
            assert len(row.group) == 3 and {"provider", "shape", "p20", "p80"} <= row.info.keys()
        assert run.title and run.ceilings
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(
            f"{path} is no run of these benchmarks ({error}); make one with python -m bench"
        ) from None
    return run


def print_report(run: Run, console: Console, against: Run | None = None) -> None:
    """All tables of a run; with the change since another one of the same device."""
    console.print(Text(run.title, style="bold"))
    console.print(Text(run.ceilings))
    if against is not None:
        console.print(f"compared with {against.title}")
    for section in dict.fromkeys(row.info["section"] for row in run.rows):
        rows = [row for row in run.rows if row.info["section"] == section]
        console.print(section_table(section, rows, against))
    exponents = exponents_table(run.rows)
    if exponents.row_count:
        console.print(exponents)


def section_table(section: str, rows: Sequence[Row], against: Run | None = None) -> Table:
    """One line per row, in groups of one function; times and memory are relative to the baseline's."""
    shapes = {_shape(row) for row in rows}
    title = f"{section}, {shapes.pop()}" if len(shapes) == 1 else section
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", min_width=44)
    columns = "ms", "p20", "p80", "time", "MB", "memory", "GB/s", "of copy", "GFLOP/s", "of matrix"
    for name in (*columns, *(["change"] if against else [])):
        table.add_column(name, justify="right", no_wrap=True)
    before = {row.name: row for row in against.rows} if against else {}
    for (_, what, precision, _), members in _grouped(rows):
        first = _baseline(members)
        sizes = f", {_shape(first)}" if shapes else ""
        table.add_row(Text(f"{what}, {precision}{sizes}", style="bold"))
        for row in members:
            table.add_row(*_cells(row, first), *([change(row, before.get(row.name))] if against else []))
        table.add_section()
    return table


def change(row: Row, before: Row | None) -> str:
    """How much slower or faster than before; marked where the middle 60 % of both runs' times do not overlap."""
    if before is None or before.info["shape"] != row.info["shape"]:
        return "new"
    ratio = row.median / before.median
    if row.info["p20"] > before.info["p80"]:
        return f"[red]{ratio:.2f} slower[/red]"
    if row.info["p80"] < before.info["p20"]:
        return f"[green]{ratio:.2f} faster[/green]"
    return f"{ratio:.2f}"


def comparable(run: Run, other: Run) -> str | None:
    """Why times of two runs cannot be compared; None if they can."""
    for fact in ("device", "threads"):
        if run.machine[fact] != other.machine[fact]:
            return f"the stored run is one of {fact} {other.machine[fact]}, this one of {run.machine[fact]}"
    return None


@dataclass(frozen=True)
class Series:
    """One provider's function against one size: the sizes, seconds and bytes of memory."""

    what: str
    provider: str
    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    memory: tuple[int, ...]


def series_of(rows: Iterable[Row]) -> list[Series]:
    """The series of the scaling rows, in their order."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if "axis" in row.info:
            found.setdefault((row.info["what"], row.info["provider"], row.info["axis"]), []).append(row)
    return [
        Series(
            *key,
            tuple(row.info["shape"][key[2]] for row in members),
            tuple(row.median for row in members),
            tuple(row.info["peak_memory_bytes"] for row in members),
        )
        for key, members in found.items()
    ]


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of the least-squares fit of a size^b to the values, in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def exponents_table(rows: Iterable[Row]) -> Table:
    """The exponents with which time and memory grow with the sizes."""
    title = "growth: a size^b fitted to all sizes of a series"
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for name in ("", "provider", "sizes", "b of time", "b of memory"):
        table.add_column(name, justify="right" if name.startswith("b ") else "left")
    for series in series_of(rows):
        if len(series.sizes) > 2:
            fits = [f"{exponent(series.sizes, values):.2f}" for values in (series.seconds, series.memory)]
            table.add_row(series.what, series.provider, f"{series.sizes[0]}..{series.sizes[-1]}", *fits)
    return table


def markdown(run: Run, providers: Sequence[str]) -> str:
    """Medians in ms, and relative to the baseline's, as a table of Markdown; memory of networks too."""
    lines = [["", *providers], ["---"] * (1 + len(providers))]
    for (section, what, precision, _), members in _grouped(run.rows):
        by = {row.info["provider"]: row for row in members}
        base = by.get(BASELINE)
        if base is None or section == "scaling":
            continue
        name = f"{section.partition(', ')[2]} of {what}" if ", " in section else what
        times = {who: (1e3 * row.median, row.relative_time(base)) for who, row in by.items()}
        lines.append([f"{name}, {precision}, ms", *(_pair(times.get(who)) for who in providers)])
        if section == "network":
            peaks = {who: row.info["peak_memory_bytes"] / 1e6 for who, row in by.items()}
            pairs = {who: (peak, peak / peaks[BASELINE]) for who, peak in peaks.items()}
            lines.append([f"{name}, {precision}, MB", *(_pair(pairs.get(who)) for who in providers)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _pair(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]:.4g} ({values[1]:.2g})"


def _grouped(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """By function and size, in the order of the first of each."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*row.group, json.dumps(row.info["shape"])), []).append(row)
    return list(groups.items())


def _baseline(rows: Sequence[Row]) -> Row:
    return next((row for row in rows if row.info["provider"] == BASELINE), rows[0])


def _shape(row: Row) -> str:
    if "axis" in row.info:
        return f"{row.info['axis']}={row.info['shape'][row.info['axis']]}"
    return " ".join(f"{name}={size}" for name, size in row.info["shape"].items())


def _cells(row: Row, baseline: Row) -> list[str]:
    info = row.info
    memory, least = info["peak_memory_bytes"], baseline.info["peak_memory_bytes"]
    cells = [info["provider"], *(f"{1e3 * s:.3f}" for s in (row.median, info["p20"], info["p80"]))]
    cells.append(f"{row.relative_time(baseline):.3g}")
    cells += ["", ""] if memory is None else [f"{memory / 1e6:.1f}", f"{memory / least:.2f}" if least else ""]
    if "GB/s" not in info:
        return [*cells, "", "", "", ""]
    copied, multiplied = info["share_of_copy_bandwidth"], info["share_of_matrix_rate"]
    return [*cells, f"{info['GB/s']:.1f}", f"{copied:.0%}", f"{info['GFLOP/s']:.1f}", f"{multiplied:.0%}"]
