"""Seeded synthetic recordings of any size, for tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np

from ..errors import UserError
from ..skeleton import Skeleton
from ..text import TextPrior
from .recording import Dataset, Recording

FPS = 30.0
SLOWEST, FASTEST = 0.5, 4.0
"""Movement frequencies of the first and the last class, Hz."""
SHORTEST_SEGMENT, LONGEST_SEGMENT = 16, 48
NOISE = 0.1


def synthetic_dataset(
    recordings: int = 8,
    frames: int = 200,
    joints: int = 11,
    channels: int = 6,
    classes: int = 5,
    seed: int = 0,
    embedding_dim: int = 32,
    *,
    shortest: int | None = None,
    rotation_axis: int | None = None,
) -> Dataset:
    """Make recordings of periodic movements that a model can learn to tell apart.

    Every class has a frequency, a random half of the joints that move, and an amplitude and a phase per
    channel and joint. A recording is a chain of segments of 16 to 48 frames (the last is cut), no two
    neighbours of one class (where there are several), plus noise. The skeleton is a binary tree, the text
    embeddings are random. Recordings are named "s0_r0", "s0_r1", "s1_r0", ...: two per subject. The last
    quarter of them is tested by default (none when there is only one).

    Args:
        recordings: N.
        frames: T, length of the recordings.
        joints: V.
        channels: C.
        classes: K, at most 255.
        seed: the result depends on nothing else but the sizes.
        embedding_dim: D.
        shortest: where given, lengths are drawn from `shortest` to `frames`, so that batches need padding.
        rotation_axis: `Dataset.rotation_axis`; needs C divisible by 3.

    Raises:
        UserError (a ValueError): an argument that is no integer, a size below 1, a seed below 0, or
            `shortest` above `frames`.
        ValueError: see `Dataset`.
    """
    shortest = frames if shortest is None else shortest
    sizes = {
        "recordings": recordings,
        "frames": frames,
        "joints": joints,
        "channels": channels,
        "classes": classes,
        "embedding_dim": embedding_dim,
        "shortest": shortest,
    }
    for name, size in sizes.items():
        _check_integer(name, size, least=1)
    _check_integer("seed", seed, least=0)
    if rotation_axis is not None:
        _check_integer("rotation_axis", rotation_axis, least=0)
    if shortest > frames:
        raise UserError(f"shortest must be in 1..{frames}, the number of frames, got {shortest}")
    rng = np.random.default_rng(seed)
    motions = [_draw_motion(rng, index, classes, channels, joints) for index in range(classes)]
    text = TextPrior(
        joints=rng.standard_normal((joints, embedding_dim), dtype=np.float32),
        actions=rng.standard_normal((classes, embedding_dim), dtype=np.float32),
    )
    made = tuple(
        _draw_recording(
            rng, f"s{index // 2}_r{index % 2}", motions, int(rng.integers(shortest, frames, endpoint=True))
        )
        for index in range(recordings)
    )
    tested = max(1, recordings // 4) if recordings > 1 else 0
    return Dataset(
        name="synthetic",
        recordings=made,
        classes=tuple(f"motion_{index}" for index in range(classes)),
        skeleton=_binary_tree(joints),
        fps=FPS,
        rotation_axis=rotation_axis,
        background=None,
        text=text,
        test=tuple(recording.name for recording in made[recordings - tested :]),
    )


def _check_integer(name: str, value: object, least: int) -> None:
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise UserError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True, eq=False)
class _Motion:
    """One class: frequency in Hz; amplitude and phase (C, V)."""

    frequency: float
    amplitude: np.ndarray
    phase: np.ndarray

    def at(self, seconds: np.ndarray) -> np.ndarray:
        """(T,) -> (C, V, T)."""
        angle = 2 * np.pi * self.frequency * seconds + self.phase[..., None]
        return self.amplitude[..., None] * np.sin(angle)


def _draw_motion(rng: np.random.Generator, index: int, classes: int, channels: int, joints: int) -> _Motion:
    active = np.zeros(joints)
    active[rng.choice(joints, size=-(-joints // 2), replace=False)] = 1
    frequency = SLOWEST * (FASTEST / SLOWEST) ** (index / max(1, classes - 1))
    amplitude = active * rng.uniform(0.3, 1.0, size=(channels, joints))
    return _Motion(frequency, amplitude, rng.uniform(0, 2 * np.pi, size=(channels, joints)))


def _draw_recording(rng: np.random.Generator, name: str, motions: list[_Motion], frames: int) -> Recording:
    shape = motions[0].amplitude.shape
    features = rng.normal(0, NOISE, size=(*shape, frames))
    labels = np.empty(frames, dtype=np.int64)
    start, previous = 0, -1
    while start < frames:
        end = min(frames, start + int(rng.integers(SHORTEST_SEGMENT, LONGEST_SEGMENT, endpoint=True)))
        label = _draw_label(rng, len(motions), previous)
        seconds = rng.uniform(0, 1 / motions[label].frequency) + np.arange(end - start) / FPS
        features[..., start:end] += motions[label].at(seconds)
        labels[start:end] = label
        start, previous = end, label
    return Recording(name, features.astype(np.float32), labels, subject=name.partition("_")[0])


def _draw_label(rng: np.random.Generator, classes: int, previous: int) -> int:
    """A class other than the previous one, where there is another."""
    if previous < 0 or classes == 1:
        return int(rng.integers(classes))
    return (previous + int(rng.integers(1, classes))) % classes


def _binary_tree(joints: int) -> Skeleton:
    return Skeleton(
        name="synthetic",
        joints=tuple(f"joint_{index}" for index in range(joints)),
        edges=tuple((index, (index - 1) // 2) for index in range(1, joints)),
        root=0,
    )
