"""Losses per frame: cross-entropy and smoothing of the class logits, boundary cross-entropy.

With T_n the number of real frames of sequence n:

    cross_entropy = sum w[label] * (-log_softmax(logits)[label]) / sum w[label]   over real, not ignored frames
    smoothness    = mean_n 1/(K (T_n - 1)) sum_(t=1..T_n-1, k) similarity[n,t] * min(d[n,k,t]^2, 16)
    d[n,k,t]      = later[n,k,t] - earlier[n,k,t-1]
    later         = log_softmax over time of logits[n,k,1..T_n-1]
    earlier       = log_softmax over time of logits[n,k,0..T_n-2]
    similarity[n,t] = exp(-||x[n,:,t] - x[n,:,t-1]||_2 / 2)                 0 at t = 0 and on padded frames
    boundary      = mean_n 1/T_n sum_t BCE_with_logits(logit[n,t], target[n,t]; pos_weight)

The softmax of the smoothness runs over time, not over classes: that is what the published code computes
and what its weights were trained with. A sequence of one frame has no pair and contributes 0.

Backward, with W = sum w[label], c_n = 1/(N K (T_n - 1)), and g_c, g_s, g_b the gradients of the three losses:

    slope[n,k,t]  = 2 c_n similarity[n,t] d[n,k,t] where d^2 <= 16, else 0           0 at t = 0 and t = T_n
    total[n,k]    = sum_t slope[n,k,t]
    grad logits[n,k,t] = g_c w[label]/W (softmax over classes - [k = label])
                       + g_s (slope[n,k,t] - slope[n,k,t+1] - total[n,k] (exp(later[n,k,t]) - exp(earlier[n,k,t])))
    grad logit[n,t] = g_b/(N T_n) ((1 - y) sigmoid(logit) - pos_weight y sigmoid(-logit))            y = target[n,t]

with exp(later) 0 at t = 0 and exp(earlier) 0 at t = T_n - 1. What padded frames hold changes nothing; their gradient
is 0.

Shapes: logits (N, K, T), labels (N, T), similarity (N, T), mask (N, 1, T) bool, x (N, C, V, T).
Source: Y. Ishikawa et al., ASRF, arXiv 2007.06866 (Gaussian similarity-weighted truncated MSE).

The kernels of the class loss read the logits twice forward, as d needs the sums over a whole sequence, and once
backward, in three launches and one. A program sees all classes of a block of frames, so that both softmaxes come from
one load. The second launch puts the sums of a sequence's parts together anew in each program, which saves a launch;
there are at most 128 parts, so that the work stays proportional to the length. The boundary loss reads its logits once
forward, in two launches, and once backward. Every sum is taken in float32 and in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
import torch.nn.functional as functional
from torch import Tensor

from .frame_tiles import split, warps
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
from .precision import widened

IGNORE = 255
"""Label of frames that belong to no class: padding, and unannotated frames."""
TRUNCATION = 16.0
LEAST_CLASSES, MOST_CLASSES = 16, 256
"""Of a tile: a program holds all classes of its frames in registers, and its sums in aligned rows."""


def _class_loss_reference(
    logits: Tensor, labels: Tensor, similarity: Tensor, mask: Tensor, class_weights: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    # Half-precision logits are widened: a log-softmax and a mean over thousands of frames need it.
    logits = widened(logits).masked_fill(~mask, 0)  # what padded frames hold does not matter
    return (_cross_entropy(logits, labels, mask, class_weights), _smoothness(logits, similarity, mask))


def _cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor, class_weights: Optional[Tensor]) -> Tensor:
    logp = torch.log_softmax(logits, dim=1)
    target, share = _target_and_share(labels, mask, class_weights, logp.dtype)
    return -(logp.gather(1, target).squeeze(1) * share).sum()


def _target_and_share(
    labels: Tensor, mask: Tensor, class_weights: Optional[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Label of each frame, (N, 1, T), 0 where it counts for nothing, and its share w[label] / W, (N, T)."""
    counted = mask.squeeze(1) & (labels != IGNORE)
    target = torch.where(counted, labels, 0)
    weight = counted.to(dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(dtype)[target]
    return target.unsqueeze(1), weight / weight.sum().clamp(min=torch.finfo(dtype).tiny)


def _smoothness(logits: Tensor, similarity: Tensor, mask: Tensor) -> Tensor:
    paired = mask[..., 1:]  # frame t is real, so frame t - 1 is
    # Where a sequence has no pair, every frame is let in: the result is finite and its similarities are 0.
    outside = ~paired & paired.any(2, keepdim=True)
    later, earlier = logits[..., 1:], logits[..., :-1]
    drift = later.masked_fill(outside, -torch.inf).logsumexp(2, keepdim=True) - earlier.masked_fill(
        outside, -torch.inf
    ).logsumexp(2, keepdim=True)
    squared = (later - earlier - drift).square().clamp(max=TRUNCATION)
    pairs = paired.sum((1, 2)).clamp(min=1)
    return ((squared.mean(1) * similarity[:, 1:].to(logits.dtype)).sum(1) / pairs).mean()


def _boundary_loss_reference(logits: Tensor, target: Tensor, mask: Tensor, pos_weight: Tensor) -> Tensor:
    real = mask.squeeze(1)
    wide = widened(logits.squeeze(1)).masked_fill(~real, 0)  # what padded frames hold does not matter
    target = torch.where(real, target.to(wide.dtype), 0)
    loss = functional.binary_cross_entropy_with_logits(
        wide, target, pos_weight=pos_weight.to(wide.dtype), reduction="none"
    )
    return (torch.where(real, loss, 0).sum(1) / real.sum(1).clamp(min=1)).mean()


def frame_similarity(x: Tensor, mask: Tensor) -> Tensor:
    """Similarity of each frame to the one before it, (N, T); 0 at the first and on padded frames.

    ``x`` (N, C, V, T) is the network's input, ``mask`` (N, 1, T) its real frames. Not differentiated: the
    similarities are data. Computed once per batch and shared by all stages.
    """
    check_shapes("frame_similarity", x=(x, "N C V T"), mask=(mask, "N 1 T"))
    check_mask("frame_similarity", mask)
    with torch.no_grad():
        step = x[..., 1:] - x[..., :-1]
        # Over one axis: over two of them it takes a CPU longer.
        similarity = torch.linalg.vector_norm(step.flatten(1, 2), dim=1).mul_(-0.5).exp_()
        return functional.pad(torch.where(mask[:, 0, 1:], similarity, 0), (1, 0))


def _class_flops(logits: Tensor, *_: object) -> tuple[int, int]:
    return 15 * logits.numel(), 12 * logits.numel()


def _boundary_flops(logits: Tensor, *_: object) -> tuple[int, int]:
    return 8 * logits.numel(), 5 * logits.numel()


def _analytic_class_loss(
    logits: Tensor, labels: Tensor, similarity: Tensor, mask: Tensor, class_weights: Optional[Tensor]
) -> tuple[Tensor, ...]:
    """Behind the losses: sums of the softmax over classes, labels, shares, slopes, and both sums of those over time."""
    z, later, earlier = _with_pairs(logits, mask)
    classes = torch.logsumexp(z, 1, keepdim=True)
    target, share = _target_and_share(labels, mask, class_weights, z.dtype)
    cross_entropy = (share * (classes - z.gather(1, target)).squeeze(1)).sum()

    sums = torch.stack([torch.logsumexp(of, 2, keepdim=True) for of in (later, earlier)])
    step = (z[..., 1:] - z[..., :-1]).sub_(sums[0] - sums[1])
    weight = similarity[:, 1:] / (z.shape[1] * mask[..., 1:].sum((1, 2)).clamp(min=1)).unsqueeze(1)
    limit = TRUNCATION**0.5
    smoothness = (step.clamp(-limit, limit).square_().sum(1) * weight).sum(1).mean()
    # Steps as large as the limit are let through, but no larger ones: this is the number next to it, a power of two.
    beyond = limit * (1 + torch.finfo(z.dtype).eps)
    slopes = torch.ops.aten.hardtanh_backward(step, step, -beyond, beyond)
    slopes.mul_((2 / max(1, len(z)) * weight).unsqueeze(1))
    return cross_entropy, smoothness, classes, target, share, slopes, sums


def _analytic_class_loss_gradient(
    grad_cross_entropy: Tensor,
    grad_smoothness: Tensor,
    logits: Tensor,
    labels: Tensor,
    similarity: Tensor,
    mask: Tensor,
    class_weights: Optional[Tensor],
    classes: Tensor,
    target: Tensor,
    share: Tensor,
    slopes: Tensor,
    sums: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor]:
    z, later, earlier = _with_pairs(logits, mask)
    grad = torch.sub(z, classes).exp_()
    grad.scatter_add_(1, target, torch.full_like(classes, -1.0)).mul_(
        (grad_cross_entropy * share).unsqueeze(1)
    )
    slopes = slopes * grad_smoothness
    total = slopes.sum(2, keepdim=True)
    grad[..., 1:].add_(slopes.sub(torch.sub(later, sums[0]).exp_().mul_(total)))
    grad[..., :-1].sub_(slopes.sub_(torch.sub(earlier, sums[1]).exp_().mul_(total)))
    return (grad if z is logits else grad.masked_fill_(~mask, 0),)


def _with_pairs(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits, and those of the later and earlier frames of all pairs: as the reference masks them, where it must."""
    if mask.all():
        return logits, logits[..., 1:], logits[..., :-1]
    z, paired = logits.masked_fill(~mask, 0), mask[..., 1:]
    outside = ~paired & paired.any(2, keepdim=True)
    return z, *(of.masked_fill(outside, -torch.inf) for of in (z[..., 1:], z[..., :-1]))


@device_function
def _zeros(SIZE: tl.constexpr):
    return tl.zeros([SIZE], tl.float32)


@device_function
def _frames(mask_ptr, i_n, o_t, T):
    """Of each frame: whether it is real, the later one of a pair of real frames, and the earlier one of a pair."""
    row = mask_ptr + i_n.to(tl.int64) * T
    real = tl.load(row + o_t, mask=o_t < T, other=0) != 0
    followed = tl.load(row + o_t + 1, mask=o_t + 1 < T, other=0) != 0
    return real, real & (o_t > 0), followed


@device_function
def _logits(logits_ptr, i_n, o_k, o_t, K, T, SHIFT: tl.constexpr):
    """Logits [BK, BT] of the frames SHIFT after ``o_t``, 0 outside of the sequence."""
    # Masked by shape alone, as a mask that differs from frame to frame would make the load a narrow one.
    inside = (o_k < K)[:, None] & (o_t + SHIFT < T)[None, :]
    if SHIFT < 0:
        inside &= (o_t + SHIFT >= 0)[None, :]
    base = logits_ptr + i_n.to(tl.int64) * K * T
    return tl.load(base + (o_k[:, None] * T + o_t[None, :]) + SHIFT, mask=inside, other=0.0).to(tl.float32)


@device_function
def _similarity(similarity_ptr, i_n, o_t, T):
    row = similarity_ptr + i_n.to(tl.int64) * T
    return tl.load(row + o_t, mask=o_t < T, other=0.0).to(tl.float32)


@device_function
def _label_weights(labels_ptr, class_weights_ptr, i_n, o_t, real, K, T, IGNORE: tl.constexpr):
    """Label of each frame, and its weight in the cross-entropy: NaN where there is no such class."""
    label = tl.load(labels_ptr + i_n.to(tl.int64) * T + o_t, mask=o_t < T, other=0)
    known = (label >= 0) & (label < K)
    weight = tl.where(known, 1.0, float("nan"))
    if class_weights_ptr is not None:
        weight *= tl.load(class_weights_ptr + tl.where(known, label, 0)).to(tl.float32)
    return tl.where(known, label, -1).to(tl.int32), tl.where(real & (label != IGNORE), weight, 0.0)


@device_function
def _class_softmax(z, m_k):
    """Largest logit of each frame; exponentials of the rest [BK, BT], and their sum."""
    highest = tl.max(tl.where(m_k[:, None], z, float("-inf")), 0)
    powers = tl.where(m_k[:, None], tl.exp(z - highest[None, :]), 0.0)
    return highest, powers, tl.sum(powers, 0)


@device_function
def _no_powers(BK: tl.constexpr):
    """What :func:`_add_powers` starts with."""
    return tl.full([BK], float("-inf"), tl.float32), _zeros(BK)


@device_function
def _add_powers(highest, total, values, AXIS: tl.constexpr):
    """Add the exponentials of ``values`` over an axis to total exp(highest), both [BK]."""
    new = tl.maximum(highest, tl.max(values, AXIS))
    finite = tl.where(new == float("-inf"), 0.0, new)
    added = tl.sum(tl.exp(values - tl.expand_dims(finite, AXIS)), AXIS)
    return new, total * tl.exp(highest - finite) + added


@device_function
def _drift(later, earlier):
    """Difference of the normalisers of the two softmaxes over time; 0 where there is no pair."""
    return tl.where(later == float("-inf"), 0.0, later - earlier)


@device_function
def _squared_steps(z, before, drift, weight, pair, TRUNCATION: tl.constexpr):
    """Weighted truncated squares of the steps from ``before`` to ``z`` [BK, BT], and their derivatives; 0 off pairs.

    So they are on the rows that a tile has beyond the classes, whose logits and drift are 0.
    """
    step = z - before - drift[:, None]
    squared = step * step
    beyond = squared > TRUNCATION  # not so for NaN, which stays one
    loss = tl.where(pair[None, :], weight[None, :] * tl.where(beyond, TRUNCATION, squared), 0.0)
    return loss, tl.where(pair[None, :], tl.where(beyond, 0.0, 2.0 * weight[None, :] * step), 0.0)


@kernel
def _class_loss_sums_kernel(
    logits_ptr, labels_ptr, mask_ptr, class_weights_ptr, powers_ptr, sums_ptr, K, T, TILES, PARTS, PER_PART, PROGRAMS,
    BK: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, IGNORE: tl.constexpr,
):  # fmt: skip
    """Sums over one part of a sequence: of the cross-entropy, and for both softmaxes over time."""
    T = T * UNIT
    i = tl.program_id(0)
    i_n, i_p = i // PARTS, i % PARTS
    o_k = tl.arange(0, BK)
    m_k = o_k < K
    later_max, later_sum = _no_powers(BK)
    earlier_max, earlier_sum = _no_powers(BK)
    losses, weights, pairs = 0.0, 0.0, 0.0
    for i_t in range(i_p * PER_PART, tl.minimum((i_p + 1) * PER_PART, TILES)):
        o_t = i_t * BT + tl.arange(0, BT)
        z = _logits(logits_ptr, i_n, o_k, o_t, K, T, 0)
        real, is_later, is_earlier = _frames(mask_ptr, i_n, o_t, T)
        pairs += tl.sum(is_later.to(tl.float32))
        in_later = tl.where(m_k[:, None] & is_later[None, :], z, float("-inf"))
        in_earlier = tl.where(m_k[:, None] & is_earlier[None, :], z, float("-inf"))
        later_max, later_sum = _add_powers(later_max, later_sum, in_later, 1)
        earlier_max, earlier_sum = _add_powers(earlier_max, earlier_sum, in_earlier, 1)
        label, weight = _label_weights(labels_ptr, class_weights_ptr, i_n, o_t, real, K, T, IGNORE)
        highest, _, total = _class_softmax(z, m_k)
        at_label = tl.sum(tl.where(o_k[:, None] == label[None, :], z, 0.0), 0)
        losses += tl.sum(tl.where(weight == 0.0, 0.0, weight * (highest - at_label + tl.log(total))))
        weights += tl.sum(weight)
    place = powers_ptr + i.to(tl.int64) * 2 * BK + o_k
    tl.store(place, later_max + tl.log(later_sum))
    tl.store(place + BK, earlier_max + tl.log(earlier_sum))
    tl.store(sums_ptr + i, losses)
    tl.store(sums_ptr + PROGRAMS + i, weights)
    tl.store(sums_ptr + 2 * PROGRAMS + i, pairs)


@kernel
def _class_loss_steps_kernel(
    logits_ptr, similarity_ptr, mask_ptr, powers_ptr, sums_ptr, slopes_ptr, classes_ptr, scales_ptr, N, K, T, TILES,
    PARTS, PER_PART, PROGRAMS, BK: tl.constexpr, BT: tl.constexpr, BP: tl.constexpr, UNIT: tl.constexpr,
    TRUNCATION: tl.constexpr,
):  # fmt: skip
    """Smoothness of one part of a sequence and its derivatives' sums; the first part stores what all start with."""
    T = T * UNIT
    i = tl.program_id(0)
    i_n, i_p = i // PARTS, i % PARTS
    o_k = tl.arange(0, BK)

    later_max, later_sum = _no_powers(BK)
    earlier_max, earlier_sum = _no_powers(BK)
    pairs = _zeros(BP)
    for first in range(0, PARTS, BP):
        o_p = first + tl.arange(0, BP)
        m_p = o_p < PARTS
        place = powers_ptr + i_n.to(tl.int64) * PARTS * 2 * BK + (o_p[:, None] * 2 * BK + o_k[None, :])
        of_later = tl.load(place, mask=m_p[:, None], other=float("-inf"))
        of_earlier = tl.load(place + BK, mask=m_p[:, None], other=float("-inf"))
        later_max, later_sum = _add_powers(later_max, later_sum, of_later, 0)
        earlier_max, earlier_sum = _add_powers(earlier_max, earlier_sum, of_earlier, 0)
        pairs += tl.load(sums_ptr + 2 * PROGRAMS + i_n * PARTS + o_p, mask=m_p, other=0.0)
    later, earlier = later_max + tl.log(later_sum), earlier_max + tl.log(earlier_sum)
    scale = 1.0 / (N.to(tl.float32) * K * tl.maximum(tl.sum(pairs), 1.0))
    if i_p == 0:
        place = classes_ptr + i_n.to(tl.int64) * 3 * BK + o_k
        tl.store(place, later)
        tl.store(place + BK, earlier)
        tl.store(scales_ptr + 1 + i_n, scale)

    drift = _drift(later, earlier)
    losses, slopes = 0.0, _zeros(BK)
    for i_t in range(i_p * PER_PART, tl.minimum((i_p + 1) * PER_PART, TILES)):
        o_t = i_t * BT + tl.arange(0, BT)
        z = _logits(logits_ptr, i_n, o_k, o_t, K, T, 0)
        before = _logits(logits_ptr, i_n, o_k, o_t, K, T, -1)
        _, is_later, _ = _frames(mask_ptr, i_n, o_t, T)
        weight = scale * _similarity(similarity_ptr, i_n, o_t, T)
        loss, slope = _squared_steps(z, before, drift, weight, is_later, TRUNCATION)
        losses += tl.sum(tl.sum(loss, 1), 0)
        slopes += tl.sum(slope, 1)
    tl.store(sums_ptr + 3 * PROGRAMS + i, losses)
    tl.store(slopes_ptr + i.to(tl.int64) * BK + o_k, slopes)


@kernel
def _class_loss_totals_kernel(
    sums_ptr, slopes_ptr, cross_entropy_ptr, smoothness_ptr, classes_ptr, scales_ptr, PARTS, PROGRAMS,
    BK: tl.constexpr, BP: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    """One program for each sequence adds up its slopes; the first one also both losses."""
    i_n = tl.program_id(0)
    o_k = tl.arange(0, BK)
    slopes = _zeros(BK)
    for first in range(0, PARTS, BP):
        o_p = first + tl.arange(0, BP)
        place = slopes_ptr + i_n.to(tl.int64) * PARTS * BK + (o_p[:, None] * BK + o_k[None, :])
        slopes += tl.sum(tl.load(place, mask=(o_p < PARTS)[:, None], other=0.0), 0)
    tl.store(classes_ptr + (i_n.to(tl.int64) * 3 + 2) * BK + o_k, slopes)
    if i_n == 0:
        losses, weights, steps = _zeros(512), _zeros(512), _zeros(512)
        for first in range(0, PROGRAMS, 512):
            o_i = first + tl.arange(0, 512)
            losses += tl.load(sums_ptr + o_i, mask=o_i < PROGRAMS, other=0.0)
            weights += tl.load(sums_ptr + PROGRAMS + o_i, mask=o_i < PROGRAMS, other=0.0)
            steps += tl.load(sums_ptr + 3 * PROGRAMS + o_i, mask=o_i < PROGRAMS, other=0.0)
        weight = tl.sum(weights)
        weight = tl.where(weight < TINY, TINY, weight)
        tl.store(cross_entropy_ptr, tl.sum(losses) / weight)
        tl.store(smoothness_ptr, tl.sum(steps))
        tl.store(scales_ptr, 1.0 / weight)


@kernel
def _class_loss_backward_kernel(
    grad_cross_entropy_ptr, grad_smoothness_ptr, logits_ptr, labels_ptr, similarity_ptr, mask_ptr, class_weights_ptr,
    classes_ptr, scales_ptr, grad_ptr, K, T, TILES, BK: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr,
    IGNORE: tl.constexpr, TRUNCATION: tl.constexpr,
):  # fmt: skip
    T = T * UNIT
    i = tl.program_id(0)
    i_n = i // TILES
    o_k, o_t = tl.arange(0, BK), (i % TILES) * BT + tl.arange(0, BT)
    m_k = o_k < K
    z = _logits(logits_ptr, i_n, o_k, o_t, K, T, 0)
    real, is_later, is_earlier = _frames(mask_ptr, i_n, o_t, T)

    place = classes_ptr + i_n.to(tl.int64) * 3 * BK + o_k
    later, earlier = tl.load(place), tl.load(place + BK)
    slopes = tl.load(place + 2 * BK)
    drift = _drift(later, earlier)
    outer = tl.load(grad_smoothness_ptr).to(tl.float32)
    scale = outer * tl.load(scales_ptr + 1 + i_n)
    before = _logits(logits_ptr, i_n, o_k, o_t, K, T, -1)
    weight = scale * _similarity(similarity_ptr, i_n, o_t, T)
    _, grad = _squared_steps(z, before, drift, weight, is_later, TRUNCATION)
    after = _logits(logits_ptr, i_n, o_k, o_t, K, T, 1)
    weight = scale * _similarity(similarity_ptr, i_n, o_t + 1, T)
    _, slope = _squared_steps(after, z, drift, weight, is_earlier, TRUNCATION)
    grad -= slope
    slopes = outer * slopes
    grad -= tl.where(is_later[None, :], slopes[:, None] * tl.exp(z - later[:, None]), 0.0)
    grad += tl.where(is_earlier[None, :], slopes[:, None] * tl.exp(z - earlier[:, None]), 0.0)

    label, weight = _label_weights(labels_ptr, class_weights_ptr, i_n, o_t, real, K, T, IGNORE)
    weight *= tl.load(grad_cross_entropy_ptr).to(tl.float32) * tl.load(scales_ptr)
    _, powers, total = _class_softmax(z, m_k)
    powers = powers / total[None, :] - tl.where(o_k[:, None] == label[None, :], 1.0, 0.0)
    grad += tl.where((weight == 0.0)[None, :], 0.0, weight[None, :] * powers)
    out = grad_ptr + i_n.to(tl.int64) * K * T + (o_k[:, None] * T + o_t[None, :])
    tl.store(out, grad.to(grad_ptr.dtype.element_ty), mask=m_k[:, None] & (o_t < T)[None, :])


def _class_tiling(logits: Tensor) -> dict[str, int]:
    """What a launch is told: all classes of at least 16 frames, 8 values (16 bytes in half precision) for each thread."""
    _, k, t = logits.shape
    classes = power_of_two(k, LEAST_CLASSES)
    frames = max(16, 2048 // classes)
    return {"BK": classes, "BT": frames, "UNIT": unit(t), "num_warps": warps(logits, classes * frames // 8)}


def _class_loss_forward(
    logits: Tensor, labels: Tensor, similarity: Tensor, mask: Tensor, class_weights: Optional[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both losses, and what ``backward`` needs.

    Of each class of a sequence (N, 3, BK): log-sum-exp of its later and of its earlier logits, total of its slopes.
    (1 + N,): 1 / W, and c of each sequence.
    """
    n, k, t = logits.shape
    cross_entropy, smoothness, classes, scales = (
        logits.new_empty(shape, dtype=torch.float32)
        for shape in ((), (), (n, 3, power_of_two(k, LEAST_CLASSES)), (n + 1,))
    )
    if not launchable(logits):
        return cross_entropy, smoothness, classes, scales
    if logits.numel() == 0:
        return cross_entropy.zero_(), smoothness.fill_(0.0 if n else torch.nan), classes, scales
    logits, labels, similarity, mask = rows(logits), rows(labels), rows(similarity), rows(mask)
    tiling = _class_tiling(logits)
    tiles, block = cdiv(t, tiling["BT"]), 1024 // tiling["BK"]
    parts, per_part = split(logits, tiling["BT"])
    programs, length = n * parts, t // tiling["UNIT"]
    powers = logits.new_empty(programs, 2, tiling["BK"], dtype=torch.float32)
    sums = logits.new_empty(4, programs, dtype=torch.float32)
    slopes = logits.new_empty(programs, tiling["BK"], dtype=torch.float32)
    launch(
        _class_loss_sums_kernel, (programs,), logits, labels, mask, class_weights, powers, sums, k, length, tiles,
        parts, per_part, programs, IGNORE=IGNORE, **tiling,
    )  # fmt: skip
    launch(
        _class_loss_steps_kernel, (programs,), logits, similarity, mask, powers, sums, slopes, classes, scales, n, k,
        length, tiles, parts, per_part, programs, BP=block, TRUNCATION=TRUNCATION, **tiling,
    )  # fmt: skip
    launch(
        _class_loss_totals_kernel, (n,), sums, slopes, cross_entropy, smoothness, classes, scales, parts, programs,
        BK=tiling["BK"], BP=block, TINY=torch.finfo(torch.float32).tiny, num_warps=8,
    )  # fmt: skip
    return cross_entropy, smoothness, classes, scales


def _class_loss_backward(
    grad_cross_entropy: Tensor,
    grad_smoothness: Tensor,
    logits: Tensor,
    labels: Tensor,
    similarity: Tensor,
    mask: Tensor,
    class_weights: Optional[Tensor],
    classes: Tensor,
    scales: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor]:
    n, k, t = logits.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if launchable(logits) and logits.numel():
        logits, labels, similarity, mask = rows(logits), rows(labels), rows(similarity), rows(mask)
        tiling = _class_tiling(logits)
        tiles = cdiv(t, tiling["BT"])
        launch(
            _class_loss_backward_kernel, (n * tiles,), grad_cross_entropy, grad_smoothness, logits, labels, similarity,
            mask, class_weights, classes, scales, grad, k, t // tiling["UNIT"], tiles, IGNORE=IGNORE,
            TRUNCATION=TRUNCATION, **tiling,
        )  # fmt: skip
    return (grad,)


def _class_loss_unsupported(logits: Tensor, *others: Optional[Tensor]) -> str | None:
    _, k, t = logits.shape
    if not 1 <= k <= MOST_CLASSES:
        return f"there are {k} classes; the kernels take 1 to {MOST_CLASSES}"
    if k * t >= TILE_LIMIT:
        return f"{k} classes and {t} frames exceed 32-bit offsets within a sequence; split the sequence"
    return _only_logits_differentiable(others)


def _only_logits_differentiable(others: Sequence[Optional[Tensor]]) -> str | None:
    if any(tensor is not None and tensor.requires_grad for tensor in others):
        return "an argument other than the logits requires a gradient, which the reference alone has"
    return None


CLASS_LOSS = Operator(
    _class_loss_reference,
    _class_flops,
    Fused(
        _class_loss_forward,
        _class_loss_backward,
        differentiable=(0,),
        saved=(2, 3),
        kept=2,
        unsupported=_class_loss_unsupported,
    ),
    analytic=Fused(
        _analytic_class_loss,
        _analytic_class_loss_gradient,
        differentiable=(0,),
        saved=tuple(range(2, 7)),
        kept=5,
        unsupported=lambda _, *others: _only_logits_differentiable(others),
    ),
)


@device_function
def _boundary_tile(logits_ptr, target_ptr, mask_ptr, start, o_t, T):
    """Logits and targets of frames, 0 where they are not real, and which ones are."""
    real = tl.load(mask_ptr + start + o_t, mask=o_t < T, other=0) != 0
    z = tl.load(logits_ptr + start + o_t, mask=o_t < T, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + start + o_t, mask=o_t < T, other=0).to(tl.float32)
    return tl.where(real, z, 0.0), tl.where(real, target, 0.0), real


@device_function
def _log1p(x):
    """log(1 + x) for x from 0 to 1, as close where x is small (W. Kahan)."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@kernel
def _boundary_loss_sums_kernel(
    logits_ptr, target_ptr, mask_ptr, pos_weight_ptr, sums_ptr, T, TILES, PARTS, PER_PART, PROGRAMS, BT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Loss and number of real frames of one part of a sequence."""
    T = T * UNIT
    i = tl.program_id(0)
    i_n, i_p = i // PARTS, i % PARTS
    pos_weight = tl.load(pos_weight_ptr).to(tl.float32)
    losses, frames = _zeros(BT), _zeros(BT)
    for i_t in range(i_p * PER_PART, tl.minimum((i_p + 1) * PER_PART, TILES)):
        o_t = i_t * BT + tl.arange(0, BT)
        z, y, real = _boundary_tile(logits_ptr, target_ptr, mask_ptr, i_n.to(tl.int64) * T, o_t, T)
        negative = _log1p(tl.exp(-tl.abs(z))) + tl.maximum(-z, 0.0)  # -log(sigmoid(z))
        loss = (1.0 - y) * z + (1.0 + (pos_weight - 1.0) * y) * negative
        losses += tl.where(real, loss, 0.0)
        frames += real.to(tl.float32)
    tl.store(sums_ptr + i, tl.sum(losses))
    tl.store(sums_ptr + PROGRAMS + i, tl.sum(frames))


@kernel
def _boundary_loss_mean_kernel(
    sums_ptr, loss_ptr, scales_ptr, N, PARTS, PROGRAMS, BN: tl.constexpr, BP: tl.constexpr
):
    """Mean over the sequences, and what the loss of a frame of each is multiplied with."""
    total = _zeros(BN)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        losses, frames = _zeros(BN), _zeros(BN)
        for i_p in range(0, PARTS, BP):
            o_p = i_p + tl.arange(0, BP)
            inside = (o_n < N)[:, None] & (o_p < PARTS)[None, :]
            place = sums_ptr + o_n[:, None] * PARTS + o_p[None, :]
            losses += tl.sum(tl.load(place, mask=inside, other=0.0), 1)
            frames += tl.sum(tl.load(place + PROGRAMS, mask=inside, other=0.0), 1)
        scale = 1.0 / (N.to(tl.float32) * tl.maximum(frames, 1.0))
        tl.store(scales_ptr + o_n, scale, mask=o_n < N)
        total += losses * scale
    tl.store(loss_ptr, tl.sum(total))


@kernel
def _boundary_loss_backward_kernel(
    grad_loss_ptr, logits_ptr, target_ptr, mask_ptr, pos_weight_ptr, scales_ptr, grad_ptr, T, TILES, BT: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    T = T * UNIT
    i = tl.program_id(0)
    i_n = i // TILES
    o_t = (i % TILES) * BT + tl.arange(0, BT)
    start = i_n.to(tl.int64) * T
    z, y, real = _boundary_tile(logits_ptr, target_ptr, mask_ptr, start, o_t, T)
    positive = tl.load(pos_weight_ptr).to(tl.float32) * y
    scale = tl.load(grad_loss_ptr).to(tl.float32) * tl.load(scales_ptr + i_n)
    power = tl.exp(-tl.abs(z))
    # The smaller one of sigmoid(z) and sigmoid(-z) without a difference that would cancel.
    larger, smaller = 1.0 / (1.0 + power), power / (1.0 + power)
    slope = (1.0 - y) * tl.where(z < 0.0, smaller, larger) - positive * tl.where(z < 0.0, larger, smaller)
    grad = tl.where(real, scale * slope, 0.0)
    tl.store(grad_ptr + start + o_t, grad.to(grad_ptr.dtype.element_ty), mask=o_t < T)


def _boundary_tiling(logits: Tensor) -> dict[str, int]:
    return {"BT": 1024, "UNIT": unit(logits.shape[2]), "num_warps": warps(logits, 128)}


def _boundary_loss_forward(
    logits: Tensor, target: Tensor, mask: Tensor, pos_weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss, and what the loss of a frame of each sequence is multiplied with (N,)."""
    n, _, t = logits.shape
    loss, scales = (logits.new_empty(shape, dtype=torch.float32) for shape in ((), (n,)))
    if not launchable(logits):
        return loss, scales
    if logits.numel() == 0:
        return loss.fill_(0.0 if n else torch.nan), scales
    logits, target, mask = rows(logits), rows(target), rows(mask)
    tiling = _boundary_tiling(logits)
    tiles = cdiv(t, tiling["BT"])
    parts, per_part = split(logits, tiling["BT"])
    sums = logits.new_empty(2, n * parts, dtype=torch.float32)
    launch(
        _boundary_loss_sums_kernel, (n * parts,), logits, target, mask, pos_weight, sums, t // tiling["UNIT"], tiles,
        parts, per_part, n * parts, **tiling,
    )  # fmt: skip
    launch(_boundary_loss_mean_kernel, (1,), sums, loss, scales, n, parts, n * parts, BN=16, BP=32)
    return loss, scales


def _boundary_loss_backward(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    mask: Tensor,
    pos_weight: Tensor,
    scales: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor]:
    n, _, t = logits.shape
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if launchable(logits) and logits.numel():
        logits, target, mask = rows(logits), rows(target), rows(mask)
        tiling = _boundary_tiling(logits)
        tiles = cdiv(t, tiling["BT"])
        launch(
            _boundary_loss_backward_kernel, (n * tiles,), grad_loss, logits, target, mask, pos_weight, scales, grad,
            t // tiling["UNIT"], tiles, **tiling,
        )  # fmt: skip
    return (grad,)


def _boundary_loss_unsupported(logits: Tensor, *others: Optional[Tensor]) -> str | None:
    if logits.shape[2] >= TILE_LIMIT:
        return f"{logits.shape[2]} frames exceed 32-bit offsets within a sequence; split the sequence"
    return _only_logits_differentiable(others)


BOUNDARY_LOSS = Operator(
    _boundary_loss_reference,
    _boundary_flops,
    Fused(
        _boundary_loss_forward,
        _boundary_loss_backward,
        differentiable=(0,),
        saved=(1,),
        kept=1,
        unsupported=_boundary_loss_unsupported,
    ),
)


def class_loss(
    logits: Tensor,
    labels: Tensor,
    similarity: Tensor,
    mask: Tensor,
    class_weights: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and similarity-weighted smoothing loss of one stage's class logits.

    Args:
        logits: Tensor (N, K, T).
        labels: int64 Tensor (N, T). Classes 0..K-1; 255 is ignored by the cross-entropy. With another label on a real
            frame the reference raises, or asserts on a GPU; the kernels make the cross-entropy NaN.
        similarity: Tensor (N, T). From :func:`frame_similarity`.
        mask: bool Tensor (N, 1, T). True on real frames.
        class_weights: Tensor (K,), optional.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        (cross_entropy, smoothness): 0-dim tensors, float32 or wider.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    check_shapes(
        "class_loss",
        logits=(logits, "N K T"),
        labels=(labels, "N T"),
        similarity=(similarity, "N T"),
        mask=(mask, "N 1 T"),
        class_weights=(class_weights, "K"),
    )
    check_mask("class_loss", mask)
    return CLASS_LOSS(logits, labels, similarity, mask, class_weights, backend=backend)


def boundary_loss(
    logits: Tensor, target: Tensor, mask: Tensor, pos_weight: Tensor, *, backend: str | None = None
) -> Tensor:
    """Binary cross-entropy of boundary logits on real frames: mean per sequence, then over the batch.

    Args:
        logits: Tensor (N, 1, T).
        target: Tensor (N, T). 1 at each segment's first frame, else 0.
        mask: bool Tensor (N, 1, T). True on real frames.
        pos_weight: Tensor (). Weight of the boundary frames.
        backend: see :mod:`trgnet.kernels.backend`.

    Returns:
        0-dim tensor, float32 or wider.

    Raises:
        ValueError: the shapes do not fit together.
        TypeError: the mask is not bool.
    """
    check_shapes(
        "boundary_loss",
        logits=(logits, "N 1 T"),
        target=(target, "N T"),
        mask=(mask, "N 1 T"),
        pos_weight=(pos_weight, ""),
    )
    check_mask("boundary_loss", mask)
    return BOUNDARY_LOSS(logits, target, mask, pos_weight, backend=backend)
