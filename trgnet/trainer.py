"""Training: from a configuration to a run folder.

The loop is the usual one. Five things deserve a word:

* **Repeatable and resumable.** The order of an epoch comes from a generator of (seed, epoch), the
  augmentation of a recording from one of (seed, epoch, recording); neither has a state to save, and worker
  processes change nothing. What has a state (weights, optimizer, schedule, scaler, torch's generators,
  history, and the losses and the place within an epoch that has begun) is in one checkpoint, and every other
  file of the run is derived from it. So a continued training is the uninterrupted one, wherever it ended. On
  a GPU, cuDNN is kept to its deterministic algorithms.
* **One training on several processes.** Under torchrun each process trains on its part of every batch; what
  the first one alone does is guarded by `processes.first`.
* **The test recordings choose nothing**, unless one asks for it with `train.best_on`. Scores are reported of the last epoch, as the mean over the final
  epochs, and, where recordings were held out for validation, of the epoch that scored best on those.
* **Numbers that are not finite stop the training**, and the batch is named: a loss before the step on a CPU,
  and on a GPU, where each look at it waits for the device, within `train.log_every` steps; the weights at the
  end of the epoch, as no loss has seen what the last step made of them. Nothing is evaluated or saved then.
* **Nothing waits for a GPU between two looks at the loss**: losses are added up there, batches come from
  page-locked memory, and whether float16 overflowed, so that a step was skipped, is decided there too. So the
  learning rate's schedule counts every step, skipped or not.
"""

from __future__ import annotations

import math
import shlex
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from trgnet.kernels import verify_once
from trgnet.optimizers import (
    LCAM,
    SCHEDULES_OF_ALL_STEPS,
    ExponentSchedule,
    GatedSMES,
    build_exponent_schedule,
    build_optimizer,
    build_schedule,
    learning_rates,
    load_training_state,
    training_state,
)

from .compilation import CompiledNetwork, compile_errors
from .config import (
    AugmentConfig,
    Config,
    config_items,
    differing_keys,
    load_config,
    save_config,
    with_overrides,
)
from .data import IGNORE, Batch, Dataset, Recording, Split, augment, collate, load_dataset
from .errors import DataWarning, UserError, did_you_mean, one_line, reading
from .evaluation import Evaluation, Scores, evaluate, print_table, score_table, write_report, write_scores
from .files import remove_partial
from .interrupts import StopRequest, ignore_signals
from .losses import TRGLoss
from .model import MaskedBatchNorm
from .plots import plot_curves
from .predictor import Predictor, pick_device
from .processes import Processes
from .progress import TrainingProgress
from .runs import Run, RunInfo, build_model, default_folder
from .step_graphs import StepGraphs, graph_obstacle, uses_graphs

SELECTED_BY = "refined/f1@50"
"""The score whose maximum makes an epoch the best one."""

CHANGEABLE = (
    "data.root", "data.cache", "train.epochs", "train.device", "train.log_every", "train.evaluate_every",
    "train.final_epochs", "train.checkpoint_every", "train.checkpoint_minutes", "train.workers",
    "train.cuda_graph", "train.compile",
)  # fmt: skip
"""Configuration keys that a continued training may change: none of them alters a step that is behind.

With another `train.device`, `train.cuda_graph` or `train.compile` the steps to come are the same computation, rounded
differently; on another device, or compiled, dropout draws other masks too.
`train.epochs` would under the schedules that depend on the number of all steps; there it is refused too.
"""

FIXED = ("data", "model", "optimizer.name", "train.seed", "train.precision")
"""Keys, and sections of them, that decide what has been trained, and so cannot change even if that is meant."""

ALLOWABLE_PROCESSES = "processes"
"""What to allow for a training to be continued by another number of processes."""

OF_AN_EPOCH = (
    "train.batch_size", "train.accumulate", "train.drop_last", "train.length_sorted", ALLOWABLE_PROCESSES,
)  # fmt: skip
"""What divides an epoch into steps, and so can change between two epochs only."""

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Setting of `train.precision` -> what autocast converts to."""

REMEDIES = (
    "look at these recordings, lower optimizer.lr, set train.clip_norm=1, or use train.precision=fp32; "
    "the run folder keeps the checkpoint before"
)


class NonFiniteTraining(UserError):
    """The loss or the weights became NaN or infinite."""


class Interrupted(KeyboardInterrupt):
    """The training was interrupted; the message says how to continue it.

    `signal` is the number of the signal that did it.
    """

    def __init__(self, message: str, number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.signal = number


class _Stop(Exception):
    """Somebody asked to stop while the recordings were being scored."""


@dataclass(frozen=True)
class Result:
    """A finished training: its run folder, and the scores of every part of the data in percent.

    `scores` maps the part ("test", and "validation" where there is one) to "last_epoch",
    "mean_of_final_epochs" and, with a validation part, "best_on_validation" ("best_on_test" where that was asked
    for); each of these maps the names of
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
        Interrupted: by Ctrl-C or SIGTERM; what has been trained is saved, and the message says how to go on.
        NonFiniteTraining: the loss or the weights became NaN or infinite.
    """
    config = config if isinstance(config, Config) else load_config(config)
    processes = Processes.join()
    out = processes.from_first(default_folder(config) if out is None else out)
    with _callers_generators_kept():
        return Trainer.start(config, out, console, processes).fit()


def resume(
    run: str | Path,
    overrides: Sequence[str] = (),
    *,
    config: Config | str | Path | None = None,
    allow: Sequence[str] = (),
    console: Console | None = None,
) -> Result:
    """Continue a training from its last checkpoint, exactly as if it had not been interrupted.

    Of a finished training the weights and the report are written again. Where one goes on to more epochs,
    those that it evaluated as its final ones stay evaluated. The state of torch's generators is afterwards
    what it was before.

    Args:
        run: its folder.
        overrides: ``"section.key=value"`` for keys of :data:`CHANGEABLE`, such as more epochs.
        config: a configuration, or the name or file of one, that is to be the run's; by default the run's own.
        allow: keys that may change although the training is then no longer the one that was begun, such as
            ``"optimizer.lr"``; "processes" for another number of processes.
        console: as for :func:`train`.

    Raises:
        UserError: no run folder, damaged files, other data, or a change that was not allowed or cannot be made;
            names the keys.
        Interrupted, NonFiniteTraining: as for :func:`train`.
    """
    if config is not None and not isinstance(config, Config):
        config = load_config(config)
    processes = Processes.join()
    with _callers_generators_kept():
        trainer = Trainer.restart(Run.open(run), overrides, console, processes, config=config, allow=allow)
        return trainer.fit()


class Trainer:
    """One training: its data, network, optimizer and run folder."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        run: Run,
        info: RunInfo,
        console: Console | None = None,
        processes: Processes | None = None,
    ) -> None:
        settings = config.train
        self.config, self.run, self.info = config, run, info
        self.processes = processes or Processes()
        self.console = (console or Console()) if self.processes.first else Console(quiet=True)
        self.device = pick_device(settings.device, option="train.device")
        if settings.precision == "fp16" and self.device.type == "cpu":
            raise UserError("train.precision=fp16 needs a GPU; on a CPU use train.precision=bf16 or fp32")
        self.uses_graphs = uses_graphs(settings, self.device, self.processes)
        half = AUTOCAST[settings.precision]
        verify_once(self.device, torch.float32, *([half] if half else []))
        split = split_dataset(dataset, config)
        self.parts = {"validation": split.validation, "test": split.test}
        self.parts = {part: recordings for part, recordings in self.parts.items() if recordings}
        self.batches = EpochBatches(
            [recording.length for recording in split.train],
            settings.batch_size,
            settings.seed,
            settings.drop_last,
            length_sorted=settings.length_sorted,
            processes=self.processes,
        )
        self.loader = self._loader(
            TrainingData(split.train, config.augment, dataset.rotation_axis, settings.seed)
        )

        torch.manual_seed(settings.seed)
        self.model = build_model(config, info).to(self.device)
        self.network = self._network()  # the model as it is trained
        self.loss = self._loss(dataset).to(self.device)
        self.joint_graph = dataset.text.joint_graph().to(self.device)
        self.optimizer = build_optimizer(
            self.model.parameters(), **config.optimizer.model_dump(), capturable=self.uses_graphs
        )
        self.steps_per_epoch = math.ceil(len(self.batches) / settings.accumulate)
        self.schedule, self.exponent = self._schedule(), self._exponent()
        self.gated = isinstance(self.optimizer, (LCAM, GatedSMES))  # the loss decides on how it steps
        self.scaler = self._scaler()
        self.graphs = StepGraphs(self._whole_step, self.device, self._repair) if self.uses_graphs else None

        self.epoch, self.step = 0, 0  # that are behind
        self.watch: LossWatch | None = None  # of the epoch that has begun
        self.stop, self.saved_at = StopRequest(), time.monotonic()
        self.saved = "nothing yet"
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] | None = None

    @classmethod
    def start(
        cls,
        config: Config,
        out: str | Path,
        console: Console | None = None,
        processes: Processes | None = None,
    ) -> Trainer:
        """Set up a new training; its folder is made last, when everything the user gave has been checked."""
        dataset = read_dataset(config)
        info = describe(dataset, config)
        trainer = cls(config, dataset, Run(out), info, console, processes)
        if trainer.processes.first:
            Run.create(out, config, info, dataset.text)
        return trainer

    @classmethod
    def restart(
        cls,
        run: Run,
        overrides: Sequence[str] = (),
        console: Console | None = None,
        processes: Processes | None = None,
        *,
        config: Config | None = None,
        allow: Sequence[str] = (),
    ) -> Trainer:
        """Set up a training that continues from the checkpoint of `run`, or anew where there is none."""
        saved = run.config()
        config = with_overrides(saved if config is None else config, overrides)
        changed = differing_keys(saved, config)
        _check_changes(saved, config, changed, allow)
        dataset, info, checkpoint = read_dataset(config), run.info(), run.checkpoint()
        _check_same_data(info, describe(dataset, config), run)
        trainer = cls(config, dataset, run, info, console, processes)
        if checkpoint is not None:
            trainer._restore(checkpoint, changed, allow)
        if config.train.epochs != saved.train.epochs:
            trainer._check_new_length(saved.train.epochs)
        if trainer.processes.first:
            for folder in (run.path, run / "timelines"):
                remove_partial(folder)
            save_config(config, run / "config.yaml")
        return trainer

    def _check_new_length(self, before: int) -> None:
        epochs, shapes = self.config.train.epochs, self._shapes_of_all_steps()
        if self.step and shapes:
            key, of_a_step = shapes[0]
            raise UserError(
                f"train.epochs cannot change from {before} to {epochs}: with {key} the "
                f"{of_a_step} of every step depends on the number of all steps, and {self.epoch} epochs "
                "are trained already; finish this training as it is, or start a new one of the length you want"
            )
        if epochs <= self.epoch:
            raise UserError(
                f"{self.epoch} epochs are trained already, so train.epochs={epochs} leaves nothing to do; "
                "ask for more"
            )

    def _shapes_of_all_steps(self) -> list[tuple[str, str]]:
        """Settings under which what a step is done with depends on the number of all steps, and what that is."""
        shapes = [
            (f"schedule.name={self.config.schedule.name}", "learning rate"),
            (f"exponent.name={self.config.exponent.name}", "exponent"),
        ]
        return [shape for shape in shapes if shape[0].partition("=")[2] in SCHEDULES_OF_ALL_STEPS]

    def fit(self) -> Result:
        """Train to the last epoch, save, report. Other processes than the first return the same, unwritten.

        Raises:
            Interrupted: by Ctrl-C or SIGTERM, after the step was finished and everything was saved; by a second
                one at once, and the run folder is that of the last checkpoint.
            NonFiniteTraining: the loss or the weights became NaN or infinite.
            UserError: a file cannot be written.
        """
        if self.processes.first:
            with self._writing():
                self.run.write_log(self.history)
                if self.step:  # what ended before it had written them may have left others, or none
                    self._save_weights()
        self._announce()
        try:
            if self.epoch < self.config.train.epochs:
                with self.stop, _deterministic_cudnn():
                    self._train_epochs()
            with self._writing():
                return self._report()
        except KeyboardInterrupt as interrupt:
            raise Interrupted(
                f"interrupted; what is saved is {self.saved}. Continue with: {self._command}",
                self.stop.signal or signal.SIGINT,
            ) from interrupt

    @property
    def _command(self) -> str:
        return f"trgnet train --resume {shlex.quote(str(self.run.path))}"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns the errors of a disk that is full or may not be written to into a message of what to do."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write into the run folder: {error}; what is saved is {self.saved}. Make room or mend "
                f"the folder, then continue with: {self._command}"
            ) from error

    def _train_epochs(self) -> None:
        epochs = self.config.train.epochs
        with ExitStack() as stack:
            if self.graphs is not None:
                stack.callback(self.graphs.release)
            writer = stack.enter_context(self._writer()) if self.processes.first else None
            progress = stack.enter_context(TrainingProgress(self.console, epochs, self.epoch))
            while self.epoch < epochs:
                record = self._train_epoch(progress)
                evaluated = self._is_evaluated(self.epoch + 1)
                if evaluated:
                    record |= self._evaluate()
                self.epoch, self.watch = self.epoch + 1, None
                self.history.append(record)
                if writer is not None:
                    with self._writing():
                        self._log(record, writer)
                progress.epoch(record, next(iter(self.parts)) if evaluated else None)
                if self.epoch % self.config.train.checkpoint_every == 0 or self.epoch == epochs:
                    self._save()

    @contextmanager
    def _writer(self) -> Iterator[SummaryWriter]:
        with self._writing():
            writer = SummaryWriter(str(self.run / "tensorboard"), purge_step=self.epoch + 1)
        try:
            yield writer
        finally:
            with self._writing():
                writer.close()

    # One epoch

    def _train_epoch(self, progress: TrainingProgress) -> dict[str, float]:
        """Train what is left of an epoch and return its log record."""
        self.model.train()
        if self.watch is None:
            rate = learning_rates(self.schedule)[0]
            self.watch = LossWatch(self.epoch + 1, rate, self.processes, self._exponents())
            if self.gated and self.epoch:
                self.optimizer.new_epoch()
        watch = self.watch
        self.batches.epoch, self.batches.done = watch.epoch, watch.batches
        before, started = watch.seconds, time.perf_counter()
        for group in self._groups():
            self._step(group, watch)
            watch.seconds = before + time.perf_counter() - started
            if self._looks(self.step):
                self._pause()
            progress.step(watch.batches / len(self.batches), watch.latest, watch.frames / watch.seconds)
        watch.look()
        self._check_weights(watch.recordings)
        watch.seconds = before + time.perf_counter() - started
        return {
            "epoch": watch.epoch,
            "step": self.step,
            "lr": watch.rate,
            **watch.exponents,
            **self._phases(),
            **{f"loss/{name}": value for name, value in watch.means().items()},
            "seconds": watch.seconds,
            "frames_per_second": watch.frames / watch.seconds,
        }

    def _exponents(self) -> dict[str, float]:
        """The exponent of the next step, for the log: one, or one for each phase."""
        if self.exponent is None:
            return {}
        (alpha,) = self.exponent.exponents()
        if not self.gated:
            return {"alpha": alpha}
        low, high = alpha if isinstance(alpha, tuple) else (alpha, alpha)
        return {"alpha/low": low, "alpha/high": high}

    def _phases(self) -> dict[str, float]:
        """The epoch's steps in the phases of low and of high loss, for the log; waits for the device."""
        if not self.gated:
            return {}
        names = ("phase/low_steps", "phase/high_steps")
        counts = dict(zip(names, map(int, self.optimizer.phase_steps.tolist()), strict=True))
        of_epoch = {name: counts[name] - sum(record[name] for record in self.history) for name in names}
        return {**of_epoch, "phase/low_share": of_epoch[names[0]] / max(sum(of_epoch.values()), 1)}

    def _looks(self, step: int) -> bool:
        """Whether the losses are read in this step, for which a GPU has to be waited for."""
        return self.device.type == "cpu" or step % self.config.train.log_every == 0

    def _pause(self) -> None:
        """Between two steps: save if it is time to; save and end if somebody was asked to stop."""
        minutes = self.config.train.checkpoint_minutes
        late = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        wish = self.processes.highest(2 if self.stop else 1 if late and self.processes.first else 0)
        if wish:
            self.watch.look()
            self._check_weights(self.watch.recordings)
            self._save()
        if wish == 2:
            raise KeyboardInterrupt

    def _groups(self) -> Iterator[list[Batch]]:
        """The batches of an epoch, in groups that make one optimizer step each."""
        batches = iter(self.loader)
        while group := list(islice(batches, self.config.train.accumulate)):
            yield group

    def _step(self, group: Sequence[Batch], watch: LossWatch) -> None:
        """One optimizer step along the mean gradient of the batches of `group`."""
        if self.graphs is not None:
            (batch,) = group
            watch.add(self.graphs(batch), batch, self.step + 1)
        else:
            self._gradients(group, watch)
        if self._looks(self.step + 1):
            watch.look()
        if self.graphs is None:
            self._update()
        self.step += 1
        self.schedule.step()
        if self.exponent is not None:
            self.exponent.step()

    def _gradients(self, group: Sequence[Batch], watch: LossWatch) -> None:
        """The mean gradient of the batches of `group`; their losses go to `watch`."""
        self.optimizer.zero_grad(set_to_none=True)
        for batch in group:
            with self._exchange(last=batch is group[-1]):
                terms = self._backward(batch.to(self.device, non_blocking=True), parts=len(group))
                watch.add(terms, batch, self.step + 1)

    def _whole_step(self, batch: Batch) -> dict[str, Tensor]:
        """All that a step of one batch on the device does there, without its schedule."""
        self.optimizer.zero_grad(set_to_none=True)
        terms = self._backward(batch)
        self._update()
        return terms

    def _repair(self) -> None:
        """Forget what the optimizer and the scaler remember of a step that never happened on the device."""
        load_training_state(self.schedule, training_state(self.schedule))
        if self.exponent is not None:
            self.exponent.step(self.step)
        scaler, self.scaler = self.scaler, self._scaler()
        self.scaler.load_state_dict(scaler.state_dict())

    def _backward(self, batch: Batch, parts: int = 1) -> dict[str, Tensor]:
        """Add the gradient of a batch on the device, one of `parts` whose mean is taken; returns its losses."""
        with compile_errors() if self.config.train.compile else nullcontext():
            with self._autocast():
                output = self.network(batch.x, batch.mask, self.joint_graph, batch.segments)
            terms = self.loss(output, batch)
            self.scaler.scale(terms["total"] / parts).backward()
        if self.gated:
            self.optimizer.observe(terms["total"])
        return {name: term.detach() for name, term in terms.items()}

    def _update(self) -> None:
        """The optimizer's step along the gradient, clipped if that is wanted."""
        if self.config.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _exchange(self, last: bool) -> AbstractContextManager[Any]:
        """Several processes average their gradients once, with the last batch of a step."""
        return self.network.no_sync() if self.processes.several and not last else nullcontext()

    @torch.no_grad()
    def _check_weights(self, recordings: Sequence[str]) -> None:
        """Stop if the norm of all weights is not finite; `recordings` are those of the last batch."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        norm = torch.nn.utils.get_total_norm([tensor for tensor in tensors if tensor.is_floating_point()])
        if not norm.isfinite():
            raise NonFiniteTraining(
                f"the norm of the weights is not finite in epoch {self.epoch + 1}, step {self.step}, whose "
                f"last batch was {', '.join(recordings)}; {REMEDIES}"
            )

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST[self.config.train.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    # Scores

    def _is_evaluated(self, epoch: int) -> bool:
        settings = self.config.train
        is_final = epoch > settings.epochs - settings.final_epochs
        return bool(self.parts) and (is_final or epoch % settings.evaluate_every == 0)

    def _evaluate(self) -> Scores:
        """Score every held-out part; remember the weights if they are the best so far.

        Raises:
            KeyboardInterrupt: somebody asked to stop; the state before is saved, the epoch's steps included.
        """
        try:
            scores = self._scores() if self.processes.first else None
        except _Stop:
            scores = None
        scores = self.processes.from_first(scores)
        if scores is None:
            self._save()
            raise KeyboardInterrupt
        selected = scores.get(f"{self.config.train.best_on}/{SELECTED_BY}")
        if selected is not None and (self.best is None or selected > self.best["score"]):
            weights = {
                name: tensor.detach().cpu().clone() for name, tensor in self.model.state_dict().items()
            }
            self.best = {"epoch": self.epoch + 1, "score": selected, "weights": weights}
        return scores

    def _scores(self) -> Scores:
        return {
            f"{part}/{name}": value
            for part in self.parts
            for name, value in self._evaluation(part).scores.items()
        }

    def _evaluation(self, part: str) -> Evaluation:
        threshold, pad_multiple = self.config.refine.threshold, self.config.train.pad_multiple
        predictor = Predictor(
            self.model, self.info, self.joint_graph, threshold=threshold, pad_multiple=pad_multiple
        )
        return evaluate(predictor, self._until_stopped(self.parts[part]))

    def _until_stopped(self, recordings: Sequence[Recording]) -> Iterator[Recording]:
        for recording in recordings:
            if self.stop:
                raise _Stop
            yield recording

    def _summary(self, part: str) -> dict[str, Scores]:
        """Scores of `part` by the three ways of choosing weights, from the history."""
        names = [key for key in self.history[-1] if key.startswith(f"{part}/")]
        final = self._final_records()
        columns = {
            "last_epoch": self.history[-1],
            "mean_of_final_epochs": {name: math.fsum(r[name] for r in final) / len(final) for name in names},
        }
        if self.best is not None:
            columns[f"best_on_{self.config.train.best_on}"] = self.history[self.best["epoch"] - 1]
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
        generators = {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None,
        }
        return {
            "epoch": self.epoch,
            "step": self.step,
            "watch": None if self.watch is None else self.watch.state_dict(),
            "model": self.model.state_dict(),
            **training_state(self.schedule),
            "scaler": self.scaler.state_dict(),
            "generators": self.processes.gather(generators),
            "best": self.best,
            "history": self.history,
        }

    def _restore(self, state: dict[str, Any], changed: Sequence[str] = (), allow: Sequence[str] = ()) -> None:
        """Continue from `state`, with the settings `changed` since."""
        try:
            self._restore_generators(state["generators"], allow)
            self.model.load_state_dict(state["model"])
            load_training_state(self.schedule, state)
            if self.exponent is not None:
                self.exponent.step(state["step"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.step = state["epoch"], state["step"]
            self.history = state["history"]
            self.best = None if "train.best_on" in changed else state["best"]  # chosen on other recordings
            if state["watch"] is not None:
                self.watch = LossWatch(self.epoch + 1, 0.0, self.processes)
                self.watch.load_state_dict(state["watch"])
            self.saved = self._moment()
        except UserError:
            raise
        except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as error:
            raise UserError(
                f"{self.run / 'checkpoint.pt'} is not of this training: {one_line(error)}"
            ) from error
        others = {ALLOWABLE_PROCESSES} if len(state["generators"]) != self.processes.count else set()
        early = [key for key in OF_AN_EPOCH if key in others.union(changed)]
        if self.watch is not None and early:
            raise UserError(
                f"{', '.join(early)} can change between two epochs only, and this training ended within epoch "
                f"{self.watch.epoch}: continue it as it was with train.checkpoint_every=1, interrupt it after an "
                "epoch's end with a second Ctrl-C, and change then"
            )

    def _restore_generators(self, states: Sequence[dict[str, Tensor | None]], allow: Sequence[str]) -> None:
        if len(states) != self.processes.count:
            if ALLOWABLE_PROCESSES not in allow:
                raise UserError(
                    f"{self.run.path} was trained by {len(states)} processes, and here are {self.processes.count}"
                    f": the random numbers would be others; start as many, or add --allow {ALLOWABLE_PROCESSES}"
                )
            return
        state = states[self.processes.rank]
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and state["cuda"] is not None:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def _moment(self) -> str:
        """Where the training stands, for people."""
        if self.watch is None:
            return f"the training after epoch {self.epoch}"
        return f"the training after step {self.step}, within epoch {self.watch.epoch}"

    def _save(self) -> None:
        """Write the checkpoint, then the weights that are in it."""
        state = self._state()  # every process's
        if self.processes.first:
            with self._writing():
                self.run.save_checkpoint(state)
                self.saved = self._moment()
                self._save_weights()
        self.saved, self.saved_at = self._moment(), time.monotonic()

    def _save_weights(self) -> None:
        self.run.save_weights(self.model.state_dict())
        if self.best is not None:
            self.run.save_weights(self.best["weights"], "best")

    def _log(self, record: dict[str, float], writer: SummaryWriter) -> None:
        self.run.append_log(record)
        for name, value in record.items():
            if name != "epoch":
                writer.add_scalar(name, value, self.epoch)

    def _report(self) -> Result:
        """Write scores, curves, confusion matrix and timelines; show the table and the paths."""
        if not self.processes.first:
            return Result(self.run.path, self.processes.from_first(None))
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
        return Result(run, self.processes.from_first(scores))

    def _headed(self, summary: dict[str, Scores]) -> dict[str, Scores]:
        """The summary under headings for people."""
        averaged = len(self._final_records())
        headings = {"last_epoch": "last\nepoch", "mean_of_final_epochs": f"mean of\nlast {averaged}"}
        if self.best is not None:
            part = self.config.train.best_on
            chosen = f"best on\n{part}" if part == "validation" else f"best on {part}\n(chosen on it)"
            headings[f"best_on_{part}"] = f"{chosen}\nepoch {self.best['epoch']}"
        return {heading: summary[name] for name, heading in headings.items()}

    def _announce(self) -> None:
        settings, parameters = self.config.train, sum(p.numel() for p in self.model.parameters())
        counts = ", ".join(f"{len(names)} {part}" for part, names in self.info.recordings.items() if names)
        start = f"from epoch {self.epoch + 1} " if self.epoch else ""
        start += f"and step {self.step + 1} " if self.watch is not None else ""
        task = f"{settings.epochs} epochs {start}into {self.run.path}"
        if self.epoch >= settings.epochs:
            task = f"finished after {self.epoch} epochs, writing the report into {self.run.path} again"
        device = (
            f"{self.processes.count} x {self.device.type}" if self.processes.several else self.device.type
        )
        self.console.out(
            f"{self.info.dataset}: {counts} recordings; {parameters:,} parameters; {device}, "
            f"{settings.precision}{', CUDA graphs' if self.uses_graphs else ''}; {task}",
            highlight=False,
        )
        if settings.cuda_graph == "auto" and self.device.type == "cuda" and not self.uses_graphs:
            reason, _ = graph_obstacle(settings, self.device, self.processes)
            self.console.out(f"steps are not recorded as CUDA graphs: {reason}", highlight=False)

    # Parts

    def _network(self) -> nn.Module:
        """The model, compiled if that is wanted; for several processes, so that their gradients are averaged."""
        network = CompiledNetwork(self.model) if self.config.train.compile else self.model
        if not self.processes.several:
            return network
        common = self.config.train.batch_norm == "synchronised"
        for module in self.model.modules():
            if isinstance(module, MaskedBatchNorm) and common:
                module.process_group = dist.group.WORLD
        if not self.processes.first:  # other dropout than the first process's, which draws as it would alone
            seeds = np.random.SeedSequence([self.config.train.seed, self.processes.rank])
            torch.manual_seed(int(seeds.generate_state(1)[0]))
        return DistributedDataParallel(network)

    def _loader(self, data: TrainingData) -> DataLoader[Batch]:
        settings = self.config.train
        return DataLoader(
            data,
            batch_sampler=self.batches,
            collate_fn=Collate(settings.pad_multiple, buckets=self.uses_graphs),
            num_workers=settings.workers,
            worker_init_fn=ignore_signals,
            persistent_workers=settings.workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # its own, so that an epoch's start draws nothing from torch's
        )

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.config.train.precision == "fp16")

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

    def _exponent(self) -> ExponentSchedule | None:
        settings, per_epoch = self.config.exponent, self.steps_per_epoch
        if self.config.optimizer.exponent is None:
            return None
        return build_exponent_schedule(
            self.optimizer,
            name=settings.name,
            alpha=self.config.optimizer.exponent,
            steps=self.config.train.epochs * per_epoch,
            final=settings.final,
            period=settings.period_epochs * per_epoch,
        )


class EpochBatches:
    """Batch sampler: (epoch, index) of the recordings, in an order that follows from seed and `epoch` alone.

    The last batch may be short; with `drop_last` a short one is left out. With `length_sorted` a batch holds
    recordings of similar length, and the batches come in random order. The first `done` batches of the epoch
    are left out, to continue it.

    Of several processes each gets as many recordings of every batch; what does not divide evenly is left out
    of that epoch.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        drop_last: bool,
        *,
        length_sorted: bool = False,
        processes: Processes | None = None,
    ) -> None:
        count, processes = len(lengths), processes or Processes()
        if drop_last and count < batch_size:
            raise UserError(
                f"train.drop_last leaves no batch: {count} training recordings, train.batch_size={batch_size}"
                "; lower the batch size or set train.drop_last=false"
            )
        if batch_size % processes.count or count < processes.count:
            raise UserError(
                f"{processes.count} processes cannot share train.batch_size={batch_size} and {count} training "
                "recordings: the batch size must be a multiple of the processes, and each needs a recording"
            )
        self.lengths, self.batch_size, self.seed, self.drop_last = lengths, batch_size, seed, drop_last
        self.length_sorted, self.processes = length_sorted, processes
        self.epoch, self.done = 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        whole, rest = divmod(len(self.lengths), self.batch_size)
        return whole + (rest >= self.processes.count and not self.drop_last)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for batch in self._batches()[self.done :]:
            shared = len(batch) - len(batch) % self.processes.count
            yield [
                (self.epoch, index) for index in batch[self.processes.rank : shared : self.processes.count]
            ]

    def _batches(self) -> list[list[int]]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths)).tolist()
        if self.length_sorted:
            order.sort(key=self.lengths.__getitem__)
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        batches = [order[start : start + self.batch_size] for start in starts]
        if self.length_sorted:
            batches = [batches[index] for index in rng.permutation(len(batches))]
        return batches


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
    buckets: bool = False

    def __call__(self, recordings: Sequence[Recording]) -> Batch:
        return collate(recordings, self.pad_multiple, buckets=self.buckets)


class LossWatch:
    """Keeps the losses of an epoch on the device until :meth:`look` reads them all at once.

    Args:
        epoch: its number, from 1.
        rate: the learning rate at its start.
        processes: whose losses are averaged.
        exponents: those at its start, as the log names them.
    """

    def __init__(
        self, epoch: int, rate: float, processes: Processes, exponents: dict[str, float] | None = None
    ) -> None:
        self.epoch, self.rate, self.processes, self.exponents = epoch, rate, processes, exponents or {}
        self.batches, self.frames, self.seconds = 0, 0, 0.0
        self.latest: float | None = None
        self.recordings: tuple[str, ...] = ()  # of the last batch
        self._names: tuple[str, ...] = ()
        self._waiting: list[tuple[Tensor, tuple[str, ...], int]] = []
        self._sums: list[float] = []

    def add(self, terms: dict[str, Tensor], batch: Batch, step: int) -> None:
        """Take note of a batch's losses."""
        if not self.batches:
            self._names, self._sums = tuple(terms), [0.0] * len(terms)
        self.batches += 1
        self.recordings = batch.names
        values = [term.detach().float() for term in terms.values()]
        frames = torch.full_like(values[0], sum(batch.lengths))
        # torch.stack copies them: the next replay of a CUDA graph overwrites its own.
        self._waiting.append((torch.stack([*values, frames]), batch.names, step))

    def look(self) -> None:
        """Read the losses that are waiting; raises NonFiniteTraining at the first that is not finite."""
        if not self._waiting:
            return
        read = self.processes.summed(torch.stack([values for values, _, _ in self._waiting]).cpu()).tolist()
        for (*sums, frames), (_, recordings, step) in zip(read, self._waiting, strict=True):
            values = [value / self.processes.count for value in sums]
            if not all(map(math.isfinite, values)):
                named = zip(self._names, values, strict=True)
                listed = ", ".join(f"{name} {value:.4g}" for name, value in named)
                raise NonFiniteTraining(
                    f"the loss is not finite in epoch {self.epoch}, step {step} ({listed}), in the batch of "
                    f"{', '.join(recordings)}; {REMEDIES}"
                )
            self._sums = [before + value for before, value in zip(self._sums, values, strict=True)]
            self.frames += int(frames)
        self.latest = values[self._names.index("total")]
        self._waiting.clear()

    def means(self) -> dict[str, float]:
        """The mean over the epoch's batches of every loss."""
        return {name: value / self.batches for name, value in zip(self._names, self._sums, strict=True)}

    def state_dict(self) -> dict[str, Any]:
        """Everything, after a :meth:`look`."""
        kept = (
            "epoch", "rate", "exponents", "batches", "frames", "seconds", "latest", "recordings", "_names", "_sums",
        )  # fmt: skip
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        vars(self).update(state)


def read_dataset(config: Config) -> Dataset:
    """The dataset of a configuration; its faults are the user's to mend."""
    data = config.data
    places = {"root": data.root, "text": data.text, "cache": data.cache}
    given = {key: value for key, value in places.items() if value is not None}
    twice = given.keys() & data.options.keys()
    if twice:
        raise UserError(f"data.options has {', '.join(sorted(twice))}, which has a key of its own under data")
    with reading(f"dataset {data.name}"):
        return load_dataset(data.name, **given, **data.options)


def split_dataset(dataset: Dataset, config: Config) -> Split:
    """The parts of the dataset that the configuration asks for."""
    with reading(f"split of {dataset.name}"):
        return dataset.split(config.data.test, config.data.validation, config.train.seed)


def describe(dataset: Dataset, config: Config) -> RunInfo:
    """The facts of a training on `dataset`; warns of classes that the training recordings never show."""
    split = split_dataset(dataset, config)
    unseen = _unseen(split.train, dataset.classes)
    if unseen:
        shown = ", ".join(unseen[:5]) + (f" and {len(unseen) - 5} more" if len(unseen) > 5 else "")
        warnings.warn(
            f"{dataset.name}: no training recording shows {shown}; the network cannot learn what it never sees",
            DataWarning,
            stacklevel=2,
        )
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


def _unseen(recordings: Sequence[Recording], classes: Sequence[str]) -> list[str]:
    seen = set(np.concatenate([np.unique(recording.labels) for recording in recordings]).tolist())
    return [name for label, name in enumerate(classes) if label not in seen]


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


def _check_changes(saved: Config, config: Config, changed: Sequence[str], allow: Sequence[str]) -> None:
    """Refuse changes of a training that has begun, unless they are harmless or allowed and possible."""
    known = [key for key, _ in config_items(config)] + [ALLOWABLE_PROCESSES]
    unknown = [key for key in allow if key not in known]
    if unknown:
        raise UserError(
            f"--allow takes keys of the configuration, got {unknown[0]!r}{did_you_mean(unknown[0], known)}"
        )
    before, after = dict(config_items(saved)), dict(config_items(config))
    refused = [key for key in changed if key not in (*CHANGEABLE, *allow)]
    impossible = [
        key
        for key in changed
        if key not in CHANGEABLE and any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)
    ]
    if not refused and not impossible:
        return
    listed = ", ".join(
        f"{key} ({before[key]} -> {after[key]})" for key in dict.fromkeys([*refused, *impossible])
    )
    if impossible:
        remedy = "start a new training for other settings"
    else:
        remedy = f"if that is meant, say so with --allow {','.join(refused)}"
    raise UserError(
        f"a continued training cannot change {listed} and be the same; {remedy}. Without harm it can change "
        f"{', '.join(CHANGEABLE)}"
    )


def _check_same_data(saved: RunInfo, now: RunInfo, run: Run) -> None:
    of_training = {"versions", "commit", "created"}
    before, after = saved.model_dump(exclude=of_training), now.model_dump(exclude=of_training)
    changed = [key for key in before if before[key] != after[key]]
    if changed:
        raise UserError(
            f"the dataset is not the one that {run.path} was trained on: {', '.join(changed)} differ; "
            "continue with the same data, or start a new training"
        )
