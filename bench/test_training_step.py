"""The training step of the published formulation and of ours: time and peak memory."""

from __future__ import annotations

import sys

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from .agreement import assert_agreement
from .step import PROVIDERS, C, K, N, T, TrainingStep, V, peak_memory


@pytest.fixture(scope="module")
def agreement() -> None:
    """Losses and all gradients agree, dropout off: its masks are drawn by different generators."""
    assert_agreement(PROVIDERS, evaluate)


@pytest.mark.benchmark(group="training step")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_step(benchmark: BenchmarkFixture, agreement: None, provider: str):
    step = TrainingStep(provider)
    benchmark.extra_info |= {
        "shape": {"N": N, "C": C, "V": V, "T": T, "K": K},
        "dtype": "float32",
        "segments": len(step.batch.segments),
    }
    if sys.platform == "linux":
        benchmark.extra_info["peak_memory_bytes"] = peak_memory(provider)
    benchmark.pedantic(step, rounds=4, warmup_rounds=1)


def evaluate(provider: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    step = TrainingStep(provider, dropout=False, dtype=dtype)
    return step.backward(), step.gradients()
