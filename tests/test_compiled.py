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


PRODUCT, ROWS, SUMS = Work(matrix=True, rows=True), Work(rows=True), Work()
# Most accesses in the code of a program are those of a gradient (F, F, 3), with stride 3, or of weights.
WEIGHTS = Work(matrix=True)
POINTWISE = {"pointwise_pack": SUMS, "pointwise": PRODUCT, "pointwise_weight": WEIGHTS}
# Every operator's kernels, shared ones too.
KERNELS = {
    "multiscale_graph_conv": POINTWISE | {"combine_parts": SUMS},
    "pointwise_conv": POINTWISE,
    "dynamic_graph_conv": {
        # Threads hold 4 frames, which are 8 bytes in half precision.
        **dict.fromkeys((f"dynamic_graph_conv_{part}" for part in ("apply", "relation")), SUMS),
        "dynamic_graph_conv_graph": PRODUCT,
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
        **dict.fromkeys(("attention_weights_backward", "dilated_conv_weights"), WEIGHTS),
        **dict.fromkeys(("attention_conv", "dilated_conv_backward"), WEIGHTS),
        "attention_pack": SUMS,
    },
    "fusion_layer": dict.fromkeys(("fusion_layer_forward", "fusion_layer_backward"), PRODUCT),
    "dilated_residual": {
        **dict.fromkeys(
            (
                "dilated_residual_forward",
                "dilated_residual_backward",
                "dilated_conv_backward",
                "dilated_conv_weights",
            ),
            WEIGHTS,
        ),
        "dilated_residual_pack": SUMS,
    },
    "class_loss": dict.fromkeys(
        (f"class_loss_{part}" for part in ("sums", "steps", "totals", "backward")), SUMS
    ),
    "boundary_loss": dict.fromkeys((f"boundary_loss_{part}" for part in ("sums", "mean", "backward")), SUMS),
    "segment_mean": dict.fromkeys(("segment_mean_forward", "segment_mean_backward"), SUMS),
    "pairwise_distance": dict.fromkeys(("pairwise_distance_forward", "pairwise_distance_backward"), SUMS),
    "moment_update": {"moment_update": SUMS},  # more about it in tests/test_moment_kernels.py
}
# Versions for a sweep of lengths: one for multiples of 16, one for others. One source may be two kernels: one for the
# forward and one for the backward pass.
VERSIONS = {"_dynamic_graph_conv_apply_kernel": 4, "_pointwise_kernel": 4}


EXACT_ONLY = {("multiscale_graph_conv", "pointwise_weight")}
"""Of exact float32 on NVIDIA GPUs; elsewhere torch multiplies."""


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
def hopper(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Every kernel at the published widths for one architecture, at aligned and unaligned lengths."""
    return compiled(tmp_path_factory.mktemp("compiled"), "--plain", "--arch", "sm_90", *SAMPLE)


SAMPLE = ("--size", "published", "--size", "unaligned", "--precision", "float32", "--precision", "bfloat16")


def of_size(codes: list[dict], size: str) -> dict[tuple[str, ...], dict]:
    return {
        (code["operator"], code["kernel"], code["precision"], code["arch"]): code
        for code in codes
        if code["size"] == size
    }


def assert_complete(codes: dict[tuple[str, ...], dict], combinations: int) -> None:
    """Every kernel of every operator is there in each precision and for each architecture, and does its work there."""
    assert len({key[2:] for key in codes}) == combinations
    kernels = {(name, kernel) for name in OPERATORS for kernel in KERNELS[name]}
    expected = {
        (*kernel, precision, arch)
        for kernel in kernels
        for _, _, precision, arch in codes
        if kernel not in EXACT_ONLY or (precision == "float32" and arch != "gfx942")
    }
    assert set(codes) == expected
    for code in codes.values():
        assert (code["matrix"] > 0) == work(code).matrix, code
        assert code["shared"] > 0 or not work(code).matrix, code
        assert 0 < code["registers"] <= 512, code


def test_every_kernel_compiles_without_a_fault(hopper: list[dict]):
    assert_complete(of_size(hopper, "published"), combinations=2)
    for code in hopper:
        assert code["spilled"] == code["forbidden"] == code["float64"] == 0, code
        assert code["shared"] <= code["shared_limit"], code


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_size_and_variant_compiles_everywhere_without_a_fault(arch: str, tmp_path: Path):
    codes = compiled(tmp_path, "--arch", arch)
    assert_complete(of_size(codes, "published"), combinations=4)
    for code in of_size(codes, "published").values():
        assert code["wide"] >= 0.45 or not work(code).rows, code


def test_rows_of_frames_move_in_16_byte_accesses(hopper: list[dict]):
    """Most bytes; what remains are masks, biases and the scattered lanes of matrix fragments."""
    aligned, unaligned = of_size(hopper, "published"), of_size(hopper, "unaligned")
    for key, code in aligned.items():
        if work(code).rows:
            assert code["wide"] >= 0.45, code
            # That the share falls shows that it is measured, and that lengths want padding to multiples of 16.
            if code["operator"] == "masked_batch_norm":
                assert unaligned[key]["wide"] < code["wide"] / 2, code


def test_tiles_of_eight_columns_are_found():
    """Eight warps share the 16 frames of a float32 tile."""
    program = (
        "from dataclasses import replace\n"
        "from bench.compiled import ARCHITECTURES, Job, compile_launch, _facts, launches\n"
        "job = Job('attention_layer', 'tf32', 'sm_90')\n"
        "conv = next(each for each in launches(job) if each.kernel.__name__ == '_attention_conv_kernel')\n"
        "wrong = replace(conv, num_warps=8, constants=tuple((dict(conv.constants) | {'BT': 16}).items()))\n"
        "print(*_facts(job, wrong, compile_launch(wrong, ARCHITECTURES['sm_90'])).faults)\n"
    )
    assert "tensor-core instructions of eight columns" in output_of("-c", program)


def test_fifty_lengths_compile_every_kernel_at_most_twice():
    names = [name for name in OPERATORS if name != "moment_update"]
    found = json.loads(output_of("tests/compilations.py", *names))
    assert list(found) == names
    for versions in found.values():
        assert len(versions) >= 2
        for kernel, count in versions.items():
            assert 1 <= count <= VERSIONS.get(kernel, 2), kernel
