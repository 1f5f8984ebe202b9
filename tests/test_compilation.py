"""Trainings through torch.compile are the plain ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from rich.console import Console
from safetensors.torch import load_file
from test_trainer import assert_equal
from trgnet.kernels import backend

from trgnet import cli
from trgnet.compilation import compile_errors
from trgnet.errors import UserError
from trgnet.runs import Run
from trgnet.trainer import resume, train

SMALL = (
    "data.options.shortest=20", "data.options.frames=90", "data.test=[]", "model.layers=1", "model.refine_layers=1", "model.action_stages=1",
    "model.boundary_stages=1", "train.epochs=2",
)  # fmt: skip


@pytest.fixture
def compile_with(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], None]:
    """A function that chooses the compiler behind torch.compile."""
    torch._dynamo.reset()
    original = torch.compile
    return lambda backend: monkeypatch.setattr(torch, "compile", partial(original, backend=backend))


def test_a_compiled_training_is_the_plain_one(
    tmp_path: Path,
    tiny: Callable,
    tiny_overrides: tuple[str, ...],
    silent: Console,
    compile_with: Callable,
    monkeypatch: pytest.MonkeyPatch,
):
    """Compiled once, whatever the lengths of the batches. To the bit where both take the reference."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_with(counter)
    monkeypatch.setattr(backend, "_current", "reference")
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    train(tiny(*SMALL), out=plain, console=silent)
    assert counter.frame_count == 0
    assert cli.main(["train", "--compile", "--out", str(compiled), *tiny_overrides, *SMALL]) == 0
    assert counter.frame_count == 1
    assert Run(compiled).config().train.compile
    assert_equal(Run(plain).checkpoint(), Run(compiled).checkpoint())
    assert_equal(load_file(plain / "model.safetensors"), load_file(compiled / "model.safetensors"))

    more = ["train.epochs=3", "train.compile=false"]
    for run in (plain, compiled):
        resume(run, more, console=silent)
    assert_equal(Run(plain).checkpoint(), Run(compiled).checkpoint())


def test_a_compiler_that_fails_is_a_message(compile_with: Callable):
    def fails(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        raise RuntimeError("no gcc")

    compile_with(fails)
    with pytest.raises(
        UserError, match="train.compile: torch.compile failed with .*no gcc.*; set train.compile="
    ):
        with compile_errors():
            torch.compile(lambda x: x + 1)(torch.ones(2))


def test_a_platform_without_a_compiler_is_a_message(
    tmp_path: Path, tiny: Callable, silent: Console, monkeypatch: pytest.MonkeyPatch
):
    def unsupported(*_: Any, **__: Any) -> None:
        raise RuntimeError("Dynamo is not supported on Python 3.99")

    monkeypatch.setattr(torch, "compile", unsupported)
    with pytest.raises(
        UserError, match="train.compile cannot be used here: Dynamo is not.*3.99; set train.comp"
    ):
        train(tiny("train.compile=true"), out=tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()
