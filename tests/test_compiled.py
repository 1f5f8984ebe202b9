"""Facts of the kernels as compiled for GPUs that are not there: registers, spills, wide accesses, matrix instructions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from trgnet.kernels import operator_table

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
OPERATORS = [name for name, backends in operator_table() if "triton" in backends]


@dataclass(frozen=True)
class Work:
    """What a kernel does most."""

    matrix: bool = False
    """Whether it has products for the matrix units."""
    rows: bool = False
    """Whether it moves rows of frames, in 16-byte accesses where lengths are multiples of 16."""


WITH_JOINTS = ("multiscale_graph_conv", "dynamic_graph_conv", "masked_batch_norm")
PRODUCT, ROWS, SUMS = Work(matrix=True, rows=True), Work(rows=True), Work()
# Most accesses in the code of a program are those of a weight (F, F, 3) and its gradient, once each, with stride 3.
DILATED = Work(matrix=True)
# Every operator's kernels, shared ones too.
KERNELS = {
    "multiscale_graph_conv": {"multiscale_graph_conv": PRODUCT, "combine_parts": SUMS},
    "dynamic_graph_conv": {
        **dict.fromkeys((f"dynamic_graph_conv_{part}" for part in ("forward", "backward", "graph")), PRODUCT),
        "combine_parts": SUMS,
    },
    "masked_batch_norm": {
        **dict.fromkeys(
            (f"batch_norm_{part}" for part in ("statistics", "forward", "backward_sums", "backward")), ROWS
        ),
        "combine_parts": SUMS,
    },
    "attention_layer": {
        **dict.fromkeys(
            (
                f"attention_{part}"
                for part in ("key_value", "output", "output_backward", "key_value_backward")
            ),
            PRODUCT,
        ),
        **dict.fromkeys(("attention_conv", "attention_weights_backward", "dilated_conv_backward"), DILATED),
        "attention_pack": SUMS,
    },
    "fusion_layer": dict.fromkeys(("fusion_layer_forward", "fusion_layer_backward"), PRODUCT),
    "dilated_residual": dict.fromkeys(
        ("dilated_residual_forward", "dilated_residual_backward", "dilated_conv_backward"), DILATED
    ),
    "class_loss": dict.fromkeys(
        (f"class_loss_{part}" for part in ("sums", "steps", "totals", "backward")), SUMS
    ),
    "boundary_loss": dict.fromkeys((f"boundary_loss_{part}" for part in ("sums", "mean", "backward")), SUMS),
    "segment_mean": dict.fromkeys(("segment_mean_forward", "segment_mean_backward"), SUMS),
    "pairwise_distance": dict.fromkeys(("pairwise_distance_forward", "pairwise_distance_backward"), SUMS),
    "moment_update": {"moment_update": SUMS},  # more about it in tests/test_moment_kernels.py
}
# Versions for a sweep of lengths: one for multiples of 16, one for others. One source may be two kernels: the backward
# pass of the dynamic graph convolution starts it for values and for relations.
VERSIONS = {"_dynamic_graph_conv_backward_kernel": 4}


def work(code: dict) -> Work:
    return KERNELS[code["operator"]][code["kernel"]]


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
    kernels = {(code["operator"], code["kernel"]) for code in published}
    assert kernels == {(name, kernel) for name in OPERATORS for kernel in KERNELS[name]}
    for kernel in kernels:
        of_kernel = [c for c in published if (c["operator"], c["kernel"]) == kernel]
        assert {(c["precision"], c["arch"]) for c in of_kernel} == combinations
    for code in published:
        assert code["spilled"] == 0 and code["float64"] == 0, code
        assert code["shared"] <= code["shared_limit"], code
        assert code["shared"] > 0 or not work(code).matrix, code
        assert 0 < code["registers"] <= 512, code


def test_rows_of_frames_move_in_16_byte_accesses(published: list[dict]):
    """Most bytes; what remains are masks, biases and the scattered lanes of matrix fragments."""
    for code in published:
        if work(code).rows:
            assert code["wide"] >= 0.45, code


def test_products_run_on_the_matrix_units(published: list[dict]):
    for code in published:
        assert (code["matrix"] > 0) == work(code).matrix, code


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
    assert compiled(tmp_path, *arguments, *(part for name in WITH_JOINTS for part in ("--operator", name)))


def test_other_widths_spill_nothing(tmp_path: Path):
    others = [part for name in OPERATORS if name not in WITH_JOINTS for part in ("--operator", name)]
    assert compiled(tmp_path, "--features", "16", "--precision", "tf32", "--precision", "bfloat16", *others)


def test_unaligned_lengths_spill_nothing_and_lose_the_wide_accesses(tmp_path: Path, published: list[dict]):
    """That the share falls shows that it is measured, and that lengths want padding to multiples of 16."""

    def shares(codes: list[dict]) -> dict[tuple[str, ...], float]:
        return {
            (code["kernel"], code["precision"], code["arch"]): code["wide"]
            for code in codes
            if code["operator"] == "masked_batch_norm" and work(code).rows
        }

    unaligned = shares(
        compiled(tmp_path, "--frames", "100", "--precision", "float32", "--precision", "bfloat16")
    )
    assert len(unaligned) == 4 * 2 * 4
    assert all(share < shares(published)[key] / 2 for key, share in unaligned.items())


@pytest.mark.parametrize("name", [name for name in OPERATORS if name != "moment_update"])
def test_fifty_lengths_compile_every_kernel_at_most_twice(name: str):
    versions = json.loads(output_of("tests/compilations.py", name))
    assert len(versions) >= 2
    for kernel, count in versions.items():
        assert 1 <= count <= VERSIONS.get(kernel, 2), kernel
