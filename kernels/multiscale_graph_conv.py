"""Multi-scale graph convolution: S hop matrices and a 1x1 convolution as one matrix product.

    y[n,o,v,t] = bias[o] + sum_(k,c) weight[o, k*C + c] * sum_u hops[k,v,u] * x[n,c,u,t]

The convolution after the hop sum is linear, so both fold into one matrix,

    M[(o,v),(c,u)] = sum_k weight[o, k*C + c] * hops[k,v,u],      y[n] = M x[n] + bias,

and no (N, S*C, V, T) tensor is formed; the gradients of ``weight`` and ``hops`` come from that of M.

Shapes: x (N, C, V, T), hops (S, V, V), weight (F, S*C), bias (F,) -> y (N, F, V, T).
Source: arXiv 2503.15126 (disentangled multi-scale graph); the folding is ours.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from .operator import Operator, check_shapes
from .pointwise import pointwise


def _multiscale_graph_conv_reference(x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scales, joints, _ = hops.shape
    folded = torch.einsum("okc,kvu->ovcu", rearrange(weight, "o (k c) -> o k c", k=scales), hops)
    y = pointwise(
        rearrange(x, "n c u t -> n (c u) t"),
        rearrange(folded, "o v c u -> (o v) (c u)"),
        bias.repeat_interleave(joints),
    )
    return rearrange(y, "n (o v) t -> n o v t", v=joints)


def _flops(x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor) -> tuple[int, int]:
    n, c, v, t = x.shape
    features, scales = weight.shape[0], hops.shape[0]
    fold = 2 * scales * features * c * v * v
    product = 2 * n * t * features * v * c * v
    return fold + product, 2 * (fold + product)


OPERATOR = Operator(_multiscale_graph_conv_reference, _flops)


def multiscale_graph_conv(
    x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor, *, backend: str | None = None
) -> Tensor:
    """Apply S hop matrices and a 1x1 convolution over (hop, channel) to a skeleton sequence.

    Args:
        x: Tensor (N, C, V, T).
        hops: Tensor (S, V, V). Row v of hop k weights the joints u that joint v gathers from.
        weight, bias: Tensor (F, S*C), (F,). 1x1 convolution; input channels are hop-major, then channel.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        Tensor (N, F, V, T).

    Raises:
        ValueError: the shapes do not fit together.
    """
    name = "multiscale_graph_conv"
    sizes = check_shapes(
        name, x=(x, "N C V T"), hops=(hops, "S V V"), weight=(weight, "F SC"), bias=(bias, "F")
    )
    if sizes["SC"] != sizes["S"] * sizes["C"]:
        raise ValueError(
            f"{name}: weight has {sizes['SC']} input channels, expected S*C = "
            f"{sizes['S']}*{sizes['C']} = {sizes['S'] * sizes['C']} from hops and x"
        )
    return OPERATOR(x, hops, weight, bias, backend=backend)
