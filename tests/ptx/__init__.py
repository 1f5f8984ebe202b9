"""Runs the code that Triton compiles for NVIDIA GPUs on the CPU, and finds faults in it."""

from .findings import Findings
from .machine import Deadlock, launch
from .memory import GlobalMemory
from .program import UnsupportedPTX, parse

__all__ = ["Deadlock", "Findings", "GlobalMemory", "UnsupportedPTX", "launch", "parse"]
