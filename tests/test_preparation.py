"""Raw arrays to features, and prepared features on disk."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from trgnet.data.arrays import load_array
from trgnet.data.cache import prepared_features
from trgnet.data.preparation import Preparation
from trgnet.errors import UserError

PKU = Preparation(axes="t (m v c)", joints=25, channels=3, persons=2, fps=30)
LARA = Preparation(axes="c t v m", joints=19, channels=6, fps=200, stride=4)
MCFS = Preparation(joints=25, channels=2, fps=30, image_size=(1280, 720), displacement=False, relative_to=8)
TCG = Preparation(joints=17, channels=3, fps=100, relative_to=2)
SMALL = Preparation(joints=3, channels=2, fps=10)


def raw(frames: int, preparation: Preparation, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    """Random values (persons, T, V, channels), whole numbers up to 250."""
    rng = np.random.default_rng(seed)
    shape = (preparation.persons, frames, preparation.joints, preparation.channels)
    return rng.integers(1, 250, shape).astype(dtype)


def stored(values: np.ndarray, axes: str) -> np.ndarray:
    """(persons, T, V, channels) in the order of a file."""
    m, t, v, c = values.shape
    return {
        "t (m v c)": lambda: values.transpose(1, 0, 2, 3).reshape(t, m * v * c),
        "c t v m": lambda: values.transpose(3, 1, 2, 0),
        "t v c": lambda: values[0],
        "v c t": lambda: values[0].transpose(1, 2, 0),
        "m t c v": lambda: values.transpose(0, 1, 3, 2),
    }[axes]()


def expected(values: np.ndarray, preparation: Preparation) -> np.ndarray:
    """The formula, frame by frame in float64: features (C, V, T) of (persons, T, V, channels)."""
    values = values.astype(np.float64)
    frames, joints = values.shape[1:3]
    taken = preparation.coordinates or range(preparation.channels)
    shown = [t for t in range(frames) if any(values[:, t, :, c].any() for c in taken)]
    rows = []
    for person in values:
        scaled = {c: person[..., c] for c in taken}
        if preparation.image_size:
            scaled = {c: scaled[c] / size - 0.5 for c, size in zip(taken, preparation.image_size)}
        if preparation.displacement:
            for c in taken:
                row = np.zeros((joints, frames))
                for t in range(frames - 1):
                    if shown and shown[0] <= t < shown[-1]:
                        row[:, t] = scaled[c][t + 1] - scaled[c][t]
                rows.append(row)
        for c in taken:
            joint = preparation.relative_to
            reference = 0 if joint is None else scaled[c][:, joint : joint + 1]
            rows.append((scaled[c] - reference).T)
        rows += [person[..., c].T for c in range(preparation.channels) if c not in taken]
    return np.stack(rows)[..., :: preparation.stride]


VARIANTS = [
    PKU,
    LARA,
    MCFS,
    TCG,
    SMALL,
    Preparation(axes="v c t", joints=4, channels=3, fps=10, relative_to=None, stride=3),
    Preparation(axes="m t c v", joints=4, channels=3, persons=3, fps=10, displacement=False),
    # x, y and the confidence of a detector in the middle, y first
    Preparation(joints=5, channels=4, fps=25, coordinates=(3, 1), image_size=(640, 480), stride=2),
]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8", "int64"])
@pytest.mark.parametrize("preparation", VARIANTS)
@pytest.mark.parametrize(
    ("frames", "zeros"), [(1, (0, 0)), (2, (0, 0)), (23, (0, 0)), (23, (5, 6)), (4, (2, 2))]
)
def test_features_are_those_of_the_formula(preparation, dtype, frames, zeros):
    values = raw(frames, preparation, dtype)
    lead, trail = zeros
    values[:, :lead] = 0
    values[:, frames - trail :] = 0
    array = stored(values, preparation.axes)
    before = array.copy()
    features = preparation.features(array)
    assert features.dtype == np.float32 and features.flags.c_contiguous
    assert features.shape == (
        preparation.feature_channels,
        preparation.joints,
        preparation.kept_frames(frames),
    )
    np.testing.assert_allclose(features, expected(values, preparation), rtol=1e-6, atol=3e-7)
    np.testing.assert_array_equal(array, before)
    assert preparation.features(array).tobytes() == features.tobytes()


def test_differences_are_taken_in_float64_where_the_array_is():
    values = np.array([1e9, 1e9 + 0.25]).reshape(1, 2, 1, 1) * np.ones((1, 1, 3, 2))
    assert (SMALL.features(values[0])[:2, :, 0] == 0.25).all()


def test_zero_frames_between_count_and_those_of_other_channels_do_not():
    """Only what lies outside of the first and last frame with coordinates is no motion."""
    preparation = Preparation(joints=1, channels=2, fps=10, coordinates=(0,))
    values = np.array([[0, 9], [2, 9], [0, 0], [5, 9], [0, 9]], dtype=np.float32)[:, None]
    displacement, _, other = preparation.features(values)[:, 0]
    np.testing.assert_array_equal(displacement, [0, -2, 5, 0, 0])
    np.testing.assert_array_equal(other, [9, 9, 0, 9, 9])


def test_one_empty_person_leaves_the_motion_of_the_other():
    values = raw(6, PKU)
    values[1] = 0
    features = PKU.features(stored(values, PKU.axes))
    np.testing.assert_array_equal(features[:3, :, :5], np.diff(values[0], axis=0).transpose(2, 1, 0))
    assert not features[6:].any()


def test_facts_of_the_features():
    assert [each.feature_channels for each in (PKU, LARA, MCFS, TCG)] == [12, 12, 2, 6]
    assert [each.feature_fps for each in (PKU, LARA, MCFS, TCG)] == [30, 50, 30, 100]
    assert [LARA.kept_frames(frames) for frames in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_memory_stays_below_twice_the_features(dtype):
    array = np.random.default_rng(0).normal(size=(6, 24000, 19, 1)).astype(dtype)
    LARA.features(array[:, :8])  # what is imported on first use is not counted
    tracemalloc.start()
    try:
        features = LARA.features(array)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert features.nbytes <= peak <= 2 * features.nbytes


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("preparation", [PKU, LARA, TCG])
def test_a_value_that_is_not_finite_is_located(preparation, value):
    values = raw(9, preparation)
    person = preparation.persons - 1
    values[person, 5, 7, 2] = values[0, 8, 1, 0] = value
    place = f"the first in frame 5: {value} in channel 2 of joint 7" + (" of person 1" if person else ";")
    with pytest.raises(UserError, match=f"^2 values are not finite, {place}"):
        preparation.features(stored(values, preparation.axes))


@pytest.mark.parametrize(
    ("preparation", "array", "message"),
    [
        (SMALL, np.zeros((4, 2, 2)), r"axes 't v c', where v = 3, c = 2 and t .*; got the shape \(4, 2, 2\)"),
        (SMALL, np.zeros((4, 3)), r"got the shape \(4, 3\)"),
        (SMALL, np.zeros((4, 3, 2, 1)), r"got the shape \(4, 3, 2, 1\)"),
        (PKU, np.zeros((4, 149)), r"v = 25, c = 3, m = 2 and t .*; got the shape \(4, 149\)"),
        (LARA, np.zeros((6, 4, 19, 2)), r"v = 19, c = 6, m = 1 and t .*; got the shape \(6, 4, 19, 2\)"),
        (SMALL, np.zeros((0, 3, 2)), r"expected at least one frame, got the shape \(0, 3, 2\)"),
        (SMALL, np.zeros((4, 3, 2), complex), "expected real numbers, got an array of complex128"),
        (SMALL, np.zeros((4, 3, 2), bool), "expected real numbers, got an array of bool"),
        (SMALL, np.full((4, 3, 2), "1"), "expected real numbers, got an array of <U1"),
        (SMALL, np.array([[[1e300] * 2] * 3] * 2), r"values up to 1e\+300 are too large for float32"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(preparation, array, message):
    preparation = preparation.model_copy(update={"relative_to": None})
    with pytest.raises(UserError, match=message):
        preparation.features(array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axes": "t v"}, "axes must name t, v, c and, .* got 't v'"),
        ({"axes": "t v c c"}, "axes must name"),
        ({"axes": "t v c n"}, "axes must name"),
        ({"persons": 2}, "for several persons, m, once each"),
        ({"coordinates": ()}, r"coordinates must be distinct channels 0..1, at least one; got \(\)"),
        ({"coordinates": (0, 0)}, "coordinates must be distinct"),
        ({"coordinates": (0, 2)}, r"channels 0..1, .* got \(0, 2\)"),
        ({"coordinates": (0,), "image_size": (4, 3)}, "image_size is for two coordinates, x and y; got 1"),
        ({"image_size": (0, 3)}, "greater than 0"),
        ({"relative_to": 3}, "relative_to must be a joint 0..2, got 3"),
        ({"relative_to": -1}, "greater than or equal to 0"),
        ({"joints": 0}, "greater than or equal to 1"),
        ({"stride": 0}, "greater than or equal to 1"),
        ({"fps": float("inf")}, "finite number"),
        ({"centre": 1}, "Extra inputs are not permitted"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(change, message):
    with pytest.raises(ValidationError, match=message):
        Preparation(**(SMALL.model_dump() | change))


def test_a_preparation_is_plain_data():
    for preparation in VARIANTS:
        assert Preparation.model_validate_json(preparation.model_dump_json()) == preparation
    with pytest.raises(ValidationError, match="frozen"):
        SMALL.stride = 2


# ---------------------------------------------------------------- on disk


def read(content: bytes) -> np.ndarray:
    return load_array("a.npy", content=content)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "a file.npy", raw(7, SMALL)[0])
    return tmp_path / "a file.npy"


def test_the_cache_changes_no_bit(source, tmp_path):
    cache = tmp_path / "new" / "cache"
    plain = prepared_features(source, read, SMALL)
    first = prepared_features(source, read, SMALL, cache)
    (entry,) = cache.iterdir()
    written = entry.stat().st_mtime_ns

    def must_not_be_called(content: bytes) -> np.ndarray:
        raise AssertionError("prepared again")

    again = prepared_features(source, must_not_be_called, SMALL, cache)
    assert plain.tobytes() == first.tobytes() == again.tobytes()
    for features in (plain, first, again):
        assert features.dtype == np.float32 and features.shape == (4, 3, 7) and features.flags.c_contiguous
    assert [*cache.iterdir()] == [entry] and entry.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="read-only"):
        again[0] = 0


def test_other_content_or_another_preparation_is_another_entry(source, tmp_path):
    cache = tmp_path / "cache"
    other = SMALL.model_copy(update={"relative_to": None})
    prepared_features(source, read, SMALL, cache)
    assert (
        prepared_features(source, read, other, cache).tobytes() == other.features(raw(7, SMALL)[0]).tobytes()
    )
    assert len([*cache.iterdir()]) == 2
    np.save(source, raw(7, SMALL, seed=1)[0])
    changed = prepared_features(source, read, SMALL, cache)
    assert changed.tobytes() == SMALL.features(raw(7, SMALL, seed=1)[0]).tobytes()
    assert len([*cache.iterdir()]) == 3


@pytest.mark.parametrize("damage", ["empty", "header", "data", "text", "dtype"])
def test_a_damaged_entry_is_made_again(source, tmp_path, damage):
    cache = tmp_path / "cache"
    good = prepared_features(source, read, SMALL, cache).tobytes()
    (entry,) = cache.iterdir()
    content = entry.read_bytes()
    entry.unlink()  # mapped memory is not cut under those who look at it
    if damage == "dtype":
        np.save(entry, np.zeros((4, 3, 7)))
    else:
        entry.write_bytes(
            {"empty": b"", "header": content[:40], "data": content[:-4], "text": b"x" * 999}[damage]
        )
    assert prepared_features(source, read, SMALL, cache).tobytes() == good
    assert entry.read_bytes() == content and [*cache.iterdir()] == [entry]


def test_faults_name_the_file(source, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="data.cache=.*taken, which must be a folder that can be written to"):
        prepared_features(source, read, SMALL, tmp_path / "taken")
    with pytest.raises(UserError, match=r"^file .*missing\.npy: .*No such file"):
        prepared_features(tmp_path / "missing.npy", read, SMALL)
    with pytest.raises(UserError, match=r"^file .*a file\.npy: expected an array with the axes"):
        prepared_features(source, read, TCG, tmp_path / "cache")
    values = raw(7, SMALL)[0]
    values[3, 2, 1] = np.nan
    np.save(source, values)
    with pytest.raises(
        UserError, match=r"^file .*a file\.npy: 1 values are not finite, the first in frame 3"
    ):
        prepared_features(source, read, SMALL, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are counted in /proc")
def test_mapped_features_keep_no_file_open(tmp_path):
    files = [tmp_path / f"{index}.npy" for index in range(50)]
    for index, file in enumerate(files):
        np.save(file, raw(5, SMALL, seed=index)[0])
    before = len(os.listdir("/proc/self/fd"))
    held = [prepared_features(file, read, SMALL, tmp_path / "cache") for file in files for _ in range(2)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert held[-1].tobytes() == SMALL.features(raw(5, SMALL, seed=49)[0]).tobytes()
