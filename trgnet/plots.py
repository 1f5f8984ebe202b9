"""Pictures of results as PNG files: timelines, confusion matrices and training curves.

Everything is drawn through matplotlib's objects, so no display and no global state is involved, and files
appear complete or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator

from .data import IGNORE
from .files import replacing
from .skeleton import Skeleton

__all__ = ["class_colors", "plot_confusion", "plot_curves", "plot_graphs", "plot_timeline"]

Color = tuple[float, float, float]

_INK = "#222222"
_FAINT = "#777777"
_DPI = 150

# Paul Tol's twelve qualitative colours, ordered so that classes next to each other in index differ most, with
# normal colour vision as well as without red or green cones.
_QUALITATIVE = (
    "#6699CC", "#999933", "#AA4499", "#88CCEE", "#882255", "#CC6677",
    "#DDCC77", "#332288", "#117733", "#44AA99", "#661100", "#AA4466",
)  # fmt: skip

# Paul Tol's vibrant colours, for lines.
_LINES = ("#0077BB", "#EE7733", "#009988", "#CC3311", "#33BBEE", "#EE3377")
_DASHES = ("-", "--", ":", "-.")

_CURVE_SCORES = ("accuracy", "edit", "f1@10", "f1@25", "f1@50")
_TIMELINE_WIDTH = 11.0  # inches
_ROW_HEIGHT = 0.46
_MOST_CLASSES_WITH_CELL_TEXT = 20
_GRAPH_CELL = 0.16


def class_colors(count: int) -> list[Color]:
    """One RGB colour per class, the same for a class index in every picture of a data set.

    Up to twelve classes take a palette chosen for colour-blind readers too. More are spread over a colour map
    with a stride, which keeps neighbouring indices apart.
    """
    if count <= len(_QUALITATIVE):
        return [to_rgb(color) for color in _QUALITATIVE[:count]]
    stride = next(s for s in range(math.ceil(0.38 * count), count) if math.gcd(s, count) == 1)
    positions = (np.arange(count) * stride % count) / (count - 1)
    return [tuple(color[:3].tolist()) for color in mpl.colormaps["turbo"](0.02 + 0.96 * positions)]


def plot_timeline(
    path: str | Path,
    rows: Sequence[tuple[str, np.ndarray]],
    classes: Sequence[str],
    fps: float,
    *,
    confidence: np.ndarray | None = None,
    title: str | None = None,
) -> None:
    """Draw label sequences of one recording as bars above one another, over the time in seconds.

    Args:
        path: PNG file to write; replaced if it exists.
        rows: (name, labels) from top to bottom, such as truth and prediction; integer labels, shape (T,).
            Frames of IGNORE stay blank.
        classes: names of the classes; the legend has those that occur, with the index that long bars carry.
        fps: frames per second.
        confidence: shape (T,), values in [0, 1], drawn below the bars.
        title: heading.

    Raises:
        ValueError: no row, no frame, lengths that differ, labels outside the classes, or fps not above 0.
    """
    rows = [(name, np.asarray(labels)) for name, labels in rows]
    _check_timeline(rows, len(classes), fps, confidence)
    frames = len(rows[0][1])
    present = sorted({int(label) for _, labels in rows for label in np.unique(labels)} - {IGNORE})
    colors = class_colors(len(classes))
    names = [f"{label} {classes[label]}" for label in present]
    longest = max((len(name) for name in names), default=1)
    columns = max(1, min(len(names), int(_TIMELINE_WIDTH / (0.5 + 0.062 * longest))))

    heights = [_ROW_HEIGHT * len(rows)] + ([0.75] if confidence is not None else [])
    legend_height = 0.2 * math.ceil(len(names) / columns)
    figure = _figure(_TIMELINE_WIDTH, sum(heights) + legend_height + 0.75 + (0.3 if title else 0))
    axes = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _draw_bars(axes[0], rows, colors, fps)
    if confidence is not None:
        _draw_confidence(axes[1], np.asarray(confidence), fps)
        axes[0].tick_params(axis="x", length=0)
    axes[-1].set_xlim(0, frames / fps)
    axes[-1].set_xlabel("time (s)", color=_INK)
    if title:
        axes[0].set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    handles = [Patch(facecolor=colors[label], label=name) for label, name in zip(present, names, strict=True)]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
        labelspacing=0.35,
    )
    _save(figure, path)


def plot_confusion(path: str | Path, matrix: np.ndarray, classes: Sequence[str]) -> None:
    """Draw a confusion matrix as shares of each true class.

    Args:
        path: PNG file to write; replaced if it exists.
        matrix: counts (K, K), row = truth, column = prediction. Rows without any count are grey.
        classes: K names. Up to 20 classes, cells carry their percentage and, small, their count.

    Raises:
        ValueError: the matrix is not (K, K), or counts are negative.
    """
    matrix = np.asarray(matrix)
    size = len(classes)
    if size == 0 or matrix.shape != (size, size):
        raise ValueError(
            f"got a matrix of shape {matrix.shape} for {size} classes, expected (K, K) with K >= 1"
        )
    if matrix.min() < 0:
        raise ValueError(f"got a count of {matrix.min()}, expected 0 or more")
    with_text = size <= _MOST_CLASSES_WITH_CELL_TEXT
    cell, font_size = (0.56, 9.0) if with_text else (max(0.13, 4.5 / size), 4.5 + 90 / (size + 10))
    totals = matrix.sum(axis=1, keepdims=True)
    percent = np.ma.masked_array(
        100 * matrix / np.maximum(totals, 1), mask=np.repeat(totals == 0, size, axis=1)
    )

    longest = max(len(name) for name in classes)
    names_width = 0.08 * longest * font_size / 9
    side = max(cell * size, 2.2)
    figure = _figure(side + names_width + 1.5, side + 0.75 * names_width + 0.8)
    axes = figure.subplots()
    image = axes.imshow(percent, cmap=mpl.colormaps["Blues"].with_extremes(bad="#E4E4E4"), vmin=0, vmax=100)
    axes.set_xticks(range(size), classes, fontsize=font_size)
    if longest > 3:
        axes.set_xticks(range(size), classes, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), classes, fontsize=font_size)
    axes.set_xlabel("prediction", color=_INK)
    axes.set_ylabel("truth", color=_INK)
    _plain(axes)
    axes.set_xticks(np.arange(1, size) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, size) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2 if with_text else 0.3)
    axes.tick_params(which="both", length=0)
    if with_text:
        _write_cells(axes, matrix, percent)
    bar = figure.colorbar(image, cax=axes.inset_axes([1 + 0.15 / side, 0, 0.16 / side, 1]))
    bar.set_label("% of the true class", color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=_INK)
    _save(figure, path)


def plot_curves(path: str | Path, records: Sequence[Mapping[str, float]]) -> None:
    """Draw the course of a training: loss terms on the left, scores in percent on the right.

    Args:
        path: PNG file to write; replaced if it exists.
        records: one per epoch, with "epoch", any number of "loss/NAME", and, in epochs with an evaluation,
            "SPLIT/KIND/SCORE" such as "test/refined/accuracy". Of the scores, accuracy, edit and F1@10, 25,
            50 are drawn, those of the kind "refined" alone if there are any. Values that are not finite are
            left out.

    Raises:
        ValueError: no record, or one without "epoch".
    """
    if not records:
        raise ValueError("got no record, expected one per epoch")
    if any("epoch" not in record for record in records):
        raise ValueError('got a record without "epoch", expected it in every one')
    figure = _figure(11.0, 4.2)
    left, right = figure.subplots(1, 2, sharex=True)
    _draw_losses(left, records)
    _draw_scores(right, records)
    for axes in (left, right):
        _plain(axes)
        axes.set_xlabel("epoch", color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(color="#E4E4E4", linewidth=0.8)
        axes.set_axisbelow(True)
    _save(figure, path)


def plot_graphs(path: str | Path, graphs: Mapping[str, tuple[np.ndarray, Sequence[str]]]) -> None:
    """Draw relation graphs side by side as heat maps.

    Args:
        path: PNG file to write; replaced if it exists.
        graphs: title -> (graph (M, M) with values in [0, 1], its M names), from left to right.

    Raises:
        ValueError: no graph, or one that is not (M, M).
    """
    if not graphs:
        raise ValueError("got no graph, expected at least one")
    for title, (graph, names) in graphs.items():
        if len(names) == 0 or np.shape(graph) != (len(names), len(names)):
            raise ValueError(
                f"got {title} of shape {np.shape(graph)} for {len(names)} names, expected (M, M) with M >= 1"
            )
    sides = [max(2.2, _GRAPH_CELL * len(names)) for _, names in graphs.values()]
    margins = [0.3 + 0.062 * max(map(len, names)) for _, names in graphs.values()]
    widths = [side + margin for side, margin in zip(sides, margins, strict=True)]
    figure = _figure(sum(widths) + 1.2, max(widths) + 0.5)
    row = figure.subplots(1, len(graphs), squeeze=False, width_ratios=widths)[0]
    for axes, (title, (graph, names)) in zip(row, graphs.items(), strict=True):
        image = axes.imshow(graph, cmap="Blues", vmin=0, vmax=1)
        axes.set_anchor("N")
        places = range(len(names))
        axes.set_xticks(places, names, fontsize=7.5, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(places, names, fontsize=7.5)
        axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
        _plain(axes)
        axes.tick_params(length=0)
    bar = figure.colorbar(image, cax=row[-1].inset_axes([1 + 0.15 / sides[-1], 0, 0.16 / sides[-1], 1]))
    bar.set_label("closeness of the descriptions", color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelcolor=_INK)
    _save(figure, path)


def plot_skeleton(path: str | Path, positions: np.ndarray, skeleton: Skeleton, title: str) -> None:
    """Draw one frame of a skeleton from two or three sides, with the joints' indices, as a PNG.

    Args:
        path: where to.
        positions: (V, 2) or (V, 3), coordinates of the joints.
        skeleton: whose bones are drawn, and whose joints are listed beside.
        title: of the picture.

    Raises:
        ValueError: positions of another shape.
    """
    if positions.ndim != 2 or positions.shape not in ((len(skeleton), 2), (len(skeleton), 3)):
        raise ValueError(f"positions must be ({len(skeleton)}, 2 or 3), got {positions.shape}")
    sides = [(0, 1)] if positions.shape[1] == 2 else [(0, 1), (2, 1), (0, 2)]
    figure = _figure(4.2 * len(sides) + 2.6, 5.2)
    panels = figure.subplots(1, len(sides) + 1, width_ratios=[*[4.2] * len(sides), 2.6], squeeze=False)[0]
    for axes, (across, up) in zip(panels, sides):
        for bone in skeleton.edges:
            ends = positions[list(bone)]
            axes.plot(ends[:, across], ends[:, up], color=_LINES[0], linewidth=2, zorder=1)
        axes.scatter(positions[:, across], positions[:, up], s=14, color=_INK, zorder=2)
        for index, point in enumerate(positions):
            axes.annotate(
                str(index), (point[across], point[up]), (3, 3), textcoords="offset points", fontsize=7
            )
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel(f"channel {across}")
        axes.set_ylabel(f"channel {up}")
        _plain(axes)
    panels[0].set_title(title, loc="left", fontsize=11, fontweight="bold", color=_INK)
    panels[-1].axis("off")
    names = "\n".join(f"{index}  {joint}" for index, joint in enumerate(skeleton.joints))
    panels[-1].text(0, 1, names, va="top", fontsize=7.5, color=_INK, transform=panels[-1].transAxes)
    _save(figure, path)


def _check_timeline(
    rows: Sequence[tuple[str, np.ndarray]], classes: int, fps: float, confidence: np.ndarray | None
) -> None:
    if not rows:
        raise ValueError("got no row, expected at least one (name, labels)")
    expected = (len(rows[0][1]),)
    for name, labels in rows:
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != expected or labels.size == 0:
            raise ValueError(
                f"got row {name!r} of dtype {labels.dtype} and shape {labels.shape}, "
                f"expected integer labels, at least one, and as many as the first row's {expected[0]}"
            )
        outside = labels[(labels != IGNORE) & ((labels < 0) | (labels >= classes))]
        if outside.size:
            raise ValueError(
                f"got label {outside[0]} in row {name!r}, expected 0 to {classes - 1} or {IGNORE}"
            )
    if confidence is not None and np.shape(confidence) != expected:
        raise ValueError(
            f"got confidence of shape {np.shape(confidence)}, expected {expected}, one per frame"
        )
    if not fps > 0:
        raise ValueError(f"got {fps} frames per second, expected more than 0")


def _draw_bars(
    axes: Axes, rows: Sequence[tuple[str, np.ndarray]], colors: Sequence[Color], fps: float
) -> None:
    for y, (_, labels) in enumerate(rows):
        cuts = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1).tolist(), len(labels)]
        runs = [(start, end, int(labels[start])) for start, end in pairwise(cuts) if labels[start] != IGNORE]
        axes.broken_barh(
            [(start / fps, (end - start) / fps) for start, end, _ in runs],
            (y - 0.41, 0.82),
            facecolors=[colors[label] for _, _, label in runs],
            # White seams part neighbours of similar colour, but would hide bars of a few pixels.
            edgecolors="white",
            linewidth=0.8 if len(runs) <= 150 else 0,
        )
        for start, end, label in runs:
            inches = (end - start) / len(labels) * 0.9 * _TIMELINE_WIDTH
            if inches > 0.062 * len(str(label)) + 0.04:
                ink = _ink_on(colors[label])
                axes.text(
                    (start + end) / 2 / fps,
                    y,
                    label,
                    ha="center",
                    va="center_baseline",
                    color=ink,
                    fontsize=7.5,
                )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    _plain(axes)
    axes.tick_params(axis="y", length=0, labelsize=10)


def _draw_confidence(axes: Axes, confidence: np.ndarray, fps: float) -> None:
    edges = np.arange(len(confidence) + 1) / fps
    axes.stairs(confidence, edges, fill=True, color="#6699CC", alpha=0.35)
    axes.stairs(confidence, edges, baseline=None, color="#33608F", linewidth=0.9)
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 0.5, 1])
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_ylabel("confidence", color=_INK, rotation=0, ha="right", va="center", labelpad=8)
    axes.grid(axis="y", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    _plain(axes)


def _write_cells(axes: Axes, matrix: np.ndarray, percent: np.ma.MaskedArray) -> None:
    for row, column in np.argwhere(matrix > 0):
        share = percent[row, column]
        ink = "white" if share > 55 else _INK
        text = f"{share:.0f}" if share >= 0.5 else "<1"
        axes.text(column, row - 0.12, text, ha="center", va="center", color=ink, fontsize=9.5)
        axes.text(
            column, row + 0.25, f"{matrix[row, column]:,}", ha="center", va="center", color=ink, fontsize=6
        )


def _draw_losses(axes: Axes, records: Sequence[Mapping[str, float]]) -> None:
    keys = [key for key in _keys_of(records) if key.startswith("loss/")]
    terms = [key for key in keys if key != "loss/total"]
    smallest = math.inf
    for key in keys:
        epochs, values = _series(records, key)
        smallest = min(smallest, values.min(initial=math.inf))
        total = key == "loss/total"
        color = _INK if total else _LINES[terms.index(key) % len(_LINES)]
        label = key.removeprefix("loss/").replace("_", " ")
        width, z = (2.2, 3) if total else (1.5, 2)
        axes.plot(epochs, values, color=color, linewidth=width, zorder=z, label=label, marker=_marker(epochs))
    axes.set_title("training loss", loc="left", fontsize=11, fontweight="bold", color=_INK)
    if not keys:
        _say(axes, "no loss recorded")
        return
    if smallest > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.minorticks_off()
    _legend(axes)


def _draw_scores(axes: Axes, records: Sequence[Mapping[str, float]]) -> None:
    shown = [
        key for key in _keys_of(records) if key.count("/") == 2 and key.rpartition("/")[2] in _CURVE_SCORES
    ]
    shown = [key for key in shown if "/refined/" in key] or shown
    sources = list(dict.fromkeys(key.rpartition("/")[0] for key in shown))
    for key in shown:
        source, _, score = key.rpartition("/")
        epochs, values = _series(records, key)
        color, dash = _LINES[_CURVE_SCORES.index(score)], _DASHES[sources.index(source) % len(_DASHES)]
        axes.plot(
            epochs, values, color=color, linestyle=dash, linewidth=1.6, marker=_marker(epochs), markersize=4
        )
    axes.set_ylim(0, 100)
    only_source = f"{', '.join(sources[0].split('/'))}: " if len(sources) == 1 else ""
    axes.set_title(f"{only_source}scores (%)", loc="left", fontsize=11, fontweight="bold", color=_INK)
    if not shown:
        _say(axes, "no evaluation recorded")
        return
    scores = [score for score in _CURVE_SCORES if any(key.endswith(f"/{score}") for key in shown)]
    handles = [
        Line2D([], [], color=_LINES[_CURVE_SCORES.index(s)], label=s.replace("f1", "F1")) for s in scores
    ]
    if len(sources) > 1:
        handles += [
            Line2D([], [], color=_FAINT, linestyle=_DASHES[i % len(_DASHES)], label=source.replace("/", ", "))
            for i, source in enumerate(sources)
        ]
    _legend(axes, handles)


def _keys_of(records: Sequence[Mapping[str, float]]) -> list[str]:
    return list(dict.fromkeys(key for record in records for key in record))


def _series(records: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and values of the records that have a finite value there."""
    points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None and math.isfinite(r[key])]
    return np.array([epoch for epoch, _ in points]), np.array([value for _, value in points], dtype=float)


def _marker(epochs: np.ndarray) -> str | None:
    """Dots while there are few enough points to tell them apart; a lone point would be invisible without."""
    return "o" if len(epochs) <= 30 else None


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _plain(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(colors=_INK, labelcolor=_INK)


def _legend(axes: Axes, handles: Sequence[Line2D] | None = None) -> None:
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, fontsize=9, frameon=False
    )


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_FAINT)


def _ink_on(color: Color) -> str:
    """Black or white, whichever reads better on a colour (relative luminance with sRGB's weights)."""
    linear = np.array(color) ** 2.2
    return "white" if float(linear @ np.array([0.2126, 0.7152, 0.0722])) < 0.3 else _INK


def _save(figure: Figure, path: str | Path) -> None:
    for text in figure.findobj(Text):  # names come from data: a "$" in them starts no formula
        text.set_parse_math(False)
    with replacing(path) as partial:
        figure.savefig(
            partial, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.1, metadata={"Software": None}
        )
