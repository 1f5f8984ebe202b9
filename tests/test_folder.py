"""Folders of one's own recordings, and the commands that start, check and describe them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from trgnet.cli import main
from trgnet.data import load_dataset
from trgnet.data.description import Description, read_description, texts_of
from trgnet.data.folder import check_folder, load_folder
from trgnet.errors import DataWarning, UserError

FRAMES = 40
JOINTS = ("hips", "spine", "left hip", "left_knee")
DESCRIPTION = """\
name: walks
fps: 20
joints: [hips, spine, left hip, left_knee]
edges: [[left hip, left_knee], [hips, left hip], [spine, 0]]
root: hips
classes: [stand, walk, sit]
vertical: y
labels: labels
subject: "^(p\\\\d)"
test: [p2 c]
text: none
"""


def positions(seed: int = 0, frames: int = FRAMES) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(frames, len(JOINTS), 3))


def labels(frames: int = FRAMES) -> np.ndarray:
    return np.repeat([0, 1, 2, 1], frames // 4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three recordings, one of each format, whose name has a space."""
    root = tmp_path / "my walks"
    (root / "recordings").mkdir(parents=True)
    (root / "labels").mkdir()
    np.savez(root / "recordings" / "p1 a.npz", positions=positions(1), other=np.zeros(3))
    np.save(root / "labels" / "p1 a.npy", labels().astype(np.uint8))
    np.save(root / "recordings" / "p1_b.npy", positions(2).astype(np.float32))
    (root / "labels" / "p1_b.txt").write_bytes(
        "\r\n".join(["stand", "1", "sit", "walk"][i // 10] for i in range(FRAMES)).encode("utf-8-sig")
    )
    header = [f"{joint}_{axis}" for joint in JOINTS for axis in "zyx"]
    table = positions(3)[..., ::-1].reshape(FRAMES, -1)
    rows = [",".join([*map(repr, row.tolist()), str(label)]) for row, label in zip(table, labels())]
    (root / "recordings" / "p2 c.csv").write_text("\n".join([",".join([*header, "label"]), *rows]))
    (root / "dataset.yaml").write_text(DESCRIPTION, encoding="utf-8")
    return root


def edit(folder: Path, old: str, new: str) -> None:
    text = (folder / "dataset.yaml").read_text(encoding="utf-8")
    assert old in text
    (folder / "dataset.yaml").write_text(text.replace(old, new), encoding="utf-8")


def test_every_format_gives_the_same_features_and_labels(folder):
    dataset = load_dataset("folder", root=str(folder))
    assert [recording.name for recording in dataset.recordings] == ["p1 a", "p1_b", "p2 c"]
    assert [recording.subject for recording in dataset.recordings] == ["p1", "p1", "p2"]
    assert dataset.test == ("p2 c",) and dataset.fps == 20 and dataset.rotation_axis == 1
    assert set(dataset.skeleton.edges) == {(2, 0), (3, 2), (1, 0)} and dataset.skeleton.root == 0
    np.testing.assert_array_equal(dataset.text.joints[:, :4], np.eye(4))
    for seed, recording in enumerate(dataset.recordings, start=1):
        raw = positions(seed).transpose(2, 1, 0)
        np.testing.assert_array_equal(recording.labels, labels())
        np.testing.assert_allclose(recording.features[3:], raw - raw[:, :1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(recording.features[:3, :, :-1], np.diff(raw), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("start,end,label\n0,10,stand\n10,15,2\n20,40,walk\n", [0] * 10 + [2] * 5 + [255] * 5 + [1] * 20),
        ("label,end_seconds,start_seconds\nwalk,1.0,0.5\n", [255] * 10 + [1] * 10 + [255] * 20),
    ],
)
def test_segments_are_labels(folder, content, expected):
    (folder / "labels" / "p1 a.npy").unlink()
    (folder / "labels" / "p1 a.csv").write_text(content)
    assert load_folder(str(folder)).recordings[0].labels.tolist() == expected


def test_labels_in_the_recordings_own_file_and_a_stride(folder):
    for name in ("p1_b.npy", "p2 c.csv"):
        (folder / "recordings" / name).unlink()
    np.savez(folder / "recordings" / "p1 a.npz", positions=positions(1), truth=labels())
    edit(folder, "labels: labels", "labels: truth\nstride: 4")
    edit(folder, "test: [p2 c]", "test_subjects: [p1]")
    dataset = load_folder(str(folder))
    assert dataset.recordings[0].labels.tolist() == labels()[::4].tolist()
    assert dataset.recordings[0].features.shape == (6, 4, 10)
    assert dataset.fps == 5 and dataset.test == ("p1 a",)


def test_lengths_that_differ_a_little_are_cut_and_unlabelled_recordings_left_out(folder):
    np.save(folder / "labels" / "p1 a.npy", labels()[:-2])
    (folder / "labels" / "p1_b.txt").unlink()
    with pytest.warns(DataWarning) as warned:
        dataset = load_folder(str(folder))
    assert [recording.length for recording in dataset.recordings] == [38, 40]
    assert "left out: p1_b" in str(warned[0].message) and "cut to the fewer, in p1 a" in str(
        warned[1].message
    )


def test_texts_are_the_descriptions_or_the_plain_names(folder):
    edit(folder, "text: none", "text: none\ndescriptions:\n  joints: {left_knee: It bends.}")
    texts = texts_of(read_description(folder))
    assert texts["joints"] == {
        "hips": "hips",
        "spine": "spine",
        "left hip": "left hip",
        "left_knee": "It bends.",
    }
    assert list(texts["actions"]) == ["stand", "walk", "sit"]


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(root: Path) -> None:
    (root / "recordings" / "p1_b.npy").write_bytes(pickle.dumps(Trap(root / "sprung")))


def objects(root: Path) -> None:
    np.save(
        root / "recordings" / "p1_b.npy", np.array([Trap(root / "sprung")], dtype=object), allow_pickle=True
    )


def unfinite(root: Path) -> None:
    array = positions(2)
    array[7, 2, 1] = np.nan
    np.save(root / "recordings" / "p1_b.npy", array)


def saved(name: str, array: np.ndarray) -> Callable[[Path], None]:
    return lambda root: np.save(root / name, array)


def written(name: str, content: str | bytes) -> Callable[[Path], None]:
    data = content.encode() if isinstance(content, str) else content
    return lambda root: (root / name).write_bytes(data)


def said(old: str, new: str) -> Callable[[Path], None]:
    return lambda root: edit(root, old, new)


FAULTS = [
    (
        said("[spine, 0]]", "[spine, 0], [spine, left hip]]"),
        r"line 4: edges: the bone between .* closes a cycle",
    ),
    (said(", [spine, 0]]", "]"), r"line 4: edges: no chain of bones leads from the root 'hips' to spine;"),
    (said("[hips, spine,", "[hips, hips,"), r"line 3: joints: hips stands there twice"),
    (said("walk, sit]", "walk, walk]"), r"line 6: classes: walk stands there twice"),
    (said("root: hips", "root: hisp"), r"line 5: root: 'hisp' is none of the joints .*did you mean 'hips'"),
    (said("[spine, 0]", "[spin, 0]"), r"line 4: edges: 'spin' is none of the joints .*did you mean 'spine'"),
    (said("[spine, 0]", "[spine, 4]"), r"line 4: edges: there are the joints 0..3, got 4"),
    (said("fps: 20", "fps: fast"), r"line 2: fps: .*valid number.*got 'fast'"),
    (said("fps: 20", "fps: 0"), r"line 2: fps: .*greater than 0, got 0"),
    (said("fps: 20\n", ""), r"the key 'fps' is missing"),
    (said("labels: labels", "lables: labels"), r"line 8: unknown key 'lables'; did you mean 'labels'"),
    (said("name: walks", "name: walks\nname: runs"), r"line 2, column 1: the key 'name' stands here again"),
    (said("name: walks", "name: [walks"), r"no valid YAML"),
    (said("vertical: y", "vertical: up"), r"vertical: 'up' is none of the channels x, y, z"),
    (said("labels: labels", "labels: labels\naxes: t v"), r"axes must name t, v, c"),
    (said('subject: "^(p', 'subject: "^((p'), r"subject: expected a regular expression"),
    (said("labels: labels", "labels: ../labels"), r"leads out of the folder"),
    (said("labels: labels", "labels: labels\nrecordings: /etc/*"), r"leads out of the folder"),
    (said("labels: labels", "labels: labels\nrecordings: clips/*"), r"no recording matches 'clips/\*'"),
    (
        said("[p2 c]", "[p2 d]"),
        r"test: there is no 'p2 d'; did you mean 'p2 c'\?; there are p1 a, p1_b, p2 c",
    ),
    (said("[p2 c]", "[]\ntest_subjects: [p3]"), r"test_subjects: there is no 'p3'"),
    (said("text: none", "text: text.npz"), r"no text embeddings .*trgnet text embed"),
    (written("dataset.yaml", b"name: caf\xe9"), r"dataset.yaml: byte 9 is no UTF-8"),
    (written("dataset.yaml", "- 1"), r"expected keys such as 'joints:'"),
    (pickled, r"p1_b.npy: the file is damaged or holds something else than arrays"),
    (objects, r"p1_b.npy: the file is damaged or holds something else than arrays"),
    (unfinite, r"p1_b.npy: 1 values are not finite, the first in frame 7: nan in channel 1 of joint 2"),
    (saved("recordings/p1_b.npy", np.zeros((40, 5, 3))), r"p1_b.npy: expected .* got the shape \(40, 5, 3\)"),
    (saved("recordings/p1_b.npy", np.zeros((40, 4, 2))), r"p1_b.npy: expected .* got the shape \(40, 4, 2\)"),
    (saved("recordings/p1_b.npy", np.zeros((0, 4, 3))), r"p1_b.npy: expected at least one frame"),
    (saved("labels/p1 a.npy", np.full(40, 3)), r"p1 a.npy, frame 0: expected labels 0..2, .* got 3"),
    (saved("labels/p1 a.npy", np.zeros(40)), r"p1 a.npy: expected integer labels"),
    (saved("labels/p1 a.npy", labels()[:37]), r"p1 a.npz: got 40 frames, but 37 labels"),
    (written("labels/p1_b.txt", "stand\nwlak\n"), r"p1_b.txt, line 2: .*got 'wlak'; did you mean 'walk'"),
    (written("labels/p1_b.txt", b"st\xff"), r"p1_b.txt: byte 2 is no UTF-8"),
    (
        written("recordings/p2 c.csv", "hips_x,hips_y\n1,2\n"),
        r"p2 c.csv, line 1: .*10 of 12 are missing, such as",
    ),
    (written("recordings/p2 c.csv", "a,b\n1\n"), r"p2 c.csv, line 2: expected 2 cells, got 1"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS)
def test_faults_are_named_and_nothing_is_executed(folder, spoil, message, capsys):
    spoil(folder)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message):
        load_folder(str(folder))
    assert main(["data", "check", str(folder)]) == 2
    told = capsys.readouterr()
    assert "Traceback" not in told.err and told.err.startswith("trgnet: error: ")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("start,stop,label\n1,2,0\n", "line 1: expected the columns start, end and label"),
        ("start,end,label\n5,5,0\n", "line 2: expected start < end"),
        ("start,end,label\n0,5,0\n4,8,1\n", "line 3: expected start < end within the 40 frames, after"),
        ("start,end,label\n0,90,0\n", "line 2: got 40 frames, but 90 labels"),
        ("start,end,label\n0,x,0\n", "line 2: expected a number, got 'x'"),
        ("start,end,label\n0,5,run\n", "line 2: expected a class name"),
    ],
)
def test_faults_of_segments_are_named(folder, content, message):
    (folder / "labels" / "p1 a.npy").unlink()
    (folder / "labels" / "p1 a.csv").write_text(content)
    with pytest.raises(UserError, match=f"p1 a.csv, {message}"):
        load_folder(str(folder))


def test_a_check_collects_every_fault(folder, capsys):
    unfinite(folder)
    np.save(folder / "labels" / "p1 a.npy", np.full(40, 9))
    checked = check_folder(folder)
    assert [recording.name for recording in checked.recordings] == ["p2 c"] and len(checked.faults) == 2
    with pytest.raises(UserError, match=r"p1 a.npy.*\(and 1 more: trgnet data check"):
        load_folder(str(folder))
    assert main(["data", "check", str(folder)]) == 2
    assert capsys.readouterr().out.count("fault: ") == 2


def test_a_good_folder_passes_and_is_described(folder, tmp_path, capsys):
    assert main(["data", "check", str(folder)]) == 0
    assert "3 recordings, 120 frames; faults: 0" in capsys.readouterr().out
    assert main(["data", "describe", str(folder), "--out", str(tmp_path / "a.png")]) == 0
    shown = capsys.readouterr().out
    assert "3, 1 of them for testing" in shown and "120, 0.1 minutes at 20 fps" in shown
    assert [cell.strip() for cell in next(line for line in shown.splitlines() if "walk " in line).split("│")[1:-1]] == [
        "walk", "60", "50.0", "6", "0.5",
    ]  # fmt: skip
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main(["data", "describe", "--config", "mocap6"]) == 0
    assert "2,058" in capsys.readouterr().out
    assert main(["data", "describe"]) == 2


def test_no_folder_and_no_description_say_what_to_do(tmp_path, capsys):
    for command in ("check", "describe", "init"):
        assert main(["data", command, str(tmp_path / "none")]) == 2
        assert "is no folder" in capsys.readouterr().err
    assert main(["data", "check", str(tmp_path)]) == 2
    assert f"write one with: trgnet data init {tmp_path}" in capsys.readouterr().err
    assert main(["data", "init", str(tmp_path)]) == 2
    assert "has no recordings" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_from_arrays_to_a_trained_network_and_a_timeline(tmp_path, capsys, tiny_overrides):
    root = tmp_path / "own"
    root.mkdir()
    for index in range(4):
        truth = np.roll(labels(), index * 10)
        np.savez(root / f"walk{index}.npz", positions=positions(index), truth=truth)
    assert main(["data", "init", str(root)]) == 0
    description = (root / "dataset.yaml").read_text(encoding="utf-8")
    assert "axes: t v c " in description and "classes: [action_0, action_1, action_2]" in description
    assert main(["data", "init", str(root)]) == 2  # nothing is overwritten
    assert (root / "dataset.yaml").read_text(encoding="utf-8") == description
    assert main(["data", "check", str(root)]) == 2
    edit(root, "edges: []", "edges: [[1, 0], [2, 0], [3, 2]]")
    edit(root, "test: []", "test: [walk3]")
    edit(root, "text: text.npz", "text: none")
    assert main(["data", "check", str(root)]) == 0, capsys.readouterr().err
    settings = [one for one in tiny_overrides if not one.startswith("data.")]
    out = tmp_path / "run"
    assert main(["train", "--data", str(root), "--out", str(out), *settings, "train.epochs=1"]) == 0
    assert main(["predict", str(out), str(root / "walk3.npz"), "--out", str(tmp_path / "timeline")]) == 0
    timeline = (tmp_path / "timeline" / "walk3.csv").read_text()
    assert timeline.startswith("start,end,") and timeline.splitlines()[-1].split(",")[1] == str(FRAMES)


@pytest.mark.parametrize("name", ["pku", "lara", "mocap6"])
def test_init_takes_a_skeleton_of_the_package(tmp_path, name, capsys):
    from trgnet.skeleton import SKELETONS

    np.save(tmp_path / "a.npy", np.zeros((50, len(SKELETONS[name]), 3)))
    assert main(["data", "init", str(tmp_path), "--skeleton", name]) == 0
    skeleton = read_description(tmp_path).skeleton()
    assert skeleton.joints == SKELETONS[name].joints and set(skeleton.edges) == set(SKELETONS[name].edges)
    (tmp_path / "dataset.yaml").unlink()
    assert main(["data", "init", str(tmp_path), "--skeleton", "pkuu"]) == 2
    assert "did you mean 'pku'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("shape", "axes", "joints"),
    [
        ((90, 17, 3), "t v c", 17),
        ((3, 90, 17), "c t v", 17),
        ((90, 51), "t (v c)", 17),
        ((2, 11, 70), "c v t", 11),
    ],
)
def test_init_guesses_the_axes(tmp_path, shape, axes, joints):
    np.save(tmp_path / "a.npy", np.zeros(shape))
    assert main(["data", "init", str(tmp_path)]) == 0
    text = (tmp_path / "dataset.yaml").read_text(encoding="utf-8")
    assert f"axes: {axes} " in text and f'joint_{joints - 1}"]' in text


@pytest.mark.parametrize("name", ["2024", "it's {x}: y", 'a "b" # c', "null"])
def test_init_copes_with_any_name(tmp_path, name):
    root = tmp_path / name
    root.mkdir()
    np.savez(root / "a.npz", **{"my: array": np.zeros((50, 25, 3)), "no": np.zeros(50, int)})
    assert main(["data", "init", str(root), "--skeleton", "pku"]) == 0
    description = read_description(root)
    assert (description.name, description.array, description.labels) == (name, "my: array", "no")


def test_init_reads_the_columns_of_tables(folder):
    for name in ("p1 a.npz", "p1_b.npy"):
        (folder / "recordings" / name).unlink()
    (folder / "dataset.yaml").unlink()
    assert main(["data", "init", str(folder)]) == 0
    edit(folder, "edges: []", "edges: [[1, 0], [2, 0], [3, 2]]")
    edit(folder, "action_0, action_1", "a, b, c")
    edit(folder, "text: text.npz", "text: none")
    assert read_description(folder).joints == JOINTS and read_description(folder).channels == ("z", "y", "x")
    assert len(load_folder(str(folder)).recordings) == 1


def test_a_cache_follows_the_description(folder, tmp_path):
    arrays = {"positions": positions(1), "other": positions(9)}
    np.savez(folder / "recordings" / "p1 a.npz", **arrays)
    cache = str(tmp_path / "cache")
    first = load_folder(str(folder), cache=cache).recordings[0].features
    edit(folder, "labels: labels", "labels: labels\narray: other")
    second = load_folder(str(folder), cache=cache).recordings[0].features
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, load_folder(str(folder)).recordings[0].features)


def test_a_blank_line_is_a_frame_without_a_label(folder):
    lines = ["stand"] * 10 + ["", ""] + ["walk"] * 28
    (folder / "labels" / "p1_b.txt").write_text("\n".join(lines) + "\n")
    assert load_folder(str(folder)).recordings[1].labels.tolist() == [0] * 10 + [255] * 2 + [1] * 28


def test_lines_are_counted_as_an_editor_counts(folder):
    (folder / "labels" / "p1 a.npy").unlink()
    (folder / "labels" / "p1 a.csv").write_text("start,end,label\n\n\n0,5,run\n")
    with pytest.raises(UserError, match="p1 a.csv, line 4: expected a class name"):
        load_folder(str(folder))


def test_every_key_is_explained_by_init(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((9, 2, 3)))
    assert main(["data", "init", str(tmp_path)]) == 0
    text = (tmp_path / "dataset.yaml").read_text(encoding="utf-8")
    assert all(f"{key}: " in text or f"{key}:\n" in text for key in Description.model_fields)
