"""The optimizer step on moments against torch.optim, its scaling law and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from trgnet.kernels import BackendError, moment_update, operator


def random_tensors(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5,), (), (0, 2))
    ]


def run(steps: int = 5, scale: float = 1.0, second: bool = True, **options: float) -> list[torch.Tensor]:
    params = random_tensors(0)
    first = [torch.zeros_like(p) for p in params]
    moments = [torch.zeros_like(p) for p in params] if second else []
    for t in range(1, steps + 1):
        adam = {"gain": 0.1, "correction1": 1 - 0.9**t, "correction2": 1 - 0.999**t} if second else {}
        moment_update(
            params, [scale * g for g in random_tensors(t)], first, moments, beta1=0.9, **adam, **options
        )
    return params


def torch_run(optimizer_class: type, steps: int = 5, **options: object) -> list[torch.Tensor]:
    params = [p.requires_grad_() for p in random_tensors(0)]
    optimizer = optimizer_class(params, **options)
    for t in range(1, steps + 1):
        for p, g in zip(params, random_tensors(t)):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(
    "got, expected",
    [
        (dict(lr=0.01), (torch.optim.Adam, dict(lr=0.01))),
        (dict(lr=0.01, weight_decay=0.1), (torch.optim.Adam, dict(lr=0.01, weight_decay=0.1))),
        (
            dict(lr=0.01, weight_decay=0.1, decoupled=True),
            (torch.optim.AdamW, dict(lr=0.01, weight_decay=0.1)),
        ),
        (
            dict(lr=0.01, weight_decay=0.1, second=False),
            (torch.optim.SGD, dict(lr=0.01, momentum=0.9, weight_decay=0.1)),
        ),
    ],
    ids=["adam", "adam-l2", "adamw", "sgd"],
)
def test_special_cases_are_torchs_optimizers(got: dict, expected: tuple):
    for ours, truth in zip(run(**got), torch_run(expected[0], **expected[1]), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("alpha", [-0.5, 0.0, 0.25, 0.5, 1.0])
def test_scaling_the_loss_scales_the_step(alpha: float):
    """By c^(1 - 2 alpha), where eps does not matter."""
    start = random_tensors(0)
    plain, scaled = (run(lr=0.01, alpha=alpha, eps=0.0, scale=c) for c in (1.0, 3.0))
    for p0, p1, p3 in zip(start, plain, scaled, strict=True):
        torch.testing.assert_close(p3 - p0, (p1 - p0) * 3.0 ** (1 - 2 * alpha), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("alpha", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_zero_second_moment_gives_a_finite_step(alpha: float, dtype: torch.dtype):
    p, zero = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    moment_update([p], [zero], [zero.clone()], [zero.clone()], lr=0.1, beta1=0.9, gain=0.1, alpha=alpha)
    assert torch.equal(p, torch.ones_like(p))


def test_gradients_stay_and_shapes_are_checked():
    p, g = torch.ones(3), torch.full((3,), 2.0)
    moment_update([p], [g], [torch.zeros(3)], lr=0.5, beta1=0.9, weight_decay=1.0)
    assert p.tolist() == [-0.5] * 3 and g.tolist() == [2.0] * 3
    with pytest.raises(
        ValueError, match=r"first has the shapes \[\(2,\)\], expected those of params, \[\(3,\)\]"
    ):
        moment_update([p], [g], [torch.zeros(2)], lr=0.5, beta1=0.9)


def test_cost_counts_every_tensor_once():
    """Gradients are read; parameters and moments are read and written."""
    (p, g, m, v) = ([torch.empty(36_500_000, device="meta")] for _ in range(4))
    numbers = (0.1, 0.9, 0.999, 0.1, 1.0, 1.0, 0.5, 1e-8, 0.0, False)
    assert operator("moment_update").cost(p, g, m, v, *numbers).bytes == 7 * 4 * 36_500_000
    assert operator("moment_update").cost(p, g, m, [], *numbers).bytes == 5 * 4 * 36_500_000


def test_backends():
    one, two = run(lr=0.01), run(lr=0.01, backend="recompute")
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    with pytest.raises(BackendError, match="moment_update: backend 'triton' is forced"):
        run(lr=0.01, backend="triton")


def test_opcheck():
    params, first, second = ([t.clone() for t in random_tensors(i)] for i in range(3))
    args = (
        params,
        random_tensors(3),
        first,
        [s.abs() for s in second],
        0.1,
        0.9,
        0.99,
        0.1,
        1.0,
        1.0,
        math.pi / 4,
        1e-8,
        0.0,
        False,
    )
    torch.library.opcheck(torch.ops.trgnet.moment_update.default, args)
