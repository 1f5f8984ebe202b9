"""The benchmarks themselves: what is measured, what is checked before, and what a stored run says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from trgnet.kernels import Cost

from bench import report
from bench.__main__ import SECTIONS
from bench.agreement import assert_agreement
from bench.device import DEVICE, copy_bandwidth, matrix_rate, peak_memory
from bench.measure import rates
from bench.operators import OPERATORS, Call, Size, make_case
from bench.providers import PRECISIONS
from bench.test_scaling import _check_affordable, _last

ROOT = Path(__file__).parents[1]
SMALL = Size(n=2, t=48, segments=4)


def run_bench(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m bench` in a process of its own; `before` is done first there."""
    code = f"import sys; {before}\nfrom bench.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, str]:
    """A stored run of a few quick rows, and what was printed."""
    out = tmp_path_factory.mktemp("bench") / "run.json"
    chosen = "segment_mean or few"
    done = run_bench("operators", "metrics", "-k", chosen, "--providers", "published,ours", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_a_run_is_stored_with_what_its_rows_are_worth(stored):
    run = report.load(stored[0])
    names = {(row.info["section"], row.info["what"], row.info["provider"]) for row in run.rows}
    functions = [("metrics", "scores of a recording, few segments")]
    functions += [(f"operators, {way}", "segment_mean") for way in ("forward", "forward and backward")]
    assert names == {(*function, provider) for function in functions for provider in ("published", "ours")}
    for row in run.rows:
        assert {"device", "driver", "threads", "torch", "triton", "commit", "date"} <= row.info.keys()
        assert 0 < row.info["p20"] <= row.median <= row.info["p80"]
        if row.info["section"].startswith("operators"):
            assert row.info["GB/s"] == pytest.approx(row.info["bytes"] / row.median / 1e9)
            assert 0 < row.info["share_of_copy_bandwidth"] < 10
            assert row.info["peak_memory_bytes"] > 0
        took_turns = row.info["section"] != "metrics" and row.info["provider"] == "ours"
        assert (row.info.get("relative_time", 0.0) > 0) == took_turns


def test_relative_times_are_those_of_turns_with_the_baseline_where_there_are_such():
    baseline, other = (report.Row(who, 3.0, {"provider": who}) for who in ("published", "reference"))
    ours = report.Row("ours", 1.5, {"provider": "ours", "relative_time": 0.4})
    assert ours.relative_time(baseline) == 0.4 and ours.relative_time(other) == 0.5
    assert report.Row("ours", 1.5, {"provider": "ours"}).relative_time(baseline) == 0.5


def test_a_run_is_printed_and_drawn(stored):
    path, printed = stored
    for text in ("published", "ours", "segment_mean", "of copy", "multiplies matrices with"):
        assert text in printed
    drawn = path.with_name("run.roofline.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert not path.with_name("run.time.png").exists()  # nothing was scaled


def test_a_stored_run_is_shown_beside_another_and_never_overwritten(stored, tmp_path):
    path, _ = stored
    faster = json.loads(path.read_text())
    for row in faster["benchmarks"]:
        row["stats"]["median"] /= 100
        row["extra_info"]["p20"] /= 100
        row["extra_info"]["p80"] /= 100
    before = tmp_path / "before.json"
    before.write_text(json.dumps(faster))
    shown = run_bench("--show", path, "--against", before)
    assert shown.returncode == 0 and shown.stdout.count("100.00 slower") == len(faster["benchmarks"])
    again = run_bench("metrics", "--out", path)
    assert again.returncode == 2 and "exists" in again.stdout


def test_a_stored_run_makes_a_table_for_documents(stored):
    run = report.load(stored[0])
    first, _, *lines = report.markdown(run, ("published", "ours")).splitlines()
    assert first == "|  | published | ours |" and len(lines) == 3
    by = {row.info["provider"]: row for row in run.rows if row.info["section"] == "metrics"}
    line = next(line for line in lines if "few segments" in line)
    ratio = by["ours"].median / by["published"].median
    assert line.endswith(
        f"{1e3 * by['published'].median:.4g} (1) | {1e3 * by['ours'].median:.4g} ({ratio:.2g}) |"
    )


def test_times_of_different_devices_are_not_compared(stored, tmp_path):
    other = json.loads(stored[0].read_text())
    other["machine_info"]["device"] = "another"
    before = tmp_path / "before.json"
    before.write_text(json.dumps(other))
    shown = run_bench("--show", stored[0], "--against", before)
    assert "not compared" in shown.stdout and "slower" not in shown.stdout


def test_a_wrong_provider_is_not_timed(tmp_path):
    wrong = (
        "import bench.published as p; right = p.segment_mean; p.segment_mean = lambda *a: right(*a) * 1.001"
    )
    out = tmp_path / "run.json"
    done = run_bench("operators", "-k", "segment_mean and published", "--out", out, before=wrong)
    assert done.returncode == 2 and "nothing was timed" in done.stdout
    assert "is off by" in done.stdout and not out.exists()


def test_nothing_begins_after_the_limit(tmp_path):
    done = run_bench("metrics", "--limit", "0.0001", "--out", tmp_path / "run.json")
    assert done.returncode == 2 and "the limit of 0 seconds was reached" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing"], "got section nothing, expected some of"),
        (["--show", "README.md"], "Expecting value"),
        (["metrics", "--providers", "nobody"], "--providers: got ['nobody']"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    done = run_bench(*arguments, "--out", tmp_path / "run.json")
    assert done.returncode == 2 and message in done.stdout + done.stderr


def test_results_in_the_repository_can_be_shown():
    paths = sorted((ROOT / "bench" / "results").glob("*.json"))
    assert paths
    for path in paths:
        console = Console(width=150, record=True, file=open(os.devnull, "w"))
        report.print_report(report.load(path), console)
        assert "published" in console.export_text()


def test_every_file_of_benchmarks_is_a_section():
    assert sorted(SECTIONS) == sorted(
        p.stem.removeprefix("test_") for p in (ROOT / "bench").glob("test_*.py")
    )


def test_other_files_are_no_runs(tmp_path):
    path = tmp_path / "run.json"
    path.write_text('{"benchmarks": [], "machine_info": {}}')
    with pytest.raises(ValueError, match="is no run of these benchmarks"):
        report.load(path)


def test_peak_memory_is_that_of_the_tensors():
    def function() -> None:
        first = torch.ones(1_000_000, device=DEVICE)
        del first
        second = torch.ones(3_000_000, device=DEVICE)
        third = torch.ones(2_000_000, device=DEVICE)
        del second, third

    assert peak_memory(function) == pytest.approx(20_000_000, rel=0.01)


def test_rates():
    found = rates(Cost(bytes=10**9, flops=2 * 10**9), 0.5, "float32")
    assert (found["GB/s"], found["GFLOP/s"]) == (2, 4)
    assert found["share_of_copy_bandwidth"] == 2e9 / copy_bandwidth()
    assert found["share_of_matrix_rate"] == 4e9 / matrix_rate("float32")


def test_exponent_and_series():
    sizes = (500, 1000, 8000)
    assert report.exponent(sizes, [3e-6 * s**1.5 for s in sizes]) == pytest.approx(1.5)
    info = {"what": "step against T", "provider": "ours", "axis": "t"}
    rows = [
        report.Row(f"{s}", s / 100, info | {"shape": {"t": s}, "peak_memory_bytes": 7 * s**2}) for s in sizes
    ]
    (series,) = report.series_of(rows)
    assert series.sizes == sizes and series.seconds == (5, 10, 80)
    assert report.exponent(sizes, series.memory) == pytest.approx(2)


@pytest.mark.parametrize(
    "times, said",
    [
        ((2.0, 1.9, 2.1), "slower"),
        ((0.5, 0.4, 0.6), "faster"),
        ((1.05, 0.9, 1.2), "1.05"),
        ((1.2, 1.1, 1.3), "1.20"),
    ],
)
def test_changes_beyond_the_spread_are_marked(times, said):
    def row(median: float, p20: float, p80: float) -> report.Row:
        return report.Row("row", median, {"shape": {"t": 1}, "p20": p20, "p80": p80})

    changed = report.change(row(*times), row(1.0, 0.9, 1.1))
    assert said in changed and ("slower" in changed or "faster" in changed) == (said in ("slower", "faster"))
    assert report.change(row(*times), None) == "new"


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("precision", sorted({*PRECISIONS, "bfloat16"}))
def test_providers_agree(name: str, precision: str):
    case = make_case(name, SMALL)
    for provider in ("published", "recompute", "ours"):
        assert_agreement(lambda *how: call(name, case, *how).results(), provider, precision)


@pytest.mark.parametrize("fault", [1.02, 1 + 1e-8])
def test_disagreement_is_found(fault: float):
    """One is too large for any precision, the other only for float64."""
    case = make_case("fusion_layer", SMALL)

    def evaluate(provider: str, precision: str, dropout: bool):
        values, gradients = call("fusion_layer", case, provider, precision, dropout).results()
        if provider == "published":
            values = {name: value * fault for name, value in values.items()}
        return values, gradients

    with pytest.raises(AssertionError, match="published, float64: output 0 is off by"):
        assert_agreement(evaluate, "reference", "float32")


def test_more_than_twice_as_wrong_is_found():
    case = make_case("fusion_layer", SMALL)

    def evaluate(provider: str, precision: str, dropout: bool):
        results = call("fusion_layer", case, provider, precision, dropout).results()
        if provider != "ours":
            return results
        return tuple({name: value * (1 + 2e-5) for name, value in part.items()} for part in results)

    with pytest.raises(AssertionError, match="times as wrong as plain PyTorch|is off by"):
        assert_agreement(evaluate, "ours", "float32")


def call(name: str, case, provider: str, precision: str, dropout: bool) -> Call:
    return Call(name, case, provider, precision, dropout=dropout)


def test_a_series_ends_where_the_next_size_costs_too_much(monkeypatch):
    series = "inference", "ours", "t"
    monkeypatch.setitem(_last, series, (1000, 0.1, 10**6))
    _check_affordable(series, 2000)
    with pytest.raises(pytest.skip.Exception, match="would take about 100 s a call"):
        _check_affordable(series, 1_000_000)
    monkeypatch.setitem(_last, series, (1000, 0.001, 10**12))
    with pytest.raises(pytest.skip.Exception, match="2000.0 GB"):
        _check_affordable(series, 2000)
