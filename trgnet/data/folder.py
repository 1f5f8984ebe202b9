"""One's own recordings: a folder of arrays with a description file.

A recording is an .npy, .npz or .csv file. Its labels are an array of the same .npz file, a column of the same
.csv file, or a file of the same name in a folder of labels: see :func:`read_labels`.
"""

from __future__ import annotations

import csv
import glob
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataWarning, UserError, did_you_mean, reading
from ..text import TextPrior, load_text
from .arrays import load_array, load_arrays
from .cache import prepared_features
from .description import Description, read_description, read_text
from .labels import IGNORE, cut_to_shorter
from .recording import Dataset, Recording, subject_in

__all__ = ["Checked", "check_folder", "find_recordings", "load_folder", "read_labels", "read_raw"]

ENDINGS = (".npy", ".npz", ".csv")
LABEL_ENDINGS = (".npy", ".csv", ".txt")
LABEL = "label"
"""Column of a .csv recording that holds its labels."""

ARRAYS = ("positions", "keypoints", "features")
"""Arrays of an .npz file that are taken for the recording when the description names none."""


@dataclass(frozen=True, eq=False)
class Checked:
    """What a check has found: the recordings that can be used, the faults, and what is odd but tolerated."""

    recordings: tuple[Recording, ...]
    faults: tuple[str, ...]
    oddities: tuple[str, ...]


def load_folder(root: str, *, text: str | tuple[str, str] | None = None, cache: str | None = None) -> Dataset:
    """Load a folder of recordings that has a description file, see `trgnet data init`.

    Args:
        root: the folder.
        text: as for :func:`trgnet.text.load_text`; None: what the description says.
        cache: folder for prepared features, see :func:`trgnet.data.cache.prepared_features`.

    Raises:
        UserError: a fault in the description or in a recording, the first of them; `trgnet data check` lists all.
    """
    folder = Path(root)
    description = read_description(folder)
    prior = _prior(folder, description, text)
    checked = _check_recordings(folder, description, cache)
    if checked.faults:
        more = len(checked.faults) - 1
        rest = f" (and {more} more: trgnet data check {folder} lists all)" if more else ""
        raise UserError(checked.faults[0] + rest)
    for oddity in checked.oddities:
        warnings.warn(oddity, DataWarning, stacklevel=2)
    return Dataset(
        name=description.name,
        recordings=checked.recordings,
        classes=description.classes,
        skeleton=description.skeleton(),
        fps=description.preparation().feature_fps,
        rotation_axis=None
        if description.vertical is None
        else description.channels.index(description.vertical),
        background=None
        if description.background is None
        else description.classes.index(description.background),
        text=prior,
        test=_tested(description, checked.recordings),
        preparation=description.preparation(),
    )


def check_folder(root: str | Path) -> Checked:
    """Look at everything in the folder and collect the faults, instead of stopping at the first.

    Raises:
        UserError: the description file itself is missing or faulty; names all its faults.
    """
    folder = Path(root)
    description = read_description(folder)
    checked = _check_recordings(folder, description, None)
    faults = list(checked.faults)
    for look in (
        lambda: _prior(folder, description, None),
        lambda: _tested(description, checked.recordings),
    ):
        try:
            look()
        except UserError as error:
            faults.append(str(error))
    return Checked(checked.recordings, tuple(faults), checked.oddities)


def find_recordings(folder: Path, pattern: str, text: str | tuple[str, str] = "text.npz") -> list[Path]:
    """The recordings' files that `pattern`, relative to the folder, matches, in the order of their names.

    The files of the text embeddings, which may lie among them, are left out.

    Raises:
        UserError: the pattern leaves the folder, or matches no recording.
    """
    _check_inside(pattern)
    found = [folder / name for name in glob.glob(pattern, root_dir=folder, recursive=True)]
    others = {folder / name for name in ([text] if isinstance(text, str) else text)}
    files = sorted(
        path
        for path in found
        if path.suffix in ENDINGS and path.is_file() and not path.name.startswith(".") and path not in others
    )
    if not files:
        raise UserError(
            f"{folder}: no recording matches {pattern!r}; expected files that end in {', '.join(ENDINGS)}"
        )
    return files


def read_raw(path: Path, description: Description, content: bytes | None = None) -> np.ndarray:
    """The raw array of a recording, with the description's axes.

    Raises:
        UserError: the file cannot be read or holds something else; names it, and the line.
    """
    if path.suffix == ".csv":
        return _read_columns(path, description)
    arrays = load_arrays(path, content)
    if "" in arrays:
        return arrays[""]
    names = [description.array] if description.array is not None else ARRAYS
    found = [name for name in names if name in arrays]
    if not found and description.array is None and len(arrays) == 1:
        found = list(arrays)
    if not found:
        raise UserError(
            f"file {path} has no array {' or '.join(names)}; it has {', '.join(arrays) or 'none'}: name the right "
            "one with the key 'array' of the description"
        )
    return arrays[found[0]]


def _read_columns(path: Path, description: Description) -> np.ndarray:
    """A table with one line per frame and the columns JOINT_CHANNEL, as (T, V, C) in the description's axes."""
    if description.axes != "t v c":
        raise UserError(
            f"file {path}: a table has the axes 't v c', but the description says {description.axes!r}"
        )
    wanted = [f"{joint}_{channel}" for joint in description.joints for channel in description.channels]
    header, rows = read_table(path)
    missing = [name for name in wanted if name not in header]
    if missing:
        raise UserError(
            f"file {path}, line 1: expected the columns JOINT_CHANNEL, but {len(missing)} of {len(wanted)} are "
            f"missing, such as {missing[0]!r}{did_you_mean(missing[0], header)}"
        )
    places = [header.index(name) for name in wanted]
    values = np.empty((len(rows), len(wanted)))
    for frame, (number, row) in enumerate(rows):
        try:
            values[frame] = [float(row[place]) for place in places]
        except ValueError as error:
            raise UserError(f"file {path}, line {number}: {error}") from error
    return values.reshape(len(rows), len(description.joints), len(description.channels))


def read_table(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """The names of the columns, and the lines with their numbers, each as long."""
    lines = csv.reader(io.StringIO(read_text(path)))
    try:
        numbered = [(lines.line_num, [cell.strip() for cell in row]) for row in lines if row]
    except csv.Error as error:
        raise UserError(f"file {path}, line {lines.line_num}: {error}") from error
    if not numbered:
        raise UserError(f"file {path} is empty; expected a line with the names of the columns")
    (_, header), *rows = numbered
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"file {path}, line {number}: expected {len(header)} cells, got {len(row)}")
    return header, rows


# Labels


def read_labels(path: Path, folder: Path, description: Description, frames: int) -> np.ndarray | None:
    """The labels of a recording, one per raw frame; None where it has none.

    The description's `labels` names an array of the same .npz file, or a folder with a file per recording, of the
    same name, or a pattern such as ``labels/{name}.txt``. A table that is a recording may have a column "label". A
    file of labels is

    - .npy: integers (T,);
    - .txt, or .csv of one column without a header: a class per line and frame, by its name or its index;
    - .csv with the columns start, end and label, or start_seconds, end_seconds and label: a segment per line, from
      its first frame to the one after its last, or in seconds; `trgnet predict` writes such files. Frames of no
      segment are not labelled.

    Raises:
        UserError: labels that cannot be read, or are no classes; names the file, and the line or the frame.
    """
    if path.suffix == ".npz":
        arrays = load_arrays(path)
        if description.labels in arrays:
            return _checked_indices(arrays[description.labels], f"file {path}", description)
    if path.suffix == ".csv":
        header, rows = read_table(path)
        if LABEL in header:
            place = header.index(LABEL)
            names = [(number, row[place]) for number, row in rows]
            return _classes_of(names, path, description)
    found = _label_file(path.stem, folder, description.labels)
    return None if found is None else _read_label_file(found, description, frames)


def _label_file(name: str, folder: Path, labels: str) -> Path | None:
    _check_inside(labels)
    if "{name}" in labels:
        candidates = [folder / labels.replace("{name}", name)]
    else:
        candidates = [folder / labels / f"{name}{ending}" for ending in LABEL_ENDINGS]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _check_inside(pattern: str) -> None:
    if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
        raise UserError(f"{pattern!r} leads out of the folder; expected a path relative to it, without '..'")


def _read_label_file(path: Path, description: Description, frames: int) -> np.ndarray:
    if path.suffix in (".npy", ".npz"):
        return _checked_indices(load_array(path), f"file {path}", description)
    lines = [line.strip() for line in read_text(path).splitlines()]
    if path.suffix == ".csv" and lines and "," in lines[0]:
        return _read_segments(path, description, frames)
    return _classes_of(list(enumerate(lines, start=1)), path, description)


def _classes_of(names: Sequence[tuple[int, str]], path: Path, description: Description) -> np.ndarray:
    known = _label_of(description)
    labels = np.empty(len(names), dtype=np.int64)
    for frame, (line, name) in enumerate(names):
        labels[frame] = _class(name, known, f"file {path}, line {line}", description)
    return labels


def _label_of(description: Description) -> dict[str, int]:
    """Every way to write a class: its name, its index, and 255 for none."""
    indices = {str(index): index for index in (*range(len(description.classes)), IGNORE)}
    return indices | {"": IGNORE} | {name: index for index, name in enumerate(description.classes)}


def _class(name: str, known: Mapping[str, int], where: str, description: Description) -> int:
    if name not in known:
        classes = description.classes
        raise UserError(
            f"{where}: expected a class name, or an index 0..{len(classes) - 1}, got {name!r}"
            f"{did_you_mean(name, classes)}"
        )
    return known[name]


def _checked_indices(labels: np.ndarray, where: str, description: Description) -> np.ndarray:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(
            f"{where}: expected integer labels (T,), got an array of {labels.dtype} {labels.shape}"
        )
    count = len(description.classes)
    bad = np.flatnonzero(((labels < 0) | (labels >= count)) & (labels != IGNORE))
    if bad.size:
        raise UserError(
            f"{where}, frame {bad[0]}: expected labels 0..{count - 1}, or {IGNORE} for no class, got {labels[bad[0]]}"
        )
    return labels.astype(np.int64)


def _read_segments(path: Path, description: Description, frames: int) -> np.ndarray:
    header, rows = read_table(path)
    unit = next(
        (ends for ends in (("start", "end"), ("start_seconds", "end_seconds")) if set(ends) <= set(header)),
        None,
    )
    if unit is None or LABEL not in header:
        raise UserError(
            f"file {path}, line 1: expected the columns start, end and label, or start_seconds, end_seconds and "
            f"label; got {', '.join(header)}"
        )
    labels, known = np.full(frames, IGNORE, dtype=np.int64), _label_of(description)
    for line, row in rows:
        where, cells = f"file {path}, line {line}", dict(zip(header, row, strict=True))
        start, end = (_frame(cells[end], unit, description, where) for end in unit)
        if end > frames:
            end = cut_to_shorter(frames, end, where)
        if not 0 <= start < end or (labels[start:end] != IGNORE).any():
            raise UserError(
                f"{where}: expected start < end within the {frames} frames, after the segments before; got "
                f"{cells[unit[0]]} to {cells[unit[1]]}"
            )
        labels[start:end] = _class(cells[LABEL], known, where, description)
    return labels


def _frame(cell: str, unit: tuple[str, str], description: Description, where: str) -> int:
    try:
        return int(cell) if unit[0] == "start" else round(float(cell) * description.fps)
    except (ValueError, OverflowError) as error:
        raise UserError(f"{where}: expected a number, got {cell!r}") from error


# Recordings


def _check_recordings(folder: Path, description: Description, cache: str | None) -> Checked:
    recordings, faults, unlabelled, cut = [], [], [], []
    for path in find_recordings(folder, description.recordings, description.text):
        try:
            recording, raw_frames = _read_recording(path, folder, description, cache)
        except UserError as error:
            faults.append(str(error))
            continue
        if recording.labels is None:
            unlabelled.append(recording.name)
        else:
            recordings.append(recording)
            cut += [recording.name] if raw_frames is not None else []
    faults += _repeated(recordings)
    if not recordings and not faults:
        faults.append(
            f"{folder}: no recording has labels; looked for them in {description.labels!r}, see trgnet data init"
        )
    return Checked(tuple(recordings), tuple(faults), tuple(_oddities(folder, unlabelled, cut)))


def _repeated(recordings: Sequence[Recording]) -> Iterator[str]:
    names = [recording.name for recording in recordings]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"several recordings are called {name}; give their files different names"


def _oddities(folder: Path, unlabelled: Sequence[str], cut: Sequence[str]) -> Iterator[str]:
    if unlabelled:
        yield f"{folder}: without labels and left out: {', '.join(unlabelled)}"
    if cut:
        yield f"{folder}: frames and labels differ in number, and were cut to the fewer, in {', '.join(cut)}"


def _read_recording(
    path: Path, folder: Path, description: Description, cache: str | None
) -> tuple[Recording, int | None]:
    """The recording, and its number of raw frames where that is not the number of its labels."""
    preparation = description.preparation()
    features = prepared_features(
        path,
        lambda content: read_raw(path, description, content),
        preparation,
        cache,
        reading_as=repr((path.suffix, description.array, description.joints, description.channels)),
    )
    frames = features.shape[-1]
    if preparation.stride > 1:
        frames = preparation.raw(read_raw(path, description)).shape[-1]
    labels = read_labels(path, folder, description, frames)
    differ = labels is not None and len(labels) != frames
    if labels is not None:
        common = cut_to_shorter(frames, len(labels), f"file {path}")
        labels = np.ascontiguousarray(labels[:common][:: preparation.stride])
        features = features if not differ else np.ascontiguousarray(features[..., : len(labels)])
    with reading(f"file {path}"):
        return Recording(
            path.stem, features, labels, subject_in(path.stem, description.subject)
        ), frames if differ else None


def _tested(description: Description, recordings: Sequence[Recording]) -> tuple[str, ...]:
    names = [recording.name for recording in recordings]
    subjects = {recording.subject for recording in recordings if recording.subject is not None}
    for key, given, known in (
        ("test", description.test, names),
        ("test_subjects", description.test_subjects, subjects),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise UserError(
                f"{key}: there is no {unknown[0]!r}{did_you_mean(unknown[0], known)}; there are "
                f"{', '.join(sorted(known)) or 'none'}"
            )
    return tuple(
        recording.name
        for recording in recordings
        if recording.name in description.test or recording.subject in description.test_subjects
    )


def _prior(folder: Path, description: Description, text: str | tuple[str, str] | None) -> TextPrior:
    if text is None:
        text = _inside(folder, description.text)
    if isinstance(text, str) and text != "none" and not Path(text).exists():
        raise UserError(
            f"no text embeddings {text}; make them with: pip install 'trgnet[text]' and trgnet text embed {folder}, or "
            "do without text: data.text=none"
        )
    return load_text(text, description.joints, description.classes)


def _inside(folder: Path, text: str | tuple[str, str]) -> str | tuple[str, str]:
    """The files that the description names, which are relative to its folder."""
    if isinstance(text, str):
        return text if text == "none" else str(folder / text)
    return str(folder / text[0]), str(folder / text[1])
