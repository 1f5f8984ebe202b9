"""Arguments of the operators at a size of published training, and one provider's call of one.

A provider takes an operator's arguments in their order. The published formulation has joints innermost: its
arguments of shape (..., V, T) come to it as (..., T, V), so that no transpose is timed that the published
network would not do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from trgnet.kernels import Cost, operator
from trgnet.kernels.loss_gate import new_control
from trgnet.kernels.moment_update import Hyper

from . import published
from .agreement import Results
from .device import DEVICE, ON_GPU
from .providers import BACKENDS, compiled, precision_of

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
"""The operators that have a published formulation."""

MADE_NARROW = {
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
"""Positions of the arguments that come in half precision, as an operation before made them so under autocast; beside
those that autocast narrows for the operator itself, ``Fused.narrowed``."""


@dataclass(frozen=True)
class Size:
    """Of a batch: sequences, input channels, joints, features, frames, hops, classes, segments, embedding."""

    n: int = 2
    c: int = 12
    v: int = 25
    f: int = 64
    t: int = 1000
    hops: int = 13
    k: int = 52
    segments: int = 64
    d: int = 768


@dataclass(frozen=True)
class Case:
    """One operator: its arguments, its published formulation, and what tells the two layouts apart."""

    args: tuple[Any, ...]
    published: Callable[..., Any] | None
    """None where there is nothing to compare with."""
    swapped: tuple[int, ...] = ()
    """Positions of the arguments of shape (..., V, T)."""
    dropout: tuple[int, ...] = ()
    """Positions of the dropout probabilities."""
    network: dict[int, Any] = field(default_factory=dict)
    """What the network passes at other positions to have more done in the same kernels, untimed here."""
    other: dict[int, Any] | None = None
    """The same of a second form that the network or a training may have."""

    @property
    def network_args(self) -> tuple[Any, ...]:
        """The arguments as the network passes them."""
        return self._with(self.network)

    @property
    def forms(self) -> list[tuple[Any, ...]]:
        """The arguments of every form."""
        return [self._with(changes) for changes in (self.network, self.other) if changes is not None]

    def _with(self, changes: dict[int, Any]) -> tuple[Any, ...]:
        return tuple(changes.get(i, a) for i, a in enumerate(self.args))


def make_case(name: str, size: Size = Size()) -> Case:
    """Random float32 arguments, without padding; what an operator differentiates requires gradients."""
    generator = torch.Generator().manual_seed(0)
    n, c, v, f, t, k = size.n, size.c, size.v, size.f, size.t, size.k

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).requires_grad_()

    def linear(out: int, *inner: int) -> tuple[Tensor, Tensor]:
        return random(out, *inner, scale=torch.Size(inner).numel() ** -0.5), random(out, scale=0.1)

    mask = torch.ones(n, 1, t, dtype=torch.bool)
    seeds, dilation, heads = torch.tensor([5, 7]), 16, 4
    labels = torch.randint(0, k, (n, t), generator=generator)
    similarity = torch.rand(n, t, generator=generator)
    return {
        "multiscale_graph_conv": lambda: Case(
            (random(n, c, v, t), random(size.hops, v, v, scale=v**-0.5), *linear(f, size.hops * c), None),
            lambda *args: published.multiscale_graph_conv(*args[:-1]),
            swapped=(0,),
            network={4: mask},
        ),
        "dynamic_graph_conv": lambda: Case(
            (random(n, f + 2, v, t), random(n, f, v, v), random(1), None, None),
            _dynamic_graph_conv,
            swapped=(0,),
            network={3: random(f + 2), 4: mask},
        ),
        "masked_batch_norm": lambda: Case(
            (
                random(n, f, v, t),
                mask,
                random(f),
                random(f),
                random(n, f, v, t),
                None,
                None,
                False,
                False,
                1e-5,
            ),
            _batch_norm,
            swapped=(0, 4),
            network={8: True},
        ),
        "attention_layer": lambda: Case(
            (
                random(n, f, t),
                mask,
                None,
                *linear(f, f, 3),
                *linear(2 * f, f),
                *linear(f, f),
                *linear(f, f),
                *linear(f, f),
                seeds,
                *(dilation, heads, 1.0, 0.05, 0.5),
            ),
            _attention_layer,
            dropout=(-2, -1),
            other={2: random(n, f, t)},
        ),
        "fusion_layer": lambda: Case(
            (random(n, f, t), random(n, f, t), mask, *linear(f, f), *linear(f, f), seeds[0], 0.3),
            lambda *args: published.fusion_layer(*args[:-2], args[-1]),
            dropout=(-1,),
        ),
        "dilated_residual": lambda: Case(
            (random(n, f, t), mask, *linear(f, f, 3), *linear(f, f), seeds[0], dilation, 0.5),
            lambda *args: published.dilated_residual(*args[:-3], *args[-2:]),
            dropout=(-1,),
        ),
        "class_loss": lambda: Case(
            (random(n, k, t), labels, similarity, mask, None),
            lambda logits, labels, similarity, *_: published.class_loss(logits, labels, similarity),
            other={4: torch.ones(k)},
        ),
        "moment_update": lambda: Case(_moment_update(random), None),
        "boundary_loss": lambda: Case(
            (random(n, 1, t), (labels == 0).float(), mask, torch.tensor(float(k))),
            lambda logits, target, _, pos_weight: published.boundary_loss(logits, target, pos_weight),
        ),
        "segment_mean": lambda: Case((random(n, f, t), *_segments(size)), published.segment_mean),
        "pairwise_distance": lambda: Case((random(size.segments, size.d),), published.pairwise_distance),
    }[name]()


BENCH_SIZE = Size(n=8, t=6000, segments=320) if ON_GPU else Size()
"""Of the timed operators and networks: a batch of published training, or what a CPU can do in reasonable time."""


class Call:
    """One provider's function with arguments of its own, in its layout and precision ("float64" too)."""

    def __init__(self, name: str, case: Case, provider: str, precision: str, *, dropout: bool) -> None:
        args = [
            0.0 if i - len(case.args) in case.dropout and not dropout else a for i, a in enumerate(case.args)
        ]
        self.swapped = case.swapped if provider == "published" else ()
        self.precision = precision
        narrow = MADE_NARROW.get(name, ()) if precision == "bfloat16" else ()
        self.args = [
            _leaf(a.mT if i in self.swapped else a, _dtype(precision, i in narrow))
            if isinstance(a, Tensor)
            else a
            for i, a in enumerate(args)
        ]
        self.function = _function(name, case, provider)
        self.wanted = {i: a for i, a in enumerate(self.args) if isinstance(a, Tensor) and a.requires_grad}
        self.output_gradients = [self._output_gradient(output) for output in self.outputs()]

    def __call__(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Values, and gradients of a fixed random projection of them: forward and backward."""
        outputs = self.outputs()
        return outputs, torch.autograd.grad(outputs, list(self.wanted.values()), self.output_gradients)

    def results(self) -> Results:
        """Values and gradients by name, in the operator's layout."""
        outputs, gradients = self()
        return (
            {f"output {i}": self._in_operator_layout(o) for i, o in enumerate(outputs)},
            {
                f"gradient of argument {i}": g.mT if i in self.swapped else g
                for i, g in zip(self.wanted, gradients)
            },
        )

    def outputs(self) -> list[Tensor]:
        """Values with gradients: forward."""
        with precision_of(self.precision):
            outputs = self.function(*self.args)
        # An output that was not asked for is empty.
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [o for o in outputs if o.requires_grad and o.numel()]

    def _output_gradient(self, output: Tensor) -> Tensor:
        """The same numbers for every provider."""
        shape = self._in_operator_layout(output).shape
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(output)
        return self._in_operator_layout(gradient).contiguous()  # swapping is its own inverse

    def _in_operator_layout(self, output: Tensor) -> Tensor:
        return output.mT if self.swapped else output


def cost_of(name: str, args: Sequence[Any], backward: bool) -> Cost:
    """The least bytes and FLOPs of a forward pass, or of forward and backward; the same for every provider."""
    directions = (False, True) if backward else (False,)
    costs = [operator(name).cost(*args, backward=direction) for direction in directions]
    return Cost(sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs))


def _function(name: str, case: Case, provider: str) -> Callable[..., Any]:
    if provider == "published":
        return case.published
    if provider == "compiled":
        return compiled(operator(name).reference)
    return partial(operator(name), backend=BACKENDS.get(provider, provider))


def _dtype(precision: str, narrow: bool) -> torch.dtype:
    if precision == "float64":
        return torch.float64
    return torch.bfloat16 if narrow else torch.float32


def _leaf(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of ``a`` that no graph leads to; floating point in ``dtype``."""
    copy = a.detach().to(DEVICE).clone(memory_format=torch.contiguous_format)
    return copy.to(dtype).requires_grad_(a.requires_grad) if a.is_floating_point() else copy


def _segments(size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Equal segments that fill the batch: batch, start, length, each (S,)."""
    per_sequence = size.segments // size.n
    frames = size.t // per_sequence
    starts = torch.arange(per_sequence).repeat(size.n) * frames
    return torch.arange(size.n).repeat_interleave(per_sequence), starts, torch.full_like(starts, frames)


def _moment_update(random: Callable[..., Tensor]) -> tuple[Any, ...]:
    """Loss-gated second-moment scaling of convolution weights, whose moments are in the precision of the weights."""
    params, grads, first, second = ([random(64, 64, 3, 3).detach() for _ in range(2)] for _ in range(4))
    rows, counts = torch.tensor([Hyper(lr=0.1).row]), torch.zeros(2, 3)
    scalars = [torch.ones(()) for _ in range(4)]  # loss, clipping coefficient, gradient scale, found_inf
    rule = ("product", "mean", 0.0, False, "nearest", 0)
    return (
        params,
        grads,
        first,
        second,
        [],
        [0, 0],
        [0, 1],
        rows,
        counts,
        new_control(),
        None,
        *scalars,
        *rule,
    )


def _dynamic_graph_conv(x: Tensor, graph: Tensor, beta: Tensor, *_: object) -> Tensor:
    """The published convolution has three inputs."""
    value, p, q = x.split([x.shape[1] - 2, 1, 1], dim=1)
    return published.dynamic_graph_conv(value, p.squeeze(1), q.squeeze(1), graph, beta)


def _batch_norm(
    x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, *_: object
) -> Tensor:
    return published.batch_norm(x, mask, weight, bias, residual)


def _attention_layer(*args: Any) -> Tensor:
    """The published layer has separate projections for queries and keys, and draws without a seed."""
    inputs, query_key, value, attention, output = args[:5], args[5:7], args[7:9], args[9:11], args[11:13]
    query, key = zip(*(parameter.chunk(2) for parameter in query_key))
    return published.attention_layer(*inputs, query, key, value, attention, *output, *args[14:])
