"""The check that goes before every timing: all providers compute one function.

In float64 every result must equal the truth to rounding: that is what shows that the functions are one. In
float32, the timed precision, a provider may be at most twice as wrong as the plain formulation in the median
over its results, and no result may be off by more than 1 % of its largest element, or eight times the plain
formulation's error where that is more. (Single errors are chance: an activation near 0 changes its side, a long sum
cancels.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from statistics import median

import torch
from torch import Tensor

ROUNDING = torch.finfo(torch.float32).eps

Results = Mapping[str, Tensor]
Evaluate = Callable[[str, torch.dtype], tuple[Results, Results]]
"""(provider, dtype) -> (named values, named gradients)."""


def assert_agreement(
    providers: Iterable[str], evaluate: Evaluate, truth: str = "reference", plain: str = "published"
) -> None:
    """Raise AssertionError that names the first result in which a provider disagrees with the truth.

    ``truth`` is the provider whose float64 results count, ``plain`` the one whose float32 errors are allowed.
    """
    true_results, plain_results = evaluate(truth, torch.float64), evaluate(plain, torch.float32)
    for provider in providers:
        exact, rounded = evaluate(provider, torch.float64), evaluate(provider, torch.float32)
        for kind, true_values in enumerate(true_results):  # values, then gradients
            assert exact[kind].keys() == rounded[kind].keys() == true_values.keys()
            scale = _largest(true_values.values())
            ratios = []
            for name, true in true_values.items():
                own = _largest([true])
                bound = 1e-10 * own + 1e-12 * scale
                _assert_within(bound, exact[kind][name], true, f"{provider}, float64: {name}")
                plain_error, rounding = (
                    _distance(plain_results[kind][name], true),
                    ROUNDING * (16 * own + scale),
                )
                bound = max(8 * plain_error + rounding, 0.01 * own)
                error = _assert_within(bound, rounded[kind][name], true, f"{provider}, float32: {name}")
                ratios.append(error / (plain_error + rounding))
            assert median(ratios) <= 2, f"{provider}, float32: {median(ratios):.2g} times as wrong as {plain}"


def _assert_within(bound: float, got: Tensor, true: Tensor, what: str) -> float:
    assert got.shape == true.shape, f"{what} has shape {tuple(got.shape)}, expected {tuple(true.shape)}"
    distance = _distance(got, true)
    assert distance <= bound, f"{what} is off by {distance:.3g}, expected at most {bound:.3g}"
    return distance


def _distance(a: Tensor, b: Tensor) -> float:
    return _largest([a.double() - b.double()])


def _largest(tensors: Iterable[Tensor]) -> float:
    return max(x.detach().abs().max().item() for x in tensors)
