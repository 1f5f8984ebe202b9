"""Pictures of a stored run: time and memory against the size, and the roofline of the operators."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from trgnet.files import replacing

from .report import Row, Run, Series, exponent, series_of

COLORS = {"published": "#CC3311", "reference": "#EE7733", "ours": "#0077BB"}
MARKERS = "os^Dv<>pP*X"
AXES_OF = {"t": "frames T", "n": "sequences N", "v": "joints V", "k": "classes K"}


def draw(run: Run, stem: Path) -> list[Path]:
    """Write STEM.time.png, STEM.memory.png and STEM.roofline.png, those that there are rows for; return the paths."""
    series = series_of(run.rows)
    paths = []
    if series:
        paths += [_growth(run, series, stem, "time"), _growth(run, series, stem, "memory")]
    points = [row for row in run.rows if row.info["section"] == "operators, forward and backward"]
    if points:
        paths.append(_roofline(run, points, stem))
    return paths


def _growth(run: Run, series: list[Series], stem: Path, what: str) -> Path:
    """One panel for each task and axis, with the fitted exponents."""
    tasks = list(dict.fromkeys(s.what.partition(" against ")[0] for s in series))
    axes_names = list(dict.fromkeys(s.axis for s in series))
    figure = Figure(figsize=(3.2 * len(axes_names), 2.9 * len(tasks)), layout="constrained")
    panels = figure.subplots(len(tasks), len(axes_names), squeeze=False)
    for task, line in zip(tasks, panels):
        for axis, panel in zip(axes_names, line):
            for s in series:
                if s.axis == axis and s.what.startswith(task):
                    _line(panel, s, what)
            _label(panel, AXES_OF[axis], "seconds" if what == "time" else "MB", task)
            _tick_sizes(panel, sorted({size for s in series if s.axis == axis for size in s.sizes}))
    figure.suptitle(run.title, fontsize=7)
    return _save(figure, stem, what)


def _line(panel: Axes, series: Series, what: str) -> None:
    values = series.seconds if what == "time" else [m / 1e6 for m in series.memory]
    label = series.provider
    if len(series.sizes) > 2:
        label += f", {series.axis.upper()}^{exponent(series.sizes, values):.2f}"
    panel.plot(series.sizes, values, "o-", color=COLORS[series.provider], label=label, markersize=3)


def _roofline(run: Run, rows: list[Row], stem: Path) -> Path:
    """FLOP per byte against FLOP/s, in the precision of the first row."""
    precision = rows[0].info["dtype"]
    rows = [r for r in rows if r.info["dtype"] == precision and r.info["provider"] in COLORS]
    bandwidth, rate = run.machine["copy_bandwidth"], run.machine["matrix_rate"][precision]
    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    panel = figure.subplots()
    intensity = np.geomspace(0.05, 500, 100)
    panel.plot(intensity, np.minimum(intensity * bandwidth, rate) / 1e9, color="#222222", linewidth=1)
    names = list(dict.fromkeys(row.info["what"] for row in rows))
    for row in rows:
        index, provider = names.index(row.info["what"]), row.info["provider"]
        panel.plot(
            row.info["flops"] / row.info["bytes"],
            row.info["GFLOP/s"],
            MARKERS[index % len(MARKERS)],
            color=COLORS[provider],
            label=names[index] if provider == "ours" else None,
            fillstyle="full" if provider == "ours" else "none",
            markersize=6,
        )
    _label(panel, "least FLOP per least byte", "GFLOP/s", f"forward and backward, {precision}")
    providers = ", ".join(f"{name}: {_hue(name)}" for name in dict.fromkeys(r.info["provider"] for r in rows))
    figure.suptitle(f"{run.title}\n{run.ceilings}\n{providers}", fontsize=7)
    return _save(figure, stem, "roofline")


def _hue(provider: str) -> str:
    return {"published": "red, open", "reference": "orange, open", "ours": "blue, filled"}[provider]


def _label(panel: Axes, x: str, y: str, title: str) -> None:
    panel.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    panel.set_title(title, fontsize=9)
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    panel.yaxis.set_minor_locator(NullLocator())
    panel.tick_params(labelsize=7)
    panel.grid(which="major", color="#DDDDDD", linewidth=0.6)
    panel.legend(fontsize=7, frameon=False)


def _tick_sizes(panel: Axes, sizes: list[int]) -> None:
    panel.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=6, rotation=45 if len(sizes) > 3 else 0)
    panel.xaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, stem: Path, what: str) -> Path:
    path = stem.with_name(f"{stem.name}.{what}.png")
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    return path
