"""Reading arrays from files, never executing anything that they hold."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ..errors import UserError, reading

__all__ = ["load_array", "load_arrays"]


def load_arrays(path: str | Path, content: bytes | None = None) -> dict[str, np.ndarray]:
    """The arrays of a file by their names; the one array of an .npy file goes by the name "".

    Args:
        path: an .npy or .npz file.
        content: its bytes, where they have been read already.

    Raises:
        UserError: the file cannot be read, is damaged, or holds something else than arrays of numbers or
            texts; object arrays are refused, as reading one may run any program.
    """
    path = Path(path)
    with reading(f"file {path}"):
        source = io.BytesIO(path.read_bytes() if content is None else content)
        try:
            loaded = np.load(source, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return {"": loaded}
            with loaded as arrays:
                return {name: arrays[name] for name in arrays}
        except ValueError as error:  # whose text often is to allow pickles, which may run any program
            raise ValueError(
                "the file is damaged or holds something else than arrays of numbers; write it with "
                "numpy.save(file, array) or numpy.savez(file, name=array)"
            ) from error


def load_array(path: str | Path, name: str | None = None, content: bytes | None = None) -> np.ndarray:
    """One array of a file.

    Args:
        path: an .npy or .npz file.
        name: of the array in an .npz file; may be left out where there is only one.
        content: the file's bytes, where they have been read already.

    Raises:
        UserError: as for :func:`load_arrays`, or there is no array of that name.
    """
    arrays = load_arrays(path, content)
    if "" in arrays:
        return arrays[""]
    if name is None and len(arrays) == 1:
        return next(iter(arrays.values()))
    if name not in arrays:
        asked = "several arrays" if name is None else f"no array {name!r}"
        raise UserError(f"file {path} has {asked}; it has {', '.join(arrays) or 'none'}: say which to take")
    return arrays[name]
