"""Batches of padded recordings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from .labels import IGNORE, segments_of
from .recording import Recording

__all__ = ["Batch", "Segments", "bucket", "collate", "segments_of"]

FEWEST_SEGMENTS = 256
"""Least number of segments in batches of few sizes: those that are empty cost next to nothing."""

Container = TypeVar("Container", "Segments", "Batch")


@dataclass(eq=False)
class Segments:
    """The segments of a batch: maximal runs of one label inside the real frames, `IGNORE` runs left out.

    They are known on the CPU when the batch is made, so that a training step needs no copy back from the
    device.

    Args:
        batch, start, length, label: int64 (S,): index of the sequence, first frame, number of frames, class.
            In the order of the sequences and of time. Behind them there may be padding: segments of length 0
            and label `IGNORE` at the end of the last sequence.
    """

    batch: Tensor
    start: Tensor
    length: Tensor
    label: Tensor

    def __len__(self) -> int:
        return len(self.batch)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        """The same segments on `device`."""
        return _moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        """The same segments in page-locked memory."""
        return _moved(self, Tensor.pin_memory)

    def copy_(self, source: Segments) -> None:
        """Take the values of `source`, of the same size, without waiting for the device."""
        _copy(self, source)


@dataclass(eq=False)
class Batch:
    """N sequences, padded to T frames. Padding never changes a result.

    Args:
        x: float32 (N, C, V, T), 0 on padding.
        mask: bool (N, 1, T), True on real frames.
        labels: int64 (N, T), `IGNORE` on padding and on frames without a class.
        boundaries: float32 (N, T), 1 at each segment's first frame, 0 on padding.
        segments: see `Segments`.
        names: N recording names.
        lengths: N numbers of real frames.
    """

    x: Tensor
    mask: Tensor
    labels: Tensor
    boundaries: Tensor
    segments: Segments
    names: tuple[str, ...]
    lengths: tuple[int, ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        moved = _moved(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, segments=self.segments.to(device, non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU can overlap with its work."""
        return replace(_moved(self, Tensor.pin_memory), segments=self.segments.pin_memory())

    def copy_(self, source: Batch) -> None:
        """Take the values, not names and lengths, of `source`, of the same size, without waiting for the device."""
        _copy(self, source)
        self.segments.copy_(source.segments)


def bucket(size: int, multiple: int) -> int:
    """`size` rounded up to one of few sizes, multiples of `multiple`: eight from each power of two to the next.

    Beyond the rounding to `multiple` that adds at most an eighth.

    >>> [bucket(frames, 16) for frames in (100, 260, 6000)]
    [112, 288, 6144]
    """
    count = max(1, -(-size // multiple))
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step * multiple


def padded_segments(count: int) -> int:
    """`count` segments rounded up to one of few numbers, the powers of two from `FEWEST_SEGMENTS`."""
    return max(FEWEST_SEGMENTS, 1 << (count - 1).bit_length())


def _copy(container: Container, source: Container) -> None:
    for field in fields(container):
        value = getattr(container, field.name)
        if isinstance(value, Tensor):
            value.copy_(getattr(source, field.name), non_blocking=True)


def _moved(container: Container, move: Callable[[Tensor], Tensor]) -> Container:
    """The container with its own tensors moved, everything else as it was."""
    values = {field.name: getattr(container, field.name) for field in fields(container)}
    moved = {name: move(value) for name, value in values.items() if isinstance(value, Tensor)}
    return replace(container, **moved)


def collate(
    recordings: Sequence[Recording],
    pad_multiple: int = 16,
    pad_to: int | None = None,
    *,
    buckets: bool = False,
) -> Batch:
    """Put recordings into one batch.

    Args:
        recordings: N >= 1 recordings with the same C and V. One without labels counts as unannotated:
            `IGNORE` everywhere, no boundaries, no segments.
        pad_multiple: T is the longest recording's length rounded up to a multiple of this.
        pad_to: T itself, instead of `pad_multiple`.
        buckets: whether batches come in few sizes: T is rounded up further, see :func:`bucket`, and S to a power of two.

    Raises:
        ValueError: no recordings, different (C, V), or a `pad_to` shorter than the longest recording.
    """
    channels, joints = _common_shape(recordings)
    frames = _padded_length(recordings, pad_multiple, pad_to, buckets)
    count = len(recordings)
    x = np.zeros((count, channels, joints, frames), dtype=np.float32)
    mask = np.zeros((count, 1, frames), dtype=bool)
    labels = np.full((count, frames), IGNORE, dtype=np.int64)
    boundaries = np.zeros((count, frames), dtype=np.float32)
    segments: list[tuple[int, int, int, int]] = []
    for index, recording in enumerate(recordings):
        real = slice(0, recording.length)
        x[index, :, :, real] = recording.features
        mask[index, :, real] = True
        if recording.labels is not None:
            labels[index, real] = recording.labels
            boundaries[index, real] = recording.boundaries()
            segments += [(index, *segment) for segment in segments_of(recording.labels)]
    if buckets:
        missing = padded_segments(len(segments)) - len(segments)
        segments += [(count - 1, frames, 0, IGNORE)] * missing
    # A copy in any case: one row's transpose counts as contiguous, and its columns would be 4 apart.
    columns = (
        torch.tensor(segments, dtype=torch.int64)
        .reshape(-1, 4)
        .T.clone(memory_format=torch.contiguous_format)
    )
    return Batch(
        x=torch.from_numpy(x),
        mask=torch.from_numpy(mask),
        labels=torch.from_numpy(labels),
        boundaries=torch.from_numpy(boundaries),
        segments=Segments(*columns),
        names=tuple(recording.name for recording in recordings),
        lengths=tuple(recording.length for recording in recordings),
    )


def _common_shape(recordings: Sequence[Recording]) -> tuple[int, int]:
    if not recordings:
        raise ValueError("no recordings to put into a batch; give at least one")
    channels, joints, _ = recordings[0].features.shape
    for recording in recordings:
        if recording.features.shape[:2] != (channels, joints):
            raise ValueError(
                f"recording {recording.name!r} has (C, V) = {recording.features.shape[:2]}, but "
                f"{recordings[0].name!r} has {(channels, joints)}; a batch needs the same channels and joints"
            )
    return channels, joints


def _padded_length(
    recordings: Sequence[Recording], pad_multiple: int, pad_to: int | None, buckets: bool
) -> int:
    if pad_multiple < 1:
        raise ValueError(f"pad_multiple must be at least 1, got {pad_multiple}")
    longest = max(recordings, key=lambda recording: recording.length)
    if pad_to is None and buckets:
        return bucket(longest.length, pad_multiple)
    if pad_to is None:
        return -(-longest.length // pad_multiple) * pad_multiple
    if pad_to < longest.length:
        raise ValueError(
            f"pad_to = {pad_to} is shorter than recording {longest.name!r} of {longest.length} frames; "
            "raise it or cut the recording"
        )
    return pad_to
