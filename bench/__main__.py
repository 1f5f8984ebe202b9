"""Runs the benchmarks, prints their tables, stores the run and draws it; see :mod:`bench`."""

from __future__ import annotations

import argparse
import sys
from datetime import date
from pathlib import Path

import pytest
from rich.console import Console

from trgnet.files import replacing

from . import device
from .plots import draw
from .providers import PROVIDERS
from .report import Run, comparable, load, markdown, print_report

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"
SECTIONS = ("network", "operators", "optimizers", "scaling", "metrics", "data")
"""The files, the most important first, as the limit may leave out the last."""
LIMIT = 540.0 if device.ON_GPU else None
"""Seconds, so that everything is done within ten minutes where machines are lent by the minute."""


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 1 where a check failed, so that something was not timed."""
    options = _parser().parse_args(arguments)
    console = Console(width=170)
    try:
        if options.show and options.markdown:
            print(markdown(load(options.show), options.markdown.split(",")))
            return 0
        if options.show:
            _report(load(options.show), options.show.with_suffix(""), options, console)
            return 0
        out = options.out or _default_path()
        if out.exists():
            raise ValueError(f"{out} exists; give another name with --out")
        against = options.against or _newest(device.facts()["device"])
        with replacing(out) as partial:
            code = pytest.main(_pytest_arguments(options, partial))
            if not partial.exists() or not partial.stat().st_size:
                raise ValueError("nothing was timed; the output above says why")
            load(partial)
        options.against = against
        _report(load(out), out.with_suffix(""), options, console)
        console.print(f"stored as {out}")
        return int(code != 0)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default: all"
    )
    parser.add_argument(
        "--out", type=Path, help="where to store the run; default: bench/results/DATE-DEVICE.json"
    )
    parser.add_argument(
        "--against", type=Path, help="stored run to compare with; default: the newest of this device"
    )
    parser.add_argument(
        "--show", type=Path, metavar="FILE", help="run nothing: print and draw this stored run"
    )
    parser.add_argument(
        "--markdown", metavar="PROVIDERS", help="with --show: only a table of these providers, for a document"
    )
    parser.add_argument("--providers", help=f"comma-separated, of {', '.join(PROVIDERS)}")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help="seconds after which no further row is begun; default: 540 on a GPU, none on a CPU",
    )
    parser.add_argument("-k", dest="keyword", help="only benchmarks that match, as for pytest")
    return parser


def _pytest_arguments(options: argparse.Namespace, out: Path) -> list[str]:
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        raise ValueError(f"got section {', '.join(sorted(unknown))}, expected some of {', '.join(SECTIONS)}")
    arguments = [str(FOLDER / f"test_{section}.py") for section in options.sections or SECTIONS]
    arguments += ["-q", "-rfEs", f"--benchmark-json={out}", "--benchmark-quiet", "-p", "no:cacheprovider"]
    arguments += [f"--providers={options.providers}"] if options.providers else []
    arguments += [f"--limit={options.limit}"] if options.limit else []
    return arguments + (["-k", options.keyword] if options.keyword else [])


def _report(run: Run, stem: Path, options: argparse.Namespace, console: Console) -> None:
    against = load(options.against) if options.against else None
    reason = comparable(run, against) if against else None
    if reason:
        console.print(f"times are not compared with {options.against}: {reason}", markup=False)
    print_report(run, console, None if reason else against)
    for path in draw(run, stem):
        console.print(f"drawn: {path}", markup=False)


def _default_path() -> Path:
    name = "-".join(device.facts()["device"].lower().split())
    return RESULTS / f"{date.today().isoformat()}-{name}.json"


def _newest(name: str) -> Path | None:
    """The newest stored run of a device, by its date."""
    found = []
    for path in RESULTS.glob("*.json"):
        run = load(path)
        if run.machine["device"] == name:
            found.append((run.machine["date"], path))
    return max(found)[1] if found else None


if __name__ == "__main__":
    sys.exit(main())
