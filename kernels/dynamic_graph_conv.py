"""Dynamic graph convolution: a graph per channel plus a graph per frame, applied over the joints.

    z[n,c,u,t] = sum_v (graph[n,c,u,v] + frame[n,u,v,t]) * y[n,c,v,t],     c < F
    frame[n,u,v,t] = beta * tanh(y[n,F,u,t] - y[n,F+1,v,t]),               y = x + bias

The input has two channels more than the output: what a joint receives and what it sends, of which the graph of
a frame is made. One product gives them together with the values, and in one tensor goes their gradient. ``graph``
is constant over time: the channel-level adaptation and whatever static graph there is.

Backward, with s = frame / beta:

    grad_y[n,c,v,t] = sum_u (graph + frame) grad_z[n,c,u,t],   grad_graph[n,c,u,v] = sum_t grad_z[n,c,u,t] y[n,c,v,t]
    grad_frame[n,u,v,t] = sum_c grad_z[n,c,u,t] y[n,c,v,t],    a = beta (1 - s^2) grad_frame
    grad_y[n,F,u,t] = sum_v a,   grad_y[n,F+1,v,t] = -sum_u a,   grad_beta = sum s grad_frame

Shapes: x (N, F + 2, V, T), graph (N, F, V, V), beta (1,), bias (F + 2,), mask (N, 1, T) -> z (N, F, V, T).
Source: arXiv 2503.15126 (dynamic spatial modelling of DSFM); splitting it by what varies is ours.

The frame graph is a function of two numbers per joint and frame, so it is built and forgotten, forward and backward: by
the reference and the analytic passes block by block of frames, ``BLOCK_ELEMENTS`` or ``CACHED_ELEMENTS`` at a time, by the
kernels on chip. The kernels multiply and add in float32, in every precision: matrix units would want each value in two
layouts, one for the graph of its channel and one for the graph of its frame. docs/kernels.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .frame_statistics import combined, new_parts, store_moments
from .frame_tiles import warps
from .launch import (
    TILE_LIMIT,
    cdiv,
    device_function,
    dot_precision,
    kernel,
    launch,
    launchable,
    rows,
    target_of,
    tl,
    unit,
)
from .operator import Fused, Operator, check_mask, check_shapes
from .pointwise import add_product_of_rows

BLOCK_ELEMENTS = 1 << 21  # elements of the frame-level graph that exist at a time in the reference
CACHED_ELEMENTS = 1 << 17  # and in the analytic passes


def _dynamic_graph_conv_reference(
    x: Tensor, graph: Tensor, beta: Tensor, bias: Optional[Tensor], mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    y = x if bias is None else x + bias.to(x.dtype).view(-1, 1, 1)
    n, channels, v, t = y.shape
    value, p, q = y.split([channels - 2, 1, 1], dim=1)  # one gradient tensor; slices would make three
    p, q = p.squeeze(1), q.squeeze(1)
    # The norm that follows computes its statistics itself: autograd needs them as a function of z.
    statistics = x.new_empty(0), x.new_empty(0)
    frames = max(1, BLOCK_ELEMENTS // max(1, n * v * v))
    if n * t * v * v <= BLOCK_ELEMENTS:  # a single block may as well be kept for the backward pass
        return graph @ value + _frame_level_product(value, p, q, beta), *statistics
    # Counted in blocks, so that a compiled graph depends on their number and not on t.
    slices = [slice(i * frames, (i + 1) * frames) for i in range(-(-t // frames))]
    blocks = [_frame_level(value[..., s], p[..., s], q[..., s], beta) for s in slices]
    return graph @ value + torch.cat(blocks, dim=-1), *statistics


def _frame_level(x: Tensor, p: Tensor, q: Tensor, beta: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return _frame_level_product(x, p, q, beta)
    # Checkpointing forgets the block's graph and builds it again in backward.
    return checkpoint(_frame_level_product, x, p, q, beta, use_reentrant=False, preserve_rng_state=False)


def _frame_level_product(x: Tensor, p: Tensor, q: Tensor, beta: Tensor) -> Tensor:
    graph = beta * torch.tanh(rearrange(p, "n u t -> n t 1 u") - rearrange(q, "n v t -> n t v 1"))
    # Channels before joints: what is copied then is a plain transpose of (channel and joint, frame).
    return rearrange(rearrange(x, "n f v t -> n t f v") @ graph, "n t f u -> n f u t")


def _flops(x: Tensor, graph: Tensor, *_: object) -> tuple[int, int]:
    (n, features, v), t = graph.shape[:3], x.shape[3]
    pairs = n * t * v * v
    # Forward: per pair of joints three operations for the frame graph, per channel one addition and one
    # multiply-add. Backward: the same transposed for x, and a multiply-add each for graph and frame graph.
    return pairs * (3 + 3 * features), pairs * (8 + 7 * features)


def _analytic_forward(
    x: Tensor, graph: Tensor, beta: Tensor, bias: Optional[Tensor], mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, v, t = x.shape
    z = x.new_empty(n, channels - 2, v, t)
    for x_n, graph_n, z_n in zip(x, graph, z):
        value, relations = x_n.split([channels - 2, 2])
        # A biased copy of x would cost more than what the bias adds to each sum.
        if bias is None:
            torch.bmm(graph_n, value, out=z_n)
        else:
            torch.baddbmm(graph_n.sum(2, keepdim=True) * bias[:-2].view(-1, 1, 1), graph_n, value, out=z_n)
        for frames in _blocks(t, v):
            s = _saturated(relations, bias, frames, beta)
            z_n[..., frames].add_(torch.bmm(_values(value, bias, frames), s).permute(1, 2, 0))
    return z, x.new_empty(0), x.new_empty(0)


def _analytic_backward(
    grad: Tensor,
    x: Tensor,
    graph: Tensor,
    beta: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, features, v, t = grad.shape
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_graph = torch.empty_like(graph, memory_format=torch.contiguous_format)
    grad_beta = torch.zeros_like(beta)
    for x_n, graph_n, grad_n, grad_x_n, grad_graph_n in zip(x, graph, grad, grad_x, grad_graph):
        value, relations = x_n.split([features, 2])
        grad_value, grad_relations = grad_x_n.split([features, 2])
        torch.bmm(graph_n.mT, grad_n, out=grad_value)
        torch.bmm(grad_n, value.mT, out=grad_graph_n)
        if bias is not None:
            grad_graph_n += grad_n.sum(2, keepdim=True) * bias[:-2].view(-1, 1, 1)
        for frames in _blocks(t, v):
            s, g = _saturated(relations, bias, frames), _frames_first(grad_n, frames)
            grad_value[..., frames].add_(torch.bmm(g, (beta * s).mT).permute(1, 2, 0))
            grad_frame = torch.bmm(_values(value, bias, frames).mT, g)  # (t, v, u)
            grad_beta += torch.dot(s.flatten(), grad_frame.flatten())
            a = torch.ops.aten.tanh_backward.grad_input(grad_frame, s, grad_input=s).mul_(beta)
            grad_relations[0, :, frames] = a.sum(1).mT
            grad_relations[1, :, frames] = a.sum(2).neg_().mT
    return grad_x, grad_graph, grad_beta, None if bias is None else grad_x.sum(3).sum((0, 2))


def _blocks(t: int, v: int) -> list[slice]:
    """Blocks of frames whose graphs stay in a core's cache."""
    frames = max(1, CACHED_ELEMENTS // (v * v))
    return [slice(start, min(start + frames, t)) for start in range(0, t, frames)]


def _frames_first(x: Tensor, frames: slice) -> Tensor:
    """A copy (F, V, T) -> (t, F, V)."""
    return x[..., frames].permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def _values(value: Tensor, bias: Tensor | None, frames: slice) -> Tensor:
    """y of one sequence, (t, F, V)."""
    y = _frames_first(value, frames)
    if bias is not None:  # over rows of all channels and joints, which are long
        y.flatten(1).add_(bias[:-2].repeat_interleave(y.shape[2]))
    return y


def _saturated(relations: Tensor, bias: Tensor | None, frames: slice, scale: Tensor | float = 1.0) -> Tensor:
    """s of one sequence times a scale, transposed: (t, v, u)."""
    y = _frames_first(relations, frames)  # a difference of transposed tensors would be a transposed one
    if bias is not None:
        y.add_(bias[-2:].unsqueeze(1))
    # tanh(x) = 2 sigmoid(2 x) - 1, which is faster than torch.tanh on a CPU.
    received, sent = y.mul_(2).split(1, 1)
    return (received - sent.mT).sigmoid_().mul_(2 * scale).sub_(scale)


# The kernels split every axis in two: R.. consecutive indices in one thread, L.. across threads. Triton gives the last
# axes of a tensor to the threads, so each thread multiplies a small block of every axis and loads it in vectors.


@device_function
def _indices(R: tl.constexpr, L: tl.constexpr):
    """Indices of an axis as a tensor [R, L]: consecutive ones belong to one thread."""
    return tl.arange(0, R)[:, None] + R * tl.arange(0, L)[None, :]


@device_function
def _outer(x, y):
    """Sums x + y of two axes each: [A, LA], [B, LB] -> [A, B, LA, LB]."""
    return x[:, None, :, None] + y[None, :, None, :]


@device_function
def _both(x, y):
    """Masks x & y of two axes each: [A, LA], [B, LB] -> [A, B, LA, LB]."""
    return x[:, None, :, None] & y[None, :, None, :]


@device_function
def _tanh(d):
    # tanh(d) = 1 - 2 / (exp(2 d) + 1); exp(2 d) = exp2(2 d / log 2) reaches 0 or infinity without harm.
    return 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * d) + 1.0)


@device_function
def _relation_bias(bias_ptr, channel):
    if bias_ptr is None:
        return 0.0
    else:
        return tl.load(bias_ptr + channel).to(tl.float32)


@kernel
def _dynamic_graph_conv_apply_kernel(
    x_ptr, relation_ptr, graph_ptr, beta_ptr, bias_ptr, mask_ptr, out_ptr, parts_ptr, sums_ptr, F, V, T, RELATIONS, NC,
    P, REVERSE: tl.constexpr, RC: tl.constexpr, RU: tl.constexpr, RT: tl.constexpr, LC: tl.constexpr, LU: tl.constexpr,
    LT: tl.constexpr, STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Apply both graphs to values, or transposed to their gradient (REVERSE).

    relation_ptr: what is received and sent, float32, a sequence ``RELATIONS`` channels behind the one before. graph_ptr: the
    constant graph (N, sending joint, F, receiving joint), padded with zeros to blocks of receiving joints;
    of the gradient's, receivers send. parts_ptr: statistics of the output; sums_ptr: sums over joints and frames, (P, F).
    """
    T = T * UNIT
    plane = (V * T).to(tl.int64)
    i_c, i_t, i_u = tl.program_id(0) % NC, tl.program_id(0) // NC, tl.program_id(1)
    i_n = tl.program_id(2).to(tl.int64)
    BU: tl.constexpr = RU * LU
    BT: tl.constexpr = RT * LT
    o_c, o_u, o_t = _indices(RC, LC), _indices(RU, LU), _indices(RT, LT)
    m_t = o_t < T - i_t * BT
    if REVERSE:
        x_ptr += i_n * F * plane
        out_ptr += i_n * (F + 2) * plane
    else:
        x_ptr += i_n * (F + 2) * plane
        out_ptr += i_n * F * plane
    first = i_c * (RC * LC)
    p_x = x_ptr + first * plane + i_t * BT + _outer(o_c * (V * T), o_t)
    width = tl.num_programs(1) * BU
    graph_ptr += (i_n * V * F + first) * width + i_u * BU
    p_graph = graph_ptr + _outer(o_c * width, o_u)
    # The graph of a frame is made by all threads, each number once, and then spread to those that need it.
    f_u, f_t = i_u * BU + tl.arange(0, BU), tl.arange(0, BT)
    m_f = f_t < T - i_t * BT
    relation_ptr += i_n * RELATIONS * plane + i_t * BT
    p_own = relation_ptr + REVERSE * plane + f_u[:, None] * T + f_t[None, :]
    p_other = relation_ptr + (1 - REVERSE) * plane + f_t
    own = tl.load(p_own, mask=(f_u < V)[:, None] & m_f[None, :], other=0.0)
    shift = _relation_bias(bias_ptr, F) - _relation_bias(bias_ptr, F + 1)
    beta = tl.load(beta_ptr).to(tl.float32)
    if REVERSE:
        shift, beta = -shift, -beta
    own += shift
    if bias_ptr is not None and not REVERSE:
        bias = tl.load(bias_ptr + first + o_c).to(tl.float32)
    z = tl.zeros([RC, RU, RT, LC, LU, LT], tl.float32)
    for _ in tl.range(0, V, num_stages=STAGES):
        x = tl.load(p_x, mask=m_t[None, :, None, :], other=0.0).to(tl.float32)  # [RC, RT, LC, LT]
        graph = tl.load(p_graph)  # [RC, RU, LC, LU]
        other = tl.load(p_other, mask=m_f, other=0.0)
        if bias_ptr is not None and not REVERSE:
            x += bias[:, None, :, None]
        frame = beta * _tanh(own - other[None, :])  # [BU, BT]
        frame = tl.permute(tl.reshape(frame, [LU, RU, LT, RT]), (1, 3, 0, 2))
        z += (graph[:, :, None, :, :, None] + frame[None, :, :, None, :, :]) * x[:, None, :, :, None, :]
        p_x += T
        p_graph += F * width
        p_other += T
    u = i_u * BU + o_u
    channel = first + o_c
    i_p = (i_n * tl.num_programs(1) + i_u) * (tl.num_programs(0) // NC) + i_t
    if parts_ptr is not None:
        real = m_t & (tl.load(mask_ptr + i_n * T + i_t * BT + o_t, mask=m_t, other=0) != 0)
        m_z = _both(u < V, real)  # [RU, RT, LU, LT]
        count = tl.sum(tl.sum(real.to(tl.float32), 1), 0) * tl.minimum(V - i_u * BU, BU).to(tl.float32)
        mean = _sum_of_channels(tl.where(m_z[None, :, :, None], z, 0.0)) / tl.maximum(count, 1.0)
        deviation = tl.where(m_z[None, :, :, None], z - mean[:, None, None, :, None, None], 0.0)
        squares = _sum_of_channels(deviation * deviation)
        store_moments(parts_ptr, i_p, count, mean, squares, channel, channel < F, F, P)
    if sums_ptr is not None:
        inside = (u < V)[None, :, None, None, :, None]
        tl.store(sums_ptr + i_p * F + channel, _sum_of_channels(tl.where(inside, z, 0.0)))
    out_ptr += first * plane + i_t * BT
    p_out = out_ptr + (
        (o_c * (V * T))[:, None, None, :, None, None] + _outer(u * T, o_t)[None, :, :, None, :, :]
    )
    tl.store(p_out, z.to(out_ptr.dtype.element_ty), mask=_both(u < V, m_t)[None, :, :, None])


@device_function
def _sum_of_channels(z):
    """[RC, RU, RT, LC, LU, LT] -> [RC, LC]"""
    return tl.sum(tl.sum(tl.sum(tl.sum(z, 2), 1), 3), 2)


@kernel
def _dynamic_graph_conv_relation_kernel(
    grad_ptr, x_ptr, beta_ptr, bias_ptr, grad_x_ptr, received_ptr, sent_ptr, scalars_ptr, N, F, V, T, NV: tl.constexpr,
    RU: tl.constexpr, RV: tl.constexpr, RT: tl.constexpr, LU: tl.constexpr, LV: tl.constexpr, LT: tl.constexpr,
    STAGES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Gradients of what is received and sent, and of beta, from a pair of blocks of joints.

    With several blocks, partial sums of what is received and sent lie behind one another.
    """
    T = T * UNIT
    plane = (V * T).to(tl.int64)
    i_t, i_uv, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_u, i_v = i_uv // NV, i_uv % NV
    BT: tl.constexpr = RT * LT
    o_t = _indices(RT, LT)
    u, v = i_u * (RU * LU) + _indices(RU, LU), i_v * (RV * LV) + _indices(RV, LV)
    m_t = o_t < T - i_t * BT
    m_u, m_v = _both(u < V, m_t), _both(v < V, m_t)
    o_ut, o_vt = _outer(u * T, o_t), _outer(v * T, o_t)
    x_ptr += i_n * (F + 2) * plane + i_t * BT
    grad_x_ptr += i_n * (F + 2) * plane + i_t * BT
    p_grad, p_x = grad_ptr + i_n * F * plane + i_t * BT + o_ut, x_ptr + o_vt
    total = tl.zeros([RU, RV, RT, LU, LV, LT], tl.float32)
    for c in tl.range(0, F, num_stages=STAGES):
        grad = tl.load(p_grad, mask=m_u, other=0.0).to(tl.float32)  # [RU, RT, LU, LT]
        x = tl.load(p_x, mask=m_v, other=0.0).to(tl.float32)  # [RV, RT, LV, LT]
        if bias_ptr is not None:
            x += tl.load(bias_ptr + c).to(tl.float32)
        total += grad[:, None, :, :, None, :] * x[None, :, :, None, :, :]
        p_grad += plane
        p_x += plane
    beta = tl.load(beta_ptr).to(tl.float32)
    received = tl.load(x_ptr + F * plane + o_ut, mask=m_u, other=0.0).to(tl.float32)
    received += _relation_bias(bias_ptr, F) - _relation_bias(bias_ptr, F + 1)
    sent = tl.load(x_ptr + (F + 1) * plane + o_vt, mask=m_v, other=0.0).to(tl.float32)
    # It is zero beyond the receivers and the frames, but not beyond the senders, whose bias was added.
    total = tl.where((v < V)[None, :, None, None, :, None], total, 0.0)
    s = _tanh(received[:, None, :, :, None, :] - sent[None, :, :, None, :, :])
    i_p = (i_n * tl.num_programs(1) + i_uv) * tl.num_programs(0) + i_t
    by_s = s * total
    tl.store(scalars_ptr + 2 * i_p, _sum_of_all(by_s))
    a = beta * (total - s * by_s)
    tl.store(scalars_ptr + 2 * i_p + 1, _sum_of_all(a))
    of_receivers, of_senders = tl.sum(tl.sum(a, 1), 3), -tl.sum(tl.sum(a, 0), 2)
    if NV == 1:  # nothing to be added up: straight into the last two channels of the gradient
        dtype = grad_x_ptr.dtype.element_ty
        tl.store(grad_x_ptr + F * plane + o_ut, of_receivers.to(dtype), mask=m_u)
        tl.store(grad_x_ptr + (F + 1) * plane + o_vt, of_senders.to(dtype), mask=m_v)
    else:
        tl.store(received_ptr + (i_v * N + i_n) * plane + i_t * BT + o_ut, of_receivers, mask=m_u)
        tl.store(sent_ptr + (i_u * N + i_n) * plane + i_t * BT + o_vt, of_senders, mask=m_v)


@device_function
def _sum_of_all(x):
    return tl.sum(tl.sum(tl.sum(tl.sum(tl.sum(tl.sum(x, 2), 1), 0), 2), 1), 0)


@kernel
def _dynamic_graph_conv_graph_kernel(
    grad_ptr, x_ptr, bias_ptr, out_ptr, F, V, T, STEPS, BV: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block of the constant graph of one channel over ``STEPS`` blocks of frames."""
    T = T * UNIT
    plane = (V * T).to(tl.int64)
    i_nf, i_s = tl.program_id(0), tl.program_id(1)
    blocks = tl.cdiv(V, BV)
    i_u, i_v = tl.program_id(2) // blocks, tl.program_id(2) % blocks
    i_n, i_f = (i_nf // F).to(tl.int64), i_nf % F
    o_u, o_v, o_t = i_u * BV + tl.arange(0, BV), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    x_ptr += (i_n * (F + 2) + i_f) * plane
    grad_ptr += i_nf.to(tl.int64) * plane
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + i_f).to(tl.float32)
    total = tl.zeros([BV, BV], tl.float32)
    for i in range(0, STEPS):
        t = (i_s * STEPS + i) * BT + o_t
        m_t = (t < T)[None, :]
        # [BU, BT] and [BV, BT]
        grad = tl.load(grad_ptr + o_u[:, None] * T + t[None, :], mask=(o_u < V)[:, None] & m_t, other=0.0)
        x = tl.load(x_ptr + o_v[:, None] * T + t[None, :], mask=(o_v < V)[:, None] & m_t, other=0.0)
        if bias_ptr is not None:
            x = (x + bias).to(x.dtype)
        total = add_product_of_rows(grad, x, total, PRECISION)
    place = (i_s * tl.num_programs(0).to(tl.int64) + i_nf) * (V * V)
    inside = (o_u < V)[:, None] & (o_v < V)[None, :]
    tl.store(out_ptr + place + o_u[:, None] * V + o_v[None, :], total, mask=inside)


STAGES = 2
"""Loads of the next step on their way while one is computed."""


def _blocks_of_joints(v: int) -> int:
    """Joints of a block: a thread holds an eighth of 32, a quarter of 16."""
    return 32 if v > 16 else 16


def _apply_tiling(x: Tensor, features: int) -> dict[str, int]:
    """4 channels, 8 joints and 4 frames for each of 128 threads, fewer where there are not as many."""
    channels = next(c for c in (32, 16, 8) if features % c == 0)
    joints = _blocks_of_joints(x.shape[2])
    return {"RC": channels // 8, "LC": 8, "RU": joints // 4, "LU": 4} | _frame_tiling(x, 32)


def _relation_tiling(x: Tensor) -> dict[str, int]:
    """8 receiving joints, 4 sending ones and 4 frames for each of 128 threads; in half precision 8, 8 and 2.

    Half-precision operands are converted by every thread for itself, so that fewer of them are better.
    """
    joints, senders = _blocks_of_joints(x.shape[2]), 8 if x.dtype == torch.float32 else 4
    return {
        "RU": joints // 4, "LU": 4, "RV": joints // senders, "LV": senders, "NV": cdiv(x.shape[2], joints),
    } | _frame_tiling(x, 4 * senders)  # fmt: skip


def _frame_tiling(x: Tensor, others: int) -> dict[str, int]:
    """Tiles of 16 frames among 128 threads, ``others`` of which share frames."""
    # Twice as many threads, with half as much each, where code needs more registers: on AMD, and for unaligned rows.
    threads = 256 if target_of(x).backend == "hip" or unit(x.shape[3]) == 1 else 128
    frames = threads // others
    return {
        "RT": 16 // frames, "LT": frames, "UNIT": unit(x.shape[3]), "STAGES": STAGES, "num_warps": warps(x, threads),
    }  # fmt: skip


def _unsupported(
    x: Tensor, graph: Tensor, beta: Tensor, bias: Optional[Tensor], mask: Optional[Tensor]
) -> str | None:
    n, channels, v, t = x.shape
    if n > 65_535:
        return f"there are {n} sequences; the kernels take up to 65535"
    if (channels - 2) % 8 or channels < 10:
        return f"there are {channels - 2} features; the kernels need a multiple of 8"
    if v > 128:
        return f"there are {v} joints; the kernels take up to 128"
    if 16 * v * t >= TILE_LIMIT:
        return f"{v} joints and {t} frames exceed 32-bit offsets within a tile; split the sequence"
    return None


def _packed(graph: Tensor) -> Tensor:
    """The graph as (N, sending joint, F, receiving joint) in float32, padded with zeros to blocks of receiving joints."""
    n, features, v, _ = graph.shape
    joints = _blocks_of_joints(v)
    packed = graph.new_zeros(n, v, features, cdiv(v, joints) * joints, dtype=torch.float32)
    packed[..., :v] = graph.permute(0, 3, 1, 2)
    return packed


def _forward(
    x: Tensor, graph: Tensor, beta: Tensor, bias: Optional[Tensor], mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, v, t = x.shape
    z = x.new_empty(n, channels - 2, v, t)
    if not launchable(x):
        return z, *combined(None if mask is None else new_parts(x, channels - 2, 0))
    x, mask = rows(x), None if mask is None else rows(mask)
    parts, _ = _apply(x, x, graph, beta, bias, mask, z, sums=False)
    return z, *combined(parts)


def _apply(
    x: Tensor, relations: Tensor, graph: Tensor, beta: Tensor, bias: Tensor | None, mask: Tensor | None, out: Tensor,
    *, sums: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Apply the graphs to x, or transposed to a gradient x, for which ``out`` has two channels more.

    Returns the parts of the statistics of ``out``, if there is a mask, and of its sums over joints and frames, if wanted.
    """
    n, features, v, _ = graph.shape
    t, tiling = x.shape[3], _apply_tiling(x, features)
    blocks, tiles = cdiv(v, _blocks_of_joints(v)), cdiv(t, tiling["RT"] * tiling["LT"])
    count, groups = n * blocks * tiles, features // (tiling["RC"] * tiling["LC"])
    parts = None if mask is None else new_parts(x, features, count)
    channel_sums = x.new_empty(count, features, dtype=torch.float32) if sums else None
    reverse = out.shape[1] > features
    # Half-precision relations are widened here: Triton would convert them, and make the graph, once for each channel.
    gap = features + 2 if relations.dtype == torch.float32 else 2
    relations = relations[:, features:].float()
    launch(
        _dynamic_graph_conv_apply_kernel, (tiles * groups, blocks, n), x, relations,
        _packed(graph.mT if reverse else graph), beta, bias, mask, out, parts, channel_sums, features, v,
        t // tiling["UNIT"], gap, groups, count, REVERSE=int(reverse), **tiling,
    )  # fmt: skip
    return parts, channel_sums


def _backward(
    grad: Tensor,
    x: Tensor,
    graph: Tensor,
    beta: Tensor,
    bias: Optional[Tensor],
    mask: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_graph = torch.empty_like(graph, memory_format=torch.contiguous_format)
    grad_beta = torch.empty_like(beta)
    grad_bias = None if bias is None else torch.empty_like(bias)
    if launchable(x):
        if grad.numel() == 0:
            return grad_x, grad_graph.zero_(), grad_beta.zero_(), None if bias is None else grad_bias.zero_()
        x, grad = rows(x), rows(grad)
        if needed[0] or needed[2] or needed[3]:
            grad_beta, grad_bias = _backward_input(grad, x, graph, beta, bias, grad_x)
        if needed[1]:
            grad_graph = _backward_graph(grad, x, graph, bias)
    return grad_x, grad_graph, grad_beta, grad_bias


def _backward_input(
    grad: Tensor, x: Tensor, graph: Tensor, beta: Tensor, bias: Tensor | None, grad_x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Write the gradient of x; return those of beta and bias."""
    n, features, v, t = grad.shape

    def new(*shape: int) -> Tensor:
        return x.new_empty(*shape, dtype=torch.float32)

    _, channel_sums = _apply(grad, x, graph, beta, bias, None, grad_x, sums=bias is not None)
    tiling = _relation_tiling(x)
    blocks, tiles = tiling["NV"], cdiv(t, tiling["RT"] * tiling["LT"])
    received, sent = (new(blocks, n, v, t), new(blocks, n, v, t)) if blocks > 1 else (None, None)
    scalars = new(tiles * n * blocks**2, 2)
    launch(
        _dynamic_graph_conv_relation_kernel, (tiles, blocks**2, n), grad, x, beta, bias, grad_x, received, sent,
        scalars, n, features, v, t // tiling["UNIT"], **tiling,
    )  # fmt: skip
    if blocks > 1:
        grad_x[:, features], grad_x[:, features + 1] = received.sum(0), sent.sum(0)
    grad_beta, shift = scalars.sum(0).split(1)
    if bias is None:
        return grad_beta.to(beta.dtype), None
    return grad_beta.to(beta.dtype), torch.cat([channel_sums.sum(0), shift, -shift]).to(bias.dtype)


def _backward_graph(grad: Tensor, x: Tensor, graph: Tensor, bias: Tensor | None) -> Tensor:
    n, features, v, t = grad.shape
    align = unit(t)
    joints, frames = _blocks_of_joints(v), 32
    # A program's sum over time is cut where there are too few programs to fill a GPU.
    steps = cdiv(cdiv(t, frames), cdiv(2048, n * features))
    splits = cdiv(cdiv(t, frames), steps)
    out = x.new_empty(splits, n, features, v, v, dtype=torch.float32)
    launch(
        _dynamic_graph_conv_graph_kernel, (n * features, splits, cdiv(v, joints) ** 2), grad, x, bias, out, features, v,
        t // align, steps, BV=joints, BT=frames, UNIT=align, PRECISION=dot_precision(x), num_warps=2, num_stages=3,
    )  # fmt: skip
    return out.sum(0).to(graph.dtype)


OPERATOR = Operator(
    _dynamic_graph_conv_reference,
    _flops,
    Fused(_forward, _backward, differentiable=(0, 1, 2, 3), narrowed=(0,), unsupported=_unsupported),
    statistics=2,
    analytic=Fused(_analytic_forward, _analytic_backward, differentiable=(0, 1, 2, 3)),
)


def dynamic_graph_conv(
    x: Tensor,
    graph: Tensor,
    beta: Tensor,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather over the joints with a graph per channel plus a tanh graph per frame.

    Args:
        x: Tensor (N, F + 2, V, T). F channels of values, then the frame-level relation of the receiving joint and
            that of the sending joint.
        graph: Tensor (N, F, V, V). Graph that does not depend on the frame; last axis is the sending joint.
        beta: Tensor (1,). Scale of the frame-level graph.
        bias: Tensor (F + 2,), optional. Added to x.
        mask: bool Tensor (N, 1, T), optional. True on real frames. Where it is given, statistics are returned if they
            come for free; the output is the same.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        z: Tensor (N, F, V, T).
        mean, var: Tensor (F,) each, without gradient. Mean and biased variance of z over joints and real frames, for
            :func:`.masked_batch_norm`; (0,) without a mask and where the backend does not compute them on its way.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    name = "dynamic_graph_conv"
    sizes = check_shapes(
        name,
        x=(x, "N FR V T"),
        graph=(graph, "N F V V"),
        beta=(beta, "1"),
        bias=(bias, "FR"),
        mask=(mask, "N 1 T"),
    )
    if sizes["FR"] != sizes["F"] + 2:
        raise ValueError(
            f"{name}: x has {sizes['FR']} channels, expected F + 2 = {sizes['F'] + 2}: the F of graph and two relations"
        )
    if mask is not None:
        check_mask(name, mask)
    return OPERATOR(x, graph, beta, bias, mask, backend=backend)
