"""Using a trained network: from a recording to its timeline.

>>> import trgnet
>>> prediction = trgnet.load("runs/mocap6").predict(features)  # features: (C, V, T)
>>> for segment in prediction.segments:
...     print(segment.start_seconds, segment.end_seconds, segment.name, segment.confidence)
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import ArrayLike
from torch import Tensor

from .data import IGNORE, Preparation, Recording, collate, segments_of
from .data.arrays import load_arrays
from .errors import DataWarning, UserError, reading
from .files import write_csv, write_json
from .keypoint_files import read_array, read_keypoints
from .keypoints import Convention, fill_gaps, load_convention, map_keypoints, resample, split_confidence
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

    A recording goes through the network as a whole, alone in its batch. With the Triton kernels that takes at most
    4 V (4 F + 2 C + 2) bytes per frame beside the weights, in float32, for V joints, C channels and F features: at the
    published size, V = 25, C = 12 and F = 64, 28 kB, or 2.8 GB for 100,000 frames. The reference takes 48 kB there.

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

    def prepare(
        self,
        array: ArrayLike,
        input: str | Path | Convention | None = None,
        *,
        fps: float | None = None,
        image_size: tuple[float, float] | None = None,
        occlude_missing: bool = False,
        name: str = "recording",
    ) -> Recording:
        """Make a recording of poses that :meth:`predict` takes.

        Args:
            array: what `input` says. Keypoints are (T, V, C) or (T, V * C) unless a YAML file says otherwise,
                in the unit and with the axes of the training data; NaN, or confidence 0, is missing data and is
                filled linearly over time with a DataWarning.
            input: "features", prepared as those of the training data; "raw", an array as the files of the
                training data; a convention of keypoints ("kinect25", "body25", "coco17", "h36m17"), a YAML file
                with the fields of :class:`~trgnet.keypoints.Convention`, or one of these. None: "raw" where the
                run knows how to prepare, else "features".
            fps: frame rate of the poses, resampled linearly to that of the raw training data; None: that of the
                YAML file, or else the poses have the rate of the training data.
            image_size: width and height of the image that keypoints in pixels are of, (1, 1) for shares of the
                image; None: that of the training data.
            occlude_missing: show joints that the keypoints do not tell to the network as zero features, as
                training's occlusion does, at most half of them; otherwise they are an error.
            name: of the recording.

        Raises:
            UserError: the array does not fit `input`, or the network cannot be given such poses; says why.
        """
        array = np.asarray(array)
        if input is None:
            input = "features" if self.info.preparation is None else "raw"
        with reading(f"recording {name!r}"):
            if input == "features":
                _refuse_options(input, fps=fps, image_size=image_size, occlude_missing=occlude_missing)
                return recording_from(array, name=name)
            preparation = self._preparation(input)
            if input == "raw":
                _refuse_options(input, fps=fps, image_size=image_size, occlude_missing=occlude_missing)
                return Recording(name, preparation.features(_without_confidence(array, preparation)))
            convention = load_convention(input)
            keypoints = _coordinates(convention.array(array), convention, preparation)
            rate = fps or convention.fps or preparation.fps
            keypoints = fill_gaps(keypoints, convention.joints, rate, name)
            keypoints = _in_image(keypoints, preparation, image_size, name)
            mapped, missing = map_keypoints(keypoints, convention, self.info.skeleton)
            self._check_missing(missing, preparation, convention, occlude_missing)
            features = preparation.features(_raw(resample(mapped, rate, preparation.fps), preparation))
            features[:, list(missing)] = 0
            return Recording(name, features)

    def read(
        self,
        path: str | Path,
        input: str | Path | Convention | None = None,
        *,
        array: str | None = None,
        **options: object,
    ) -> Recording:
        """Read a file and :meth:`prepare` it.

        Args:
            path: features or raw: .npy or .npz, features with `labels` if any; keypoints: as for
                :func:`trgnet.keypoint_files.read_keypoints`.
            input, options: as for :meth:`prepare`; the recording is called as the file.
            array: name of the array in an .npz file; may be left out where there is only one.

        Raises:
            UserError: the file cannot be read, or as for :meth:`prepare`; names the file.
        """
        path = Path(path)
        if input is None:
            input = "features" if self.info.preparation is None else "raw"
        if input == "features" and array is None:
            _refuse_options(input, **options)
            return read_recording(path)
        with reading(f"file {path}"):
            if input in ("features", "raw"):
                values = read_array(path, array)
            else:
                self._preparation(input)  # before a file that cannot be used anyway
                input = load_convention(input)
                values = read_keypoints(path, input, array)
        try:
            return self.prepare(values, input, name=path.stem, **options)
        except UserError as error:
            raise UserError(f"file {path}: {error}") from error

    def _preparation(self, input: object) -> Preparation:
        if self.info.preparation is None:
            raise UserError(
                f"the network was trained on {self.info.dataset}, whose features come prepared: there is no way "
                f"from {getattr(input, 'name', input)} to them; give features (channels, joints, frames)"
            )
        return self.info.preparation

    def _check_missing(
        self, missing: tuple[int, ...], preparation: Preparation, convention: Convention, occlude: bool
    ) -> None:
        joints, most = self.info.skeleton.joints, len(self.info.skeleton) // 2
        names = ", ".join(joints[joint] for joint in missing)
        if preparation.relative_to in missing:
            raise UserError(
                f"{convention.name} does not tell {joints[preparation.relative_to]}, to which the network's "
                "coordinates are relative"
            )
        if missing and not occlude:
            raise UserError(
                f"{convention.name} does not tell {len(missing)} of the network's {len(joints)} joints: {names}; "
                "say of which joints they are made in the map of a YAML file, or show them to the network as "
                "occluded with --occlude-missing"
            )
        if len(missing) > most:
            raise UserError(
                f"{convention.name} does not tell {len(missing)} of the network's {len(joints)} joints, of which "
                f"at most {most} can be occluded: {names}"
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


def _refuse_options(input: str, **options: object) -> None:
    given = [f"--{key.replace('_', '-')}" for key, value in options.items() if value not in (None, False)]
    if given:
        raise UserError(f"{', '.join(given)} is for keypoints; {input} are taken as they are")


def _coordinates(keypoints: np.ndarray, convention: Convention, preparation: Preparation) -> np.ndarray:
    """The coordinates of keypoints, which must be those that the network wants."""
    wanted = preparation.channels
    if wanted > 3 or (preparation.coordinates is not None and len(preparation.coordinates) != wanted):
        raise UserError(
            f"the network takes {wanted} channels per joint, more than a position; keypoints of "
            f"{convention.name} give positions only"
        )
    keypoints = split_confidence(keypoints, convention)
    got = keypoints.shape[2]
    if got != wanted:
        advice = {
            (2, 3): "lift them to 3-D first, with a lifting model, and give those",
            (3, 2): "project them into the image with the camera first",
        }.get((got, wanted), "give one channel per coordinate")
        raise UserError(
            f"the keypoints of {convention.name} have {got} coordinates, but the network takes {wanted}; {advice}"
        )
    return keypoints


def _without_confidence(array: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Raw pixels without the detector's confidence, which files may hold behind x and y."""
    if preparation.image_size is not None and preparation.channels == 2 and preparation.axes == "t v c":
        return array[..., :2] if array.ndim == 3 and array.shape[2] == 3 else array
    return array


def _in_image(
    keypoints: np.ndarray, preparation: Preparation, image_size: tuple[float, float] | None, name: str
) -> np.ndarray:
    """Pixels of another image as those of the training data's."""
    expected = preparation.image_size
    if image_size is not None:
        if expected is None or not (len(image_size) == 2 and min(image_size) > 0):
            raise UserError(
                f"--image-size must be a width and a height, for a network that takes pixels; got {image_size}"
            )
        return keypoints * (np.array(expected) / image_size).astype(keypoints.dtype)
    if expected is not None and (np.nanmax(keypoints, axis=(0, 1)) > expected).any():
        x, y = np.nanmax(keypoints, axis=(0, 1))
        warnings.warn(
            f"recording {name!r}: keypoints reach ({x:.0f}, {y:.0f}), outside the training data's image of "
            f"{expected[0]:g} x {expected[1]:g} pixels; give the size of this one with --image-size",
            DataWarning,
            stacklevel=3,
        )
    return keypoints


def _raw(keypoints: np.ndarray, preparation: Preparation) -> np.ndarray:
    """Keypoints (T, V, C) in the layout of the training data's files; further persons are zero."""
    if "m" not in preparation.axes:
        return rearrange(keypoints, f"t v c -> {preparation.axes}")
    persons = np.zeros((preparation.persons, *keypoints.shape), keypoints.dtype)
    persons[0] = keypoints
    return rearrange(persons, f"m t v c -> {preparation.axes}")


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
        arrays = load_arrays(path)
        arrays = {"features": arrays[""]} if "" in arrays else arrays
        if "features" not in arrays:
            raise KeyError(f"the file has no array 'features'; it has {', '.join(arrays) or 'none'}")
        return recording_from(arrays["features"], arrays.get("labels"), name=path.stem)


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
