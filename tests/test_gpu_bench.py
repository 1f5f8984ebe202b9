"""``python -m bench.gpu``: every phase on the CPU, and what is left of a run in which items crash, hang or are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from bench import step as step_module
from bench.device import ON_GPU
from bench.gpu import journal, measurements, plan, report
from bench.gpu.__main__ import main
from bench.gpu.processes import Item, Runner

ROOT = Path(__file__).parents[1]
MISSING = "pydantic", "rapidfuzz", "rich", "yaml", "safetensors", "matplotlib", "tensorboard", "pytest"
BLOCK = f"""
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {MISSING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


@pytest.fixture(autouse=True)
def faults_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))


def item(how: str, limit: float = 60.0, alone: bool = False, **others: object) -> Item:
    function, arguments = ("good", {}) if how == "good" else ("partly", {"how": how})
    return Item(
        "phase", f"{how}{len(others) or ''}", f"gpu_faults:{function}", arguments, limit, alone, **others
    )


def run(items: list[Item], path: Path, lanes: int = 1, seconds: float = 300.0) -> journal.Run:
    book = journal.Journal(path, {"device": "none"}, len(items))
    Runner(book.write, seconds).run(items, lanes)
    return book.close()


def last_values(generator) -> dict:
    found: dict = {}
    for values in generator:
        found |= values
    return found


# Phases, in this process


@pytest.mark.parametrize("name", ["fusion_layer", "class_loss", "moment_update"])
def test_values_of_the_kernels(name: str):
    found = last_values(measurements.values(name, "float32", [asdict(plan.TINY.checked[0])]))
    assert found["repeats"] and 0 < found["error"] < 1e-5 and found["at"].endswith("padded")
    assert found["checks"] == (2 if name == "fusion_layer" else 4)


def test_values_in_half_precision():
    found = last_values(measurements.values("moment_update", "float16", [asdict(plan.TINY.checked[0])]))
    assert found["repeats"] and 1e-5 < found["error"] < 1e-2


def test_statistics_are_values_too():
    """Those that the reference leaves to the norm are of its output, on valid frames."""
    for what, evaluate in measurements._evaluations("dynamic_graph_conv", [asdict(plan.TINY.checked[0])]):
        ours, true = (evaluate(*how)[0] for how in (("triton", "float32"), ("reference", "float64")))
        assert {"output 0", "statistic 0", "statistic 1"} == ours.keys() == true.keys()
        for name in ours:
            torch.testing.assert_close(ours[name].double(), true[name], rtol=1e-4, atol=1e-4, msg=what)


def test_wrong_values_are_found(monkeypatch: pytest.MonkeyPatch):
    right = measurements._results

    def results(name, case, valid, backend, precision):
        values, gradients = right(name, case, valid, backend, precision)
        wrong = 1.001 if backend == "triton" else 1.0
        return values, {what: gradient * wrong for what, gradient in gradients.items()}

    monkeypatch.setattr(measurements, "_results", results)
    with pytest.raises(AssertionError, match="times as wrong|is off by"):
        last_values(measurements.values("fusion_layer", "float32", [asdict(plan.TINY.checked[0])]))


def test_values_that_change_are_found():
    a, b = ({"output 0": torch.ones(3)}, {}), ({"output 0": torch.ones(3).nextafter(torch.zeros(3))}, {})
    measurements._assert_repeats(a, a, "sum")
    with pytest.raises(AssertionError, match="sum: output 0 differs"):
        measurements._assert_repeats(a, b, "sum")


@pytest.mark.skipif(ON_GPU, reason="a GPU computes in bfloat16")
def test_what_the_interpreter_cannot_compute_is_skipped():
    with pytest.raises(measurements.Skipped, match="interpreter"):
        last_values(measurements.values("fusion_layer", "bfloat16", []))


@pytest.mark.parametrize("name", ["pairwise_distance", "moment_update"])
def test_sanitized_calls(name: str):
    """They are those of the kernels, and no reference beside them."""
    backends = []
    with pytest.MonkeyPatch.context() as patch:
        for function in ("_results", "_moment_update"):
            patch.setattr(measurements, function, lambda *args: backends.append(args[-2:]))
        last_values(measurements.sanitize(name, "float32", asdict(plan.TINY.sanitized)))
    assert set(backends) == {("triton", "float32")}


def small(**others: object) -> dict:
    return {"size": asdict(replace(plan.TINY.timed, t=48, segments=4))} | others


def test_phases_of_the_training_step(monkeypatch: pytest.MonkeyPatch):
    found = last_values(measurements.step("ours", "float32", seconds=0.0, **small()))
    assert found["peak_bytes"] > 0 and found["launches"] > 100 and found["host_seconds"] > 0
    assert 0 < found["p20"] <= found["seconds"] <= found["p80"] and found["device_seconds"] > 0
    found = last_values(measurements.graph("float32", seconds=0.0, **small()))
    assert len(found["losses"]) == 3 and found["seconds"] > 0 and found["device_seconds"] > 0
    kernels = last_values(measurements.profile("float32", **small()))["kernels"]
    assert kernels == sorted(kernels, key=lambda row: -row[2]) and kernels[0][1] > 0
    if ON_GPU:
        assert last_values(measurements.sync("float32", **small())) == {"waits": False}
    else:
        with pytest.raises(measurements.Skipped):
            last_values(measurements.sync("float32", **small()))
    monkeypatch.setattr(step_module, "compiled", lambda network: network)
    assert last_values(measurements.warm("bfloat16", **small()))["seconds"] > 0


def test_a_loss_that_is_not_finite_is_found(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step_module.Network, "step", lambda network: {"total": torch.tensor(float("nan"))})
    with pytest.raises(AssertionError, match="losses of replayed steps"):
        last_values(measurements.graph("tf32", seconds=0.0, **small()))


def test_times_of_operators():
    arguments = {"name": "fusion_layer", "provider": "ours", "precision": "float32", "seconds": 0.0}
    found = last_values(measurements.operator_times(**arguments, **small()))
    forward, both = found["forward"], found["both"]
    assert both["floor_seconds"] > forward["floor_seconds"] > 0 and found["peak_bytes"] > 0
    assert {"seconds", "p20", "p80", "device_seconds"} <= forward.keys() & both.keys()


@pytest.mark.parametrize("family, name", plan.optimizer_names("lists"))
def test_times_of_optimizers(family: str, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(measurements.optimizers.SIZES, "few", lambda: [torch.Size([7])] * 3)
    found = last_values(measurements.optimizer_times(family, name, "few", seconds=0.0))
    assert found["tensors"] == 3 and found["host_seconds"] > 0 and found["device_seconds"] > 0


def test_tf32_is_off_where_float32_is_measured():
    for precision, allowed in (("tf32", True), ("float32", False)):
        measurements.use(precision)
        assert torch.backends.cudnn.allow_tf32 == allowed
        assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")


# Plan


def test_the_plan_has_every_operator_in_every_precision():
    parts = plan.plan(plan.FULL, on_gpu=True)
    names = {(i.phase, i.name) for part in parts for i in part.items}
    assert len(names) == sum(len(part.items) for part in parts)
    for precision in measurements.PRECISIONS:
        assert all(("values", f"{name}, {precision}") in names for name in plan.OPERATORS)
    assert {phase for phase, _ in names} == set(plan.PHASES)
    assert parts[1].lanes == 1 and all(i.alone for i in parts[0].items)
    on_cpu = [i for part in plan.plan(plan.TINY, on_gpu=False) for i in part.items]
    assert not [i for i in on_cpu if i.phase == "warm" or "compiled" in i.name]


def test_phases_and_names_are_chosen():
    parts = plan.plan(plan.TINY, on_gpu=True, phases=["values", "step"], match="tf32")
    names = [f"{i.phase}: {i.name}" for part in parts for i in part.items]
    assert "step: ours, tf32" in names and "values: fusion_layer, tf32" in names
    assert all("tf32" in name and name.partition(":")[0] in ("values", "step") for name in names)
    assert [part.share for part in parts] == [plan.SHARE_TOGETHER, 1.0]
    (checks, nothing) = plan.plan(plan.TINY, on_gpu=True, phases=["values"])
    assert checks.share == 1.0 and not nothing.items


def test_the_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(
        plan.Path,
        "glob",
        lambda self, pattern: [] if "local" in str(self) else Path.rglob(self, pattern.split("/")[-1]),
    )
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    assert plan.find_sanitizer() is None  # it is not executable
    program.chmod(0o755)
    assert plan.find_sanitizer() == str(program)


# Processes


def test_a_crash_or_a_hang_is_a_finding_and_the_others_go_on(tmp_path: Path):
    hows = "good", "crash", "good", "hang", "fail", "skip", "leave"
    items = [replace(item(how, limit=25.0), name=f"{i} {how}") for i, how in enumerate(hows)]
    items[3] = replace(items[3], limit=8.0)
    found = run(items, tmp_path / "run.json")
    assert [r.status for r in found.records] == [
        "done",
        "crashed",
        "done",
        "timed out",
        "failed",
        "skipped",
        "crashed",
    ]
    assert all(r.values["value"] == 1 for r in found.records)
    _, crash, _, hang, fail, skip, leave = (r.reason for r in found.records)
    assert crash.startswith("SIGABRT") and "Fatal Python error: Aborted" in crash
    assert "stopped after 8 s" in hang and "partly" in hang  # where it hung
    assert fail.startswith("AssertionError: off by 7 (gpu_faults.py:") and skip == "there is no GPU"
    assert leave.startswith("exit status 3")
    assert "Not done:\n- phase: 1 crash: crashed: SIGABRT" in report.undone(found)


def test_a_hang_in_c_is_killed(tmp_path: Path):
    began = time.monotonic()
    (record,) = run([item("hang in C", limit=8.0)], tmp_path / "run.json").records
    assert record.status == "timed out" and record.values == {"value": 1} and time.monotonic() - began < 40


def test_a_process_is_used_again_unless_an_item_is_alone(tmp_path: Path):
    items = [
        replace(item("good", alone=alone), name=str(i)) for i, alone in enumerate([False, False, True, False])
    ]
    one, two, three, four = (r.values["process"] for r in run(items, tmp_path / "run.json").records)
    assert one == two and len({one, three, four}) == 3


def test_items_share_the_memory(tmp_path: Path):
    """Two that need half of it run at one time, what needs more waits for both, and what needs too much runs alone."""
    needs = 5, 8, 5, 20, 0
    items = [replace(item("good"), name=str(i), memory=need) for i, need in enumerate(needs)]
    running, most, order = set(), 0, []

    def watch(line: dict) -> None:
        nonlocal most
        if "status" in line:
            running.remove(line["name"])
        elif "values" not in line:
            running.add(line["name"])
            order.append(line["name"])
            most = max(most, sum(needs[int(name)] for name in running if name != "3"))
            assert line["name"] != "3" or running <= {"3", "4"}

    Runner(watch, 300.0, memory=10).run(items, lanes=4)
    assert sorted(order) == ["0", "1", "2", "3", "4"] and order.index("1") > order.index("2") and most <= 10


def test_an_error_of_the_runner_itself_is_raised():
    def full(line: dict) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        Runner(full, 300.0).run([item("good"), item("good")], lanes=2)


def test_no_item_is_begun_without_time(tmp_path: Path):
    (record,) = run([item("good")], tmp_path / "run.json", seconds=3.0).records
    assert record.status == "not begun" and record.values == {}


def test_what_a_worker_runs_under_may_find_something(tmp_path: Path):
    program = tmp_path / "sanitizer"
    program.write_text('#!/bin/sh\n"$@"\necho "========= Invalid read"\nexit 66\n')
    program.chmod(0o755)
    (record,) = run([item("good", alone=True, command=(str(program),))], tmp_path / "run.json").records
    assert record.status == "failed" and record.reason.startswith("exit status 66")
    assert "Invalid read" in record.reason and record.values["value"] == 1


def test_not_a_number_is_stored_as_nothing(tmp_path: Path):
    (record,) = run([item("through")], tmp_path / "run.json").records
    assert record.status == "done" and record.values == {"value": 1, "later": None}


KILLED = """
import sys
from pathlib import Path
from bench.gpu import journal, processes
items = [processes.Item("phase", how, "gpu_faults:partly", {"how": how}, 60.0) for how in ("through", "hang")]
book = journal.Journal(Path(sys.argv[1]), {}, 3)
processes.Runner(book.write, 300.0).run(items)
"""


def test_a_killed_run_keeps_what_it_had(tmp_path: Path):
    lines = tmp_path / "run.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "run.json")])
    wait_until(lambda: lines.exists() and '"hang", "values"' in lines.read_text())
    process.kill()
    process.wait()
    found = journal.load(lines)
    assert [(r.name, r.status, r.values["value"]) for r in found.records] == [
        ("through", "done", 1),
        ("hang", "unfinished", 1),
    ]
    said = report.undone(found)
    assert "hang: unfinished" in said and "1 of 3 items were not reached" in said


def wait_until(happened, seconds: float = 60.0) -> None:
    ends = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.05)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path):
    lines = tmp_path / "run.jsonl"
    whole = {"phase": "step", "name": "ours, tf32", "values": {"seconds": 1.0}}
    lines.write_text(json.dumps({"facts": {}, "planned": 2}) + "\n" + json.dumps(whole) + '\n{"phase": "st')
    assert [r.values for r in journal.load(lines).records] == [{"seconds": 1.0}]
    lines.write_text("no journal")
    with pytest.raises(ValueError, match="is no run of python -m bench.gpu"):
        journal.load(lines)


# The command


def command(*arguments: object, before: str = "", **options: object) -> subprocess.Popen[str]:
    """`python -m bench.gpu` in a process of its own; `before` is done first there."""
    code = f"{before}\nimport sys\nfrom bench.gpu.__main__ import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def test_the_command_needs_nothing_but_torch_and_einops(tmp_path: Path):
    """The packages are missing in its workers too."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    out = tmp_path / "run.json"
    path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
    done = command(
        "--tiny", "--match", "segment_mean, float32", "--out", out, before=BLOCK,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said, _ = done.communicate()
    assert done.returncode == 0, said
    found = journal.load(out)
    assert (
        found.facts["tiny"] and found.facts["copy_bandwidth"] > 0 and not out.with_suffix(".jsonl").exists()
    )
    assert found.planned == len(found.records) == 1 + len(report.HEADINGS) - (not ON_GPU)
    assert all(record.status == "done" for record in found.records)
    assert "| segment_mean | float32 | 2 |" in said and "| ok |" in said and "its times say nothing" in said
    assert main(["--markdown", str(out)]) == 0
    assert command("--tiny", "--match", "nothing at all", "--out", out).wait() == 2  # it exists


def test_kernels_and_optimizers_need_no_pydantic():
    code = BLOCK + (
        "import trgnet.kernels, trgnet.optimizers\n"
        "from trgnet import TRGLoss, TRGNet\n"
        "import bench.gpu.measurements, bench.step\n"
        f"assert not {set(MISSING)} & {{name.partition('.')[0] for name in sys.modules}}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_terminated_command_stores_what_it_has(tmp_path: Path):
    out = tmp_path / "run.json"
    running = command("--tiny", "--phases", "values", "--match", "float32", "--out", out)
    lines = out.with_suffix(".jsonl")
    wait_until(lambda: lines.exists() and '"values"' in lines.read_text().partition("\n")[2], 120)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 1 and "items were not reached" in said and "stored as" in said
    assert journal.load(out).planned == 1 + len(plan.OPERATORS)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tiny", "--phases", "speed"], "got speed, expected some of values, sanitizer"),
        (["--show", "nowhere.json"], "nowhere.json"),
        pytest.param(
            [], "torch sees no GPU; python -m bench.gpu --tiny",
            marks=pytest.mark.skipif(ON_GPU, reason="there is a GPU"),
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(arguments: list[str], said: str, capsys):
    assert main(arguments) == 2 and said in capsys.readouterr().err


def test_a_missing_package_is_named_first(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("bench.gpu.__main__.util.find_spec", lambda name: None if name == "einops" else name)
    assert main([]) == 2
    assert capsys.readouterr().err == "error: einops not found; python -m pip install einops\n"


# The tables


def test_the_tables_say_what_was_measured():
    facts = {
        "device": "H100",
        "driver": "580",
        "torch": "2.11",
        "triton": "3.6",
        "python": "3.12",
        "commit": None,
    }
    record = journal.Record
    step = {"seconds": 0.02, "peak_bytes": 3e9, "launches": 980}
    way = {"forward": {"seconds": 1.0, "floor_seconds": 1e-4, "device_seconds": 1.5e-4}}
    run = journal.Run(
        facts | {"date": "2026-11-28", "copy_bandwidth": 2.9e12, "matrix_rate": {"float32": 5e13}},
        8,
        [
            record("values", "fusion_layer, tf32", {"error": 1e-3, "at": "T=63"}, "crashed", 2.0, "SIGABRT\nlog"),
            record("sync", "tf32", {"waits": False}, "done"),
            record("step", "ours, tf32", step, "done"),
            record("step", "reference, tf32", step | {"seconds": 0.4}, "done"),
            record("graph", "tf32", {"seconds": 0.011, "device_seconds": 0.0108}, "done"),
            record("operators", "fusion_layer, tf32, ours", way, "done"),
            record("optimizers", "trg-net, LCAM, fused", {"tensors": 436, "seconds": 1e-3, "device_seconds": 8.9e-6}, "done"),
        ],
    )  # fmt: skip
    text = report.everything(run)
    assert "H100, driver 580, torch 2.11, triton 3.6, Python 3.12, commit unknown, 2026-11-28" in text
    assert "| fusion_layer | tf32 | 1.0e-03 | crashed T=63 |" in text
    assert "| tf32 | 11 | 10.8 | 20 | 400 | 3000 | 3000 | 980 |" in text
    assert "| fusion_layer (values are wrong) | tf32 | forward | 150 | 100 | 1.50 |" in text
    assert "| trg-net, 436 tensors | LCAM, fused | 8.9 | 1000 |" in text
    assert "fusion_layer, tf32: crashed: SIGABRT\n    log" in text and "1 of 8 items were not reached" in text
    assert "crashed" not in report.document(run)
