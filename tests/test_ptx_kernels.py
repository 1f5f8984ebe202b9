"""Kernels as compiled for an H100, on the emulator: those of the package against float64, and faults put into kernels."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from ptx import Findings, GlobalMemory, launch
from ptx.findings import NOT_AWAITED, NOT_FENCED, OUT_OF_BOUNDS, RACE
from ptx.mutations import removals
from test_compiled import KERNELS, ROOT, output_of
from test_triton import cases, with_id

pytest.importorskip("triton")

# Kernels of the emulator's own, see ptx/kernels.py.


@functools.cache
def own_kernels() -> dict[str, dict]:
    return json.loads(output_of("-m", "tests.ptx.kernels"))


def product_of(name: str, ptx: str | None = None, length: int = 224, told: int | None = None) -> Findings:
    """Run one of them, or code in its place, and check the product; it may be told a wrong length."""
    kernel = own_kernels()[name]
    random = np.random.default_rng(0)
    dtype = np.float16 if kernel["kind"] == "fp16" else np.float32
    a, b = (
        np.round(random.standard_normal(s) * 4).astype(dtype) / 4
        for s in ((64, length), (length, kernel["N"]))
    )
    memory = GlobalMemory(Findings())
    addresses = [memory.place(x.astype(dtype).view(np.uint8).reshape(-1)) for x in (a, b)]
    out = memory.place(np.zeros(64 * kernel["N"] * 4, np.uint8))
    arguments = [*addresses, out, length if told is None else told]
    launch(ptx or kernel["ptx"], (1,), arguments, memory, shared=kernel["shared"], warps=kernel["num_warps"])
    if ptx is None and told is None:
        got = memory.read(out, 64 * kernel["N"] * 4).view(np.float32).reshape(64, -1)
        np.testing.assert_array_equal(got, a.astype(np.float32) @ b.astype(np.float32))
    return memory.findings


def test_tiles_of_eight_columns_read_beyond_shared_memory():
    """Sixteen columns that eight warps share by two; triton #10629."""
    found = product_of("eight columns")
    assert "m64n8k8" in own_kernels()["eight columns"]["ptx"]
    assert OUT_OF_BOUNDS in found.kinds
    assert any(
        "16 columns of a tile of 8, up to byte 11264 of 10240" in line for line in found.lines("product")
    )


@pytest.mark.parametrize("name", ["sixteen columns", "pipelined"])
def test_other_products_have_no_fault(name: str):
    assert product_of(name).lines(name) == []


def test_a_wrong_size_is_an_access_out_of_bounds():
    assert OUT_OF_BOUNDS in product_of("sixteen columns", told=256).kinds


REMOVED = {
    "bar.sync": RACE,
    "cp.async.wait_group": NOT_AWAITED,
    "wgmma.wait_group": NOT_AWAITED,
    "wgmma.fence": NOT_FENCED,
    "fence.proxy.async": NOT_FENCED,
}
NEEDLESS = {("pipelined", "bar.sync"): [0]}
"""Nothing is in shared memory yet at that barrier."""


@pytest.mark.parametrize("instruction", REMOVED)
@pytest.mark.parametrize("name", ["sixteen columns", "pipelined"])
def test_removed_order_is_found(name: str, instruction: str):
    changed = removals(own_kernels()[name]["ptx"], instruction)
    assert bool(changed) == (name == "pipelined" or instruction != "cp.async.wait_group")
    kinds = [product_of(name, code).kinds for code in changed]
    assert [i for i, found in enumerate(kinds) if REMOVED[instruction] not in found] == NEEDLESS.get(
        (name, instruction), []
    )


# Kernels of the package: their tests, on the emulator.


def emulated(*tests: str) -> set[str]:
    """Run tests with the kernels on the emulator; returns the kernels that ran."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = "-m pytest -q -p tests.ptx.plugin -p no:cacheprovider".split()
    command = [sys.executable, *options, *tests]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-3000:]
    return set(re.search(r"^emulated: (.*)$", run.stdout, re.M)[1].split(", "))


def against_float64(name: str, every: int) -> list[str]:
    """Tests of an operator in float32, at one size in ``every``."""
    sizes = [size for operator, size in cases(every) if operator == name]
    return [f"tests/test_triton.py::test_float32_against_float64[{name}-{with_id(size)}]" for size in sizes]


def in_half_precision(name: str) -> list[str]:
    sizes = [size for operator, size in cases(5) if operator == name]
    return [
        f"tests/test_triton.py::test_half_precision_against_float64[torch.{dtype}-{name}-{with_id(size)}]"
        for dtype in ("float16", "bfloat16")
        for size in sizes
    ]


def in_both_precisions(name: str) -> list[str]:
    return [
        f"tests/test_triton.py::test_both_precisions_of_float32[{precision}-{size}-{name}]"
        for precision in ("highest", "high")
        for size in ((2, 40, 25, 24), (2, 16, 33, 8))
    ]


def test_some_kernels_on_the_emulator():
    sample = ("fusion_layer", "segment_mean")
    tests = [*against_float64("fusion_layer", 5)[-1:], *against_float64("segment_mean", 5)[:1]]
    kernels = emulated(*tests, in_half_precision("fusion_layer")[-1])
    assert kernels == {kernel for name in sample for kernel in KERNELS[name]}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "moment_update"])
def test_every_kernel_on_the_emulator(name: str):
    """In float32, tf32, bfloat16 and float16; lengths that are multiples of 16 and others."""
    tests = [*against_float64(name, 7), *in_half_precision(name), *in_both_precisions(name)]
    assert emulated(*tests) == {*KERNELS[name]}


@pytest.mark.exhaustive
def test_the_optimizers_kernel_on_the_emulator():
    tests = "triton or kernel or gate_decides or launch"
    assert emulated("tests/test_moment_update.py", "-k", tests) == {"moment_update"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["dilated_residual", "fusion_layer"])
def test_removed_barriers_of_the_packages_kernels_are_found(name: str):
    """Not all: some order nothing at such a small size, such as those before the second turn of a loop."""
    found = json.loads(output_of("-m", "tests.ptx.mutations", name, "float32", "bar.sync"))
    assert {*found} == {*KERNELS[name]}
    assert sum(len(missed) for _, missed in found.values()) <= 0.1 * sum(tried for tried, _ in found.values())
    assert all(len(missed) < tried for tried, missed in found.values() if tried)
