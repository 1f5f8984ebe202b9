from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trgnet import cli, trainer
from trgnet.runs import Run


@pytest.fixture
def run(trained, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained.path, tmp_path / "a run"))


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail as a user's mistake, and return its one line."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("trgnet: error: ")
    return line


def printed_paths(capsys: pytest.CaptureFixture[str]) -> list[Path]:
    return paths_in(capsys.readouterr().out)


def paths_in(output: str) -> list[Path]:
    return [path for path in map(Path, output.splitlines()) if path.is_absolute()]


def test_train_resume_evaluate_predict(tmp_path, capsys, tiny_overrides):
    run = tmp_path / "run"
    overrides = [*tiny_overrides, "train.epochs=2", "train.final_epochs=1"]
    # Overrides may stand before and behind options.
    assert cli.main(["train", *overrides[:3], "--out", str(run), *overrides[3:]]) == 0
    output = capsys.readouterr().out
    assert (
        "epoch 2/2" in output and "Test recordings" in output and "mean of" in output and "last 1" in output
    )
    paths = paths_in(output)
    assert {path.name for path in paths} >= {"checkpoint.pt", "scores.csv", "curves.png", "s2_r1.png"}
    assert all(path.is_file() for path in paths)
    assert Run(run).config().data.name == "synthetic"

    assert cli.main(["train", "--resume", str(run), "train.epochs=3"]) == 0
    assert "3 epochs from epoch 3 into" in capsys.readouterr().out
    assert len((run / "log.jsonl").read_text().splitlines()) == 3
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert "finished after 3 epochs, writing the report into" in capsys.readouterr().out

    assert cli.main(["evaluate", str(run)]) == 0
    assert all(path.is_file() and path.is_relative_to(run / "evaluation") for path in printed_paths(capsys))
    assert cli.main(["predict", str(run), "s2_r1"]) == 0
    assert [path.name for path in printed_paths(capsys)] == ["s2_r1.csv", "s2_r1.json", "s2_r1.png"]


@pytest.mark.parametrize(("split", "weights"), [("test", "last"), ("validation", "best"), ("train", "last")])
def test_evaluate_writes_scores_and_confusion(run, tmp_path, capsys, trained, split, weights):
    out = tmp_path / "scores of it"
    assert cli.main(["evaluate", str(run), "--split", split, "--weights", weights, "--out", str(out)]) == 0
    paths = printed_paths(capsys)
    names = Run(run).info().recordings[split]
    expected = [
        "scores.json",
        "scores.csv",
        "confusion.csv",
        "confusion.png",
        *(f"timelines/{n}.png" for n in names),
    ]
    assert [path.relative_to(out).as_posix() for path in paths] == expected
    assert all(path.stat().st_size > 0 for path in paths)

    scores = json.loads((out / "scores.json").read_text())[split][weights]
    if split in trained.scores:
        assert scores == trained.scores[split]["last_epoch" if weights == "last" else "best_on_validation"]
    rows = list(csv.DictReader((out / "scores.csv").open(newline="")))
    assert {row["score"]: float(row[weights]) for row in rows} == pytest.approx(scores, abs=1e-4)
    with (out / "confusion.csv").open(newline="") as file:
        header, *counts = csv.reader(file)
    assert header[1:] == [row[0] for row in counts] == list(Run(run).info().classes)
    assert sum(int(count) for row in counts for count in row[1:]) == 48 * len(names)


def test_predict_files(run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    np.save(tmp_path / "my motion.npy", rng.normal(size=(3, 5, 20)))
    np.savez(tmp_path / "known.npz", features=rng.normal(size=(3, 5, 7)), labels=np.zeros(7, int))
    out = tmp_path / "timelines"
    files = [str(tmp_path / "my motion.npy"), str(tmp_path / "known.npz"), "s0_r0"]
    assert cli.main(["predict", str(run), *files, "--out", str(out)]) == 0
    names = [
        f"{name}.{ending}" for name in ("my motion", "known", "s0_r0") for ending in ("csv", "json", "png")
    ]
    assert [path.name for path in printed_paths(capsys)] == names
    rows = list(csv.DictReader((out / "my motion.csv").open(newline="")))
    assert rows[0]["start"] == "0" and rows[-1]["end"] == "20"
    assert all(rows[i]["end"] == rows[i + 1]["start"] for i in range(len(rows) - 1))
    assert json.loads((out / "known.json").read_text())["frames"] == 7


def test_names_are_shown_as_they_are(run, tmp_path, capsys):
    """Neither formulas of matplotlib nor markup of rich."""
    for name in ("a$^$", "[b]"):
        file, out = tmp_path / f"{name}.npy", tmp_path / "out"
        np.save(file, np.random.default_rng(0).normal(size=(3, 5, 20)))
        assert cli.main(["predict", str(run), str(file), "--out", str(out)]) == 0
        assert [path.name for path in printed_paths(capsys)] == [
            f"{name}.{end}" for end in ("csv", "json", "png")
        ]
    (tmp_path / "[").mkdir()
    moved = run.rename(tmp_path / "[" / "c]")
    assert cli.main(["train", "--resume", str(moved)]) == 0
    assert moved / "scores.csv" in printed_paths(capsys)


def test_tables_are_whole_on_a_narrow_terminal(run, capsys, monkeypatch):
    tables = []
    for columns in ("200", "30"):
        monkeypatch.setenv("COLUMNS", columns)
        assert cli.main(["evaluate", str(run)]) == 0
        # From the heading on: the title above it is wrapped to the width of the table.
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        tables.append(lines[next(i for i, line in enumerate(lines) if "score [%]" in line) :])
    assert tables[0] == tables[1]
    assert cli.main(["info"]) == 0
    assert "…" not in capsys.readouterr().out


def test_mistakes_are_one_line_and_exit_code_2(run, tmp_path, capsys):
    assert "did you mean 'train.epochs'?" in error_of(capsys, "train", "train.epoch=3")
    assert "unknown configuration 'mocap7'; did you mean 'mocap6'?" in error_of(
        capsys, "train", "--config", "mocap7"
    )
    assert "No such file" in error_of(capsys, "train", "--config", tmp_path / "none.yaml")
    assert "is not empty" in error_of(capsys, "train", "--out", run)
    assert "goes on in the run's own folder" in error_of(capsys, "train", "--resume", run, "--out", run)
    assert "is no run folder" in error_of(capsys, "train", "--resume", tmp_path / "none")
    assert "is no run folder" in error_of(capsys, "evaluate", tmp_path)
    assert "is neither a .npy or .npz file nor a recording" in error_of(capsys, "predict", run, "s9_r9")
    assert "No such file" in error_of(capsys, "predict", run, tmp_path / "none.npy")
    assert "several recordings are called s0_r0" in error_of(capsys, "predict", run, "s0_r0", "s0_r0")
    for device in ("nonsense", "meta"):
        assert f" device={device} cannot be used here" in error_of(
            capsys, "evaluate", run, "--device", device
        )


def test_cuda_graphs_are_refused_by_name(run, tmp_path, capsys, tiny_overrides):
    message = "train.cuda_graph needs a GPU, and this training is on cpu; set train.cuda_graph=auto"
    arguments = ["train", "--cuda-graph", "--out", tmp_path / "run", *tiny_overrides]
    assert message in error_of(capsys, *arguments)
    assert message in error_of(capsys, "train", "--resume", run, "--cuda-graph", "train.epochs=9")
    assert not (tmp_path / "run").exists() and Run(run).config().train.cuda_graph == "auto"


def test_cuda_graphs_are_asked_for_and_refused_on_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(cli, "_start_training", lambda options, overrides: seen.append(overrides))
    for arguments in (["--cuda-graph"], ["--no-cuda-graph"], []):
        assert cli.main(["train", *arguments]) == 0
    assert seen == [["train.cuda_graph=true"], ["train.cuda_graph=false"], []]


def test_no_validation_recordings_to_evaluate(tmp_path, capsys, tiny_overrides):
    out = tmp_path / "run"
    assert cli.main(["train", "--out", str(out), *tiny_overrides, "train.epochs=1"]) == 0
    capsys.readouterr()
    assert "has no validation recordings" in error_of(capsys, "evaluate", out, "--split", "validation")
    assert "use the weights 'last'" in error_of(capsys, "evaluate", out, "--weights", "best")


def test_nothing_is_written_over_where_a_file_is_in_the_way(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert "file" in error_of(capsys, "predict", run, "s0_r0", "--out", tmp_path / "file")
    assert "file" in error_of(capsys, "train", "--out", tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "mine"


def test_faults_of_the_program_keep_their_traceback(run, monkeypatch):
    def fault(*arguments):
        raise ValueError("a fault")

    monkeypatch.setattr(trainer.Trainer, "_step", fault)
    monkeypatch.setattr(Run, "checkpoint", lambda self: None)
    with pytest.raises(ValueError, match="a fault"):
        cli.main(["train", "--resume", str(run)])


def test_interruption(run, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_step", interrupt)
    assert cli.main(["train", "--resume", str(run), "train.epochs=9"]) == 130
    captured = capsys.readouterr()
    assert f"after epoch 6. Continue with: trgnet train --resume '{run}'" in captured.err


def test_info(capsys):
    assert cli.main(["info"]) == 0
    output = capsys.readouterr().out
    assert torch.__version__.split("+")[0] in output
    assert "TRGNET_BACKEND" in output and "attention_layer" in output and "reference" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required"),
        (["fly"], "invalid choice: 'fly'"),
        (["evaluate"], "RUN"),
        (["predict", "run"], "FILE"),
        (["evaluate", "run", "--split", "all"], "invalid choice: 'all'"),
        (["evaluate", "run", "more"], "unrecognized arguments: more"),
        (["train", "--epochs", "3"], "unrecognized arguments: --epochs"),
        (["train", "--seed", "3"], "unrecognized arguments: --seed"),
        (["--vers", "info"], "unrecognized arguments: --vers"),
    ],
)
def test_wrong_usage(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_help_answers_without_importing_torch():
    program = (
        "import sys; from trgnet import cli\n"
        "try: cli.main(['train', '--help'])\n"
        "finally: print('torch' in sys.modules)\n"
    )
    result = python("-c", program)
    assert result.returncode == 0, result.stderr
    assert "SECTION.KEY=VALUE" in result.stdout and result.stdout.endswith("False\n")


def test_unknown_backend_is_the_users_mistake():
    result = python("-m", "trgnet", "info", TRGNET_BACKEND="cuda")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "unknown backend 'cuda'; expected one of auto, reference" in result.stderr
