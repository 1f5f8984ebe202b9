"""Ending at a moment of one's own choice when the user or the system asks to."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """While it is entered, the first Ctrl-C (SIGINT) or SIGTERM is only remembered; the next one interrupts.

    Outside the main thread, where Python delivers no signals, it remembers none.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.signal is not None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


def ignore_signals(_: int = 0) -> None:
    """For the start of a helper process: the terminal signals all, but ending is up to the process it helps."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
