"""Reading keypoints and raw arrays from .npy, .npz and .csv files and from folders of OpenPose's JSON files."""

from __future__ import annotations

import csv
import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from einops import rearrange

from .data.arrays import load_arrays
from .errors import DataWarning, UserError, did_you_mean, reading
from .keypoints import Convention, compact

__all__ = ["ENDINGS", "read_array", "read_keypoints"]

ENDINGS = (".npy", ".npz", ".csv")
"""Of the files that are read."""

ARRAYS = ("keypoints", "positions", "features")
"""Names under which an .npz file is searched for its array when none is given."""

CHANNELS = {"x": 0, "y": 1, "z": 2, "c": 2, "confidence": 2, "score": 2}
"""Last part of a column's name -> channel."""


def read_keypoints(path: str | Path, convention: Convention, array: str | None = None) -> np.ndarray:
    """Read keypoints.

    Args:
        path: .npy; .npz; .csv with one line per frame, whose header names the columns JOINT_CHANNEL (x, y, z, or
            c, confidence, score) in any order, or without a header the convention's joints one after another,
            empty where a value is missing; or, for BODY_25, a folder of OpenPose's JSON files.
        convention: of the keypoints.
        array: name of the array in an .npz file; None: the only one, or keypoints, positions or features.

    Returns:
        An array for :meth:`~trgnet.keypoints.Convention.array`.

    Raises:
        UserError: the file cannot be read or holds something else; names the file, and the line or the frame.
    """
    path = Path(path)
    if path.is_dir():
        if convention.name != "body25":
            raise UserError(f"{path}: a folder of OpenPose's JSON files is read with body25 only")
        return _read_openpose(path, len(convention.joints))
    if path.suffix == ".csv":
        return rearrange(_read_csv(path, convention.joints), f"t v c -> {convention.axes}")
    return read_array(path, array)


def read_array(path: str | Path, array: str | None = None) -> np.ndarray:
    """The array of an .npy file, or of an .npz file as for :func:`read_keypoints`.

    Raises:
        UserError: the file cannot be read, or has no such array.
    """
    path = Path(path)
    if path.suffix not in ENDINGS[:2]:
        raise UserError(f"{path}: expected a file that ends in {' or '.join(ENDINGS[:2])}")
    arrays = load_arrays(path)
    if "" in arrays:
        return arrays[""]
    if array is None:
        found = [name for name in ARRAYS if name in arrays]
        array = next(iter(arrays)) if len(arrays) == 1 else found[0] if len(found) == 1 else None
    if array not in arrays:
        asked = "several arrays" if array is None else f"no array {array!r}"
        raise UserError(
            f"{path} has {asked}; it has {', '.join(arrays) or 'none'}: say which with --array NAME"
        )
    return arrays[array]


def _read_csv(path: Path, joints: Sequence[str]) -> np.ndarray:
    """float64 (T, V, C), NaN where a cell is empty."""
    with reading(f"file {path}"):
        lines = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
        rows = [(number, row) for number, row in enumerate(lines, 1) if row]
        header = rows.pop(0)[1] if rows and not all(_is_number(cell) for cell in rows[0][1]) else None
        if not rows:
            raise ValueError("the file has no frame")
        width = len(rows[0][1] if header is None else header)
        values = np.array([_numbers(number, row, width) for number, row in rows])
        if header is not None:
            values = values[:, _order(header, joints)]
        if width % len(joints):
            raise ValueError(
                f"line {rows[0][0]} has {width} columns, no multiple of {len(joints)} joints; name the columns "
                "JOINT_CHANNEL in a first line if they are not the joints one after another"
            )
    return values.reshape(len(rows), len(joints), -1)


def _numbers(number: int, row: Sequence[str], width: int) -> list[float]:
    if len(row) != width:
        raise ValueError(f"line {number} has {len(row)} columns, expected {width}")
    wrong = [cell for cell in row if not _is_number(cell)]
    if wrong:
        raise ValueError(f"line {number}: expected a number, got {wrong[0]!r}")
    return [float(cell) if cell.strip() else np.nan for cell in row]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return not cell.strip()
    return True


def _order(header: Sequence[str], joints: Sequence[str]) -> list[int]:
    """The columns in the order of the joints, the channels of a joint one after another."""
    known = {compact(joint): index for index, joint in enumerate(joints)}
    places: dict[tuple[int, int], int] = {}
    for column, title in enumerate(header):
        joint, _, channel = title.strip().rpartition("_")
        place = known.get(compact(joint)), CHANNELS.get(channel.casefold())
        if None in place:
            raise ValueError(
                f"column {title!r} is no JOINT_CHANNEL{did_you_mean(joint, joints)}; the joints are "
                f"{', '.join(joints)}, the channels {', '.join(CHANNELS)}. Take other columns out"
            )
        if place in places:
            raise ValueError(f"columns {header[places[place]]!r} and {title!r} are the same")
        places[place] = column
    channels = sorted({channel for _, channel in places})
    wanted = [(joint, channel) for joint in range(len(joints)) for channel in channels]
    absent = [joint for joint, channel in wanted if (joint, channel) not in places]
    if absent:
        names = ", ".join(dict.fromkeys(joints[joint] for joint in absent))
        raise ValueError(
            f"there is not a column of every channel for {names}; leave cells empty for what is missing"
        )
    return [places[place] for place in wanted]


def _read_openpose(folder: Path, joints: int) -> np.ndarray:
    """float64 (T, V, 3): x, y and confidence of the first person in every file, NaN without a person."""
    files = sorted(folder.glob("*.json"))
    if not files:
        raise UserError(f"{folder} holds no .json file; expected those of OpenPose, one per frame")
    frames, crowded = np.full((len(files), joints, 3), np.nan), 0
    for frame, file in enumerate(files):
        with reading(f"file {file}"):
            content = json.loads(file.read_text(encoding="utf-8-sig"))
            if not isinstance(content, dict) or not isinstance(content.get("people"), list):
                raise ValueError("it has no list 'people'; expected the output of OpenPose for one frame")
            people = content["people"]
            crowded += len(people) > 1
            if people:
                values = np.asarray(people[0]["pose_keypoints_2d"], dtype=np.float64)
                if values.shape != (3 * joints,):
                    raise ValueError(
                        f"expected {3 * joints} numbers in pose_keypoints_2d, those of BODY_25, got the shape {values.shape}"
                    )
                frames[frame] = values.reshape(joints, 3)
    if crowded:
        warnings.warn(
            f"{folder}: {crowded} of {len(files)} frames have several people; the first of each is taken, who "
            "need not be the same throughout",
            DataWarning,
            stacklevel=3,
        )
    return frames
