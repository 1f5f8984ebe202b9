"""Predicted times: what they grow with, and that no kernel became slower than the stored prediction allows."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from trgnet.kernels import operator_table
from trgnet.kernels.examples import Size
from trgnet.kernels.launch import Span

triton = pytest.importorskip("triton")

from bench import compiled, predict, sass_time  # noqa: E402
from bench.step_time import Call  # noqa: E402
from tests.test_compiled import output_of  # noqa: E402
from tests.test_sass import loop, run  # noqa: E402

OPERATORS = [n for n, backends in operator_table() if "triton" in backends and n not in predict.IN_PLACE]
stored_release = pytest.mark.skipif(
    predict.stored()["triton"] != triton.__version__,
    reason=f"predictions are stored for triton {predict.stored()['triton']}",
)


def seconds(times: int = 200, blocks: int = 132, stride: str = "0x2", **machine: float) -> float:
    code = replace(loop(stride), registers=32)
    found = sass_time.predict(
        code, run(code, times), (blocks,), {"x_ptr": 128}, replace(sass_time.H100, **machine)
    )
    return found.seconds


def test_predictions_are_deterministic():
    assert seconds() == seconds()


def test_what_makes_a_kernel_slower():
    start = sass_time.H100.start
    assert seconds(400) - start == pytest.approx(2 * (seconds(200) - start), rel=0.1)
    assert seconds(blocks=132 * 64) > 1.5 * seconds(blocks=132 * 32)
    assert seconds(stride="0x7", blocks=132 * 32) > 5 * seconds(blocks=132 * 32)
    assert seconds(l1_latency=300.0) > 1.5 * seconds()


def test_one_more_block_than_there_is_room_for_takes_another_wave():
    room = 132 * 32
    assert seconds(blocks=room) == pytest.approx(seconds(blocks=room - 131), rel=0.05)
    assert seconds(blocks=room + 132) > seconds(blocks=room)


def test_the_limiter_is_what_most_of_the_time_is_needed_for():
    code = replace(loop("0x7"), registers=32)
    found = sass_time.predict(code, run(code, 200), (132 * 32,), {"x_ptr": 128})
    assert found.limiter == "shared" and found.resources["shared"] < found.seconds
    assert found.occupancy == 32 and found.blocks == 132 * 32


def test_calls_of_torch_take_the_longest_of_memory_arithmetic_and_sums():
    small = Call("add", 1000, 0, 100, "float32")
    assert Call("add", 10**9, 0, 100, "float32").seconds > 100 * small.seconds
    assert Call("sum", 1000, 0, 100, "float32").seconds > small.seconds
    product = Call("bmm", 10**6, 10**12, 10**6, "float32")
    assert product.seconds > 3 * replace(product, kind="tf32").seconds
    assert replace(product, elements=10**3).seconds > product.seconds


def test_launches_are_recorded_with_their_grid_and_memory():
    job = compiled.Job("segment_mean", "bfloat16", "sm_90", Size(n=4, t=160, segments=8))
    first, _ = compiled.recorded(job)
    memory = dict(first.arguments)
    assert first.grid == (8, 4)
    assert memory["x_ptr"] == Span(torch.bfloat16, 4 * 64 * 160) and memory["start_ptr"] == Span(
        torch.int64, 8
    )
    assert memory["T"] == 160


def row(us: float, launches: int = 1) -> predict.Row:
    return predict.Row(
        "op",
        "kernel",
        "tf32",
        launches,
        (1,),
        4,
        32,
        0,
        1,
        us,
        1.0,
        "latency",
        dict.fromkeys(sass_time.LIMITERS, 0.0),
        1.0,
    )


def test_a_kernel_that_is_ten_percent_slower_is_found():
    stored = {"op tf32 kernel": 100.0}
    assert predict.changes([row(109.0)], stored) == ([], [])
    worse, better = predict.changes([row(112.0)], stored)
    assert "1.12 of the stored 100.0 us" in worse[0] and better == []
    assert "112.0 us" in predict.changes([row(56.0, launches=2)], stored)[0][0]
    worse, better = predict.changes([row(50.0)], stored)
    assert worse == [] and "0.50" in better[0]
    assert "has no stored prediction" in predict.changes([row(1.0)], {})[0][0]


def test_the_fit_says_how_far_predictions_are_off():
    measured = {"kernels": {"tf32": {f"k{i}": [1, 10.0] for i in range(11)}}}
    rows = [predict.StepRow("tf32", f"k{i}", "kernel", 1, 5.0 + i) for i in range(11)]
    fit = predict.fit(rows, measured)
    assert fit.median == 1.0 and fit.spread[0] < 0.7 < 1.3 < fit.spread[1]
    assert str(fit).startswith("11 kernels: predicted / measured has the median 1.00")


def test_every_operator_has_stored_predictions():
    kept = {tuple(key.split()[:2]) for key in predict.stored()["microseconds"]}
    assert kept == {(name, precision) for name in OPERATORS for precision in predict.PRECISIONS}


SLOWER = """
from trgnet.kernels import segment
from bench import predict
stored = predict.stored()["microseconds"]
same = predict.operator_rows("segment_mean", "float32")
segment._MEAN_TILE |= {"BT": 32}
slower = predict.operator_rows("segment_mean", "float32")
import json
print(json.dumps([predict.changes(rows, stored)[0] for rows in (same, slower)]))
"""


@stored_release
def test_a_kernel_made_slower_on_purpose_is_found():
    same, slower = json.loads(output_of("-c", SLOWER))
    assert same == []
    assert any("segment_mean_backward" in line for line in slower)


@stored_release
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OPERATORS)
def test_no_kernel_became_slower(name: str):
    text = output_of("-m", "bench.predict", "--check", "--processes", "1", "--operator", name)
    assert text.startswith("PREDICTIONS for an H100, not measurements")


@pytest.mark.exhaustive
def test_the_step_has_every_kernel_that_the_network_launches(tmp_path):
    file = tmp_path / "step.json"
    text = output_of(
        "-m", "bench.predict", "--step", "--precision", "bfloat16", "--processes", "1", "--json", str(file)
    )
    assert "PREDICTIONS" in text and "CUDA graph" in text
    counts = {
        row["what"]: row["count"] for row in json.loads(file.read_text())["step"] if row["kind"] == "kernel"
    }
    assert counts["attention_conv"] == counts["attention_output"] == 20
    assert counts["dilated_conv_backward"] == 40 and counts["fusion_layer_backward"] == 9
