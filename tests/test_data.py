"""Recordings, splits, batches, and the built-in data sets."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch

from trgnet.data import (
    IGNORE,
    Dataset,
    Recording,
    boundaries_of,
    collate,
    convert_mocap6,
    load_dataset,
    load_mocap6,
    segments_of,
    synthetic_dataset,
)


def recording(name: str = "s0_r0", frames: int = 9, channels: int = 2, joints: int = 3) -> Recording:
    rng = np.random.default_rng(frames)
    features = rng.uniform(0.5, 1, (channels, joints, frames)).astype(np.float32)
    return Recording(name, features, rng.integers(0, 4, frames))


def subject_of(name: str) -> str | None:
    return name.partition("_")[0] if "_" in name else None


# ---------------------------------------------------------------- labels


def test_segments_are_maximal_runs_without_ignored_ones() -> None:
    labels = np.array([IGNORE, 2, 2, IGNORE, IGNORE, 2, 0, 0, 0, 1])
    assert segments_of(labels) == [(1, 2, 2), (5, 1, 2), (6, 3, 0), (9, 1, 1)]
    np.testing.assert_array_equal(boundaries_of(labels), [0, 1, 0, 0, 0, 1, 1, 0, 0, 1])
    assert boundaries_of(labels).dtype == np.float32


def test_segments_of_the_smallest_label_sequences() -> None:
    assert segments_of(np.array([], dtype=np.int64)) == []
    assert segments_of(np.array([3])) == [(0, 1, 3)]
    assert segments_of(np.full(4, IGNORE)) == [] and not boundaries_of(np.full(4, IGNORE)).any()
    # uint8 differences wrap around, and must still count as differences
    assert segments_of(np.array([0, 1, 0], dtype=np.uint8)) == [(0, 1, 0), (1, 1, 1), (2, 1, 0)]


@pytest.mark.parametrize("bad", [np.zeros((2, 3), int), np.zeros(4)])
def test_segments_need_a_vector_of_integers(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"labels must be integers \(T,\), got"):
        segments_of(bad)


# ---------------------------------------------------------------- recordings


def test_recording_knows_length_and_boundaries() -> None:
    known = Recording("13_30_b", np.ones((2, 3, 4), np.float32), np.array([1, 1, IGNORE, 0]))
    assert known.length == 4 and known.subject is None
    np.testing.assert_array_equal(known.boundaries(), [1, 0, 0, 1])
    with pytest.raises(ValueError, match="'bare' has no labels"):
        Recording("bare", known.features).boundaries()


FEATURES = np.ones((2, 3, 4), np.float32)
LABELS = np.zeros(4, np.int64)


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (FEATURES[0], LABELS, r"features must be \(C, V, T\), not empty, got \(3, 4\)"),
        (FEATURES[:, :, :0], LABELS[:0], r"not empty, got \(2, 3, 0\)"),
        (FEATURES.astype(np.float64), LABELS, "got C-contiguous float64; use np.ascontiguousarray"),
        (FEATURES.transpose(2, 1, 0), LABELS[:2], "got not C-contiguous float32; use np.ascontiguousarray"),
        (
            FEATURES,
            LABELS[:3],
            r"labels must be int64 \(4,\), one per frame of the features, got int64 \(3,\)",
        ),
        (FEATURES, LABELS.astype(np.int32), r"got int32 \(4,\)"),
        (FEATURES, LABELS - 1, "labels must be 0..254, or 255 for frames without a class; got -1..-1"),
        (FEATURES, LABELS + 256, "got 256..256"),
    ],
)
def test_bad_recordings_are_refused(features: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"recording 'x': .*{message}"):
        Recording("x", features, labels)


def test_a_value_that_is_not_finite_is_located() -> None:
    features = FEATURES.copy()
    features[1, 2, 3] = np.inf
    with pytest.raises(
        ValueError, match="1 features are not finite, the first at channel 1, joint 2, frame 3"
    ):
        Recording("x", features)


# ---------------------------------------------------------------- data sets and splits


@pytest.fixture(scope="module")
def made() -> Dataset:
    return synthetic_dataset(recordings=10, frames=40, joints=3, channels=3, classes=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recordings": ()}, "no recordings"),
        ({"classes": ("a", "b", "a", "c")}, "distinct class names"),
        (
            {"classes": ("a", "b", "c")},
            "embeddings of 3 joints and 4 actions do not fit 3 joints and 3 classes",
        ),
        ({"background": 4}, "background 4 is not a class 0..3"),
        ({"rotation_axis": 3}, "rotation_axis must be 0, 1, 2 or None, got 3"),
        ({"fps": 0.0}, "fps must be positive, got 0.0"),
        ({"test": ("s0_r0", "s9_r9")}, "no recording s9_r9; it has s0_r0, s0_r1, "),
        ({"recordings": (recording("a", channels=3), recording("a", channels=3))}, "names must be distinct"),
        (
            {"recordings": (recording("a", channels=3), recording("b"))},
            r"'b' has \(C, V\) = \(2, 3\), expected",
        ),
        ({"recordings": (recording("a"),), "rotation_axis": 1, "test": ()}, "2 channels are no xyz triples"),
        ({"recordings": (Recording("a", FEATURES),)}, "'a' has no labels"),
        ({"recordings": (Recording("a", FEATURES, LABELS + 4),)}, "'a' has label 4, but there are 4 classes"),
    ],
)
def test_parts_that_do_not_fit_are_refused(made: Dataset, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(made, **change)


def test_ignored_frames_are_no_class(made: Dataset) -> None:
    kept = replace(made, recordings=(Recording("a", FEATURES, LABELS + IGNORE),), test=())
    assert kept.channels == 2


def names(recordings: tuple[Recording, ...]) -> list[str]:
    return [recording.name for recording in recordings]


def test_split_uses_the_default_or_the_given_test_recordings(made: Dataset) -> None:
    split = made.split()
    assert names(split.test) == ["s4_r0", "s4_r1"] == list(made.test)
    assert len(split.train) == 8 and split.validation == ()
    assert names(made.split(test=["s3_r1", "s0_r0"]).test) == ["s0_r0", "s3_r1"]
    assert made.split(test=[]).test == () and len(made.split(test=[]).train) == 10


def test_validation_takes_whole_subjects_from_the_training_recordings(made: Dataset) -> None:
    drawn = set()
    for seed in range(20):
        split = made.split(validation=0.25, seed=seed)
        assert split.test == made.split().test
        assert sorted(names(split.train) + names(split.validation) + names(split.test)) == names(
            made.recordings
        )
        subjects = {recording.subject for recording in split.validation}
        assert len(split.validation) == 2 and len(subjects) == 1
        assert subjects.isdisjoint(recording.subject for recording in split.train)
        drawn |= subjects
    assert drawn == {"s0", "s1", "s2", "s3"}
    assert names(made.split(validation=0.5, seed=3).validation) == names(
        made.split(validation=0.5, seed=3).validation
    )


def named(made: Dataset, *given: str) -> Dataset:
    kept = tuple(replace(made.recordings[0], name=name, subject=subject_of(name)) for name in given)
    return replace(made, recordings=kept, test=())


def test_validation_prefers_subjects_that_fit_and_then_the_smallest(made: Dataset) -> None:
    for seed in range(10):
        fitting = named(made, "a_0", "a_1", "a_2", "a_3", "b_0").split(validation=0.2, seed=seed)
        assert names(fitting.validation) == ["b_0"]
        large = named(made, "a_0", "a_1", "a_2", "b_0", "b_1").split(validation=0.1, seed=seed)
        assert names(large.validation) == ["b_0", "b_1"]


def test_validation_of_one_subject_takes_single_recordings(made: Dataset) -> None:
    one = named(made, "a_0", "a_1", "a_2", "a_3")
    drawn = {name for seed in range(20) for name in names(one.split(validation=0.25, seed=seed).validation)}
    assert drawn == {"a_0", "a_1", "a_2", "a_3"}
    assert len(one.split(validation=0.25).validation) == 1
    assert len(one.split(validation=0.99).train) == 1  # something is always left to train on


def test_recordings_without_a_subject_stand_for_themselves(made: Dataset) -> None:
    split = named(made, "x", "y", "z", "a_0").split(validation=0.5)
    assert len(split.validation) == 2 and len(split.train) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": ["s0_r0", "nobody"]}, "synthetic has no recording nobody; it has s0_r0, s0_r1, .*s4_r1"),
        ({"test": "s0_r0"}, r"sequence of names, got the text 's0_r0'; pass \['s0_r0'\]"),
        ({"validation": 1.0}, r"a share in \[0, 1\), got 1.0"),
        ({"validation": float("nan")}, r"a share in \[0, 1\), got nan"),
    ],
)
def test_bad_splits_are_refused(made: Dataset, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made.split(**arguments)


def test_a_split_without_training_recordings_is_refused(made: Dataset) -> None:
    everyone = names(made.recordings)
    with pytest.raises(
        ValueError, match="10 of 10 recordings are tested, but training needs at least 1 more"
    ):
        made.split(test=everyone)
    assert len(made.split(test=everyone[1:]).train) == 1
    with pytest.raises(ValueError, match="training with validation needs at least 2 more; test fewer"):
        made.split(test=everyone[1:], validation=0.1)


# ---------------------------------------------------------------- batches


def test_collate_places_every_real_frame_and_pads_the_rest() -> None:
    first, second = recording("a", 9), recording("b", 5)
    batch = collate([first, second], pad_multiple=8)
    assert batch.x.shape == (2, 2, 3, 16) and batch.x.dtype == torch.float32
    assert batch.mask.shape == (2, 1, 16) and batch.mask.dtype == torch.bool
    assert batch.labels.shape == batch.boundaries.shape == (2, 16)
    assert batch.labels.dtype == torch.int64 and batch.boundaries.dtype == torch.float32
    assert batch.names == ("a", "b") and batch.lengths == (9, 5)
    for index, source in enumerate((first, second)):
        real = slice(0, source.length)
        np.testing.assert_array_equal(batch.x[index, ..., real], source.features)
        np.testing.assert_array_equal(batch.labels[index, real], source.labels)
        np.testing.assert_array_equal(batch.boundaries[index, real], source.boundaries())
        assert batch.mask[index, :, real].all()
        padding = slice(source.length, None)
        assert not batch.x[index, ..., padding].any() and not batch.mask[index, :, padding].any()
        assert (batch.labels[index, padding] == IGNORE).all() and not batch.boundaries[index, padding].any()


def test_padding_changes_no_real_content() -> None:
    sources = [recording("a", 9), recording("b", 13), recording("c", 1)]
    tight = collate(sources, pad_multiple=1)
    assert tight.x.shape[-1] == 13
    for wide in (collate(sources), collate(sources, pad_multiple=7), collate(sources, pad_to=50)):
        assert wide.x.shape[-1] in (16, 14, 50)
        for name in ("x", "mask", "labels", "boundaries"):
            torch.testing.assert_close(getattr(wide, name)[..., :13], getattr(tight, name), rtol=0, atol=0)
        for name in ("batch", "start", "length", "label"):
            assert torch.equal(getattr(wide.segments, name), getattr(tight.segments, name))


def test_collate_pads_to_the_next_multiple_only() -> None:
    assert collate([recording(frames=16)]).x.shape[-1] == 16
    assert collate([recording(frames=17)]).x.shape[-1] == 32


def test_segments_of_a_batch_are_those_of_its_recordings() -> None:
    first = Recording("a", np.ones((1, 1, 5), np.float32), np.array([1, 1, 0, 0, 0]))
    second = Recording("b", np.ones((1, 1, 3), np.float32), np.array([IGNORE, 2, 2]))
    segments = collate([first, second]).segments
    assert len(segments) == 3
    rows = torch.stack([segments.batch, segments.start, segments.length, segments.label], dim=1)
    assert rows.tolist() == [[0, 0, 2, 1], [0, 2, 3, 0], [1, 1, 2, 2]]
    assert all(getattr(segments, name).dtype == torch.int64 for name in ("batch", "start", "length", "label"))
    assert segments.batch.is_contiguous() and segments.batch.stride() == (1,)
    alone = Recording("c", np.ones((1, 1, 2), np.float32), np.array([1, 1]))
    assert collate([alone]).segments.batch.stride() == (1,)


def test_a_batch_without_labels_has_no_segments() -> None:
    batch = collate([Recording("a", FEATURES)])
    assert (batch.labels == IGNORE).all() and not batch.boundaries.any() and batch.mask.sum() == 4
    assert len(batch.segments) == 0 and batch.segments.label.dtype == torch.int64


def test_a_batch_moves_with_all_its_tensors() -> None:
    batch = collate([recording()])
    moved = batch.to("meta")
    tensors = [moved.x, moved.mask, moved.labels, moved.boundaries]
    tensors += [moved.segments.batch, moved.segments.start, moved.segments.length, moved.segments.label]
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert moved.names == batch.names and moved.lengths == batch.lengths
    assert batch.x.device.type == batch.segments.label.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
def test_a_pinned_batch_is_pinned_throughout() -> None:
    pinned = collate([recording()]).pin_memory()
    assert pinned.x.is_pinned() and pinned.mask.is_pinned() and pinned.segments.label.is_pinned()


def test_batches_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match="no recordings"):
        collate([])
    with pytest.raises(ValueError, match=r"'b' has \(C, V\) = \(2, 4\), but 'a' has \(2, 3\)"):
        collate([recording("a"), recording("b", joints=4)])
    with pytest.raises(ValueError, match="pad_to = 8 is shorter than recording 'b' of 9 frames"):
        collate([recording("a", 7), recording("b", 9)], pad_to=8)
    with pytest.raises(ValueError, match="pad_multiple must be at least 1, got 0"):
        collate([recording()], pad_multiple=0)


# ---------------------------------------------------------------- mocap6


@pytest.fixture(scope="module")
def mocap6() -> Dataset:
    return load_mocap6()


def test_mocap6_is_the_published_data(mocap6: Dataset) -> None:
    with (
        resources.as_file(resources.files("trgnet") / "assets" / "mocap6" / "mocap6.npz") as path,
        np.load(path, allow_pickle=False) as arrays,
    ):
        assert arrays["values"].shape == (2058, 12) and arrays["labels"].dtype == np.uint8
        digest = hashlib.sha256(arrays["values"].astype("<f4").tobytes() + arrays["labels"].tobytes())
    assert digest.hexdigest() == "ab0c488b035c8ba051b7ad5e85130773448e3a2cb4b9d17d5faf468776397b35"
    lengths = {recording.name: recording.length for recording in mocap6.recordings}
    assert lengths == {"13_29": 382, "13_30": 205, "13_31": 251, "14_06": 446, "14_14": 387, "14_20": 387}
    counts = np.bincount(np.concatenate([recording.labels for recording in mocap6.recordings]))
    assert counts.tolist() == [187, 180, 203, 382, 304, 352, 48, 72, 76, 99, 66, 89]
    assert mocap6.classes[:2] == ("JumpJack", "Jog") and len(mocap6.classes) == 12
    assert mocap6.fps == 10 and mocap6.rotation_axis is None and mocap6.background is None


def test_mocap6_is_small_enough_to_ship() -> None:
    folder = resources.files("trgnet") / "assets" / "mocap6"
    assert sum(len(item.read_bytes()) for item in folder.iterdir()) < 300_000


def test_mocap6_features_are_si_units_in_their_slots(mocap6: Dataset) -> None:
    first, joints = mocap6.recordings[0].features, mocap6.skeleton.joints
    assert first.shape == (6, 11, 382)
    # First frame of 13_29 as published: root.ty -0.69772475 units, lowerback.rx -3.02570064 degrees,
    # rhumerus.rz 4.38124744 degrees.
    assert first[1, joints.index("root"), 0] == pytest.approx(-0.69772475 * 0.0254 / 0.45, rel=1e-6)
    assert first[0, joints.index("lowerback"), 0] == pytest.approx(np.deg2rad(-3.02570064), rel=1e-6)
    assert first[2, joints.index("rhumerus"), 0] == pytest.approx(np.deg2rad(4.38124744), rel=1e-6)
    used = {(slot, joint) for slot, joint in zip(*np.nonzero(first[:3].any(axis=2)), strict=True)}
    expected = "root.y lowerback.x lowerback.y upperneck.y rhumerus.z rradius.x lhumerus.z lradius.x "
    expected += "rtibia.x rfoot.x ltibia.x lfoot.x"
    pairs = (entry.split(".") for entry in expected.split())
    assert used == {("xyz".index(slot), joints.index(joint)) for joint, slot in pairs}


def test_mocap6_displacements_end_in_zero(mocap6: Dataset) -> None:
    for known in mocap6.recordings:
        slots, displacements = known.features[:3].astype(np.float64), known.features[3:]
        assert not displacements[..., -1].any()
        np.testing.assert_allclose(displacements[..., :-1], np.diff(slots), atol=1e-6)


def test_mocap6_default_split(mocap6: Dataset) -> None:
    split = mocap6.split()
    assert names(split.test) == ["13_30", "14_14"]
    assert names(split.train) == ["13_29", "13_31", "14_06", "14_20"] and split.validation == ()
    subjects = {known.subject for known in mocap6.split(validation=0.25).validation}
    assert len(subjects) == 1 and subjects < {"13", "14"}


# ---------------------------------------------------------------- conversion of mocap6


def source_arrays(frames: int = 7) -> dict[str, np.ndarray]:
    return {
        "X": np.arange(12.0 * frames).reshape(frames, 12),
        "TrueZ": np.array([1, 1, 2, 2, 1, 1, 2], np.int32),
        "doc_range": np.array([0, 4, frames]),
        "column_names": np.array(convert_mocap6.COLUMNS, dtype="S"),
        "true_state_names": np.array([b"Jog", b"Squat"]),
    }


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def source(path: Path, **change: np.ndarray) -> Path:
    data = io.BytesIO()
    np.savez(data, **{**source_arrays(), **change})
    folder = "bnpy-0.1.7/" + convert_mocap6.FOLDER
    table = b"seq_id,subj_uid,trial_id,file_name,url\n0,13,29,13_29,u\n1,14,6,14_06,u\n"
    return archive(path, {f"{folder}/dataset.npz": data.getvalue(), f"{folder}/metadata_per_seq.csv": table})


def test_conversion_keeps_values_and_counts_labels_from_zero(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.npz"
    convert_mocap6.main([str(source(tmp_path / "source.tar.gz")), str(out)])
    with np.load(out, allow_pickle=False) as arrays:
        np.testing.assert_array_equal(arrays["values"], source_arrays()["X"])
        assert arrays["values"].dtype == np.float32 and arrays["labels"].dtype == np.uint8
        assert arrays["labels"].tolist() == [0, 0, 1, 1, 0, 0, 1]
        assert arrays["lengths"].tolist() == [4, 3] and arrays["names"].tolist() == ["13_29", "14_06"]
        assert arrays["classes"].tolist() == ["Jog", "Squat"]
        assert arrays["columns"].tolist() == list(convert_mocap6.COLUMNS)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.npz", "source.tar.gz"]
    assert "2 recordings, 7 frames" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"column_names": np.array([b"root.tx"] * 12)},
            "expected the columns root.ty, lowerback.rx, .*got root.tx",
        ),
        ({"X": np.full((7, 12), np.nan)}, r"expected finite values \(7, 12\)"),
        ({"doc_range": np.array([0, 4, 6])}, r"the recordings' ends \[0 4 6\] do not fit 7 frames of 2"),
        ({"TrueZ": np.array([1, 1, 2, 2, 1, 1, 3])}, r"expected labels 1..2, got 1..3"),
        ({"X": np.array([{}], dtype=object)}, "allow_pickle=False"),
    ],
)
def test_conversion_refuses_other_data(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    path = source(tmp_path / "source.tar.gz", **change)
    with pytest.raises(SystemExit, match=f"error: .*{message}"):
        convert_mocap6.main([str(path), str(tmp_path / "out.npz")])
    assert not (tmp_path / "out.npz").exists()


def test_conversion_refuses_other_files(tmp_path: Path) -> None:
    out = str(tmp_path / "out.npz")
    empty = archive(tmp_path / "other.tar.gz", {"bnpy-0.1.7/README.md": b"nothing"})
    with pytest.raises(SystemExit, match=r"expected one file .* in the archive, found 0; give bnpy"):
        convert_mocap6.main([str(empty), out])
    text = tmp_path / "text.tar.gz"
    text.write_text("no archive")
    with pytest.raises(SystemExit, match="error: "):
        convert_mocap6.main([str(text), out])
    with pytest.raises(SystemExit, match=r"error: .*missing\.tar\.gz"):
        convert_mocap6.main([str(tmp_path / "missing.tar.gz"), out])


# ---------------------------------------------------------------- synthetic data


def test_synthetic_data_have_the_sizes_asked_for() -> None:
    dataset = synthetic_dataset(
        recordings=5,
        frames=70,
        joints=4,
        channels=9,
        classes=3,
        embedding_dim=7,
        shortest=50,
        rotation_axis=2,
    )
    assert names(dataset.recordings) == ["s0_r0", "s0_r1", "s1_r0", "s1_r1", "s2_r0"]
    assert all(
        known.features.shape[:2] == (9, 4) and 50 <= known.length <= 70 for known in dataset.recordings
    )
    assert len({known.length for known in dataset.recordings}) > 1
    assert len(dataset.skeleton) == 4 and len(dataset.classes) == 3 and dataset.rotation_axis == 2
    assert dataset.text.joints.shape == (4, 7) and dataset.text.actions.shape == (3, 7)
    assert dataset.test == ("s2_r0",)


def test_synthetic_data_can_be_as_small_as_one() -> None:
    dataset = synthetic_dataset(recordings=1, frames=1, joints=1, channels=1, classes=1, embedding_dim=1)
    assert dataset.recordings[0].features.shape == (1, 1, 1) and dataset.test == ()


def test_synthetic_data_depend_on_the_seed_alone() -> None:
    first, again, other = (synthetic_dataset(recordings=2, seed=seed) for seed in (3, 3, 4))
    for one, two, three in zip(first.recordings, again.recordings, other.recordings, strict=True):
        np.testing.assert_array_equal(one.features, two.features)
        np.testing.assert_array_equal(one.labels, two.labels)
        assert not np.array_equal(one.features, three.features)
    np.testing.assert_array_equal(first.text.actions, again.text.actions)
    assert not np.array_equal(first.text.actions, other.text.actions)


def test_synthetic_segments_last_long_enough_and_change_class() -> None:
    for known in synthetic_dataset(frames=300).recordings:
        segments = segments_of(known.labels)
        assert len(segments) >= 300 // 48
        assert all(16 <= length <= 48 for _, length, _ in segments[:-1])


def test_synthetic_classes_can_be_told_apart() -> None:
    """A nearest-centroid rule on which joints move classifies unseen segments: the labels can be learnt."""
    split = synthetic_dataset(recordings=16, frames=300).split()

    def segments(recordings: tuple[Recording, ...]) -> tuple[np.ndarray, np.ndarray]:
        found = [(known, segment) for known in recordings for segment in segments_of(known.labels)[:-1]]
        motion = [
            known.features[..., start : start + length].std(axis=2) for known, (start, length, _) in found
        ]
        return np.array(motion), np.array([label for _, (_, _, label) in found])

    motion, labels = segments(split.train)
    centroids = np.stack([motion[labels == label].mean(axis=0) for label in range(5)])
    motion, labels = segments(split.test)
    predicted = np.square(motion[:, None] - centroids).sum(axis=(2, 3)).argmin(axis=1)
    assert (predicted == labels).mean() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 0}, "frames must be at least 1, got 0"),
        ({"classes": 256}, "expected 1..255 distinct class names"),
        ({"frames": 2.5}, "frames must be an integer, got 2.5"),
        ({"joints": "abc"}, "joints must be an integer, got 'abc'"),
        ({"recordings": True}, "recordings must be an integer, got True"),
        ({"channels": None}, "channels must be an integer, got None"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"rotation_axis": 1.0}, "rotation_axis must be an integer, got 1.0"),
        ({"shortest": 0}, "shortest must be at least 1, got 0"),
        ({"shortest": 2.5}, "shortest must be an integer, got 2.5"),
        ({"shortest": 201}, "shortest must be in 1..200, the number of frames, got 201"),
        ({"channels": 4, "rotation_axis": 1}, "4 channels are no xyz triples"),
    ],
)
def test_impossible_synthetic_data_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic_dataset(**options)


# ---------------------------------------------------------------- data sets by name


def test_data_sets_are_loaded_by_name() -> None:
    assert load_dataset("mocap6").name == "mocap6"
    assert len(load_dataset("synthetic", recordings=3, frames=20).recordings) == 3


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mocap7", {}, r"no data set 'mocap7'; did you mean 'mocap6'\?; there are mocap6, synthetic"),
        ("mocap6", {"frames": 3}, "'mocap6' has no option frames; it takes text"),
        ("synthetic", {"sequences": 3}, "'synthetic' has no option sequences; it takes recordings, frames, "),
    ],
)
def test_unknown_names_and_options_are_refused(name: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(name, **options)
