"""Training steps that are recorded and replayed are those that are done one by one."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tape import Memory, Tape
from test_trainer import assert_equal
from torch import Tensor
from trgnet.kernels import use_backend
from trgnet.optimizers import builders

from trgnet import step_graphs
from trgnet import trainer as trainer_module
from trgnet.data import Batch, Recording, collate, synthetic_dataset
from trgnet.data.batch import bucket, padded_segments
from trgnet.errors import DataWarning, UserError
from trgnet.processes import Processes
from trgnet.runs import Run
from trgnet.step_graphs import CudaCapture, StepGraphs, uses_graphs
from trgnet.trainer import EpochBatches, Trainer, resume, train

GRAPHS = (
    "train.cuda_graph=true", "data.options.shortest=20", "data.test=[]", "data.validation=0", "train.epochs=3",
)  # fmt: skip
NO_DROPOUT = tuple(f"model.{name}_dropout=0" for name in ("channel", "fusion", "attention", "output"))
CHOICES = ("auto", "true", "false")
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
    assert frames == bucket(max(plain.lengths), 16) and len(batch.segments) == 256 > count
    for name in ("batch", "start", "length", "label"):
        assert torch.equal(getattr(batch.segments, name)[:count], getattr(plain.segments, name))
    padding = [getattr(batch.segments, name)[count:] for name in ("batch", "start", "length", "label")]
    assert [column.unique().tolist() for column in padding] == [[2], [frames], [0], [255]]
    unlabelled = collate([Recording("a", recordings[0].features)], buckets=True)
    assert len(unlabelled.segments) == 256 and not unlabelled.segments.length.any()
    many = Recording("many", np.zeros((1, 1, 300), np.float32), np.arange(300) % 2)
    assert [len(collate([many] * count, buckets=True).segments) for count in (1, 2, 4)] == [512, 1024, 2048]


@dataclass(frozen=True)
class Lengths:
    """How long the recordings of a dataset are, in frames, and how many frames a segment has."""

    recordings: int
    mean: int
    deviation: int
    range: tuple[int, int]
    segment: int

    def draw(self, rng: np.random.Generator) -> list[int]:
        variance = np.log(1 + (self.deviation / self.mean) ** 2)
        lengths = rng.lognormal(np.log(self.mean) - variance / 2, np.sqrt(variance), self.recordings)
        return np.clip(lengths, *self.range).astype(int).tolist()


@pytest.mark.parametrize("length_sorted", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [
        Lengths(900, 3000, 900, (1000, 6000), 75),
        Lengths(270, 1000, 600, (160, 2700), 70),
        Lengths(380, 3700, 600, (2000, 5000), 120),
        Lengths(600, 2200, 2000, (300, 12_000), 220),
        Lengths(60, 6000, 4000, (500, 30_000), 200),
    ],
    ids=str,
)
def test_batches_of_a_training_have_fewer_sizes_than_there_are_graphs(lengths: Lengths, length_sorted: bool):
    """However they are shuffled; and most batches are of a size whose graph is there by then."""
    rng = np.random.default_rng(0)
    frames = lengths.draw(rng)
    segments = [max(1, round(length / lengths.segment * rng.uniform(0.7, 1.3))) for length in frames]
    batches = EpochBatches(frames, 8, 0, False, length_sorted=length_sorted)
    sizes: Counter[tuple[int, ...]] = Counter()
    for batches.epoch in range(20):
        for batch in batches:
            longest, count = max(frames[i] for _, i in batch), sum(segments[i] for _, i in batch)
            sizes[len(batch), bucket(longest, 16), padded_segments(count)] += 1
    assert 1 < len(sizes) <= step_graphs.MOST_GRAPHS
    assert sum(count - 2 for count in sizes.values() if count > 2) > sizes.total() / 2


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

    graphs = StepGraphs(step, torch.device("cpu"), capture=tape, memory=Memory())
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


def test_a_recording_that_fails_is_a_plain_step_and_the_last_try():
    tape, repaired = Tape(most_operations=0), []
    step = lambda batch: {"total": batch.x.sum()}  # noqa: E731
    graphs = StepGraphs(step, torch.device("cpu"), lambda: repaired.append(len(tape.log)), tape, Memory())
    with pytest.warns(
        DataWarning, match=r"no more CUDA graphs: a step could not be .*OutOfMemoryError: "
    ) as told:
        for frames in (16, 16, 16, 32, 32, 32):
            batch = batch_of(frames)
            assert torch.equal(graphs(batch)["total"], batch.x.sum())
    assert len(told) == 1 and "train.cuda_graph=false" in str(told[0].message)
    assert tape.log == ["record"] and repaired == [1]


def test_other_errors_of_a_recording_end_the_training():
    def capture(function: Callable) -> Callable:
        raise KeyError("a mistake")

    graphs = StepGraphs(lambda batch: {}, torch.device("cpu"), capture=capture, memory=Memory())
    graphs(batch_of(16))
    with pytest.raises(KeyError, match="a mistake"):
        graphs(batch_of(16))


@pytest.mark.parametrize(
    ("left", "log", "message"),
    [
        # Of steps that take 100 bytes with 16 frames.
        ((100, 200, 200), ["record", "replay", "record", "replay", "replay"], None),
        ((99,), [], "keeps the memory of its step, and the GPU has not so much left"),
        (
            (100, 199),
            ["record", "replay"],
            "does not last for them and for the steps of sizes that are new",
        ),
    ],
)
def test_graphs_are_given_up_before_the_memory_runs_out(left, log, message):
    tape, memory = Tape(), Memory(taken=100)
    asked = iter(left)
    memory.free = lambda: next(asked, 0)
    graphs = StepGraphs(
        lambda batch: {"total": batch.x.sum()}, torch.device("cpu"), capture=tape, memory=memory
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for frames in (16, 16, 32, 32, 32):
            memory.taken = 100 * frames // 16
            batch = batch_of(frames)
            assert torch.equal(graphs(batch)["total"], batch.x.sum())
    assert tape.log == log
    assert [message in str(warning.message) for warning in told] == [True] * (message is not None)


def test_no_more_graphs_than_their_greatest_number(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_graphs, "MOST_GRAPHS", 1)
    tape = Tape()
    graphs = StepGraphs(
        lambda batch: {"total": batch.x.sum()}, torch.device("cpu"), capture=tape, memory=Memory()
    )
    with pytest.warns(DataWarning, match="more than 1 sizes of batches") as told:
        for frames in (16, 16, 32, 32, 32, 16):
            batch = batch_of(frames)
            assert torch.equal(graphs(batch)["total"], batch.x.sum())
    assert len(told) == 1
    assert tape.log == ["record", "replay", "replay"]


class Cuda:
    """Stands for torch.cuda where graphs are captured: a capture moves to another stream, and may fail at its end."""

    def __init__(self, end: Exception | None) -> None:
        self.streams, self.end = ["main"], end
        self.states: list[str] = []

    def graph(self, graph: object, pool: object, stream: str, capture_error_mode: str) -> Cuda:
        return self

    def __enter__(self) -> None:
        self.streams.append("capture")

    def __exit__(self, *error: object) -> None:
        if self.end:
            raise self.end
        self.streams.append("main")

    def clone_state(self) -> str:
        return "state of a generator that does not capture"

    def graphsafe_set_state(self, state: str) -> None:
        self.states.append(state)


@pytest.mark.parametrize("end", [None, RuntimeError("the capture was invalidated")], ids=str)
def test_a_capture_that_fails_leaves_stream_and_generator_as_they_were(
    monkeypatch: pytest.MonkeyPatch, end: Exception | None
):
    cuda = Cuda(end)
    for name, value in {
        "Stream": lambda device: "capture",
        "graph_pool_handle": lambda: (0, 1),
        "CUDAGraph": object,
        "graph": cuda.graph,
        "device": lambda device: nullcontext(),
        "current_device": lambda: 0,
        "current_stream": lambda: cuda.streams[-1],
        "set_stream": cuda.streams.append,
        "default_generators": [cuda],
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def step() -> dict[str, Tensor]:
        assert cuda.streams[-1] == "capture"
        raise ValueError("a wait for the device")

    with pytest.raises(ValueError, match="a wait for the device"):
        CudaCapture(torch.device("cuda"))(step)
    assert cuda.streams[-1] == "main" and cuda.states == [cuda.clone_state()]


# ---------------------------------------------------------------- trainings


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """CPU trainings are set up as on a GPU, with tapes for CUDA graphs; the tapes that were used."""
    made: list[Tape] = []

    def tape(device: torch.device) -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(step_graphs, "CudaCapture", tape)
    monkeypatch.setattr(step_graphs, "CudaMemory", Memory)
    monkeypatch.setattr(trainer_module, "uses_graphs", lambda settings, *_: settings.cuda_graph is True)
    monkeypatch.setattr(builders, "_on_gpu", lambda params: True)
    # A tape has operations of PyTorch, and no kernels.
    monkeypatch.setattr(builders, "fused_obstacle", lambda tensors: "Triton is not installed")
    with use_backend("reference"):  # as what is for CPUs alone does not run on a GPU, and is not recorded
        yield made


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are scaled, as in float16 on a GPU."""
    monkeypatch.setattr(Trainer, "_scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=1024.0))


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


@pytest.mark.parametrize(
    ("name", "share"), [("adam", 0.2), ("adam", 0.7), ("adam", 0.99), ("sgd", 0.99), ("gated_smes", 0.99)]
)
def test_a_training_whose_recording_fails_is_the_plain_one_bit_for_bit(
    tmp_path: Path,
    tiny: Callable,
    silent: Console,
    tapes: list[Tape],
    scaled: None,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    share: float,
):
    """In its forward pass, in its backward pass, or in the optimizer, whose Python has done its part by then."""
    config = tiny(*GRAPHS, "train.epochs=2", *OPTIMIZERS[name])
    train_without_graphs(config, tmp_path / "plain", silent)
    train(config, out=tmp_path / "graphs", console=silent)
    (tape,) = (tape for tape in tapes if tape.log)
    assert_equal(Run(tmp_path / "plain").checkpoint(), Run(tmp_path / "graphs").checkpoint())

    failing = Tape(most_operations=int(share * tape.operations))
    monkeypatch.setattr(step_graphs, "CudaCapture", lambda device: failing)
    with pytest.warns(DataWarning, match="no more CUDA graphs"):
        train(config, out=tmp_path / "failed", console=silent)
    assert failing.log == ["record"]
    assert_equal(Run(tmp_path / "plain").checkpoint(), Run(tmp_path / "failed").checkpoint())


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


OBSTACLES = {
    "cpu": ([], "cpu", 1, "train.cuda_graph needs a GPU, and this training is on cpu", ""),
    "processes": (
        [],
        "cuda",
        2,
        "train.cuda_graph is for one process, and here are 2",
        ", or train on one GPU",
    ),
    "accumulate": (
        ["train.accumulate=3"],
        "cuda",
        1,
        "train.cuda_graph records a step of one batch, and train.accumulate is 3",
        ", or set train.accumulate=1 and a larger train.batch_size",
    ),
    "compile": (
        ["train.compile=true"],
        "cuda",
        1,
        "train.cuda_graph and train.compile exclude each other",
        ", or train.compile=false",
    ),
}


@pytest.mark.parametrize(
    ("overrides", "device", "count", "reason", "alternative"), OBSTACLES.values(), ids=OBSTACLES.keys()
)
def test_what_graphs_do_not_go_with_is_refused_where_they_are_asked_for(
    tiny: Callable, overrides: list[str], device: str, count: int, reason: str, alternative: str
):
    place = torch.device(device), Processes(0, count)
    with pytest.raises(UserError) as error:
        uses_graphs(tiny("train.cuda_graph=true", *overrides).train, *place)
    assert str(error.value) == f"{reason}; set train.cuda_graph=auto (leave --cuda-graph away){alternative}"
    for choice in ("auto", "false"):
        assert not uses_graphs(tiny(f"train.cuda_graph={choice}", *overrides).train, *place)


def test_graphs_are_used_on_one_gpu_unless_they_are_refused(tiny: Callable):
    place = torch.device("cuda"), Processes()
    used = {choice: uses_graphs(tiny(f"train.cuda_graph={choice}").train, *place) for choice in CHOICES}
    assert used == {"auto": True, "true": True, "false": False}
    assert uses_graphs(tiny().train, *place)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("used", [False, True])
def test_one_line_says_why_a_gpu_trains_without_graphs(
    tmp_path: Path, tiny: Callable, monkeypatch: pytest.MonkeyPatch, choice: str, device: str, used: bool
):
    monkeypatch.setattr(trainer_module, "uses_graphs", lambda *_: False)
    console = Console(file=io.StringIO(), width=500)
    trainer = Trainer.start(
        tiny(f"train.cuda_graph={choice}", "train.accumulate=3"), tmp_path / "run", console
    )
    trainer.device, trainer.uses_graphs = torch.device(device), used
    trainer._announce()
    first, *others = console.file.getvalue().splitlines()
    assert (", CUDA graphs; 4 epochs" in first) == used
    told = device == "cuda" and choice == "auto" and not used
    assert (
        others
        == [
            "steps are not recorded as CUDA graphs: train.cuda_graph records a step of one batch, and train.accumulate is 3"
        ]
        * told
    )


@pytest.mark.parametrize("saved", [True, False])
def test_a_run_of_before_goes_on_as_it_was(
    tmp_path: Path, tiny: Callable, silent: Console, tapes: list[Tape], saved: bool
):
    """Its config.yaml says yes or no."""
    path = tmp_path / "run"
    train(tiny(*GRAPHS, "train.epochs=1", f"train.cuda_graph={str(saved).lower()}"), out=path, console=silent)
    text = (path / "config.yaml").read_text()
    assert f"cuda_graph: {str(saved).lower()}" in text
    tapes.clear()
    resume(path, ["train.epochs=2"], console=silent)
    assert Run(path).config().train.cuda_graph is saved and bool(tapes) == saved


def test_graphs_are_freed_when_the_training_ends(
    tmp_path: Path, tiny: Callable, silent: Console, tapes: list[Tape]
):
    trainer = Trainer.start(tiny(*GRAPHS), tmp_path / "run", silent)
    trainer.fit()
    assert trainer.graphs._graphs == {} and tapes[-1].log.count("record") >= 2


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
@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_a_step_that_waits_for_the_gpu_is_trained_on_without_graphs(
    tmp_path: Path,
    tiny: Callable,
    silent: Console,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
):
    """As an operation of the user's own may; with dropout, whose random numbers go on."""
    config = tiny(*GRAPHS, *settings, "train.device=cuda")
    train_without_graphs(config, tmp_path / "plain", silent)
    update = Trainer._update
    monkeypatch.setattr(
        Trainer, "_update", lambda self: (update(self), next(self.model.parameters()).sum().item())
    )
    with pytest.warns(DataWarning, match="no more CUDA graphs: a step could not be recorded"):
        train(config, out=tmp_path / "failed", console=silent)
    assert_equal(Run(tmp_path / "plain").checkpoint(), Run(tmp_path / "failed").checkpoint())


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
def test_cuda_graphs_draw_other_dropout_at_every_replay(tmp_path: Path, tiny: Callable, silent: Console):
    config = tiny("train.cuda_graph=true", "train.device=cuda", "optimizer.lr=1e-12")
    trainer = Trainer.start(config, tmp_path / "run", silent)
    trainer.model.train()
    batch = next(iter(trainer.loader))
    totals = {trainer.graphs(batch)["total"].item() for _ in range(6)}
    assert len(totals) == 6
