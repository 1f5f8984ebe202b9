"""mocap6: six annotated recordings of exercises from the CMU motion capture database, shipped as data.

Sources, licences and citation are in `trgnet/assets/mocap6/SOURCE.md`.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import numpy as np

from ..skeleton import MOCAP6
from ..text import load_text, shipped_text
from .recording import Dataset, Recording

FPS = 10.0
DEFAULT_TEST = ("13_30", "14_14")
METRES_PER_AMC_UNIT = 0.0254 / 0.45
"""The CMU files scale lengths so that 0.45 units are one inch."""


def load_mocap6(text: str | Path | tuple[str, str] | None = None) -> Dataset:
    """Load the shipped recordings of CMU subjects 13 and 14: 2,058 frames at 10 fps, 12 classes, 11 joints.

    The features are C = 6 channels per joint: its x, y and z slot, then their displacements x_(t+1) - x_t (0
    on the last frame). A slot holds a joint angle in radians, or the root's height in metres in the root's y
    slot; each is relative to its mean, as published. Slots that mocap6 does not record are 0. The default
    test recordings are 13_30 and 14_14.

    Args:
        text: text embeddings, see `trgnet.text.load_text`; None: those in the package.

    Raises:
        UserError: `text` cannot be read or does not fit.
    """
    folder = resources.files("trgnet") / "assets" / "mocap6"
    with (folder / "mocap6.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        values, labels, lengths = arrays["values"], arrays["labels"], arrays["lengths"]
        columns, names, classes = (arrays[key].tolist() for key in ("columns", "names", "classes"))
    if text is None:
        prior = shipped_text("mocap6", MOCAP6.joints, classes)
    else:
        prior = load_text(text, MOCAP6.joints, classes)
    ends = np.cumsum(lengths)[:-1]
    recordings = tuple(
        Recording(
            name,
            _features(part, columns),
            classes_of_frames.astype(np.int64),
            subject=name.partition("_")[0],
        )
        for name, part, classes_of_frames in zip(
            names, np.split(values, ends), np.split(labels, ends), strict=True
        )
    )
    return Dataset(
        name="mocap6",
        recordings=recordings,
        classes=tuple(classes),
        skeleton=MOCAP6,
        fps=FPS,
        rotation_axis=None,
        background=None,
        text=prior,
        test=DEFAULT_TEST,
    )


def _features(values: np.ndarray, columns: list[str]) -> np.ndarray:
    """(T, columns) in the units of the source -> float32 (6, V, T)."""
    slots = np.zeros((3, len(MOCAP6), len(values)))
    for column, series in zip(columns, values.T, strict=True):
        joint, kind, axis = _parse_column(column)
        scale = METRES_PER_AMC_UNIT if kind == "t" else np.pi / 180
        slots["xyz".index(axis), MOCAP6.joints.index(joint)] = scale * series.astype(np.float64)
    displacements = np.zeros_like(slots)
    displacements[..., :-1] = np.diff(slots)
    return np.concatenate([slots, displacements]).astype(np.float32)


def _parse_column(column: str) -> tuple[str, str, str]:
    """Split "lowerback.rx" into ("lowerback", "r", "x"): r is a rotation, t a translation."""
    joint, _, slot = column.partition(".")
    return joint, slot[0], slot[1]
