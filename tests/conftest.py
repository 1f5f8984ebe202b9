from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # read when the kernels are declared: before trgnet is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests of kernels compare with the reference themselves.
os.environ.setdefault("TRGNET_VERIFY", "0")

from rich.console import Console

from trgnet.config import Config, load_config
from trgnet.trainer import Result, train

TINY = (
    "data.name=synthetic",
    "data.options={recordings: 6, frames: 48, joints: 5, channels: 3, classes: 3, embedding_dim: 8}",
    "model.features=16", "model.layers=2", "model.refine_layers=2", "model.hops=3",
    "train.epochs=4", "train.batch_size=2", "train.evaluate_every=2", "train.final_epochs=2",
    "train.checkpoint_every=1", "train.device=cpu", "optimizer.lr=0.01",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The tensors of the tests are small: more threads only wait for one another."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny():
    """A function that makes a configuration small enough to be trained in a test, with further overrides."""

    def make(*overrides: str) -> Config:
        return load_config(None, [*TINY, *overrides])

    return make


@pytest.fixture(scope="session")
def tiny_overrides() -> tuple[str, ...]:
    """The same as arguments of the command line."""
    return TINY


@pytest.fixture(scope="session")
def silent() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny, silent: Console) -> Result:
    """A finished training with a validation split. Tests must not write into its folder."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    return train(tiny("data.validation=0.3", "train.epochs=6"), out=out, console=silent)


@pytest.fixture
def run_copy(trained: Result, tmp_path: Path) -> Path:
    """A copy of the finished run folder, to be changed."""
    return Path(shutil.copytree(trained.path, tmp_path / "run"))


@pytest.fixture
def only_last_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the interpreter of every grid only the last program runs, as the last of all; where weights are packed, all do."""
    from trgnet.kernels.launch import launch
    from triton.runtime.interpreter import interpreter_builder as builder

    whole = {name: getattr(builder, name) for name in ("set_grid_dim", "set_grid_idx")}

    def last(*grid: int) -> None:
        monkeypatch.setattr(builder, "grid_dim", grid, raising=False)
        monkeypatch.setattr(builder, "grid_idx", tuple(size - 1 for size in grid), raising=False)

    def one(function: object, grid: tuple[int, ...], *args: object, **options: object) -> None:
        if "_pack_" in function.__name__:
            for name, setter in whole.items():
                monkeypatch.setattr(builder, name, setter)
            launch(function, grid, *args, **options)
            return
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: last(*grid, *(1,) * (3 - len(grid))))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: None)
        launch(function, (1,), *args, **options)

    for name, module in list(sys.modules.items()):
        if name.startswith("trgnet.kernels.") and vars(module).get("launch") is launch:
            monkeypatch.setattr(module, "launch", one)
