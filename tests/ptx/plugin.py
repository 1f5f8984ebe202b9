"""Plugin for pytest: tests of the kernels run what Triton compiles for an H100, on the emulator.

    python -m pytest -p tests.ptx.plugin tests/test_triton.py -k float32_against_float64

A test fails too if the emulator found a fault in a kernel that it launched. The last line of the report names the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are declared: before trgnet is imported
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the emulator takes CPU tensors
KERNELS: set[str] = set()
"""Those that were launched."""


@pytest.fixture(autouse=True)
def emulation() -> Iterator[object]:
    """What the kernels of a test run on; fails the test if there is a fault."""
    from .emulation import Emulation, emulated

    with emulated(Emulation()) as used:
        yield used
    KERNELS.update(used.findings)
    assert not used.lines, "\n".join(used.lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"emulated: {', '.join(sorted(KERNELS))}")
