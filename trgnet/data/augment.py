"""Skeleton augmentation for training, SAEP (arXiv 2503.15126)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .recording import Recording


def augment(
    recording: Recording,
    rng: np.random.Generator,
    *,
    occlusion: float = 0.35,
    rotation: float = 0.35,
    axis: int | None,
) -> Recording:
    """Occlude joints, or turn the body about its vertical axis, or neither; one draw r ~ U(0, 1) decides.

    - r < `occlusion`: m ~ U{1..floor(V / 2)} distinct joints are zeroed in all channels and frames.
      A skeleton of one joint is left as it is.
    - r > 1 - `rotation`: every xyz triple of channels is turned by one angle ~ U(-pi, pi) about `axis`.
      Nothing happens when `axis` is None.

    Args:
        recording: not modified; returned itself where nothing is done. The result shares its labels.
        rng: source of the draws.
        occlusion, rotation: probabilities, published values 0.35; their sum is at most 1.
        axis: 0 x, 1 y, 2 z, or None when the channels are no xyz triples (`Dataset.rotation_axis`).

    Raises:
        ValueError: probabilities or axis out of range, or an axis for channels that are no triples.
    """
    if not (occlusion >= 0 and rotation >= 0 and occlusion + rotation <= 1):
        raise ValueError(
            "occlusion and rotation must be probabilities with a sum of at most 1, "
            f"got {occlusion} and {rotation}"
        )
    channels, joints, _ = recording.features.shape
    if axis is not None:
        _check_axis(axis, channels)
    draw = rng.random()
    if draw < occlusion and joints > 1:
        return replace(recording, features=_occlude(recording.features, rng))
    if draw > 1 - rotation and axis is not None:
        return replace(recording, features=_rotate(recording.features, rng.uniform(-np.pi, np.pi), axis))
    return recording


def _check_axis(axis: int, channels: int) -> None:
    if axis not in (0, 1, 2):
        raise ValueError(f"axis must be 0 (x), 1 (y), 2 (z) or None, got {axis!r}")
    if channels % 3:
        raise ValueError(f"rotation needs xyz triples of channels, got {channels} channels; pass axis=None")


def _occlude(features: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    joints = features.shape[1]
    count = rng.integers(1, joints // 2, endpoint=True)
    occluded = features.copy()
    occluded[:, rng.choice(joints, size=count, replace=False)] = 0
    return occluded


def _rotate(features: np.ndarray, angle: float, axis: int) -> np.ndarray:
    """Turn the xyz triples of (C, V, T) by `angle` radians about `axis`, right-handed."""
    triples = features.reshape(-1, 3, *features.shape[1:])
    rotated = triples.copy()
    first, second = (axis + 1) % 3, (axis + 2) % 3
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    rotated[:, first] = cosine * triples[:, first] - sine * triples[:, second]
    rotated[:, second] = sine * triples[:, first] + cosine * triples[:, second]
    return rotated.reshape(features.shape)
