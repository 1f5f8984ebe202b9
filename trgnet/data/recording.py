"""Recordings, and data sets of annotated recordings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from ..text import TextPrior
from .labels import IGNORE, boundaries_of

if TYPE_CHECKING:
    from .preparation import Preparation

__all__ = ["IGNORE", "Dataset", "Recording", "Split"]


@dataclass(frozen=True, eq=False)
class Recording:
    """One sequence of skeleton features, with its labels where it is annotated.

    Args:
        name: unique in its data set.
        features: float32 (C, V, T), C-contiguous, finite, T >= 1; may be a memory-mapped file.
        labels: int64 (T,), class indices 0..254 or `IGNORE`; None when not annotated.
        subject: who is recorded, where that is known; validation holds out whole subjects.

    Raises:
        ValueError: the arrays are not as above.
    """

    name: str
    features: np.ndarray
    labels: np.ndarray | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        self._check_features()
        if self.labels is not None:
            self._check_labels(self.labels)

    def _check_features(self) -> None:
        features = self.features
        if features.ndim != 3 or features.size == 0:
            raise ValueError(
                f"recording {self.name!r}: features must be (C, V, T), not empty, got {features.shape}"
            )
        if features.dtype != np.float32 or not features.flags.c_contiguous:
            layout = "C-contiguous" if features.flags.c_contiguous else "not C-contiguous"
            raise ValueError(
                f"recording {self.name!r}: features must be C-contiguous float32, got {layout} "
                f"{features.dtype}; use np.ascontiguousarray(features, dtype=np.float32)"
            )
        bad = ~np.isfinite(features)
        if bad.any():
            channel, joint, frame = (int(index) for index in np.argwhere(bad)[0])
            raise ValueError(
                f"recording {self.name!r}: {int(bad.sum())} features are not finite, the first at channel "
                f"{channel}, joint {joint}, frame {frame}; repair or cut the recording"
            )

    def _check_labels(self, labels: np.ndarray) -> None:
        if labels.dtype != np.int64 or labels.shape != (self.length,):
            raise ValueError(
                f"recording {self.name!r}: labels must be int64 ({self.length},), one per frame of the "
                f"features, got {labels.dtype} {labels.shape}"
            )
        if labels.min() < 0 or labels.max() > IGNORE:
            raise ValueError(
                f"recording {self.name!r}: labels must be 0..{IGNORE - 1}, or {IGNORE} for frames without a "
                f"class; got {labels.min()}..{labels.max()}"
            )

    @property
    def length(self) -> int:
        """Number of frames T."""
        return self.features.shape[2]

    def boundaries(self) -> np.ndarray:
        """1 at each segment's first frame, 0 elsewhere: float32 (T,).

        Raises:
            ValueError: the recording has no labels.
        """
        if self.labels is None:
            raise ValueError(f"recording {self.name!r} has no labels, so it has no known boundaries")
        return boundaries_of(self.labels)


def subject_in(name: str, pattern: str | re.Pattern[str] | None) -> str | None:
    """Who is recorded: the pattern's first group, or its whole match, in a recording's name; None without one."""
    found = re.search(pattern, name) if pattern is not None else None
    if found is None:
        return None
    return found[1] if found.re.groups else found[0]


class Split(NamedTuple):
    """Disjoint parts of a data set, each in the data set's order."""

    train: tuple[Recording, ...]
    validation: tuple[Recording, ...]
    test: tuple[Recording, ...]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Annotated recordings of one skeleton.

    Args:
        name: short name, such as "mocap6".
        recordings: N annotated recordings with distinct names and the same C and V.
        classes: K class names, at most 255.
        skeleton: of V joints.
        fps: frames per second.
        rotation_axis: the vertical axis of xyz triples of channels (0 x, 1 y, 2 z), about which augmentation
            may turn them; None when the channels are no xyz triples.
        background: class that the segment scores leave out, or None.
        text: embeddings of the V joints and K classes.
        test: names of the recordings tested by default.
        preparation: how raw joint coordinates became the features; None where the features are all there is.

    Raises:
        ValueError: the parts do not fit together; says which.
    """

    name: str
    recordings: tuple[Recording, ...]
    classes: tuple[str, ...]
    skeleton: Skeleton
    fps: float
    rotation_axis: int | None
    background: int | None
    text: TextPrior
    test: tuple[str, ...]
    preparation: Preparation | None = None

    def __post_init__(self) -> None:
        self._check_facts()
        self._check_recordings()
        self._check_names(self.test)

    def _check_facts(self) -> None:
        if not 1 <= len(self.classes) <= IGNORE or len(set(self.classes)) != len(self.classes):
            raise ValueError(f"{self.name}: expected 1..{IGNORE} distinct class names, got {self.classes}")
        if self.background is not None and not 0 <= self.background < len(self.classes):
            raise ValueError(
                f"{self.name}: background {self.background} is not a class 0..{len(self.classes) - 1}"
            )
        if self.rotation_axis not in (None, 0, 1, 2):
            raise ValueError(
                f"{self.name}: rotation_axis must be 0, 1, 2 or None, got {self.rotation_axis!r}"
            )
        if not self.fps > 0:
            raise ValueError(f"{self.name}: fps must be positive, got {self.fps}")
        rows = (len(self.text.joints), len(self.text.actions))
        if rows != (len(self.skeleton), len(self.classes)):
            raise ValueError(
                f"{self.name}: text embeddings of {rows[0]} joints and {rows[1]} actions do not fit "
                f"{len(self.skeleton)} joints and {len(self.classes)} classes"
            )

    def _check_recordings(self) -> None:
        if not self.recordings:
            raise ValueError(f"{self.name}: no recordings; give at least one")
        names = [recording.name for recording in self.recordings]
        if len(set(names)) != len(names):
            raise ValueError(f"{self.name}: recording names must be distinct, got {names}")
        for recording in self.recordings:
            shape, expected = recording.features.shape[:2], (self.channels, len(self.skeleton))
            if shape != expected:
                raise ValueError(
                    f"{self.name}: recording {recording.name!r} has (C, V) = {shape}, expected {expected}: "
                    "the channels of the first recording and the joints of the skeleton"
                )
            if recording.labels is None:
                raise ValueError(
                    f"{self.name}: recording {recording.name!r} has no labels; leave it out of the data set"
                )
            known = recording.labels[recording.labels != IGNORE]
            if known.size and known.max() >= len(self.classes):
                raise ValueError(
                    f"{self.name}: recording {recording.name!r} has label {known.max()}, "
                    f"but there are {len(self.classes)} classes"
                )
        if self.rotation_axis is not None and self.channels % 3:
            raise ValueError(
                f"{self.name}: {self.channels} channels are no xyz triples; set rotation_axis to None"
            )

    def _check_names(self, names: Sequence[str]) -> None:
        known = [recording.name for recording in self.recordings]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UserError(f"{self.name} has no recording {', '.join(unknown)}; it has {', '.join(known)}")

    @property
    def channels(self) -> int:
        """Number of input channels C."""
        return self.recordings[0].features.shape[0]

    def split(self, test: Sequence[str] | None = None, validation: float = 0.0, seed: int = 0) -> Split:
        """Split into training, validation and test recordings.

        Validation is taken from the recordings that are not tested, so the test set chooses nothing. Its size
        is `validation` times their number, rounded, and at least 1 when `validation` > 0. Whole subjects are
        taken, in an order drawn with `seed`, each as long as the size is not exceeded; where every subject is
        larger than the size, the smallest goes as a whole. A recording of an unknown subject counts as a
        subject of its own. When the recordings to choose from are all of one subject, single recordings
        are drawn instead. At least one recording, of at least one subject where there are several, is always
        left for training. A subject of the validation part may have other recordings among the tested ones.

        Args:
            test: names of the tested recordings; None for the data set's default, empty for no test.
            validation: share in [0, 1) of the recordings that are not tested.
            seed: of the draw.

        Raises:
            UserError (a ValueError): an unknown name, a share out of range, or nothing left to train on.
        """
        chosen = self.test if test is None else test
        if isinstance(chosen, str):
            raise UserError(f"test must be a sequence of names, got the text {chosen!r}; pass [{chosen!r}]")
        self._check_names(chosen)
        if not 0 <= validation < 1:
            raise UserError(f"validation must be a share in [0, 1), got {validation}")
        rest = [recording for recording in self.recordings if recording.name not in chosen]
        purpose, needed = ("training with validation", 2) if validation > 0 else ("training", 1)
        if len(rest) < needed:
            raise UserError(
                f"{self.name}: {len(set(chosen))} of {len(self.recordings)} recordings are tested, but "
                f"{purpose} needs at least {needed} more; test fewer"
            )
        held_out = _draw_validation(rest, validation, seed) if validation > 0 else set()
        return Split(
            train=tuple(recording for recording in rest if recording.name not in held_out),
            validation=tuple(recording for recording in rest if recording.name in held_out),
            test=tuple(recording for recording in self.recordings if recording.name in chosen),
        )


def _draw_validation(recordings: Sequence[Recording], share: float, seed: int) -> set[str]:
    """Names of the validation recordings: given two recordings or more, at least one is left."""
    size = min(max(1, round(share * len(recordings))), len(recordings) - 1)
    groups = _by_subject(recordings)
    if len(groups) == 1:
        groups = [[recording.name] for recording in recordings]
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = [groups[index] for index in order]
    held_out: set[str] = set()
    for group in shuffled:
        if len(held_out) + len(group) <= size:
            held_out.update(group)
    return held_out or set(min(shuffled, key=len))


def _by_subject(recordings: Sequence[Recording]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[str]] = {}
    for recording in recordings:
        key = ("recording", recording.name) if recording.subject is None else ("subject", recording.subject)
        groups.setdefault(key, []).append(recording.name)
    return list(groups.values())
