"""The command ``trgnet verify``: check the Triton kernels on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UserError, did_you_mean
from .files import write_json

# torch takes seconds to import: every command imports what it needs itself, so that --help answers at once.
if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from rich.table import Table

    from trgnet.kernels.verification import Finding, Subject


def add_command(
    commands: argparse._SubParsersAction, command: Callable[..., argparse.ArgumentParser]
) -> None:
    """Add ``trgnet verify``."""
    verify = command(commands, "verify", _verify, "check the Triton kernels of this package on this machine")
    verify.add_argument(
        "--operator", action="append", metavar="NAME", help="only this one; may be repeated (default: all)"
    )
    verify.add_argument(
        "--precision",
        action="append",
        metavar="NAME",
        help="only float32, tf32, bfloat16 or float16; may be repeated (default: all that the device has)",
    )
    verify.add_argument("--device", default="cuda", help="GPU to check (default: cuda)")
    verify.add_argument(
        "--out",
        type=Path,
        default=Path("trgnet-verify.json"),
        metavar="FILE",
        help="report for a bug report (default: trgnet-verify.json)",
    )


def _verify(options: argparse.Namespace) -> int:
    from rich.console import Console

    from trgnet.kernels import verification

    console = Console()
    device, reason = _device(options.device)
    if reason:
        console.print(f"Nothing to verify, the reference runs here: {reason}", highlight=False, markup=False)
        return 0
    operators = _chosen("--operator", options.operator, verification.checked_operators())
    precisions = _chosen("--precision", options.precision, verification.precisions_of(device))
    jobs = [(name, precision) for precision in precisions for name in operators]
    verdicts = verification.Verdicts(verification.subject_of(device))
    findings = _findings(jobs, device, console)
    verdicts.add(findings)
    _print(findings, verdicts.subject, device, console)
    _write_report(options.out, findings, verdicts.subject)
    print(options.out)
    return int(any(finding.verdict != "passed" for finding in findings))


def _device(name: str) -> tuple[torch.device, str | None]:
    """The device to check, and why it runs no kernels; None if it does."""
    import torch

    from trgnet.kernels.launch import interpreted, obstacle

    if interpreted() or (name == "cuda" and not torch.cuda.is_available()):
        name = "cpu"
    try:
        like = torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no such device
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from error
    return like.device, obstacle([like], {like.dtype})


def _chosen(option: str, given: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for name in given or ():
        if name not in known:
            raise UserError(f"{option} {name}: expected one of {', '.join(known)}{did_you_mean(name, known)}")
    return [name for name in known if not given or name in given]


def _findings(jobs: Sequence[tuple[str, str]], device: torch.device, console: Console) -> list[Finding]:
    """What the checks found, in the order of the jobs; those that passed are timed too."""
    from trgnet.kernels.verification import check

    found: dict[tuple[str, str], Finding] = {}
    with console.status("") as status:
        for finding in check(jobs, device):
            found[finding.operator, finding.precision] = finding
            status.update(f"checked {len(found)} of {len(jobs)}")
        passed = [job for job in jobs if found[job].verdict == "passed"]
        # One after the other: times are for comparison.
        for number, timed in enumerate(check(passed, device, task="time", processes=1) if passed else ()):
            status.update(f"timed {number + 1} of {len(passed)}")
            job = timed.operator, timed.precision
            found[job] = replace(found[job], milliseconds=timed.milliseconds)
    return [found[job] for job in jobs]


def _print(findings: Iterable[Finding], subject: Subject, device: torch.device, console: Console) -> None:
    clock = "device time" if device.type == "cuda" else "host time"
    console.print(f"{subject.gpu}, torch {subject.torch}, triton {subject.triton}", highlight=False)
    console.print(
        f"Errors relative to what is allowed; forward and backward in ms of {clock}", highlight=False
    )
    console.print(_table(findings))
    for finding in findings:
        if finding.verdict != "passed":
            console.print(
                f"{finding.operator}, {finding.precision}: {finding.what}", highlight=False, markup=False
            )


def _table(findings: Iterable[Finding]) -> Table:
    from rich.table import Table

    table = Table("operator", "precision")
    for column in ("error", "kernels", "PyTorch"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for finding in findings:
        error = "" if finding.error is None else f"{finding.error:.2f}"
        times = [f"{ms:.2f}" for ms in finding.milliseconds] if finding.milliseconds else ["", ""]
        table.add_row(finding.operator, finding.precision, error, *times, finding.verdict)
    return table


def _write_report(path: Path, findings: Iterable[Finding], subject: Subject) -> None:
    from .versions import versions

    write_json(
        path,
        {
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "versions": versions(),
            "subject": asdict(subject),
            "findings": [asdict(finding) for finding in findings],
        },
    )


def summary(device: torch.device) -> str:
    """Return what is known about the kernels on a device, in one line."""
    from trgnet.kernels.launch import triton
    from trgnet.kernels.verification import Verdicts, precisions_of, subject_of

    if triton is None:
        return "Triton is not installed"
    known = Verdicts(subject_of(device)).read()
    parts = []
    for precision in precisions_of(device):
        verdicts = {name: f.verdict for (name, of), f in known.items() if of == precision}
        failed = [name for name, verdict in verdicts.items() if verdict == "failed"]
        if verdicts:
            passed = len(verdicts) - len(failed)
            parts.append(
                f"{precision} {passed} passed" + (f", failed: {', '.join(failed)}" if failed else "")
            )
    return "; ".join(parts) or "not verified yet (trgnet verify)"
