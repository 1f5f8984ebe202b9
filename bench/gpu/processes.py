"""Runs items in processes that may crash or hang: that ends an item and not the run.

A process runs one item after the other. After one that failed, crashed or hung it is not used again, as one illegal memory
access makes all later calls to the GPU fail. Items that are `alone` have a process of their own anyway.
"""

from __future__ import annotations

import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "@bench.gpu "
"""Begins the lines of a worker's output that are results; the others are what libraries print."""
LEAST_SECONDS = 5.0
"""With less time left no item is begun."""
GRACE = 3.0
"""Seconds between a worker's own end, with a traceback, and its being killed."""
LOG_LINES = 25


class Skipped(Exception):
    """An item cannot be done here; says why."""


@dataclass(frozen=True)
class Item:
    """A piece of work, done by a worker."""

    phase: str
    name: str
    function: str
    """``module:function``. A generator that yields dictionaries of results."""
    arguments: dict[str, Any]
    limit: float
    """Seconds, the start of its process included."""
    alone: bool = False
    memory: int = 0
    """Bytes on the device that it needs at most."""
    command: tuple[str, ...] = ()
    """What the worker is run under."""
    environment: dict[str, str] = field(default_factory=dict)


Report = Callable[[dict[str, Any]], None]
"""Called with a line of the journal."""


class Worker:
    """A process that runs items, see :mod:`bench.gpu.worker`."""

    def __init__(self, item: Item) -> None:
        self._kind = item.command, item.environment
        self._log = tempfile.TemporaryFile(mode="w+", errors="replace")
        self.process = subprocess.Popen(
            [*item.command, sys.executable, "-m", "bench.gpu.worker"],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | item.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it starts is killed with it
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def can_do(self, item: Item) -> bool:
        """Whether an item may run in this process, which has done others."""
        return not item.alone and self._kind == (item.command, item.environment)

    def run(self, item: Item, seconds: float, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        """Do one item; `report` gets its values as they come. Returns how it ended."""
        began = time.time()
        printed = []
        try:
            self.process.stdin.write(json.dumps(asdict(item) | {"until": began + seconds}) + "\n")
            self.process.stdin.close() if item.alone else self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died already, which is what the end of its output says
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, began + seconds + GRACE - time.time()))
            except queue.Empty:
                self.kill()
                return self._end("timed out", f"killed after {seconds:.0f} s", printed)
            if line is None:
                return self._died(time.time() - began >= seconds, seconds, printed)
            if not line.startswith(MARK):
                printed += [line] if line.strip() else []
                continue
            message = json.loads(line.removeprefix(MARK))
            if "status" not in message:
                report(message)
            elif item.alone:
                return self._finished(message, began + seconds + GRACE - time.time(), printed)
            else:
                return message

    def _finished(self, message: dict[str, Any], seconds: float, printed: list[str]) -> dict[str, Any]:
        """How a process with one item ends: what it runs under may have found something."""
        try:
            code = self.process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            self.kill()
            return self._end("timed out", "the process did not end", printed)
        while (line := self._lines.get()) is not None:
            printed.append(line)
        if message["status"] == "done" and code != 0:
            return self._end("failed", f"exit status {code}", printed)
        if message["status"] == "failed":
            return self._end("failed", message["reason"], printed)
        return message

    def _died(self, late: bool, seconds: float, printed: list[str]) -> dict[str, Any]:
        code = self.process.wait()
        if late:
            return self._end("timed out", f"stopped after {seconds:.0f} s", printed)
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        return self._end("crashed", how, printed)

    def _end(self, status: str, what: str, printed: list[str]) -> dict[str, Any]:
        self._log.seek(0)
        lines = [*printed[-LOG_LINES:], *_ending(self._log.readlines())]
        return {"status": status, "reason": "\n".join([what, *(line.rstrip() for line in lines)])}

    def kill(self) -> None:
        """End the process and everything that it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has ended
        self.process.wait()


def _ending(log: list[str]) -> list[str]:
    """The last lines, or the first ones of a crash or hang, where the innermost call comes first."""
    begins = [i for i, line in enumerate(log) if line.startswith(("Fatal Python error", "Timeout ("))]
    return log[begins[-1] :][:LOG_LINES] if begins else log[-LOG_LINES:]


class Runner:
    """Runs items, in several processes at a time if that is wanted, until the time is up.

    Args:
        report: called with every line for the journal.
        seconds: after which no item goes on.
        memory: bytes on the device that the items of one time may need together.
    """

    def __init__(self, report: Report, seconds: float, memory: float = math.inf) -> None:
        self._report, self._ends, self._memory = report, time.monotonic() + seconds, memory
        self._workers: set[Worker] = set()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._used, self._stopped = 0, False

    def run(self, items: Sequence[Item], lanes: int = 1, seconds: float = math.inf) -> None:
        """Run the items in their order, as many at a time as there are lanes, for at most so many seconds."""
        ends = min(self._ends, time.monotonic() + seconds)
        waiting, errors = list(items), []

        def lane() -> None:
            try:
                self._lane(waiting, ends)
            except Exception as error:
                errors.append(error)
                self._kill()

        self._threads = [threading.Thread(target=lane, daemon=True) for _ in range(lanes)]
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        if errors:
            raise errors[0]

    def stop(self) -> None:
        """Kill what runs; nothing is reported after it."""
        self._kill()
        for thread in self._threads:
            thread.join()

    def _kill(self) -> None:
        with self._changed:
            self._stopped = True
            for worker in self._workers:
                worker.kill()
            self._changed.notify_all()

    def _lane(self, waiting: list[Item], ends: float) -> None:
        worker = None
        while True:
            item = self._take(waiting)
            if worker is not None and (item is None or not worker.can_do(item)):
                self._drop(worker)
                worker = None
            if item is None:
                return
            worker = self._one(item, worker, ends - time.monotonic())
            with self._changed:
                self._used -= item.memory
                self._changed.notify_all()

    def _take(self, waiting: list[Item]) -> Item | None:
        """Remove the first item that there is memory for, and wait until there is; None if no item is left."""
        with self._changed:
            while waiting and not self._stopped:
                for i, item in enumerate(waiting):
                    if self._used == 0 or self._used + item.memory <= self._memory:
                        self._used += item.memory
                        return waiting.pop(i)
                self._changed.wait()
            return None

    def _one(self, item: Item, worker: Worker | None, left: float) -> Worker | None:
        """Run an item; returns the worker if it can be used again."""
        line = {"phase": item.phase, "name": item.name}
        if left < LEAST_SECONDS:
            self._report(line | {"status": "not begun", "reason": "no time left"})
            return worker
        with self._changed:
            if self._stopped:
                return worker
            if worker is None:
                worker = Worker(item)
                self._workers.add(worker)
        self._report(line)
        began = time.monotonic()
        end = worker.run(item, min(item.limit, left), lambda values: self._report(line | {"values": values}))
        if not self._stopped:
            self._report(line | end | {"seconds": round(time.monotonic() - began, 1)})
        if item.alone or end["status"] not in ("done", "skipped"):
            self._drop(worker)
            return None
        return worker

    def _drop(self, worker: Worker) -> None:
        worker.kill()
        with self._changed:
            self._workers.discard(worker)
