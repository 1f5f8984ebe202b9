"""The check that goes before every timing: all providers compute one function.

The published formulation and ours must be equal in float64 to rounding, values and gradients, without dropout, whose masks
they draw differently: that is what shows that the functions are one. In the timed precision a provider may be at most
twice as wrong as a plain formulation in the median over its results, and no result may be off by more than 1 % of its
largest element, or eight times the plain formulation's error where that is more. (Single errors are chance: an activation
near 0 changes its side, a long sum cancels.) Plain is the published formulation for our reference, and our reference, with
dropout, for what has the same masks: the compiler's code and the other backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import median

from torch import Tensor

ROUNDING = {"float32": 2.0**-23, "tf32": 2.0**-11, "bfloat16": 2.0**-8, "float16": 2.0**-11}

Results = tuple[Mapping[str, Tensor], Mapping[str, Tensor]]
"""Named values and named gradients."""
Evaluate = Callable[[str, str, bool], Results]
"""(provider, "float64" or the timed precision, whether dropout is on) -> results."""


def assert_agreement(evaluate: Evaluate, provider: str, precision: str) -> None:
    """Raise AssertionError that names the first result in which a provider disagrees with the reference."""
    if provider in ("published", "reference"):
        true = evaluate("reference", "float64", False)
        assert_equal(evaluate("published", "float64", False), true, "published, float64")
        got, plain = (evaluate(name, precision, False) for name in ("reference", "published"))
    else:
        true = evaluate("reference", "float64", True)
        got, plain = (evaluate(name, precision, True) for name in (provider, "reference"))
    assert_as_good(got, plain, true, ROUNDING[precision], f"{provider}, {precision}")


def assert_equal(got: Results, true: Results, who: str) -> None:
    """Raise AssertionError unless float64 results are equal to rounding."""
    for own, truths in zip(got, true, strict=True):
        assert own.keys() == truths.keys(), f"{who} has {sorted(own)}, expected {sorted(truths)}"
        scale = _largest(truths.values())
        for name, value in truths.items():
            _assert_within(1e-10 * _largest([value]) + 1e-12 * scale, own[name], value, f"{who}: {name}")


def assert_as_good(got: Results, plain: Results, true: Results, rounding: float, who: str) -> None:
    """Raise AssertionError unless results are about as close to the truth as those of a plain formulation."""
    for own, others, truths in zip(got, plain, true, strict=True):
        assert own.keys() == truths.keys(), f"{who} has {sorted(own)}, expected {sorted(truths)}"
        scale = _largest(truths.values())
        ratios = []
        for name, value in truths.items():
            largest = _largest([value])
            allowed = _distance(others[name], value), rounding * (16 * largest + scale)
            bound = max(8 * allowed[0] + allowed[1], 0.01 * largest)
            distance = _assert_within(bound, own[name], value, f"{who}: {name}")
            ratios.append(distance / sum(allowed) if distance else 0.0)  # of zeros nothing is allowed
        if ratios:
            assert median(ratios) <= 2, f"{who}: {median(ratios):.2g} times as wrong as plain PyTorch"


def _assert_within(bound: float, got: Tensor, true: Tensor, what: str) -> float:
    assert got.shape == true.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
    distance = _distance(got, true)
    assert distance <= bound, f"{what} is off by {distance:.3g}, expected at most {bound:.3g}"
    return distance


def _distance(a: Tensor, b: Tensor) -> float:
    return _largest([a.double() - b.double()])


def _largest(tensors: Iterable[Tensor]) -> float:
    return max((x.detach().abs().max().item() for x in tensors), default=0.0)
