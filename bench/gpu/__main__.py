"""The command line, see :mod:`bench.gpu`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from importlib import util
from itertools import count
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "gpu"
LIMIT = 530.0
NEEDED = ("torch", "numpy", "einops")


def main(arguments: list[str] | None = None) -> int:
    """Return 0, 1 where something is wrong or the run was stopped, 2 where it cannot be done."""
    missing = [name for name in NEEDED if util.find_spec(name) is None]
    if missing:
        return _refuse(f"{', '.join(missing)} not found; python -m pip install {' '.join(missing)}")
    from .. import gpu  # its text is the help
    from . import journal, plan, report

    options = _parser(gpu.__doc__, plan.PHASES).parse_args(arguments)
    try:
        if options.show or options.markdown:
            tables = report.everything if options.show else report.document
            print(tables(journal.load(options.show or options.markdown)))
            return 0
        return _run(options)
    except (ValueError, OSError) as error:
        return _refuse(str(error))


def _refuse(why: str) -> int:
    print(f"error: {why}", file=sys.stderr)
    return 2


def _parser(text: str, phases: tuple[str, ...]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to store the run, a name in .json")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds in all; default: {LIMIT:.0f}")
    parser.add_argument("--phases", help=f"comma-separated, of {', '.join(phases)}; default: all")
    parser.add_argument(
        "--match", default="", metavar="TEXT", help='only items whose "phase: name" contains it'
    )
    parser.add_argument("--tiny", action="store_true", help="a trial at tiny sizes, without a GPU too")
    parser.add_argument("--commit", help="what to say where the commit is not known, outside of a clone")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--show", type=Path, metavar="FILE", help="run nothing: print all tables of a run")
    shown.add_argument(
        "--markdown", type=Path, metavar="FILE", help="run nothing: print short tables of a run"
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    began = time.monotonic()
    from ..device import ON_GPU
    from . import plan, report
    from .journal import BAD, Journal
    from .processes import Runner

    phases = options.phases.split(",") if options.phases else plan.PHASES
    if unknown := set(phases) - set(plan.PHASES):
        raise ValueError(
            f"--phases: got {', '.join(sorted(unknown))}, expected some of {', '.join(plan.PHASES)}"
        )
    if not ON_GPU and not options.tiny:
        raise ValueError("torch sees no GPU; python -m bench.gpu --tiny tries everything on the CPU")
    facts = _facts(options)
    sizes = plan.TINY if options.tiny else plan.FULL
    parts = plan.plan(sizes, ON_GPU, phases, options.match)
    journal = Journal(options.out or _free_path(facts), facts, sum(len(part.items) for part in parts))
    print(f"results: {journal.lines}, at the end {journal.path}", flush=True)

    def tell(line: dict[str, Any]) -> None:
        journal.write(line)
        if "status" in line:
            first = line.get("reason", "").partition("\n")[0]
            what = f"{line['phase']}: {line['name']}: {line['status']}{first and ': ' + first}"
            print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    def left() -> float:
        return options.limit - (time.monotonic() - began)

    runner, stopped = Runner(tell, left(), facts["memory_bytes"]), False
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for part in parts:
            runner.run(part.items, part.lanes, part.share * left())
    except KeyboardInterrupt:
        stopped = True
        runner.stop()
    run = journal.close()
    print(f"\n{report.everything(run)}\n\nstored as {journal.path} after {time.monotonic() - began:.0f} s")
    return int(stopped or any(record.status in BAD for record in run.records))


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    """What the device says of itself, found out by a process of its own: this one never uses it."""
    from . import plan
    from .processes import Runner

    lines: list[dict[str, Any]] = []
    Runner(lines.append, plan.FACTS.limit).run([plan.FACTS])
    facts: dict[str, Any] = {"tiny": options.tiny}
    for line in lines:
        facts |= line.get("values", {})
    if lines[-1]["status"] != "done":
        raise ValueError(f"the device cannot be used: {lines[-1]['reason']}")
    return facts | ({"commit": options.commit} if options.commit else {})


def _free_path(facts: dict[str, Any]) -> Path:
    """A name for this device and day that no file has."""
    stem = f"{facts['date']}-{'-'.join(facts['device'].lower().split())}"
    paths = (RESULTS / f"{stem}{f'-{number}' if number > 1 else ''}.json" for number in count(1))
    return next(path for path in paths if not path.exists() and not path.with_suffix(".jsonl").exists())


if __name__ == "__main__":
    sys.exit(main())
