"""The command ``trgnet``.

Exit codes: 0 done; 2 something that was given cannot be used (one line says what and what to do); 130
interrupted, 143 terminated. A fault of the program itself ends with its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__, data_commands, text_commands, verify_command
from .errors import DataWarning, UserError, reading

# torch takes seconds to import: every command imports what it needs itself, so that --help answers at once.
if TYPE_CHECKING:
    from .data import Recording
    from .predictor import Prediction, Predictor
    from .runs import Run

Command = Callable[[argparse.Namespace], "int | None"]
"""Returns the exit code; None is 0."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parse(arguments)
    try:
        with reading("operators"):  # importing them reads TRGNET_BACKEND
            kernels = import_module("trgnet.kernels")
        try:
            with _warnings_as_lines(DataWarning, kernels.BackendWarning):
                return options.command(options) or 0
        except kernels.BackendError as error:
            raise UserError(str(error)) from error
    except BrokenPipeError:  # whoever was reading has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, which some systems have no number for
    except (UserError, OSError) as error:
        print(f"trgnet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"trgnet: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(interrupt, "signal", signal.SIGINT)


@contextmanager
def _warnings_as_lines(*kinds: type[Warning]) -> Iterator[None]:
    """Show warnings about the data and the machine as lines, without the place in the program that noticed it."""
    with warnings.catch_warnings():
        for kind in kinds:
            warnings.simplefilter("always", kind)
        show = warnings.showwarning

        def line(message: Warning | str, category: type[Warning], *where: Any, **file: Any) -> None:
            if issubclass(category, kinds):
                print(f"trgnet: warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **file)

        warnings.showwarning = line
        yield


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments in one place only; overrides may stand anywhere.
    stray = [argument for argument in rest if argument.startswith("-") or options.command is not _train]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trgnet",
        description="Human action segmentation of skeleton sequences with TRG-Net.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"trgnet {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = _command(commands, "train", _train, "train a network")
    train.add_argument(
        "--config",
        default=None,
        metavar="NAME|FILE",
        help="built-in configuration or YAML file (default: mocap6)",
    )
    train.add_argument(
        "--out", type=Path, metavar="DIR", help="run folder, new or empty (default: runs/DATASET-DATE-TIME)"
    )
    train.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder of the data; without --config, of one's own recordings",
    )
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue the training in this run folder")
    train.add_argument(
        "--allow",
        type=lambda text: text.split(","),
        default=[],
        metavar="KEY,KEY",
        help="with --resume: settings that may change although it is then another training",
    )
    train.add_argument(
        "--seeds",
        type=_integers,
        metavar="0,1,2",
        help="train once per seed, into DIR/seed0 and so on, and report mean and spread of the scores",
    )
    train.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="start whole training steps as CUDA graphs: train.cuda_graph=true or false (default: auto, on one GPU where "
        "nothing forbids it)",
    )
    train.add_argument(
        "--compile",
        action="store_true",
        help="train the network through torch.compile: train.compile=true",
    )
    train.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.KEY=VALUE",
        help="settings that differ from the configuration, such as train.epochs=10",
    )

    evaluate = _command(commands, "evaluate", _evaluate, "score a trained network on annotated recordings")
    evaluate.add_argument("run", type=Path, metavar="RUN", help="run folder")
    evaluate.add_argument(
        "--split",
        choices=("test", "validation", "train"),
        default="test",
        help="which recordings of the run's dataset (default: test)",
    )
    evaluate.add_argument(
        "--out", type=Path, metavar="DIR", help="where to (default: RUN/evaluation/SPLIT-WEIGHTS)"
    )
    _use_arguments(evaluate)

    predict = _command(commands, "predict", _predict, "write the timelines of recordings")
    predict.add_argument("run", type=Path, metavar="RUN", help="run folder")
    predict.add_argument(
        "recordings",
        nargs="+",
        metavar="FILE",
        help=".npy, .npz or .csv file, a folder of OpenPose's JSON files, or the name of a recording of the "
        "run's dataset",
    )
    predict.add_argument(
        "--input",
        metavar="FORMAT",
        help="what the files hold: features (channels, joints, frames); raw, as the files of the training data; "
        "keypoints kinect25, body25, coco17 or h36m17; or a YAML file that names the joints (default: raw where "
        "the run can prepare it, else features)",
    )
    predict.add_argument(
        "--fps", type=_positive, metavar="F", help="frame rate of keypoints (default: the training data's)"
    )
    predict.add_argument(
        "--image-size",
        type=_image_size,
        metavar="WxH",
        help="pixels of the image of 2-D keypoints (default: the training data's)",
    )
    predict.add_argument(
        "--occlude-missing",
        action="store_true",
        help="show joints that the keypoints do not tell as occluded, at most half of them",
    )
    predict.add_argument("--array", metavar="NAME", help="array of an .npz file (default: the only one)")
    predict.add_argument("--out", type=Path, metavar="DIR", help="where to (default: RUN/predictions)")
    _use_arguments(predict)

    data_commands.add_commands(commands, _command)
    text_commands.add_commands(commands, _command)
    verify_command.add_command(commands, _command)
    _command(commands, "info", _info, "show versions, devices and the operators' backends")
    return parser


def _command(
    commands: argparse._SubParsersAction, name: str, run: Command, text: str
) -> argparse.ArgumentParser:
    # Without abbreviations: --seed would be --seeds, which is something else than train.seed.
    description = f"{text[0].upper()}{text[1:]}."
    parser = commands.add_parser(name, help=text, description=description, allow_abbrev=False)
    parser.set_defaults(command=run)
    return parser


def _use_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        choices=("last", "best"),
        default="last",
        help="of the last epoch, or those that scored best on validation (default: last)",
    )
    parser.add_argument(
        "--device", default="auto", help="device of torch (default: a GPU where there is one)"
    )


def _train(options: argparse.Namespace) -> None:
    overrides = list(options.overrides)
    overrides += [] if options.cuda_graph is None else [f"train.cuda_graph={str(options.cuda_graph).lower()}"]
    overrides += ["train.compile=true"] if options.compile else []
    if options.data is not None:
        own = [] if options.config or options.resume else ["data.name=folder"]
        overrides = [*own, f"data.root={json.dumps(str(options.data))}", *overrides]
    if options.resume is not None:
        _resume_training(options, overrides)
    else:
        _start_training(options, overrides)


def _start_training(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from .config import load_config
    from .seeds import train_seeds
    from .trainer import train

    if options.allow:
        raise UserError("--allow is for a training that is continued; add --resume RUN or leave it away")
    default = None if options.data is not None else "mocap6"
    config = load_config(options.config or default, overrides)
    if options.seeds is None:
        train(config, out=options.out)
    else:
        train_seeds(config, options.seeds, out=options.out)


def _resume_training(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    from .trainer import resume

    if options.out is not None or options.seeds is not None:
        raise UserError("--resume goes on in the run's own folder and seed; leave --out and --seeds away")
    resume(options.resume, overrides, config=options.config, allow=options.allow)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 0,1,2, got {text!r}") from None


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a positive number such as 25, got {text!r}")
    return value


def _image_size(text: str) -> tuple[float, float]:
    width, _, height = text.partition("x")
    try:
        return _positive(width), _positive(height)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"expected a size such as 1920x1080, got {text!r}") from None


def _evaluate(options: argparse.Namespace) -> None:
    from rich.console import Console

    from .evaluation import evaluate, print_table, score_table, write_report, write_scores
    from .predictor import load
    from .runs import Run
    from .trainer import read_dataset

    run = Run.open(options.run)
    predictor = load(options.run, weights=options.weights, device=options.device)
    names = predictor.info.recordings[options.split]
    if not names:
        raise UserError(f"run {options.run} has no {options.split} recordings")
    known = {recording.name: recording for recording in read_dataset(run.config()).recordings}
    evaluation = evaluate(predictor, [_known(known, name) for name in names])
    out = options.out or run / "evaluation" / f"{options.split}-{options.weights}"
    facts = {"run": str(options.run), "weights": options.weights}
    written = write_scores(out, {options.split: {options.weights: evaluation.scores}}, facts)
    written += write_report(out, evaluation, predictor.classes)
    columns = {f"{options.weights}\nweights": evaluation.scores}
    print_table(Console(), score_table(f"{options.split}: {', '.join(names)}", columns))
    _list(written)


def _predict(options: argparse.Namespace) -> None:
    from .predictor import load
    from .runs import Run

    run = Run.open(options.run)
    predictor = load(options.run, weights=options.weights, device=options.device)
    recordings = _recordings(options, run, predictor)
    predictions = [predictor.predict(recording) for recording in recordings]
    out = options.out or run / "predictions"
    for prediction in predictions:
        _list(_write(prediction, out))


def _write(prediction: Prediction, folder: Path) -> list[Path]:
    paths = [folder / f"{prediction.name}.{ending}" for ending in ("csv", "json", "png")]
    for path, write in zip(paths, (prediction.to_csv, prediction.to_json, prediction.plot), strict=True):
        write(path)
    return paths


def _recordings(options: argparse.Namespace, run: Run, predictor: Predictor) -> list[Recording]:
    """The recordings of files, or of the run's dataset by their names."""
    from .keypoint_files import ENDINGS
    from .trainer import read_dataset

    recordings, known = [], None
    given = {key: getattr(options, key) for key in ("array", "fps", "image_size", "occlude_missing")}
    for name in options.recordings:
        if Path(name).suffix in ENDINGS or Path(name).is_dir():
            recordings.append(predictor.read(name, options.input, **given))
        else:
            known = known or {
                recording.name: recording for recording in read_dataset(run.config()).recordings
            }
            recordings.append(_known(known, name))
    found = [recording.name for recording in recordings]
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice:
        raise UserError(
            f"several recordings are called {', '.join(twice)}: their timelines would overwrite each other"
        )
    return recordings


def _known(recordings: dict[str, Recording], name: str) -> Recording:
    if name not in recordings:
        raise UserError(
            f"{name!r} is neither a .npy or .npz file nor a recording of the run's dataset, which has "
            f"{', '.join(recordings)}"
        )
    return recordings[name]


def _info(options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from trgnet.kernels import BACKENDS, current_backend, operator_table
    from trgnet.kernels.verification import cache_folder

    from .evaluation import print_table
    from .versions import versions

    table = Table(show_header=False, box=None)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("CPU", f"{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
        table.add_row("", f"kernels: {verify_command.summary(torch.device('cuda', index))}")
    if not torch.cuda.is_available():
        table.add_row("GPU", "none")
    table.add_row("TRGNET_BACKEND", os.environ.get("TRGNET_BACKEND", f"not set ({current_backend()})"))
    table.add_row("TRGNET_VERIFY", os.environ.get("TRGNET_VERIFY", "not set (1)"))
    table.add_row("TRGNET_CACHE", os.environ.get("TRGNET_CACHE", f"not set ({cache_folder()})"))

    operators = Table(title="Operators and the backends they can run on", title_justify="left")
    columns = [backend for backend in BACKENDS if backend != "auto"]
    for column in ("operator", *columns):
        operators.add_column(column)
    for name, backends in operator_table():
        operators.add_row(name, *("yes" if backend in backends else "-" for backend in columns))
    console = Console()
    print_table(console, table)
    console.print()
    print_table(console, operators)


def _list(paths: Sequence[Path]) -> None:
    for path in paths:
        print(path)
