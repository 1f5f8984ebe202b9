"""Facts of the kernels as compiled for GPUs that are not there: registers, spills, wide accesses, matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from trgnet.kernels import operator_table

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
# Kernels that move no rows of frames: sums over what programs left, and the optimizer (tests/test_moment_update.py).
REDUCTIONS = ("combine_parts", "moment_update")
PRODUCTS = ("dynamic_graph_conv", "multiscale_graph_conv")


def output_of(*arguments: str) -> str:
    """What Python prints with the compiler instead of the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def compiled(folder: Path, *arguments: str) -> list[dict]:
    """Records of ``python -m bench.compiled``, which must end without a fault."""
    file = folder / "compiled.json"
    output_of("-m", "bench.compiled", "--json", str(file), *arguments)
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every kernel at the published size, in every precision, for every architecture."""
    return compiled(tmp_path_factory.mktemp("compiled"))


def test_every_kernel_compiles_everywhere_without_a_spill(published: list[dict]):
    combinations = {(code["precision"], code["arch"]) for code in published}
    assert len(combinations) == 16
    kernels = {code["kernel"] for code in published}
    assert {"multiscale_graph_conv", "dynamic_graph_conv_forward", "batch_norm_backward"} <= kernels
    for kernel in kernels:
        assert {(c["precision"], c["arch"]) for c in published if c["kernel"] == kernel} == combinations
    for code in published:
        assert code["spilled"] == 0 and code["float64"] == 0, code
        assert code["shared"] <= code["shared_limit"], code
        assert code["shared"] > 0 or code["kernel"] == "batch_norm_backward", code
        assert 0 < code["registers"] <= 512, code


def test_rows_of_frames_move_in_16_byte_accesses(published: list[dict]):
    """Most bytes; what remains are masks, biases and the scattered lanes of matrix fragments."""
    for code in published:
        if code["kernel"] not in REDUCTIONS:
            assert code["wide"] >= 0.45, code


def test_products_run_on_the_matrix_units(published: list[dict]):
    for code in published:
        assert (code["matrix"] > 0) == code["kernel"].startswith(PRODUCTS), code


@pytest.mark.parametrize(
    "arguments",
    [
        ("--joints", "17", "--features", "16", "--precision", "tf32"),
        ("--joints", "33", "--precision", "float32", "--precision", "float16"),
        ("--joints", "128", "--precision", "bfloat16"),
    ],
    ids=" ".join,
)
def test_other_skeletons_spill_nothing(tmp_path: Path, arguments: tuple[str, ...]):
    assert compiled(tmp_path, *arguments)


def test_unaligned_lengths_spill_nothing_and_lose_the_wide_accesses(tmp_path: Path, published: list[dict]):
    """That the share falls shows that it is measured, and that lengths want padding to multiples of 16."""

    def shares(codes: list[dict]) -> dict[tuple[str, ...], float]:
        return {
            (code["kernel"], code["precision"], code["arch"]): code["wide"]
            for code in codes
            if code["operator"] == "masked_batch_norm" and code["kernel"] not in REDUCTIONS
        }

    unaligned = shares(
        compiled(tmp_path, "--frames", "100", "--precision", "float32", "--precision", "bfloat16")
    )
    assert len(unaligned) == 4 * 2 * 4
    assert all(share < shares(published)[key] / 2 for key, share in unaligned.items())


@pytest.mark.parametrize(
    "name",
    [name for name, backends in operator_table() if "triton" in backends and name != "moment_update"],
)
def test_fifty_lengths_compile_every_kernel_at_most_twice(name: str):
    """Once for lengths that divide by 16, once for others. One source may be two kernels: the backward pass of the
    dynamic graph convolution starts it for values and for relations."""
    versions = json.loads(output_of("tests/compilations.py", name))
    assert len(versions) >= 2
    for kernel, count in versions.items():
        assert 1 <= count <= (4 if kernel == "_dynamic_graph_conv_backward_kernel" else 2), kernel
