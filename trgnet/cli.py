"""The command ``trgnet``.

Exit codes: 0 done; 2 something that was given cannot be used (one line says what and what to do); 130
interrupted. A fault of the program itself ends with its traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .errors import UserError, reading

# torch takes seconds to import: every command imports what it needs itself, so that --help answers at once.
if TYPE_CHECKING:
    from .data import Recording
    from .predictor import Prediction
    from .runs import Run

Command = Callable[[argparse.Namespace], None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parse(arguments)
    try:
        with reading("operators"):  # importing them reads TRGNET_BACKEND
            kernels = import_module("trgnet.kernels")
        try:
            options.command(options)
        except kernels.BackendError as error:
            raise UserError(str(error)) from error
    except (UserError, OSError) as error:
        print(f"trgnet: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"trgnet: {str(interrupt) or 'interrupted'}", file=sys.stderr)
        return 130
    return 0


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
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue the training in this run folder")
    train.add_argument(
        "--seeds",
        type=_integers,
        metavar="0,1,2",
        help="train once per seed, into DIR/seed0 and so on, and report mean and spread of the scores",
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
        help=".npy with features (channels, joints, frames), .npz with 'features' and "
        "optionally 'labels', or the name of a recording of the run's dataset",
    )
    predict.add_argument("--out", type=Path, metavar="DIR", help="where to (default: RUN/predictions)")
    _use_arguments(predict)

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
    from rich.console import Console

    from .config import load_config
    from .seeds import train_seeds
    from .trainer import resume, train

    console = Console()
    if options.resume is not None:
        if any(given is not None for given in (options.config, options.out, options.seeds)):
            raise UserError("--resume takes everything from the run; leave --config, --out and --seeds away")
        resume(options.resume, options.overrides, console=console)
        return
    config = load_config(options.config or "mocap6", options.overrides)
    if options.seeds is None:
        train(config, out=options.out, console=console)
    else:
        train_seeds(config, options.seeds, out=options.out, console=console)


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers such as 0,1,2, got {text!r}") from None


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
    recordings = _recordings(options.recordings, run)
    predictions = [predictor.predict(recording) for recording in recordings]
    out = options.out or run / "predictions"
    for prediction in predictions:
        _list(_write(prediction, out))


def _write(prediction: Prediction, folder: Path) -> list[Path]:
    paths = [folder / f"{prediction.name}.{ending}" for ending in ("csv", "json", "png")]
    for path, write in zip(paths, (prediction.to_csv, prediction.to_json, prediction.plot), strict=True):
        write(path)
    return paths


def _recordings(names: Sequence[str], run: Run) -> list[Recording]:
    """The recordings of files, or of the run's dataset by their names."""
    from .predictor import read_recording
    from .trainer import read_dataset

    recordings, known = [], None
    for name in names:
        if Path(name).suffix in (".npy", ".npz"):
            recordings.append(read_recording(name))
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

    from .evaluation import print_table
    from .runs import versions

    table = Table(show_header=False, box=None)
    for name, version in versions().items():
        table.add_row(name, version)
    table.add_row("CPU", f"{torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        table.add_row(f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if not torch.cuda.is_available():
        table.add_row("GPU", "none")
    table.add_row("TRGNET_BACKEND", os.environ.get("TRGNET_BACKEND", f"not set ({current_backend()})"))

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
