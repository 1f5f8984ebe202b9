"""Batch normalisation over real frames, with residual, ReLU, mask and sum over time in the same operator.

    out = mask * relu(weight * (x - mean) / sqrt(var + eps) + bias + residual)
    frame_sum[n,f,v] = sum_t out[n,f,v,t]

In training ``mean`` and ``var`` (biased) are those of the batch, per channel over joints and *real* frames;
in evaluation they are the running statistics. Padded frames count nowhere and come out as 0.

Backward, with g = grad_out + grad_frame_sum where out > 0 on a real frame, h = (x - mean) / sqrt(var + eps), and M
the number of real values per channel:

    grad_bias = sum g,   grad_weight = sum g h,   grad_residual = g
    given statistics:    grad_x = weight g / sqrt(var + eps), grad_mean = -weight / sqrt(var + eps) grad_bias,
                         grad_var = -weight / (2 (var + eps)) grad_weight
    those of the batch:  grad_x = weight / sqrt(var + eps) (g - grad_bias / M - h grad_weight / M) on real frames

Shapes: x, residual, out (N, F, V, T); mask (N, 1, T) bool; weight, bias, mean, var (F,); frame_sum (N, F, V).
Source: S. Ioffe, C. Szegedy, arXiv 1502.03167; the restriction to real frames is ours.

Forward the kernels move x, the residual and the output once, and read x before where its statistics are not given. Backward they read x, the residual and the gradient
twice, as the sums over a whole channel come before the first gradient; what ReLU let through is computed again from x.
The sum over time, of which the network makes its channel-level graph, would cost a pass of its own forward and two
backward. Loads are masked by shape alone: masked by real frames they are narrow ones (0 to 36 % of their bytes in
16-byte accesses instead of 82 to 95 %).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor

from .frame_statistics import combined, new_parts, store_moments
from .launch import (
    TILE_LIMIT,
    cdiv,
    device_function,
    kernel,
    launch,
    launchable,
    power_of_two,
    rows,
    tl,
    unit,
)
from .operator import Fused, Operator, check_mask, check_shapes
from .padding import masked_, real_frames
from .precision import wide_dtype, widened, without_autocast


def _masked_batch_norm_reference(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Optional[Tensor],
    mean: Optional[Tensor],
    var: Optional[Tensor],
    of_batch: bool,
    frame_sum: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide, real = widened(x), mask.unsqueeze(1).to(wide_dtype(x))  # (N, F, V, T), (N, 1, 1, T)
    if mean is None or var is None or of_batch:  # autograd needs the statistics as a function of x
        mean, var, deviation = _statistics(wide, real)
    else:
        deviation = wide - mean.view(-1, 1, 1)
    scale = weight * torch.rsqrt(var + eps)
    out = torch.addcmul(bias.view(-1, 1, 1), deviation, scale.view(-1, 1, 1))
    if residual is not None:
        out += residual
    # In place, and ReLU last: of all this autograd keeps the output alone, which whatever follows keeps as well.
    out = out.mul_(real).relu_().to(x.dtype)
    total = out.sum(3, dtype=wide_dtype(x)) if frame_sum else wide.new_empty(0)
    return out, total, mean.detach().clone(), var.detach().clone()


def _statistics(
    x: Tensor, real: Tensor, total: Callable[[Tensor], Tensor] = lambda local: local
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel, and the deviation from the mean, 0 on padding.

    `total` makes sums over all processes of those of this one.
    """
    count = total(real.sum() * x.shape[2]).clamp(min=1)
    with without_autocast(x):
        # A sum over frames as a matrix product writes no tensor of the size of x.
        per_joint = x.flatten(1, 2) @ real.squeeze(1).transpose(1, 2)  # (N, F*V, 1)
    mean = total(rearrange(per_joint, "n (f v) 1 -> f (n v)", f=x.shape[1]).sum(1)) / count
    deviation = (x - mean.view(-1, 1, 1)) * real
    return mean, total(deviation.square().sum((0, 2, 3))) / count, deviation


class _Total(torch.autograd.Function):
    """Sum over the processes of a group; so is the gradient, as everybody's loss depends on everybody's part."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = local.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


def synchronised_statistics(
    x: Tensor, mask: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over the real frames of all processes of a group, and their number.

    Pass them to :func:`masked_batch_norm` as `running`: they are differentiable, and the gradients flow to the
    other processes' inputs too. Every process of the group must call it, and run backward through it.

    Args:
        x: Tensor (N, F, V, T) of this process.
        mask: bool Tensor (N, 1, T).
        group: the processes.

    Returns:
        mean, var: Tensor (F,).
        count: Tensor (). Values of each channel that they are of.
    """

    def total(local: Tensor) -> Tensor:
        return _Total.apply(local, group)

    real = mask.unsqueeze(1).to(wide_dtype(x))
    mean, var, _ = _statistics(widened(x), real, total)
    return mean, var, total(mask.sum() * x.shape[2])


def _flops(x: Tensor, *_: object) -> tuple[int, int]:
    return 8 * x.numel(), 14 * x.numel()


def _analytic_forward(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Optional[Tensor],
    mean: Optional[Tensor],
    var: Optional[Tensor],
    of_batch: bool,
    frame_sum: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Optional[Tensor]]:
    real = real_frames(mask.unsqueeze(1), x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if mean is None or var is None:
        count = _real_values(x, real)
        mean = _channel_sums((x if real is None else torch.mul(x, real, out=out)).sum(3)) / count
        masked_(torch.sub(x, mean.view(-1, 1, 1), out=out), real)
        # Norms of rows: over several axes at once they take longer.
        var = _channel_sums(torch.linalg.vector_norm(out, dim=3).square_()) / count
    else:
        mean, var = mean.clone(), var.clone()
        torch.sub(x, mean.view(-1, 1, 1), out=out)
    out.mul_((weight * torch.rsqrt(var + eps)).view(-1, 1, 1)).add_(bias.view(-1, 1, 1))
    if residual is not None:
        out.add_(residual)
    masked_(out, real).relu_()
    return out, out.sum(3) if frame_sum else x.new_empty(0), mean, var, real


def _analytic_backward(
    grad: Tensor,
    grad_sum: Tensor,
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Optional[Tensor],
    mean: Optional[Tensor],
    var: Optional[Tensor],
    of_batch: bool,
    frame_sum: bool,
    eps: float,
    out: Tensor,
    used_mean: Tensor,
    used_var: Tensor,
    real: Optional[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rstd = torch.rsqrt(used_var + eps)
    scale, count = weight * rstd, _real_values(x, real)
    of_batch = of_batch or mean is None or var is None
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_residual = None if residual is None else torch.empty_like(grad_x)
    grad_weight, grad_bias = torch.empty_like(weight), torch.empty_like(bias)
    for channels in _blocks(x):
        g = grad[:, channels]
        if frame_sum:
            g = g + grad_sum[:, channels].unsqueeze(3)
        g = torch.ops.aten.threshold_backward(g, out[:, channels], 0.0)
        g_h, g_1 = _gradient_sums(g, x[:, channels], used_mean[channels], rstd[channels])
        grad_weight[channels], grad_bias[channels] = g_h, g_1
        if grad_residual is not None:
            grad_residual[:, channels] = g
        g.mul_(_per_channel(scale, channels))
        if of_batch:
            slope, shift = -scale[channels] * rstd[channels] * g_h / count, -scale[channels] * g_1 / count
            h = torch.sub(x[:, channels], _per_channel(used_mean, channels), out=grad_x[:, channels])
            masked_(h.mul_(slope.view(-1, 1, 1)).add_(shift.view(-1, 1, 1)), real).add_(g)
        else:
            grad_x[:, channels] = g
    statistics = (None, None) if of_batch else (-scale * grad_bias, -0.5 * scale * rstd * grad_weight)
    return grad_x, grad_weight, grad_bias, grad_residual, *statistics


def _gradient_sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of g h and of g over everything but the channels (F,): torch's for batches that are contiguous."""
    sums = [
        torch.ops.aten.native_batch_norm_backward(
            *of_sequence, None, None, None, mean, rstd, True, 0.0, (False, True, True)
        )[1:]
        for of_sequence in zip(g.split(1), x.split(1))
    ]
    g_h, g_1 = (torch.stack(parts).sum(0) for parts in zip(*sums))
    return g_h, g_1


def _blocks(x: Tensor) -> list[slice]:
    """Blocks of channels: what is computed on the way takes as much memory as one."""
    features = x.shape[1]
    width = -(-features // 4)
    return [slice(start, start + width) for start in range(0, features, width)]


def _per_channel(values: Tensor, channels: slice) -> Tensor:
    return values[channels].view(-1, 1, 1)


def _real_values(x: Tensor, real: Tensor | None) -> Tensor | int:
    """Number of values of each channel on real frames, at least 1."""
    if real is None:
        return max(1, x.shape[0] * x.shape[2] * x.shape[3])
    return (real.sum() * x.shape[2]).clamp(min=1)


def _channel_sums(per_joint: Tensor) -> Tensor:
    """(N, F, V) -> (F,)."""
    return per_joint.sum((0, 2))


@device_function
def _tile(mask_ptr, F, V, T, NV, NT, BV: tl.constexpr, BT: tl.constexpr):
    """What this program works on.

    Its block of frames, plane (sequence and channel), channel and part of it; its joints, offsets, and which of them
    are inside the plane and which on real frames.
    """
    i = tl.program_id(0)
    i_t, i_v, i_nf = i % NT, (i // NT) % NV, i // (NT * NV)
    i_n, i_f = i_nf // F, i_nf % F
    i_p = i_n * (NT * NV) + i % (NT * NV)
    o_v, o_t = i_v * BV + tl.arange(0, BV), i_t * BT + tl.arange(0, BT)
    offsets = i_nf.to(tl.int64) * V * T + (o_v[:, None] * T + o_t[None, :])
    inside = (o_v < V)[:, None] & (o_t < T)[None, :]  # [BV, BT]
    frames = tl.load(mask_ptr + i_n.to(tl.int64) * T + o_t, mask=o_t < T, other=0) != 0  # [BT]
    return i_t, i_nf, i_f, i_p, o_v, offsets, inside, inside & frames[None, :]


@device_function
def _normalised(x, i_f, mean_ptr, var_ptr, eps):
    rstd = 1.0 / tl.sqrt(tl.load(var_ptr + i_f).to(tl.float32) + tl.cast(eps, tl.float32))
    return (x - tl.load(mean_ptr + i_f).to(tl.float32)) * rstd, rstd


@device_function
def _before_relu(h, i_f, weight_ptr, bias_ptr, residual_ptr, offsets, inside):
    weight = tl.load(weight_ptr + i_f).to(tl.float32)
    y = h * weight + tl.load(bias_ptr + i_f).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return y, weight


@kernel
def _batch_norm_statistics_kernel(
    x_ptr, mask_ptr, parts_ptr, F, V, T, NV, NT, P, BV: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr
):
    _, _, i_f, i_p, _, offsets, inside, real = _tile(mask_ptr, F, V, T * UNIT, NV, NT, BV, BT)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    count = tl.sum(tl.sum(real.to(tl.float32), 1), 0)
    x = tl.where(real, x, 0.0)
    mean = tl.sum(tl.sum(x, 1), 0) / tl.maximum(count, 1.0)
    deviation = tl.where(real, x - mean, 0.0)
    squares = tl.sum(tl.sum(deviation * deviation, 1), 0)
    store_moments(parts_ptr, i_p, count, mean, squares, i_f, i_f < F, F, P)


@kernel
def _batch_norm_forward_kernel(
    x_ptr, mask_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, out_ptr, sums_ptr, eps, F, V, T, NF, NV, NT,
    BV: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    i_t, i_nf, i_f, _, o_v, offsets, inside, real = _tile(mask_ptr, F, V, T * UNIT, NV, NT, BV, BT)
    # Masked by shape alone, as a mask that differs from frame to frame would make the load a narrow one.
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    h, _ = _normalised(x, i_f, mean_ptr, var_ptr, eps)
    y, _ = _before_relu(h, i_f, weight_ptr, bias_ptr, residual_ptr, offsets, inside)
    # A NaN stays one, as in torch.relu.
    out = tl.where(real, tl.where(y <= 0.0, 0.0, y), 0.0).to(out_ptr.dtype.element_ty)  # [BV, BT]
    tl.store(out_ptr + offsets, out, mask=inside)
    if sums_ptr is not None:
        place = (i_t.to(tl.int64) * NF + i_nf) * V + o_v
        tl.store(sums_ptr + place, tl.sum(out.to(tl.float32), 1), mask=o_v < V)


@device_function
def _masked_gradient(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, grad_ptr, grad_sum_ptr, eps, V, i_nf, i_f, o_v, offsets,
    inside, real,
):  # fmt: skip
    """Gradient before the ReLU, normalised input, and what its gradient is to be multiplied with."""
    # What padded frames hold may be anything, NaN included.
    x = tl.where(real, tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32), 0.0)
    h, rstd = _normalised(x, i_f, mean_ptr, var_ptr, eps)
    y, weight = _before_relu(h, i_f, weight_ptr, bias_ptr, residual_ptr, offsets, inside)
    g = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if grad_sum_ptr is not None:
        grad_sum = tl.load(grad_sum_ptr + i_nf.to(tl.int64) * V + o_v, mask=o_v < V, other=0.0)
        g += grad_sum.to(tl.float32)[:, None]
    return tl.where(real & (y > 0.0), g, 0.0), h, weight * rstd


@kernel
def _batch_norm_backward_sums_kernel(
    x_ptr, mask_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, grad_ptr, grad_sum_ptr, sums_ptr, eps, F, V,
    T, NV, NT, P, BV: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    _, i_nf, i_f, i_p, o_v, offsets, inside, real = _tile(mask_ptr, F, V, T * UNIT, NV, NT, BV, BT)
    g, h, _ = _masked_gradient(
        x_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, grad_ptr, grad_sum_ptr, eps, V, i_nf, i_f, o_v,
        offsets, inside, real,
    )  # fmt: skip
    place = sums_ptr + i_f.to(tl.int64) * P + i_p
    tl.store(place, tl.sum(tl.sum(g, 1), 0))
    tl.store(place + F.to(tl.int64) * P, tl.sum(tl.sum(g * h, 1), 0))


@kernel
def _batch_norm_backward_kernel(
    x_ptr, mask_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, grad_ptr, grad_sum_ptr, totals_ptr,
    count_ptr, grad_x_ptr, grad_residual_ptr, eps, F, V, T, NV, NT, BV: tl.constexpr, BT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Statistics are those of the batch, of ``count`` real values in every channel, or given: count None."""
    _, i_nf, i_f, _, o_v, offsets, inside, real = _tile(mask_ptr, F, V, T * UNIT, NV, NT, BV, BT)
    g, h, slope = _masked_gradient(
        x_ptr, weight_ptr, bias_ptr, residual_ptr, mean_ptr, var_ptr, grad_ptr, grad_sum_ptr, eps, V, i_nf, i_f, o_v,
        offsets, inside, real,
    )  # fmt: skip
    if grad_residual_ptr is not None:
        tl.store(grad_residual_ptr + offsets, g.to(grad_residual_ptr.dtype.element_ty), mask=inside)
    if grad_x_ptr is not None:
        if count_ptr is not None:
            per_value = 1.0 / tl.maximum(tl.load(count_ptr).to(tl.float32), 1.0)
            sum_g, sum_gh = tl.load(totals_ptr + i_f), tl.load(totals_ptr + F + i_f)
            g = tl.where(real, g - (sum_g + h * sum_gh) * per_value, 0.0)
        tl.store(grad_x_ptr + offsets, (slope * g).to(grad_x_ptr.dtype.element_ty), mask=inside)


def _tiling(x: Tensor) -> tuple[int, int, dict[str, int]]:
    """Numbers of tiles over joints and frames, and what a launch is told: 4096 values, 16 for each thread."""
    _, _, v, t = x.shape
    joints = min(32, power_of_two(v))
    frames = min(1024, 4096 // joints)
    return cdiv(v, joints), cdiv(t, frames), {"BV": joints, "BT": frames, "UNIT": unit(t), "num_warps": 8}


def _forward(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Optional[Tensor],
    mean: Optional[Tensor],
    var: Optional[Tensor],
    of_batch: bool,
    frame_sum: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, f, v, t = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not launchable(x):
        total = x.new_empty(n, f, v, dtype=torch.float32) if frame_sum else None
        return out, total, *combined(new_parts(x, f, 0))
    x, mask, residual = rows(x), rows(mask), None if residual is None else rows(residual)
    nv, nt, tiling = _tiling(x)
    programs, length = (n * f * nv * nt,), t // tiling["UNIT"]
    if mean is None or var is None:
        parts = new_parts(x, f, n * nv * nt)
        launch(
            _batch_norm_statistics_kernel, programs, x, mask, parts, f, v, length, nv, nt, n * nv * nt, **tiling
        )  # fmt: skip
        mean, var = combined(parts)
    else:  # outputs of an op are never its inputs
        mean, var = (s.detach().to(torch.float32, copy=True) for s in (mean, var))
    sums = x.new_empty(nt, n, f, v, dtype=torch.float32) if frame_sum else None
    launch(
        _batch_norm_forward_kernel, programs, x, mask, weight, bias, residual, mean, var, out, sums, eps, f, v, length,
        n * f, nv, nt, **tiling,
    )  # fmt: skip
    return out, None if sums is None else sums.sum(0), mean, var


def _backward(
    grad: Tensor,
    grad_sum: Tensor,
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Optional[Tensor],
    mean: Optional[Tensor],
    var: Optional[Tensor],
    of_batch: bool,
    frame_sum: bool,
    eps: float,
    used_mean: Tensor,
    used_var: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, f, v, t = x.shape
    of_batch = of_batch or mean is None or var is None
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[0] else None
    grad_residual = torch.empty_like(x, memory_format=torch.contiguous_format) if needed[3] else None
    totals = x.new_empty(2, f, dtype=torch.float32)
    if launchable(x):
        x, mask, grad = rows(x), rows(mask), rows(grad)
        residual = None if residual is None else rows(residual)
        grad_sum = rows(grad_sum) if frame_sum else None
        nv, nt, tiling = _tiling(x)
        programs, length = (n * f * nv * nt,), t // tiling["UNIT"]
        inputs = (x, mask, weight, bias, residual, used_mean, used_var, grad, grad_sum)
        sums = x.new_empty(2, f, n * nv * nt, dtype=torch.float32)
        launch(
            _batch_norm_backward_sums_kernel, programs, *inputs, sums, eps, f, v, length, nv, nt, n * nv * nt, **tiling
        )  # fmt: skip
        totals = sums.sum(2)
        count = mask.sum() * v if of_batch else None
        launch(
            _batch_norm_backward_kernel, programs, *inputs, totals, count, grad_x, grad_residual, eps, f, v, length, nv,
            nt, **tiling,
        )  # fmt: skip
    grad_bias, grad_weight = totals.unbind(0)
    grad_mean = grad_var = None
    if not of_batch and (needed[4] or needed[5]):
        rstd = torch.rsqrt(used_var + eps)
        grad_mean = (-weight * rstd * grad_bias).to(mean.dtype)
        grad_var = (-0.5 * weight * rstd.square() * grad_weight).to(var.dtype)
    return (
        grad_x,
        grad_weight.to(weight.dtype, copy=True),
        grad_bias.to(bias.dtype, copy=True),
        grad_residual,
        grad_mean,
        grad_var,
    )


def _unsupported(x: Tensor, *_: object) -> str | None:
    if x.shape[2] * x.shape[3] >= TILE_LIMIT:
        return f"{x.shape[2]} joints and {x.shape[3]} frames exceed 32-bit offsets within a plane; split the sequence"
    return None


OPERATOR = Operator(
    _masked_batch_norm_reference,
    _flops,
    Fused(_forward, _backward, differentiable=(0, 2, 3, 4, 5, 6), saved=(2, 3), unsupported=_unsupported),
    statistics=2,
    analytic=Fused(
        _analytic_forward, _analytic_backward, differentiable=(0, 2, 3, 4, 5, 6), saved=(0, 2, 3, 4), kept=1
    ),
)


def masked_batch_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    residual: Tensor | None = None,
    running: tuple[Tensor, Tensor] | None = None,
    statistics: tuple[Tensor, Tensor] | None = None,
    frame_sum: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalise every channel over joints and real frames; add the residual; ReLU; mask.

    Args:
        x: Tensor (N, F, V, T).
        mask: bool Tensor (N, 1, T). True on real frames.
        weight, bias: Tensor (F,).
        residual: Tensor (N, F, V, T), optional. Added before the ReLU.
        running: (mean, var), each (F,), optional. Statistics to use (evaluation). By default those of the batch
            are computed (training).
        statistics: (mean, var), each (F,), optional. The batch's own statistics, where the operator that made ``x``
            returned them: they save a pass over x, and change neither result nor gradient. Empty tensors count as
            none.
        frame_sum: bool, default False. Whether the sum of the output over time is wanted.
        eps: float, default 1e-5.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        out: Tensor (N, F, V, T).
        frame_sum: Tensor (N, F, V), float32 for half precision: the sum of ``out`` over time. (0,) where not wanted.
        mean, var: Tensor (F,). The statistics used, without gradient; ``var`` is the biased one. For the caller's
            running averages.

    Raises:
        ValueError: the shapes do not fit together, or both ``running`` and ``statistics`` are given.
        TypeError: the mask is not bool.
    """
    if running is not None and statistics is not None:
        raise ValueError(
            "masked_batch_norm: running and statistics are both given, expected at most one of them"
        )
    of_batch = statistics is not None and statistics[0].numel() > 0
    mean, var = running or (statistics if of_batch else (None, None))
    check_shapes(
        "masked_batch_norm",
        x=(x, "N F V T"),
        mask=(mask, "N 1 T"),
        weight=(weight, "F"),
        bias=(bias, "F"),
        residual=(residual, "N F V T"),
        mean=(mean, "F"),
        var=(var, "F"),
    )
    check_mask("masked_batch_norm", mask)
    return OPERATOR(x, mask, weight, bias, residual, mean, var, of_batch, frame_sum, eps, backend=backend)
