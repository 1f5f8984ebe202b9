"""The six data sets of the literature, in the on-disk layout that its public code shares.

    ROOT/DATASET/features/*.npy          raw joint coordinates
    ROOT/DATASET/gt_arr/*.npy            (T,) class of every frame
    ROOT/DATASET/mapping.txt             "id name" per line
    ROOT/csv/DATASET/train1.csv, test1.csv, ...
                                         columns feature, label, boundary: the files of one recording per
                                         line, with paths relative to ROOT, of which the first folder may be
                                         a name of ROOT, as in ./dataset/DATASET/features/a.npy

The lists `val*.csv` and the files in `gt_boundary_arr` are not read. The published validation list is a part
of the test list, so validation is split off the training list instead (`Dataset.split`). Boundaries follow
from the labels that are kept; those of the files would miss some where only every n-th frame is. Source of
the layout and the facts: arXiv 2503.15126 and the public code of its authors.
"""

from __future__ import annotations

import csv
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import DataWarning, UserError, reading
from ..skeleton import MCFS, PKU, TCG, Skeleton, lara
from ..text import TextPrior
from .arrays import load_array
from .cache import prepared_features
from .labels import IGNORE, cut_to_shorter
from .preparation import Preparation
from .recording import Dataset, Recording, subject_in

__all__ = ["SHARED_DATASETS", "SharedDataset", "load_lara", "load_shared"]

COLUMNS = ("feature", "label", "boundary")
THREADS = 8


@dataclass(frozen=True)
class SharedDataset:
    """Facts of a data set.

    Args:
        name: of its folders.
        skeleton: of V joints.
        classes: K, the number of classes.
        preparation: of the files in `features`.
        rotation_axis: see `Dataset`.
        subject: regular expression whose first group (or whole match) in a recording's name is who is
            recorded; None where names do not say.
        more_channels: whether files may have channels behind those of the preparation, which are dropped.
        background: see `Dataset`. The published evaluation leaves no class out.
    """

    name: str
    skeleton: Skeleton
    classes: int
    preparation: Preparation
    rotation_axis: int | None
    subject: str | None = None
    more_channels: bool = False
    background: int | None = None


_PKU = Preparation(axes="t (m v c)", joints=25, channels=3, persons=2, fps=30)
_LARA = Preparation(axes="c t v m", joints=19, channels=6, fps=200, stride=4)
_MCFS = Preparation(joints=25, channels=2, fps=30, image_size=(1280, 720), displacement=False, relative_to=8)
_TCG = Preparation(joints=17, channels=3, fps=100, relative_to=2)

# PKU: in A01N01-L, N01 is taken for the subject, so that all views of a performance stay together.
SHARED_DATASETS: dict[str, SharedDataset] = {
    facts.name: facts
    for facts in (
        SharedDataset("PKU-subject", PKU, 52, _PKU, rotation_axis=1, subject=r"N(\d+)"),
        SharedDataset("PKU-view", PKU, 52, _PKU, rotation_axis=1, subject=r"N(\d+)"),
        SharedDataset("LARA", lara(), 8, _LARA, rotation_axis=2, subject=r"S\d+"),
        SharedDataset("MCFS-22", MCFS, 22, _MCFS, rotation_axis=None, more_channels=True),
        SharedDataset("MCFS-130", MCFS, 130, _MCFS, rotation_axis=None, more_channels=True),
        SharedDataset("TCG-15", TCG, 15, _TCG, rotation_axis=2),
    )
}
"""Name -> facts."""

LARA_SHOULDERS = {"head": (12, 10), "collar": (12, 11)}


def load_shared(
    facts: SharedDataset,
    root: str | Path,
    *,
    text: str | Path | tuple[str, str] | None = None,
    cache: str | Path | None = None,
    split: int = 1,
    subject: str | None = None,
) -> Dataset:
    """Load a data set in the shared layout.

    The recordings are those of the training list, then those of the test list; each goes by the name of its
    feature file without the ending.

    Args:
        facts: of the data set.
        root: the folder with the folders `csv` and that of the data set.
        text: text embeddings, see `load_text`; None: the published ones.
        cache: folder for prepared features, see `prepared_features`; None: they are kept in memory.
        split: number of the lists, as in `train1.csv`.
        subject: instead of `facts.subject`.

    Raises:
        UserError (a ValueError): something is missing or not as above; names the file, and the line or frame.

    Warns:
        DataWarning: features and labels that differ a little in length were cut to the shorter.
    """
    root = Path(root)
    subjects = _pattern(facts.subject if subject is None else subject)
    folder = _folder(root, facts.name)
    classes = _read_mapping(folder / "mapping.txt", facts.classes)
    train, test = (_read_list(root, facts.name, part, split) for part in ("train", "test"))
    entries = train + test
    _check_distinct(entries)
    prior = _prior(facts, classes, text)
    recordings = _read_recordings(facts, entries, cache)
    named = tuple(replace(each, subject=subject_in(each.name, subjects)) for each in recordings)
    if subject is not None and all(recording.subject is None for recording in named):
        raise UserError(f"subject {subject!r} matches no recording's name, such as {named[0].name!r}")
    return Dataset(
        name=facts.name,
        recordings=named,
        classes=classes,
        skeleton=facts.skeleton,
        fps=facts.preparation.feature_fps,
        rotation_axis=facts.rotation_axis,
        background=facts.background,
        text=prior,
        test=tuple(entry.name for entry in test),
        preparation=facts.preparation,
    )


def load_lara(
    root: str | Path,
    *,
    text: str | Path | tuple[str, str] | None = None,
    cache: str | Path | None = None,
    split: int = 1,
    subject: str | None = None,
    disputed_edge: str = "head",
) -> Dataset:
    """Load LARa, see :func:`load_shared`.

    Args:
        root, text, cache, split, subject: see :func:`load_shared`.
        disputed_edge: where the left shoulder hangs: "head", as published, or "collar", as anatomy has it.

    Raises:
        UserError (a ValueError): as for :func:`load_shared`, or another `disputed_edge`.
    """
    if disputed_edge not in tuple(LARA_SHOULDERS):  # a list of numbers, say, has no hash
        raise UserError(f"disputed_edge must be {' or '.join(LARA_SHOULDERS)}, got {disputed_edge!r}")
    facts = replace(SHARED_DATASETS["LARA"], skeleton=lara(LARA_SHOULDERS[disputed_edge]))
    return load_shared(facts, root, text=text, cache=cache, split=split, subject=subject)


SHARED_LOADERS = {name: partial(load_shared, facts) for name, facts in SHARED_DATASETS.items()} | {
    "LARA": load_lara
}
"""Name -> the function that loads it from `root`."""


def _pattern(subject: str | None) -> re.Pattern[str] | None:
    if subject is None:
        return None
    try:
        return re.compile(subject)
    except (re.error, TypeError) as error:
        raise UserError(f"subject must be a regular expression, got {subject!r}: {error}") from error


def _folder(root: Path, name: str) -> Path:
    folder = root / name
    if not folder.is_dir():
        there = sorted(entry.name for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else None
        has = "is no folder" if there is None else f"has the folders {', '.join(there) or '(none)'}"
        raise UserError(
            f"no folder {folder}: root {root} {has}; set data.root to the folder that holds {name} and csv"
        )
    return folder


def _read_mapping(path: Path, count: int) -> tuple[str, ...]:
    """The K class names in the order of their ids."""
    with reading(f"file {path}"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    names: dict[int, str] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        identity, _, name = line.strip().replace("\t", " ").partition(" ")
        name = name.strip()
        where = f"file {path}, line {number}"
        if not re.fullmatch("[0-9]{1,9}", identity) or not name:
            raise UserError(f"{where}: expected 'id name' such as '0 Walking', got {line!r}")
        if int(identity) >= count:
            raise UserError(f"{where}: expected an id 0..{count - 1}, one per class, got {identity}")
        if int(identity) in names or name in names.values():
            raise UserError(f"{where}: expected every id and name once, got {line!r} again")
        names[int(identity)] = name
    missing = [str(identity) for identity in range(count) if identity not in names]
    if missing:
        raise UserError(
            f"file {path}: expected the ids 0..{count - 1}, one line each, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    return tuple(names[identity] for identity in range(count))


class _Entry(NamedTuple):
    """A line of a list."""

    name: str
    feature: Path
    label: Path
    where: str


def _read_list(root: Path, name: str, part: str, split: int) -> list[_Entry]:
    if not isinstance(split, int) or isinstance(split, bool) or split < 0:
        raise UserError(f"split must be the number of a list, such as 1 for {part}1.csv, got {split!r}")
    path = root / "csv" / name / f"{part}{split}.csv"
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.csv"))
        raise UserError(f"no file {path}; its folder has {', '.join(there) or 'no .csv files'}")
    entries = [
        _Entry(feature.stem, feature, label, where) for where, feature, label in _read_rows(path, root)
    ]
    if not entries:
        raise UserError(f"file {path} lists no recordings")
    return entries


def _read_rows(path: Path, root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Place, feature file and label file of every line."""
    with reading(f"file {path}"):
        text = path.read_text(encoding="utf-8-sig")
    rows = csv.reader(text.splitlines())
    try:
        header = [column.strip() for column in next(rows, [])]
        if any(header.count(column) != 1 for column in COLUMNS):
            raise UserError(
                f"file {path}: expected the columns {','.join(COLUMNS)} in the first line, "
                f"got {','.join(header) or 'none'}"
            )
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            where = f"file {path}, line {rows.line_num}"
            if len(row) != len(header):
                raise UserError(f"{where}: expected {len(header)} cells, got {len(row)}: {','.join(row)}")
            cells = dict(zip(header, row, strict=True))
            yield where, *(_resolve(root, cells[column], where) for column in ("feature", "label"))
    except csv.Error as error:
        raise UserError(f"file {path}, line {rows.line_num}: {error}") from error


def _resolve(root: Path, cell: str, where: str) -> Path:
    """The file that a list names, with or without a name of the root in front."""
    parts = [part for part in cell.strip().replace("\\", "/").split("/") if part not in ("", ".")]
    candidates = [root.joinpath(*kept) for kept in (parts, parts[1:]) if kept]
    within = all(candidate.is_relative_to(root) for candidate in candidates)  # not so of a drive's letter
    if not candidates or ".." in parts or not within:
        raise UserError(f"{where}: expected a path within the root {root}, got {cell!r}")
    with reading(where):
        found = [candidate for candidate in candidates if candidate.is_file()]
    if not found:
        raise UserError(
            f"{where}: no file {' or '.join(str(candidate) for candidate in candidates)}, which is "
            f"{cell!r} in the root {root}"
        )
    return found[0]


def _check_distinct(entries: Sequence[_Entry]) -> None:
    places: dict[str, str] = {}
    for entry in entries:
        if entry.name in places:
            raise UserError(
                f"{entry.where}: recording {entry.name!r} is listed already in {places[entry.name]}; "
                "list every recording once, for training or for testing"
            )
        places[entry.name] = entry.where


def _prior(
    facts: SharedDataset, classes: Sequence[str], text: str | Path | tuple[str, str] | None
) -> TextPrior:
    from ..text import load_text, shipped_text

    if text is None:
        return shipped_text(facts.name, facts.skeleton.joints, classes)
    return load_text(text, facts.skeleton.joints, classes)


class _Read(NamedTuple):
    """A recording, and the lengths of its files where they differ."""

    recording: Recording
    cut: str | None


def _read_recordings(
    facts: SharedDataset, entries: Sequence[_Entry], cache: str | Path | None
) -> list[Recording]:
    """The recordings in the order of the lists; of several faults the first in that order is raised."""
    threads = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:  # reading and arithmetic of large arrays release the GIL
        read = list(pool.map(lambda entry: _read_recording(facts, entry, cache), entries))
    cut = [each.cut for each in read if each.cut is not None]
    if cut:
        warnings.warn(
            f"{facts.name}: {len(cut)} of {len(read)} recordings have features and labels of different "
            f"lengths, which were cut to the shorter; the first is {cut[0]}",
            DataWarning,
            stacklevel=2,
        )
    return [each.recording for each in read]


def _read_recording(facts: SharedDataset, entry: _Entry, cache: str | Path | None) -> _Read:
    preparation = facts.preparation

    def read(content: bytes) -> np.ndarray:
        array = load_array(entry.feature, content=content)
        if facts.more_channels and array.ndim == 3:
            return array[..., : preparation.channels]
        return array

    features = prepared_features(entry.feature, read, preparation, cache)
    labels = _read_labels(entry.label, facts.classes)
    frames = _raw_frames(entry.feature, preparation)
    length = cut_to_shorter(frames, len(labels), f"files {entry.feature} and {entry.label}")
    kept = preparation.kept_frames(length)
    if kept < features.shape[2]:
        features = np.ascontiguousarray(features[..., :kept])
    cut = f"{entry.feature} of {frames} frames with {len(labels)} labels" if frames != len(labels) else None
    return _Read(Recording(entry.name, features, labels[: length : preparation.stride]), cut)


def _raw_frames(path: Path, preparation: Preparation) -> int:
    """Frames in a feature file that could be prepared, by its header: the features may be of the cache."""
    with reading(f"file {path}"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            array.close()
            raise UserError(f"file {path}: expected one array in a .npy file, got an .npz file")
        # A group such as (m v c) is one axis of the file.
        return array.shape[re.sub(r"\(.*?\)", "_", preparation.axes).split().index("t")]


def _read_labels(path: Path, classes: int) -> np.ndarray:
    """Class of every frame, int64 (T,)."""
    labels = load_array(path)
    if labels.dtype.kind not in "iuf" or labels.ndim != 1 or labels.size == 0:
        raise UserError(
            f"file {path}: expected the class of every frame, integers (T,), got {labels.dtype} "
            f"{labels.shape}"
        )
    known = np.isin(labels, [*range(classes), IGNORE])
    if not known.all():
        frame = int(np.flatnonzero(~known)[0])
        raise UserError(
            f"file {path}: frame {frame} has the label {labels[frame]}; expected 0..{classes - 1}, or "
            f"{IGNORE} for frames without a class"
        )
    return labels.astype(np.int64)
