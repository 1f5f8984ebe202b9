"""Training from several seeds reports the mean and the spread of their scores."""

from __future__ import annotations

import json
from statistics import fmean, stdev

import pytest

from trgnet import cli
from trgnet.errors import UserError
from trgnet.seeds import Spread, train_seeds


def test_spread_of_two_seeds(tmp_path, tiny, silent):
    spreads = train_seeds(tiny("train.epochs=2"), [3, 5], out=tmp_path / "runs", console=silent)
    saved = [json.loads((tmp_path / f"runs/seed{seed}/scores.json").read_text())["test"] for seed in (3, 5)]
    assert spreads["test"].keys() == {"last_epoch", "mean_of_final_epochs"}
    for column, scores in spreads["test"].items():
        for name, spread in scores.items():
            values = [run[column][name] for run in saved]
            assert spread == Spread(fmean(values), stdev(values))
    summary = json.loads((tmp_path / "runs/seeds.json").read_text())
    accuracy = spreads["test"]["last_epoch"]["refined/accuracy"]
    assert summary["seeds"] == [3, 5]
    assert summary["test"]["last_epoch"]["refined/accuracy"] == vars(accuracy)
    assert len({(tmp_path / f"runs/seed{seed}/model.safetensors").read_bytes() for seed in (3, 5)}) == 2


def test_command_line(tmp_path, tiny_overrides, capsys):
    arguments = ["train", *tiny_overrides, "train.epochs=1", "--seeds", "7", "--out", str(tmp_path / "runs")]
    assert cli.main(arguments) == 0
    output = capsys.readouterr().out
    assert "mean ± standard deviation over the seeds 7" in " ".join(output.split())
    assert "± 0.0" in output and str(tmp_path / "runs/seeds.json") in output
    assert (tmp_path / "runs/seed7/scores.json").is_file()


@pytest.mark.parametrize("seeds", [[], [1, 2, 1]])
def test_seeds_must_be_different(seeds, tiny, silent, tmp_path):
    with pytest.raises(UserError, match="different numbers, at least one"):
        train_seeds(tiny(), seeds, out=tmp_path / "runs", console=silent)
    assert not (tmp_path / "runs").exists()


def test_every_seed_and_folder_is_checked_before_the_first_training(tiny, silent, tmp_path):
    with pytest.raises(UserError, match="override 'train.seed=-1': train.seed: input should be greater"):
        train_seeds(tiny(), [0, -1], out=tmp_path / "runs", console=silent)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "seed1").mkdir(parents=True)
    (tmp_path / "runs" / "seed1" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="seed1 is not empty"):
        train_seeds(tiny(), [0, 1], out=tmp_path / "runs", console=silent)
    assert not (tmp_path / "runs" / "seed0").exists()


def test_seeds_do_not_go_with_resume(capsys, run_copy):
    assert cli.main(["train", "--resume", str(run_copy), "--seeds", "0,1"]) == 2
    assert "--resume goes on in the run's own folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["train", "--seeds", "a,b"])
    assert "expected integers such as 0,1,2, got 'a,b'" in capsys.readouterr().err
