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
kernels on chip, where a program takes all joints of a few frames. Both graphs apply as batches of small products on the
matrix units: over frames for the frame graph, (u, v) x (v, c), over channels for the constant one, (u, v) x (v, t). As
multiplications and additions one by one they would take as long as the memory traffic of float32, and twice that of half
precision.

What was tried, by the compiled code (sm_90, triton 3.7.1, 2026-11-25; no time was measured yet):

- Padding the constant graph with zeros to whole tiles makes its loads wide and unmasked: 1440 instead of 1792
  instructions and 128 instead of 255 registers in bfloat16. Kept.
- The statistics of z and the bias of x are fused: each saves a pass over a tensor of the size of z. The bias would
  cost more than one outside, as a batched product with a bias first copies the bias over its whole output.
- The 1x1 product that makes x fused into the forward kernel: 215 instead of 100 registers in bfloat16, spills in
  three-fold tf32. It saves two passes forward, and backward needs x again, which costs them there. Left out.
- One backward launch for values and relations reads grad_z once. Three-fold tf32 operands and float32 on AMD do
  not fit (they spill some 1000 bytes): two launches there. The gradient of the constant graph is a sum over time
  and wants other tiles: a launch of its own, which reads x and grad_z again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .frame_statistics import combined, new_parts, store_part
from .launch import (
    TILE_LIMIT,
    cdiv,
    device_function,
    dot_precision,
    exact_float32,
    kernel,
    launch,
    launchable,
    rows,
    target_of,
    tl,
    unit,
)
from .operator import Fused, Operator, check_mask, check_shapes

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


@device_function
def _load_relation(y_ptr, bias_ptr, channel, plane, o_v, o_t, V, T, m_t):
    """Channel ``channel`` of y at joints o_v and frames o_t, transposed: [BT, BV]."""
    inside = m_t[:, None] & (o_v < V)[None, :]
    r = tl.load(y_ptr + channel * plane + o_v[None, :] * T + o_t[:, None], mask=inside, other=0.0).to(
        tl.float32
    )
    if bias_ptr is not None:
        r += tl.load(bias_ptr + channel).to(tl.float32)
    return r


@device_function
def _tanh_graph(received, sent):
    """tanh of every difference: received [BT, BU], sent [BT, BV] -> [BT, BU, BV]."""
    # tanh(d) = 1 - 2 / (exp(2 d) + 1); exp(2 d) = exp2(2 d / log 2) reaches 0 or infinity without harm.
    return 1.0 - 2.0 / (tl.exp2(2.8853900817779268 * (received[:, :, None] - sent[:, None, :])) + 1.0)


@device_function
def _load_value(y_ptr, bias_ptr, channel, o_c, F, plane, o_v, o_t, V, T, m_t, EVEN: tl.constexpr):
    """y of channels ``channel`` + o_c at joints o_v and frames o_t: [BC, BV, BT], zero where there is no joint."""
    inside = ((o_v < V)[:, None] & m_t[None, :])[None]
    if not EVEN:
        inside = inside & (channel + o_c < F)[:, None, None]
    offsets = o_c[:, None, None] * plane.to(tl.int32) + (o_v[:, None] * T + o_t[None, :])[None]
    y = tl.load(y_ptr + channel * plane + offsets, mask=inside, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel + o_c, mask=channel + o_c < F, other=0.0)[:, None] + tl.zeros_like(
            o_v
        )[None, :].to(tl.float32)
        y = (y + tl.where((o_v < V)[None, :], bias, 0.0)[:, :, None]).to(y.dtype)
    return y


@device_function
def _load_graph(graph_ptr, channel, o_c, o_u, o_v, PV: tl.constexpr, dtype: tl.constexpr):
    """Padded graph of channels ``channel`` + o_c between joints o_u and o_v: [BC, BU, BV]."""
    offsets = (o_c[:, None, None] * PV + o_u[None, :, None]) * PV + o_v[None, None, :]
    return tl.load(graph_ptr + channel * (PV * PV) + offsets).to(dtype)


@device_function
def _add_products(constant, by_frame, graph, frame, values, PRECISION: tl.constexpr):
    """Add graph @ values per channel (BC, BU, BT) and frame @ values per frame (BT, BU, BC); values (BC, BV, BT)."""
    constant = tl.dot(graph, values, constant, input_precision=PRECISION)
    return constant, tl.dot(frame, tl.permute(values, (2, 1, 0)), by_frame, input_precision=PRECISION)


@kernel
def _dynamic_graph_conv_forward_kernel(
    x_ptr, graph_ptr, beta_ptr, bias_ptr, mask_ptr, z_ptr, parts_ptr, F, V, T, P, EVEN: tl.constexpr,
    NV: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    T = T * UNIT
    plane = (V * T).to(tl.int64)
    i_t, i_u, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    PV: tl.constexpr = NV * BV
    dtype = x_ptr.dtype.element_ty
    o_c, o_j, o_t = tl.arange(0, BC), tl.arange(0, BV), tl.arange(0, BT)
    o_u = i_u * BV + o_j
    m_t = o_t < T - i_t * BT
    x_ptr += i_n * (F + 2) * plane + i_t * BT
    z_ptr += i_n * F * plane + i_t * BT
    graph_ptr += i_n * tl.cdiv(F, BC) * (BC * PV * PV)
    beta = tl.load(beta_ptr).to(tl.float32)
    received = _load_relation(x_ptr, bias_ptr, F, plane, o_u, o_t, V, T, m_t)
    if NV == 1:
        sent = _load_relation(x_ptr, bias_ptr, F + 1, plane, o_j, o_t, V, T, m_t)
        frame = (beta * _tanh_graph(received, sent)).to(dtype)  # [BT, BU, BV]
    if parts_ptr is not None:
        m_real = m_t & (tl.load(mask_ptr + i_n * T + i_t * BT + o_t, mask=m_t, other=0) != 0)
        m_z = ((o_u < V)[:, None] & m_real[None, :])[None]
        count = tl.sum(m_real.to(tl.float32)) * tl.sum((o_u < V).to(tl.float32))
        i_p = (i_n * tl.num_programs(1) + i_u) * tl.num_programs(0) + i_t
    inside = ((o_u < V)[:, None] & m_t[None, :])[None]
    o_z = o_c[:, None, None] * (V * T) + (o_u[:, None] * T + o_t[None, :])[None]
    for c in range(0, F, BC):
        constant = tl.zeros([BC, BV, BT], tl.float32)
        by_frame = tl.zeros([BT, BV, BC], tl.float32)
        for j in range(0, NV):
            o_v = j * BV + o_j
            y = _load_value(x_ptr, bias_ptr, c, o_c, F, plane, o_v, o_t, V, T, m_t, EVEN)  # [BC, BV, BT]
            graph = _load_graph(graph_ptr, c, o_c, o_u, o_v, PV, dtype)  # [BC, BU, BV]
            if NV > 1:
                sent = _load_relation(x_ptr, bias_ptr, F + 1, plane, o_v, o_t, V, T, m_t)
                frame = (beta * _tanh_graph(received, sent)).to(dtype)
            constant, by_frame = _add_products(constant, by_frame, graph, frame, y, PRECISION)
        z = (constant + tl.permute(by_frame, (2, 1, 0))).to(dtype)  # [BC, BU, BT]
        m_c = c + o_c < F
        tl.store(z_ptr + c * plane + o_z, z, mask=inside & m_c[:, None, None])
        if parts_ptr is not None:
            store_part(parts_ptr, i_p, z.to(tl.float32), m_z, c + o_c, m_c, F, P, count)


@kernel
def _dynamic_graph_conv_backward_kernel(
    grad_ptr, x_ptr, graph_ptr, beta_ptr, bias_ptr, grad_x_ptr, received_ptr, sent_ptr, scalars_ptr, grad_bias_ptr,
    N, F, V, T, VALUE: tl.constexpr, RELATION: tl.constexpr, EVEN: tl.constexpr,
    NV: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """VALUE: gradient of the values. RELATION: gradients of what is received and sent, and of beta.

    As two launches, the first has a program for each block of senders, the second one for each pair of blocks;
    partial sums of pairs lie behind one another.
    """
    T = T * UNIT
    plane = (V * T).to(tl.int64)
    i_t, i_uv, i_n = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_u, i_v = i_uv // NV, i_uv % NV
    PV: tl.constexpr = NV * BV
    dtype = x_ptr.dtype.element_ty
    o_c, o_j, o_t = tl.arange(0, BC), tl.arange(0, BV), tl.arange(0, BT)
    o_v = i_v * BV + o_j
    m_t = o_t < T - i_t * BT
    x_ptr += i_n * (F + 2) * plane + i_t * BT
    grad_ptr += i_n * F * plane + i_t * BT
    grad_x_ptr += i_n * (F + 2) * plane + i_t * BT
    if VALUE:
        graph_ptr += i_n * tl.cdiv(F, BC) * (BC * PV * PV)
    beta = tl.load(beta_ptr).to(tl.float32)
    sent = _load_relation(x_ptr, bias_ptr, F + 1, plane, o_v, o_t, V, T, m_t)
    if NV == 1 or RELATION:
        o_u = i_u * BV + o_j
        received = _load_relation(x_ptr, bias_ptr, F, plane, o_u, o_t, V, T, m_t)
    if VALUE and NV == 1:
        # Made transposed, since that is how it is used: [BT, BV, BU].
        frame = (-beta * _tanh_graph(sent, received)).to(dtype)
    if RELATION:
        grad_frame = tl.zeros([BT, BV, BV], tl.float32)
    inside = ((o_v < V)[:, None] & m_t[None, :])[None]
    o_x = o_c[:, None, None] * (V * T) + (o_v[:, None] * T + o_t[None, :])[None]
    for c in range(0, F, BC):
        if NV == 1 or not VALUE:
            grad = _load_value(grad_ptr, None, c, o_c, F, plane, o_u, o_t, V, T, m_t, EVEN)  # [BC, BU, BT]
        if VALUE:
            constant = tl.zeros([BC, BV, BT], tl.float32)
            by_frame = tl.zeros([BT, BV, BC], tl.float32)
            # The graph comes transposed: [BC, BV, BU].
            if NV == 1:
                graph = _load_graph(graph_ptr, c, o_c, o_v, o_u, PV, dtype)
                constant, by_frame = _add_products(constant, by_frame, graph, frame, grad, PRECISION)
            else:
                for j in range(0, NV):
                    o_r = j * BV + o_j
                    block = _load_value(grad_ptr, None, c, o_c, F, plane, o_r, o_t, V, T, m_t, EVEN)
                    graph = _load_graph(graph_ptr, c, o_c, o_v, o_r, PV, dtype)
                    receiving = _load_relation(x_ptr, bias_ptr, F, plane, o_r, o_t, V, T, m_t)
                    by_block = (-beta * _tanh_graph(sent, receiving)).to(dtype)
                    constant, by_frame = _add_products(constant, by_frame, graph, by_block, block, PRECISION)
            grad_x = constant + tl.permute(by_frame, (2, 1, 0))  # [BC, BV, BT]
            m_c = c + o_c < F
            tl.store(grad_x_ptr + c * plane + o_x, grad_x.to(dtype), mask=inside & m_c[:, None, None])
            if grad_bias_ptr is not None:
                i_p = (i_n * tl.num_programs(1) + i_uv) * tl.num_programs(0) + i_t
                total = tl.sum(tl.sum(tl.where(inside, grad_x, 0.0), 2), 1)
                tl.store(grad_bias_ptr + i_p * F + c + o_c, total, mask=m_c)
        if RELATION:
            y = _load_value(x_ptr, bias_ptr, c, o_c, F, plane, o_v, o_t, V, T, m_t, EVEN)  # [BC, BV, BT]
            grad_frame = tl.dot(
                tl.permute(grad, (2, 1, 0)), tl.permute(y, (2, 0, 1)), grad_frame, input_precision=PRECISION
            )  # [BT, BU, BV]
    if RELATION:
        real = m_t[:, None, None] & ((o_u < V)[:, None] & (o_v < V)[None, :])[None]
        grad_frame = tl.where(real, grad_frame, 0.0)
        s = _tanh_graph(received, sent)
        a = beta * (1.0 - s * s) * grad_frame  # [BT, BU, BV]
        total_beta = tl.sum(tl.sum(tl.sum(s * grad_frame, 2), 1), 0)
        total_shift = tl.sum(tl.sum(tl.sum(a, 2), 1), 0)
        i_p = (i_n * tl.num_programs(1) + i_uv) * tl.num_programs(0) + i_t
        tl.store(scalars_ptr + 2 * i_p, total_beta)
        tl.store(scalars_ptr + 2 * i_p + 1, total_shift)
        m_u, m_v = m_t[:, None] & (o_u < V)[None, :], m_t[:, None] & (o_v < V)[None, :]
        receiver = (i_v * N + i_n) * plane + i_t * BT + o_u[None, :] * T + o_t[:, None]
        sender = (i_u * N + i_n) * plane + i_t * BT + o_v[None, :] * T + o_t[:, None]
        if NV == 1:  # nothing to be added up: straight into the last two channels of the gradient
            tl.store(
                grad_x_ptr + F * plane + o_u[None, :] * T + o_t[:, None], tl.sum(a, 2).to(dtype), mask=m_u
            )
            tl.store(
                grad_x_ptr + (F + 1) * plane + o_v[None, :] * T + o_t[:, None],
                -tl.sum(a, 1).to(dtype),
                mask=m_v,
            )
        else:
            tl.store(received_ptr + receiver, tl.sum(a, 2), mask=m_u)
            tl.store(sent_ptr + sender, -tl.sum(a, 1), mask=m_v)


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
        grad = tl.load(
            grad_ptr + o_u[:, None] * T + t[None, :], mask=(o_u < V)[:, None] & m_t, other=0.0
        )  # [BU, BT]
        y = tl.load(
            x_ptr + o_v[:, None] * T + t[None, :], mask=(o_v < V)[:, None] & m_t, other=0.0
        )  # [BV, BT]
        if bias_ptr is not None:
            y = (y + bias).to(y.dtype)
        total = tl.dot(grad, tl.trans(y), total, input_precision=PRECISION)
    place = (i_s * tl.num_programs(0).to(tl.int64) + i_nf) * (V * V)
    inside = (o_u < V)[:, None] & (o_v < V)[None, :]
    tl.store(out_ptr + place + o_u[:, None] * V + o_v[None, :], total, mask=inside)


# Tile sizes by rule: what keeps the frame graph, one (BT, BV, BV) block, and the products' operands within registers
# and shared memory on every architecture (python -m bench.compiled). A product needs at least 16 along its sum.


def _tiling(x: Tensor, channels: int, frames: int) -> dict[str, int]:
    """The constants that follow from the sizes of x and of a tile."""
    _, total, v, t = x.shape
    joints = 32 if 16 < v <= 32 else 16
    return {
        "BC": channels, "BV": joints, "BT": frames, "NV": cdiv(v, joints), "EVEN": (total - 2) % channels == 0,
        "UNIT": unit(t),
    }  # fmt: skip


def _short_tiles(x: Tensor) -> bool:
    """Whether tiles have 8 frames: for operands of tf32x3, in little shared memory, with unaligned rows."""
    target = target_of(x)
    wide = x.dtype == torch.float32 and target.backend != "hip"
    return unit(x.shape[3]) == 1 or (wide and (exact_float32() or target.shared_memory < 160_000))


def _forward_tiling(x: Tensor) -> dict[str, int]:
    return _tiling(x, 8, 8 if _short_tiles(x) else 16)


def _backward_passes(x: Tensor) -> list[tuple[bool, bool, dict[str, int]]]:
    """Launches of the backward kernel: (VALUE, RELATION, tiling). Together they read grad_z once, apart twice."""
    wide, hip = x.dtype == torch.float32, target_of(x).backend == "hip"
    if x.shape[2] > 32 or _short_tiles(x) or (wide and hip):
        return [
            (True, False, _forward_tiling(x)),
            (False, True, _tiling(x, 16, 8 if unit(x.shape[3]) == 1 else 16)),
        ]
    return [(True, True, _tiling(x, 16, 8 if wide else 16))]


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


def _padded(graph: Tensor, dtype: torch.dtype, tiling: dict[str, int]) -> Tensor:
    """The graph in ``dtype``, padded with zeros to whole tiles of channels and joints."""
    n, features, v, _ = graph.shape
    joints = tiling["NV"] * tiling["BV"]
    padded = graph.new_zeros(n, cdiv(features, tiling["BC"]) * tiling["BC"], joints, joints, dtype=dtype)
    padded[:, :features, :v, :v] = graph
    return padded


def _forward(
    x: Tensor, graph: Tensor, beta: Tensor, bias: Optional[Tensor], mask: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    n, channels, v, t = x.shape
    features = channels - 2
    z = x.new_empty(n, features, v, t)
    if not launchable(x):
        return z, *combined(None if mask is None else new_parts(x, features, 0))
    x, mask = rows(x), None if mask is None else rows(mask)
    tiling = _forward_tiling(x)
    blocks, tiles = tiling["NV"], cdiv(t, tiling["BT"])
    parts = None if mask is None else new_parts(x, features, n * blocks * tiles)
    launch(
        _dynamic_graph_conv_forward_kernel, (tiles, blocks, n), x, _padded(graph, x.dtype, tiling), beta, bias, mask, z,
        parts, features, v, t // tiling["UNIT"], n * blocks * tiles, PRECISION=dot_precision(x), num_warps=8, **tiling,
    )  # fmt: skip
    return z, *combined(parts)


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

    for value, relation, tiling in _backward_passes(x):
        blocks, tiles = tiling["NV"], cdiv(t, tiling["BT"])
        programs = tiles * n * (blocks if value else blocks**2)
        received, sent = (
            (new(blocks, n, v, t), new(blocks, n, v, t)) if relation and blocks > 1 else (None, None)
        )
        if value:
            channel_sums = None if bias is None else new(programs, features)
        if relation:
            scalars = new(programs, 2)
        launch(
            _dynamic_graph_conv_backward_kernel, (tiles, programs // (tiles * n), n), grad, x,
            _padded(graph.mT, x.dtype, tiling) if value else None, beta, bias, grad_x, received, sent,
            scalars if relation else None, channel_sums if value else None, n, features, v, t // tiling["UNIT"],
            VALUE=value, RELATION=relation, PRECISION=dot_precision(x), num_warps=8, **tiling,
        )  # fmt: skip
        if relation and blocks > 1:
            grad_x[:, features], grad_x[:, features + 1] = received.sum(0), sent.sum(0)
    grad_beta, shift = scalars.sum(0).split(1)
    if bias is None:
        return grad_beta.to(beta.dtype), None
    return grad_beta.to(beta.dtype), torch.cat([channel_sums.sum(0), shift, -shift]).to(bias.dtype)


def _backward_graph(grad: Tensor, x: Tensor, graph: Tensor, bias: Tensor | None) -> Tensor:
    n, features, v, t = grad.shape
    align = unit(t)
    joints, frames = 32 if v > 16 else 16, 32 if align == 1 else 64
    # A program's sum over time is cut where there are too few programs to fill a GPU.
    steps = cdiv(cdiv(t, frames), cdiv(1024, n * features))
    splits = cdiv(cdiv(t, frames), steps)
    out = x.new_empty(splits, n, features, v, v, dtype=torch.float32)
    launch(
        _dynamic_graph_conv_graph_kernel, (n * features, splits, cdiv(v, joints) ** 2), grad, x, bias, out, features, v,
        t // align, steps, BV=joints, BT=frames, UNIT=align, PRECISION=dot_precision(x), num_warps=4, num_stages=3,
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
