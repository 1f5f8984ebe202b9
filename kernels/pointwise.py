"""1x1 convolution, the building block of the references, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution over the last axis: weight (O, F) times x (N, F, T), plus bias (O,) -> (N, O, T)."""
    # Not weight @ x: matmul would fold batch and time together, which copies x transposed.
    return torch.baddbmm(bias.view(1, -1, 1), weight.expand(len(x), -1, -1), x)


def analytic_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`pointwise` in the analytic passes: not one call, which writes the bias everywhere before the product does."""
    return torch.bmm(weight.expand(len(x), -1, -1), x).add_(bias.view(1, -1, 1))


def pointwise_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of :func:`pointwise` by ``x``, (N, F, T), from that of its output, (N, O, T)."""
    return torch.bmm(weight.mT.expand(len(grad), -1, -1), grad)


def pointwise_parameter_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`pointwise` by ``weight``, (O, F), and ``bias``, (O,), from that of its output, (N, O, T)."""
    return torch.bmm(grad, x.mT).sum(0), grad.sum((0, 2))
