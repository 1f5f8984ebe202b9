"""A whole recording of 100,000 frames goes through the published network at once, on a GPU of 24 GB."""

from __future__ import annotations

import pytest
import torch
from allocations import PeakMemory
from torch import Tensor
from trgnet.kernels import BackendError, use_backend
from trgnet.kernels.launch import Target, record_launches

from trgnet import TRGNet
from trgnet.skeleton import SKELETONS

pytest.importorskip("triton")

FRAMES = 100_000
GPU, RESERVE = 24e9, 2e9
"""Bytes of a GPU, and what its driver, the libraries and fragments of freed memory may take of it."""


def recording(channels: int, joints: int, frames: int, device: str = "meta") -> tuple[Tensor, Tensor, Tensor]:
    """Input of the network: one recording of nothing."""
    x = torch.zeros(1, channels, joints, frames, device=device)
    mask = torch.ones(1, 1, frames, dtype=torch.bool, device=device)
    return x, mask, torch.zeros(joints, joints, device=device)


def evaluation_bytes(
    backend: str, skeleton: str, channels: int, classes: int, frames: int, features: int
) -> int:
    """Most bytes of all tensors at one time beside the weights, the input included."""
    adjacency = SKELETONS[skeleton].adjacency()
    model = TRGNet(channels, classes, adjacency, features=features).eval().to("meta")
    inputs = recording(channels, len(adjacency), frames)
    with record_launches(Target("cuda", 90)) as recorded, PeakMemory() as memory:
        with torch.no_grad(), use_backend(backend):
            model(*inputs)
    assert bool(recorded) == (backend == "triton")
    return memory.peak + sum(tensor.nbytes for tensor in inputs)


@pytest.mark.parametrize(
    ("skeleton", "channels", "classes", "features"),
    [
        ("pku", 12, 52, 64),
        ("lara", 12, 8, 64),
        ("mcfs", 8, 130, 64),
        ("tcg", 12, 15, 64),
        ("pku", 12, 52, 32),
    ],
)
def test_memory_is_what_the_network_says(skeleton: str, channels: int, classes: int, features: int):
    measured = evaluation_bytes("triton", skeleton, channels, classes, FRAMES, features)
    joints = len(SKELETONS[skeleton])
    formula = 4 * joints * (4 * features + 2 * channels + 2) * FRAMES
    assert formula <= measured <= 1.001 * formula


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_hundred_thousand_frames_fit_a_gpu_of_24_gb(backend: str):
    measured = evaluation_bytes(backend, "pku", 12, 52, FRAMES, 64)
    assert measured < GPU - RESERVE
    assert measured < {"triton": 2.83e9, "reference": 4.77e9}[backend]
    shorter = evaluation_bytes(backend, "pku", 12, 52, FRAMES // 10, 64)
    assert 9.9 * shorter < measured < 10.1 * shorter


def test_what_operators_make_for_themselves_is_measured():
    """An attention layer's backward pass keeps eight operands of its weights' gradients until it ends."""
    x, mask = torch.ones(1, 64, 4096, device="meta"), torch.ones(1, 1, 4096, dtype=torch.bool, device="meta")
    layer = TRGNet(3, 2, SKELETONS["pku"].adjacency()).temporal.layers[0].to("meta")
    with record_launches(Target("cuda", 90)), use_backend("triton"), PeakMemory() as memory:
        layer(x, mask, None, 1.0, None).sum().backward()
    assert memory.peak > 8 * x.nbytes


def test_frames_beyond_the_kernels_are_refused_not_computed_wrongly():
    model = TRGNet(12, 52, SKELETONS["pku"].adjacency()).eval().to("meta")
    with record_launches(Target("cuda", 90)), torch.no_grad(), use_backend("triton"):
        with pytest.raises(BackendError, match="frames exceed 32-bit offsets"):
            model(*recording(12, 25, 2**27))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measured_peak_of_a_recording():
    model = TRGNet(12, 52, SKELETONS["pku"].adjacency()).eval().to("cuda")
    inputs = recording(12, 25, FRAMES, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), use_backend("triton"):
        logits, _ = model(*inputs)
    assert logits.isfinite().all()
    inside = sum(tensor.nbytes for tensor in inputs)
    assert torch.cuda.max_memory_allocated() - before + inside < 1.02 * 28.3e3 * FRAMES
