"""Trainings that are killed, interrupted, starved of disk or divided, and what they leave behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from trgnet.config import Config
from trgnet.errors import UserError
from trgnet.processes import Processes
from trgnet.runs import Run
from trgnet.trainer import EpochBatches, Interrupted, Trainer, resume, train

OF_THE_CLOCK = ("seconds", "frames_per_second")
SLOWED = ("train.checkpoint_minutes=0", "data.validation=0.3", "train.workers=0")


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit, apart from what the clock says."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same(first[key], second[key]) for key in first if key not in OF_THE_CLOCK
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def log_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def assert_same_runs(first: Path, second: Path) -> None:
    assert same(Run(first).checkpoint(), Run(second).checkpoint())
    assert same(log_of(first), log_of(second))
    assert [record["epoch"] for record in log_of(first)] == list(range(1, len(log_of(first)) + 1))
    for name in ("scores.json", "confusion.csv", "model.safetensors", "best.safetensors", "config.yaml"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    assert not list(second.rglob(".partial-*"))


# ---------------------------------------------------------------- SIGKILL


def _train_or_resume(config: Config, run: Path) -> None:
    torch.set_num_threads(1)
    if (run / "config.yaml").exists():
        resume(run, console=Console(quiet=True))
    else:
        train(config, out=run, console=Console(quiet=True))


def _die_at_file_operation(number: int, config: Config, run: Path) -> None:
    """Train until the `number`-th time that a file of the run is opened or renamed, and die right before it."""
    left = [number]

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename") and str(run) in str(arguments[0]):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    _train_or_resume(config, run)


@pytest.fixture(scope="module")
def start() -> Callable[..., multiprocessing.Process]:
    """A function that runs another in a process of its own, forked from one that has torch loaded already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["trgnet.trainer"])

    def run(target: Callable[..., None], *arguments: object) -> multiprocessing.Process:
        process = context.Process(target=target, args=arguments)
        process.start()
        return process

    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, tiny, silent) -> tuple[Config, Path, float]:
    """A training that saves at every step, its run folder, and how long it took."""
    config, out = tiny(*SLOWED), tmp_path_factory.mktemp("runs") / "whole"
    started = time.monotonic()
    train(config, out=out, console=silent)
    return config, out, time.monotonic() - started


def test_killed_at_random_moments_it_ends_bit_identical(uninterrupted, tmp_path, start):
    config, whole, seconds = uninterrupted
    rng, kills, run = random.Random(0), 0, tmp_path / "run"
    for _ in range(40):
        process = start(_train_or_resume, config, run)
        process.join(rng.uniform(0.1, 0.8) * seconds if kills < 12 else None)
        if process.exitcode is not None:
            if process.exitcode != 0 or kills >= 3:
                break
            # The machine is faster now than when the whole training was timed: once more, with earlier kills.
            shutil.rmtree(run)
            seconds, kills = seconds / 2, 0
            continue
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 3
    assert_same_runs(whole, run)


@pytest.mark.parametrize("step", [1, 4])
def test_killed_at_every_file_operation_it_ends_bit_identical(uninterrupted, tmp_path, start, step):
    config, whole, _ = uninterrupted
    run, deaths = tmp_path / "run", 0
    for number in range(step, 400, 23):  # later and later, so that it gets on
        process = start(_die_at_file_operation, number, config, run)
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        deaths += 1
    assert process.exitcode == 0 and deaths >= 3
    assert_same_runs(whole, run)


# ---------------------------------------------------------------- Ctrl-C and SIGTERM


@pytest.mark.parametrize(("number", "at"), [(signal.SIGINT, 2), (signal.SIGTERM, 5)])
def test_signals_save_within_the_epoch_and_say_how_to_go_on(tmp_path, tiny, silent, monkeypatch, number, at):
    config = tiny(
        "data.validation=0.3", "train.checkpoint_minutes=null", "train.accumulate=2", "train.batch_size=1"
    )
    whole = train(config, out=tmp_path / "whole", console=silent).path
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    step = Trainer._step

    def signalled(self, group, watch):
        step(self, group, watch)
        if self.step == at:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        with pytest.raises(
            Interrupted, match=rf"after step {at}, within epoch \d.* trgnet train --resume"
        ) as caught:
            train(config, out=tmp_path / "run", console=silent)
    assert caught.value.signal == number
    assert Run(tmp_path / "run").checkpoint()["step"] == at
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    resume(tmp_path / "run", console=silent)
    assert_same_runs(whole, tmp_path / "run")


def test_a_signal_while_scoring_keeps_the_epochs_steps(tmp_path, tiny, silent, monkeypatch):
    config = tiny("data.validation=0.3", "train.checkpoint_minutes=null")
    whole = train(config, out=tmp_path / "whole", console=silent).path
    scores = Trainer._scores

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return scores(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_scores", signalled)
        with pytest.raises(Interrupted, match=r"after step 4, within epoch 2"):
            train(config, out=tmp_path / "run", console=silent)
    resume(tmp_path / "run", console=silent)
    assert_same_runs(whole, tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once(tmp_path, tiny, silent, monkeypatch):
    def signalled(self, group, watch):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Trainer, "_step", signalled)
    with pytest.raises(Interrupted, match="what is saved is nothing yet"):
        train(tiny(), out=tmp_path / "run", console=silent)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_the_command_ends_with_the_signals_exit_code(tmp_path, tiny_overrides):
    command = [
        sys.executable,
        "-m",
        "trgnet",
        "train",
        "--out",
        tmp_path / "a run",
        *tiny_overrides,
        "train.epochs=100000",
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not (tmp_path / "a run" / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert message.startswith("trgnet: interrupted; what is saved is the training after")
    assert f"trgnet train --resume '{tmp_path / 'a run'}'" in message and "Traceback" not in message


# ---------------------------------------------------------------- other settings


def test_other_settings_are_named_and_need_to_be_allowed(run_copy, silent, tiny):
    other = tiny("data.validation=0.3", "train.epochs=8", "optimizer.lr=0.5", "model.layers=3")
    with pytest.raises(UserError, match=r"model.layers \(2 -> 3\).*start a new training"):
        resume(run_copy, config=other, console=silent)
    with pytest.raises(UserError, match="start a new training"):
        resume(run_copy, ["model.layers=3"], allow=["model.layers"], console=silent)
    with pytest.raises(UserError, match=r"got 'optimizer.lrr'; did you mean 'optimizer.lr'\?"):
        resume(run_copy, allow=["optimizer.lrr"], console=silent)
    assert Run(run_copy).config().optimizer.lr == 0.01


def test_an_allowed_learning_rate_is_the_one_that_is_used(run_copy, silent):
    result = resume(run_copy, ["train.epochs=8", "optimizer.lr=0.5"], allow=["optimizer.lr"], console=silent)
    assert [record["lr"] for record in log_of(result.path)] == [0.01] * 6 + [0.5] * 2
    groups = Run(run_copy).checkpoint()["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.5]


def test_batches_change_between_epochs_only(tmp_path, tiny, silent, monkeypatch):
    step = Trainer._step

    def signalled(self, group, watch):
        step(self, group, watch)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", signalled)
        with pytest.raises(Interrupted):
            train(tiny(), out=tmp_path / "run", console=silent)
    with pytest.raises(UserError, match="train.batch_size can change between two epochs only.* epoch 1"):
        resume(tmp_path / "run", ["train.batch_size=1"], allow=["train.batch_size"], console=silent)


# ---------------------------------------------------------------- disks


def _limited(bytes_per_file: int) -> Callable[[], None]:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # as on a full disk, writing more is an error
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_per_file, bytes_per_file))

    return limit


def test_a_full_disk_ends_with_a_message_and_the_checkpoint_before(run_copy):
    before = (run_copy / "checkpoint.pt").read_bytes()
    command = [sys.executable, "-m", "trgnet", "train", "--resume", run_copy, "train.epochs=8"]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=120, preexec_fn=_limited(len(before) // 2)
    )
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "trgnet: error: cannot write into the run folder" in ended.stderr
    assert (
        f"the training after epoch 6. Make room or mend the folder, then continue with: trgnet train --resume {run_copy}"
        in ended.stderr
    )
    assert (run_copy / "checkpoint.pt").read_bytes() == before
    assert not list(run_copy.glob(".partial-*"))


def test_a_folder_that_cannot_be_made_is_a_message(tmp_path, tiny, silent):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="run folder .*file/run"):
        train(tiny(), out=tmp_path / "file" / "run", console=silent)


def test_what_a_training_killed_at_its_start_leaves_is_no_obstacle(tmp_path, tiny, silent):
    (tmp_path / "run").mkdir()
    for name in ("prior.npz", "run.json", ".partial-1-2-config.yaml"):
        (tmp_path / "run" / name).write_text("half")
    train(tiny("train.epochs=1"), out=tmp_path / "run", console=silent)
    assert not list((tmp_path / "run").glob(".partial-*"))


# ---------------------------------------------------------------- several processes


def test_processes_share_every_batch():
    shares = [
        EpochBatches([5] * 11, 4, seed=3, drop_last=False, processes=Processes(rank, 2)) for rank in (0, 1)
    ]
    alone = [batch for batch in EpochBatches([5] * 11, 4, seed=3, drop_last=False)]
    first, second = (list(share) for share in shares)
    assert (
        [len(batch) for batch in first]
        == [len(batch) for batch in second]
        == [2, 2, 1]
        == [len(batch) // 2 for batch in alone]
    )
    for mine, yours, together in zip(first, second, alone):
        assert set(mine) | set(yours) <= set(together) and not set(mine) & set(yours)
    with pytest.raises(UserError, match="3 processes cannot share train.batch_size=4 and 11 training"):
        EpochBatches([5] * 11, 4, seed=3, drop_last=False, processes=Processes(0, 3))
    with pytest.raises(UserError, match="2 processes cannot share train.batch_size=4 and 1 training"):
        EpochBatches([5], 4, seed=3, drop_last=False, processes=Processes(0, 2))


def test_length_sorted_batches_hold_similar_lengths_in_random_order():
    lengths = [10, 90, 30, 70, 50, 20, 80, 40, 60]
    batches = EpochBatches(lengths, 3, seed=0, drop_last=False, length_sorted=True)
    orders = set()
    for epoch in range(6):
        batches.epoch = epoch
        drawn = [sorted(lengths[index] for _, index in batch) for batch in batches]
        assert sorted(drawn) == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
        orders.add(str(drawn))
    assert len(orders) > 1


EQUAL = (
    "model.channel_dropout=0", "model.fusion_dropout=0", "model.attention_dropout=0", "model.output_dropout=0",
    "loss.absolute=0", "loss.relative=0", "optimizer.name=lcam", "train.batch_size=4", "train.epochs=2",
    "data.test=[s2_r0, s2_r1]",
)  # fmt: skip
"""Under these, and recordings of one length, the mean over processes is the mean over the batch."""


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "-m", "trgnet", "train", *map(str, arguments)]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_two_processes_train_what_one_does(tmp_path, tiny, tiny_overrides, silent):
    ended = torchrun("--out", tmp_path / "two", *tiny_overrides, *EQUAL)
    assert ended.returncode == 0, ended.stderr
    assert "2 x cpu" in ended.stdout and ended.stdout.count("Test recordings") == 1
    train(tiny(*EQUAL), out=tmp_path / "one", console=silent)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    start = Trainer.start(tiny(*EQUAL), tmp_path / "fresh", silent).model.state_dict()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=2e-6)
    assert any(not torch.allclose(start[name], tensor, rtol=1e-2) for name, tensor in one.items())
    losses = [[record["loss/total"] for record in log_of(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    gates = [
        Run(tmp_path / name).checkpoint()["optimizer"]["param_groups"][0]["loss_gate"]
        for name in ("one", "two")
    ]
    torch.testing.assert_close(*gates, rtol=1e-5, atol=1e-6)  # decided by everybody's loss


def test_two_processes_resume_exactly_and_not_as_one(tmp_path, tiny_overrides, silent):
    settings = (*tiny_overrides, "train.epochs=2", "train.batch_norm=local", "data.validation=0.3")
    whole = torchrun("--out", tmp_path / "run", *settings, "train.epochs=3")
    first = torchrun("--out", tmp_path / "part", *settings)
    with pytest.raises(UserError, match="trained by 2 processes, and here are 1: .* --allow processes"):
        resume(tmp_path / "part", ["train.epochs=3"], console=silent)
    second = torchrun("--resume", tmp_path / "part", "train.epochs=3")
    for ended in (whole, first, second):
        assert ended.returncode == 0, ended.stderr
    checkpoints = [Run(tmp_path / name).checkpoint() for name in ("run", "part")]
    assert all(same(checkpoints[0][key], checkpoints[1][key]) for key in ("model", "optimizer", "generators"))
    assert not torch.equal(*(state["cpu"] for state in checkpoints[0]["generators"]))  # other dropout masks
