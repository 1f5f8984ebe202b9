"""Keypoints of the common conventions, and how they become the joints of another skeleton.

Joints are compared by what they are called. A name is reduced to a canonical one: case, spaces and punctuation do
not count, the side may stand before or behind, whole or as a letter ("LHip", "hip_left", "left hip"), and the few
synonyms in `SYNONYMS` are the same joint. A neck from which a shoulder hangs is the point between the shoulders
("shoulder_center"), as in OpenPose's BODY_25; in Kinect's skeleton the neck is above it.

A joint that a convention lacks is derived where a formula in `DERIVED` says how. Nothing else is guessed.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from einops import EinopsError, rearrange
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import DataWarning, UserError, did_you_mean, reading
from .skeleton import MCFS, PKU, Skeleton
from .yaml12 import load as load_yaml

__all__ = ["CONVENTIONS", "Convention", "fill_gaps", "load_convention", "map_keypoints", "resample"]

SYNONYMS = {
    "mid_hip": ("hip", "hips", "pelvis", "root", "spinebase", "hipcenter", "centerhip"),
    "spine_mid": ("spine", "midspine", "torso"),
    "shoulder_center": ("spineshoulder", "thorax", "midshoulder", "neckbase"),
    "foot": ("feet", "footindex"),
}
"""Canonical name -> other names of it, without case, spaces and punctuation."""

SIDED = (
    "shoulder", "elbow", "wrist", "hand", "handtip", "thumb", "hip", "knee", "ankle", "foot", "heel", "bigtoe",
    "smalltoe", "eye", "ear",
)  # fmt: skip
"""Joints that there are two of; only before these is a lone l or r a side."""

DERIVED: dict[str, tuple[tuple[str, ...], ...]] = {
    # Where only one of them is named it is the other one: some centimetres apart.
    "shoulder_center": (("neck",), ("left_shoulder", "right_shoulder")),
    "neck": (("shoulder_center",), ("left_shoulder", "right_shoulder")),
    # The definition of OpenPose's mid hip, and how triangulated pelvises are made.
    "mid_hip": (("left_hip", "right_hip"),),
    # Kinect's spine_mid lies half-way up the trunk.
    "spine_mid": (("mid_hip", "shoulder_center"),),
    # Between spine_mid and the shoulders, where TCG's skeleton has it.
    "chest": (("spine_mid", "shoulder_center"),),
    # The middle of the head lies between the ears.
    "head": (("left_ear", "right_ear"),),
    # The tip of the foot, which is what Kinect calls foot.
    "left_foot": (("left_bigtoe", "left_smalltoe"),),
    "right_foot": (("right_bigtoe", "right_smalltoe"),),
}
"""Canonical name -> the joints whose mean it is, the first that are there; joints may be derived themselves."""


def compact(name: str) -> str:
    """The name without case, spaces and punctuation, by which names are compared."""
    return re.sub(r"[\W_]", "", name.casefold())


class Convention(BaseModel):
    """What the joints and axes of an array of keypoints are. Immutable plain data.

    Args:
        name: what messages call it.
        joints: names in the order of the array.
        axes: of the array, in the notation of einops: t frames, v joints, c channels, such as "t v c" or
            "t (v c)".
        fps: frames per second; None: not known.
        confidence: whether a third channel is the confidence of a detector, 0 for what it did not find,
            instead of a coordinate.
        map: joint of the model -> joint of the convention, or several whose mean is taken; for the joints that
            their names do not tell.

    Raises:
        pydantic.ValidationError (a ValueError): joints that are not distinct, other axes, or a map of joints
            that there are not.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    joints: tuple[str, ...] = Field(min_length=1)
    axes: str = "t v c"
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    confidence: bool = False
    map: dict[str, str | tuple[str, ...]] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Convention:
        names = [compact(joint) for joint in self.joints]
        twice = [joint for joint, name in zip(self.joints, names) if names.count(name) > 1]
        if twice:
            raise ValueError(f"joints must be distinct, got {', '.join(twice)}")
        if sorted(self.axes.replace("(", " ").replace(")", " ").split()) != ["c", "t", "v"]:
            raise ValueError(
                f"axes must name t, v and c once each, such as 't v c' or 't (v c)'; got {self.axes!r}"
            )
        for target, sources in self.mapped.items():
            unknown = [source for source in sources if compact(source) not in names]
            if unknown or not sources:
                hint = did_you_mean(unknown[0], self.joints) if unknown else ""
                raise ValueError(f"map: {target} must be made of joints of the file, got {[*sources]}{hint}")
        return self

    @property
    def mapped(self) -> dict[str, tuple[str, ...]]:
        """`map`, each joint with the tuple of its sources."""
        return {key: (value,) if isinstance(value, str) else value for key, value in self.map.items()}

    def array(self, array: np.ndarray) -> np.ndarray:
        """The array with the axes (T, V, C), in float32 or better.

        Raises:
            UserError: it holds no real numbers, has other axes or joints, or no frame.
        """
        if array.dtype.kind not in "fiu":
            raise UserError(f"expected real numbers, got an array of {array.dtype}")
        axes = "t (v c)" if array.ndim == 2 and self.axes == "t v c" else self.axes
        try:
            keypoints = rearrange(array, f"{axes} -> t v c", v=len(self.joints))
        except EinopsError as error:
            raise UserError(
                f"expected the {len(self.joints)} joints of {self.name} in an array with the axes "
                f"'{self.axes}' (t frames, v joints, c channels); got the shape {array.shape}"
            ) from error
        if keypoints.size == 0:
            raise UserError(f"expected at least one frame, got the shape {array.shape}")
        return keypoints.astype(np.promote_types(keypoints.dtype, np.float32), copy=False)


CONVENTIONS = {
    convention.name: convention
    for convention in (
        # Microsoft Kinect v2, the order of JointType, camera space.
        Convention(name="kinect25", joints=PKU.joints),
        # OpenPose BODY_25; its neck is the point between the shoulders.
        Convention(name="body25", joints=MCFS.joints, confidence=True),
        # COCO keypoints, as most detectors give them.
        Convention(
            name="coco17",
            joints=(
                "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
                "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee",
                "right_knee", "left_ankle", "right_ankle",
            ),
            confidence=True,
        ),
        # The 17 joints of Human3.6M that VideoPose3D and most lifting models use.
        Convention(
            name="h36m17",
            joints=(
                "mid_hip", "right_hip", "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle",
                "spine_mid", "thorax", "nose", "head", "left_shoulder", "left_elbow", "left_wrist",
                "right_shoulder", "right_elbow", "right_wrist",
            ),
        ),
    )
}  # fmt: skip
"""The conventions that are known by name."""


def load_convention(source: str | Path | Convention) -> Convention:
    """A convention by its name in :data:`CONVENTIONS`, or of a YAML file with the fields of
    :class:`Convention` (`name` is optional there).

    Raises:
        UserError: no such convention, or the file cannot be read or does not hold one.
    """
    if isinstance(source, Convention):
        return source
    if str(source) in CONVENTIONS:
        return CONVENTIONS[str(source)]
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        known = ("features", "raw", *CONVENTIONS)
        raise UserError(
            f"unknown input {str(source)!r}{did_you_mean(str(source), known)}; expected {', '.join(known)}, "
            "or a YAML file that names the joints"
        )
    with reading(f"keypoint layout {path}"):
        values = load_yaml(path.read_text(encoding="utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"expected keys such as 'joints:', got {values!r}")
        try:
            return Convention.model_validate({"name": path.stem, **values})
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = "".join(f"{part}: " for part in fault["loc"][:1])
            raise ValueError(f"{place}{fault['msg'].removeprefix('Value error, ')}") from error


def map_keypoints(
    keypoints: np.ndarray, convention: Convention, skeleton: Skeleton
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Put the joints of a convention where a skeleton has them.

    Args:
        keypoints: (T, V of the convention, C); joints that are NaN in every frame are not there.
        convention: says what the joints are.
        skeleton: of the model.

    Returns:
        (T, V of the skeleton, C) of the same type, and the joints of the skeleton that the keypoints do not
        tell, which are zero. A joint that both have is copied bit for bit.

    Raises:
        UserError: a joint of the convention's map that the skeleton lacks, or two joints of the convention
            that are one for the skeleton.
    """
    mapped = np.zeros((len(keypoints), len(skeleton), keypoints.shape[2]), keypoints.dtype)
    there = frozenset(np.flatnonzero(~np.isnan(keypoints).all(axis=(0, 2))).tolist())
    missing = []
    for joint, formula in enumerate(_formulas(convention, skeleton, there)):
        if formula is None:
            missing.append(joint)
        else:
            mapped[:, joint] = _evaluate(keypoints, formula)
    return mapped, tuple(missing)


Formula = int | tuple["Formula", ...]
"""A joint of the convention, or the mean of several formulas."""


def _evaluate(keypoints: np.ndarray, formula: Formula) -> np.ndarray:
    if isinstance(formula, int):
        return keypoints[:, formula]
    return np.mean([_evaluate(keypoints, part) for part in formula], axis=0)


def _formulas(convention: Convention, skeleton: Skeleton, there: frozenset[int]) -> list[Formula | None]:
    """How every joint of the skeleton is made of those of the convention that are there; None: not at all."""
    places = {compact(joint): index for index, joint in enumerate(convention.joints)}
    explicit = {compact(key): [places[compact(s)] for s in value] for key, value in convention.mapped.items()}
    for key in convention.mapped:
        if compact(key) not in map(compact, skeleton.joints):
            raise UserError(
                f"{convention.name}: map: the model has no joint {key!r}"
                f"{did_you_mean(key, skeleton.joints)}; it has {', '.join(skeleton.joints)}"
            )
    named: dict[str, list[int]] = {}
    for index, joint in enumerate(convention.joints):
        if index in there:
            named.setdefault(canonical(joint), []).append(index)
    formulas = []
    for joint, name in zip(skeleton.joints, _canonical_names(skeleton)):
        if compact(joint) in explicit:
            parts = explicit[compact(joint)]
            formulas.append(tuple(parts) if there.issuperset(parts) else None)
            continue
        candidates = named.get(name, [])
        same = [index for index in candidates if compact(convention.joints[index]) == compact(joint)]
        if len(candidates) > 1 and not same:
            raise UserError(
                f"{convention.name}: the model's joint {joint!r} could be any of "
                f"{', '.join(convention.joints[index] for index in candidates)}; say which in map"
            )
        formulas.append(same[0] if same else _derive(name, named, ()))
    return formulas


def _derive(name: str, named: Mapping[str, Sequence[int]], above: tuple[str, ...]) -> Formula | None:
    """The formula of a joint; `above` are the joints that are being derived of it, which it must not need."""
    if name in named:
        return named[name][0]
    if name in above:
        return None
    for parts in DERIVED.get(name, ()):
        formulas = tuple(_derive(part, named, (*above, name)) for part in parts)
        if None not in formulas:
            return formulas
    return None


def canonical(name: str) -> str:
    """The canonical name of a joint, such as "left_hip" of "LHip"; an unknown name is only made compact."""
    plain = compact(name)
    for side in ("left", "right"):
        for mark in (side, side[0]):
            for part in (plain.removeprefix(mark), plain.removesuffix(mark)):
                if part != plain and _synonym(part, sided=True) in SIDED:
                    return f"{side}_{_synonym(part, sided=True)}"
    return _synonym(plain, sided=False)


def _synonym(plain: str, *, sided: bool) -> str:
    if sided and plain in SIDED:
        return plain
    return next(
        (name for name, others in SYNONYMS.items() if plain in (*others, compact(name))),
        plain,
    )


def _canonical_names(skeleton: Skeleton) -> list[str]:
    names = [canonical(joint) for joint in skeleton.joints]
    hung = {parent for child, parent in skeleton.edges if names[child] in ("left_shoulder", "right_shoulder")}
    return ["shoulder_center" if name == "neck" and i in hung else name for i, name in enumerate(names)]


def split_confidence(keypoints: np.ndarray, convention: Convention) -> np.ndarray:
    """The coordinates of keypoints (T, V, C): a third channel that is a confidence is left away, and what has
    confidence 0 is NaN. Joints without all of their coordinates are NaN in all.

    Raises:
        UserError: infinite values, or confidences that are negative.
    """
    if np.isinf(keypoints).any():
        frame, joint, _ = np.argwhere(np.isinf(keypoints))[0]
        raise UserError(
            f"values are infinite, the first in frame {frame} of joint {convention.joints[joint]}; write NaN "
            "for what is missing"
        )
    lost = np.isnan(keypoints).any(axis=2)
    if convention.confidence and keypoints.shape[2] == 3:
        if (keypoints[..., 2] < 0).any():
            raise UserError(
                f"the third channel of {convention.name} is the confidence of the detector, which is not "
                f"negative; got {np.nanmin(keypoints[..., 2]):.3g}. Name the joints of 3-D keypoints in a YAML "
                "file of your own"
            )
        lost |= keypoints[..., 2] == 0
        keypoints = keypoints[..., :2]
    return np.where(lost[..., None], keypoints.dtype.type(np.nan), keypoints)


def fill_gaps(
    keypoints: np.ndarray, joints: Sequence[str], fps: float, name: str = "keypoints"
) -> np.ndarray:
    """Fill missing keypoints of (T, V, C), which are NaN, linearly over time; a DataWarning states how many.

    Before a joint's first frame and after its last the nearest is kept. A joint that is missing in every frame
    stays so and is not counted.

    Args:
        keypoints: not modified; returned itself where nothing is missing.
        joints: names of the V joints.
        fps: frames per second, for the warning.
        name: what the warning calls the recording.

    Raises:
        UserError: nothing is there in any frame.
    """
    lost = np.isnan(keypoints).any(axis=2)
    if lost.all():
        raise UserError(f"recording {name!r} has no keypoint in any frame")
    gaps = lost & ~lost.all(axis=0)
    if not gaps.any():
        return keypoints
    filled, frames = keypoints.copy(), np.arange(len(keypoints))
    for joint in np.flatnonzero(gaps.any(axis=0)):
        known = ~gaps[:, joint]
        for channel in range(keypoints.shape[2]):
            values = keypoints[known, joint, channel]
            filled[~known, joint, channel] = np.interp(frames[~known], frames[known], values)
    longest, joint = max((_longest_run(gaps[:, joint]), joint) for joint in range(gaps.shape[1]))
    share = gaps.sum() / (len(gaps) * (~lost.all(axis=0)).sum())
    warnings.warn(
        f"recording {name!r}: {share:.1%} of the keypoints are missing and were filled linearly over time, the "
        f"longest gap is {longest / fps:.2f} s of {joints[joint]}",
        DataWarning,
        stacklevel=2,
    )
    return filled


def _longest_run(flags: np.ndarray) -> int:
    edges = np.flatnonzero(np.diff(np.concatenate(([0], flags.astype(np.int8), [0]))))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def resample(array: np.ndarray, fps: float, to: float) -> np.ndarray:
    """Poses at another frame rate, linear between the two nearest frames.

    Frame t of the result is at t / to seconds; the last one is not after the last given. There is no low-pass
    filter, so that motion faster than to / 2 Hz is folded.

    Args:
        array: (T, ...), floating point; returned itself where the rates are equal.
        fps: its frames per second.
        to: frames per second of the result.
    """
    if fps == to:
        return array
    last = len(array) - 1
    frames = np.floor(
        last * to / fps + 1e-9
    )  # 1e-9: a frame that rounding puts just behind the last is there
    at = np.minimum(np.arange(frames + 1) * (fps / to), last)
    before = np.floor(at).astype(np.int64)
    weight = (at - before).astype(array.dtype).reshape(-1, *(1,) * (array.ndim - 1))
    return array[before] * (1 - weight) + array[np.minimum(before + 1, last)] * weight
