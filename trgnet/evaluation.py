"""Scoring a network on annotated recordings, before and after boundary refinement, and writing the report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .data import Recording
from .files import write_csv, write_json
from .metrics import SegmentationScores
from .plots import plot_confusion
from .predictor import Prediction, Predictor

Scores = dict[str, float]
"""Scores in percent. "frame/..." are those of the network's most probable class per frame, "refined/..."
those after boundary refinement, "boundary/..." those of the predicted boundaries."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores, confusion matrix (int64 (K, K), rows are the truth, after refinement) and predictions."""

    scores: Scores
    confusion: np.ndarray
    predictions: tuple[Prediction, ...]


def evaluate(predictor: Predictor, recordings: Iterable[Recording]) -> Evaluation:
    """Score `predictor` on annotated recordings, each predicted on its own.

    Raises:
        UserError: a recording does not fit the network.
        ValueError: a recording has no labels.
    """
    info = predictor.info
    frame = SegmentationScores(info.classes, info.background)
    refined = SegmentationScores(info.classes, info.background)
    predictions = tuple(predictor.predict(recording) for recording in recordings)
    for prediction in predictions:
        if prediction.truth is None:
            raise ValueError(f"recording {prediction.name!r} has no labels to be scored against")
        frame.update(prediction.frame_labels, prediction.truth, prediction.boundary_probability)
        refined.update(prediction.labels, prediction.truth)
    scores = {}
    for name, value in frame.compute().items():
        scores[name.replace("_", "/") if name.startswith("boundary_") else f"frame/{name}"] = value
    scores |= {f"refined/{name}": value for name, value in refined.compute().items()}
    return Evaluation(scores, refined.confusion, predictions)


def score_table(
    title: str, columns: Mapping[str, Mapping[str, Any]], shown: Callable[[Any], str] = "{:.1f}".format
) -> Table:
    """A table of scores in percent, written by `shown`: per column the values before and after refinement."""

    def cell(scores: Mapping[str, Any], key: str) -> str:
        return shown(scores[key]) if key in scores else "-"

    table = Table(
        title=Text(title, "table.title"),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("score [%]", no_wrap=True, vertical="bottom")
    for name in columns:
        table.add_column(f"{name}\nbefore", justify="right", vertical="bottom")
        table.add_column("refined", justify="right", vertical="bottom")
    names = [key.partition("/")[2] for key in next(iter(columns.values())) if key.startswith("refined/")]
    for name in names:
        cells = [
            cell(scores, f"{kind}/{name}") for scores in columns.values() for kind in ("frame", "refined")
        ]
        table.add_row(name, *cells, end_section=name == names[-1])
    for name in ("accuracy", "precision", "recall", "f1"):
        cells = [text for scores in columns.values() for text in (cell(scores, f"boundary/{name}"), "")]
        table.add_row(f"boundary {name}", *cells)
    return table


def print_table(console: Console, table: Table) -> None:
    """Print a table as wide as it is, even where the console is narrower, instead of leaving digits out."""
    unlimited = console.options.update(width=1_000_000)
    table.width = console.measure(table, options=unlimited).maximum
    console.print(table, crop=False)


def write_scores(
    folder: Path, parts: Mapping[str, Mapping[str, Scores]], facts: Mapping[str, object]
) -> list[Path]:
    """Write scores.json and scores.csv.

    Args:
        folder: where to.
        parts: part of the data ("test") -> which weights ("last_epoch") -> scores.
        facts: what else the JSON file tells.

    Returns:
        The paths written.
    """
    write_json(folder / "scores.json", {**facts, **parts})
    columns = list(next(iter(parts.values()), {}))
    rows = [
        [part, key, *(f"{scores[key]:.4f}" for scores in columns_of_part.values())]
        for part, columns_of_part in parts.items()
        for key in next(iter(columns_of_part.values()))
    ]
    write_csv(folder / "scores.csv", ["part", "score", *columns], rows)
    return [folder / "scores.json", folder / "scores.csv"]


def write_report(folder: Path, evaluation: Evaluation, classes: Sequence[str]) -> list[Path]:
    """Write the confusion matrix (confusion.csv, confusion.png) and the timelines (timelines/NAME.png).

    Returns:
        The paths written.
    """
    rows = [[name, *counts] for name, counts in zip(classes, evaluation.confusion.tolist(), strict=True)]
    write_csv(folder / "confusion.csv", ["truth \\ predicted", *classes], rows)
    plot_confusion(folder / "confusion.png", evaluation.confusion, classes)
    timelines = [folder / "timelines" / f"{prediction.name}.png" for prediction in evaluation.predictions]
    for path, prediction in zip(timelines, evaluation.predictions, strict=True):
        prediction.plot(path)
    return [folder / "confusion.csv", folder / "confusion.png", *timelines]
