"""Kernels of segment means and pairwise distances: tables of segments, near neighbours, memory, addresses."""

from __future__ import annotations

import pytest
import torch
from allocations import LargestTensor, PeakMemory
from torch import Tensor
from trgnet.kernels import operator
from trgnet.kernels.launch import Target, record_launches

from trgnet import kernels

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "triton")
N, F, T = 4, 20, 300
# Sequence, first frame, length: gaps, neighbours, single frames, more than a tile, a sequence without any.
SEGMENTS = [
    (0, 0, 300),
    (1, 3, 1),
    (1, 4, 1),
    (1, 9, 130),
    (1, 150, 128),
    (3, 0, 7),
    (3, 200, 99),
    (3, 299, 1),
]


def table(segments: list[tuple[int, int, int]], padding: int = 0) -> tuple[Tensor, ...]:
    """batch, start and length, with ``padding`` segments of length 0 behind them."""
    rows = [*segments, *[(N - 1, T, 0)] * padding]
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE).view(-1, 3).T.contiguous().unbind(0)


def frames(seed: int = 0) -> Tensor:
    return torch.randn(N, F, T, generator=torch.Generator().manual_seed(seed)).to(DEVICE).requires_grad_()


def test_segments_of_all_lengths_with_gaps():
    """What lies in no segment counts nowhere, NaN included, and has the gradient 0."""
    x = frames()
    inside = torch.zeros(N, 1, T, dtype=torch.bool, device=DEVICE)
    for n, start, length in SEGMENTS:
        inside[n, :, start : start + length] = True
    filled = x.detach().masked_fill(~inside, float("nan")).requires_grad_()
    mean = kernels.segment_mean(filled, *table(SEGMENTS), backend="triton")
    grad = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (grad_x,) = torch.autograd.grad(mean, filled, grad)
    for s, (n, start, length) in enumerate(SEGMENTS):
        expected = x[n, :, start : start + length].double().mean(1)
        torch.testing.assert_close(mean[s].double(), expected, rtol=1e-6, atol=1e-6)
        of_segment = grad_x[n, :, start : start + length]
        torch.testing.assert_close(of_segment, (grad[s] / length).unsqueeze(1).expand_as(of_segment))
    assert not grad_x[~inside.expand_as(grad_x)].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_segments_of_length_0_change_nothing(backend: str):
    """Their mean is 0; what their gradient is does not matter."""
    x, extra = frames(), 9
    mean = kernels.segment_mean(x, *table(SEGMENTS), backend=backend)
    padded = kernels.segment_mean(x, *table(SEGMENTS, extra), backend=backend)
    assert torch.equal(padded[:-extra], mean) and not padded[-extra:].any()
    grad = torch.randn(padded.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    grad[-extra:] = float("nan")
    (expected,) = torch.autograd.grad(mean, x, grad[:-extra])
    (got,) = torch.autograd.grad(padded, x, grad)
    assert torch.equal(got, expected) and got.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("padding", [0, 3])
def test_no_segments(backend: str, padding: int):
    x = frames()
    mean = kernels.segment_mean(x, *table([], padding), backend=backend)
    assert mean.shape == (padding, F) and not mean.any()
    (grad_x,) = torch.autograd.grad(mean.sum(), x)
    assert not grad_x.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_near_neighbours_do_not_cancel(backend: str):
    """Rows of size 1000 that differ by 1e-3: by products, no digit of a distance would be right."""
    generator = torch.Generator().manual_seed(0)
    f = (1000 + torch.randint(-2, 3, (21, 40), generator=generator) / 1024).to(DEVICE)  # exact in float32
    grad = torch.randn(21, 21, generator=generator).to(DEVICE)

    def both(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        leaf = f.to(dtype).requires_grad_()
        distance = kernels.pairwise_distance(leaf, backend=backend)
        return distance.detach(), *torch.autograd.grad(distance, leaf, grad.to(dtype))

    for ours, truth in zip(both(torch.float32, backend), both(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)


def test_equal_rows_have_distance_0_and_no_gradient_from_each_other():
    f = torch.randn(35, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    f[20:] = f[3]
    f.requires_grad_()
    distance = kernels.pairwise_distance(f, backend="triton")
    assert torch.equal(distance, distance.T)
    assert not distance.diagonal().any() and not distance[20:, 20:].any() and not distance[3, 20:].any()
    (among_equals,) = torch.autograd.grad(distance[20:, 20:].sum(), f, retain_graph=True)
    assert not among_equals.any()
    gradients = [
        torch.autograd.grad(kernels.pairwise_distance(f, backend=b).square().sum(), f)[0] for b in BACKENDS
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distances_of_half_precision_are_float32(backend: str):
    f = torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.float16)
    f.requires_grad_()
    distance = kernels.pairwise_distance(f, backend=backend)
    (grad_f,) = torch.autograd.grad(distance.sum(), f)
    assert distance.dtype == torch.float32 and grad_f.dtype == torch.float16
    torch.testing.assert_close(distance, kernels.pairwise_distance(f.float(), backend="reference"))


def test_distances_need_no_more_than_their_tensors():
    """No (S, S, D) tensor: rows, distances, and their gradients. On meta, where no launcher can wait for a value."""
    s, d = 1000, 768
    f = torch.empty(s, d, device="meta")
    with record_launches(Target("cuda", 90)) as recorded, LargestTensor() as largest, PeakMemory() as memory:
        (distance,), (grad_f,) = operator("pairwise_distance").triton_passes((f,), torch.empty_like)
    assert len(recorded) == 2 and distance.shape == (s, s) and grad_f.shape == (s, d)
    assert largest.elements == s * s
    assert memory.peak == 4 * (2 * s * s + s * d)


def test_segment_means_are_one_launch_each_way():
    x, segments = torch.empty(2, 64, 500, device="meta"), torch.empty(30, dtype=torch.int64, device="meta")
    with record_launches(Target("cuda", 90)) as recorded, PeakMemory() as memory:
        operator("segment_mean").triton_passes((x, *[segments] * 3), torch.empty_like)
    assert len(recorded) == 2
    assert memory.peak == 4 * (2 * 30 * 64 + x.numel())  # mean, its gradient, that of x


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's")
def test_addresses_beyond_two_to_the_31(only_last_program: None):
    """The last program reads and writes the very end of tensors whose memory is reserved, but never touched elsewhere."""
    n, f, t = 34_000, 8, 8000
    x = torch.empty(n, f, t, dtype=torch.float16)
    assert x.numel() >= 2**31
    x[-1, :, -50:] = torch.randn(f, 50, generator=torch.Generator().manual_seed(0))
    batch, start, length = (torch.tensor([value]) for value in (n - 1, t - 50, 50))
    (mean,) = operator("segment_mean").triton.forward(x, batch, start, length)
    torch.testing.assert_close(mean[0], x[-1, :, -50:].float().mean(1).half(), rtol=2e-3, atol=1e-4)
    (grad_x,) = operator("segment_mean").triton.backward(mean, x, batch, start, length, [True])
    expected = (mean[0] / 50).unsqueeze(1).expand(-1, 50)
    torch.testing.assert_close(grad_x[-1, :, -50:], expected, rtol=2e-3, atol=1e-5)
    assert not grad_x[-1, :, -64:-50].any()
