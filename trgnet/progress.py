"""What a training shows while it runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainingProgress:
    """Shows epochs, loss, speed and the time left; a context manager.

    Args:
        console: where to. On a terminal a bar, with a line above it per evaluation; elsewhere the lines only.
        epochs: of the whole training.
        done: epochs that are behind already, when a training is continued.
    """

    def __init__(self, console: Console, epochs: int, done: int = 0) -> None:
        self._console = console
        self._epochs, self._resumed_at, self._started = epochs, done, time.monotonic()
        self._bar = Progress(
            TextColumn("epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} frames/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=epochs, completed=done, loss="-", speed="-")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, share: float, loss: float | None, frames_per_second: float) -> None:
        """Show a moment within an epoch: the share of it that is done, a loss if known, the speed."""
        completed = int(self._bar.tasks[0].completed) + min(share, 0.999)
        self._bar.update(self._task, completed=completed, speed=f"{frames_per_second:,.0f}")
        if loss is not None:
            self._bar.update(self._task, loss=f"{loss:.3f}")

    def epoch(self, record: Mapping[str, float], evaluated: str | None) -> None:
        """Show the end of an epoch by its record, and a line of scores of the part `evaluated`, if any."""
        epoch, loss, speed = int(record["epoch"]), record["loss/total"], record["frames_per_second"]
        self._bar.update(self._task, completed=epoch, loss=f"{loss:.3f}", speed=f"{speed:,.0f}")
        if evaluated is not None:
            accuracy, f1 = (record[f"{evaluated}/refined/{name}"] for name in ("accuracy", "f1@50"))
            self._console.print(
                f"epoch {epoch:>{len(str(self._epochs))}}/{self._epochs}  loss {loss:.3f}  {evaluated}: "
                f"accuracy {accuracy:.1f}, f1@50 {f1:.1f}  {speed:,.0f} frames/s  {self._left(epoch)} left",
                highlight=False,
                soft_wrap=True,
            )

    def _left(self, epoch: int) -> str:
        seconds = (time.monotonic() - self._started) / (epoch - self._resumed_at) * (self._epochs - epoch)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"
