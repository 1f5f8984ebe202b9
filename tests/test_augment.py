"""SAEP augmentation: rates, invariants, and that it never touches its input."""

from __future__ import annotations

import numpy as np
import pytest

from trgnet.data import Recording, augment


def recording(channels: int = 6, joints: int = 7, frames: int = 5) -> Recording:
    rng = np.random.default_rng(0)
    # Bounded away from zero, so that a zero means an occluded joint.
    features = rng.uniform(0.5, 1, (channels, joints, frames)).astype(np.float32)
    return Recording("r", features, np.arange(frames) // 3)


def occluded_joints(before: Recording, after: Recording) -> set[int]:
    gone = {joint for joint in range(before.features.shape[1]) if not after.features[:, joint].any()}
    for joint in set(range(before.features.shape[1])) - gone:
        np.testing.assert_array_equal(after.features[:, joint], before.features[:, joint])
    return gone


def test_occlusion_zeroes_one_to_half_of_the_joints() -> None:
    original, rng = recording(), np.random.default_rng(1)
    draws = [
        occluded_joints(original, augment(original, rng, occlusion=1, rotation=0, axis=None))
        for _ in range(300)
    ]
    counts = np.bincount([len(gone) for gone in draws], minlength=8)
    assert counts[0] == 0 and counts[4:].sum() == 0
    assert (counts[1:4] > 70).all()  # uniform: 100 each, standard deviation 8
    assert set.union(*draws) == set(range(7))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rotation_keeps_the_axis_and_all_norms(axis: int) -> None:
    original = recording(channels=12)
    rotated = augment(original, np.random.default_rng(2), occlusion=0, rotation=1, axis=axis)
    before, after = (r.features.reshape(4, 3, 7, 5).astype(np.float64) for r in (original, rotated))
    assert rotated.features.dtype == np.float32
    np.testing.assert_array_equal(after[:, axis], before[:, axis])
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1), rtol=1e-6)
    assert np.abs(after - before).max() > 0.1


def test_rotation_turns_every_triple_by_the_same_angle_right_handed() -> None:
    class Quarter(np.random.Generator):
        def uniform(self, low: float, high: float) -> float:
            assert (low, high) == (-np.pi, np.pi)
            return np.pi / 2

    unit_x = np.zeros((6, 1, 1), np.float32)
    unit_x[0], unit_x[3] = 1, 2
    for axis, expected in ((0, [1, 0, 0]), (1, [0, 0, -1]), (2, [0, 1, 0])):
        turned = augment(
            Recording("x", unit_x), Quarter(np.random.PCG64(0)), occlusion=0, rotation=1, axis=axis
        ).features.reshape(2, 3)
        np.testing.assert_allclose(turned, [expected, 2 * np.array(expected)], atol=1e-6)


def test_rotation_covers_the_circle() -> None:
    original, rng = Recording("x", np.array([1, 0, 0], np.float32).reshape(3, 1, 1)), np.random.default_rng(3)
    turned = [augment(original, rng, occlusion=0, rotation=1, axis=2).features[:2, 0, 0] for _ in range(400)]
    angles = np.array([np.arctan2(y, x) for x, y in turned])
    quarters = np.histogram(angles, bins=4, range=(-np.pi, np.pi))[0]
    assert (quarters > 60).all()  # uniform: 100 each, standard deviation 9


def test_published_rates_exclude_each_other() -> None:
    original, rng = recording(), np.random.default_rng(4)
    kinds = {"same": 0, "occluded": 0, "rotated": 0}
    for _ in range(1000):
        result = augment(original, rng, axis=1)
        if result is original:
            kinds["same"] += 1
        elif (result.features == 0).any():
            occluded_joints(original, result)  # asserts that the other joints are not rotated
            kinds["occluded"] += 1
        else:
            kinds["rotated"] += 1
    # Standard deviation 15.
    assert abs(kinds["occluded"] - 350) < 60 and abs(kinds["rotated"] - 350) < 60, kinds


def test_nothing_to_do_returns_the_recording_itself() -> None:
    original = recording()
    rng = np.random.default_rng(5)
    assert augment(original, rng, occlusion=0, rotation=0, axis=1) is original
    assert augment(original, rng, occlusion=0, rotation=1, axis=None) is original
    single = recording(joints=1)
    assert augment(single, rng, occlusion=1, rotation=0, axis=None) is single


def test_the_input_is_never_modified_and_seeds_decide() -> None:
    original = recording()
    features, labels = original.features.copy(), original.labels.copy()
    runs = []
    for _ in range(2):
        rng = np.random.default_rng(6)
        runs.append([augment(original, rng, occlusion=0.5, rotation=0.5, axis=1) for _ in range(30)])
    np.testing.assert_array_equal(original.features, features)
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first.features, second.features)
        np.testing.assert_array_equal(first.labels, labels)
        assert first.name == original.name and first.features.flags.c_contiguous


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axis": 3}, r"axis must be 0 \(x\), 1 \(y\), 2 \(z\) or None, got 3"),
        ({"axis": 1, "occlusion": 0.6, "rotation": 0.5}, "sum of at most 1, got 0.6 and 0.5"),
        ({"axis": 1, "occlusion": -0.1}, "sum of at most 1, got -0.1 and 0.35"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        augment(recording(), np.random.default_rng(0), **arguments)


def test_rotation_needs_triples_of_channels() -> None:
    with pytest.raises(ValueError, match="xyz triples of channels, got 4 channels; pass axis=None"):
        augment(recording(channels=4), np.random.default_rng(0), axis=2)
