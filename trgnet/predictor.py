"""Using a trained network: from a recording to its timeline.

>>> import trgnet
>>> prediction = trgnet.load("runs/mocap6").predict(features)  # features: (C, V, T)
>>> for segment in prediction.segments:
...     print(segment.start_seconds, segment.end_seconds, segment.name, segment.confidence)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .data import IGNORE, Recording, collate, segments_of
from .errors import UserError, reading
from .files import write_csv, write_json
from .model import TRGNet
from .plots import plot_timeline
from .refine import refine, sigmoid
from .runs import WEIGHTS, Run, RunInfo


@dataclass(frozen=True)
class Segment:
    """A stretch of one action: frames start to end (exclusive), the same in seconds, the class and its
    confidence, which is the class's mean probability over the segment's frames, from 0 to 1."""

    start: int
    end: int
    start_seconds: float
    end_seconds: float
    label: int
    name: str
    confidence: float


@dataclass(frozen=True, eq=False)
class Prediction:
    """What the network says of one recording of T frames and K classes.

    Args:
        name: the recording's name.
        labels: int64 (T,), class of every frame after boundary refinement.
        frame_labels: int64 (T,), most probable class of every frame on its own.
        probabilities: float32 (K, T).
        boundary_probability: float32 (T,), that a segment starts at the frame.
        classes: K class names.
        fps: frames per second.
        truth: int64 (T,), annotated class of every frame (255: none), where the recording came with it.
    """

    name: str
    labels: np.ndarray
    frame_labels: np.ndarray
    probabilities: np.ndarray
    boundary_probability: np.ndarray
    classes: tuple[str, ...]
    fps: float
    truth: np.ndarray | None = None

    @property
    def segments(self) -> list[Segment]:
        """The timeline: the segments of `labels`, in order, without gaps."""
        return [
            Segment(
                start=start,
                end=start + length,
                start_seconds=start / self.fps,
                end_seconds=(start + length) / self.fps,
                label=label,
                name=self.classes[label],
                confidence=float(self.probabilities[label, start : start + length].mean()),
            )
            for start, length, label in segments_of(self.labels)
        ]

    def to_csv(self, path: str | Path) -> None:
        """Write the timeline, one segment per line, with the fields of :class:`Segment` as columns."""
        rows = [asdict(segment) for segment in self.segments]
        for row in rows:
            row |= {key: f"{row[key]:.4f}" for key in ("start_seconds", "end_seconds", "confidence")}
        write_csv(path, [field.name for field in fields(Segment)], [list(row.values()) for row in rows])

    def to_json(self, path: str | Path) -> None:
        """Write the recording's name, frame rate, number of frames, and the timeline."""
        segments = [asdict(segment) for segment in self.segments]
        write_json(
            path, {"recording": self.name, "fps": self.fps, "frames": len(self.labels), "segments": segments}
        )

    def plot(self, path: str | Path) -> None:
        """Draw the annotation, where there is one, the network's frames and the refined labels as a PNG."""
        rows = [("truth", self.truth)] if self.truth is not None else []
        rows += [("network", self.frame_labels), ("refined", self.labels)]
        confidence = self.probabilities[self.labels, np.arange(len(self.labels))]
        plot_timeline(path, rows, self.classes, self.fps, confidence=confidence, title=self.name)


class Predictor:
    """A network with everything that is needed to use it.

    Args:
        model: the network; it is put into evaluation mode for every prediction, and back.
        info: facts of the data that it was trained on.
        joint_graph: float32 (V, V), the text-derived joint graph.
        threshold: boundary probability from which a peak cuts, see :func:`trgnet.refine.refine`.
        pad_multiple: recordings are padded to a multiple of this many frames, which changes no result.
    """

    def __init__(
        self,
        model: TRGNet,
        info: RunInfo,
        joint_graph: Tensor,
        *,
        threshold: float = 0.5,
        pad_multiple: int = 16,
    ) -> None:
        self.model = model
        self.info = info
        self.device = next(model.parameters()).device
        self.joint_graph = joint_graph.to(self.device)
        self.threshold = threshold
        self.pad_multiple = pad_multiple

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the K classes."""
        return self.info.classes

    @property
    def fps(self) -> float:
        """Frames per second of the recordings that the network knows."""
        return self.info.fps

    def predict(self, recording: Recording | ArrayLike, name: str = "recording") -> Prediction:
        """Label every frame of one recording.

        Args:
            recording: a :class:`~trgnet.data.Recording`, or features (C, V, T), numbers of any type, prepared
                as those of the training data.
            name: name of the recording, when only features are given.

        Raises:
            UserError: wrong number of axes, channels or joints, no frame, values that are not finite or
                too large for the network, or labels that are no classes of it.
        """
        if not isinstance(recording, Recording):
            recording = recording_from(recording, name=name)
        self._check(recording)
        class_logits, boundary_logits = self._logits(recording)
        return Prediction(
            name=recording.name,
            labels=refine(class_logits, boundary_logits, threshold=self.threshold),
            frame_labels=class_logits.argmax(axis=0),
            probabilities=torch.from_numpy(class_logits).softmax(dim=0).numpy(),
            boundary_probability=sigmoid(boundary_logits).astype(np.float32),
            classes=self.classes,
            fps=self.fps,
            truth=recording.labels,
        )

    @torch.no_grad()
    def _logits(self, recording: Recording) -> tuple[np.ndarray, np.ndarray]:
        """Class logits (K, T) and boundary logits (T,) of the recording, alone in its batch."""
        batch = collate([recording], pad_multiple=self.pad_multiple).to(self.device)
        was_training = self.model.training
        self.model.eval()
        try:
            class_logits, boundary_logits = self.model(batch.x, batch.mask, self.joint_graph)
        finally:
            self.model.train(was_training)
        frames = slice(0, recording.length)
        logits = [output[0, :, frames].float().cpu().numpy() for output in (class_logits, boundary_logits)]
        if not all(np.isfinite(array).all() for array in logits):
            raise UserError(
                f"the network's output for recording {recording.name!r} is not finite; its features reach "
                f"{np.abs(recording.features).max():.3g}: prepare them as those of the training data, or, if "
                "they are, train the network anew with a lower optimizer.lr"
            )
        return logits[0], logits[1][0]

    def _check(self, recording: Recording) -> None:
        got, expected = recording.features.shape[:2], (self.info.channels, len(self.info.skeleton))
        if got != expected:
            raise UserError(
                f"recording {recording.name!r} has {got[0]} channels and {got[1]} joints, but the network "
                f"was trained on {expected[0]} channels and {expected[1]} joints of {self.info.dataset}; "
                "features must be (channels, joints, frames)"
            )
        if recording.labels is not None:
            known = recording.labels[recording.labels != IGNORE]
            if known.size and known.max() >= len(self.classes):
                raise UserError(
                    f"recording {recording.name!r} has label {known.max()}, but the network knows "
                    f"{len(self.classes)} classes"
                )


def recording_from(
    features: ArrayLike, labels: ArrayLike | None = None, *, name: str = "recording"
) -> Recording:
    """Make a recording of arrays of any numeric type.

    Args:
        features: (C, V, T).
        labels: (T,) integers, optional.
        name: what messages and files call it.

    Raises:
        UserError: the arrays do not make a recording; says why.
    """
    features = np.asarray(features)
    if features.dtype.kind not in "fiu":
        raise UserError(
            f"recording {name!r}: features must be real numbers, got an array of {features.dtype}"
        )
    if labels is not None:
        labels = np.asarray(labels)
        if labels.dtype.kind not in "iu":
            raise UserError(f"recording {name!r}: labels must be integers, got an array of {labels.dtype}")
        labels = labels.astype(np.int64)
    with reading("unusable input"):
        return Recording(name, np.ascontiguousarray(features, dtype=np.float32), labels)


def read_recording(path: str | Path) -> Recording:
    """Read a recording from a file.

    Args:
        path: ``.npy`` with features (C, V, T), or ``.npz`` with the array ``features`` and optionally
            ``labels`` (T,). Object arrays are refused, nothing is executed.

    Raises:
        UserError: the file cannot be read or does not make a recording.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".npz"):
        raise UserError(
            f"{path}: expected a file that ends in .npy (features) or .npz (features, and labels if any)"
        )
    with reading(f"recording {path}"):
        return recording_from(**_arrays(path), name=path.stem)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays "features" and, if any, "labels" of a file."""
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"features": loaded}
        with loaded as arrays:
            if "features" not in arrays:
                raise KeyError(f"the file has no array 'features'; it has {', '.join(arrays) or 'none'}")
            return {name: arrays[name] for name in ("features", "labels") if name in arrays}
    except ValueError as error:  # whose text often is to allow pickles, which may run any program
        raise ValueError(
            "the file is damaged or holds something else than arrays of numbers; write it with "
            "numpy.save(file, features) or numpy.savez(file, features=features, labels=labels)"
        ) from error


def pick_device(name: str, option: str = "device") -> torch.device:
    """The device of torch of that name; "auto" is a GPU where there is one.

    Raises:
        UserError: nothing can be computed on it here; names `option`.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(2, device=device).sum().item()  # some devices can be made, but hold or compute nothing
    except (RuntimeError, AssertionError, ImportError) as error:  # each for another kind of missing device
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise UserError(f"{option}={name} cannot be used here: {reason}") from error
    return device


def load(run: str | Path, *, weights: str = "last", device: str = "cpu") -> Predictor:
    """Load the network of a run folder.

    Args:
        run: folder that a training wrote; nothing else is needed.
        weights: ``"last"``, or ``"best"`` for those that scored best on the validation recordings.
        device: device of torch to run on; "auto" is a GPU where there is one.

    Raises:
        UserError: no run folder, damaged files, weights that the run does not have, or no such device here.
    """
    if weights not in WEIGHTS:
        raise UserError(f"unknown weights {weights!r}: expected {' or '.join(WEIGHTS)}")
    folder = Run.open(run)
    config = folder.config()
    return Predictor(
        folder.model(weights).to(pick_device(device)),
        folder.info(),
        folder.text().joint_graph(),
        threshold=config.refine.threshold,
        pad_multiple=config.train.pad_multiple,
    )
