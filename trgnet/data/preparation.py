"""From raw joint coordinates to the features that a network sees.

    features = [displacement of the coordinates, coordinates relative to a joint, other channels]

per person, the persons one after another along the channel axis. The displacement of frame t is x_(t+1) - x_t
between the first and the last frame that is not all zero, and 0 on that last frame and outside. Source:
arXiv 2503.15126 and the public code of its authors.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
from einops import EinopsError, rearrange
from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import UserError

__all__ = ["Preparation"]

_BLOCK = 256
"""Frames that are searched at once."""

Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Preparation(BaseModel):
    """How raw arrays become features. Immutable plain data, so that a run can carry it.

    Args:
        axes: the axes of a raw array in the notation of einops: t frames, v joints, c channels, m persons,
            each once (m may be left out for one person), such as "t v c", "c t v m" or "t (m v c)".
        joints: V.
        channels: raw channels per joint and person.
        persons: in every frame.
        fps: raw frames per second.
        coordinates: the raw channels that are coordinates; None: all of them. The others come after the
            coordinates' features, as they are.
        image_size: width and height in pixels, for coordinates (x, y) that are pixels: x / width - 0.5,
            y / height - 0.5. None: the coordinates stay in their unit.
        displacement: whether the displacements of the coordinates are features.
        relative_to: joint to which the coordinates are relative; None: they stay as they are.
        stride: every which raw frame is kept, from the first; displacements are between raw frames.

    Raises:
        pydantic.ValidationError (a ValueError): axes that are none, or parts that do not fit together.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    axes: str = "t v c"
    joints: int = Field(ge=1)
    channels: int = Field(ge=1)
    persons: int = Field(1, ge=1)
    fps: Positive
    coordinates: tuple[Index, ...] | None = None
    image_size: tuple[Positive, Positive] | None = None
    displacement: bool = True
    relative_to: Index | None = 0
    stride: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Preparation:
        letters = sorted(self.axes.replace("(", " ").replace(")", " ").split())
        if letters not in (["c", "t", "v"], ["c", "m", "t", "v"]) or (
            self.persons > 1 and "m" not in letters
        ):
            raise ValueError(
                f"axes must name t, v, c and, for several persons, m, once each, such as 't v c' or "
                f"'t (m v c)'; got {self.axes!r}"
            )
        taken = self._coordinates
        if not taken or len(set(taken)) != len(taken) or max(taken) >= self.channels:
            raise ValueError(
                f"coordinates must be distinct channels 0..{self.channels - 1}, at least one; got {taken}"
            )
        if self.image_size is not None and len(taken) != 2:
            raise ValueError(f"image_size is for two coordinates, x and y; got {len(taken)}")
        if self.relative_to is not None and self.relative_to >= self.joints:
            raise ValueError(f"relative_to must be a joint 0..{self.joints - 1}, got {self.relative_to}")
        return self

    @property
    def _coordinates(self) -> tuple[int, ...]:
        return tuple(range(self.channels)) if self.coordinates is None else self.coordinates

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(channel for channel in range(self.channels) if channel not in self._coordinates)

    @property
    def feature_channels(self) -> int:
        """C, the number of feature channels."""
        return self.persons * (len(self._coordinates) * (1 + self.displacement) + len(self._others))

    @property
    def feature_fps(self) -> float:
        """Frames per second of the features."""
        return self.fps / self.stride

    def kept_frames(self, frames: int) -> int:
        """T, the number of feature frames, of as many raw frames."""
        return math.ceil(frames / self.stride)

    def raw(self, array: np.ndarray) -> np.ndarray:
        """The array in the order (persons, channels, V, frames), a view where that is possible.

        Raises:
            UserError: it holds no real numbers, has other axes, joints or channels, no frame, or values that
                are not finite (names the first frame).
        """
        if array.dtype.kind not in "fiu":
            raise UserError(f"expected real numbers, got an array of {array.dtype}")
        sizes = {"v": self.joints, "c": self.channels}
        target = "m c v t" if "m" in self.axes else "1 c v t"
        sizes |= {"m": self.persons} if "m" in self.axes else {}
        try:
            raw = rearrange(array, f"{self.axes} -> {target}", **sizes)
        except EinopsError as error:
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise UserError(
                f"expected an array with the axes '{self.axes}', where {known} and t is the number of "
                f"frames; got the shape {array.shape}"
            ) from error
        if raw.size == 0:
            raise UserError(f"expected at least one frame, got the shape {array.shape}")
        self._check_finite(raw)
        return raw

    def _check_finite(self, raw: np.ndarray) -> None:
        if raw.dtype.kind != "f":
            return
        bad = ~np.isfinite(raw)
        if bad.any():
            frame, person, channel, joint = (int(i) for i in np.argwhere(np.moveaxis(bad, -1, 0))[0])
            raise UserError(
                f"{int(bad.sum())} values are not finite, the first in frame {frame}: {raw[person, channel, joint, frame]} "
                f"in channel {channel} of joint {joint}{f' of person {person}' if self.persons > 1 else ''}; "
                "repair or cut the recording"
            )

    def features(self, array: np.ndarray) -> np.ndarray:
        """Prepare a raw array.

        Args:
            array: real numbers with the axes `axes`; not modified.

        Returns:
            float32 (C, V, T), C-contiguous. Differences are taken in the precision of the array.

        Raises:
            UserError: as for :meth:`raw`, or a value too large for float32.
        """
        raw = self.raw(array)
        if raw.dtype.kind != "f" or raw.dtype.itemsize < 4:  # differences of unsigned integers wrap around
            raw = raw.astype(np.float32)
        kept = self.kept_frames(raw.shape[-1])
        out = np.zeros((self.persons, self.feature_channels // self.persons, self.joints, kept), np.float32)
        rows = iter(np.moveaxis(out, 1, 0))
        start, end = _valid_range(raw[:, list(self._coordinates)] if self._others else raw)
        with np.errstate(over="ignore"):  # reported below
            coordinates = [self._scaled(raw, channel) for channel in self._coordinates]
            if self.displacement:
                for values, row in zip(coordinates, rows):
                    self._displace(values, row, start, end)
            for values, row in zip(coordinates, rows):
                self._relate(values, row)
            for channel, row in zip(self._others, rows):
                row[...] = raw[:, channel, :, :: self.stride]
        features = out.reshape(self.feature_channels, self.joints, kept)
        if not np.isfinite(features).all():
            raise UserError(
                f"values up to {np.abs(raw).max():.3g} are too large for float32; use a larger unit"
            )
        return features

    def _scaled(self, raw: np.ndarray, channel: int) -> np.ndarray:
        """A coordinate (persons, V, frames), of a pixel as a share of the image from its middle."""
        values = raw[:, channel]
        if self.image_size is None:
            return values
        return values / self.image_size[self._coordinates.index(channel)] - 0.5

    def _displace(self, values: np.ndarray, out: np.ndarray, start: int, end: int) -> None:
        """Displacements at the kept frames within start..end-2, into zeros."""
        first = -(-start // self.stride) * self.stride
        last = max(end - 1, first)
        frames = slice(first, last, self.stride)
        following = slice(first + 1, last + 1, self.stride)
        kept = slice(first // self.stride, first // self.stride + len(range(first, last, self.stride)))
        np.subtract(values[..., following], values[..., frames], out=out[..., kept], casting="same_kind")

    def _relate(self, values: np.ndarray, out: np.ndarray) -> None:
        """Coordinates at the kept frames, relative to the reference joint where there is one."""
        kept = values[..., :: self.stride]
        if self.relative_to is None:
            out[...] = kept
        else:
            reference = kept[:, self.relative_to : self.relative_to + 1]
            np.subtract(kept, reference, out=out, casting="same_kind")


def _valid_range(raw: np.ndarray) -> tuple[int, int]:
    """First frame that is not all zero and the one after the last such; (0, 0) where all are."""
    first = _first_valid(raw)
    return (0, 0) if first is None else (first, raw.shape[-1] - _first_valid(raw[..., ::-1]))


def _first_valid(raw: np.ndarray) -> int | None:
    """Searched in blocks, as it is near the beginning mostly."""
    for start in range(0, raw.shape[-1], _BLOCK):
        valid = np.flatnonzero(raw[..., start : start + _BLOCK].any(axis=(0, 1, 2)))
        if valid.size:
            return start + int(valid[0])
    return None
