"""Kernels are verified before ``auto`` uses them. Without a GPU, Triton's interpreter on the CPU stands for one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trgnet.kernels import BackendWarning, operator, self_check, use_backend, verification
from trgnet.kernels.examples import Size, example, forms
from trgnet.kernels.verification import Finding, Verdicts, checked_operators, subject_of
from trgnet.optimizers import builders

from trgnet import cli, trainer

pytest.importorskip("triton")

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FAULTY = Path(__file__).parent / "faulty_kernels.py"
PRECISIONS = verification.precisions_of(DEVICE)
CHECKED = ["pairwise_distance", "segment_mean"]
"""What is checked here: the others take long under the interpreter."""
ON_REFERENCE = ("reference", "analytic")
TINY = Size(n=2, c=2, v=3, f=8, t=9, hops=2, k=3, segments=4, d=8)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let ``auto`` take the kernels on the tested device; an empty cache, nothing known."""
    monkeypatch.setattr(sys.modules["trgnet.kernels.operator"], "_on_gpu", lambda args: True)
    monkeypatch.setattr(verification, "_runs_kernels", lambda like: True)
    monkeypatch.setattr(verification, "checked_operators", lambda: CHECKED)
    monkeypatch.setenv("TRGNET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRGNET_VERIFY", "1")
    forget()
    yield
    forget()


def forget() -> None:
    """As in a new process."""
    verification._trusted.clear()
    verification._told.clear()
    subject_of.cache_clear()


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, str]]]:
    """The jobs of every check that is done; nothing is started, and everything passes."""
    done: list[list[tuple[str, str]]] = []

    def check(jobs: list[tuple[str, str]], device: torch.device) -> list[Finding]:
        done.append(jobs)
        return [Finding(name, precision, "passed", 0.5) for name, precision in jobs]

    monkeypatch.setattr(verification, "check", check)
    return done


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that gives the kernels of the checking process a fault."""

    def use(fault: str, kernel: str = "pairwise_distance_backward") -> None:
        monkeypatch.setattr(verification, "CHECK", (sys.executable, str(FAULTY), fault, kernel))

    return use


def args_of(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    return tuple(
        a.detach().to(DEVICE, dtype).requires_grad_()
        if isinstance(a, Tensor) and a.requires_grad
        else a.to(DEVICE)
        if isinstance(a, Tensor)
        else a
        for a in example(name, TINY)
    )


def choice(name: str = "pairwise_distance", dtype: torch.dtype = torch.float32) -> str:
    return operator(name).choose(args_of(name, dtype), None)


def stored(*findings: Finding) -> None:
    Verdicts(subject_of(DEVICE)).add(findings)


@pytest.mark.parametrize("name", [name for name in checked_operators() if name != "attention_layer"])
def test_kernels_pass_at_a_tiny_size(name: str):
    assert 0 < max_error(name, "float32") <= 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", checked_operators())
@pytest.mark.parametrize("precision", PRECISIONS)
def test_kernels_pass_in_every_precision(name: str, precision: str):
    assert 0 < max_error(name, precision) <= 1


def max_error(name: str, precision: str) -> float:
    with self_check.float32_products(precision):
        return max(
            self_check.compare(operator(name), args, precision, DEVICE)
            for args in forms(name, example(name, TINY))
        )


def test_kernels_that_pass_are_used_and_not_checked_again(monkeypatch: pytest.MonkeyPatch):
    assert choice() == choice("segment_mean") == "triton"
    forget()
    monkeypatch.setattr(verification, "check", None)
    assert choice() == choice("segment_mean") == "triton"


def test_an_operator_that_fails_runs_on_the_reference(faulty, recwarn):
    faulty("wrong")
    (f,) = args_of("pairwise_distance")
    expected = operator("pairwise_distance")(f, backend="reference")
    for _ in range(2):
        assert torch.equal(operator("pairwise_distance")(f), expected)
    assert choice() in ON_REFERENCE and choice("segment_mean") == "triton"
    (warning,) = [str(w.message) for w in recwarn if w.category is BackendWarning]
    assert "gradient of f is off by" in warning and "pairwise_distance" in warning and "float32" in warning
    assert "trgnet verify" in warning and "TRGNET_BACKEND=triton" in warning
    forget()
    with pytest.warns(BackendWarning) as again:
        assert choice() in ON_REFERENCE
    assert str(again[0].message) == warning


@pytest.mark.parametrize(
    ("fault", "what", "detail"),
    [
        ("unsteady", "gradient of f differs from run to run", ""),
        ("error", "RuntimeError: CUDA error: an illegal memory access", "Traceback"),
        ("abort", "its process died of SIGABRT", "Fatal Python error: Aborted"),
        ("segfault", "its process died of SIGSEGV", "Fatal Python error: Segmentation fault"),
        ("exit", "its process ended with code 7", ""),
        ("hang", "it did not end within 20 s", ""),
    ],
)
def test_a_fault_is_a_finding_and_not_the_end(fault: str, what: str, detail: str, faulty):
    faulty(fault)
    jobs = [("pairwise_distance", "float32")]
    jobs += [("segment_mean", "float32")] if fault == "abort" else []  # in another process
    first, *others = verification.check(jobs, DEVICE, seconds=20 if fault == "hang" else None, processes=1)
    assert first.verdict == "failed" and first.operator == "pairwise_distance"
    assert what in first.what and detail in first.detail
    assert [other.verdict for other in others] == ["passed"] * (len(jobs) - 1)


@pytest.mark.parametrize(
    ("fault", "what"),
    [("import", "did not start: .*a library is missing"), ("out_of_memory", "no memory left")],
)
def test_what_could_not_be_checked_is_not_used_and_checked_later(fault: str, what: str, faulty):
    faulty(fault)
    with pytest.warns(BackendWarning, match=f"could not be checked on .*{what}.* TRGNET_VERIFY=0") as told:
        assert choice() in ON_REFERENCE
    assert len(told) == 1
    assert ("pairwise_distance", "float32") not in Verdicts(subject_of(DEVICE)).read()


def test_a_verdict_is_about_one_operator_in_one_precision():
    stored(
        Finding("pairwise_distance", "float32", "failed", what="wrong"),
        Finding("pairwise_distance", "float16", "passed"),
        Finding("segment_mean", "float32", "passed"),
    )
    with pytest.warns(BackendWarning, match="pairwise_distance.*float32"):
        assert choice() in ON_REFERENCE
    assert choice(dtype=torch.float16) == "triton" and choice("segment_mean") == "triton"


def test_every_precision_is_checked_when_it_is_needed(checks):
    for _ in range(2):
        assert choice() == choice("segment_mean") == "triton"
    assert checks == [[(name, "float32") for name in CHECKED]]
    assert choice(dtype=torch.float16) == "triton"
    torch.set_float32_matmul_precision("high")
    try:
        assert choice() == "triton"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert [jobs[0][1] for jobs in checks] == ["float32", "float16", "tf32"]


@pytest.mark.parametrize("what", ["triton", "gpu", "driver", "kernels"])
def test_another_version_or_gpu_is_checked_anew(what: str, checks, monkeypatch):
    assert choice() == "triton"
    other = replace(subject_of(DEVICE), **{what: "another"})
    forget()
    monkeypatch.setattr(verification, "subject_of", lambda device: other)
    assert choice() == "triton" and len(checks) == 2


def test_the_subject_names_what_the_verdict_depends_on(monkeypatch):
    subject = subject_of(DEVICE)
    assert subject.torch == torch.__version__ and subject.triton == verification.triton.__version__
    subject_of.cache_clear()
    monkeypatch.setattr(verification.triton, "__version__", "99.0")
    assert subject_of(DEVICE).key != subject.key


def test_without_verification(checks, monkeypatch):
    monkeypatch.setenv("TRGNET_VERIFY", "0")
    assert choice() == "triton" and not checks
    forget()
    monkeypatch.setenv("TRGNET_VERIFY", "no")
    with pytest.raises(ValueError, match="TRGNET_VERIFY: expected 0 or 1, got 'no'"):
        choice()


def test_a_forced_backend_is_not_checked(checks):
    stored(Finding("pairwise_distance", "float32", "failed", what="wrong"))
    with use_backend("triton"):
        assert choice() == "triton"
        verification.verify_once(DEVICE)
        assert verification.auto_verified("moment_update", args_of("pairwise_distance"))
    assert operator("pairwise_distance").choose(args_of("pairwise_distance"), "triton") == "triton"
    assert not checks


@pytest.mark.parametrize("content", ["", "{", "[]", '{"findings": 3}', '{"findings": [{"operator": 1}]}'])
def test_a_broken_cache_counts_as_none(content: str, checks):
    path = Verdicts(subject_of(DEVICE)).path
    path.parent.mkdir()
    path.write_text(content)
    with pytest.warns(BackendWarning, match="cannot read .*verdicts.*checked anew"):
        assert choice() == "triton"
    forget()
    assert choice() == "triton" and len(checks) == 1


def test_a_cache_that_cannot_be_written(checks, monkeypatch, tmp_path, recwarn):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRGNET_CACHE", str(tmp_path / "file"))
    assert choice() == choice("segment_mean") == choice(dtype=torch.float16) == "triton"
    (warning,) = [str(w.message) for w in recwarn if w.category is BackendWarning]
    assert "cannot be kept" in warning and "TRGNET_CACHE" in warning
    assert len(checks) == 2


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.delenv("TRGNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert verification.cache_folder() == Path("/somewhere/trgnet")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert verification.cache_folder() == Path.home() / ".cache" / "trgnet"


USE = """
import sys, torch, trgnet.kernels
from trgnet.kernels import operator, verification
sys.modules["trgnet.kernels.operator"]._on_gpu = lambda args: True
verification.checked_operators = lambda: ["segment_mean"]
x, ones = torch.ones(1, 8, 4, device=sys.argv[1]), torch.ones(1, dtype=torch.int64, device=sys.argv[1])
print(operator("segment_mean").choose((x, 0 * ones, 0 * ones, 4 * ones), None))
"""


def test_of_two_processes_one_checks():
    command = [sys.executable, "-c", USE, str(DEVICE)]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs, errors = zip(*(process.communicate(timeout=300) for process in both))
    assert outputs == ("triton\n", "triton\n"), errors
    assert "".join(errors).count("checking the Triton kernels") == 1


def test_waiting_for_another_process_has_a_limit(checks, monkeypatch):
    monkeypatch.setattr(verification, "WAIT_SECONDS", 0.2)
    verdicts = Verdicts(subject_of(DEVICE))
    with verdicts.locked(), pytest.warns(BackendWarning, match="another process holds .* for more than 0 s"):
        assert choice() in ON_REFERENCE
    assert not checks


def test_of_two_threads_one_checks(checks):
    threads = [threading.Thread(target=choice) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checks) == 1


def traced_choice() -> str:
    found = []

    def function(f: Tensor) -> Tensor:
        if operator("pairwise_distance").choose((f,), None) == "triton":
            return f + 1
        return f - 1

    (f,) = args_of("pairwise_distance")
    torch._dynamo.reset()
    found.append(torch.compile(function, fullgraph=True, backend="eager")(f.detach()))
    return "triton" if torch.equal(found[0], f + 1) else "reference"


def fake_choice() -> str:
    with FakeTensorMode() as fake:
        (f,) = args_of("pairwise_distance")
        return operator("pairwise_distance").choose((fake.from_tensor(f.detach().clone()),), None)


@pytest.mark.parametrize("trace", [traced_choice, fake_choice])
def test_tracing_uses_verdicts_and_makes_none(trace: Callable[[], str], checks):
    with pytest.warns(BackendWarning, match="have not been checked in float32 .*verify_once"):
        assert trace() == "reference"
    assert not checks
    verification.verify_once(DEVICE)
    assert trace() == "triton" and len(checks) == 1
    verification._trusted.clear()  # of the cache
    assert trace() == "triton" and len(checks) == 1


def test_verify_once_checks_what_is_asked_for(checks, recwarn):
    for _ in range(2):
        verification.verify_once(DEVICE, torch.float32, torch.bfloat16)
    assert checks == [[(name, p) for name in CHECKED] for p in ("float32", "bfloat16")]
    assert choice() == "triton" and len(checks) == 2


def test_a_training_verifies_before_it_builds_anything(tiny, silent, monkeypatch, tmp_path):
    asked = []

    def stop(device: torch.device, *dtypes: torch.dtype) -> None:
        asked.append((device.type, dtypes))
        raise InterruptedError

    monkeypatch.setattr(trainer, "verify_once", stop)
    with pytest.raises(InterruptedError):
        trainer.train(tiny("train.precision=bf16"), out=tmp_path / "run", console=silent)
    assert asked == [("cpu", (torch.float32, torch.bfloat16))]


@pytest.mark.parametrize("verdict", ["passed", "failed"])
def test_an_optimizer_is_fused_where_its_kernel_passed(verdict: str, monkeypatch):
    monkeypatch.setattr(builders, "_on_gpu", lambda params: True)
    stored(Finding("moment_update", "float32", verdict, what="wrong"))
    parameter = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendWarning)
        optimizer = builders.build_optimizer([parameter], name="lcam", lr=0.1)
    assert optimizer.defaults["fused"] == (verdict == "passed")


def verify(capsys: pytest.CaptureFixture[str], out: Path, *arguments: str) -> tuple[int, str]:
    code = cli.main(["verify", "--out", str(out), *arguments])
    return code, capsys.readouterr().out


def test_command_checks_again_and_reports_what_passes(capsys, tmp_path):
    stored(Finding("segment_mean", "float32", "failed", what="of old"))
    out = tmp_path / "report.json"
    code, printed = verify(capsys, out, "--operator", "segment_mean", "--precision", "float32")
    assert code == 0 and "passed" in printed and str(out) in printed
    report = json.loads(out.read_text())
    assert report["versions"]["torch"] == report["subject"]["torch"] == torch.__version__
    (finding,) = report["findings"]
    assert finding["verdict"] == "passed" and 0 < finding["error"] <= 1 and min(finding["milliseconds"]) > 0
    assert choice("segment_mean") == "triton"


def test_command_fails_where_an_operator_does(capsys, tmp_path, faulty):
    faulty("abort")
    code, printed = verify(capsys, tmp_path / "report.json", "--precision", "float32")
    assert code == 1 and "pairwise_distance, float32: its process died of SIGABRT" in printed
    findings = {f["operator"]: f for f in json.loads((tmp_path / "report.json").read_text())["findings"]}
    assert findings["segment_mean"]["verdict"] == "passed"
    assert "Fatal Python error: Aborted" in findings["pairwise_distance"]["detail"]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="tests machines without a GPU")
def test_command_without_a_gpu(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["trgnet.kernels.launch"], "interpreted", lambda: False)
    code, printed = verify(capsys, tmp_path / "report.json")
    assert code == 0 and "Nothing to verify" in printed and "TRITON_INTERPRET=1" in printed
    assert not (tmp_path / "report.json").exists()


def test_command_names_what_there_is(capsys, tmp_path):
    assert cli.main(["verify", "--operator", "segment_meen"]) == 2
    assert "did you mean 'segment_mean'?" in capsys.readouterr().err


def test_info_says_what_is_known(capsys, monkeypatch):
    assert cli.main(["info"]) == 0
    assert "TRGNET_VERIFY" in capsys.readouterr().out
    from trgnet.verify_command import summary

    assert summary(DEVICE) == "not verified yet (trgnet verify)"
    stored(
        Finding("segment_mean", "float32", "failed", what="wrong"),
        Finding("pairwise_distance", "float32", "passed"),
        Finding("segment_mean", "float16", "passed"),
    )
    assert summary(DEVICE) == "float32 1 passed, failed: segment_mean; float16 1 passed"
