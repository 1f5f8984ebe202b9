"""The command that measures host time runs, and measures both ways to call an operator."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trgnet.kernels import operator

from bench import host
from bench.launches import PHASES, network_operators

pytest.importorskip("triton")


def test_the_table_is_printed_and_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    names = ("segment_mean", "dilated_residual")
    monkeypatch.setattr(host, "network_operators", lambda: list(names))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    host.main(["--rounds", "2", "--json", str(tmp_path / "host.json")])
    expected = [f"{name} {pass_}" for name in names for pass_ in ("forward", "backward")]
    printed = capsys.readouterr().out
    assert "host time in microseconds, without a GPU" in printed and all(what in printed for what in expected)
    rows = json.loads((tmp_path / "host.json").read_text())
    assert [row["what"] for row in rows] == [*expected, *PHASES, "step"]
    assert all(row["op"] > 0 and row["plain"] > 0 for row in rows)


@pytest.mark.parametrize(("way", "through_the_op"), [("op", True), ("plain", False)])
def test_both_ways_are_what_they_are_called(way: str, through_the_op: bool, monkeypatch: pytest.MonkeyPatch):
    op, calls = operator("dilated_residual"), []
    original = op.triton_op
    monkeypatch.setattr(op, "triton_op", lambda *args: calls.append(args) or original(*args))
    with host.called(way):
        host.operator_task("dilated_residual")()
    assert len(calls) == through_the_op


def test_every_operator_can_be_measured():
    with host.called("plain"):
        for name in network_operators():
            assert set(host.operator_task(name)()) == {f"{name} forward", f"{name} backward"}
