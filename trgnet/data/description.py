"""The description file of a folder of one's own recordings: what the arrays themselves do not say."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import UserError, did_you_mean, reading
from ..skeleton import Bone, Skeleton
from ..yaml12 import key_lines, load
from .labels import IGNORE
from .preparation import Preparation

__all__ = ["FILE", "Description", "read_description", "read_text", "texts_of"]

FILE = "dataset.yaml"
"""Name of the description file in its folder."""

Name = Annotated[str, Field(min_length=1)]


class Texts(BaseModel):
    """Descriptions of joints and actions, by their names; what is not described goes by its name."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    joints: dict[str, str] = {}
    actions: dict[str, str] = {}


class Description(BaseModel):
    """What a description file says; `trgnet data init` writes one that explains every key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    fps: float = Field(gt=0, allow_inf_nan=False)
    joints: tuple[Name, ...] = Field(min_length=1)
    edges: tuple[tuple[str | int, str | int], ...]
    root: str
    classes: tuple[Name, ...] = Field(min_length=1, max_length=IGNORE)
    background: str | None = None
    recordings: Name = "recordings/*"
    array: str | None = None
    axes: str = "t v c"
    persons: int = Field(1, ge=1)
    channels: tuple[Name, ...] = Field(("x", "y", "z"), min_length=1)
    coordinates: tuple[str, ...] | None = None
    image_size: tuple[float, float] | None = None
    displacement: bool = True
    relative: bool = True
    stride: int = Field(1, ge=1)
    vertical: str | None = None
    labels: Name = "labels"
    subject: str | None = None
    test: tuple[str, ...] = ()
    test_subjects: tuple[str, ...] = ()
    text: str | tuple[str, str] = "text.npz"
    descriptions: Texts = Texts()

    @model_validator(mode="after")
    def _fits_together(self) -> Description:
        for kind in ("joints", "classes", "channels"):
            names = getattr(self, kind)
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(
                    f"{kind}: {', '.join(twice)} stands there twice or more; names must be distinct"
                )
        for kind, names, of in (
            ("root", [self.root], "joints"),
            ("background", [self.background], "classes"),
            ("vertical", [self.vertical], "channels"),
            ("coordinates", self.coordinates or (), "channels"),
            ("descriptions.joints", self.descriptions.joints, "joints"),
            ("descriptions.actions", self.descriptions.actions, "classes"),
        ):
            for name in names:
                if name is not None:
                    _index(name, getattr(self, of), kind, of)
        if self.vertical is not None and (self.coordinates is not None or len(self.channels) != 3):
            raise ValueError(
                "vertical: only recordings whose channels are x, y and z, and nothing else, can be turned"
            )
        if self.subject is not None:
            try:
                re.compile(self.subject)
            except re.error as error:
                raise ValueError(
                    f"subject: expected a regular expression, got {self.subject!r}: {error}"
                ) from error
        self.skeleton()
        self.preparation()
        return self

    def skeleton(self) -> Skeleton:
        """The joints and bones, every bone turned away from the root.

        Raises:
            ValueError: the bones are no tree that holds every joint.
        """
        bones = [tuple(self._joint(end) for end in edge) for edge in self.edges]
        root = self.joints.index(self.root)
        return Skeleton(self.name, self.joints, _away_from(root, bones, self.joints), root)

    def _joint(self, end: str | int) -> int:
        if isinstance(end, str):
            return _index(end, self.joints, "edges", "joints")
        if not 0 <= end < len(self.joints):
            raise ValueError(f"edges: there are the joints 0..{len(self.joints) - 1}, got {end}")
        return end

    def preparation(self) -> Preparation:
        """How the recordings' arrays become features."""
        taken = self.coordinates
        return Preparation(
            axes=self.axes,
            joints=len(self.joints),
            channels=len(self.channels),
            persons=self.persons,
            fps=self.fps,
            coordinates=None if taken is None else tuple(self.channels.index(name) for name in taken),
            image_size=self.image_size,
            displacement=self.displacement,
            relative_to=self.joints.index(self.root) if self.relative else None,
            stride=self.stride,
        )


def _index(name: str, names: tuple[str, ...], where: str, kind: str) -> int:
    if name not in names:
        raise ValueError(
            f"{where}: {name!r} is none of the {kind} {', '.join(names)}{did_you_mean(name, names)}"
        )
    return names.index(name)


def _away_from(root: int, bones: list[tuple[int, ...]], joints: tuple[str, ...]) -> tuple[Bone, ...]:
    """The bones as (child, parent), found by walking from the root."""
    parent_of: dict[int, int] = {}
    left, reached = list(bones), [root]
    for joint in reached:
        for bone in [bone for bone in left if joint in bone]:
            left.remove(bone)
            child = bone[1] if bone[0] == joint else bone[0]
            if child in parent_of or child == root:
                raise ValueError(
                    f"edges: the bone between {joints[bone[0]]!r} and {joints[bone[1]]!r} closes a cycle; a "
                    "skeleton is a tree, take one bone of the cycle out"
                )
            parent_of[child] = joint
            reached.append(child)
    detached = [name for index, name in enumerate(joints) if index not in reached]
    if detached:
        raise ValueError(
            f"edges: no chain of bones leads from the root {joints[root]!r} to {', '.join(detached)}; add bones, "
            "or take these joints out"
        )
    return tuple((child, parent) for child, parent in parent_of.items())


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark, with any kind of line ends.

    Raises:
        UserError: the file cannot be read, or is not UTF-8; says where.
    """
    with reading(f"file {path}"):
        try:
            return path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"byte {error.start} is no UTF-8; save the file in the encoding UTF-8"
            ) from error


def read_description(folder: str | Path) -> Description:
    """Read the description file of a folder.

    Raises:
        UserError: no folder, no such file in it, or a fault in it; names every fault and its line.
    """
    folder = Path(folder)
    path = folder / FILE
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the folder of your recordings")
    if not path.is_file():
        raise UserError(f"{folder} has no {FILE}; write one with: trgnet data init {folder}")
    text = read_text(path)
    with reading(f"file {path}"):
        values = load(text)
        if not isinstance(values, dict):
            raise ValueError("expected keys such as 'joints:', got something else; see trgnet data init")
        try:
            return Description.model_validate(values)
        except ValidationError as error:
            lines = key_lines(text)
            faults = [_fault(fault, lines) for fault in error.errors(include_url=False)]
            raise UserError("; ".join(f"file {path}, {fault}" for fault in faults)) from error


def _fault(fault: Mapping[str, Any], lines: Mapping[tuple[str | int, ...], int]) -> str:
    message = fault["msg"].removeprefix("Value error, ")
    place = tuple(fault["loc"])
    if not place:  # a fault of several keys begins with the key
        place = (message.partition(":")[0].partition(".")[0],)
    else:
        key = ".".join(str(part) for part in place)
        if fault["type"] == "extra_forbidden":
            message = f"unknown key {key!r}{did_you_mean(str(place[-1]), Description.model_fields)}"
        elif fault["type"] == "missing":
            message = f"the key {key!r} is missing"
        else:
            message = f"{key}: {message[0].lower()}{message[1:]}, got {fault['input']!r}"
    known = [place[:length] for length in range(len(place), 0, -1) if place[:length] in lines]
    return f"line {lines[known[0]]}: {message}" if known else message


def texts_of(description: Description) -> dict[str, dict[str, str]]:
    """The texts to embed: {"joints": {name: text}, "actions": {name: text}}, in the order of the data."""
    given = description.descriptions
    return {
        "joints": {name: given.joints.get(name) or _plain(name) for name in description.joints},
        "actions": {name: given.actions.get(name) or _plain(name) for name in description.classes},
    }


def _plain(name: str) -> str:
    """A name as words: "left_hip" and "LeftHip" are "left hip"."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|[_\-\s]+", " ", name).lower()
