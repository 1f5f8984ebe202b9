"""Kernels of the losses per frame against float64: values, gradients, what padding holds, launches, no waiting.

On a machine without a GPU they run under Triton's interpreter, which conftest.py switches on.
"""

from __future__ import annotations

from functools import partial

import operators as formulas
import pytest
import torch
from allocations import PoisonedMemory
from operators import converted, gradients, lengths_mask
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trgnet.kernels import BackendError, boundary_loss, class_loss, frame_loss, frame_similarity, operator
from trgnet.kernels.frame_tiles import PROGRAMS, split
from trgnet.kernels.launch import Target, record_launches

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLASSES, FRAMES = (1, 2, 5, 17, 52), (1, 2, 15, 16, 65, 130)
NAMES = ("class_loss", "boundary_loss")


def class_arguments(n: int, k: int, t: int, *, weighted: bool = True, scale: float = 1.0) -> tuple:
    """Float64 arguments of class_loss; every third frame is of no class."""
    generator = torch.Generator().manual_seed(n + 10 * k + 1000 * t)
    mask = lengths_mask(n, t)
    logits = scale * torch.randn(n, k, t, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, k, (n, t), generator=generator)
    labels[:, 1::3] = 255
    similarity = torch.rand(n, t, generator=generator, dtype=torch.float64) * mask[:, 0]
    similarity[:, 0] = 0
    weights = torch.linspace(0.5, 1.5, k, dtype=torch.float64) if weighted else None
    return logits.requires_grad_(), labels.masked_fill(~mask[:, 0], 255), similarity, mask, weights


def boundary_arguments(n: int, t: int) -> tuple:
    """Float64 arguments of boundary_loss; the first logits are large, of both signs."""
    generator = torch.Generator().manual_seed(n + 1000 * t)
    logits = torch.randn(n, 1, t, generator=generator, dtype=torch.float64)
    logits[:, :, ::7] *= 40
    target = (torch.rand(n, t, generator=generator) < 0.3).double()
    return logits.requires_grad_(), target, lengths_mask(n, t), torch.tensor(7.0).double()


def arguments(name: str, n: int = 3, t: int = 21) -> tuple:
    return class_arguments(n, 5, t) if name == "class_loss" else boundary_arguments(n, t)


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def results(name: str, args: tuple, dtype: torch.dtype = torch.float32, backend: str = "triton") -> list:
    """Outputs, and gradients of a fixed random projection of them."""
    args = converted(args, dtype, DEVICE)
    outputs = as_tuple(operator(name)(*args, backend=backend))
    return [r.detach().cpu() for r in (*outputs, *gradients(outputs, args, allow_unused=False))]


def formula(name: str, args: tuple) -> list[Tensor]:
    """The same straight from the formula in float64."""
    full = args
    if name == "class_loss" and args[4] is None:
        full = (*args[:4], torch.ones(args[0].shape[1], dtype=torch.float64))
    outputs = as_tuple(getattr(formulas, name)(*full))
    return [*outputs, *gradients(outputs, args, allow_unused=False)]


def assert_close(got: list[Tensor], truth: list[Tensor], relative: float = 2e-6) -> None:
    for i, (ours, exact) in enumerate(zip(got, truth, strict=True)):
        error, scale = (ours.double() - exact).abs().max(), exact.abs().max()
        assert error <= relative * scale + 1e-7, f"result {i}: off by {error}, up to {scale}"


@pytest.mark.parametrize("t", FRAMES)
@pytest.mark.parametrize("k", CLASSES)
def test_class_loss_against_float64(k: int, t: int):
    for n, weighted in ((1, False), (3, True)):
        args = class_arguments(n, k, t, weighted=weighted)
        assert_close(results("class_loss", args), formula("class_loss", args))


@pytest.mark.parametrize("t", FRAMES)
def test_boundary_loss_against_float64(t: int):
    for n in (1, 3, 17):
        args = boundary_arguments(n, t)
        truth = results("boundary_loss", args, torch.float64, "reference")
        assert_close(results("boundary_loss", args), truth)
        moderate = (args[0].detach().clamp(-9, 9).requires_grad_(), *args[1:])  # log(sigmoid(-40)) is -inf
        assert_close(results("boundary_loss", moderate), formula("boundary_loss", moderate))


@pytest.mark.parametrize("k", [2, 17])
def test_truncation_and_large_logits(k: int):
    """Steps beyond the truncation have no gradient but that of the normalisers; the first frame dwarfs the others."""
    args = class_arguments(2, k, 40, scale=4)
    with torch.no_grad():
        args[0][:, 0, 0] = 300.0
        z = args[0][0]
        step = z[:, 1:].log_softmax(1) - z[:, :-1].log_softmax(1)
    share = (step.square() > 16).double().mean()
    assert 0.2 < share < 0.8
    assert_close(results("class_loss", args), formula("class_loss", args), 2e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_padding_may_hold_anything(name: str, backend: str):
    args = arguments(name)
    padded = ~args[-2 if name == "class_loss" else 2]
    filled = list(args)
    filled[0] = args[0].detach().masked_fill(padded, torch.nan).requires_grad_()
    if name == "boundary_loss":
        filled[1] = args[1].masked_fill(padded[:, 0], torch.nan)
    got, expected = (results(name, tuple(a), backend=backend) for a in (filled, args))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert not got[-1][padded.expand_as(got[-1])].any() and got[-1].any()


@pytest.mark.parametrize("name", NAMES)
def test_half_precision(name: str):
    """Computed in float32: only the logits and their gradient are rounded."""
    args = arguments(name)
    args = (args[0].detach().half().double().requires_grad_(), *args[1:])
    moved = converted(args, torch.float32, DEVICE)
    moved = (moved[0].detach().half().requires_grad_(), *moved[1:])
    outputs = as_tuple(operator(name)(*moved, backend="triton"))
    (gradient,) = gradients(outputs, moved, allow_unused=False)
    assert gradient.dtype == torch.float16 and all(o.dtype == torch.float32 for o in outputs)
    truth = results(name, args, torch.float64, "reference")
    assert_close([o.cpu() for o in outputs], truth[:-1])
    assert_close([gradient.cpu()], truth[-1:], 1e-3)


def assert_as_the_reference(name: str, args: tuple, relative: float) -> None:
    assert_close(results(name, args), results(name, args, torch.float64, "reference"), relative)


def test_long_sequences():
    assert_as_the_reference("class_loss", class_arguments(1, 2, 20_000), 1e-5)
    assert_as_the_reference("boundary_loss", boundary_arguments(1, 20_000), 1e-5)


@pytest.mark.parametrize("programs", [PROGRAMS, 6])
def test_parts_of_sequences(programs: int, monkeypatch: pytest.MonkeyPatch):
    """More parts than are read at once; or few, which have several tiles, the last one fewer."""
    monkeypatch.setattr(frame_loss, "split", partial(split, programs=programs))
    assert frame_loss.split(torch.empty(2, 1, 22 * 32), 32) == ((22, 1) if programs > 6 else (3, 8))
    assert_as_the_reference("class_loss", class_arguments(2, 52, 700), 5e-6)
    assert_as_the_reference("boundary_loss", boundary_arguments(2, 7_001), 5e-6)


def test_sequences_without_a_pair_or_a_label():
    """One real frame, or none; no frame of any class."""
    logits, labels, similarity, _, weights = class_arguments(3, 5, 20)
    for lengths in ([20, 1, 0], [1, 1, 1], [0, 0, 0]):
        mask = torch.arange(20) < torch.tensor(lengths).view(3, 1, 1)
        for marks in (labels, torch.full_like(labels, 255)):
            args = (logits, marks, similarity * mask[:, 0], mask, weights)
            got = results("class_loss", args)
            assert all(r.isfinite().all() for r in got)
            assert_close(got, results("class_loss", args, torch.float64, "reference"))
        args = (logits[:, :1].detach().requires_grad_(), similarity, mask, torch.tensor(3.0).double())
        assert_close(
            results("boundary_loss", args), results("boundary_loss", args, torch.float64, "reference")
        )


@pytest.mark.parametrize("n, t", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_empty_batches(name: str, n: int, t: int):
    full = arguments(name, 2, 5)
    args = tuple(
        a.detach()[:n, ..., :t].requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.dim() > 1
        else a
        for a in full
    )
    for ours, plain in zip(results(name, args), results(name, args, backend="reference"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


def test_labels_out_of_range_read_nothing_and_show():
    """Labels are not checked on the host, which would wait for the device: the loss is NaN, the smoothness as it was."""
    logits, labels, similarity, mask, weights = class_arguments(2, 5, 20)
    good, steps, *_ = results("class_loss", (logits, labels, similarity, mask, weights))
    for label in (-1, 5, 256, 2**40):
        wrong = labels.clone()
        wrong[0, 3] = label
        loss, smoothness, _ = results("class_loss", (logits, wrong, similarity, mask, weights))
        assert loss.isnan() and good.isfinite() and smoothness == steps
        wrong[0, 3] = 0
        wrong[1, -1] = label  # a padded frame
        assert results("class_loss", (logits, wrong, similarity, mask, weights))[0].isfinite()


def test_nan_in_a_real_frame_shows():
    for name in NAMES:
        args = arguments(name)
        with torch.no_grad():
            args[0][0, 0, 5] = torch.nan
        assert all(r.isnan().any() for r in results(name, args))


@pytest.mark.parametrize("name", NAMES)
def test_repeats_are_bitwise_equal_in_poisoned_memory(name: str):
    """A value that no program wrote would be NaN; a sum in changing order would differ."""
    args = converted(arguments(name, 3, 400), torch.float32, DEVICE)

    def run() -> list[Tensor]:
        with PoisonedMemory():
            outputs, derivatives = operator(name).triton_passes(args, torch.ones_like)
        return [*outputs[: 2 if name == "class_loss" else 1], *derivatives]

    first = run()
    assert all(r.isfinite().all() for r in first)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str):
    torch.library.opcheck(operator(name).triton_op, converted(arguments(name), torch.float32, DEVICE))


@pytest.mark.parametrize("name", NAMES)
def test_launches(name: str):
    """How many there are, and that neither a new length nor a new batch size compiles anything."""
    compilations = set()
    for n, t in ((1, 16), (3, 128), (8, 6_000), (300, 32), (1, 20_000)):
        args = [
            a.to("meta") if isinstance(a, Tensor) else a
            for a in converted(arguments(name, n, t), torch.float32)
        ]
        with record_launches(Target("cuda", 90)) as recorded:
            operator(name).triton_passes(args, torch.empty_like)
        names = [launch.kernel.__name__ for launch in recorded]
        kinds = ("sums", "steps", "totals") if name == "class_loss" else ("sums", "mean")
        assert names == [f"_{name}_{kind}_kernel" for kind in (*kinds, "backward")]
        compilations.update(launch.compilation for launch in recorded)
    assert len(compilations) == len(names)


class OneDevice(TorchDispatchMode):
    """Refuses every tensor that is on another device: something would be copied to or from it."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.operations = device, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not isinstance(leaf, Tensor) or leaf.device.type == self.device, func
        self.operations += 1
        return result


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_nothing_waits_for_the_device(backend: str):
    """On the meta device no value can be read, and no tensor of the host takes part."""
    x, mask = torch.zeros(2, 3, 5, 16, device="meta"), torch.zeros(2, 1, 16, device="meta", dtype=torch.bool)
    cases = {
        name: [
            a.to("meta") if isinstance(a, Tensor) else a for a in converted(arguments(name), torch.float32)
        ]
        for name in NAMES
    }
    with OneDevice("meta") as mode, record_launches(Target("cuda", 90)):
        frame_similarity(x, mask)
        for name, args in cases.items():
            if backend == "triton":
                operator(name).triton_passes(args, torch.empty_like)
            else:
                outputs = as_tuple(operator(name).reference(*args))
                torch.autograd.grad(outputs, args[0].requires_grad_(), list(map(torch.empty_like, outputs)))
    assert mode.operations > 10


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_nothing_waits_for_a_gpu():
    x, mask = torch.randn(3, 3, 5, 21, device=DEVICE), lengths_mask(3, 21).to(DEVICE)
    moved = {name: converted(arguments(name), torch.float32, DEVICE) for name in NAMES}
    torch.cuda.set_sync_debug_mode("error")
    try:
        frame_similarity(x, mask)
        for name, args in moved.items():
            for backend in ("reference", "triton"):
                outputs = as_tuple(operator(name)(*args, backend=backend))
                torch.autograd.grad(sum(outputs), args[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_the_kernels_cannot_take_is_said():
    logits, labels, similarity, mask, weights = class_arguments(1, 257, 2)
    single = converted((logits, labels, similarity, mask, weights), torch.float32, DEVICE)
    with pytest.raises(BackendError, match="257 classes; the kernels take 1 to 256"):
        class_loss(*single, backend="triton")
    args = converted(arguments("class_loss"), torch.float32, DEVICE)
    with pytest.raises(BackendError, match="other than the logits requires a gradient"):
        class_loss(*args[:4], args[4].requires_grad_(), backend="triton")
    args = converted(arguments("boundary_loss"), torch.float32, DEVICE)
    with pytest.raises(BackendError, match="other than the logits requires a gradient"):
        boundary_loss(*args[:3], args[3].requires_grad_(), backend="triton")
    far = [torch.empty(1, 32, 2**26, device="meta")]
    far += [torch.empty(1, 2**26, device="meta", dtype=d) for d in (torch.int64, torch.float32)]
    far += [torch.empty(1, 1, 2**26, device="meta", dtype=torch.bool), None]
    with pytest.raises(BackendError, match="32 classes and 67108864 frames exceed 32-bit offsets"):
        operator("class_loss").choose(far, "triton")
