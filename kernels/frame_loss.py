"""Losses per frame: cross-entropy and smoothing of the class logits, boundary cross-entropy.

With T_n the number of real frames of sequence n:

    cross_entropy = sum w[label] * (-log_softmax(logits)[label]) / sum w[label]   over real, not ignored frames
    smoothness    = mean_n 1/(K (T_n - 1)) sum_(t=1..T_n-1, k) similarity[n,t] *
                    min((later[n,k,t] - earlier[n,k,t-1])^2, 16)
    later         = log_softmax over time of logits[n,k,1..T_n-1]
    earlier       = log_softmax over time of logits[n,k,0..T_n-2]
    similarity[n,t] = exp(-||x[n,:,t] - x[n,:,t-1]||_2 / 2)                 0 at t = 0 and on padded frames
    boundary      = mean_n 1/T_n sum_t BCE_with_logits(logit[n,t], target[n,t]; pos_weight)

The softmax of the smoothness runs over time, not over classes: that is what the published code computes
and what its weights were trained with. A sequence of one frame has no pair and contributes 0.

Shapes: logits (N, K, T), labels (N, T), similarity (N, T), mask (N, 1, T) bool, x (N, C, V, T).
Source: Y. Ishikawa et al., ASRF, arXiv 2007.06866 (Gaussian similarity-weighted truncated MSE).
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as functional
from torch import Tensor

from .operator import Operator, check_mask, check_shapes
from .precision import widened

IGNORE = 255
"""Label of frames that belong to no class: padding, and unannotated frames."""
TRUNCATION = 16.0


def _class_loss_reference(
    logits: Tensor, labels: Tensor, similarity: Tensor, mask: Tensor, class_weights: Optional[Tensor]
) -> tuple[Tensor, Tensor]:
    # Half-precision logits are widened: a log-softmax and a mean over thousands of frames need it.
    logits = widened(logits)
    return (_cross_entropy(logits, labels, mask, class_weights), _smoothness(logits, similarity, mask))


def _cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor, class_weights: Optional[Tensor]) -> Tensor:
    logp = torch.log_softmax(logits, dim=1)
    counted = mask.squeeze(1) & (labels != IGNORE)
    target = torch.where(counted, labels, 0)
    weight = counted.to(logp.dtype)
    if class_weights is not None:
        weight = weight * class_weights.to(logp.dtype)[target]
    picked = logp.gather(1, target.unsqueeze(1)).squeeze(1)
    return -(picked * weight).sum() / weight.sum().clamp(min=torch.finfo(logp.dtype).tiny)


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
    wide = widened(logits.squeeze(1))
    target = torch.where(real, target.to(wide.dtype), 0)  # what padded targets hold does not matter
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
        similarity = torch.exp(-torch.linalg.vector_norm(step, dim=(1, 2)) / 2)
        return functional.pad(torch.where(mask[:, 0, 1:], similarity, 0), (1, 0))


def _class_flops(logits: Tensor, *_: object) -> tuple[int, int]:
    return 15 * logits.numel(), 12 * logits.numel()


def _boundary_flops(logits: Tensor, *_: object) -> tuple[int, int]:
    return 8 * logits.numel(), 5 * logits.numel()


CLASS_LOSS = Operator(_class_loss_reference, _class_flops)
BOUNDARY_LOSS = Operator(_boundary_loss_reference, _boundary_flops)


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
        labels: int64 Tensor (N, T). Classes 0..K-1; 255 is ignored by the cross-entropy.
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
