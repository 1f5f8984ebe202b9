from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import trgnet
from trgnet.data import IGNORE, Recording, collate
from trgnet.errors import UserError
from trgnet.predictor import Prediction, Predictor, read_recording
from trgnet.refine import refine
from trgnet.runs import Run
from trgnet.trainer import read_dataset


@pytest.fixture(scope="module")
def predictor(trained) -> Predictor:
    return trgnet.load(trained.path)


@pytest.fixture(scope="module")
def recording(tiny) -> Recording:
    return read_dataset(tiny()).recordings[0]


def test_prediction_is_the_networks_output_decoded(predictor, recording):
    batch = collate([recording], pad_multiple=1)
    with torch.no_grad():
        class_logits, boundary_logits = predictor.model.eval()(batch.x, batch.mask, predictor.joint_graph)
    prediction = predictor.predict(recording)
    np.testing.assert_allclose(prediction.probabilities, class_logits[0].softmax(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        prediction.boundary_probability, boundary_logits[0, 0].sigmoid(), rtol=1e-4, atol=1e-6
    )
    assert np.array_equal(prediction.frame_labels, class_logits[0].argmax(0))
    assert np.array_equal(prediction.labels, refine(class_logits[0].numpy(), boundary_logits[0, 0].numpy()))
    assert prediction.labels.dtype == np.int64
    assert np.array_equal(prediction.truth, recording.labels)


def test_plain_features_of_any_number_type(predictor, recording):
    expected = predictor.predict(recording)
    for features in (
        recording.features.astype(np.float64),
        torch.from_numpy(recording.features),
        recording.features.tolist(),
    ):
        prediction = predictor.predict(features)
        assert np.array_equal(prediction.probabilities, expected.probabilities)
        assert prediction.truth is None


def test_a_predictor_leaves_the_networks_mode_alone(predictor, recording):
    predictor.model.train()
    before = predictor.predict(recording)
    assert predictor.model.training
    predictor.model.eval()
    assert np.array_equal(predictor.predict(recording).probabilities, before.probabilities)


@pytest.fixture
def prediction() -> Prediction:
    probabilities = np.array([[0.75, 0.5, 0.25, 0.25, 1.0], [0.25, 0.5, 0.75, 0.75, 0.0]], np.float32)
    return Prediction(
        name="r",
        labels=np.array([0, 0, 1, 1, 0]),
        frame_labels=np.array([0, 0, 1, 1, 0]),
        probabilities=probabilities,
        boundary_probability=np.zeros(5, np.float32),
        classes=("sit", "run, fast"),
        fps=2.0,
        truth=np.array([0, 0, 0, 1, IGNORE]),
    )


def test_segments(prediction):
    assert [
        (s.start, s.end, s.start_seconds, s.end_seconds, s.label, s.name, s.confidence)
        for s in prediction.segments
    ] == [
        (0, 2, 0.0, 1.0, 0, "sit", 0.625),
        (2, 4, 1.0, 2.0, 1, "run, fast", 0.75),
        (4, 5, 2.0, 2.5, 0, "sit", 1.0),
    ]


def test_timeline_files(prediction, tmp_path: Path):
    prediction.to_csv(tmp_path / "out" / "r.csv")
    prediction.to_json(tmp_path / "out" / "r.json")
    prediction.plot(tmp_path / "out" / "r.png")
    rows = list(csv.DictReader((tmp_path / "out" / "r.csv").open(newline="")))
    assert rows[1] == {
        "start": "2",
        "end": "4",
        "start_seconds": "1.0000",
        "end_seconds": "2.0000",
        "label": "1",
        "name": "run, fast",
        "confidence": "0.7500",
    }
    content = json.loads((tmp_path / "out" / "r.json").read_text())
    assert (content["recording"], content["fps"], content["frames"], len(content["segments"])) == (
        "r",
        2.0,
        5,
        3,
    )
    assert content["segments"][0] == {
        "start": 0,
        "end": 2,
        "start_seconds": 0.0,
        "end_seconds": 1.0,
        "label": 0,
        "name": "sit",
        "confidence": 0.625,
    }
    assert (tmp_path / "out" / "r.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["r.csv", "r.json", "r.png"]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((3, 5)), r"must be \(C, V, T\), not empty, got \(3, 5\)"),
        (np.zeros((3, 5, 0)), "not empty"),
        (
            np.zeros((3, 4, 9)),
            "has 3 channels and 4 joints, but the network was trained on 3 channels and 5 joints",
        ),
        (np.zeros((9, 5, 3)), "has 9 channels and 5 joints.*must be \\(channels, joints, frames\\)"),
        (np.full((3, 5, 9), np.nan), "135 features are not finite, the first at channel 0, joint 0, frame 0"),
        (np.zeros((3, 5, 9), dtype=complex), "must be real numbers, got an array of complex128"),
        (np.full((3, 5, 9), "a"), "must be real numbers"),
        (
            np.full((3, 5, 9), 3e38),
            "output for recording 'recording' is not finite; its features reach 3e\\+38",
        ),
        (
            Recording("r", np.zeros((3, 5, 2), np.float32), np.array([0, 3])),
            "has label 3, but the network knows 3 classes",
        ),
    ],
)
def test_unusable_input_is_refused(predictor, features, message):
    with pytest.raises(UserError, match=message):
        predictor.predict(features)


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17])
def test_any_length(predictor, frames):
    prediction = predictor.predict(np.random.default_rng(0).normal(size=(3, 5, frames)))
    assert prediction.labels.shape == (frames,)
    assert np.isfinite(prediction.probabilities).all()


def test_reading_recordings(tmp_path: Path, recording):
    np.save(tmp_path / "plain.npy", recording.features)
    np.savez(
        tmp_path / "with labels.npz",
        features=recording.features.astype(np.float64),
        labels=recording.labels.astype(np.int16),
    )
    plain, labelled = read_recording(tmp_path / "plain.npy"), read_recording(tmp_path / "with labels.npz")
    assert (plain.name, labelled.name) == ("plain", "with labels")
    assert np.array_equal(plain.features, recording.features) and plain.labels is None
    assert np.array_equal(labelled.features, recording.features) and np.array_equal(
        labelled.labels, recording.labels
    )


class Evil:
    """An object whose unpickling leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_unreadable_recordings(tmp_path: Path):
    with pytest.raises(UserError, match="No such file"):
        read_recording(tmp_path / "none.npy")
    with pytest.raises(UserError, match="expected a file that ends in .npy"):
        read_recording(tmp_path / "motion.bvh")
    (tmp_path / "broken.npy").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="file .*broken.npy: "):
        read_recording(tmp_path / "broken.npy")
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04nonsense")
    with pytest.raises(UserError, match="file .*broken.npz: "):
        read_recording(tmp_path / "broken.npz")
    (tmp_path / "text.npy").write_text("0.5 0.25\n")
    with pytest.raises(
        UserError, match="text.npy: the file is damaged or holds something else than arrays of"
    ):
        read_recording(tmp_path / "text.npy")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(UserError, match="has no array 'features'; it has x"):
        read_recording(tmp_path / "other.npz")
    np.savez(tmp_path / "lengths.npz", features=np.zeros((1, 1, 3)), labels=np.zeros(4, int))
    with pytest.raises(UserError, match="one per frame"):
        read_recording(tmp_path / "lengths.npz")
    np.save(tmp_path / "evil.npy", np.array([Evil(tmp_path / "touched")], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="something else than arrays of numbers") as error:
        read_recording(tmp_path / "evil.npy")
    assert "pickle" not in str(error.value)  # numpy's message is how to run what the file holds
    assert not (tmp_path / "touched").exists()


def test_load_refuses_what_is_no_run(tmp_path: Path, run_copy: Path):
    with pytest.raises(UserError, match="is no run folder: it has no config.yaml, prior.npz, run.json"):
        trgnet.load(tmp_path / "nothing")
    with pytest.raises(UserError, match="unknown weights 'first': expected last or best"):
        trgnet.load(run_copy, weights="first")
    (run_copy / "model.safetensors").write_bytes((run_copy / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="model.safetensors is damaged or of another network"):
        trgnet.load(run_copy)
    (run_copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="has no model.safetensors: continue the training with --resume"):
        trgnet.load(run_copy)
    (run_copy / "best.safetensors").unlink()
    with pytest.raises(UserError, match="has no best.safetensors: continue the training with --resume"):
        trgnet.load(run_copy, weights="best")


@pytest.mark.parametrize("device", ["nonsense", "meta"])
def test_devices_that_cannot_compute_are_refused(trained, device):
    with pytest.raises(UserError, match=f"^device={device} cannot be used here: ") as error:
        trgnet.load(trained.path, device=device)
    assert "\n" not in str(error.value)


def test_weights_of_another_network_are_refused(run_copy: Path, tiny):
    config = Run.open(run_copy).config()
    trgnet.config.save_config(
        trgnet.config.with_overrides(config, ["model.features=32"]), run_copy / "config.yaml"
    )
    with pytest.raises(UserError, match="damaged or of another network: .*size mismatch"):
        trgnet.load(run_copy)


def test_a_run_folder_is_complete_in_itself(run_copy: Path, recording, predictor):
    moved = run_copy.rename(run_copy.with_name("renamed run"))
    (moved / "checkpoint.pt").unlink()
    assert np.array_equal(
        trgnet.load(moved).predict(recording).probabilities, predictor.predict(recording).probabilities
    )
