"""1x1 convolution, the building block of the references."""

from __future__ import annotations

import torch
from torch import Tensor


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution over the last axis: weight (O, F) times x (N, F, T), plus bias (O,) -> (N, O, T)."""
    # Not weight @ x: matmul would fold batch and time together, which copies x transposed.
    return torch.baddbmm(bias.view(1, -1, 1), weight.expand(len(x), -1, -1), x)
