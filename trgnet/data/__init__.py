"""Data: annotated recordings, batches, augmentation, and the built-in data sets."""

from __future__ import annotations

import inspect

from ..errors import UserError
from .augment import augment
from .batch import Batch, Segments, collate
from .labels import IGNORE, boundaries_of, segments_of
from .mocap6 import load_mocap6
from .recording import Dataset, Recording, Split
from .synthetic import synthetic_dataset

__all__ = [
    "DATASETS",
    "IGNORE",
    "Batch",
    "Dataset",
    "Recording",
    "Segments",
    "Split",
    "augment",
    "boundaries_of",
    "collate",
    "load_dataset",
    "load_mocap6",
    "segments_of",
    "synthetic_dataset",
]

DATASETS = {"mocap6": load_mocap6, "synthetic": synthetic_dataset}
"""Data set name -> the function that loads or makes it."""


def load_dataset(name: str, **options: object) -> Dataset:
    """Load a data set by its name, "mocap6" or "synthetic".

    Args:
        name: a key of `DATASETS`.
        options: passed to the data set's function (`load_mocap6` takes none, see `synthetic_dataset`).

    Raises:
        UserError (a ValueError): an unknown name or option.
    """
    if name not in DATASETS:
        raise UserError(f"no data set {name!r}; there are {', '.join(DATASETS)}")
    known = inspect.signature(DATASETS[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(
            f"data set {name!r} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
    return DATASETS[name](**options)
