"""What the items do: generators that yield results as they come, so that a crash loses the last one only.

A result that is wrong is an AssertionError, as in :mod:`bench.agreement`.
"""

from __future__ import annotations

import inspect
import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from trgnet.kernels import operator
from trgnet.kernels.examples import HALF_ARGUMENTS, Size, example, forms
from trgnet.kernels.launch import interpreted
from trgnet.kernels.self_check import feature_statistics

from trgnet.step_graphs import CudaCapture

from .. import device, optimizers
from ..agreement import ROUNDING, Results, assert_as_good
from ..device import DEVICE, ON_GPU, kernels
from ..operators import Call, Case, cost_of, make_case
from ..providers import AUTOCAST, allow_tf32, precision_of
from ..step import Network
from .processes import Skipped

Values = Iterator[dict[str, Any]]
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
ROUNDS_ON_DEVICE = 5
TOP_KERNELS = 40


def use(precision: str) -> None:
    """Set what float32 products may do; half precision trains with tf32 beside it."""
    allow_tf32(precision != "float32")


def facts() -> Values:
    """The machine, the software, the commit, and what the device can do at most."""
    known = device.facts() | device.run_facts()
    known |= {"python": platform.python_version(), "cores": os.cpu_count(), "cuda": torch.version.cuda}
    known["memory_bytes"] = (
        torch.cuda.get_device_properties(DEVICE).total_memory if ON_GPU else device.free_memory()
    )
    yield known
    yield {"copy_bandwidth": device.copy_bandwidth()}
    rates = {}
    for precision in PRECISIONS if ON_GPU else PRECISIONS[:1]:
        use(precision)
        rates[precision] = device.matrix_rate(precision)
    yield {"matrix_rate": rates}


# Values


def values(name: str, precision: str, sizes: list[dict[str, int]]) -> Values:
    """Errors of an operator's kernels and of plain PyTorch, as shares of the largest value, at every size and form."""
    _need_kernels(precision)
    use(precision)
    worst = {"error": 0.0, "plain_error": 0.0, "checks": 0}
    for what, evaluate in _evaluations(name, sizes):
        yield {"at": what}
        got, plain, true = (
            evaluate(*how)
            for how in (("triton", precision), ("reference", precision), ("reference", "float64"))
        )
        worst["error"] = max(worst["error"], _error(got, true))
        worst["plain_error"] = max(worst["plain_error"], _error(plain, true))
        worst["checks"] += 1
        yield dict(worst)
        assert_as_good(got, plain, true, ROUNDING[precision], what)
        _assert_repeats(got, evaluate("triton", precision), what)
    yield {"repeats": True}


def sanitize(name: str, precision: str, size: dict[str, int]) -> Values:
    """Run the kernels of an operator once, under compute-sanitizer."""
    _need_kernels(precision)
    use(precision)
    for what, evaluate in _evaluations(name, [size]):
        yield {"at": what}
        evaluate("triton", precision)
    device.synchronize()


def no_sanitizer() -> Values:
    """Say that there is none."""
    raise Skipped("compute-sanitizer is not found; it comes with the CUDA toolkit")


def _need_kernels(precision: str) -> None:
    if not ON_GPU and not interpreted():
        raise Skipped("kernels run on a GPU, or on a CPU with TRITON_INTERPRET=1")
    if not ON_GPU and precision in ("tf32", "bfloat16"):
        raise Skipped("Triton's interpreter does not compute in it")


def _evaluations(
    name: str, sizes: list[dict[str, int]]
) -> Iterator[tuple[str, Callable[[str, str], Results]]]:
    """For each size and form, whole and with padding: what it is, and a function of backend and precision."""
    for size in map(lambda size: Size(**size), sizes):
        for padded in (False, True) if size.n > 1 else (False,):
            args = example(name, size, dtype=torch.float32, padded=padded, dilation=16, heads=4)
            valid = next((a.to(DEVICE) for a in args if padded and _is_mask(a)), None)
            for i, form in enumerate(forms(name, args)):
                what = f"N={size.n} V={size.v} F={size.f} T={size.t}, form {i}{', padded' if padded else ''}"
                if name == "moment_update":
                    yield what, partial(_moment_update, form)
                else:
                    yield what, partial(_results, name, Case(form, None), valid)


def _is_mask(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.dtype is torch.bool


def _has_frames(a: Tensor, valid: Tensor) -> bool:
    return a.dim() > 1 and (a.shape[0], a.shape[-1]) == (valid.shape[0], valid.shape[-1])


def _of_shape(valid: Tensor, a: Tensor) -> Tensor:
    n, _, t = valid.shape
    return valid.view(n, *[1] * (a.dim() - 2), t)


def _results(name: str, case: Case, valid: Tensor | None, backend: str, precision: str) -> Results:
    """Values, statistics and gradients; zeros on padded frames, where they may be anything."""
    call = Call(name, case, backend, precision, dropout=True)
    outputs, gradients = call.results()
    both = outputs | _statistics(call, valid), gradients
    if valid is None:
        return both
    return tuple(
        {k: torch.where(_of_shape(valid, v), v, 0) if _has_frames(v, valid) else v for k, v in part.items()}
        for part in both
    )


def _statistics(call: Call, valid: Tensor | None) -> dict[str, Tensor]:
    """Outputs without a gradient; where a backend leaves them to who needs them, those of its first output."""
    count = operator(call.name).statistics
    if not count:
        return {}
    with torch.no_grad(), precision_of(call.precision):
        first, *others = call.function(*call.args)
    found = others[-count:]
    if not found[-1].numel():
        found = feature_statistics(first.double(), valid)
    return {f"statistic {i}": statistic for i, statistic in enumerate(found)}


def _error(got: Results, true: Results) -> float:
    """The largest distance from the truth, as a share of the largest true value of the same result."""
    distances = [
        (a[name].double() - b[name]).detach().abs().max() / b[name].detach().abs().max().clamp(min=1e-30)
        for a, b in zip(got, true)
        for name in b
    ]
    return max(float(d) for d in distances)


def _assert_repeats(first: Results, second: Results, what: str) -> None:
    for a, b in zip(first, second):
        for name in a:
            assert torch.equal(a[name], b[name]), f"{what}: {name} differs when it is repeated"


def _moment_update(form: tuple[Any, ...], backend: str, precision: str) -> Results:
    """Parameters, moments and counts after a step."""
    dtype = AUTOCAST.get(precision, torch.float64 if precision == "float64" else torch.float32)
    names = inspect.signature(operator("moment_update").reference).parameters
    args = {}
    for i, (name, argument) in enumerate(zip(names, form, strict=True)):
        kind = dtype if i in HALF_ARGUMENTS["moment_update"] else None
        args[name] = tree_map_only(Tensor, lambda a, kind=kind: a.to(DEVICE, kind, copy=True), argument)
    operator("moment_update")(*args.values(), backend=backend)
    changed = {f"{what} {i}": a for what in ("params", "first", "second") for i, a in enumerate(args[what])}
    return changed | {"counts": args["counts"]}, {}


# Times


def times(function: Callable[[], object], seconds: float, least: int = 4, most: int = 20) -> dict[str, Any]:
    """Median and 20th and 80th percentile of the time of a call, waited for, with empty caches."""
    found: list[float] = []
    ends = time.perf_counter() + seconds
    while len(found) < least or (time.perf_counter() < ends and len(found) < most):
        device.evict_caches()
        began = time.perf_counter()
        function()
        device.synchronize()
        found.append(time.perf_counter() - began)
    p20, *_, p80 = quantiles(found, n=5, method="inclusive")
    return {"seconds": median(found), "p20": p20, "p80": p80, "rounds": len(found)}


def device_seconds(function: Callable[[], object]) -> float:
    """The time of a call's kernels, with empty caches."""

    def with_eviction() -> None:
        device.evict_caches()
        function()

    rows = kernels(with_eviction, ROUNDS_ON_DEVICE)
    return _seconds([row for row in rows if device.EVICTION not in row[0]])


def _seconds(rows: list[tuple[str, int, float]]) -> float:
    return sum(seconds for _, _, seconds in rows)


def _calls(rows: list[tuple[str, int, float]]) -> float:
    return sum(calls for _, calls, _ in rows)


def network(provider: str, precision: str, size: dict[str, int]) -> Network:
    """A network after its first step, which compiles and makes the optimizer's state."""
    use(precision)
    return _network(provider, precision, Size(**size))


@lru_cache(maxsize=1)
def _network(provider: str, precision: str, size: Size) -> Network:
    made = Network(provider, size, precision, capturable=ON_GPU and provider == "ours")
    made.step()
    device.synchronize()
    return made


def warm(precision: str, size: dict[str, int]) -> Values:
    """Compile the network with torch.compile."""
    began = time.perf_counter()
    network("compiled", precision, size)
    yield {"seconds": time.perf_counter() - began}


def step(provider: str, precision: str, size: dict[str, int], seconds: float) -> Values:
    """Time, peak memory and kernels of a training step."""
    net = network(provider, precision, size)
    yield {"peak_bytes": device.peak_memory(net.step)}
    yield times(net.step, seconds, least=3)
    rows = kernels(net.step)
    yield {"device_seconds": _seconds(rows), "launches": _calls(rows)}
    if provider == "ours":
        yield {"host_seconds": device.host_time(net.step, rounds=5)}


def profile(precision: str, size: dict[str, int]) -> Values:
    """The kernels of our training step."""
    yield {"kernels": kernels(network("ours", precision, size).step)[:TOP_KERNELS]}


def sync(precision: str, size: dict[str, int]) -> Values:
    """Do a training step in which waiting for the GPU is an error."""
    net = network("ours", precision, size)
    if not ON_GPU:
        net.step()
        raise Skipped("torch finds what waits for a GPU only")
    torch.cuda.set_sync_debug_mode("error")
    try:
        net.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    yield {"waits": False}


def graph(precision: str, size: dict[str, int], seconds: float) -> Values:
    """Record the training step and replay it; on a CPU it is called again instead."""
    net = network("ours", precision, size)
    capture = CudaCapture(DEVICE) if ON_GPU else lambda function: function
    replay = capture(net.step)
    losses = [float(replay()["total"]) for _ in range(3)]
    assert all(map(_is_finite, losses)), f"losses of replayed steps are {losses}"
    yield {"losses": losses}
    yield times(replay, seconds)
    yield {"device_seconds": _seconds(kernels(replay))}


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


@lru_cache
def _case(name: str, size: Size) -> Case:
    return make_case(name, size)


def operator_times(name: str, provider: str, precision: str, size: dict[str, int], seconds: float) -> Values:
    """Times of a forward pass, and of forward and backward, and the least that the memory allows."""
    use(precision)
    call = Call(name, _case(name, Size(**size)), provider, precision, dropout=True)
    for direction, function in (("forward", call.outputs), ("both", call)):
        cost = cost_of(name, call.args, backward=direction == "both")
        found = {"floor_seconds": cost.bytes / device.copy_bandwidth()} | times(function, seconds)
        yield {direction: found}
        yield {direction: found | {"device_seconds": device_seconds(function)}}
    yield {"peak_bytes": device.peak_memory(call)}


def optimizer_times(family: str, name: str, parameters: str, seconds: float) -> Values:
    """Times of an optimizer's step, once three steps were found to be those of torch's."""
    optimizers.agree(family, name)
    shapes = optimizers.SIZES[parameters]()
    _, do = optimizers.steps_of(optimizers.FAMILIES[family][name], shapes)
    do()
    floor = optimizers.least_work(family, shapes).bytes / device.copy_bandwidth()
    yield {"tensors": len(shapes), "floor_seconds": floor} | times(do, seconds)
    yield {"host_seconds": device.host_time(do)}
    yield {"device_seconds": device_seconds(do), "launches": _calls(kernels(do))}
