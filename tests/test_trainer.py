from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from trgnet.kernels.loss_gate import AVERAGE, COUNT, HIGH_STEPS, LOW_STEPS, REST

from trgnet import trainer as trainer_module
from trgnet.data import IGNORE, Recording, collate, synthetic_dataset
from trgnet.errors import UserError
from trgnet.evaluation import evaluate
from trgnet.predictor import load
from trgnet.processes import Processes
from trgnet.runs import Run
from trgnet.trainer import (
    EpochBatches,
    LossWatch,
    NonFiniteTraining,
    Trainer,
    boundary_weight,
    median_frequency_weights,
    read_dataset,
    resume,
    train,
)

TIMES = ("seconds", "frames_per_second")


def log_of(path: Path) -> list[dict[str, float]]:
    """The log without the measured times."""
    records = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


def assert_equal(a: object, b: object, place: str = "state") -> None:
    """Nested dictionaries, lists, numbers and tensors are equal bit for bit."""
    assert type(a) is type(b), place
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for key in a:
            if key not in TIMES:
                assert_equal(a[key], b[key], f"{place}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), place
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{place}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), place
    else:
        assert a == b, place


def assert_same_training(first: Path, second: Path) -> None:
    assert_equal(Run(first).checkpoint(), Run(second).checkpoint())
    assert_equal(load_file(first / "model.safetensors"), load_file(second / "model.safetensors"))
    assert log_of(first) == log_of(second)
    assert json.loads((first / "scores.json").read_text()) == json.loads((second / "scores.json").read_text())


# What a run leaves behind


def test_run_folder_holds_everything(trained):
    for name in (
        "config.yaml",
        "run.json",
        "prior.npz",
        "checkpoint.pt",
        "model.safetensors",
        "best.safetensors",
        "log.jsonl",
        "curves.png",
        "scores.json",
        "scores.csv",
        "confusion.csv",
        "confusion.png",
        "timelines/s2_r1.png",
    ):
        assert (trained.path / name).stat().st_size > 0, name
    assert list((trained.path / "tensorboard").glob("events.*"))
    assert not list(trained.path.rglob(".partial-*"))


def test_run_facts(trained, tiny):
    info, dataset = Run.open(trained.path).info(), read_dataset(tiny())
    assert (info.dataset, info.classes, info.skeleton) == ("synthetic", dataset.classes, dataset.skeleton)
    assert (info.channels, info.embedding_dim, info.fps) == (3, 8, 30.0)
    assert info.recordings["test"] == dataset.test
    assert sorted(sum(info.recordings.values(), ())) == sorted(r.name for r in dataset.recordings)
    assert info.versions["torch"] == torch.__version__


def test_every_epoch_is_logged_once_and_the_final_ones_are_evaluated(trained):
    records = log_of(trained.path)
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert [record["epoch"] for record in records if "test/refined/accuracy" in record] == [2, 4, 5, 6]
    assert {
        "loss/total",
        "loss/cross_entropy",
        "loss/boundary",
        "loss/absolute",
        "loss/relative",
        "lr",
    } <= set(records[0])


def test_training_learns(trained):
    records = log_of(trained.path)
    assert records[-1]["loss/total"] < 0.9 * records[0]["loss/total"]


def test_scores_are_last_mean_and_best_on_validation(trained):
    records = log_of(trained.path)
    evaluated = [record for record in records if "validation/refined/f1@50" in record]
    best = max(evaluated, key=lambda record: record["validation/refined/f1@50"])  # the first of equal ones
    for part in ("test", "validation"):
        scores = trained.scores[part]
        for name in ("frame/accuracy", "refined/accuracy", "refined/edit", "refined/f1@50", "boundary/f1"):
            key = f"{part}/{name}"
            assert scores["last_epoch"][name] == records[-1][key]
            assert scores["mean_of_final_epochs"][name] == pytest.approx(
                (records[-1][key] + records[-2][key]) / 2
            )
            assert scores["best_on_validation"][name] == best[key]
    saved = json.loads((trained.path / "scores.json").read_text())
    assert (saved["epochs"], saved["final_epochs"], saved["best_epoch"]) == (6, 2, best["epoch"])
    assert saved["test"] == trained.scores["test"]


@pytest.mark.parametrize(("weights", "column"), [("last", "last_epoch"), ("best", "best_on_validation")])
def test_saved_weights_score_what_the_training_said(trained, tiny, weights, column):
    predictor = load(trained.path, weights=weights)
    tested = [r for r in read_dataset(tiny()).recordings if r.name in predictor.info.recordings["test"]]
    assert evaluate(predictor, tested).scores == trained.scores["test"][column]


def test_without_validation_there_is_no_best(tmp_path, tiny, silent):
    result = train(tiny("train.epochs=1"), out=tmp_path / "run", console=silent)
    assert set(result.scores) == {"test"}
    assert set(result.scores["test"]) == {"last_epoch", "mean_of_final_epochs"}
    assert not (tmp_path / "run" / "best.safetensors").exists()


def test_training_without_anything_to_evaluate(tmp_path, tiny, silent):
    assert train(tiny("data.test=[]", "train.epochs=1"), out=tmp_path / "run", console=silent).scores == {}


def test_folder_with_something_in_it_is_refused_and_left_alone(tmp_path, tiny, silent):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match="is not empty; choose another with --out, or continue it with --resume"
    ):
        train(tiny(), out=tmp_path, console=silent)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


# Repeatable and resumable


def test_the_seed_decides_everything(tmp_path, tiny, silent):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tiny(f"train.seed={seed}", "train.epochs=2"), out=tmp_path / name, console=silent)
    assert_same_training(tmp_path / "a", tmp_path / "b")
    assert log_of(tmp_path / "a") != log_of(tmp_path / "c")


def test_two_and_two_epochs_are_four(tmp_path, tiny, silent):
    settings = (
        "data.validation=0.3",
        "train.final_epochs=1",
        "train.evaluate_every=1",
        "optimizer.weight_decay=0.01",
    )
    train(tiny(*settings, "train.epochs=4"), out=tmp_path / "whole", console=silent)
    train(tiny(*settings, "train.epochs=2"), out=tmp_path / "halves", console=silent)
    resume(tmp_path / "halves", ["train.epochs=4"], console=silent)
    assert_same_training(tmp_path / "whole", tmp_path / "halves")
    assert Run(tmp_path / "halves").config() == Run(tmp_path / "whole").config()


INTERRUPTED = (
    "data.validation=0.3",
    "schedule.name=cosine",
    "schedule.warmup_epochs=1",
    "optimizer.name=sgd",
    "train.checkpoint_every=2",
    "train.clip_norm=1",
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny, silent) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    return train(tiny(*INTERRUPTED), out=out, console=silent).path


@pytest.mark.parametrize(
    ("method", "call"),
    [("_step", 1), ("_step", 4), ("_step", 6), ("_log", 3), ("_save", 1), ("_save", 2), ("_report", 1)],
)
def test_interrupted_training_continues_as_if_nothing_had_happened(
    tmp_path, tiny, silent, monkeypatch, uninterrupted, method, call
):
    original, calls = getattr(Trainer, method), []

    def interrupted(self, *arguments):
        calls.append(method)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, method, interrupted)
        train(tiny(*INTERRUPTED), out=tmp_path / "run", console=silent)
    torch.manual_seed(12345)
    resume(tmp_path / "run", console=silent)
    assert_same_training(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.name=lcam", "train.accumulate=2", "train.batch_size=1"),
        (
            "optimizer.name=gated_smes",
            "exponent.name=cyclic",
            "exponent.period_epochs=1",
            "exponent.final=0.3",
        ),
    ],
    ids=["lcam", "gated_smes"],
)
def test_a_gated_training_continues_within_an_epoch_and_between_two(
    tmp_path, tiny, silent, monkeypatch, settings
):
    config = tiny(*settings, "train.epochs=3", "train.checkpoint_minutes=0", "data.test=[s0_r0]")
    train(config, out=tmp_path / "whole", console=silent)
    original, calls = Trainer._step, []

    def interrupted(self, *arguments):
        calls.append(self.watch.batches)
        if len(calls) in (5, 8):  # in the middle of the second epoch; before the first step of the third
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config, out=tmp_path / "parts", console=silent)
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "parts", console=silent)
    resume(tmp_path / "parts", console=silent)
    batches = 2 if "train.accumulate=2" in settings else 1
    assert calls == [batches * i for i in (0, 1, 2, 0, 1, 1, 2, 0, 0, 1, 2)]
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_weights_lost_after_the_checkpoint_are_written_again(run_copy, trained, silent):
    for name in ("model.safetensors", "best.safetensors"):
        (run_copy / name).unlink()
    events = sorted((run_copy / "tensorboard").iterdir())
    resume(run_copy, console=silent)
    assert_same_training(run_copy, trained.path)
    assert_equal(load_file(run_copy / "best.safetensors"), load_file(trained.path / "best.safetensors"))
    assert sorted((run_copy / "tensorboard").iterdir()) == events


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_of_all_steps_cannot_be_extended(tmp_path, tiny, silent, schedule):
    run = train(
        tiny(f"schedule.name={schedule}", "train.epochs=1"), out=tmp_path / "run", console=silent
    ).path
    with pytest.raises(
        UserError, match=f"cannot change from 1 to 2: with schedule.name={schedule} the learn"
    ):
        resume(run, ["train.epochs=2"], console=silent)
    assert Run(run).config().train.epochs == 1


@pytest.mark.parametrize("schedule", ["constant", "step"])
def test_other_schedules_are_extended_to_the_longer_training(tmp_path, tiny, silent, schedule):
    settings = (
        f"schedule.name={schedule}",
        "schedule.step_epochs=1",
        "schedule.warmup_epochs=1",
        "data.test=[]",
    )
    train(tiny(*settings, "train.epochs=3"), out=tmp_path / "whole", console=silent)
    train(tiny(*settings, "train.epochs=2"), out=tmp_path / "parts", console=silent)
    resume(tmp_path / "parts", ["train.epochs=3"], console=silent)
    assert_equal(Run(tmp_path / "whole").checkpoint(), Run(tmp_path / "parts").checkpoint())


def test_only_epochs_with_scores_are_averaged_and_counted(tmp_path, tiny):
    screen = io.StringIO()
    settings = ("train.epochs=2", "train.final_epochs=1", "train.evaluate_every=9")
    train(tiny(*settings), out=tmp_path / "run", console=Console(file=screen))
    result = resume(
        tmp_path / "run", ["train.epochs=3", "train.final_epochs=3"], console=Console(file=screen)
    )
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["final_epochs"] == 2
    assert "last 1" in screen.getvalue() and "last 2" in screen.getvalue()
    key = "test/refined/accuracy"
    values = [record[key] for record in log_of(tmp_path / "run") if key in record]
    mean = result.scores["test"]["mean_of_final_epochs"]["refined/accuracy"]
    assert len(values) == 2 and mean == pytest.approx(sum(values) / 2)


def test_a_training_leaves_the_callers_generator_alone(tmp_path, tiny, silent):
    before = torch.manual_seed(7).get_state()
    train(tiny("train.epochs=1"), out=tmp_path / "run", console=silent)
    assert torch.equal(torch.get_rng_state(), before)
    resume(tmp_path / "run", ["train.epochs=2"], console=silent)
    assert torch.equal(torch.get_rng_state(), before)


def test_cudnn_is_deterministic_during_a_training_only(make_trainer, monkeypatch):
    cudnn, step, seen = torch.backends.cudnn, Trainer._step, []

    def watched(self, *arguments):
        seen.append((cudnn.deterministic, cudnn.benchmark))
        step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", watched)
    monkeypatch.setattr(cudnn, "deterministic", False)
    monkeypatch.setattr(cudnn, "benchmark", True)
    make_trainer("train.epochs=1").fit()
    assert set(seen) == {(True, False)}
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


def test_failed_write_leaves_the_checkpoint_before(run_copy, monkeypatch):
    before = (run_copy / "checkpoint.pt").read_bytes()

    def full_disk(path, content):
        path.open("wb").write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    with pytest.raises(OSError, match="No space left"):
        Run(run_copy).save_checkpoint({})
    assert (run_copy / "checkpoint.pt").read_bytes() == before
    assert not list(run_copy.glob(".partial-*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["optimizer.lr=0.1", "train.epochs=9"],
            "cannot change optimizer.lr \\(0.01 -> 0.1\\) and be the same; .* say so with --allow optimizer.lr",
        ),
        (["train.epochs=5"], "6 epochs are trained already, so train.epochs=5 leaves nothing to do"),
        (["train.epoch=9"], "did you mean 'train.epochs'"),
    ],
)
def test_changes_that_a_continued_training_cannot_have(run_copy, silent, overrides, message):
    before = (run_copy / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=message):
        resume(run_copy, overrides, console=silent)
    assert (run_copy / "config.yaml").read_bytes() == before


def test_other_data_is_refused(run_copy, silent, monkeypatch):
    other = synthetic_dataset(recordings=6, frames=48, joints=5, channels=3, classes=3, embedding_dim=8)
    monkeypatch.setattr(trainer_module, "load_dataset", lambda name, **options: replace(other, fps=60.0))
    with pytest.raises(UserError, match="not the one that .* was trained on: fps differ"):
        resume(run_copy, console=silent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "checkpoint.pt").write_bytes(b"nonsense"), "is damaged or no checkpoint"),
        (
            lambda run: (run / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes()[:5000]),
            "is damaged or no checkpoint",
        ),
        (lambda run: torch.save({"epoch": 1}, run / "checkpoint.pt"), "is not of this training"),
        (lambda run: (run / "run.json").unlink(), "is no run folder: it has no run.json"),
        (
            lambda run: (run / "run.json").write_text("{}"),
            "run.json: dataset: Field required; the file is damaged",
        ),
    ],
)
def test_damaged_runs_are_refused(run_copy, silent, damage, message):
    damage(run_copy)
    with pytest.raises(UserError, match=message):
        resume(run_copy, console=silent)


# The loop


@pytest.fixture
def make_trainer(tmp_path, tiny, silent):
    counter = iter(range(100))

    def make(*overrides: str) -> Trainer:
        return Trainer.start(tiny(*overrides), tmp_path / str(next(counter)), silent)

    return make


def without_dropout() -> list[str]:
    return [f"model.{name}_dropout=0" for name in ("channel", "fusion", "attention", "output")]


def update_of(trainer: Trainer, *groups: list) -> torch.Tensor:
    """How one epoch with these batches changes the weights."""
    before = torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach().clone()
    trainer._groups = lambda: iter(groups)
    with trainer_module.TrainingProgress(trainer.console, 1) as progress:
        trainer._train_epoch(progress)
    return torch.nn.utils.parameters_to_vector(trainer.model.parameters()).detach() - before


def test_accumulation_takes_the_mean_gradient(make_trainer):
    settings = [*without_dropout(), "optimizer.name=sgd", "optimizer.momentum=0", "optimizer.lr=1"]
    first, second = list(make_trainer(*settings).loader)[:2]
    both = update_of(make_trainer(*settings), [first, second])
    apart = [update_of(make_trainer(*settings), [batch]) for batch in (first, second)]
    torch.testing.assert_close(both, (apart[0] + apart[1]) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(both, apart[0], rtol=0.1)


def test_number_of_steps_under_accumulation(make_trainer):
    trainer = make_trainer("train.batch_size=2", "train.accumulate=2", "data.test=[s0_r0]")
    assert (len(trainer.batches), trainer.steps_per_epoch) == (3, 2)
    assert [len(group) for group in trainer._groups()] == [2, 1]


def test_gradient_clipping(make_trainer):
    settings = ["optimizer.name=sgd", "optimizer.momentum=0", "optimizer.lr=1"]
    batch = next(iter(make_trainer(*settings).loader))
    free = update_of(make_trainer(*settings), [batch])
    clipped = update_of(make_trainer(*settings, "train.clip_norm=0.01"), [batch])
    assert free.norm() > 0.1
    assert clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-5)


def test_learning_rate_follows_the_schedule(tmp_path, tiny, silent):
    config = tiny("schedule.name=linear", "schedule.final=0.5", "optimizer.lr=0.01")
    train(config, out=tmp_path / "run", console=silent)
    assert [record["lr"] for record in log_of(tmp_path / "run")] == pytest.approx(
        [0.01, 0.00875, 0.0075, 0.00625]
    )


def test_the_loss_that_decides_is_the_mean_of_a_steps_batches_since_the_epochs_start(
    make_trainer, monkeypatch
):
    trainer = make_trainer(
        "optimizer.name=lcam", "train.accumulate=2", "data.test=[s0_r0]", "train.clip_norm=1"
    )
    add, totals = LossWatch.add, []

    def watched(self, terms, *arguments):
        totals.append(terms["total"].item())
        return add(self, terms, *arguments)

    monkeypatch.setattr(LossWatch, "add", watched)
    trainer.fit()
    (group,) = trainer.optimizer.param_groups
    expected = ((totals[-3] + totals[-2]) / 2 + totals[-1]) / 2  # 3 batches in 2 steps
    assert (group["loss_gate"][COUNT], len(totals)) == (2, 4 * 3)
    assert (group["loss_gate"][AVERAGE] + group["loss_gate"][REST]).item() == pytest.approx(
        expected, rel=1e-6
    )
    assert trainer.optimizer.phase_steps.sum() == 4 * 2


def test_phases_and_exponents_are_logged(tmp_path, tiny, silent):
    phases = {"phase/low_steps", "phase/high_steps", "phase/low_share"}
    expected = {
        ("optimizer.name=adam",): [{}, {}],
        ("optimizer.name=lcam", "train.batch_size=1"): [{}, {}],
        ("optimizer.name=smes", "exponent.name=linear", "exponent.final=0.3"): [
            {"alpha": 0.5},
            {"alpha": 0.4},
        ],
        ("optimizer.name=gated_smes", "optimizer.alphas=[0.5, 0.4]"): [{"alpha/low": 0.5, "alpha/high": 0.4}]
        * 2,
    }
    for number, (settings, exponents) in enumerate(expected.items()):
        run = tmp_path / str(number)
        train(tiny(*settings, "train.epochs=2"), out=run, console=silent)
        records = log_of(run)
        for record, exponent in zip(records, exponents, strict=True):
            assert {key: value for key, value in record.items() if key.startswith("alpha")} == pytest.approx(
                exponent
            )
            gated = "lcam" in settings[0] or "gated" in settings[0]
            assert {key for key in record if key.startswith("phase")} == (phases if gated else set())
        if gated:
            low, high = (sum(record[f"phase/{name}_steps"] for record in records) for name in ("low", "high"))
            (group,) = Run(run).checkpoint()["optimizer"]["param_groups"]
            assert (low, high) == tuple(group["loss_gate"][LOW_STEPS : HIGH_STEPS + 1].tolist())
            assert low + high == records[-1]["step"]
            assert records[1]["phase/low_share"] == records[1]["phase/low_steps"] / (records[1]["step"] / 2)


def test_an_exponent_of_all_steps_cannot_be_extended(tmp_path, tiny, silent):
    settings = ("optimizer.name=smes", "exponent.name=cosine", "train.epochs=1", "data.test=[]")
    run = train(tiny(*settings), out=tmp_path / "run", console=silent).path
    with pytest.raises(
        UserError, match="cannot change from 1 to 2: with exponent.name=cosine the exponent of every"
    ):
        resume(run, ["train.epochs=2"], console=silent)


def test_fewer_recordings_than_a_batch_are_one_short_batch(tmp_path, tiny, silent):
    train(tiny("train.batch_size=64", "train.epochs=2"), out=tmp_path / "run", console=silent)
    assert [record["step"] for record in log_of(tmp_path / "run")] == [1, 2]


def test_dropping_the_only_batch_is_an_error(tmp_path, tiny, silent):
    with pytest.raises(
        UserError, match="drop_last leaves no batch: 5 training recordings, train.batch_size=64"
    ):
        train(tiny("train.batch_size=64", "train.drop_last=true"), out=tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [3, 3, 1]), (True, [3, 3])])
def test_epochs_are_different_permutations(drop_last, sizes):
    batches = EpochBatches([9] * 7, 3, seed=0, drop_last=drop_last)
    orders = []
    for epoch in (1, 2):
        batches.epoch = epoch
        epoch_batches = list(batches)
        assert [len(batch) for batch in epoch_batches] == sizes and len(batches) == len(sizes)
        assert {key[0] for batch in epoch_batches for key in batch} == {epoch}
        orders.append([key[1] for batch in epoch_batches for key in batch])
        assert len(set(orders[-1])) == sum(sizes)
    assert orders[0] != orders[1]


def test_worker_processes_change_nothing(tmp_path, tiny, silent):
    for workers in (0, 2):
        train(tiny("train.epochs=2", f"train.workers={workers}"), out=tmp_path / str(workers), console=silent)
    assert log_of(tmp_path / "0") == log_of(tmp_path / "2")


def overflowing(trainer: Trainer, index: int) -> str:
    """Scale a training recording so far that the network overflows on it; returns its name."""
    data = trainer.loader.dataset
    recordings = list(data.recordings)
    broken = recordings[index]
    recordings[index] = Recording(broken.name, broken.features * np.float32(1e38), broken.labels)
    data.recordings = tuple(recordings)
    return broken.name


def test_non_finite_loss_stops_before_the_step_and_names_the_batch(make_trainer):
    trainer = make_trainer("train.batch_size=1", "augment.occlusion=0", "augment.rotation=0")
    name = overflowing(trainer, 2)
    with pytest.raises(NonFiniteTraining, match=rf"in epoch 1, step \d .*in the batch of {name}; look at"):
        trainer.fit()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert not (trainer.run.path / "checkpoint.pt").exists()


def test_a_last_step_that_loses_the_weights_is_no_success(make_trainer):
    trainer = make_trainer("train.epochs=1", "train.batch_size=8", "data.test=[]", "optimizer.lr=1e30")
    with pytest.raises(
        NonFiniteTraining, match="norm of the weights is not finite in epoch 1, step 1, whose"
    ):
        trainer.fit()
    assert not (trainer.run.path / "checkpoint.pt").exists()
    assert not (trainer.run.path / "model.safetensors").exists()


def test_the_checkpoint_before_stays_when_weights_are_lost(make_trainer, monkeypatch):
    trainer, step = make_trainer(), Trainer._step

    def broken(self, group, watch):
        step(self, group, watch)
        if self.step == 2 * self.steps_per_epoch:  # the last one of the second epoch
            next(self.model.parameters()).data[0] = torch.nan
            self.last_names = group[-1].names

    monkeypatch.setattr(Trainer, "_step", broken)
    with pytest.raises(NonFiniteTraining) as error:
        trainer.fit()
    assert f"epoch 2, step 6, whose last batch was {', '.join(trainer.last_names)}; look" in str(error.value)
    assert trainer.run.checkpoint()["epoch"] == 1
    assert [record["epoch"] for record in log_of(trainer.run.path)] == [1]
    assert all(tensor.isfinite().all() for tensor in load_file(trainer.run / "model.safetensors").values())


def test_losses_are_read_every_few_batches_and_the_first_bad_one_is_named(tiny):
    recordings = read_dataset(tiny()).recordings
    watch = LossWatch(4, 1e-3, Processes())
    for step, value in enumerate([1.0, 3.0], start=1):
        watch.add(
            {"total": torch.tensor(value), "boundary": torch.tensor(2 * value)}, collate(recordings[:1]), step
        )
    assert watch.latest is None
    watch.look()
    assert (watch.latest, watch.means(), watch.frames) == (3.0, {"total": 2.0, "boundary": 4.0}, 96)

    bad = [1.0, torch.inf, torch.nan]
    with pytest.raises(
        NonFiniteTraining, match=r"epoch 4, step 4 \(total inf, boundary inf\), in the batch of s0_r1, s1_r0;"
    ):
        for step, value in enumerate(bad, start=3):
            terms = {"total": torch.tensor(value), "boundary": torch.tensor(value)}
            watch.add(terms, collate(recordings[step - 3 : step - 1]), step)
        watch.look()


def test_bf16_keeps_weights_in_fp32_and_trains(tmp_path, tiny, silent):
    train(tiny("train.precision=bf16"), out=tmp_path / "run", console=silent)
    records = log_of(tmp_path / "run")
    assert records[-1]["loss/total"] < records[0]["loss/total"]
    full = train(tiny("train.epochs=1"), out=tmp_path / "full", console=silent)
    first = log_of(full.path)[0]["loss/total"]
    assert records[0]["loss/total"] != first
    assert records[0]["loss/total"] == pytest.approx(first, rel=0.05)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=fp16", "fp16 needs a GPU; on a CPU use train.precision=bf16 or fp32"),
        ("train.device=nonsense", "train.device=nonsense cannot be used here"),
        ("train.device=meta", "train.device=meta cannot be used here: .* meta"),
        ("data.options.frames=2.5", "frames must be an integer, got 2.5"),
        ("data.name=mocap7", "no data set 'mocap7'"),
        ("data.options.colour=red", "has no option colour"),
        ("data.test=[s9_r9]", "has no recording s9_r9"),
        ("data.test=[s0_r0, s0_r1, s1_r0, s1_r1, s2_r0, s2_r1]", "training needs at least 1 more"),
    ],
)
def test_settings_that_cannot_be_used_leave_no_folder(tmp_path, tiny, silent, override, message):
    with pytest.raises(UserError, match=message):
        train(tiny(override), out=tmp_path / "run", console=silent)
    assert not (tmp_path / "run").exists()


def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(tmp_path, tiny):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None)
    train(tiny(), out=tmp_path / "run", console=console)
    shown = screen.getvalue()
    assert re.search(
        r"epoch .*[1-4]/4 .*━ .*loss \d\.\d{3}  [\d,]+ frames/s .*\d:\d\d:\d\d.* left .*\d:\d\d:\d\d", shown
    )


def test_elsewhere_progress_is_plain_lines(tmp_path, tiny):
    screen = io.StringIO()
    train(tiny(), out=tmp_path / "run", console=Console(file=screen, width=60))
    lines = [line for line in screen.getvalue().splitlines() if line.startswith("epoch")]
    assert [line.split()[1] for line in lines] == ["2/4", "3/4", "4/4"]
    pattern = (
        r"epoch \d/4  loss \d\.\d{3}  test: accuracy [\d.]+, f1@50 [\d.]+  [\d,]+ frames/s  0:00:\d\d left"
    )
    assert all(re.fullmatch(pattern, line) for line in lines), lines
    assert "\x1b" not in screen.getvalue()


def labelled(labels: list[int]) -> Recording:
    return Recording("r", np.zeros((1, 1, len(labels)), np.float32), np.array(labels, np.int64))


def test_boundary_weight_is_one_over_the_share_of_boundary_frames():
    assert boundary_weight([labelled([0, 0, 1, 1, 1]), labelled([2, 2, 2])]) == pytest.approx(8 / 3)
    with pytest.raises(UserError, match="no annotated segment"):
        boundary_weight([labelled([IGNORE, IGNORE])])


def test_median_frequency_weights():
    weights = median_frequency_weights([labelled([0, 0, 0, 0, 1, IGNORE]), labelled([3, 3])], classes=4)
    assert weights == [0.5, 2.0, 0.0, 1.0]


def test_class_weights_reach_the_loss(make_trainer):
    weights = make_trainer("loss.class_weights=median_frequency").loss.class_weights
    assert weights.shape == (3,) and weights.median().item() == pytest.approx(1.0)
    assert make_trainer().loss.class_weights is None
