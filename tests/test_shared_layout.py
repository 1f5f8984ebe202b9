"""The data sets of the literature, written as small files in the layout that they share."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np
import pytest

from trgnet import cli
from trgnet.data import DATASETS, IGNORE, Dataset, load_dataset
from trgnet.data.shared_layout import SHARED_DATASETS
from trgnet.errors import DataWarning, UserError
from trgnet.runs import Run
from trgnet.text import load_text, shipped_embeddings

FRAMES = 40
TINY = (
    "model.features=16", "model.layers=2", "model.refine_layers=2", "model.hops=3",
    "train.epochs=1", "train.batch_size=2", "train.device=cpu", "train.final_epochs=1",
    "train.evaluate_every=1", "data.validation=0",
)  # fmt: skip
# Feature files: shape of as many frames, and dtype.
FILES = {
    "PKU-subject": (lambda frames: (frames, 150), np.float64),
    "PKU-view": (lambda frames: (frames, 150), np.float64),
    "LARA": (lambda frames: (6, frames, 19, 1), np.float64),
    "MCFS-22": (lambda frames: (frames, 25, 3), np.float32),
    "MCFS-130": (lambda frames: (frames, 25, 2), np.float32),
    "TCG-15": (lambda frames: (frames, 17, 3), np.float32),
}
NAMES = {  # three for training, one for testing
    "PKU-subject": ("A01N01-L", "A01N02-L", "A02N02-R", "A01N07-M"),
    "PKU-view": ("A01N01-L", "A01N02-L", "A02N02-R", "A01N02-M"),
    "LARA": ("L01_S07_R01", "L01_S08_R02", "L02_S07_R03", "L01_S14_R01"),
    "MCFS-22": ("n01_p1", "n01_p2", "n02 p3", "n09_p1"),
    "MCFS-130": ("n01_p1", "n01_p2", "n02 p3", "n09_p1"),
    "TCG-15": ("s01", "s02", "s03", "s04"),
}
CLASSES = {"PKU-subject": 52, "PKU-view": 52, "LARA": 8, "MCFS-22": 22, "MCFS-130": 130, "TCG-15": 15}
# C, V, the kept frames, their rate, the vertical axis.
SHAPES = {
    "PKU-subject": (12, 25, 40, 30, 1),
    "PKU-view": (12, 25, 40, 30, 1),
    "LARA": (12, 19, 10, 50, 2),
    "MCFS-22": (2, 25, 40, 30, None),
    "MCFS-130": (2, 25, 40, 30, None),
    "TCG-15": (6, 17, 40, 100, 2),
}


def write_dataset(root: Path, name: str, prefix: str = "./dataset") -> Path:
    """A data set in the shared layout, whose lists name files with `prefix` in front; returns its folder."""
    folder, lists = root / name, root / "csv" / name
    for sub in (folder / "features", folder / "gt_arr", folder / "gt_boundary_arr", lists):
        sub.mkdir(parents=True)
    classes = shipped_embeddings(name).actions
    (folder / "mapping.txt").write_text("".join(f"{index} {each}\n" for index, each in enumerate(classes)))
    shape, dtype = FILES[name]
    for index, recording in enumerate(NAMES[name]):
        rng = np.random.default_rng(index)
        np.save(folder / "features" / f"{recording}.npy", rng.uniform(1, 700, shape(FRAMES)).astype(dtype))
        np.save(folder / "gt_arr" / f"{recording}.npy", labels_of(index, name))
    write_list(root, name, "train", NAMES[name][:3], prefix)
    write_list(root, name, "test", NAMES[name][3:], prefix)
    return folder


def labels_of(index: int, name: str) -> np.ndarray:
    """Three segments that end between kept frames of LARa."""
    return np.repeat([index, CLASSES[name] - 1, index + 1], [13, 9, FRAMES - 22])


def write_list(root: Path, name: str, part: str, recordings, prefix: str = "./dataset") -> Path:
    path = root / "csv" / name / f"{part}1.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["feature", "label", "boundary"])
        for each in recordings:
            folders = ("features", "gt_arr", "gt_boundary_arr")
            writer.writerow([f"{prefix}/{name}/{folder}/{each}.npy" for folder in folders])
    return path


def replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def same(first: Dataset, second: Dataset) -> bool:
    return all(
        a.name == b.name and a.features.tobytes() == b.features.tobytes() and (a.labels == b.labels).all()
        for a, b in zip(first.recordings, second.recordings, strict=True)
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with TCG-15, to be damaged."""
    write_dataset(tmp_path / "my data", "TCG-15")
    return tmp_path / "my data"


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("prefix", ["./dataset", "", ".", "dataset", ".\\dataset"])
@pytest.mark.parametrize("name", FILES)
def test_every_data_set_is_read(tmp_path, name, prefix):
    folder = write_dataset(tmp_path, name, prefix)
    loaded = load_dataset(name, root=str(tmp_path))
    channels, joints, frames, fps, axis = SHAPES[name]
    assert [each.name for each in loaded.recordings] == [*NAMES[name]] and loaded.test == NAMES[name][3:]
    assert {each.features.shape for each in loaded.recordings} == {(channels, joints, frames)}
    assert (loaded.name, loaded.fps, loaded.rotation_axis, loaded.background) == (name, fps, axis, None)
    assert loaded.classes == shipped_embeddings(name).actions and len(loaded.classes) == CLASSES[name]
    assert len(loaded.skeleton) == joints and loaded.preparation == SHARED_DATASETS[name].preparation
    np.testing.assert_array_equal(loaded.text.actions, shipped_embeddings(name).prior.actions)
    for index, recording in enumerate(loaded.recordings):
        np.testing.assert_array_equal(recording.labels, labels_of(index, name)[:: FRAMES // frames])
        raw = np.load(folder / "features" / f"{recording.name}.npy")
        if name == "MCFS-22":  # the third channel, the detector's confidence, is left out
            raw = raw[..., :2]
        assert recording.features.tobytes() == loaded.preparation.features(raw).tobytes()


def test_all_of_them_are_data_sets_of_the_package():
    assert set(SHARED_DATASETS) == set(FILES) <= set(DATASETS)


@pytest.mark.parametrize(
    ("name", "subjects"),
    [
        ("PKU-subject", ["01", "02", "02", "07"]),
        ("LARA", ["S07", "S08", "S07", "S14"]),
        ("MCFS-22", [None] * 4),
        ("TCG-15", [None] * 4),
    ],
)
def test_subjects_are_in_the_names(tmp_path, name, subjects):
    write_dataset(tmp_path, name)
    assert [each.subject for each in load_dataset(name, root=tmp_path).recordings] == subjects


def test_subjects_of_another_pattern(root):
    loaded = load_dataset("TCG-15", root=root, subject="s0([13])")
    assert [each.subject for each in loaded.recordings] == ["1", None, "3", None]
    with pytest.raises(UserError, match=r"subject 'p\(.\)' matches no recording's name, such as 's01'"):
        load_dataset("TCG-15", root=root, subject="p(.)")
    for bad in ("(", 3):
        with pytest.raises(UserError, match="subject must be a regular expression, got"):
            load_dataset("TCG-15", root=root, subject=bad)


def test_the_disputed_bone_of_lara(tmp_path):
    write_dataset(tmp_path, "LARA")
    edges = [
        set(load_dataset("LARA", root=tmp_path, **options).skeleton.edges)
        for options in ({}, {"disputed_edge": "head"}, {"disputed_edge": "collar"})
    ]
    assert edges[0] == edges[1] and edges[1] - edges[2] == {(12, 10)} and edges[2] - edges[1] == {(12, 11)}
    for bad in ("neck", [12, 10]):
        with pytest.raises(UserError, match="disputed_edge must be head or collar, got"):
            load_dataset("LARA", root=tmp_path, disputed_edge=bad)


def test_other_lists(root):
    lists = root / "csv" / "TCG-15"
    for part in ("train", "test"):
        (lists / f"{part}1.csv").rename(lists / f"{part}2.csv")
    assert load_dataset("TCG-15", root=root, split=2).test == ("s04",)
    with pytest.raises(UserError, match=r"no file .*train1\.csv; its folder has test2\.csv, train2\.csv"):
        load_dataset("TCG-15", root=root)
    for bad in ("2", True, -1, 1.0):
        with pytest.raises(UserError, match="split must be the number of a list, such as 1 for train1.csv"):
            load_dataset("TCG-15", root=root, split=bad)


def test_text_of_the_user(root):
    loaded = load_dataset("TCG-15", root=root, text="none")
    known = load_text("none", loaded.skeleton.joints, loaded.classes)
    np.testing.assert_array_equal(loaded.text.actions, known.actions)
    np.testing.assert_array_equal(loaded.text.joints, known.joints)


def test_lists_of_other_editors(root):
    """A byte order mark, CRLF, blank lines, further columns in another order; names with spaces."""
    plain = load_dataset("TCG-15", root=root)
    (root / "TCG-15" / "features" / "s04.npy").rename(root / "TCG-15" / "features" / "s 04 é.npy")
    (root / "csv" / "TCG-15" / "test1.csv").write_bytes(
        "\ufeffid,label,boundary,feature\r\n\r\n"
        "1,./dataset/TCG-15/gt_arr/s04.npy,,./dataset/TCG-15/features/s 04 é.npy\r\n".encode()
    )
    mapping = root / "TCG-15" / "mapping.txt"
    lines = [f"{index}\t{name} \r\n" for index, name in enumerate(plain.classes)]
    mapping.write_bytes(("\ufeff" + "".join(reversed(lines)) + "\r\n").encode())
    loaded = load_dataset("TCG-15", root=root)
    assert loaded.classes == plain.classes and loaded.test == ("s 04 é",)
    assert loaded.recordings[3].features.tobytes() == plain.recordings[3].features.tobytes()


def test_the_cache_changes_no_bit(root, tmp_path):
    plain, *cached = (
        load_dataset("TCG-15", root=root, cache=cache) for cache in (None, tmp_path / "c", tmp_path / "c")
    )
    assert all(same(plain, each) for each in cached) and len([*(tmp_path / "c").iterdir()]) == 4


@pytest.mark.parametrize("label", [np.uint8, np.int32, np.float64])
def test_labels_of_any_whole_numbers(root, label):
    path = root / "TCG-15" / "gt_arr" / "s01.npy"
    labels = np.where(np.arange(FRAMES) < 9, 3, IGNORE)
    np.save(path, labels.astype(label))
    read = load_dataset("TCG-15", root=root).recordings[0].labels
    assert read.dtype == np.int64
    np.testing.assert_array_equal(read, labels)


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("labels", [38, 42])
def test_lengths_that_differ_a_little_are_cut(root, tmp_path, labels, cache):
    where = tmp_path / "cache" if cache else None
    whole = load_dataset("TCG-15", root=root, cache=where).recordings[1]
    np.save(root / "TCG-15" / "gt_arr" / "s02.npy", np.arange(labels) % 15)
    message = (
        rf"1 of 4 recordings .* cut to the shorter; the first is .*s02\.npy of 40 frames with {labels} labels"
    )
    with pytest.warns(DataWarning, match=message):
        recording = load_dataset("TCG-15", root=root, cache=where).recordings[1]
    frames = min(labels, FRAMES)
    np.testing.assert_array_equal(recording.labels, np.arange(frames) % 15)
    np.testing.assert_array_equal(recording.features, whole.features[..., :frames])


def test_lengths_are_compared_before_frames_are_left_out(tmp_path):
    folder = write_dataset(tmp_path, "LARA")
    np.save(folder / "gt_arr" / f"{NAMES['LARA'][0]}.npy", np.arange(38) % 8)
    with pytest.warns(DataWarning, match="of 40 frames with 38 labels"):
        recording = load_dataset("LARA", root=tmp_path).recordings[0]
    np.testing.assert_array_equal(recording.labels, np.arange(0, 38, 4) % 8)
    assert recording.length == 10


@pytest.mark.parametrize("labels", [37, 43, 10])
def test_lengths_that_differ_by_more_are_refused(root, labels):
    np.save(root / "TCG-15" / "gt_arr" / "s02.npy", np.zeros(labels, int))
    with pytest.raises(
        UserError, match=rf"features/s02\.npy and .*gt_arr/s02\.npy: .*40 frames, but {labels} "
    ):
        load_dataset("TCG-15", root=root)


# ---------------------------------------------------------------- what is refused


def test_folders_that_are_missing(tmp_path, root):
    with pytest.raises(UserError, match=r"needs the option root; set data\.root="):
        load_dataset("TCG-15")
    with pytest.raises(UserError, match=r"no folder .*TCG-15: root .*nowhere is no folder; set data\.root"):
        load_dataset("TCG-15", root=tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"root .* has the folders TCG-15, csv; set data\.root to .* LARA and csv"
    ):
        load_dataset("LARA", root=root)
    (tmp_path / "empty" / "LARA").mkdir(parents=True)
    with pytest.raises(UserError, match=r"file .*mapping\.txt: .*No such file"):
        load_dataset("LARA", root=tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"root .*bare has the folders \(none\)"):
        load_dataset("LARA", root=tmp_path / "bare")


LINE = "/TCG-15/features/s01.npy,/TCG-15/gt_arr/s01.npy,"
HEADER = "feature,label,boundary\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"train1\.csv: expected the columns feature,label,boundary in the first line, got none"),
        ("feature,label\n", "expected the columns .*, got feature,label"),
        ("feature,label,boundary,label\n", "got feature,label,boundary,label"),
        (f"{LINE}\n", "expected the columns feature,label,boundary in the first line, got /TCG-15/"),
        (HEADER, r"file .*train1\.csv lists no recordings"),
        (f"{HEADER}\n{LINE},\n", r"train1\.csv, line 3: expected 3 cells, got 4: /TCG-15/"),
        (f"{HEADER}{LINE}\n{LINE}\n", r"line 3: recording 's01' is listed already in file .*train1\.csv, line 2"),
        (f"{HEADER}{LINE.replace('s01', 's04')}\n", r"test1\.csv, line 2: recording 's04' is listed .*train1\.csv"),
        (f"{HEADER}{LINE.replace('features/s01', 'features/s99')}\n",
         r"line 2: no file .*my data/TCG-15/features/s99\.npy or .*my data/features/s99\.npy, which is '/TCG"),
        (f"{HEADER}gone.npy,/TCG-15/gt_arr/s01.npy,\n", r"line 2: no file ((?! or )[^,])*my data/gone\.npy, which is 'gone"),
        (f"{HEADER}TCG-15,/TCG-15/gt_arr/s01.npy,\n", r"line 2: no file ((?! or )[^,])*/TCG-15, which is 'TCG-15'"),
        (f"{HEADER}../secret.npy,a,b\n", r"line 2: expected a path within the root .*, got '\.\./secret\.npy'"),
        (f"{HEADER}dataset/../../secret.npy,a,b\n", "line 2: expected a path within the root"),
        (f"{HEADER}/TCG-15/features/s01.npy, ,b\n", r"line 2: expected a path within the root .*, got ' '"),
    ],
)  # fmt: skip
def test_lists_that_cannot_be_used(root, text, message):
    (root.parent / "secret.npy").touch()
    (root / "csv" / "TCG-15" / "train1.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        load_dataset("TCG-15", root=root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "1 Stop Both Static\n",
            "Stop Both Static\n",
            r"mapping\.txt, line 2: expected 'id name' .*, got 'Stop",
        ),
        ("1 Stop Both Static\n", "1\n", "line 2: expected 'id name'"),
        ("1 Stop Both Static\n", "-1 Stop\n", "line 2: expected 'id name'"),
        ("1 Stop Both Static\n", "² Stop\n", "line 2: expected 'id name'"),
        ("1 Stop Both Static\n", f"{'9' * 5000} Stop\n", "line 2: expected 'id name'"),
        ("1 Stop Both Static\n", "15 Stop\n", r"line 2: expected an id 0\.\.14, one per class, got 15"),
        ("1 Stop Both Static\n", "0 Stop\n", "line 2: expected every id and name once, got '0 Stop' again"),
        ("1 Stop Both Static\n", "1 Inactive\n", "line 2: expected every id and name once"),
        (
            "1 Stop Both Static\n",
            "\n",
            r"mapping\.txt: expected the ids 0\.\.14, one line each, but 1 is missing",
        ),
    ],
)
def test_mappings_that_cannot_be_used(root, old, new, message):
    path = root / "TCG-15" / "mapping.txt"
    path.write_text(path.read_text().replace(old, new), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_dataset("TCG-15", root=root)


@pytest.mark.parametrize("file", ["TCG-15/mapping.txt", "csv/TCG-15/test1.csv"])
def test_text_in_other_encodings_is_refused(root, file):
    (root / file).write_bytes(b"0 Caf\xe9\n")
    with pytest.raises(UserError, match=rf"file .*{Path(file).name}: .*byte 0xe9 in position 5"):
        load_dataset("TCG-15", root=root)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            np.r_[np.zeros(7), 15, np.zeros(32)].astype(int),
            r"frame 7 has the label 15; expected 0\.\.14, or 255",
        ),
        (np.r_[np.zeros(39), -1].astype(int), "frame 39 has the label -1"),
        (np.r_[0.5, np.zeros(39)], "frame 0 has the label 0.5"),
        (np.r_[np.nan, np.zeros(39)], "frame 0 has the label nan"),
        (np.zeros((40, 1), int), r"expected the class of every frame, integers \(T,\), got int64 \(40, 1\)"),
        (np.zeros(0, int), r"got int64 \(0,\)"),
        (np.full(40, "walk"), r"got <U4 \(40,\)"),
    ],
)
def test_labels_that_cannot_be_used(root, labels, message):
    np.save(root / "TCG-15" / "gt_arr" / "s03.npy", labels)
    with pytest.raises(UserError, match=rf"file .*gt_arr/s03\.npy: .*{message}"):
        load_dataset("TCG-15", root=root)


def nan_in_frame_5() -> np.ndarray:
    values = np.ones((FRAMES, 17, 3), np.float32)
    values[5, 4, 2] = np.nan
    return values


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (nan_in_frame_5(), "1 values are not finite, the first in frame 5: nan in channel 2 of joint 4"),
        (np.ones((FRAMES, 18, 3)), r"where v = 17, c = 3 .*; got the shape \(40, 18, 3\)"),
        (np.ones((FRAMES, 17, 4)), r"got the shape \(40, 17, 4\)"),
        (np.ones((0, 17, 3)), r"expected at least one frame, got the shape \(0, 17, 3\)"),
        (np.ones((FRAMES, 17, 3), complex), "expected real numbers"),
    ],
)
def test_features_that_cannot_be_used(root, tmp_path, features, message):
    np.save(root / "TCG-15" / "features" / "s02.npy", features)
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(UserError, match=rf"file .*features/s02\.npy: .*{message}"):
            load_dataset("TCG-15", root=root, cache=cache)


def test_other_data_under_the_name_of_an_array(root):
    path = root / "TCG-15" / "features" / "s02.npy"
    with path.open("wb") as file:
        np.savez(file, only=np.ones((FRAMES, 17, 3)))
    with pytest.raises(
        UserError, match=r"features/s02\.npy: expected one array in a \.npy file, got an \.npz"
    ):
        load_dataset("TCG-15", root=root)
    path.write_bytes(b"no array")
    with pytest.raises(UserError, match=r"features/s02\.npy: the file is damaged or holds something else"):
        load_dataset("TCG-15", root=root)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("folder", ["features", "gt_arr"])
def test_pickles_are_never_executed(root, tmp_path, folder):
    path, sprung = root / "TCG-15" / folder / "s01.npy", tmp_path / "sprung"
    np.save(path, np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    with pytest.raises(
        UserError, match=rf"file .*{folder}/s01\.npy: .*something else than arrays of numbers"
    ):
        load_dataset("TCG-15", root=root)
    assert not sprung.exists()
    np.load(path, allow_pickle=True)
    assert sprung.exists(), "the trap is none"


def test_of_several_faults_the_first_in_the_lists_is_told(root):
    for name in ("s01", "s02", "s04"):
        np.save(root / "TCG-15" / "features" / f"{name}.npy", np.ones(3))
    with pytest.raises(UserError, match=r"features/s01\.npy"):
        load_dataset("TCG-15", root=root)


# ---------------------------------------------------------------- from the command line


@pytest.mark.parametrize("name", FILES)
def test_every_data_set_trains_from_its_configuration(tmp_path, capsys, monkeypatch, name):
    if name in ("PKU-view", "MCFS-130"):  # drawing so many classes takes seconds; PKU-subject's are drawn
        monkeypatch.setattr("trgnet.evaluation.plot_confusion", lambda path, *_: None)
    write_dataset(tmp_path / "data", name)
    cached = ["data.cache=" + str(tmp_path / "cache")] if name == "PKU-subject" else []
    run = tmp_path / "run"
    arguments = ["--config", name.lower(), f"data.root={tmp_path / 'data'}", "--out", str(run)]
    assert cli.main(["train", *arguments, *TINY, *cached]) == 0
    assert "epoch 1/1" in capsys.readouterr().out
    info = Run(run).info()
    assert info.dataset == name and info.preparation == SHARED_DATASETS[name].preparation
    assert tuple(info.recordings["test"]) == NAMES[name][3:] and info.fps == SHAPES[name][3]
    assert len([*tmp_path.glob("cache/*.npy")]) == 4 * len(cached)


def remove_root(root: Path) -> str:
    root.rename(root.with_name("moved"))
    return r"no folder .*TCG-15: root .*my data is no folder"


def spoil_label(root: Path) -> str:
    np.save(root / "TCG-15" / "gt_arr" / "s02.npy", np.full(FRAMES, 99))
    return r"gt_arr/s02\.npy: frame 0 has the label 99"


def spoil_list(root: Path) -> str:
    replace_in(root / "csv" / "TCG-15" / "test1.csv", "features/s04", "features/gone")
    return r"test1\.csv, line 2: no file .*gone\.npy"


@pytest.mark.parametrize("spoil", [remove_root, spoil_label, spoil_list])
def test_data_that_cannot_be_used_end_with_one_line(root, tmp_path, capsys, spoil):
    message = spoil(root)
    run = tmp_path / "run"
    assert cli.main(["train", "--config", "tcg-15", f"data.root={root}", "--out", str(run), *TINY]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trgnet: error: ")
    with pytest.raises(UserError, match=message):
        raise UserError(line)
    assert not run.exists()
