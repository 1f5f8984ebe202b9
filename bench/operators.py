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
from trgnet.kernels.examples import HALF_ARGUMENTS, Size, changed, example

from . import published
from .agreement import Results
from .device import DEVICE, ON_GPU
from .providers import AUTOCAST, BACKENDS, compiled, precision_of

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
        return changed(self.args, self.network)

    @property
    def forms(self) -> list[tuple[Any, ...]]:
        """The arguments of every form."""
        return [changed(self.args, changes) for changes in (self.network, self.other) if changes is not None]


SMALL = Size()


def make_case(name: str, size: Size = SMALL) -> Case:
    """Random float32 arguments, without padding; what an operator differentiates requires gradients."""
    args = example(name, size, dtype=torch.float32, padded=False, dilation=16, heads=4)
    return {
        "multiscale_graph_conv": lambda: Case(
            changed(args, {4: None}),
            lambda *args: published.multiscale_graph_conv(*args[:-1]),
            swapped=(0,),
            network={4: args[4]},
        ),
        "dynamic_graph_conv": lambda: Case(
            changed(args, {3: None, 4: None}),
            _dynamic_graph_conv,
            swapped=(0,),
            network={3: args[3], 4: args[4]},
        ),
        "masked_batch_norm": lambda: Case(
            changed(args, {8: False}), _batch_norm, swapped=(0, 4), network={8: True}
        ),
        "attention_layer": lambda: Case(
            changed(args, {2: None}), _attention_layer, dropout=(-2, -1), other={2: args[2]}
        ),
        "fusion_layer": lambda: Case(
            args, lambda *args: published.fusion_layer(*args[:-2], args[-1]), dropout=(-1,)
        ),
        "dilated_residual": lambda: Case(
            args, lambda *args: published.dilated_residual(*args[:-3], *args[-2:]), dropout=(-1,)
        ),
        "class_loss": lambda: Case(
            changed(args, {4: None}),
            lambda logits, labels, similarity, *_: published.class_loss(logits, labels, similarity),
            other={4: args[4]},
        ),
        "moment_update": lambda: Case(args, None),
        "boundary_loss": lambda: Case(
            args, lambda logits, target, _, pos_weight: published.boundary_loss(logits, target, pos_weight)
        ),
        "pointwise_conv": lambda: Case(args, None, other={2: None}),
        "segment_mean": lambda: Case(args, published.segment_mean),
        "pairwise_distance": lambda: Case(args, published.pairwise_distance),
    }[name]()


BENCH_SIZE = Size(n=8, t=6000, segments=320) if ON_GPU else SMALL
"""Of the timed operators and networks: a batch of published training, or what a CPU can do in reasonable time."""


class Call:
    """One provider's function with arguments of its own, in its layout and precision ("float64" too)."""

    def __init__(self, name: str, case: Case, provider: str, precision: str, *, dropout: bool) -> None:
        args = [
            0.0 if i - len(case.args) in case.dropout and not dropout else a for i, a in enumerate(case.args)
        ]
        self.name = name
        self.swapped = case.swapped if provider == "published" else ()
        self.precision = precision
        narrow = HALF_ARGUMENTS.get(name, ()) if precision in AUTOCAST else ()
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
        generator = torch.Generator(DEVICE).manual_seed(1)
        gradient = torch.randn(shape, generator=generator, device=DEVICE).to(output)
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
    return AUTOCAST[precision] if narrow else torch.float32


def _leaf(a: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous copy of ``a`` that no graph leads to; floating point in ``dtype``."""
    copy = a.detach().to(DEVICE).clone(memory_format=torch.contiguous_format)
    return copy.to(dtype).requires_grad_(a.requires_grad) if a.is_floating_point() else copy


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
