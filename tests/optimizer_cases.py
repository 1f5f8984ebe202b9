"""Parameters, gradients and paths for the tests of the optimizers."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trgnet.kernels import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((3, 5), (7,), (), (0, 2), (2, 3, 4))
needs_triton = pytest.mark.skipif(launch.triton is None, reason="Triton is not installed")
PATHS = {
    "loop": {"foreach": False},
    "lists": {"foreach": True},
    "fused": {"fused": True},
    "live loop": {"foreach": False, "capturable": True},
    "live lists": {"foreach": True, "capturable": True},
    "live fused": {"fused": True, "capturable": True},
}


def each_path(*names: str) -> Any:
    """Parametrise a test by ``path``, the keyword arguments of an optimizer."""
    return pytest.mark.parametrize(
        "path",
        [
            pytest.param(PATHS[name], id=name, marks=needs_triton if "fused" in name else ())
            for name in names or PATHS
        ],
    )


def parameters(dtype: torch.dtype = torch.float32, shapes: tuple = SHAPES) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(t) for t in tensors(0, dtype, shapes)]


def tensors(seed: int, dtype: torch.dtype = torch.float32, shapes: tuple = SHAPES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.randn(shape, generator=generator, dtype=wide).to(DEVICE, dtype) for shape in shapes]


def give_gradients(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> None:
    for p, g in zip(params, tensors(seed + 1, params[0].dtype, tuple(p.shape for p in params))):
        p.grad = scale * g


def losses(count: int, seed: int = 5) -> list[float]:
    """Falling and noisy, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return [
        float(2.0 / (1 + 0.1 * i) + x) for i, x in enumerate(0.3 * torch.randn(count, generator=generator))
    ]


def reloaded(optimizer: torch.optim.Optimizer, make: Callable[[list], torch.optim.Optimizer]):
    """(parameters, optimizer) from what ``torch.save`` wrote of both."""
    file = io.BytesIO()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params = [torch.nn.Parameter(p) for p in saved["params"]]
    optimizer = make(params)
    optimizer.load_state_dict(saved["optimizer"])
    return params, optimizer


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == e.dtype and torch.equal(g, e)


def assert_near(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    """Element by element, relative to the largest element of each tensor."""
    for g, e in zip(got, expected, strict=True):
        if e.numel():
            error = (g.detach().to(e.dtype) - e).abs().max() / e.abs().max()
            assert error < bound, error
