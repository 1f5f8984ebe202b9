"""Items that go wrong, for the tests of ``python -m bench.gpu``."""

from __future__ import annotations

import os
import time

from bench.gpu.processes import Skipped


def good(value: int = 1):
    yield {"value": value, "process": os.getpid()}


def partly(how: str):
    """A result, and then what `how` says."""
    yield {"value": 1}
    if how == "crash":
        os.abort()
    if how == "hang":
        time.sleep(600)
    if how == "hang in C":  # no Python code runs, no signal is handled
        import ctypes

        ctypes.PyDLL(None).sleep(600)
    if how == "fail":
        raise AssertionError("off by 7")
    if how == "skip":
        raise Skipped("there is no GPU")
    if how == "leave":
        os._exit(3)
    yield {"later": float("nan")}
