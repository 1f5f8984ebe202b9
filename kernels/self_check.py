"""Check the Triton kernels of one operator against its reference, in a process that may die.

:mod:`.verification` starts this module as a program, gives it jobs and reads its findings.

The truth is the reference in float64. A result of the kernels may be at most twice as wrong as the reference in the
checked precision, plus what rounding explains (:func:`allowed_error`): in its largest error and in its root mean square.
Two repeats must give the same bits. Memory is filled with NaN before use, so that an element nobody wrote shows.

An activation within rounding of 0 may change its side, and its gradient with it, which is nobody's fault. A kernel
that is wrong is so for all numbers. So a failed comparison is repeated with other numbers, and fails if all of
``SEEDS`` do.
"""

from __future__ import annotations

import faulthandler
import inspect
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .examples import HALF_ARGUMENTS, Size, example, forms
from .operator import Operator, operator
from .verification import Finding

SEEDS = 3
SIZES = (Size(t=63, segments=9), Size(t=512, segments=32))
"""A length that does not divide by 16, and one that does: kernels are compiled for each."""
INTERPRETER_SIZES = (
    Size(c=3, v=5, f=16, t=17, hops=3, k=4, segments=5, d=24),
    Size(c=3, v=5, f=16, t=32, hops=3, k=4, segments=5, d=32),
)
HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {
    # Three products in tf32 keep 21 bits.
    "float32": 2.0**-21,
    # Matrix units drop the last bits of both operands, up to 2^-10 each, in up to four products one after the other.
    "tf32": 2.0**-8,
    "bfloat16": torch.finfo(torch.bfloat16).eps,
    "float16": torch.finfo(torch.float16).eps,
}
"""Relative error of a result that is computed in this precision."""

Results = dict[str, Tensor]


class Mismatch(Exception):
    """The kernels' results are not those of the reference, or change from run to run."""

    def __init__(self, message: str, error: float) -> None:
        super().__init__(message)
        self.error = error


def check(name: str, precision: str, device: torch.device) -> Finding:
    """Check one operator in one precision at all sizes and forms of arguments.

    Returns:
        a finding with the largest error, relative to what is allowed.
    """
    worst = 0.0
    sizes = SIZES if device.type == "cuda" else INTERPRETER_SIZES
    with float32_products(precision):
        for size in sizes:
            try:
                worst = max(worst, _worst_error(name, precision, size, device))
            except Mismatch as mismatch:
                where = f"{mismatch} (N={size.n}, V={size.v}, F={size.f}, T={size.t})"
                error = mismatch.error if math.isfinite(mismatch.error) else None
                return Finding(name, precision, "failed", error, where)
    return Finding(name, precision, "passed", worst)


def _worst_error(name: str, precision: str, size: Size, device: torch.device) -> float:
    """Compare all forms of an operator's arguments, with other numbers after a mismatch that chance may explain."""
    for left in reversed(range(SEEDS)):
        numbers = example(name, size, seed=left)
        try:
            return max(compare(operator(name), args, precision, device) for args in forms(name, numbers))
        except Mismatch as mismatch:
            if not left or math.isinf(mismatch.error):
                raise
    raise ValueError(f"SEEDS is {SEEDS}, expected at least 1")


def compare(op: Operator, args: Sequence[Any], precision: str, device: torch.device) -> float:
    """Compare values and gradients of kernels and reference for float64 arguments.

    Returns:
        the largest error relative to the allowed one.

    Raises:
        Mismatch: an error larger than allowed, a number that is not finite, or two runs that differ.
    """
    exact, rounded = _arguments(op, args, precision, device)
    truth = results(op, exact, "reference", "float64")
    plain = results(op, rounded, "reference", precision)
    with _poisoned_memory():
        first, *others = (results(op, rounded, "triton", precision) for _ in range(3))
    _check_finite(first)
    for other in others:
        for label, value in first.items():
            if not torch.equal(value, other[label]):
                raise Mismatch(f"{label} differs from run to run", math.inf)
    flops, worst = op.cost(*args).flops, 0.0
    largest = max((_largest(t) for label, t in truth.items() if label.startswith("gradient")), default=0.0)
    for label, true in truth.items():
        if not true.numel():
            continue
        terms = flops / 2 / true.numel()
        # A gradient that happens to cancel is as wrong as the terms that it sums up, of which others are not larger.
        uncancelled = min(terms**0.5, largest) if label.startswith("gradient") else 0.0
        worst = max(
            worst, _relative_error(label, first[label], plain[label], true, terms, uncancelled, precision)
        )
    return worst


def _relative_error(
    label: str, got: Tensor, plain: Tensor, true: Tensor, terms: float, uncancelled: float, precision: str
) -> float:
    if got.shape != true.shape:
        raise Mismatch(f"{label} has shape {tuple(got.shape)}, expected {tuple(true.shape)}", math.inf)
    floor = allowed_error(true, terms, uncancelled, precision)
    error, rough = (got.double() - true).abs(), (plain.double() - true).abs()
    pairs = {
        "is off by": (_largest(error), 2 * _largest(rough) + floor),
        # The largest of a few numbers is about four times their root mean square.
        "has a root mean square error of": (
            _rms(error),
            2 * _rms(rough) + floor / min(4.0, true.numel() ** 0.5),
        ),
    }
    for what, (found, allowed) in pairs.items():
        if not found <= allowed:  # allowed is NaN if the reference has no finite result
            raise Mismatch(f"{label} {what} {found:.2g}, at most {allowed:.2g} is allowed", found / allowed)
    return max(found / allowed if allowed else 0.0 for found, allowed in pairs.values())


def allowed_error(true: Tensor, terms: float, uncancelled: float, precision: str) -> float:
    """Return the error that rounding explains: of operands and result once, and of a float32 sum of ``terms`` products.

    ``uncancelled`` is the size that the result would have if its terms did not cancel.
    """
    scale = max(_largest(true), uncancelled)
    return (torch.finfo(torch.float32).eps * terms**0.5 + ROUNDING[precision]) * scale


def results(op: Operator, args: Sequence[Any], backend: str, precision: str) -> Results:
    """Return values and gradients by name; of an operator that works in place, its arguments after two steps."""
    if op.triton.backward is None:
        return _changed_in_place(op, args, backend)
    names = list(inspect.signature(op.reference).parameters)
    with _autocast(args, precision):
        outputs = op(*args, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    dtype = HALF.get(precision, torch.float32)
    projected = [o for o in outputs if o.requires_grad]
    # The same numbers in every precision that is compared.
    weights = [torch.randn(o.shape, generator=generator).bfloat16().to(o) for o in projected]
    wanted = {names[i]: a for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad}
    gradients = torch.autograd.grad(projected, list(wanted.values()), weights, materialize_grads=True)
    mask = next((a for a in args if isinstance(a, Tensor) and a.dtype == torch.bool), None)
    values = [o.detach() for o in outputs]
    if op.statistics and not values[-1].numel():  # the reference leaves them to whatever follows
        values[-op.statistics :] = feature_statistics(
            values[0].to(torch.promote_types(dtype, values[0].dtype)), mask
        )
    return {f"output {i}": value for i, value in enumerate(values)} | {
        f"gradient of {label}": _on_valid_frames(gradient, mask)
        for label, gradient in zip(wanted, gradients, strict=True)
    }


def _changed_in_place(op: Operator, args: Sequence[Any], backend: str) -> Results:
    args = tree_map_only(Tensor, Tensor.clone, list(args))
    for _ in range(2):
        op(*args, backend=backend)
    names = inspect.signature(op.reference).parameters
    return {
        f"{name} {i}": tensor
        for name, arg in zip(names, args)
        for i, tensor in enumerate(leaf for leaf in tree_leaves(arg) if isinstance(leaf, Tensor))
    }


def _arguments(
    op: Operator, args: Sequence[Any], precision: str, device: torch.device
) -> tuple[list[Any], list[Any]]:
    """The same numbers in float64, and in the dtypes that the precision has them in."""
    half = HALF.get(precision, torch.float32)
    stored = HALF_ARGUMENTS.get(op.name, ())
    rounded = {*stored, *op.triton.narrowed}

    def converted(argument: Any, number: torch.dtype, dtype: torch.dtype) -> Any:
        def leaf(a: Tensor) -> Tensor:
            # An optimizer keeps counts and its loss gate in float32, whatever the precision of the parameters.
            if not a.is_floating_point() or (op.triton.backward is None and not isinstance(argument, list)):
                return a.to(device)
            return a.detach().to(number).to(device, dtype).requires_grad_(a.requires_grad)

        return tree_map_only(Tensor, leaf, argument)

    number = [half if i in rounded else torch.float32 for i in range(len(args))]
    return (
        [converted(a, number[i], torch.float64) for i, a in enumerate(args)],
        [converted(a, number[i], half if i in stored else torch.float32) for i, a in enumerate(args)],
    )


def _autocast(args: Sequence[Any], precision: str) -> Any:
    device = next(a.device.type for a in args if isinstance(a, Tensor))
    return torch.autocast(device, HALF.get(precision), enabled=precision in HALF)


def feature_statistics(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Return mean and biased variance of each feature of x (N, F, V, T) over valid frames; without a mask over all."""
    rows = x.movedim(1, -1)
    rows = rows.flatten(0, 2) if mask is None else rows[mask.expand(rows.shape[:3])]
    return [rows.mean(0), rows.var(0, unbiased=False)]


def _on_valid_frames(gradient: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient, 0 on padded frames, where a kernel may return any finite number."""
    of_frames = mask is not None and gradient.dim() >= 3
    if not of_frames or (gradient.shape[0], gradient.shape[-1]) != (mask.shape[0], mask.shape[-1]):
        return gradient
    return gradient * mask.view(len(mask), *(1,) * (gradient.dim() - 2), -1)


def _check_finite(found: Results) -> None:
    for label, value in found.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise Mismatch(f"{label} has numbers that are not finite", math.inf)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


@contextmanager
def _poisoned_memory() -> Iterator[None]:
    """New tensors that nobody has written to hold NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Float32 products go through tf32 if that is the precision, those of cuDNN included."""
    cudnn, before = torch.backends.cudnn, torch.get_float32_matmul_precision()
    convolutions, cudnn.allow_tf32 = cudnn.allow_tf32, precision == "tf32"
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        cudnn.allow_tf32 = convolutions


def measure(name: str, precision: str, device: torch.device) -> tuple[float, float]:
    """Return the median milliseconds of forward and backward at the larger size: of the kernels, of the reference."""
    op = operator(name)
    size = (SIZES if device.type == "cuda" else INTERPRETER_SIZES)[-1]
    _, args = _arguments(op, example(name, size), precision, device)
    with float32_products(precision):
        kernels, reference = (
            _median_ms(_step(op, args, backend, precision), device) for backend in ("triton", "reference")
        )
    return kernels, reference


def _step(op: Operator, args: Sequence[Any], backend: str, precision: str) -> Callable[[], object]:
    """A function that runs forward and backward."""
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]

    def outputs() -> list[Tensor]:
        with _autocast(args, precision):
            found = op(*args, backend=backend)
        return [o for o in (found if isinstance(found, tuple) else (found,)) if o.requires_grad]

    if op.triton.backward is None:
        return lambda: op(*args, backend=backend)
    gradients = [torch.ones_like(o) for o in outputs()]
    return lambda: torch.autograd.grad(outputs(), wanted, gradients)


def _median_ms(function: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    function()
    times = []
    for _ in range(repeats if device.type == "cuda" else 1):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def run(job: dict[str, str], device: torch.device) -> dict[str, Any]:
    """Do one job, ``{"task": "check" or "time", "operator": NAME, "precision": PRECISION}``."""
    name, precision = job["operator"], job["precision"]
    try:
        if job["task"] == "time":
            return asdict(Finding(name, precision, "passed", milliseconds=measure(name, precision, device)))
        finding = check(name, precision, device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # an error that a kernel left behind is raised here
        return asdict(finding)
    except torch.OutOfMemoryError as error:  # says nothing about the kernels
        return asdict(
            Finding(name, precision, "unknown", what=_one_line(error), detail=traceback.format_exc())
        )
    except Exception as error:
        what = f"{type(error).__name__}: {_one_line(error)}"
        return asdict(Finding(name, precision, "failed", what=what, detail=traceback.format_exc()))


def _one_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Read jobs from standard input, a JSON object per line, and write the findings to a file descriptor.

    Arguments: the device and the descriptor.
    """
    faulthandler.enable()  # a crash leaves a traceback on standard error
    name, descriptor = sys.argv[1:] if arguments is None else arguments
    device = torch.device(name)
    os.set_inheritable(int(descriptor), False)  # it closes with this process, whatever that has started
    with os.fdopen(int(descriptor), "w") as replies:

        def reply(answer: dict[str, Any]) -> None:
            replies.write(json.dumps(answer) + "\n")
            replies.flush()

        torch.zeros((), device=device)
        reply({"ready": True})
        for line in sys.stdin:
            reply(run(json.loads(line), device))


if __name__ == "__main__":
    main()
