"""Every operator with a published formulation: forward, and forward and backward, with every dropout active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache

import pytest
from trgnet.kernels import Cost, operator

from .agreement import Results, assert_agreement
from .measure import Measure
from .operators import BENCH_SIZE, Call, Case, make_case
from .report import BASELINE

OPERATORS = (
    "multiscale_graph_conv",
    "dynamic_graph_conv",
    "masked_batch_norm",
    "attention_layer",
    "fusion_layer",
    "dilated_residual",
    "class_loss",
    "boundary_loss",
    "segment_mean",
    "pairwise_distance",
)
SIZE = BENCH_SIZE


@lru_cache(maxsize=1)
def case_of(name: str) -> Case:
    return make_case(name, SIZE)


@lru_cache(maxsize=1)
def agreed_call(name: str, provider: str, precision: str) -> Call:
    """The provider's call, once it was found to compute the reference's function."""
    case = case_of(name)
    timed = Call(name, case, provider, precision, dropout=True)

    def evaluate(who: str, what: str, dropout: bool) -> Results:
        if (who, what, dropout) == (provider, precision, True):
            return timed.results()  # what is compiled once need not be compiled again
        return Call(name, case, who, what, dropout=dropout).results()

    assert_agreement(evaluate, provider, precision)
    return timed


@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(measure: Measure, name: str, precision: str, provider: str, direction: str):
    def directed(call: Call) -> Callable[[], object]:
        return call.outputs if direction == "forward" else call

    baseline = None if provider == BASELINE else Call(name, case_of(name), BASELINE, precision, dropout=True)
    measure(
        directed(agreed_call(name, provider, precision)),
        section="operators, " + direction,
        what=name,
        provider=provider,
        shape=asdict(SIZE),
        precision=precision,
        cost=cost_of(name, backward=direction != "forward"),
        beside=None if baseline is None else directed(baseline),
    )


def cost_of(name: str, backward: bool) -> Cost:
    """The least bytes and FLOPs, the same for every provider."""
    args = case_of(name).args
    costs = [
        operator(name).cost(*args, backward=direction)
        for direction in ((False, True) if backward else (False,))
    ]
    return Cost(sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs))
