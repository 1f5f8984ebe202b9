"""The optimizers that are compared, by family, and a step of one on the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.optim import SGD, Adam
from trgnet.kernels import Cost
from trgnet.optimizers import LCAM, SMES, GatedSMES

from trgnet import TRGNet
from trgnet.skeleton import SKELETONS

from .device import DEVICE, ON_GPU

LOSS_GATED = (LCAM, GatedSMES)
Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def trg_net() -> list[torch.Size]:
    model = TRGNet(12, 52, SKELETONS["pku"].adjacency(), 768)
    return [p.shape for p in model.parameters()]


def wide_resnet() -> list[torch.Size]:
    """WRN-28-10 for 10 classes: 80 tensors, 36.5 million parameters."""

    def shapes() -> Iterator[tuple[int, ...]]:
        yield 16, 3, 3, 3
        channels = 16
        for width in (160, 320, 640):
            for _ in range(4):
                yield from ((channels,), (channels,), (width, channels, 3, 3))
                yield from ((width,), (width,), (width, width, 3, 3))
                if channels != width:
                    yield width, channels, 1, 1
                channels = width
        yield from ((640,), (640,), (10, 640), (10,))

    return [torch.Size(shape) for shape in shapes()]


SIZES = {"trg-net": trg_net, "wrn-28-10": wide_resnet, "1000 x 1024": lambda: [torch.Size([1024])] * 1000}
OPTIONS = dict(lr=1e-3, weight_decay=5e-4)
FAMILIES: dict[str, dict[str, Make]] = {
    "momentum": {
        "torch SGD, foreach": lambda p: SGD(p, momentum=0.9, foreach=True, **OPTIONS),
        "torch SGD, fused": lambda p: SGD(p, momentum=0.9, fused=True, **OPTIONS),
        "torch SGD, compiled": lambda p: compiled(SGD(p, momentum=0.9, foreach=False, **OPTIONS)),
        "LCAM, lists": lambda p: LCAM(p, momenta=(0.9, 0.9), foreach=True, **OPTIONS),
        "LCAM, fused": lambda p: LCAM(p, momenta=(0.9, 0.9), fused=True, **OPTIONS),
    },
    "second moment": {
        "torch Adam, foreach": lambda p: Adam(p, foreach=True, **OPTIONS),
        "torch Adam, fused": lambda p: Adam(p, fused=True, **OPTIONS),
        "torch Adam, compiled": lambda p: compiled(Adam(p, foreach=False, capturable=ON_GPU, **OPTIONS)),
        "SMES, lists": lambda p: SMES(p, foreach=True, **OPTIONS),
        "SMES, fused": lambda p: SMES(p, fused=True, **OPTIONS),
        "gated SMES, lists": lambda p: GatedSMES(p, momenta=(0.9, 0.9), foreach=True, **OPTIONS),
        "gated SMES, fused": lambda p: GatedSMES(p, momenta=(0.9, 0.9), fused=True, **OPTIONS),
    },
}
LEAST = {"momentum": (5, 4), "second moment": (7, 13)}
"""Of a parameter: the numbers read and written, and the operations, beside weight decay."""


def compiled(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    optimizer.step = torch.compile(optimizer.step)
    return optimizer


def steps_of(make: Make, shapes: list[torch.Size]) -> tuple[list[Tensor], Callable[[], None]]:
    """Parameters with gradients, and a step on them."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(DEVICE)) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
    optimizer = make(params)
    loss = {"loss": torch.ones((), device=DEVICE)} if isinstance(optimizer, LOSS_GATED) else {}
    return params, lambda: optimizer.step(**loss)


@lru_cache
def agree(family: str, name: str) -> None:
    """Raise AssertionError unless the provider's parameters after three steps are those of the family's first."""
    first = next(iter(FAMILIES[family]))
    results = []
    for provider in (first, name):
        params, step = steps_of(FAMILIES[family][provider], [torch.Size(s) for s in ((3000,), (7, 5), ())])
        for _ in range(3):
            step()
        results.append([p.detach() for p in params])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def least_work(family: str, shapes: list[torch.Size]) -> Cost:
    """The least bytes and FLOPs of a step, the same for every provider of a family."""
    elements = sum(shape.numel() for shape in shapes)
    moved, flops = LEAST[family]
    return Cost(4 * moved * elements, flops * elements)
