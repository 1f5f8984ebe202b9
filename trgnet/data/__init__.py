"""Data: annotated recordings, batches, augmentation, and the built-in data sets.

What reads files is loaded when it is first used: the network and its losses need batches only, and run where the
packages for reading are missing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy_names
from .augment import augment
from .batch import Batch, Segments, collate
from .labels import IGNORE, boundaries_of, segments_of
from .recording import Dataset, Recording, Split

if TYPE_CHECKING:
    from .datasets import DATASETS, load_dataset
    from .mocap6 import load_mocap6
    from .preparation import Preparation
    from .synthetic import synthetic_dataset

__all__ = [
    "DATASETS",
    "IGNORE",
    "Batch",
    "Dataset",
    "Preparation",
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

__getattr__ = lazy_names(
    __name__,
    {
        "DATASETS": "datasets",
        "Preparation": "preparation",
        "load_dataset": "datasets",
        "load_mocap6": "mocap6",
        "synthetic_dataset": "synthetic",
    },
)
