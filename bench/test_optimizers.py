"""The optimizer step alone: TRG-Net's parameters, WRN-28-10's, and a thousand small ones, beside torch.optim.

    OMP_NUM_THREADS=1 pytest bench/test_optimizers.py

Before anything is timed, the providers of each family must agree: with momenta that are equal LCAM is SGD, at alpha = 1/2
SMES is Adam. On a CPU the time of a step is its host time too; on a GPU the device's is measured with a synchronisation in
each round, and ``host_seconds`` is the median time until ``step`` returns. ``launches`` are the kernels that one step
starts, by torch's profiler, on a GPU.
"""

from __future__ import annotations

import pytest

from .device import ON_GPU, host_time, kernels
from .measure import Measure
from .optimizers import FAMILIES, SIZES, agree, least_work, steps_of

PROVIDERS = [(family, name) for family, providers in FAMILIES.items() for name in providers]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family, name", PROVIDERS, ids=[name for _, name in PROVIDERS])
def test_step(measure: Measure, family: str, name: str, size: str):
    if not ON_GPU and name.endswith("fused") and not name.startswith("torch"):
        pytest.skip("the fused kernel is for GPUs")
    if not ON_GPU and name.endswith("compiled"):
        pytest.skip("compiles for more than six minutes on a CPU")
    agree(family, name)
    shapes = SIZES[size]()
    _, step = steps_of(FAMILIES[family][name], shapes)
    measure(
        step,
        section="optimizers",
        what=f"{family}, {size}",
        provider=name,
        shape={"tensors": len(shapes), "elements": sum(shape.numel() for shape in shapes)},
        cost=least_work(family, shapes),
    )
    if ON_GPU:
        launches = sum(count for _, count, _ in kernels(step))
        measure.benchmark.extra_info |= {"launches": launches, "host_seconds": host_time(step)}
