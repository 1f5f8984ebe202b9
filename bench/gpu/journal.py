"""The file of a run: a line of JSON for each result as it comes, and one JSON file of all of them at the end."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trgnet.files import write_json

BAD = ("failed", "crashed", "timed out")
"""How an item ended that says that something is wrong."""


@dataclass
class Record:
    """What is known of one item."""

    phase: str
    name: str
    values: dict[str, Any] = field(default_factory=dict)
    status: str = "unfinished"
    """"done", "failed" (it raised an error), "crashed" (its process died), "timed out", "skipped",
    "not begun" (no time left), or "unfinished" where the run was killed."""
    seconds: float | None = None
    reason: str | None = None
    """Why it is not done."""


@dataclass
class Run:
    """All that a file says."""

    facts: dict[str, Any]
    planned: int
    """How many items there were to be."""
    records: list[Record]

    def of(self, phase: str) -> list[Record]:
        """The records of a phase."""
        return [record for record in self.records if record.phase == phase]


class Journal:
    """Writes results as they come; may be called by several threads.

    Args:
        path: where the complete run is to be stored; the lines go beside it, to a name that ends in ``.jsonl``.
        facts: of the machine and the commit.
        planned: how many items there are to be.

    Raises:
        FileExistsError: one of both files exists.
    """

    def __init__(self, path: Path, facts: dict[str, Any], planned: int) -> None:
        self.path, self.lines = path, path.with_suffix(".jsonl")
        for taken in (self.path, self.lines):
            if taken.exists():
                raise FileExistsError(f"{taken} exists; give another name with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = self.lines.open("x", encoding="utf-8")
        self.write({"facts": facts, "planned": planned})

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; it is in the file on return."""
        with self._lock:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> Run:
        """Store the run as one JSON file in the place of the lines."""
        self._file.close()
        run = load(self.lines)
        write_json(self.path, vars(run) | {"records": [vars(record) for record in run.records]})
        self.lines.unlink()
        return run


def load(path: str | Path) -> Run:
    """Read a stored run, or the lines that a killed one left.

    Raises:
        ValueError: the file holds no such run.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        if Path(path).suffix == ".jsonl":
            return _of_lines(text.splitlines())
        stored = json.loads(text)
        return Run(stored["facts"], stored["planned"], [Record(**record) for record in stored["records"]])
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} is no run of python -m bench.gpu ({error!r})") from None


def _of_lines(lines: Iterable[str]) -> Run:
    """Put the lines of each item together; a last line that was cut off is left out."""
    head, *rest = lines
    run, records = Run(**json.loads(head), records=[]), {}
    for i, text in enumerate(rest):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            if i < len(rest) - 1:
                raise
            break
        key = line.pop("phase"), line.pop("name")
        record = records.setdefault(key, Record(*key))
        record.values.update(line.pop("values", {}))
        vars(record).update(line)
    run.records.extend(records.values())
    return run
