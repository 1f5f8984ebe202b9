"""One optimizer step on first and second moments, in place, for a list of parameters.

    g <- g + weight_decay * p            (decoupled: p <- (1 - lr * weight_decay) p instead)
    m <- beta1 * m + gain * g
    v <- beta2 * v + (1 - beta2) * g^2                            where there is a second moment
    p <- p - lr * (m / correction1) / ((v / correction2)^alpha + eps)

With gain = 1 and no second moment this is SGD with momentum, whose beta1 a loss-controlled rule may switch
(LCAM); with gain = 1 - beta1 it is second-moment exponential scaling (SMES), at alpha = 1/2 Adam. A switching
beta1 has correction1 = 1 - prod_i beta1_i.

eps stands outside the power. v = 0 gives a finite update at every alpha: v is held at the smallest normal
number before the power is taken.

Source: LCAM, arXiv 2309.02130; SMES, arXiv 2405.18498.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .operator import Operator


def _moment_update_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    gain: float,
    correction1: float,
    correction2: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    for i, (p, g, m) in enumerate(zip(params, grads, first)):
        if decoupled:
            p.mul_(1 - lr * weight_decay)
        elif weight_decay:
            g = g + weight_decay * p
        m.mul_(beta1).add_(g, alpha=gain)
        if second:
            second[i].mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.addcdiv_(m, _power(second[i] / correction2, alpha) + eps, value=-lr / correction1)
        else:
            p.add_(m, alpha=-lr / correction1)


def _power(v: Tensor, alpha: float) -> Tensor:
    v = v.clamp(min=torch.finfo(v.dtype).tiny)
    return v.sqrt() if alpha == 0.5 else v.pow(alpha)


def _flops(
    params: Sequence[Tensor], grads: object, first: object, second: Sequence[Tensor], *_: object
) -> tuple[int, int]:
    return sum(p.numel() for p in params) * (12 if second else 6), 0


OPERATOR = Operator(_moment_update_reference, _flops, mutates=("params", "first", "second"))


def moment_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] = (),
    *,
    lr: float,
    beta1: float,
    beta2: float = 0.999,
    gain: float = 1.0,
    correction1: float = 1.0,
    correction2: float = 1.0,
    alpha: float = 0.5,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    backend: str | None = None,
) -> None:
    """Update parameters and their moments in place; see the formula above.

    Args:
        params: the parameters.
        grads: their gradients, which stay as they are.
        first: first moments (momentum buffers), one per parameter.
        second: second moments, one per parameter; none: no division.
        lr, beta1, beta2, gain, correction1, correction2, alpha, eps, weight_decay, decoupled: as in the formula.
        backend: see :mod:`trgnet.kernels.backend`; "recompute" has nothing to recompute here.

    Raises:
        ValueError: lists of different lengths, or a tensor whose shape is not its parameter's.
    """
    for name, tensors in (("grads", grads), ("first", first), *([("second", second)] if second else [])):
        if [t.shape for t in tensors] != [p.shape for p in params]:
            raise ValueError(
                f"moment_update: {name} has the shapes {[tuple(t.shape) for t in tensors]}, expected those "
                f"of params, {[tuple(p.shape) for p in params]}"
            )
    with torch.no_grad():
        OPERATOR(
            list(params),
            list(grads),
            list(first),
            list(second),
            lr,
            beta1,
            beta2,
            gain,
            correction1,
            correction2,
            alpha,
            eps,
            weight_decay,
            decoupled,
            backend=backend,
        )
