"""Training steps that are recorded and replayed are those that are done one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tape import Tape
from test_trainer import assert_equal
from torch import Tensor
from trgnet.kernels import use_backend
from trgnet.optimizers import builders

from trgnet import step_graphs
from trgnet import trainer as trainer_module
from trgnet.data import Batch, Recording, collate, synthetic_dataset
from trgnet.data.batch import bucket
from trgnet.errors import DataWarning, UserError
from trgnet.processes import Processes
from trgnet.runs import Run
from trgnet.step_graphs import StepGraphs, check_graphs
from trgnet.trainer import Trainer, resume, train

GRAPHS = (
    "train.cuda_graph=true", "data.options.shortest=20", "data.test=[]", "data.validation=0", "train.epochs=3",
)  # fmt: skip
NO_DROPOUT = tuple(f"model.{name}_dropout=0" for name in ("channel", "fusion", "attention", "output"))
ON_GPU = torch.cuda.is_available()


# ---------------------------------------------------------------- sizes


def test_sizes_are_few_and_at_most_an_eighth_too_large():
    for multiple in (1, 8, 16, 24):
        for size in range(1, 3000):
            rounded = bucket(size, multiple)
            up = -(-size // multiple) * multiple
            assert rounded % multiple == 0 and up <= rounded <= up + up / 8
    assert [bucket(size, 16) for size in (1, 128, 129, 250, 257, 6000)] == [16, 128, 144, 256, 288, 6144]
    assert bucket(0, 8) == 8
    assert len({bucket(size, 16) for size in range(1024, 8192)}) == 3 * 8 + 1


def test_batches_of_few_sizes_have_empty_segments_behind_the_real_ones():
    recordings = synthetic_dataset(recordings=3, frames=300, shortest=200, joints=3, channels=2).recordings
    plain, batch = collate(recordings), collate(recordings, buckets=True)
    count, frames = len(plain.segments), batch.x.shape[-1]
    assert frames == bucket(max(plain.lengths), 16) and len(batch.segments) == bucket(count, 8) > count
    for name in ("batch", "start", "length", "label"):
        assert torch.equal(getattr(batch.segments, name)[:count], getattr(plain.segments, name))
    padding = [getattr(batch.segments, name)[count:] for name in ("batch", "start", "length", "label")]
    assert [column.unique().tolist() for column in padding] == [[2], [frames], [0], [255]]
    unlabelled = collate([Recording("a", recordings[0].features)], buckets=True)
    assert len(unlabelled.segments) == 8 and not unlabelled.segments.length.any()


# ---------------------------------------------------------------- order


def batch_of(frames: int, names: tuple[str, ...] = ("r",)) -> Batch:
    rng = torch.Generator().manual_seed(frames)
    features = torch.randn(1, 1, frames, generator=rng).numpy()
    return collate([Recording(name, features, labels=None) for name in names], buckets=True)


def test_the_first_step_of_a_size_is_plain_the_second_recorded_the_others_replayed():
    done, tape = [], Tape()

    def step(batch: Batch) -> dict[str, Tensor]:
        done.append(batch.x.data_ptr())
        tape.log.append("step")
        return {"total": batch.x.sum() + 1}

    graphs = StepGraphs(step, torch.device("cpu"), tape)
    plain, recorded = ["step"], ["record", "step", "replay"]
    for frames, expected in [
        (16, plain),
        (30, plain),
        (9, recorded),
        (15, ["replay"]),
        (32, recorded),
        (2, ["replay"]),
    ]:
        tape.log.clear()
        batch = batch_of(frames)
        total = batch.x.sum() + 1
        assert torch.equal(graphs(batch)["total"], total)
        assert tape.log == expected
    assert len(done) == 4


def test_no_more_graphs_than_their_greatest_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 1)
    tape = Tape()
    graphs = StepGraphs(lambda batch: {"total": batch.x.sum()}, torch.device("cpu"), tape)
    with pytest.warns(DataWarning, match="more than 1 sizes of batches") as told:
        for frames in (16, 16, 32, 32, 32, 16):
            batch = batch_of(frames)
            assert torch.equal(graphs(batch)["total"], batch.x.sum())
    assert len(told) == 1
    assert tape.log == ["record", "replay", "replay"]


# ---------------------------------------------------------------- trainings


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """CPU trainings are set up as on a GPU, with tapes for CUDA graphs; the tapes that were used."""
    made: list[Tape] = []

    def tape(device: torch.device) -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(step_graphs, "CudaCapture", tape)
    monkeypatch.setattr(trainer_module, "check_graphs", lambda *_: None)
    monkeypatch.setattr(builders, "_on_gpu", lambda params: True)
    # A tape has operations of PyTorch, and no kernels.
    monkeypatch.setattr(builders, "fused_obstacle", lambda tensors: "Triton is not installed")
    with use_backend("reference"):  # as what is for CPUs alone does not run on a GPU, and is not recorded
        yield made


def train_without_graphs(config, out: Path, silent: Console) -> None:
    """The same batches, step by step."""
    trainer = Trainer.start(config, out, silent)
    trainer.graphs = None
    trainer.fit()


OPTIMIZERS = {
    "adam": ("optimizer.name=adam", "schedule.name=cosine", "schedule.warmup_epochs=1", "train.clip_norm=1"),
    "sgd": ("optimizer.name=sgd", "optimizer.weight_decay=0.1", "schedule.name=linear"),
    "lcam": ("optimizer.name=lcam", "optimizer.average=window", "optimizer.window=3", "schedule.name=linear"),
    "gated_smes": (
        "optimizer.name=gated_smes",
        "exponent.name=cosine",
        "exponent.final=0.3",
        "train.clip_norm=1",
    ),
}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_replayed_training_is_the_plain_one_bit_for_bit(
    tmp_path: Path, tiny: Callable, silent: Console, tapes: list[Tape], settings: tuple[str, ...]
):
    config = tiny(*GRAPHS, *settings)
    train_without_graphs(config, tmp_path / "plain", silent)
    train(config, out=tmp_path / "graphs", console=silent)
    (tape,) = (tape for tape in tapes if tape.log)
    assert tape.log.count("record") >= 2 and tape.log.count("replay") > tape.log.count("record")
    assert_equal(Run(tmp_path / "plain").checkpoint(), Run(tmp_path / "graphs").checkpoint())


def test_a_learning_rate_that_is_a_number_would_be_frozen(
    tmp_path: Path, tiny: Callable, silent: Console, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
):
    """The comparison above can fail."""
    monkeypatch.setattr(builders, "_on_gpu", lambda params: False)
    config = tiny(*GRAPHS, "optimizer.name=sgd", "schedule.name=linear")
    train_without_graphs(config, tmp_path / "plain", silent)
    train(config, out=tmp_path / "graphs", console=silent)
    with pytest.raises(AssertionError):
        assert_equal(Run(tmp_path / "plain").checkpoint(), Run(tmp_path / "graphs").checkpoint())


def test_a_continued_training_may_use_graphs_or_not(
    tmp_path: Path, tiny: Callable, silent: Console, tapes: list[Tape]
):
    settings = (*GRAPHS, "schedule.name=step", "schedule.step_epochs=1", "train.evaluate_every=9")
    train(tiny(*settings), out=tmp_path / "whole", console=silent)
    part = tmp_path / "part"
    train(tiny(*settings, "train.epochs=1", "train.final_epochs=1"), out=part, console=silent)
    resume(part, ["train.epochs=2", "train.cuda_graph=false"], console=silent)
    resume(part, ["train.epochs=3", "train.final_epochs=2", "train.cuda_graph=true"], console=silent)
    whole, parts = Run(tmp_path / "whole").checkpoint(), Run(part).checkpoint()
    groups = [state["optimizer"]["param_groups"][0] for state in (whole, parts)]
    assert groups[0] == groups[1] and type(groups[0]["lr"]) is float
    # Without graphs batches are padded less, and sums rounded differently.
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, rtol=2e-2, atol=2e-3)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "device", "count", "message"),
    [
        (
            [],
            "cpu",
            1,
            "train.cuda_graph needs a GPU, and this training is on cpu; set train.cuda_graph=false",
        ),
        ([], "cuda", 2, "is for one process, and here are 2; .*, or train on one GPU"),
        (["train.accumulate=3"], "cuda", 1, "train.accumulate is 3; .* set train.accumulate=1"),
        (["train.compile=true"], "cuda", 1, "exclude each other; .*, or train.compile=false"),
    ],
)
def test_what_graphs_do_not_go_with_is_refused(tiny: Callable, overrides, device, count, message):
    settings = tiny("train.cuda_graph=true", *overrides).train
    with pytest.raises(UserError, match=message):
        check_graphs(settings, torch.device(device), Processes(0, count))


def test_a_refused_training_leaves_no_folder(tmp_path: Path, tiny: Callable, silent: Console):
    with pytest.raises(UserError, match="train.cuda_graph needs a GPU"):
        train(tiny("train.cuda_graph=true"), out=tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_cuda_graphs_train_bit_for_bit_as_plain_steps(
    tmp_path: Path, tiny: Callable, silent: Console, settings: tuple[str, ...], precision: str
):
    config = tiny(*GRAPHS, *settings, *NO_DROPOUT, "train.device=cuda", f"train.precision={precision}")
    train_without_graphs(config, tmp_path / "plain", silent)
    train(config, out=tmp_path / "graphs", console=silent)
    plain, graphs = (Run(tmp_path / name).checkpoint() for name in ("plain", "graphs"))
    for part in ("model", "optimizer", "schedule", "scaler", "history"):
        assert_equal(plain[part], graphs[part], part)


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_cuda_graphs_draw_other_dropout_at_every_replay(tmp_path: Path, tiny: Callable, silent: Console):
    config = tiny("train.cuda_graph=true", "train.device=cuda", "optimizer.lr=1e-12")
    trainer = Trainer.start(config, tmp_path / "run", silent)
    trainer.model.train()
    batch = next(iter(trainer.loader))
    totals = {trainer.graphs(batch)["total"].item() for _ in range(6)}
    assert len(totals) == 6
