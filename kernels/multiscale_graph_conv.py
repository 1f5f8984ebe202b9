"""Multi-scale graph convolution: S hop matrices and a 1x1 convolution as one matrix product.

    y[n,o,v,t] = bias[o] + sum_(k,c) weight[o, k*C + c] * sum_u hops[k,v,u] * x[n,c,u,t]

The convolution after the hop sum is linear, so both fold into one matrix,

    M[(o,v),(c,u)] = sum_k weight[o, k*C + c] * hops[k,v,u],      y[n] = M x[n] + bias,

and no (N, S*C, V, T) tensor is formed; the gradients of ``weight`` and ``hops`` come from that of M:

    grad_M[(o,v),(c,u)] = sum_(n,t) grad_y[n,o,v,t] x[n,c,u,t],   grad_x[n] = M^T grad_y[n]
    grad_weight[o,k*C+c] = sum_(v,u) grad_M hops[k,v,u],          grad_hops[k,v,u] = sum_(o,c) grad_M weight[o,k*C+c]

Shapes: x (N, C, V, T), hops (S, V, V), weight (F, S*C), bias (F,), mask (N, 1, T) -> y (N, F, V, T).
Source: arXiv 2503.15126 (disentangled multi-scale graph); the folding is ours.

The kernel is a matrix product whose tile is all features of one joint by a block of frames, so that the sums that a
following batch norm needs are sums over rows of the tile: bias and statistics cost no pass over y. Programs of one
block of frames and different joints follow each other and find its x in the cache. In backward there is nothing to
fuse with; its products are torch.matmul's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from einops import rearrange
from torch import Tensor

from .frame_statistics import combined, new_parts, store_part
from .launch import (
    TILE_LIMIT,
    cdiv,
    dot_precision,
    exact_float32,
    kernel,
    launch,
    launchable,
    power_of_two,
    rows,
    tl,
    unit,
)
from .operator import Fused, Operator, check_mask, check_shapes
from .pointwise import pointwise


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


@kernel
def _multiscale_graph_conv_kernel(
    x_ptr, matrix_ptr, bias_ptr, mask_ptr, y_ptr, parts_ptr, F, V, K, STEPS, T, NT, P, BF: tl.constexpr,
    BK: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """matrix (V, F padded to blocks, K padded to STEPS * BK)."""
    T = T * UNIT
    i_v, i_t, i_f = tl.program_id(0) % V, (tl.program_id(0) // V) % NT, tl.program_id(1)
    i_n = (tl.program_id(0) // (V * NT)).to(tl.int64)
    o_f, o_k, o_t = tl.arange(0, BF), tl.arange(0, BK), tl.arange(0, BT)
    m_t = o_t < T - i_t * BT
    width = STEPS * BK
    x_ptr += i_n * K * T + i_t * BT
    matrix_ptr += (i_v * tl.num_programs(1) + i_f).to(tl.int64) * BF * width
    p_x = x_ptr + o_k[:, None] * T + o_t[None, :]
    p_m = matrix_ptr + o_f[:, None] * width + o_k[None, :]
    y = tl.zeros([BF, BT], tl.float32)
    for i in range(0, STEPS):
        # Rows of zeros in the matrix do not make up for a NaN beyond the last row of x.
        x = tl.load(p_x, mask=(i * BK + o_k < K)[:, None] & m_t[None, :], other=0.0)  # [BK, BT]
        y = tl.dot(tl.load(p_m), x, y, input_precision=PRECISION)
        p_x += BK * T.to(tl.int64)
        p_m += BK
    c = i_f * BF + o_f
    m_f = c < F
    y += tl.load(bias_ptr + c, mask=m_f, other=0.0).to(tl.float32)[:, None]
    y = y.to(y_ptr.dtype.element_ty)  # [BF, BT]
    y_ptr += (i_n * F * V + i_v) * T + i_t * BT
    tl.store(y_ptr + c[:, None].to(tl.int64) * (V * T) + o_t[None, :], y, mask=m_f[:, None] & m_t[None, :])
    if parts_ptr is not None:
        real = m_t & (tl.load(mask_ptr + i_n * T + i_t * BT + o_t, mask=m_t, other=0) != 0)
        count = tl.sum(real.to(tl.float32))
        values = y.to(tl.float32)[:, None, :]
        store_part(parts_ptr, tl.program_id(0), values, real[None, None, :], c, m_f, F, P, count)


def _unsupported(x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor, mask: Optional[Tensor]) -> str | None:
    if 64 * x.shape[3] >= TILE_LIMIT:
        return f"{x.shape[3]} frames exceed 32-bit offsets within a tile; split the sequence"
    return None


def _forward(
    x: Tensor, hops: Tensor, weight: Tensor, bias: Tensor, mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    (n, c, v, t), features = x.shape, len(weight)
    y = x.new_empty(n, features, v, t)
    if not launchable(x):
        return y, *combined(None if mask is None else new_parts(x, features, 0))
    x, mask = rows(x), None if mask is None else rows(mask)
    exact, align = x.dtype == torch.float32 and exact_float32(), unit(t)
    tile = {"BF": min(64, power_of_two(features, 16)), "BK": 32, "BT": 64 if exact or align == 1 else 128}
    blocks, steps, tiles = cdiv(features, tile["BF"]), cdiv(c * v, tile["BK"]), cdiv(t, tile["BT"])
    matrix = x.new_zeros(v, blocks * tile["BF"], steps * tile["BK"])
    matrix[:, :features, : c * v] = rearrange(_folded(hops, weight), "o v c u -> v o (c u)")
    parts = None if mask is None else new_parts(x, features, n * tiles * v)
    launch(
        _multiscale_graph_conv_kernel, (n * tiles * v, blocks), x, matrix, bias, mask, y, parts, features, v, c * v,
        steps, t // align, tiles, n * tiles * v, UNIT=align, PRECISION=dot_precision(x), num_warps=4,
        num_stages=3 if align > 1 else 2, **tile,
    )  # fmt: skip
    return y, *combined(parts)


def _backward(
    grad: Tensor,
    x: Tensor,
    hops: Tensor,
    weight: Tensor,
    bias: Tensor,
    mask: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, c, v, t = x.shape
    grad_rows = rearrange(grad, "n o v t -> n (o v) t")
    grad_x = grad_hops = grad_weight = grad_bias = None
    if needed[0]:
        matrix = rearrange(_folded(hops, weight).to(x.dtype), "o v c u -> (c u) (o v)")
        grad_x = torch.bmm(matrix.expand(n, -1, -1), grad_rows).view(n, c, v, t)
    if needed[1] or needed[2]:
        per_sequence = torch.bmm(grad_rows, x.flatten(1, 2).mT)
        grad_matrix = rearrange(per_sequence.sum(0, dtype=torch.float32), "(o v) (c u) -> o v c u", v=v, c=c)
        by_hop = rearrange(weight, "o (k c) -> o k c", k=len(hops)).float()
        grad_weight = rearrange(torch.einsum("ovcu,kvu->okc", grad_matrix, hops.float()), "o k c -> o (k c)")
        grad_hops = torch.einsum("ovcu,okc->kvu", grad_matrix, by_hop).to(hops.dtype)
        grad_weight = grad_weight.to(weight.dtype)
    if needed[3]:
        grad_bias = grad.sum((0, 2, 3), dtype=torch.float32).to(bias.dtype)
    return grad_x, grad_hops, grad_weight, grad_bias


OPERATOR = Operator(
    _multiscale_graph_conv_reference,
    _flops,
    Fused(_forward, _backward, differentiable=(0, 1, 2, 3), narrowed=(0,), unsupported=_unsupported),
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
