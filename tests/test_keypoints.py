from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from trgnet import cli
from trgnet.config import Config, load_config
from trgnet.data import Preparation
from trgnet.errors import DataWarning, UserError
from trgnet.keypoint_files import read_keypoints
from trgnet.keypoints import (
    CONVENTIONS,
    Convention,
    canonical,
    fill_gaps,
    load_convention,
    map_keypoints,
    resample,
)
from trgnet.predictor import Predictor
from trgnet.runs import Run, RunInfo, build_model
from trgnet.skeleton import SKELETONS
from trgnet.text import TextPrior

HANDS = "left_hand right_hand left_hand_tip left_thumb right_hand_tip right_thumb"
FACE = "nose right_eye left_eye right_ear left_ear"
TOES = "left_big_toe left_small_toe left_heel right_big_toe right_small_toe right_heel"
EXTREMITIES = "left_hand right_hand left_foot right_foot"
MISSING = {
    ("kinect25", "pku"): "",
    ("kinect25", "mcfs"): f"{FACE} {TOES}",
    ("kinect25", "tcg"): "",
    ("body25", "pku"): HANDS,
    ("body25", "mcfs"): "",
    ("body25", "tcg"): "left_hand right_hand",
    ("coco17", "pku"): f"{HANDS} left_foot right_foot",
    ("coco17", "mcfs"): TOES,
    ("coco17", "tcg"): EXTREMITIES,
    ("h36m17", "pku"): f"{HANDS} left_foot right_foot",
    ("h36m17", "mcfs"): f"right_eye left_eye right_ear left_ear {TOES}",
    ("h36m17", "tcg"): EXTREMITIES,
}
PREPARATIONS = {
    "pku": Preparation(axes="t (m v c)", joints=25, channels=3, persons=2, fps=30),
    "mcfs": Preparation(
        joints=25, channels=2, fps=30, image_size=(1280, 720), displacement=False, relative_to=8
    ),
    "lara": Preparation(axes="c t v m", joints=19, channels=6, fps=200, stride=4),
    "tcg": Preparation(joints=17, channels=3, fps=100, relative_to=2),
    "mocap6": None,
}


def config() -> Config:
    sizes = ["model.features=16", "model.layers=1", "model.refine_layers=1", "model.hops=2"]
    return load_config(None, sizes)


def info(name: str) -> RunInfo:
    preparation = PREPARATIONS[name]
    return RunInfo(
        dataset=name, classes=("sit", "walk"), background=None, skeleton=SKELETONS[name],
        fps=preparation.feature_fps if preparation else 30, channels=preparation.feature_channels if preparation else 6,
        embedding_dim=4, preparation=preparation, recordings={"train": (), "validation": (), "test": ()},
        pos_weight=1.0, class_weights=None, versions={}, commit=None, created="",
    )  # fmt: skip


def predictor(name: str) -> Predictor:
    torch.manual_seed(0)
    return Predictor(build_model(config(), info(name)), info(name), torch.eye(len(SKELETONS[name])))


def poses(convention: str, channels: int, frames: int = 12) -> np.ndarray:
    shape = (frames, len(CONVENTIONS[convention].joints), channels)
    return np.random.default_rng(0).uniform(0.1, 1.0, shape).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path):
    """A function that writes the run folder of an untrained network."""

    def make(name: str) -> Path:
        facts = info(name)
        text = TextPrior(
            joints=np.eye(len(facts.skeleton), 4, dtype=np.float32) + 1, actions=np.ones((2, 4), np.float32)
        )
        made = Run.create(tmp_path / f"run of {name}", config(), facts, text)
        torch.manual_seed(0)
        made.save_weights(build_model(config(), facts).state_dict())
        return made.path

    return make


@pytest.mark.parametrize(("convention", "skeleton"), MISSING)
def test_every_convention_on_every_skeleton(convention, skeleton):
    _, missing = map_keypoints(poses(convention, 3), CONVENTIONS[convention], SKELETONS[skeleton])
    names = {SKELETONS[skeleton].joints[joint] for joint in missing}
    assert names == set(MISSING[convention, skeleton].split())


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_models_of_more_than_positions_refuse_every_convention(convention):
    with pytest.raises(UserError, match="6 channels per joint, more than a position"):
        predictor("lara").prepare(poses(convention, 3), convention)
    with pytest.raises(UserError, match="mocap6, whose features come prepared"):
        predictor("mocap6").prepare(poses(convention, 3), convention)


@pytest.mark.parametrize("skeleton", ["pku", "mcfs", "tcg"])
def test_the_models_own_joints_are_copied_bit_for_bit(skeleton):
    target = SKELETONS[skeleton]
    own = Convention(name="own", joints=target.joints[::-1])
    array = np.random.default_rng(0).normal(size=(5, len(target), 3)).astype(np.float32)
    mapped, missing = map_keypoints(array, own, target)
    assert missing == () and mapped.tobytes() == np.ascontiguousarray(array[:, ::-1]).tobytes()


def test_own_convention_gives_the_features_of_the_raw_file():
    kinect, body = poses("kinect25", 3), poses("body25", 3) * [1280, 720, 1]
    raw = np.zeros((12, 2, 25, 3), np.float32)
    raw[:, 0] = kinect
    pku, mcfs = predictor("pku"), predictor("mcfs")
    expected = pku.prepare(raw.reshape(12, 150))
    prepared = pku.prepare(kinect, "kinect25")
    assert prepared.features.tobytes() == expected.features.tobytes()
    assert len(pku.predict(prepared).labels) == 12
    features = mcfs.prepare(body, "body25").features
    assert np.array_equal(features, mcfs.prepare(body[..., :2], "raw").features)
    assert np.array_equal(features, mcfs.prepare(body, "raw").features)  # files with confidences


def test_derived_joints():
    body, target = poses("body25", 3), SKELETONS["pku"]
    at = CONVENTIONS["body25"].joints.index
    mapped, _ = map_keypoints(body, CONVENTIONS["body25"], target)
    joint = dict(zip(target.joints, mapped.transpose(1, 0, 2)))
    source = dict(zip(CONVENTIONS["body25"].joints, body.transpose(1, 0, 2)))
    assert np.array_equal(joint["neck"], source["neck"]) and np.array_equal(
        joint["spine_shoulder"], source["neck"]
    )
    np.testing.assert_allclose(joint["spine_mid"], (source["mid_hip"] + source["neck"]) / 2, rtol=1e-6)
    np.testing.assert_allclose(joint["head"], (source["left_ear"] + source["right_ear"]) / 2, rtol=1e-6)
    np.testing.assert_allclose(
        joint["left_foot"], (source["left_big_toe"] + source["left_small_toe"]) / 2, rtol=1e-6
    )
    coco = poses("coco17", 3)
    mapped, _ = map_keypoints(coco, CONVENTIONS["coco17"], SKELETONS["mcfs"])
    np.testing.assert_allclose(mapped[:, 1], (coco[:, 5] + coco[:, 6]) / 2, rtol=1e-6)
    np.testing.assert_allclose(mapped[:, 8], (coco[:, 11] + coco[:, 12]) / 2, rtol=1e-6)
    body[:, at("neck")] = np.nan  # never found: derived of the shoulders instead
    mapped, missing = map_keypoints(body, CONVENTIONS["body25"], SKELETONS["mcfs"])
    assert missing == ()
    np.testing.assert_allclose(mapped[:, 1], (body[:, 2] + body[:, 5]) / 2, rtol=1e-6)


def test_kinects_neck_is_not_that_of_openpose():
    kinect = poses("kinect25", 3)
    mapped, _ = map_keypoints(kinect, CONVENTIONS["kinect25"], SKELETONS["mcfs"])
    assert np.array_equal(mapped[:, 1], kinect[:, 20])


@pytest.mark.parametrize("spelling", ["lhip", "l_hip", "left hip", "hip_left", "LHip", "Hip.L", "LEFT-HIP"])
def test_spellings_of_a_joint(spelling):
    assert canonical(spelling) == "left_hip"


@pytest.mark.parametrize("name", ["lowerback", "rhumerus", "hip", "tail"])
def test_what_only_begins_like_a_side_is_none(name):
    assert not canonical(name).startswith(("left", "right"))


def test_gaps_are_filled_linearly():
    times = np.arange(5.0)
    array = np.stack([times, 2 * times], axis=-1)[:, None].repeat(2, axis=1)
    array[1:3, 0], array[4, 0], array[:, 1] = np.nan, np.nan, np.nan
    with pytest.warns(DataWarning, match="60.0% .* longest gap is 0.20 s of a"):
        filled = fill_gaps(array, ("a", "b"), fps=10)
    assert filled[:, 0].tolist() == [[0, 0], [1, 2], [2, 4], [3, 6], [3, 6]]
    assert np.isnan(filled[:, 1]).all() and np.isnan(array[1, 0]).all()
    with pytest.raises(UserError, match="no keypoint in any frame"):
        fill_gaps(np.full((3, 2, 2), np.nan), ("a", "b"), fps=10)


def test_confidence_zero_is_missing():
    body = poses("body25", 3) * [1280, 720, 1]
    holes = body.copy()
    holes[5, 4] = 0
    body[5, 4, :2] = (body[4, 4, :2] + body[6, 4, :2]) / 2
    model = predictor("mcfs")
    with pytest.warns(DataWarning, match="missing and were filled"):
        prepared = model.prepare(holes, "body25")
    np.testing.assert_allclose(prepared.features, model.prepare(body, "body25").features, atol=1e-6)


@pytest.mark.parametrize(("fps", "to", "frames"), [(25, 30, 11), (60, 30, 5), (30, 100, 31), (30, 30, 10)])
def test_resampling(fps, to, frames):
    times = np.arange(10) / fps
    result = resample(np.stack([times, 1 - 2 * times], axis=-1), fps, to)
    expected = np.arange(frames) / to
    assert len(result) == frames  # the last one is not after the last given, at 9 / fps
    np.testing.assert_allclose(result, np.stack([expected, 1 - 2 * expected], axis=-1), atol=1e-12)


def test_fps_are_those_of_the_option_or_the_file():
    model, array = predictor("tcg"), poses("kinect25", 3, frames=31)
    assert model.prepare(array, "kinect25", fps=30).length == 101
    known = CONVENTIONS["kinect25"].model_copy(update={"fps": 50.0})
    assert (model.prepare(array, known).length, model.prepare(array, known, fps=100).length) == (61, 31)
    assert model.prepare(array, "kinect25").length == 31


def test_missing_joints_are_refused_or_occluded_as_in_training():
    model, array = predictor("tcg"), poses("h36m17", 3)
    with pytest.raises(
        UserError, match="4 of the network's 17 joints: right_foot, right_hand, left_foot, left_hand"
    ):
        model.prepare(array, "h36m17")
    features = model.prepare(array, "h36m17", occlude_missing=True).features
    zero = {SKELETONS["tcg"].joints[joint] for joint in np.flatnonzero(~features.any(axis=(0, 2)))}
    assert zero == set(EXTREMITIES.split())
    mapped, missing = map_keypoints(array, CONVENTIONS["h36m17"], SKELETONS["tcg"])
    expected = PREPARATIONS["tcg"].features(mapped)
    expected[:, list(missing)] = 0  # what trgnet.data.augment does to the joints that it draws
    assert features.tobytes() == expected.tobytes()


def test_too_few_joints_or_no_reference_are_refused_even_then():
    joints = SKELETONS["tcg"].joints
    model, few = predictor("tcg"), Convention(name="few", joints=("hips", *joints[10:16]))
    with pytest.raises(UserError, match="at most 8 can be occluded"):
        model.prepare(np.ones((4, 7, 3)), few, occlude_missing=True)
    headless = Convention(name="arms", joints=("left_shoulder", "right_shoulder", "head"))
    with pytest.raises(UserError, match="does not tell hips, to which"):
        model.prepare(np.ones((4, 3, 3)), headless, occlude_missing=True)


@pytest.mark.parametrize(
    ("model", "convention", "channels", "message"),
    [
        ("pku", "body25", 2, "have 2 coordinates, but the network takes 3; lift them to 3-D"),
        ("pku", "coco17", 3, "have 2 coordinates, but the network takes 3; lift them to 3-D"),
        ("mcfs", "kinect25", 3, "have 3 coordinates, but the network takes 2; project them"),
    ],
)
def test_other_numbers_of_coordinates_are_refused(model, convention, channels, message):
    with pytest.raises(UserError, match=message):
        predictor(model).prepare(poses(convention, channels), convention)


def test_pixels_of_another_image():
    model, body = predictor("mcfs"), poses("body25", 2) * [1280, 720]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = model.prepare(body, "body25").features
        scaled = model.prepare(body * 1.5, "body25", image_size=(1920, 1080)).features
    np.testing.assert_allclose(scaled, expected, atol=1e-6)
    with pytest.warns(DataWarning, match="outside the training data's image of 1280 x 720"):
        model.prepare(body * 1.5, "body25")


def test_a_file_of_ones_own_joints(tmp_path: Path):
    layout = tmp_path / "suit.yaml"
    layout.write_text(
        "joints: [Pelvis, LHand, LShoulder, RShoulder]\naxes: v c t\nfps: 50\nmap: {head: [LShoulder, RShoulder], Left Elbow: LHand}\n"
    )
    suit = load_convention(layout)
    assert (suit.name, suit.fps) == ("suit", 50)
    array = np.random.default_rng(0).normal(size=(4, 3, 6))
    mapped, missing = map_keypoints(suit.array(array), suit, SKELETONS["tcg"])
    joint = dict(zip(SKELETONS["tcg"].joints, mapped.transpose(1, 0, 2)))
    np.testing.assert_allclose(joint["head"], array[2:].mean(axis=0).T)
    assert np.array_equal(joint["hips"], array[0].T) and np.array_equal(joint["left_elbow"], array[1].T)
    assert "left_knee" in {SKELETONS["tcg"].joints[index] for index in missing}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("joints: [a, A]", "joints must be distinct"),
        ("joints: [a]\naxes: t v", "axes must name t, v and c once each"),
        ("joints: [a]\nmap: {b: c}", "map: b must be made of joints of the file"),
        ("joints: [a]\nfpz: 3", "fpz: Extra inputs"),
        ("joints: [a", "no valid YAML"),
        ("- a", "expected keys such as 'joints:'"),
    ],
)
def test_layouts_that_are_none(tmp_path: Path, text, message):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(UserError, match=f"keypoint layout .*own.yaml: .*{message}") as error:
        load_convention(tmp_path / "own.yaml")
    assert "\n" not in str(error.value)


def test_a_map_must_name_joints_of_the_model_and_settle_doubts():
    with pytest.raises(UserError, match="the model has no joint 'hed'; did you mean 'head'"):
        map_keypoints(
            np.ones((1, 1, 3)), Convention(name="x", joints=("a",), map={"hed": "a"}), SKELETONS["tcg"]
        )
    with pytest.raises(UserError, match="'spine_base' could be any of pelvis, root; say which in map"):
        map_keypoints(np.ones((1, 2, 3)), Convention(name="x", joints=("pelvis", "root")), SKELETONS["pku"])


def test_csv_files(tmp_path: Path):
    own, file = Convention(name="own", joints=("left_hip", "head")), tmp_path / "a b.csv"
    file.write_text(
        "\ufeffhead_y,Left Hip_x,head_x,left_hip_y\r\n1,2,3,4\r\n5,,7,8\r\n", encoding="utf-8", newline=""
    )
    np.testing.assert_array_equal(read_keypoints(file, own), [[[2, 4], [3, 1]], [[np.nan, 8], [7, 5]]])
    file.write_text("1,2,3,4\n5,6,7,8\n")
    np.testing.assert_array_equal(read_keypoints(file, own), [[[1, 2], [3, 4]], [[5, 6], [7, 8]]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no frame"),
        ("left_hip_x,head_x\n", "no frame"),
        ("left_hip_x,tail_x\n1,2\n", "column 'tail_x' is no JOINT_CHANNEL"),
        ("left_hip_x,head_y\n1,2\n", "not a column of every channel for left_hip, head"),
        ("left_hip_x,LEFT_HIP_x\n1,2\n", "are the same"),
        ("1,2\n1,2,3\n", "line 2 has 3 columns, expected 2"),
        ("1,2\n1,two\n", "line 2: expected a number, got 'two'"),
        ("1,2,3\n", "line 1 has 3 columns, no multiple of 2 joints"),
    ],
)
def test_csv_files_that_cannot_be_used(tmp_path: Path, text, message):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match=f"a.csv: .*{message}"):
        read_keypoints(tmp_path / "a.csv", Convention(name="own", joints=("left_hip", "head")))


def test_arrays_of_npz_files(tmp_path: Path):
    file, kinect = tmp_path / "a.npz", CONVENTIONS["kinect25"]
    np.savez(file, other=np.zeros(1), positions=np.ones(2))
    assert read_keypoints(file, kinect).tolist() == [1, 1] and read_keypoints(
        file, kinect, "other"
    ).tolist() == [0]
    np.savez(file, a=np.zeros(1), b=np.ones(2))
    with pytest.raises(UserError, match="several arrays; it has a, b: say which with --array NAME"):
        read_keypoints(file, kinect)


def write_openpose(folder: Path, frames: list[list[np.ndarray]]) -> Path:
    folder.mkdir()
    for number, people in enumerate(frames):
        content = {"people": [{"pose_keypoints_2d": person.ravel().tolist()} for person in people]}
        (folder / f"walk_{number:012d}_keypoints.json").write_text(json.dumps(content))
    return folder


def test_openpose_folders(tmp_path: Path):
    body = poses("body25", 3).astype(np.float64)
    folder = write_openpose(tmp_path / "one", [[body[0]], [], [body[2]]])
    array = read_keypoints(folder, CONVENTIONS["body25"])
    assert np.array_equal(array[[0, 2]], body[[0, 2]]) and np.isnan(array[1]).all()
    folder = write_openpose(tmp_path / "two", [[body[0], body[1]], [body[1]]])
    with pytest.warns(DataWarning, match="1 of 2 frames have several people"):
        assert np.array_equal(read_keypoints(folder, CONVENTIONS["body25"]), body[:2])
    for content, message in (
        ("[]", "no list 'people'"),
        ('{"people": [{"pose_keypoints_2d": [1]}]}', "expected 75 numbers"),
    ):
        (folder / "walk_000000000001_keypoints.json").write_text(content)
        with pytest.raises(UserError, match=f"walk_000000000001_keypoints.json: .*{message}"):
            read_keypoints(folder, CONVENTIONS["body25"])


def test_the_command_line_takes_every_kind_of_file(tmp_path: Path, run, capsys):
    out, pku = tmp_path / "out", run("pku")
    np.save(tmp_path / "raw.npy", np.random.default_rng(0).normal(size=(20, 150)))
    assert cli.main(["predict", str(pku), str(tmp_path / "raw.npy"), "--out", str(out)]) == 0
    np.savez(tmp_path / "kinect.npz", keypoints=poses("kinect25", 3, 31))
    command = [
        "predict",
        str(pku),
        str(tmp_path / "kinect.npz"),
        "--input",
        "kinect25",
        "--fps",
        "15",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    timeline = json.loads((out / "kinect.json").read_text())
    assert (timeline["frames"], timeline["fps"]) == (61, 30)
    folder = write_openpose(tmp_path / "my walk", [[frame] for frame in poses("body25", 3)])
    command = [
        "predict",
        str(run("mcfs")),
        str(folder),
        "--input",
        "body25",
        "--image-size",
        "1x1",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    assert {path.stem for path in out.iterdir()} == {"raw", "kinect", "my walk"}


@pytest.mark.parametrize(
    ("model", "shape", "options", "message"),
    [
        ("pku", (4, 25, 3), ["--input", "kinect26"], "unknown input 'kinect26'; did you mean 'kinect25'?"),
        ("pku", (4, 24, 3), ["--input", "kinect25"], "expected the 25 joints of kinect25"),
        ("pku", (4, 25, 2), ["--input", "body25"], "lift them to 3-D first"),
        ("pku", (4, 17, 3), ["--input", "h36m17"], "does not tell 8 of the network's 25 joints: "),
        ("pku", (4, 150), ["--fps", "25"], "--fps is for keypoints; raw are taken as they are"),
        ("pku", (4, 149), [], "expected an array with the axes 't (m v c)'"),
        (
            "pku",
            (4, 25, 3),
            ["--input", "kinect25", "--image-size", "9x9"],
            "for a network that takes pixels",
        ),
        ("lara", (4, 25, 3), ["--input", "kinect25"], "more than a position"),
        ("mocap6", (4, 25, 3), ["--input", "kinect25"], "whose features come prepared"),
        ("pku", (4, 25, 3), ["--input", "none.yaml"], "No such file"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, run, capsys, model, shape, options, message):
    np.save(tmp_path / "a.npy", np.ones(shape))
    out = tmp_path / "out"
    assert cli.main(["predict", str(run(model)), str(tmp_path / "a.npy"), "--out", str(out), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("trgnet: error: ") and message in line
    assert "a.npy" in line or "--input" in options
    assert not out.exists()


@pytest.mark.parametrize("options", [["--fps", "0"], ["--fps", "nan"], ["--image-size", "9"]])
def test_wrong_options(capsys, options):
    with pytest.raises(SystemExit) as exit:
        cli.main(["predict", "run", "a.npy", *options])
    assert exit.value.code == 2 and "expected a" in capsys.readouterr().err
