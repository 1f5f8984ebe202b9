"""Forward and backward of every operator with a published formulation."""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from trgnet.kernels import operator

from .agreement import assert_agreement
from .operators import PROVIDERS, Call, Case, Size, make_case

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
SIZE = Size()


@lru_cache(maxsize=1)
def agreed_case(name: str) -> Case:
    """The operator's case, once its providers were found to agree, dropout off: their masks differ."""
    case = make_case(name, SIZE)
    assert_agreement(
        PROVIDERS, lambda provider, dtype: Call(name, case, provider, dtype=dtype, dropout=False).results()
    )
    return case


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator(benchmark: BenchmarkFixture, name: str, provider: str):
    case = agreed_case(name)
    call = Call(name, case, provider, dtype=torch.float32, dropout=True)
    benchmark.group = name
    benchmark.pedantic(call, rounds=12, warmup_rounds=2)
    benchmark.extra_info |= {"shape": asdict(SIZE), "dtype": "float32"} | work(name, case)
    if benchmark.enabled:
        seconds = benchmark.stats["median"]
        benchmark.extra_info |= {
            "GB/s": benchmark.extra_info["bytes"] / seconds / 1e9,
            "GFLOP/s": benchmark.extra_info["flops"] / seconds / 1e9,
        }


def work(name: str, case: Case) -> dict[str, int]:
    """The least bytes and FLOPs of forward and backward, the same for every provider."""
    costs = [operator(name).cost(*case.args, backward=backward) for backward in (False, True)]
    return {"bytes": sum(cost.bytes for cost in costs), "flops": sum(cost.flops for cost in costs)}
