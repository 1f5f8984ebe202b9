"""Verified before used: ``auto`` runs Triton kernels that have passed a check on this machine.

What a compiler makes of a kernel depends on the GPU and on the version of Triton. So the first time that ``auto`` needs
kernels on a GPU model in some precision, it checks every operator against its reference (:mod:`.self_check`) and keeps
the verdicts in the user's cache. A new GPU model, driver, Triton, PyTorch, or a changed kernel is checked anew. An
operator that failed in a precision runs on the reference there, and a warning says so once in every process. The check
takes the published network's joints and features, and short sequences; networks of other sizes go by its verdict.

The check runs in processes of its own: a crash or a hang there is a finding. Several processes that start together,
as in distributed training, check once: the first one does, the others wait.

Nothing is checked while code is traced (torch.compile, torch.export, fake tensors) or captured in a CUDA graph: known
verdicts count there, and an operator without one runs on the reference. Call :func:`verify_once` before, as the trainer
does, or run the operators once without compilation.

A forced backend, CPUs and Triton's interpreter are not affected.

Environment:
    TRGNET_VERIFY: 0 trusts the kernels without a check.
    TRGNET_CACHE: folder of the verdicts (default: trgnet in XDG_CACHE_HOME or ~/.cache).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .backend import BackendWarning, current_backend
from .launch import exact_float32, obstacle, target_of, triton

CHECK = (sys.executable, "-m", "trgnet.kernels.self_check")
"""The program that checks; the device and a file descriptor follow."""
START_SECONDS = 300.0
"""Limit of a process's start, which imports torch."""
JOB_SECONDS = 300.0
"""Limit of one operator in one precision, compilation included."""
WAIT_SECONDS = 600.0
"""Limit of waiting for another process that is checking."""
MOST_PROCESSES = 4

_log = logging.getLogger(__name__)
_trusted: dict[tuple[str, str, torch.device], bool] = {}
"""(operator, precision, device) -> whether ``auto`` may run its kernels. What is looked up at every call."""
_told: set[str] = set()
_deciding = threading.RLock()


@dataclass(frozen=True)
class Finding:
    """What the check of one operator in one precision found."""

    operator: str
    precision: str
    verdict: str
    """"passed", "failed", or "unknown" if the check itself could not run."""
    error: float | None = None
    """The largest error relative to what is allowed."""
    what: str = ""
    """What failed, in one line."""
    detail: str = ""
    """Traceback, or the end of what the process printed."""
    milliseconds: tuple[float, float] | None = None
    """Forward and backward of the kernels and of the reference, if they were timed."""


@dataclass(frozen=True)
class Subject:
    """What verdicts are about: a GPU model and the software that makes and runs its code."""

    gpu: str
    architecture: str
    driver: str
    torch: str
    triton: str
    ptxas: str
    """Where Triton was told to take ptxas from; empty: its own."""
    kernels: str
    """Digest of the sources of this package."""

    @property
    def key(self) -> str:
        """A short name for files."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]


class CannotCheck(RuntimeError):
    """The check could not be run, which says nothing about the kernels."""


@lru_cache
def subject_of(device: torch.device) -> Subject:
    """Return what verdicts for this device are about; a CPU stands for Triton's interpreter."""
    on_gpu = device.type == "cuda"
    target = target_of(torch.empty(0, device=device))
    return Subject(
        gpu=torch.cuda.get_device_name(device) if on_gpu else "Triton's interpreter",
        architecture=f"{target.backend} {target.arch}",
        driver=_driver() if on_gpu else "",
        torch=torch.__version__,
        triton=triton.__version__,
        ptxas=os.environ.get("TRITON_PTXAS_PATH", ""),
        kernels=_digest_of_sources(),
    )


def _driver() -> str:
    """The driver's version; the file is NVIDIA's, AMD's comes with the system's kernel."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.exists() else os.uname().release


def _digest_of_sources() -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def precisions_of(device: torch.device) -> tuple[str, ...]:
    """Return the precisions that kernels can be checked in."""
    # The interpreter has no tf32, and computes products of bfloat16 matrices wrongly.
    return ("float32", "tf32", "bfloat16", "float16") if device.type == "cuda" else ("float32", "float16")


def checked_operators() -> list[str]:
    """Return the names of the operators that have kernels."""
    from .operator import operator_table  # which imports this module

    return [name for name, backends in operator_table() if "triton" in backends]


# What operators ask.


def verified(name: str, dtypes: Iterable[torch.dtype], like: Tensor) -> bool:
    """Return whether ``auto`` may run an operator's kernels on tensors of these dtypes, on the device of ``like``.

    The first question about a precision on a device is answered by the cache, or by a check of every operator.
    """
    if torch.bfloat16 in dtypes:
        dtype = "bfloat16"
    else:
        dtype = "float16" if torch.float16 in dtypes else "float32"
    if torch.compiler.is_compiling():
        return _verified_in_trace(name, dtype, like.device)
    key = name, _precision(dtype), like.device
    trusted = _trusted.get(key)
    if trusted is None:
        traced = isinstance(like, FakeTensor)
        captured = like.is_cuda and not traced and torch.cuda.is_current_stream_capturing()
        return _decide(*key, may_check=not (traced or captured))
    return trusted


def auto_verified(name: str, tensors: Sequence[Tensor]) -> bool:
    """Return whether an operator's kernels may run on these tensors, unless a backend is forced."""
    return current_backend() != "auto" or verified(name, {t.dtype for t in tensors}, tensors[0])


def _precision(dtype: str) -> str:
    """The precision that kernels compute in for tensors of a dtype, by torch's settings as they are now."""
    return "tf32" if dtype == "float32" and not exact_float32() else dtype


def _verified_in_trace(name: str, dtype: str, device: torch.device) -> bool:
    key = name, _precision(dtype), device
    return _trusted[key] if key in _trusted else _decide(*key, may_check=False)


# What torch.compiler.assume_constant_result does, which would import the compiler, and that takes seconds.
_verified_in_trace._dynamo_marked_constant = True


def _decide(name: str, precision: str, device: torch.device, may_check: bool) -> bool:
    """Find out whether kernels may be used, and remember it for this process."""
    key = name, precision, device
    if switched_off():
        return _trusted.setdefault(key, True)
    with _deciding:
        if key in _trusted:
            return _trusted[key]
        finding = Verdicts(subject_of(device)).read().get((name, precision))
        if finding is not None:
            _remember(finding, device)
        elif may_check:
            _verify(device, precision)
        else:
            _tell(
                f"unverified {precision}",
                f"the Triton kernels have not been checked in {precision} on {subject_of(device).gpu}, and cannot be while "
                "code is traced or captured, so the reference runs there. Run `trgnet verify`, or call "
                "trgnet.kernels.verify_once() before",
            )
            return False
        return _trusted[key]


def switched_off() -> bool:
    """Return whether TRGNET_VERIFY=0 trusts the kernels without a check.

    Raises:
        ValueError: another value than 0 and 1.
    """
    value = os.environ.get("TRGNET_VERIFY", "1") or "1"
    if value not in ("0", "1"):
        raise ValueError(f"environment variable TRGNET_VERIFY: expected 0 or 1, got {value!r}")
    return value == "0"


def verify_once(device: torch.device | str, *dtypes: torch.dtype) -> None:
    """Check the kernels on a GPU for tensors of these dtypes, unless that was done before on such a machine.

    Args:
        device: nothing is done if it runs no Triton kernels, or if a backend is forced.
        dtypes: float32 (the default; in the precision that torch's settings give its products now), bfloat16, float16.
    """
    like = torch.empty(0, device=device)
    if not _runs_kernels(like) or switched_off() or current_backend() != "auto":
        return
    for dtype in dtypes or (torch.float32,):
        _verify(like.device, _precision(str(dtype).removeprefix("torch.")))


def _runs_kernels(like: Tensor) -> bool:
    return like.is_cuda and obstacle([like], {like.dtype}) is None


def _verify(device: torch.device, precision: str) -> None:
    """Settle which operators may run their kernels in a precision, by the cache or by a check."""
    with _deciding:
        names = [name for name in checked_operators() if (name, precision, device) not in _trusted]
        for finding in _findings(device, precision, names) if names else ():
            _remember(finding, device)


def _findings(device: torch.device, precision: str, names: Sequence[str]) -> list[Finding]:
    """The cached findings, completed by a check in this process or another one."""
    verdicts = Verdicts(subject_of(device))
    try:
        with verdicts.locked():
            known = verdicts.read()
            missing = [(name, precision) for name in checked_operators() if (name, precision) not in known]
            if missing:
                gpu = verdicts.subject.gpu
                _log.warning(
                    "checking the Triton kernels on %s in %s, once; TRGNET_VERIFY=0 skips it", gpu, precision
                )
                found = list(check(missing, device))
                verdicts.add(found)
                known |= {(f.operator, f.precision): f for f in found}
    except CannotCheck as error:
        return [Finding(name, precision, "unknown", what=str(error)) for name in names]
    return [known[name, precision] for name in names]


def _remember(finding: Finding, device: torch.device) -> None:
    """Use a finding in this process, and warn unless the operator passed."""
    name, precision, what = finding.operator, finding.precision, finding.what
    _trusted[name, precision, device] = finding.verdict == "passed"
    gpu = subject_of(device).gpu
    if finding.verdict == "failed":
        _tell(
            f"{name} {precision}",
            f"{name}: its Triton kernels failed the check in {precision} on {gpu} ({what}), so the reference runs. "
            "`trgnet verify` repeats the check and shows more; TRGNET_BACKEND=triton uses the kernels all the same",
        )
    elif finding.verdict == "unknown":
        _tell(
            what,
            f"the Triton kernels could not be checked on {gpu} ({what}), so the reference runs. `trgnet verify` repeats "
            "the check; TRGNET_VERIFY=0 uses the kernels without it",
        )


def _tell(what: str, message: str) -> None:
    """Warn, once in a process."""
    if what not in _told:
        _told.add(what)
        warnings.warn(message, BackendWarning, stacklevel=2)


# The cache.


def cache_folder() -> Path:
    """Return the folder of this package's cache."""
    if folder := os.environ.get("TRGNET_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trgnet"


class Verdicts:
    """The cached findings about one subject, a JSON file.

    A broken file counts as none. Where nothing can be written, a warning says so once and every process checks anew.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.path = cache_folder() / f"verdicts-{subject.key}.json"

    def read(self) -> dict[tuple[str, str], Finding]:
        """Return the findings by operator and precision."""
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            findings = [Finding(**entry) for entry in content["findings"]]
        except OSError:  # none yet, or no such folder: writing it says so
            return {}
        except (ValueError, TypeError, KeyError) as error:
            _tell("broken cache", f"cannot read {self.path} ({error}): the Triton kernels are checked anew")
            return {}
        return {(f.operator, f.precision): f for f in findings}

    def add(self, findings: Iterable[Finding]) -> None:
        """Store findings in the place of earlier ones; what could not be checked is not stored."""
        stored = self.read() | {(f.operator, f.precision): f for f in findings if f.verdict != "unknown"}
        content = {"subject": asdict(self.subject), "findings": [asdict(f) for f in stored.values()]}
        partial = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
            os.replace(partial, self.path)  # a reader never sees half of it
        except OSError as error:
            self._not_writable(error)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Exclude other processes that check the same subject; waits for them.

        Raises:
            CannotCheck: another process has not finished after ``WAIT_SECONDS``.
        """
        import fcntl  # of Unix, as Triton

        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.with_suffix(".lock").open("w")
        except OSError as error:
            self._not_writable(error)
            yield
            return
        with file:
            end = time.monotonic() + WAIT_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise CannotCheck(
                            f"another process holds {file.name} for more than {WAIT_SECONDS:.0f} s"
                        ) from None
                    time.sleep(0.1)
                except OSError as error:  # a file system without locks
                    self._not_writable(error)
                    break
            yield

    def _not_writable(self, error: OSError) -> None:
        _tell(
            "read-only cache",
            f"verdicts about the Triton kernels cannot be kept in {self.path.parent} ({error}): every process checks them "
            "anew. Set TRGNET_CACHE to a folder that can be written",
        )


# The processes that check.


class _Process:
    """One process that checks, and what it is at.

    Raises:
        CannotCheck: the process cannot be started.
    """

    def __init__(self, device: torch.device, folder: Path) -> None:
        self.job: dict[str, str] | None = None
        self.ready = False
        self.ended = False
        """Whether it is of no use any more."""
        self._set_limit(START_SECONDS)
        self.replies, writing = os.pipe()
        self._line = b""
        self._output = tempfile.NamedTemporaryFile(dir=folder, delete=False)
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("TRGNET_BACKEND", "TRGNET_VERIFY")
        }
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, sys.path))
        try:
            self._process = subprocess.Popen(
                [*CHECK, str(device), str(writing)],
                stdin=subprocess.PIPE,
                stdout=self._output,
                stderr=self._output,
                pass_fds=(writing,),
                env=environment,
                cwd=folder,  # nothing there takes the place of a module
                start_new_session=True,  # so that what it starts, such as compilers, ends with it
            )
        except OSError as error:
            os.close(self.replies)
            self._output.close()
            raise CannotCheck(f"cannot start {CHECK[0]}: {error}") from error
        finally:
            os.close(writing)

    @property
    def overdue(self) -> bool:
        return self.deadline <= time.monotonic()

    def _set_limit(self, seconds: float) -> None:
        self._seconds, self.deadline = seconds, time.monotonic() + seconds

    def give(self, job: dict[str, str], seconds: float) -> None:
        """Start a job. A process that has died is noticed when its reply is read."""
        self.job = job
        self._set_limit(seconds)
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()

    def news(self) -> Finding | None:
        """Take what there is to read, or note that the process has ended or is overdue.

        Returns:
            the finding of a job that is done, or was interrupted.

        Raises:
            CannotCheck: it ended before it was ready for a job.
        """
        if wait([self.replies], timeout=0):
            data = os.read(self.replies, 65536)
            self._line += data
            if self._line.endswith(b"\n"):
                return self._reply(json.loads(self._line))
            if data:
                return None
            how = self._ending()
        elif self.overdue:
            how = f"it did not end within {self._seconds:.0f} s"
        else:
            return None
        self.ended = True
        if not self.ready:
            last = self._last_output().strip().splitlines()[-1:]
            raise CannotCheck("; ".join([f"the program that checks did not start: {how}", *last]))
        job, self.job = self.job, None
        if job is None:
            return None
        return Finding(job["operator"], job["precision"], "failed", what=how, detail=self._last_output())

    def _reply(self, reply: dict[str, Any]) -> Finding | None:
        self._line, self.job = b"", None
        if not self.ready:
            self.ready = True
            return None
        finding = Finding(**reply)
        self.ended = finding.verdict != "passed"  # after an error the device may be in any state
        return finding

    def _ending(self) -> str:
        code = self._process.wait()
        return (
            f"its process died of {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended with code {code}"
        )

    def _last_output(self) -> str:
        return Path(self._output.name).read_text(errors="replace")[-4000:]

    def close(self) -> None:
        """End the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        os.close(self.replies)
        self._output.close()


def check(
    jobs: Sequence[tuple[str, str]],
    device: torch.device,
    *,
    task: str = "check",
    processes: int | None = None,
    seconds: float | None = None,
) -> Iterator[Finding]:
    """Do jobs in processes of their own, and yield what each found when it is done.

    A process that crashes, hangs or finds an error ends with its job; the other jobs go on in a new one. If processes
    cannot be started, the findings of the jobs that are left are "unknown".

    Args:
        jobs: pairs of operator and precision.
        device: a GPU, or the CPU for Triton's interpreter.
        task: "check" compares with the reference, "time" measures both.
        processes: at the same time.
        seconds: limit of one job (default: ``JOB_SECONDS``).
    """
    waiting = deque({"task": task, "operator": name, "precision": precision} for name, precision in jobs)
    running: list[_Process] = []
    processes = min(len(jobs), processes or max(1, min(MOST_PROCESSES, _cores() // 2)))
    with tempfile.TemporaryDirectory(prefix="trgnet-verify-") as folder:
        try:
            while waiting or any(process.job for process in running):
                while waiting and len(running) < processes:
                    running.append(_Process(device, Path(folder)))
                for process in running:
                    if process.ready and process.job is None and waiting:
                        process.give(waiting.popleft(), seconds or JOB_SECONDS)
                for process in _with_news(running):
                    finding = process.news()
                    if finding is not None:
                        yield finding
                    if process.ended:
                        running.remove(process)
                        process.close()
        except CannotCheck as error:
            for job in (*(process.job for process in running if process.job), *waiting):
                yield Finding(job["operator"], job["precision"], "unknown", what=str(error))
        finally:
            for process in running:
                process.close()


def _with_news(running: Sequence[_Process]) -> list[_Process]:
    """Wait for processes that have replied, have ended or are overdue."""
    expected = [process for process in running if process.job or not process.ready]
    pause = max(0.0, min(process.deadline for process in expected) - time.monotonic())
    readable = wait([process.replies for process in running], timeout=pause)
    return [p for p in running if p.replies in readable or (p in expected and p.overdue)]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
