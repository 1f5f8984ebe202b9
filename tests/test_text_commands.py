"""The commands that embed descriptions and show how they relate."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from trgnet import text
from trgnet.cli import main
from trgnet.text import load_text, read_embeddings

TEXTS = {"joints": {"a": "An arm.", "b": "A leg."}, "actions": {"x": "A jump.", "y": "A walk."}}


@pytest.fixture(autouse=True)
def short_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the sentence encoder, which is an extra: the length of a text, and that of the encoder's name."""

    def embed(sentences: list[str], encoder: str | None = None) -> np.ndarray:
        return np.array([[len(s), ord(s[2]), len(encoder or "")] for s in sentences], np.float32)

    monkeypatch.setattr(text, "embed", embed)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "my texts.json"
    path.write_text(json.dumps(TEXTS), encoding="utf-8")
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the command refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("trgnet: error: ") and captured.err.count("\n") == 1
    return captured.err


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_rows_are_in_the_order_of_the_names(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["text", "embed", str(source)]) == 0
    out = source.with_name("my texts.npz")
    assert capsys.readouterr().out == f"{out}: 2 joints and 2 actions, 3 wide\n"
    known = read_embeddings(out)
    assert known.joints == ("a", "b") and known.actions == ("x", "y")
    np.testing.assert_array_equal(known.prior.joints, [[7, ord(" "), 0], [6, ord("l"), 0]])
    np.testing.assert_array_equal(load_text(out, ["b"], ["y", "x"]).actions, known.prior.actions[::-1])
    assert names_in(source.parent) == ["my texts.json", "my texts.npz"]


def test_encoder_and_out_are_passed_on_and_own_output_is_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "e.npz"
    assert main(["text", "embed", str(source), "--out", str(out)]) == 0
    assert main(["text", "embed", str(source), "--out", str(out), "--encoder", "four"]) == 0
    assert read_embeddings(out).prior.joints[0, 2] == 4


def write_data_folder(folder: Path, **change: object) -> Path:
    content = {
        "name": "mine",
        "fps": 30,
        "joints": ["a", "b"],
        "edges": [["b", "a"]],
        "root": "a",
        "classes": ["x", "y"],
        "recordings": "*.npy",
        "descriptions": TEXTS,
        **change,
    }
    folder.mkdir()
    (folder / "dataset.yaml").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("setting", "file"), [("text.npz", "text.npz"), ("e.npz", "e.npz"), ("none", "text.npz")]
)
def test_a_data_folder_gets_its_embeddings_where_it_expects_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str, file: str
) -> None:
    folder = write_data_folder(tmp_path / "my data", text=setting)
    message = f"has no {file}; write it with: trgnet text embed {folder}"
    assert message in error_of(capsys, "text", "show", folder)
    assert main(["text", "embed", str(folder)]) == 0
    known = read_embeddings(folder / file)
    assert (known.joints, known.actions) == (("a", "b"), ("x", "y"))
    np.testing.assert_array_equal(known.prior.actions[:, 0], [len("A jump."), len("A walk.")])
    assert main(["text", "show", str(folder)]) == 0
    assert names_in(folder) == sorted(["dataset.yaml", file, "text.png"])


def test_what_cannot_be_embedded(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = source.parent
    assert "no such.json" in error_of(capsys, "text", "embed", folder / "no such.json")
    source.write_bytes(b'{"joints": {"a": "\xff"}}')
    assert "byte 18 is no UTF-8" in error_of(capsys, "text", "embed", source)
    assert names_in(folder) == ["my texts.json"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [(ImportError("pip install 'trgnet[text]'"), "pip install"), (OSError("disk full"), "disk full")],
)
def test_a_failure_leaves_the_old_embeddings(
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: Exception,
    message: str,
) -> None:
    assert main(["text", "embed", str(source)]) == 0
    capsys.readouterr()
    before = source.with_suffix(".npz").read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setattr(
        *((text, "embed") if isinstance(fault, ImportError) else (np, "savez_compressed")), fail
    )
    assert message in error_of(capsys, "text", "embed", source)
    assert source.with_suffix(".npz").read_bytes() == before
    assert names_in(source.parent) == ["my texts.json", "my texts.npz"]


@pytest.mark.parametrize("command", ["embed", "show"])
def test_files_of_another_kind_are_never_replaced(
    source: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main(["text", "embed", str(source)]) == 0
    capsys.readouterr()
    ending = {"embed": ".npz", "show": ".png"}[command]
    given = source if command == "embed" else source.with_suffix(".npz")
    other = source.with_name(f"other{ending}")
    other.write_bytes(b"something else")
    assert f"is no {ending} file" in error_of(capsys, "text", command, given, "--out", other)
    assert other.read_bytes() == b"something else"
    assert f"ends in {ending}" in error_of(capsys, "text", command, given, "--out", source)
    folder = source.with_name(f"folder{ending}")
    folder.mkdir()
    assert "is a folder" in error_of(capsys, "text", command, given, "--out", folder)


def test_arrays_of_another_kind_are_never_replaced(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recording = source.with_name("recording.npz")
    np.savez(recording, features=np.ones(3))
    before = recording.read_bytes()
    assert "lack the arrays" in error_of(capsys, "text", "embed", source, "--out", recording)
    assert recording.read_bytes() == before


def test_show_draws_embeddings_and_lists_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = np.array([[0], [1], [4]], np.float32)
    names = np.array(["near", "nearer", "far"])
    np.savez(tmp_path / "e.npz", joints=points, actions=points, joint_names=names, action_names=names)
    assert main(["text", "show", str(tmp_path / "e.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "closest joints (1: equal, 0: the farthest pair)",
        "  0.75  near | nearer",
        "  0.25  nearer | far",
        "  0.00  near | far",
    ]
    assert lines[4].startswith("farthest joints") and lines[5] == "  0.00  near | far"
    assert lines[-1] == str(tmp_path / "e-text.png") and imread(tmp_path / "e-text.png").ndim == 3
    assert main(["text", "show", str(tmp_path / "e.npz")]) == 0  # its own picture is replaced


def test_show_takes_names_of_a_run_from_its_facts(run_copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = json.loads((run_copy / "run.json").read_text())["classes"]
    assert main(["text", "show", str(run_copy)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in classes) and (run_copy / "text.png").is_file()
    np.savez(run_copy / "prior.npz", joints=np.ones((2, 4), np.float32), actions=np.ones((3, 4), np.float32))
    assert "the run is damaged" in error_of(capsys, "text", "show", run_copy)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("mocap6", "ToeTouchOneHand | ToeTouchTwoHands"), ("PKU-view", "Put on a Hat/Cap | Take Off a Hat/Cap")],
)
def test_show_knows_the_data_sets_of_the_package(
    name: str,
    nearest: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["text", "show", name]) == 0
    assert (
        f"closest actions (1: equal, 0: the farthest pair)\n  0.{60 if name == 'mocap6' else 65}  {nearest}"
        in (capsys.readouterr().out)
    )
    assert names_in(tmp_path) == [f"{name}-text.png"]


def test_show_says_what_it_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'PKU-subject'?" in error_of(capsys, "text", "show", "PKU-subjects")
    assert "dataset.yaml" in error_of(capsys, "text", "show", tmp_path)
