"""The run folder: everything that a training leaves behind, complete in itself.

A run holds::

    config.yaml             the resolved configuration
    run.json                facts of the data and the versions it was trained with (RunInfo)
    prior.npz               text embeddings of joints and actions
    checkpoint.pt           complete state of the training, what --resume continues from
    model.safetensors       weights of the latest checkpoint
    best.safetensors        weights that scored best on the validation recordings, where there are any
    log.jsonl               one line per epoch
    tensorboard/            the same for TensorBoard
    curves.png  scores.json  scores.csv  confusion.csv  confusion.png  timelines/
    evaluation/             what `trgnet evaluate` writes, by split and weights
    predictions/            what `trgnet predict` writes

Files are written to a temporary name first, except for log.jsonl, to which lines are added, and tensorboard/,
which its own writer fills; a continued training writes the log anew from its checkpoint. Nothing that a file
holds is executed when it is read.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from .config import Config, load_config, save_config
from .data import Dataset, Preparation, Split
from .errors import UserError, one_line, reading
from .files import PARTIAL, remove_partial, replacing, write_text
from .model import TRGNet
from .skeleton import Skeleton
from .text import TextPrior
from .versions import checkout_commit, versions

BEGINNING = ("prior.npz", "run.json")
"""What a run folder holds before its configuration, which makes it one."""

WEIGHTS = {"last": "model.safetensors", "best": "best.safetensors"}
"""Choice of weights -> their file."""


class RunInfo(BaseModel):
    """What must be known of the training data to use the network, and what the training was made with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    classes: tuple[str, ...] = Field(min_length=1)
    background: int | None
    skeleton: Skeleton
    fps: float = Field(gt=0)
    channels: int = Field(ge=1)
    embedding_dim: int = Field(ge=1)
    preparation: Preparation | None = None
    recordings: dict[str, tuple[str, ...]]
    pos_weight: float
    class_weights: tuple[float, ...] | None
    versions: dict[str, str]
    commit: str | None
    created: str

    @classmethod
    def of(
        cls, dataset: Dataset, split: Split, *, pos_weight: float, class_weights: Sequence[float] | None
    ) -> RunInfo:
        """Facts of a training that starts now."""
        return cls(
            dataset=dataset.name,
            classes=dataset.classes,
            background=dataset.background,
            skeleton=dataset.skeleton,
            fps=dataset.fps,
            channels=dataset.channels,
            embedding_dim=dataset.text.dim,
            preparation=dataset.preparation,
            recordings={
                part: tuple(r.name for r in recordings) for part, recordings in split._asdict().items()
            },
            pos_weight=pos_weight,
            class_weights=class_weights,
            versions=versions(),
            commit=checkout_commit(),
            created=datetime.now().astimezone().isoformat(timespec="seconds"),
        )


def build_model(config: Config, info: RunInfo) -> TRGNet:
    """The network of a run, with fresh weights from torch's generator."""
    adjacency = info.skeleton.adjacency()
    sizes = config.model.model_dump()
    return TRGNet(info.channels, len(info.classes), adjacency, info.embedding_dim, **sizes)


def default_folder(config: Config) -> Path:
    """Where a training goes that was not told: ``runs/DATASET-DATE-TIME``."""
    return Path("runs") / f"{config.data.name}-{datetime.now():%Y%m%d-%H%M%S}"


class Run:
    """Names, writes and reads the files of one run folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @classmethod
    def create(cls, path: str | Path, config: Config, info: RunInfo, text: TextPrior) -> Run:
        """Start a run in `path`, which must not exist yet or be empty.

        Raises:
            UserError: there is something in the folder already.
        """
        run = cls(path)
        run.check_unused()
        with reading(f"run folder {path}"):
            run.path.mkdir(parents=True, exist_ok=True)
            remove_partial(run.path)
        with replacing(run / "prior.npz") as partial:
            np.savez(partial, joints=text.joints, actions=text.actions)
        write_text(run / "run.json", info.model_dump_json(indent=2) + "\n")
        save_config(config, run / "config.yaml")
        return run

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """A run that exists.

        Raises:
            UserError: `path` is no run folder.
        """
        run = cls(path)
        missing = [name for name in ("config.yaml", *BEGINNING) if not (run / name).is_file()]
        if missing:
            raise UserError(
                f"{path} is no run folder: it has no {', '.join(missing)}; expected a folder written by "
                "trgnet train"
            )
        return run

    def check_unused(self) -> None:
        """Raise a UserError if there is something in the folder already.

        What a training leaves that was killed before it had begun does not count: :meth:`create` writes the
        configuration last.
        """
        with reading(f"run folder {self.path}"):
            found = [path.name for path in self.path.iterdir()] if self.path.exists() else []
            if any(name not in BEGINNING and not name.startswith(PARTIAL) for name in found):
                raise UserError(
                    f"run folder {self.path} is not empty; choose another with --out, or continue it with "
                    f"--resume {self.path}"
                )

    def __truediv__(self, name: str) -> Path:
        """The path of a file of the run."""
        return self.path / name

    def config(self) -> Config:
        """The resolved configuration."""
        return load_config(self / "config.yaml")

    def info(self) -> RunInfo:
        """Facts of the data."""
        with reading(f"run file {self / 'run.json'}"):
            try:
                return RunInfo.model_validate_json((self / "run.json").read_bytes())
            except ValidationError as error:
                fault = error.errors(include_url=False)[0]
                place = ".".join(str(part) for part in fault["loc"])
                raise UserError(
                    f"{self / 'run.json'}: {place}: {fault['msg']}; the file is damaged"
                ) from error

    def text(self) -> TextPrior:
        """The text embeddings."""
        with reading(f"text embeddings {self / 'prior.npz'}"):
            with np.load(self / "prior.npz", allow_pickle=False) as arrays:
                return TextPrior(joints=arrays["joints"], actions=arrays["actions"])

    def save_weights(self, state: Mapping[str, Tensor], which: str = "last") -> None:
        """Write weights as safetensors; `which` is a key of :data:`WEIGHTS`."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        with replacing(self / WEIGHTS[which]) as partial:
            partial.write_bytes(
                safetensors.torch.save(tensors)
            )  # its save_file makes files that others cannot read

    def model(self, which: str = "last") -> TRGNet:
        """The trained network on the CPU, in evaluation mode; `which` is a key of :data:`WEIGHTS`.

        Raises:
            UserError: the weights are not there, damaged, or of another network.
        """
        path = self / WEIGHTS[which]
        if not path.is_file():
            reason = "continue the training with --resume, which writes it at the latest when it ends"
            if which == "best" and not self.info().recordings[self.config().train.best_on]:
                reason = "it was trained without recordings to choose the best on; use the weights 'last'"
            raise UserError(f"run {self.path} has no {path.name}: {reason}")
        model = build_model(self.config(), self.info())
        try:
            model.load_state_dict(safetensors.torch.load_file(path))
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{path} is damaged or of another network: {one_line(error)}") from error
        return model.eval()

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Write the state of the training: tensors, numbers, texts, and lists and dictionaries of them."""
        serialised = io.BytesIO()  # torch's own writing to a path hides what went wrong with the file
        torch.save(state, serialised)
        with replacing(self / "checkpoint.pt") as partial:
            partial.write_bytes(serialised.getbuffer())

    def checkpoint(self) -> dict[str, Any] | None:
        """The state of the training on the CPU; None before the first checkpoint.

        Raises:
            UserError: the file is damaged.
        """
        path = self / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # whatever the unpickler meets in a file that is damaged or none of torch's
            raise UserError(
                f"{path} is damaged or no checkpoint: {one_line(error)}; restore it from a backup, or delete it "
                "to start this training anew"
            ) from error
        if not isinstance(state, dict):
            raise UserError(f"{path} is no checkpoint of a training: it holds {type(state).__name__}")
        return state

    def write_log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Replace the log by these records, one per epoch."""
        write_text(self / "log.jsonl", "".join(json.dumps(record) + "\n" for record in records))

    def append_log(self, record: Mapping[str, Any]) -> None:
        """Add the record of one epoch to the log."""
        with (self / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
