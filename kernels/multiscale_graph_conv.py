"""Multi-scale graph convolution: S hop matrices and a 1x1 convolution as one matrix product.

    y[n,o,v,t] = bias[o] + sum_(k,c) weight[o, k*C + c] * sum_u hops[k,v,u] * x[n,c,u,t]

The convolution after the hop sum is linear, so both fold into one matrix,

    M[(o,v),(c,u)] = sum_k weight[o, k*C + c] * hops[k,v,u],      y[n] = M x[n] + bias,

and no (N, S*C, V, T) tensor is formed; the gradients of ``weight`` and ``hops`` come from that of M:

    grad_M[(o,v),(c,u)] = sum_(n,t) grad_y[n,o,v,t] x[n,c,u,t],   grad_x[n] = M^T grad_y[n]
    grad_weight[o,k*C+c] = sum_(v,u) grad_M hops[k,v,u],          grad_hops[k,v,u] = sum_(o,c) grad_M weight[o,k*C+c]

Shapes: x (N, C, V, T), hops (S, V, V), weight (F, S*C), bias (F,), mask (N, 1, T) -> y (N, F, V, T).
Source: arXiv 2503.15126 (disentangled multi-scale graph); the folding is ours.

The products are those of :mod:`.pointwise`, with rows (o, v): the statistics that a following batch norm needs are sums
over rows of a tile, so bias and statistics cost no pass over y. Backward in tf32 and half precision they are torch.bmm's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from einops import rearrange
from torch import Tensor

from .frame_statistics import combined
from .operator import Fused, Operator, check_mask, check_shapes
from .pointwise import launch_pointwise, pointwise, product, product_gradients, unsupported_frames


def _folded(hops: Tensor, weight: Tensor) -> Tensor:
    """The matrix M as (F, V, C, V)."""
    return torch.einsum("okc,kvu->ovcu", rearrange(weight, "o (k c) -> o k c", k=len(hops)), hops)


def _multiscale_graph_conv_reference(
    x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor, mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    joints = hops.shape[1]
    y = pointwise(
        rearrange(x, "n c u t -> n (c u) t"),
        rearrange(_folded(hops, weight), "o v c u -> (o v) (c u)"),
        bias.repeat_interleave(joints),
    )
    # The norm that follows computes its statistics itself: autograd needs them as a function of y.
    return rearrange(y, "n (o v) t -> n o v t", v=joints), x.new_empty(0), x.new_empty(0)


def _flops(x: Tensor, hops: Tensor, weight: Tensor, *_: object) -> tuple[int, int]:
    n, c, v, t = x.shape
    features, scales = weight.shape[0], hops.shape[0]
    fold = 2 * scales * features * c * v * v
    product = 2 * n * t * features * v * c * v
    return fold + product, 2 * (fold + product)


def _forward(
    x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor, mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    v, features = x.shape[2], len(weight)
    matrix = rearrange(_folded(hops, weight), "o v c u -> 1 (o v) (c u)")
    y, parts = launch_pointwise(x.flatten(1, 2), matrix, bias, group=v, mask=mask)
    return y.unflatten(1, (features, v)), *combined(parts)


def _backward(
    grad: Tensor,
    x: Tensor,
    hops: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _, c, v, _ = x.shape
    grad_rows = grad.flatten(1, 2)
    grad_x = grad_hops = grad_weight = grad_bias = None
    if needed[0]:
        matrix = rearrange(_folded(hops, weight).to(x.dtype), "o v c u -> (c u) (o v)")
        grad_x = product(matrix, grad_rows).unflatten(1, (c, v))
    if any(needed[1:]):
        grad_matrix, row_sums = product_gradients(grad_rows, x.flatten(1, 2))
        grad_matrix = rearrange(grad_matrix, "(o v) (c u) -> o v c u", v=v, c=c)
        by_hop = rearrange(weight, "o (k c) -> o k c", k=len(hops)).float()
        grad_weight = rearrange(torch.einsum("ovcu,kvu->okc", grad_matrix, hops.float()), "o k c -> o (k c)")
        grad_hops = torch.einsum("ovcu,okc->kvu", grad_matrix, by_hop).to(hops.dtype)
        grad_weight = grad_weight.to(weight.dtype)
        grad_bias = row_sums.unflatten(0, (-1, v)).sum(1).to(bias.dtype)
    return grad_x, grad_hops, grad_weight, grad_bias


OPERATOR = Operator(
    _multiscale_graph_conv_reference,
    _flops,
    Fused(_forward, _backward, differentiable=(0, 1, 2, 3), narrowed=(0,), unsupported=unsupported_frames),
    statistics=2,
)


def multiscale_graph_conv(
    x: Tensor,
    hops: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Apply S hop matrices and a 1x1 convolution over (hop, channel) to a skeleton sequence.

    Args:
        x: Tensor (N, C, V, T).
        hops: Tensor (S, V, V). Row v of hop k weights the joints u that joint v gathers from.
        weight, bias: Tensor (F, S*C), (F,). 1x1 convolution; input channels are hop-major, then channel.
        mask: bool Tensor (N, 1, T), optional. True on real frames. Where it is given, statistics are returned if they
            come for free; the output is the same.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        y: Tensor (N, F, V, T).
        mean, var: Tensor (F,) each, without gradient. Mean and biased variance of y over joints and real frames, for
            :func:`.masked_batch_norm`; (0,) without a mask and where the backend does not compute them on its way.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    name = "multiscale_graph_conv"
    sizes = check_shapes(
        name,
        x=(x, "N C V T"),
        hops=(hops, "S V V"),
        weight=(weight, "F SC"),
        bias=(bias, "F"),
        mask=(mask, "N 1 T"),
    )
    if sizes["SC"] != sizes["S"] * sizes["C"]:
        raise ValueError(
            f"{name}: weight has {sizes['SC']} input channels, expected S*C = "
            f"{sizes['S']}*{sizes['C']} = {sizes['S'] * sizes['C']} from hops and x"
        )
    if mask is not None:
        check_mask(name, mask)
    return OPERATOR(x, hops, weight, bias, mask, backend=backend)
