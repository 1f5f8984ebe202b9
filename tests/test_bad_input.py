"""What users give by mistake, through the command line: exit code 2, one clear message, nothing written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import trgnet
from trgnet import trainer as trainer_module
from trgnet.cli import main
from trgnet.data import synthetic_dataset
from trgnet.errors import DataWarning


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that fails as it should."""
    assert main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr().err
    assert told.startswith("trgnet: error: ") and told.count("\n") == 1
    return told


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.nmae=mocap6", "unknown key 'data.nmae'; did you mean 'data.name'?"),
        ("data.name=LARa", "no data set 'LARa'; did you mean 'LARA'?"),
        ("data.root=/nowhere", "data set 'synthetic' has no option root"),
        ("data.options={root: here}", "has no option root"),
        ("train.epochs=many", "train.epochs: input should be a valid integer"),
        (
            "train.checkpoint_minutes=-1",
            "train.checkpoint_minutes: input should be greater than or equal to 0",
        ),
        ("train.batch_norm=global", "train.batch_norm: input should be 'synchronised' or 'local'"),
        ("train.best_on=train", "train.best_on: input should be 'validation' or 'test'"),
    ],
)
def test_settings(tmp_path, tiny_overrides, capsys, override, message):
    assert message in error_of(capsys, "train", "--out", tmp_path / "run", *tiny_overrides, override)
    assert not (tmp_path / "run").exists()


def test_data_that_is_nowhere(tmp_path, capsys):
    out = tmp_path / "run"
    assert "needs the option root; set data.root=..." in error_of(
        capsys, "train", "data.name=LARA", "--out", out
    )
    told = error_of(capsys, "train", "--config", "lara", "--data", tmp_path / "no data", "--out", out)
    assert f"{tmp_path / 'no data'}" in told
    assert not out.exists()


def test_embeddings_of_another_size(tmp_path, capsys):
    for name, shape in (("joints", (11, 8)), ("actions", (11, 8))):
        np.save(tmp_path / f"{name}.npy", np.ones(shape, np.float32))
    files = f"data.text=[{tmp_path}/joints.npy, {tmp_path}/actions.npy]"
    told = error_of(capsys, "train", "--out", tmp_path / "run", files)
    assert f"{tmp_path}/actions.npy" in told and "11" in told and "12" in told
    assert not (tmp_path / "run").exists()


def test_weights_and_checkpoints_of_another_training(run_copy, tmp_path, tiny_overrides, capsys):
    other = tmp_path / "other"
    assert main(["train", "--out", str(other), *tiny_overrides, "model.features=8", "train.epochs=1"]) == 0
    capsys.readouterr()
    for name in ("checkpoint.pt", "model.safetensors"):
        (run_copy / name).write_bytes((other / name).read_bytes())
    assert "is damaged or of another network" in error_of(capsys, "evaluate", run_copy)
    assert "is not of this training" in error_of(capsys, "train", "--resume", run_copy, "train.epochs=9")
    torch.save([1, 2], run_copy / "checkpoint.pt")
    assert "it holds list" in error_of(capsys, "train", "--resume", run_copy, "train.epochs=9")


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_the_shortest_recordings_work(tmp_path, tiny_overrides, frames):
    data = f"data.options={{recordings: 3, frames: {frames}, joints: 5, channels: 3, classes: 2, embedding_dim: 8}}"
    deep = ("model.layers=6", "model.refine_layers=6", "train.batch_size=8")  # dilation 32, and a short batch
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *tiny_overrides, data, *deep, "train.epochs=2"]) == 0
    prediction = trgnet.load(out).predict(np.zeros((3, 5, frames)))
    assert prediction.labels.shape == (frames,) and np.isfinite(prediction.probabilities).all()


def test_a_class_that_is_never_shown_is_a_warning(tmp_path, tiny, silent, monkeypatch):
    made = synthetic_dataset(recordings=6, frames=48, joints=5, channels=3, classes=3, embedding_dim=8)
    shown = tuple(
        replace(recording, labels=np.where(recording.labels == 1, 0, recording.labels))
        for recording in made.recordings
    )
    monkeypatch.setattr(trainer_module, "load_dataset", lambda *_, **__: replace(made, recordings=shown))
    with pytest.warns(
        DataWarning, match="no training recording shows motion_1; the network cannot learn what it never sees"
    ):
        trgnet.train(tiny("train.epochs=1"), out=tmp_path / "run", console=silent)


def test_the_best_epoch_on_test_is_labelled_so(tmp_path, tiny_overrides, capsys):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *tiny_overrides, "train.best_on=test"]) == 0
    assert "(chosen on it)" in capsys.readouterr().out
    assert '"best_on_test"' in (out / "scores.json").read_text() and (out / "best.safetensors").exists()


def test_a_warning_about_data_is_one_line(tmp_path, capsys, tiny_overrides, monkeypatch):
    made = synthetic_dataset(recordings=6, frames=48, joints=5, channels=3, classes=3, embedding_dim=8)
    shown = tuple(replace(recording, labels=np.minimum(recording.labels, 1)) for recording in made.recordings)
    monkeypatch.setattr(trainer_module, "load_dataset", lambda *_, **__: replace(made, recordings=shown))
    assert main(["train", "--out", str(tmp_path / "run"), *tiny_overrides, "train.epochs=1"]) == 0
    told = capsys.readouterr().err
    assert (
        told
        == "trgnet: warning: synthetic: no training recording shows motion_2; the network cannot learn what it never sees\n"
    )


def test_a_folder_where_a_file_is_expected(tmp_path, capsys):
    assert f"{tmp_path}" in error_of(capsys, "train", "--config", f"{tmp_path}/")
    assert Path(tmp_path).is_dir() and not list(tmp_path.iterdir())
