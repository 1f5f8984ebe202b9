"""Arguments for every operator: what checks, benchmarks and tests call them with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .loss_gate import new_control
from .moment_update import Hyper

HALF_ARGUMENTS = {
    "attention_layer": (0, 2),
    "dynamic_graph_conv": (1,),
    "masked_batch_norm": (0, 4),
    "fusion_layer": (0, 1),
    "dilated_residual": (0,),
    "class_loss": (0,),
    "boundary_loss": (0,),
    "segment_mean": (0,),
    "pairwise_distance": (0,),
    "moment_update": (0, 1, 2, 3),
}
"""Positions of the arguments that are in half precision under autocast because the operation before returns them so.
Autocast narrows others itself, see ``narrowed`` of an implementation."""

OTHER_FORMS = {
    "attention_layer": {2: None},  # self-attention
    "class_loss": {4: None},  # equal classes
    "pointwise_conv": {2: None},  # no bias
    "moment_update": {3: [], 15: "sum"},  # momentum without a second moment
}
"""Positions and values that make another form of the arguments, one that takes other branches of the kernels."""


@dataclass(frozen=True)
class Size:
    """Size of a batch: sequences, input channels, joints, features, frames, hops, classes, segments, embedding."""

    n: int = 2
    c: int = 12
    v: int = 25
    f: int = 64
    t: int = 1000
    hops: int = 13
    k: int = 52
    segments: int = 64
    d: int = 768


def lengths_mask(n: int, t: int) -> Tensor:
    """Return a mask (n, 1, t): the first sequence is full, each further one is a third shorter than the last."""
    lengths = [max(1, round(t * (2 / 3) ** i)) for i in range(n)]
    return torch.arange(t) < torch.tensor(lengths).view(n, 1, 1)


def example(
    name: str,
    size: Size = Size(),
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    padded: bool = True,
    scaled: bool = True,
    dilation: int = 2,
    heads: int = 2,
) -> tuple[Any, ...]:
    """Return random arguments of one operator on the CPU, in its order; what it differentiates requires gradients.

    Args:
        name: the operator.
        size: of the batch; an operator ignores the sizes that it does not have.
        seed: of the numbers.
        dtype: of floating-point tensors.
        padded: whether sequences differ in length and some labels are ignored.
        scaled: whether weights are scaled down by the number of their inputs, as in a network. Else all numbers are
            of size 1.
        dilation, heads: of the temporal layers.

    Raises:
        KeyError: an unknown operator.
    """
    generator = torch.Generator().manual_seed(seed)
    n, c, v, f, t, k = size.n, size.c, size.v, size.f, size.t, size.k

    def random(*shape: int, inputs: int = 1) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=dtype)
        return (values * inputs**-0.5 if scaled and inputs > 1 else values).requires_grad_()

    def linear(out: int, *inner: int) -> tuple[Tensor, Tensor]:
        return random(out, *inner, inputs=torch.Size(inner).numel()), random(out)

    mask = lengths_mask(n, t) if padded else torch.ones(n, 1, t, dtype=torch.bool)
    masked = (random(n, f, t).detach() * mask).requires_grad_()
    seeds = torch.tensor([5, 2**40 + 7])
    attention = [*linear(f, f, 3), *linear(2 * f, f), *(w for _ in range(3) for w in linear(f, f))]
    labels = torch.randint(0, k, (n, t), generator=generator)
    if padded:
        labels[0, : t // 4] = 255
    similarity = torch.rand(n, t, generator=generator, dtype=dtype) * mask[:, 0]
    similarity[:, 0] = 0
    return {
        "multiscale_graph_conv": lambda: (
            random(n, c, v, t),
            random(size.hops, v, v, inputs=v),
            *linear(f, size.hops * c),
            mask,
        ),
        "dynamic_graph_conv": lambda: (
            random(n, f + 2, v, t),
            random(n, f, v, v),
            random(1),
            random(f + 2),
            mask,
        ),
        "masked_batch_norm": lambda: (
            random(n, f, v, t),
            mask,
            random(f),
            random(f),
            random(n, f, v, t),
            *(None, None, False, True, 1e-5),
        ),
        "attention_layer": lambda: (
            *(masked, mask, random(n, f, t), *attention, seeds),
            *(dilation, heads, 0.7, 0.05, 0.5),
        ),
        "fusion_layer": lambda: (masked, random(n, f, t), mask, *linear(f, f), *linear(f, f), seeds[0], 0.3),
        "dilated_residual": lambda: (
            masked,
            mask,
            *linear(f, f, 3),
            *linear(f, f),
            *(seeds[1], dilation, 0.5),
        ),
        "class_loss": lambda: (
            random(n, k, t),
            labels,
            similarity,
            mask,
            torch.linspace(0.5, 1.5, k).to(dtype),
        ),
        "boundary_loss": lambda: (
            random(n, 1, t),
            (labels == 1).to(dtype),
            mask,
            torch.tensor(7.0, dtype=dtype),
        ),
        "pointwise_conv": lambda: (random(n, f, t), random(1, f + 2, f, inputs=f), random(f + 2)),
        "segment_mean": lambda: (random(n, f, t), *_segments(mask, size.segments)),
        "pairwise_distance": lambda: (random(size.segments, size.d),),
        "moment_update": lambda: _moment_update(random, f),
    }[name]()


def forms(name: str, args: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    """Yield the arguments, then their other form if there is one (:data:`OTHER_FORMS`)."""
    yield args
    if name in OTHER_FORMS:
        yield changed(args, OTHER_FORMS[name])


def changed(args: tuple[Any, ...], changes: dict[int, Any]) -> tuple[Any, ...]:
    """Return the arguments with other values at some positions."""
    return tuple(changes.get(i, a) for i, a in enumerate(args))


def _segments(mask: Tensor, segments: int) -> tuple[Tensor, Tensor, Tensor]:
    """About equal segments that fill the valid frames: batch, start, length, each (S,)."""
    each = max(1, segments // len(mask))
    edges = [
        (i, j * total // each, (j + 1) * total // each)
        for i, total in enumerate(mask.sum((1, 2)).tolist())
        for j in range(each)
    ]
    rows = [(i, start, end - start) for i, start, end in edges if end > start]
    batch, start, length = torch.tensor(rows).T.contiguous().unbind(0)
    return batch, start, length


def _moment_update(random: Callable[..., Tensor], f: int) -> tuple[Any, ...]:
    """Loss-gated second-moment scaling of a convolution's weights and of a tensor that fills no tile."""
    shapes = ((f, f, 3, 3), (f * f + 7,))
    params, grads, first, second = ([random(*shape).detach() for shape in shapes] for _ in range(4))
    second = [v.square() for v in second]  # a mean of squares
    hyper = Hyper(lr=0.1, beta1=(0.8, 0.95), alpha=(0.25, 0.5))
    rows, counts = torch.tensor([hyper.row]), torch.zeros(2, 3)
    scalars = [torch.ones(()) for _ in range(4)]  # loss, clipping coefficient, gradient scale, found_inf
    scalars[-1] = torch.zeros(())
    rule = ("product", "mean", 0.0, False, "nearest", 0)
    return (
        *(params, grads, first, second, [], [0, 0], [0, 1]),
        *(rows, counts, new_control(), None, *scalars, *rule),
    )
