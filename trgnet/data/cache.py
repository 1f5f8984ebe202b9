"""Prepared features on disk, so that they are prepared once and need not fit into memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError, reading
from ..files import replacing
from .preparation import Preparation

__all__ = ["prepared_features"]

VERSION = 1
"""Of the preparation's arithmetic; another number makes every stored file a stranger."""


def prepared_features(
    path: str | Path,
    read: Callable[[bytes], np.ndarray],
    preparation: Preparation,
    cache: str | Path | None = None,
    *,
    reading_as: str = "",
) -> np.ndarray:
    """The features of a raw file.

    Args:
        path: the raw file.
        read: makes the raw array of the file's bytes.
        preparation: of the features.
        cache: folder for prepared features, made where it is not there. A stored file is found by the content of
            the raw file and the preparation, so that a change of either prepares anew; it is mapped from
            disk, and processes that map it share its memory. None: prepared now and kept in memory.
        reading_as: whatever else decides what `read` makes of the bytes; another text prepares anew too.

    Returns:
        float32 (C, V, T), not to be written to.

    Raises:
        UserError: the file cannot be read or prepared (names it), or the cache cannot be written.
    """
    path = Path(path)
    with reading(f"file {path}"):
        content = path.read_bytes()
    if cache is None:
        return _prepared(path, read, content, preparation)
    stored = Path(cache) / f"{_key(content, preparation, reading_as)}.npy"
    found = _mapped(stored)
    if found is None:
        features = _prepared(path, read, content, preparation)
        with reading(f"data.cache={cache}, which must be a folder that can be written to"):
            with replacing(stored) as partial, partial.open("wb") as file:
                np.save(file, features)
        found = _mapped(stored)
    return found


def _prepared(
    path: Path, read: Callable[[bytes], np.ndarray], content: bytes, preparation: Preparation
) -> np.ndarray:
    with reading(f"file {path}"):
        raw = read(content)
    try:
        return preparation.features(raw)
    except UserError as error:  # which knows nothing of files
        raise UserError(f"file {path}: {error}") from error


def _key(content: bytes, preparation: Preparation, reading_as: str) -> str:
    digest = hashlib.blake2b(
        f"{VERSION} {preparation.model_dump_json()} {reading_as} ".encode(), digest_size=20
    )
    digest.update(content)
    return digest.hexdigest()


def _mapped(path: Path) -> np.ndarray | None:
    """The stored features; None where there are none, or a damaged file that has to be written again."""
    try:
        header = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    if header.dtype != np.float32 or header.ndim != 3:
        return None
    # numpy's own map keeps the file open, and a thousand recordings are more than a process may have open.
    words = path.stat().st_size // 4
    mapped = torch.from_file(str(path), shared=False, size=words, dtype=torch.float32).numpy()
    features = mapped[header.offset // 4 :].reshape(header.shape)
    features.flags.writeable = False
    return features
