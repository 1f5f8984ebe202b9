"""Training: from a configuration to a run folder.

The loop is the usual one. Three things deserve a word:

* **Repeatable and resumable.** The order of an epoch comes from a generator of (seed, epoch), the
  augmentation of a recording from one of (seed, epoch, recording); neither has a state to save, and worker
  processes change nothing. What has a state (weights, optimizer, schedule, scaler, torch's generators,
  history) is in one checkpoint, and every other file of the run is derived from it. So a continued training
  is the uninterrupted one. On a GPU, cuDNN is kept to its deterministic algorithms.
* **The test recordings choose nothing.** Scores are reported of the last epoch, as the mean over the final
  epochs, and, where recordings were held out for validation, of the epoch that scored best on those.
* **Numbers that are not finite stop the training**, and the batch is named: a loss before the step on a CPU,
  and on a GPU, where each look at it waits for the device, within `train.log_every` steps; the weights at the
  end of the epoch, as no loss has seen what the last step made of them. Nothing is evaluated or saved then.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from trgnet.optimizers import SCHEDULES_OF_ALL_STEPS, build_optimizer, build_schedule

from .config import AugmentConfig, Config, differing_keys, load_config, save_config, with_overrides
from .data import IGNORE, Batch, Dataset, Recording, Split, augment, collate, load_dataset
from .errors import UserError, reading
from .evaluation import Evaluation, Scores, evaluate, print_table, score_table, write_report, write_scores
from .losses import TRGLoss
from .plots import plot_curves
from .predictor import Predictor, pick_device
from .progress import TrainingProgress
from .runs import Run, RunInfo, build_model, default_folder

SELECTED_BY = "refined/f1@50"
"""The validation score whose maximum makes an epoch the best one."""

CHANGEABLE = (
    "train.epochs", "train.device", "train.log_every", "train.evaluate_every", "train.final_epochs",
    "train.checkpoint_every", "train.workers",
)  # fmt: skip
"""Configuration keys that a continued training may change: none of them alters a step that is behind.

`train.epochs` would under the schedules that depend on the number of all steps; there it is refused too.
"""

REMEDIES = (
    "look at these recordings, lower optimizer.lr, set train.clip_norm=1, or use train.precision=fp32; "
    "the run folder keeps the checkpoint before"
)


class NonFiniteTraining(UserError):
    """The loss or the weights became NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """The training was interrupted; the message says how to continue it."""


@dataclass(frozen=True)
class Result:
    """A finished training: its run folder, and the scores of every part of the data in percent.

    `scores` maps the part ("test", and "validation" where there is one) to "last_epoch",
    "mean_of_final_epochs" and, with a validation part, "best_on_validation"; each of these maps the names of
    the scores to their values.
    """

    path: Path
    scores: dict[str, dict[str, Scores]]


def train(
    config: Config | str | Path = "mocap6", *, out: str | Path | None = None, console: Console | None = None
) -> Result:
    """Train a network. The state of torch's generators is afterwards what it was before.

    Args:
        config: a configuration, or the name or file of one.
        out: run folder, new or empty; by default ``runs/DATASET-DATE-TIME``.
        console: where progress and the final table go; ``rich.console.Console(quiet=True)`` for silence.

    Raises:
        UserError: a configuration, data or folder that cannot be used.
        NonFiniteTraining: the loss or the weights became NaN or infinite.
    """
    config = config if isinstance(config, Config) else load_config(config)
    out = default_folder(config) if out is None else out
    with _callers_generators_kept():
        return Trainer.start(config, out, console).fit()


def resume(run: str | Path, overrides: Sequence[str] = (), *, console: Console | None = None) -> Result:
    """Continue a training from its last checkpoint, exactly as if it had not been interrupted.

    Of a finished training the weights and the report are written again. Where one goes on to more epochs,
    those that it evaluated as its final ones stay evaluated. The state of torch's generators is afterwards
    what it was before.

    Args:
        run: its folder.
        overrides: ``"section.key=value"`` for keys of :data:`CHANGEABLE`, such as more epochs.
        console: as for :func:`train`.

    Raises:
        UserError: no run folder, damaged files, other data, or an override that would change what is behind.
        NonFiniteTraining: the loss or the weights became NaN or infinite.
    """
    with _callers_generators_kept():
        return Trainer.restart(Run.open(run), overrides, console).fit()


class Trainer:
    """One training: its data, network, optimizer and run folder."""

    def __init__(
        self, config: Config, dataset: Dataset, run: Run, info: RunInfo, console: Console | None
    ) -> None:
        settings = config.train
        self.config, self.run, self.info = config, run, info
        self.console = console or Console()
        self.device = pick_device(settings.device, option="train.device")
        if settings.precision == "fp16" and self.device.type == "cpu":
            raise UserError("train.precision=fp16 needs a GPU; on a CPU use train.precision=bf16 or fp32")
        split = split_dataset(dataset, config)
        self.parts = {"validation": split.validation, "test": split.test}
        self.parts = {part: recordings for part, recordings in self.parts.items() if recordings}
        self.batches = EpochBatches(len(split.train), settings.batch_size, settings.seed, settings.drop_last)
        self.loader = self._loader(
            TrainingData(split.train, config.augment, dataset.rotation_axis, settings.seed)
        )

        torch.manual_seed(settings.seed)
        self.model = build_model(config, info).to(self.device)
        self.loss = self._loss(dataset).to(self.device)
        self.joint_graph = dataset.text.joint_graph().to(self.device)
        self.optimizer = build_optimizer(self.model.parameters(), **config.optimizer.model_dump())
        self.steps_per_epoch = math.ceil(len(self.batches) / settings.accumulate)
        self.schedule = self._schedule()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")

        self.epoch, self.step, self.saved_epoch = 0, 0, 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None

    @classmethod
    def start(cls, config: Config, out: str | Path, console: Console | None = None) -> Trainer:
        """Set up a new training; its folder is made last, when everything the user gave has been checked."""
        dataset = read_dataset(config)
        info = describe(dataset, config)
        trainer = cls(config, dataset, Run(out), info, console)
        Run.create(out, config, info, dataset.text)
        return trainer

    @classmethod
    def restart(cls, run: Run, overrides: Sequence[str] = (), console: Console | None = None) -> Trainer:
        """Set up a training that continues from the checkpoint of `run`, or anew where there is none."""
        saved = run.config()
        config = with_overrides(saved, overrides)
        refused = [key for key in differing_keys(saved, config) if key not in CHANGEABLE]
        if refused:
            raise UserError(
                f"a continued training cannot change {', '.join(refused)}, only {', '.join(CHANGEABLE)}; "
                "start a new one for other settings"
            )
        dataset, info, checkpoint = read_dataset(config), run.info(), run.checkpoint()
        _check_same_data(info, describe(dataset, config), run)
        trainer = cls(config, dataset, run, info, console)
        if checkpoint is not None:
            trainer._restore(checkpoint)
        if config.train.epochs != saved.train.epochs:
            trainer._check_new_length(saved.train.epochs)
        save_config(config, run / "config.yaml")
        return trainer

    def _check_new_length(self, before: int) -> None:
        epochs, schedule = self.config.train.epochs, self.config.schedule.name
        if self.epoch and schedule in SCHEDULES_OF_ALL_STEPS:
            raise UserError(
                f"train.epochs cannot change from {before} to {epochs}: with schedule.name={schedule} the "
                f"learning rate of every step depends on the number of all steps, and {self.epoch} epochs "
                "are trained already; finish this training as it is, or start a new one of the length you want"
            )
        if epochs <= self.epoch:
            raise UserError(
                f"{self.epoch} epochs are trained already, so train.epochs={epochs} leaves nothing to do; "
                "ask for more"
            )

    def fit(self) -> Result:
        """Train to the last epoch, save, report.

        Raises:
            Interrupted: by Ctrl-C; the run folder is that of the last checkpoint.
            NonFiniteTraining: the loss or the weights became NaN or infinite.
        """
        self.run.write_log(self.history)
        if self.saved_epoch:  # what ended before it had written them may have left others, or none
            self._save_weights()
        self._announce()
        try:
            if self.epoch < self.config.train.epochs:
                with _deterministic_cudnn():
                    self._train_epochs()
            return self._report()
        except KeyboardInterrupt as interrupt:
            command = f"trgnet train --resume {shlex.quote(str(self.run.path))}"
            raise Interrupted(
                f"interrupted; what is saved is the training after epoch {self.saved_epoch}. "
                f"Continue with: {command}"
            ) from interrupt

    def _train_epochs(self) -> None:
        epochs = self.config.train.epochs
        writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.epoch + 1)
        with writer, TrainingProgress(self.console, epochs, self.epoch) as progress:
            while self.epoch < epochs:
                record = self._train_epoch(progress)
                evaluated = self._is_evaluated(self.epoch)
                if evaluated:
                    record |= self._evaluate()
                self._log(record, writer)
                progress.epoch(record, next(iter(self.parts)) if evaluated else None)
                if self.epoch % self.config.train.checkpoint_every == 0 or self.epoch == epochs:
                    self._save()

    # One epoch

    def _train_epoch(self, progress: TrainingProgress) -> dict[str, float]:
        """Train one epoch and return its log record."""
        self.model.train()
        self.epoch += 1
        self.batches.epoch = self.epoch
        watch = LossWatch(
            self.epoch, look_every=1 if self.device.type == "cpu" else self.config.train.log_every
        )
        rate = self.schedule.get_last_lr()[0]
        started = time.perf_counter()
        for group in self._groups():
            self._step(group, watch)
            seconds = time.perf_counter() - started
            progress.step(watch.batches / len(self.batches), watch.latest, watch.frames / seconds)
        watch.look()
        self._check_weights(watch.recordings)
        seconds = time.perf_counter() - started
        return {
            "epoch": self.epoch,
            "step": self.step,
            "lr": rate,
            **{f"loss/{name}": value for name, value in watch.means().items()},
            "seconds": seconds,
            "frames_per_second": watch.frames / seconds,
        }

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of an epoch, in groups that make one optimizer step each."""
        batches = iter(self.loader)
        while group := list(islice(batches, self.config.train.accumulate)):
            yield group

    def _step(self, group: Sequence[Batch], watch: LossWatch) -> None:
        """One optimizer step along the mean gradient of the batches of `group`."""
        self.optimizer.zero_grad(set_to_none=True)
        for batch in group:
            batch = batch.to(self.device, non_blocking=True)
            with self._autocast():
                output = self.model(batch.x, batch.mask, self.joint_graph, batch.segments)
            terms = self.loss(output, batch)
            watch.add(terms, batch, self.step + 1)
            self.scaler.scale(terms["total"] / len(group)).backward()
        if self.config.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.scaler.get_scale() >= scale:  # a lowered scale says that the step was skipped
            self.schedule.step()

    @torch.no_grad()
    def _check_weights(self, recordings: Sequence[str]) -> None:
        """Stop if the norm of all weights is not finite; `recordings` are those of the last batch."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        norm = torch.nn.utils.get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()])
        if not norm.isfinite():
            raise NonFiniteTraining(
                f"the norm of the weights is not finite after epoch {self.epoch}, step {self.step}, whose "
                f"last batch was {', '.join(recordings)}; {REMEDIES}"
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.config.train.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    # Scores

    def _is_evaluated(self, epoch: int) -> bool:
        settings = self.config.train
        is_final = epoch > settings.epochs - settings.final_epochs
        return bool(self.parts) and (is_final or epoch % settings.evaluate_every == 0)

    def _evaluate(self) -> Scores:
        """Score every held-out part; remember the weights if they are the best on validation so far."""
        scores = {
            f"{part}/{name}": value
            for part in self.parts
            for name, value in self._evaluation(part).scores.items()
        }
        selected = scores.get(f"validation/{SELECTED_BY}")
        if selected is not None and (self.best is None or selected > self.best["score"]):
            weights = {
                name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
            }
            self.best = {"epoch": self.epoch, "score": selected, "weights": weights}
        return scores

    def _evaluation(self, part: str) -> Evaluation:
        threshold, pad_multiple = self.config.refine.threshold, self.config.train.pad_multiple
        predictor = Predictor(
            self.model, self.info, self.joint_graph, threshold=threshold, pad_multiple=pad_multiple
        )
        return evaluate(predictor, self.parts[part])

    def _summary(self, part: str) -> dict[str, Scores]:
        """Scores of `part` by the three ways of choosing weights, from the history."""
        names = [key for key in self.history[-1] if key.startswith(f"{part}/")]
        final = self._final_records()
        columns = {
            "last_epoch": self.history[-1],
            "mean_of_final_epochs": {name: math.fsum(r[name] for r in final) / len(final) for name in names},
        }
        if self.best is not None:
            columns["best_on_validation"] = self.history[self.best["epoch"] - 1]
        return {
            column: {name.removeprefix(f"{part}/"): record[name] for name in names}
            for column, record in columns.items()
        }

    def _final_records(self) -> list[dict[str, float]]:
        """The records that are averaged: the last `final_epochs`, or those since an epoch without scores.

        Such an epoch is among them when a training was continued to more epochs than it had been meant for.
        """
        key = f"{next(iter(self.parts))}/{SELECTED_BY}"
        last = self.history[-self.config.train.final_epochs :]
        return list(takewhile(lambda record: key in record, reversed(last)))

    # State and files

    def _state(self) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "generators": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None,
            },
            "best": self.best,
            "history": self.history,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.scaler.load_state_dict(state["scaler"])
            torch.set_rng_state(state["generators"]["cpu"])
            if self.device.type == "cuda" and state["generators"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["generators"]["cuda"], self.device)
            self.epoch, self.step, self.saved_epoch = state["epoch"], state["step"], state["epoch"]
            self.history, self.best = state["history"], state["best"]
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(f"{self.run / 'checkpoint.pt'} is not of this training: {error}") from error

    def _save(self) -> None:
        """Write the checkpoint, then the weights that are in it."""
        self.run.save_checkpoint(self._state())
        self.saved_epoch = self.epoch
        self._save_weights()

    def _save_weights(self) -> None:
        self.run.save_weights(self.model.state_dict())
        if self.best is not None:
            self.run.save_weights(self.best["weights"], "best")

    def _log(self, record: dict[str, float], writer: SummaryWriter) -> None:
        self.history.append(record)
        self.run.append_log(record)
        for name, value in record.items():
            if name != "epoch":
                writer.add_scalar(name, value, self.epoch)

    def _report(self) -> Result:
        """Write scores, curves, confusion matrix and timelines; show the table and the paths."""
        run, last = self.run.path, self.history[-1]
        written = [run / "config.yaml", run / "checkpoint.pt", run / "model.safetensors", run / "log.jsonl"]
        scores = {part: self._summary(part) for part in self.parts}
        plot_curves(run / "curves.png", self.history)
        written.append(run / "curves.png")
        if scores:
            facts = {"epochs": last["epoch"], "final_epochs": len(self._final_records())}
            facts |= {"best_epoch": self.best["epoch"]} if self.best is not None else {}
            written += write_scores(run, scores, facts)
        if "test" in self.parts:
            written += write_report(run, self._evaluation("test"), self.info.classes)
            print_table(self.console, score_table("Test recordings", self._headed(scores["test"])))
        for path in written:
            self.console.out(path, highlight=False)
        return Result(run, scores)

    def _headed(self, summary: dict[str, Scores]) -> dict[str, Scores]:
        """The summary under headings for people."""
        averaged = len(self._final_records())
        headings = {"last_epoch": "last\nepoch", "mean_of_final_epochs": f"mean of\nlast {averaged}"}
        if self.best is not None:
            headings["best_on_validation"] = f"best on\nvalidation\nepoch {self.best['epoch']}"
        return {heading: summary[name] for name, heading in headings.items()}

    def _announce(self) -> None:
        settings, parameters = self.config.train, sum(p.numel() for p in self.model.parameters())
        counts = ", ".join(f"{len(names)} {part}" for part, names in self.info.recordings.items() if names)
        start = f"from epoch {self.epoch + 1} " if self.epoch else ""
        task = f"{settings.epochs} epochs {start}into {self.run.path}"
        if self.epoch >= settings.epochs:
            task = f"finished after {self.epoch} epochs, writing the report into {self.run.path} again"
        self.console.out(
            f"{self.info.dataset}: {counts} recordings; {parameters:,} parameters; {self.device.type}, "
            f"{settings.precision}; {task}",
            highlight=False,
        )

    # Parts

    def _loader(self, data: TrainingData) -> DataLoader[Batch]:
        settings = self.config.train
        return DataLoader(
            data,
            batch_sampler=self.batches,
            collate_fn=Collate(settings.pad_multiple),
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, so that an epoch's start draws nothing from torch's
        )

    def _loss(self, dataset: Dataset) -> TRGLoss:
        weights, settings = self.info.class_weights, self.config.loss
        return TRGLoss(
            dataset.text,
            pos_weight=self.info.pos_weight,
            class_weights=None if weights is None else torch.tensor(weights),
            boundary=settings.boundary,
            absolute=settings.absolute,
            relative=settings.relative,
        )

    def _schedule(self) -> torch.optim.lr_scheduler.LambdaLR:
        settings, per_epoch = self.config.schedule, self.steps_per_epoch
        return build_schedule(
            self.optimizer,
            name=settings.name,
            steps=self.config.train.epochs * per_epoch,
            warmup_steps=settings.warmup_epochs * per_epoch,
            final=settings.final,
            step_size=settings.step_epochs * per_epoch,
            step_factor=settings.step_factor,
        )


class EpochBatches:
    """Batch sampler: (epoch, index) of the recordings, in an order that follows from seed and `epoch` alone.

    The last batch may be short; with `drop_last` a short one is left out.
    """

    def __init__(self, count: int, batch_size: int, seed: int, drop_last: bool) -> None:
        if drop_last and count < batch_size:
            raise UserError(
                f"train.drop_last leaves no batch: {count} training recordings, train.batch_size={batch_size}"
                "; lower the batch size or set train.drop_last=false"
            )
        self.count, self.batch_size, self.seed, self.drop_last = count, batch_size, seed, drop_last
        self.epoch = 0

    def __len__(self) -> int:
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        for i in range(len(self)):
            yield [(self.epoch, index) for index in order[i * self.batch_size : (i + 1) * self.batch_size]]


class TrainingData(torch.utils.data.Dataset[Recording]):
    """The training recordings, augmented; an item depends on nothing but seed, epoch and index."""

    def __init__(
        self, recordings: Sequence[Recording], settings: AugmentConfig, axis: int | None, seed: int
    ) -> None:
        self.recordings, self.settings, self.axis, self.seed = recordings, settings, axis, seed

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, key: tuple[int, int]) -> Recording:
        epoch, index = key
        rng = np.random.default_rng([self.seed, epoch, index])
        probabilities = self.settings.model_dump()
        return augment(self.recordings[index], rng, axis=self.axis, **probabilities)


@dataclass(frozen=True)
class Collate:
    """Makes a batch of recordings; a class, so that it can be sent to worker processes."""

    pad_multiple: int

    def __call__(self, recordings: Sequence[Recording]) -> Batch:
        return collate(recordings, self.pad_multiple)


class LossWatch:
    """Keeps the losses of an epoch on the device, and reads them all at once every `look_every` batches."""

    def __init__(self, epoch: int, look_every: int) -> None:
        self.epoch, self.look_every = epoch, look_every
        self.batches, self.frames = 0, 0
        self.latest: float | None = None
        self.recordings: tuple[str, ...] = ()  # of the last batch
        self._names: tuple[str, ...] = ()
        self._waiting: list[tuple[Tensor, tuple[str, ...], int]] = []
        self._sums = np.zeros(0)

    def add(self, terms: dict[str, Tensor], batch: Batch, step: int) -> None:
        """Take note of a batch's losses."""
        if not self.batches:
            self._names, self._sums = tuple(terms), np.zeros(len(terms))
        self.batches += 1
        self.frames += sum(batch.lengths)
        self.recordings = batch.names
        values = torch.stack([term.detach().float() for term in terms.values()])
        self._waiting.append((values, batch.names, step))
        if len(self._waiting) >= self.look_every:
            self.look()

    def look(self) -> None:
        """Read the losses that are waiting; raises NonFiniteTraining at the first that is not finite."""
        if not self._waiting:
            return
        read = torch.stack([values for values, _, _ in self._waiting]).cpu().numpy()
        for values, (_, recordings, step) in zip(read, self._waiting, strict=True):
            if not np.isfinite(values).all():
                named = zip(self._names, values, strict=True)
                listed = ", ".join(f"{name} {value:.4g}" for name, value in named)
                raise NonFiniteTraining(
                    f"the loss is not finite in epoch {self.epoch}, step {step} ({listed}), in the batch of "
                    f"{', '.join(recordings)}; {REMEDIES}"
                )
            self._sums += values
        self.latest = float(read[-1, self._names.index("total")])
        self._waiting.clear()

    def means(self) -> dict[str, float]:
        """The mean over the epoch's batches of every loss."""
        return dict(zip(self._names, (self._sums / self.batches).tolist(), strict=True))


def read_dataset(config: Config) -> Dataset:
    """The dataset of a configuration; its faults are the user's to mend."""
    with reading(f"dataset {config.data.name}"):
        return load_dataset(config.data.name, **config.data.options)


def split_dataset(dataset: Dataset, config: Config) -> Split:
    """The parts of the dataset that the configuration asks for."""
    with reading(f"split of {dataset.name}"):
        return dataset.split(config.data.test, config.data.validation, config.train.seed)


def describe(dataset: Dataset, config: Config) -> RunInfo:
    """The facts of a training on `dataset`."""
    split = split_dataset(dataset, config)
    return RunInfo.of(
        dataset,
        split,
        pos_weight=boundary_weight(split.train),
        class_weights=(
            median_frequency_weights(split.train, len(dataset.classes))
            if config.loss.class_weights == "median_frequency"
            else None
        ),
    )


def boundary_weight(recordings: Sequence[Recording]) -> float:
    """1 / (share of frames on which a segment starts): how much rarer they are than others.

    Raises:
        UserError: not a single segment is annotated.
    """
    boundaries = sum(float(recording.boundaries().sum()) for recording in recordings)
    if not boundaries:
        raise UserError("the training recordings have no annotated segment; nothing can be learned of them")
    return sum(recording.length for recording in recordings) / boundaries


def median_frequency_weights(recordings: Sequence[Recording], classes: int) -> list[float]:
    """(median frequency of the classes that occur) / (frequency of the class); 0 where it never occurs."""
    labels = np.concatenate([recording.labels for recording in recordings])
    counts = np.bincount(labels[labels != IGNORE], minlength=classes)
    median = np.median(counts[counts > 0])
    return [float(median / count) if count else 0.0 for count in counts]


def _callers_generators_kept() -> AbstractContextManager[None]:
    """Puts torch's generators, which a training seeds, back into their state when the block ends."""
    return torch.random.fork_rng(devices=range(torch.cuda.device_count()), device_type="cuda")


@contextmanager
def _deterministic_cudnn() -> Iterator[None]:
    """Keeps cuDNN from algorithms that add in any order, and from choosing them by their speed of the day."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def _check_same_data(saved: RunInfo, now: RunInfo, run: Run) -> None:
    of_training = {"versions", "commit", "created"}
    before, after = saved.model_dump(exclude=of_training), now.model_dump(exclude=of_training)
    changed = [key for key in before if before[key] != after[key]]
    if changed:
        raise UserError(
            f"the dataset is not the one that {run.path} was trained on: {', '.join(changed)} differ; "
            "continue with the same data, or start a new training"
        )
