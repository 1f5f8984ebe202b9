"""Dynamic graph convolution: a graph per channel plus a graph per frame, applied over the joints.

    z[n,c,u,t] = sum_v (graph[n,c,u,v] + beta * tanh(p[n,u,t] - q[n,v,t])) * x[n,c,v,t]

``graph`` (N, F, V, V) is constant over time: the channel-level adaptation and whatever static graph there
is. The frame-level graph is a function of two numbers per joint and frame, so it is built and forgotten block
by block of frames, forward and backward: of its (N, T, V, V) elements, ``BLOCK_ELEMENTS`` exist at a time.

Shapes: x (N, F, V, T), p and q (N, V, T), graph (N, F, V, V), beta (1,) -> z (N, F, V, T).
Source: arXiv 2503.15126 (dynamic spatial modelling of DSFM); splitting it by what varies is ours.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .operator import Operator, check_shapes

BLOCK_ELEMENTS = 1 << 21  # elements of the frame-level graph that exist at a time


def _dynamic_graph_conv_reference(x: Tensor, p: Tensor, q: Tensor, graph: Tensor, beta: Tensor) -> Tensor:
    n, _, v, t = x.shape
    frames = max(1, BLOCK_ELEMENTS // max(1, n * v * v))
    if n * t * v * v <= BLOCK_ELEMENTS:  # a single block may as well be kept for the backward pass
        return graph @ x + _frame_level_product(x, p, q, beta)
    # Counted in blocks, so that a compiled graph depends on their number and not on t.
    slices = [slice(i * frames, (i + 1) * frames) for i in range(-(-t // frames))]
    blocks = [_frame_level(x[..., s], p[..., s], q[..., s], beta) for s in slices]
    return graph @ x + torch.cat(blocks, dim=-1)


def _frame_level(x: Tensor, p: Tensor, q: Tensor, beta: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _frame_level_product(x, p, q, beta)
    # Checkpointing forgets the block's graph and builds it again in backward.
    return checkpoint(_frame_level_product, x, p, q, beta, use_reentrant=False, preserve_rng_state=False)


def _frame_level_product(x: Tensor, p: Tensor, q: Tensor, beta: Tensor) -> Tensor:
    graph = beta * torch.tanh(rearrange(p, "n u t -> n t 1 u") - rearrange(q, "n v t -> n t v 1"))
    # Channels before joints: what is copied then is a plain transpose of (channel and joint, frame).
    return rearrange(rearrange(x, "n f v t -> n t f v") @ graph, "n t f u -> n f u t")


def _flops(x: Tensor, p: Tensor, q: Tensor, graph: Tensor, beta: Tensor) -> tuple[int, int]:
    n, features, v, t = x.shape
    pairs = n * t * v * v
    # Forward: per pair of joints three operations for the frame graph, per channel one addition and one
    # multiply-add. Backward: the same transposed for x, and a multiply-add each for graph and frame graph.
    return pairs * (3 + 3 * features), pairs * (8 + 7 * features)


OPERATOR = Operator(_dynamic_graph_conv_reference, _flops)


def dynamic_graph_conv(
    x: Tensor, p: Tensor, q: Tensor, graph: Tensor, beta: Tensor, *, backend: str | None = None
) -> Tensor:
    """Gather over the joints with a graph per channel plus a tanh graph per frame.

    Args:
        x: Tensor (N, F, V, T).
        p, q: Tensor (N, V, T). Frame-level relation of the receiving joint u (p) and the sending joint v (q).
        graph: Tensor (N, F, V, V). Graph that does not depend on the frame; last axis is the sending joint.
        beta: Tensor (1,). Scale of the frame-level graph.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        Tensor (N, F, V, T).

    Raises:
        ValueError: the shapes do not fit together.
    """
    check_shapes(
        "dynamic_graph_conv",
        x=(x, "N F V T"),
        p=(p, "N V T"),
        q=(q, "N V T"),
        graph=(graph, "N F V V"),
        beta=(beta, "1"),
    )
    return OPERATOR(x, p, q, graph, beta, backend=backend)
