"""Facts of the optimizer's kernel as compiled: spills, registers, 16-byte accesses, compilations."""

from __future__ import annotations

import json

import pytest
from test_compiled import output_of

pytest.importorskip("triton")

# Bytes that a thread has of each tensor in a full tile, in units of 16: 8 elements, in 4 bytes or in 2.
WIDE, NARROW = 2, 1
LOADS = {  # parameter, gradient, first and second moment, rounding error
    "lcam": (WIDE, WIDE, WIDE),
    "gated": (WIDE, WIDE, WIDE, WIDE),
    "smes, kahan": (NARROW, NARROW, WIDE, WIDE, NARROW),
    "smes, stochastic": (NARROW, NARROW, NARROW, NARROW),
}


EXACTLY_ROUNDED = ("add", "sub", "div.rn", "setp", "selp", "abs", "min", "max", "cvt")


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict]:
    return json.loads(output_of("-m", "tests.moment_kernels", "sm_90"))


def test_no_variant_spills_or_computes_in_float64(kernels: dict):
    for name in (*LOADS, "unaligned"):
        assert kernels[name]["spilled"] == kernels[name]["float64"] == 0, name
        assert 0 < kernels[name]["registers"] <= 128, name


def test_full_tiles_move_in_16_byte_accesses(kernels: dict):
    """Exactly those that the formula needs: everything is read, all but the gradient is written."""
    for name, loads in LOADS.items():
        assert kernels[name]["loads"] == sum(loads), name
        assert kernels[name]["stores"] == sum(loads) - loads[1], name
    assert kernels["unaligned"]["loads"] == kernels["unaligned"]["stores"] == 0


def test_no_size_compiles_anew(kernels: dict):
    assert kernels["compilations"]["count"] == 1


def test_the_gate_has_nothing_that_rounds_otherwise_than_pytorch(kernels: dict):
    """PyTorch rounds every operation once, to nearest: no multiplication that could be fused with an addition, and no
    approximate division."""
    for average, instructions in kernels["gate"].items():
        assert {"sub.f32", "div.rn.f32"} <= set(instructions), average
        others = [name for name in instructions if not name.startswith(EXACTLY_ROUNDED) or "approx" in name]
        assert not others, (average, others)
