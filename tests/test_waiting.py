"""No training step waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from host_waits import DEVICE, HostWait, NoWaiting, pretended_gpu
from rich.console import Console
from torch import Tensor
from trgnet.kernels.launch import record_launches

from trgnet import step_graphs
from trgnet.progress import TrainingProgress
from trgnet.trainer import LossWatch, Trainer

FEW_STEPS = ("train.log_every=1000", "train.batch_size=1", "data.options.recordings=4")


class Looked(Exception):
    """The losses were read."""


def train_an_epoch(trainer: Trainer) -> None:
    """All steps of an epoch, up to the first look at the losses, which is at its end."""

    def look(watch: LossWatch) -> None:
        raise Looked

    trainer.watch, trainer.epoch = None, 1  # not the first: an optimizer is told of a new one
    with pytest.MonkeyPatch.context() as patch, TrainingProgress(trainer.console, 1) as progress:
        patch.setattr(LossWatch, "look", look)
        with pytest.raises(Looked):
            trainer._train_epoch(progress)


@pytest.mark.parametrize(
    ("triton", "settings"),
    [
        (False, ("optimizer.name=adamw", "train.accumulate=2", "train.clip_norm=1")),
        (False, ("optimizer.name=sgd", "train.precision=fp16", "train.clip_norm=1")),
        (True, ("optimizer.name=adam", "train.precision=fp16", "schedule.name=cosine")),
        (True, ("loss.class_weights=median_frequency", "train.checkpoint_minutes=0")),
        (False, ("optimizer.name=lcam", "train.accumulate=2", "optimizer.average=window")),
        (True, ("optimizer.name=smes", "train.precision=fp16", "exponent.name=linear")),
        (
            True,
            (
                "optimizer.name=gated_smes",
                "train.precision=fp16",
                "train.clip_norm=1",
                "optimizer.average=window",
            ),
        ),
    ],
)
def test_no_step_of_an_epoch_waits(
    tmp_path: Path, tiny: Callable, silent: Console, triton: bool, settings: tuple[str, ...]
):
    with pretended_gpu(triton), record_launches() as launches:
        config = tiny(*FEW_STEPS, *settings)
        trainer = Trainer.start(config, tmp_path / "run", silent)
        with NoWaiting() as waiting:
            train_an_epoch(trainer)
    assert trainer.step == trainer.steps_per_epoch >= 2
    assert waiting.seen > 1000
    assert bool(launches) == triton


@pytest.mark.parametrize(
    "settings",
    [
        ("train.precision=fp32",),
        ("train.precision=fp16",),
        ("optimizer.name=lcam", "optimizer.average=window"),
        ("optimizer.name=gated_smes", "exponent.name=cyclic"),
    ],
)
def test_a_recorded_step_copies_nothing_from_the_host(
    tmp_path: Path,
    tiny: Callable,
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
):
    recorded = []

    def capture(function: Callable) -> Callable:
        def replay() -> dict[str, Tensor]:
            recorded.append(function)
            with NoWaiting(copies=False):
                return function()

        return replay

    monkeypatch.setattr(step_graphs, "CudaCapture", lambda device: capture)
    with pretended_gpu():
        config = tiny(*FEW_STEPS, "train.cuda_graph=true", "train.clip_norm=1", *settings)
        trainer = Trainer.start(config, tmp_path / "run", silent)
        with NoWaiting():
            train_an_epoch(trainer)
    assert len(recorded) >= 1


def test_looks_at_the_loss_are_found(tmp_path: Path, tiny: Callable, silent: Console):
    """The walk above can fail: with a look at every step it does."""
    with pretended_gpu():
        trainer = Trainer.start(tiny("train.log_every=1"), tmp_path / "run", silent)
        with TrainingProgress(silent, 1) as progress, NoWaiting():
            with pytest.raises(HostWait, match="_to_copy.*: the device is read"):
                trainer._train_epoch(progress)


X, MASK = torch.ones(3, device=DEVICE), torch.ones(3, dtype=torch.bool, device=DEVICE)
WAITS = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "if": lambda: bool(MASK.any()),
    "equal": lambda: torch.equal(X, X),
    "nonzero": lambda: MASK.nonzero(),
    "where alone": lambda: torch.where(MASK),
    "mask as index": lambda: X[MASK],
    "assignment under a mask": lambda: X.clone().__setitem__(MASK, X),
    "masked_select": lambda: X.masked_select(MASK),
    "unique": lambda: X.unique(),
    "repeats on the device": lambda: X.repeat_interleave(torch.ones(3, dtype=torch.int64, device=DEVICE)),
    "to the host": lambda: X.cpu(),
    "to the host later": lambda: X.to("cpu", non_blocking=True),
    "copy_ to the host": lambda: torch.zeros(3).copy_(X),
    "a number as tensor": lambda: torch.tensor(1.0, device=DEVICE),
    "from the host": lambda: torch.ones(3).to(DEVICE),
    "copy_ from the host": lambda: X.clone().copy_(torch.ones(3)),
    "where with a tensor of the host": lambda: torch.where(MASK, X, torch.tensor(0.0)),
    "an index on the host": lambda: X.index_select(0, torch.zeros(1, dtype=torch.int64)),
}
DOES_NOT_WAIT = {
    "numbers": lambda: torch.where(MASK, X + 1, 0).masked_fill(MASK, 2).clamp(min=1),
    "a number on the device": lambda: torch.full((), 1.0, device=DEVICE),
    "from page-locked memory": lambda: torch.ones(3).to(DEVICE, non_blocking=True),
    "copy_ from page-locked memory": lambda: X.clone().copy_(torch.ones(3), non_blocking=True),
    "on the host": lambda: torch.ones(3)[torch.ones(3, dtype=torch.bool)].sum().item(),
    "an index on the device": lambda: X[torch.zeros(2, dtype=torch.int64, device=DEVICE)],
    "a part": lambda: X[1:],
}


@pytest.mark.parametrize("work", WAITS.values(), ids=WAITS.keys())
def test_waiting_is_found(work: Callable):
    with NoWaiting(), pytest.raises(HostWait):
        work()


@pytest.mark.parametrize("work", DOES_NOT_WAIT.values(), ids=DOES_NOT_WAIT.keys())
def test_what_does_not_wait_is_let_through(work: Callable):
    with NoWaiting():
        work()


def test_copies_within_a_recorded_step_are_found():
    with NoWaiting(copies=False), pytest.raises(HostWait, match="a copy from the host is recorded"):
        torch.ones(3).to(DEVICE, non_blocking=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cuda_graph", ["false", "true"])
def test_no_step_on_a_gpu_waits(
    tmp_path: Path, tiny: Callable, silent: Console, precision: str, cuda_graph: str
):
    config = tiny(
        "train.device=cuda", "train.log_every=1000", "train.clip_norm=1", "optimizer.name=adamw",
        f"train.precision={precision}", f"train.cuda_graph={cuda_graph}",
    )  # fmt: skip
    trainer = Trainer.start(config, tmp_path / "run", silent)
    for _ in range(2):  # compiles kernels, makes the optimizer's state, records graphs
        train_an_epoch(trainer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_an_epoch(trainer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.step == 3 * trainer.steps_per_epoch
