"""``trgnet data``: start, check and describe a folder of one's own recordings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, did_you_mean
from .files import write_text

if TYPE_CHECKING:
    import numpy as np

    from .data import Dataset
    from .data.description import Description

TEMPLATE = """\
# What the arrays of this folder do not say themselves. Check it with: trgnet data check {folder}
# Lines that begin with # are comments; take the # away to use a key that has one.

name: {name}              # of the data set
fps: {fps}                # frames per second of the recordings

# Recordings: .npy, .npz or .csv files, relative to this folder. A .csv has one line per frame and the columns
# JOINT_CHANNEL, such as left_hip_x.
recordings: "{recordings}"
{array}
axes: {axes}              # of the arrays: t frames, v joints, c channels, m persons; "t (v c)" is a flat table
channels: [{channels}]    # of every joint
# coordinates: [x, y]     # the channels that are coordinates, where not all are
# image_size: [1920, 1080]  # where x and y are pixels
# persons: 1              # in every frame; of several, the axes have an m
displacement: true        # the movement from frame to frame is a feature
relative: true            # coordinates are relative to the root joint
stride: 1                 # 4 keeps every 4th frame
# vertical: y             # the channel that points up or down; augmentation turns recordings about it

# The skeleton, joints in the order of the arrays. Every bone joins two joints, in any order.
joints: [{joints}]
root: {root}              # the joint in the middle, such as the pelvis
edges: [{edges}]

# The actions, in the order of their indices in the labels.
classes: [{classes}]
# background: none        # a class that the segment scores leave out

# Labels: the name of an array in the same .npz file; or a folder with NAME.npy (integers), NAME.txt (a class
# per line and frame) or NAME.csv (columns start,end,label, or start_seconds,end_seconds,label) per recording.
labels: {labels}

# Who is recorded: a regular expression for the recordings' names. Validation holds out whole subjects.
# subject: "^(.+)_[^_]+$"
test: []                  # names of the recordings that are tested and never trained on
# test_subjects: []       # the same by subject

# Text embeddings, which tell the network how joints and actions relate: made by "trgnet text embed {folder}" of the
# descriptions below, or of the plain names; "none" does without.
text: text.npz
# descriptions:
#   joints: {{left_hip: The left hip joins the left leg to the pelvis.}}
#   actions: {{walk: Walking, the legs step in turn and the arms swing.}}
"""


def add_commands(
    commands: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser]
) -> None:
    """Add ``trgnet data init|check|describe``."""
    data = commands.add_parser(
        "data", help="start, check and describe a folder of your own recordings", allow_abbrev=False
    )
    actions = data.add_subparsers(required=True, metavar="COMMAND")
    init = command(actions, "init", _init, "write a description file that explains itself")
    init.add_argument("folder", type=Path, metavar="DIR", help="folder of the recordings")
    init.add_argument("--skeleton", metavar="NAME", help="take joints and bones of a skeleton of the package")
    check = command(actions, "check", _check, "report every fault of a folder of recordings")
    check.add_argument("folder", type=Path, metavar="DIR", help="folder with a description file")
    describe = command(actions, "describe", _describe, "count, measure and draw a data set")
    describe.add_argument("folder", type=Path, nargs="?", metavar="DIR", help="folder of the data")
    describe.add_argument("--config", metavar="NAME|FILE", help="of a configuration's data set instead")
    describe.add_argument(
        "--out",
        type=Path,
        metavar="PNG",
        help="picture of a skeleton frame (default: NAME-skeleton.png here)",
    )


def _init(options: argparse.Namespace) -> None:
    from .data.description import FILE

    folder: Path = options.folder
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; make it and put the recordings into it")
    path = folder / FILE
    if path.exists():
        raise UserError(f"{path} is there already; edit it, or remove it to start anew")
    write_text(
        path,
        TEMPLATE.format(
            folder=folder, name=_quoted(folder.resolve().name), **_guesses(folder, options.skeleton)
        ),
    )
    print(f"{path}: fill in what only you know, then: trgnet data check {folder}")


def _guesses(folder: Path, skeleton: str | None) -> dict[str, object]:
    """What the recordings tell by themselves, for the template."""
    pattern, files = _recordings(folder)
    arrays = _arrays(files[0])
    shape = max(
        (array.shape for array in arrays.values() if array.ndim in (2, 3)), key=len, default=(1000, 4, 3)
    )
    name = next((name for name, array in arrays.items() if array.shape == shape), "")
    axes, joints, channels = _axes(shape)
    labels = next(
        (key for key, array in arrays.items() if array.ndim == 1 and array.dtype.kind in "iu"), None
    )
    classes = range(1 + max(_highest(_arrays(file), labels) for file in files) if labels else 2)
    names, root, edges = _joints(joints, skeleton)
    letters = list("xyz"[:channels]) if channels <= 3 else [f"c{index}" for index in range(channels)]
    if files[0].suffix == ".csv" and skeleton is None:
        names, letters = _columns(files[0])
        root = names[0]
    return {
        "fps": 30,
        "recordings": pattern,
        "array": f"array: {_quoted(name)}              # of the recording in an .npz file"
        if name
        else "# array: positions",
        "axes": axes,
        "channels": ", ".join(map(_quoted, letters)),
        "joints": ", ".join(map(_quoted, names)),
        "root": _quoted(root),
        "edges": ", ".join(f"[{child}, {parent}]" for child, parent in edges),
        "classes": ", ".join(f"action_{index}" for index in classes),
        "labels": _quoted(labels or "labels"),
    }


def _columns(file: Path) -> tuple[list[str], list[str]]:
    """Joints and channels of a table whose columns are JOINT_CHANNEL, in their order."""
    from .data.folder import LABEL, read_table

    parts = [column.rpartition("_") for column in read_table(file)[0] if column != LABEL]
    found = [list(dict.fromkeys(names)) for names in ([p[0] for p in parts], [p[2] for p in parts])]
    if not all(joint and channel for joint, _, channel in parts) or not parts:
        raise UserError(f"file {file}, line 1: expected columns JOINT_CHANNEL, such as left_hip_x")
    return found[0], found[1]


def _quoted(name: str) -> str:
    """A name as a YAML text, whatever it is made of."""
    return json.dumps(name, ensure_ascii=False)


def _recordings(folder: Path) -> tuple[str, list[Path]]:
    """The pattern that finds the recordings, and their files."""
    from .data.folder import ENDINGS, find_recordings

    for pattern in ("recordings/*", "features/*", *(f"*{ending}" for ending in ENDINGS)):
        try:
            return pattern, find_recordings(folder, pattern)
        except UserError:  # that there are none is what the next pattern is for
            continue
    raise UserError(
        f"{folder} has no recordings: expected {', '.join(ENDINGS)} files in it, or in its folder recordings"
    )


def _arrays(file: Path) -> dict[str, np.ndarray]:
    from .data.arrays import load_arrays

    return {} if file.suffix == ".csv" else load_arrays(file)


def _highest(arrays: dict[str, np.ndarray], labels: str) -> int:
    """The highest label but 255, which is none."""
    found = arrays.get(labels, ())
    return max((int(label) for label in set(found) if label != 255), default=0)


def _axes(shape: Sequence[int]) -> tuple[str, int, int]:
    """Axes, joints and channels that an array of this shape probably has; the longest axis is time."""
    time = max(range(len(shape)), key=lambda axis: shape[axis])
    if len(shape) == 2:
        channels = 3 if shape[1 - time] % 3 == 0 else 2
        return ("t (v c)" if time == 0 else "(v c) t"), shape[1 - time] // channels, channels
    first, second = (axis for axis in range(3) if axis != time)
    channel = first if shape[first] < shape[second] else second
    letters = {time: "t", channel: "c", first + second - channel: "v"}
    return " ".join(letters[axis] for axis in range(3)), shape[first + second - channel], shape[channel]


def _joints(count: int, name: str | None) -> tuple[Sequence[str], str, list[tuple[str, str]]]:
    """Joint names, root and bones, of a skeleton of the package or numbered."""
    from .skeleton import SKELETONS

    if name is None:
        return [f"joint_{index}" for index in range(count)], "joint_0", []
    if name not in SKELETONS:
        raise UserError(
            f"no skeleton {name!r}{did_you_mean(name, SKELETONS)}; there are {', '.join(SKELETONS)}"
        )
    skeleton = SKELETONS[name]
    bones = [(skeleton.joints[child], skeleton.joints[parent]) for child, parent in skeleton.edges]
    return skeleton.joints, skeleton.joints[skeleton.root], bones


def _check(options: argparse.Namespace) -> None:
    from .data.folder import check_folder

    checked = check_folder(options.folder)
    for oddity in checked.oddities:
        print(f"odd: {oddity}")
    for fault in checked.faults:
        print(f"fault: {fault}")
    frames = sum(recording.length for recording in checked.recordings)
    print(f"{len(checked.recordings)} recordings, {frames} frames; faults: {len(checked.faults)}")
    if checked.faults:
        raise UserError(f"{options.folder} has the faults listed above; mend them and check again")


def _describe(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .config import load_config, with_overrides
    from .evaluation import print_table
    from .trainer import read_dataset

    if options.folder is None and options.config is None:
        raise UserError("describe what? give the folder of your recordings, or --config NAME")
    own = ["data.name=folder"] if options.config is None else []
    config = with_overrides(load_config(options.config), own)
    if options.folder is not None:
        data = config.data.model_copy(update={"root": str(options.folder)})
        config = config.model_copy(update={"data": data})
    if own and config.data.text is None:  # it can be described before it can be trained on
        config = config.model_copy(update={"data": config.data.model_copy(update={"text": "none"})})
    dataset, console = read_dataset(config), Console()
    for table in (_facts(dataset), _class_table(dataset)):
        print_table(console, table)
    _draw(dataset, options)


def _facts(dataset: Dataset):
    from rich.table import Table

    lengths = sorted(recording.length for recording in dataset.recordings)
    seconds = sum(lengths) / dataset.fps
    subjects = {recording.subject for recording in dataset.recordings if recording.subject is not None}
    table = Table(show_header=False, box=None, title=dataset.name, title_justify="left")
    for name, value in (
        ("recordings", f"{len(lengths)}, {len(dataset.test)} of them for testing"),
        ("subjects", len(subjects) or "not known"),
        ("frames", f"{sum(lengths):,}, {seconds / 60:.1f} minutes at {dataset.fps:g} fps"),
        ("length", f"{lengths[0]} to {lengths[-1]} frames, median {lengths[len(lengths) // 2]}"),
        ("features", f"{dataset.channels} channels of {len(dataset.skeleton)} joints"),
    ):
        table.add_row(name, str(value))
    return table


def _class_table(dataset: Dataset):
    from statistics import median

    from rich.table import Table

    from .data import segments_of

    segments = [part for recording in dataset.recordings for part in segments_of(recording.labels)]
    total = sum(length for _, length, _ in segments) or 1  # nothing may be labelled yet
    table = Table(title="Classes", title_justify="left")
    table.add_column("class")
    for column in ("frames", "share [%]", "segments", "median length [s]"):
        table.add_column(column, justify="right")
    for label, name in enumerate(dataset.classes):
        lengths = [length for _, length, of in segments if of == label]
        seconds = f"{median(lengths) / dataset.fps:.1f}" if lengths else "-"
        table.add_row(
            name, f"{sum(lengths):,}", f"{100 * sum(lengths) / total:.1f}", str(len(lengths)), seconds
        )
    return table


def _draw(dataset: Dataset, options: argparse.Namespace) -> None:
    from .data.description import read_description
    from .plots import plot_skeleton

    if options.config is not None:
        return  # the arrays of published data are known, one's own need to be looked at
    description = read_description(options.folder)
    positions, name, frame = _middle_frame(options.folder, description)
    if positions.shape[1] < 2:
        print("one channel is no position; there is nothing to draw")
        return
    out = options.out or Path(f"{dataset.name}-skeleton.png")
    plot_skeleton(out, positions, dataset.skeleton, f"{name}, frame {frame}")
    print(out)


def _middle_frame(folder: Path, description: Description) -> tuple[np.ndarray, str, int]:
    """Coordinates (V, 2 or 3) of the first person in the middle of the first recording."""
    from .data.folder import find_recordings, read_raw

    path = find_recordings(folder, description.recordings, description.text)[0]
    raw = description.preparation().raw(read_raw(path, description))
    frame = raw.shape[-1] // 2
    taken = description.coordinates or description.channels
    channels = [description.channels.index(channel) for channel in taken][:3]
    return raw[0, channels, :, frame].T, path.stem, frame
