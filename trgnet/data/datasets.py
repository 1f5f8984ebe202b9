"""The data sets by name, and how to load one."""

from __future__ import annotations

import inspect

from ..errors import UserError, did_you_mean
from .folder import load_folder
from .mocap6 import load_mocap6
from .recording import Dataset
from .shared_layout import SHARED_LOADERS
from .synthetic import synthetic_dataset

DATASETS = {
    "mocap6": load_mocap6,
    "synthetic": synthetic_dataset,
    "folder": load_folder,
    **SHARED_LOADERS,
}
"""Data set name -> the function that loads or makes it."""


def load_dataset(name: str, **options: object) -> Dataset:
    """Load a data set by its name.

    Args:
        name: a key of `DATASETS`: "mocap6" and "synthetic" come with the package; the data sets of the
            literature and "folder", one's own recordings, are read from disk.
        options: passed to the data set's function, such as `root`, the folder of the data.

    Raises:
        UserError (a ValueError): an unknown name or option, or data that cannot be used.
    """
    if name not in DATASETS:
        raise UserError(
            f"no data set {name!r}{did_you_mean(name, DATASETS)}; there are {', '.join(DATASETS)}"
        )
    known = inspect.signature(DATASETS[name]).parameters
    unknown = [option for option in options if option not in known]
    if unknown:
        raise UserError(
            f"data set {name!r} has no option {', '.join(unknown)}; it takes {', '.join(known) or 'none'}"
        )
    needed = [key for key, parameter in known.items() if parameter.default is inspect.Parameter.empty]
    missing = [key for key in needed if options.get(key) is None]
    if missing:
        raise UserError(f"data set {name!r} needs the option {', '.join(missing)}; set data.{missing[0]}=...")
    return DATASETS[name](**options)
