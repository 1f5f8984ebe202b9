"""Every operator with a published formulation: forward, and forward and backward, with every dropout active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache

import pytest

from .agreement import Results, assert_agreement
from .measure import Measure
from .operators import BENCH_SIZE, OPERATORS, Call, Case, cost_of, make_case
from .report import BASELINE

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
        cost=cost_of(name, case_of(name).args, backward=direction != "forward"),
        beside=None if baseline is None else directed(baseline),
    )
