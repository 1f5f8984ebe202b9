"""One optimizer step on first and second moments, in place, for a list of parameters.

    g <- clip / grad_scale * g                        -g where the objective is maximised
    g <- g + l2 * p,   p <- (1 - lr * decay) p
    m <- beta1 * m + gain * g
    v <- beta2 * v + (1 - beta2) * g^2                                    where there is a second moment
    p <- p - lr / correction1 * m / (v^alpha / correction2^alpha + eps)
    p <- p - lr * m                                                        where there is none

    form       gain                                correction1
    sum        1 - dampening, 1 at first           1                                SGD with momentum
    average    1 - beta1                           1 - beta1^t                      Adam at alpha = 1/2
    product    1 - beta1                           1 - beta1_1 * ... * beta1_t      a beta1 that switches

correction2 = 1 - beta2^t. beta1 and alpha are pairs, of which the loss gate chooses (:mod:`.loss_gate`). In the form
"sum", nesterov puts g + beta1 * m in the place of m. t counts the steps of each tensor. eps stands outside the power;
v is held at the smallest normal number before it is taken, so that v = 0 gives a finite step at every alpha.

Half precision is computed in float32 and rounded once: to nearest; to nearest with the rounding error kept beside the
parameter ("kahan": the parameter is the sum of both); or up or down at random with the expectation of the exact value
("stochastic", bfloat16 only, :func:`random_bits`).

Three implementations do the same operations in the same order: :func:`advanced` for one tensor (the reference,
differentiable), :func:`advance_all` with the list functions of PyTorch, and one Triton kernel for all tensors of all
parameter groups.

Source: LCAM, arXiv 2309.02130; SMES, arXiv 2405.18498.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, or_
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from .dropout import hash_bits, kernel_hash
from .launch import device_function, kernel, launch, launchable, obstacle, target_of, tl
from .loss_gate import AVERAGES, PHASE, is_finite, observe, observed, stepped, two_sum
from .operator import Fused, Operator
from .precision import wide_dtype

Number = float | Tensor

FORMS = ("sum", "average", "product")
ROUNDINGS = ("nearest", "kahan", "stochastic")
ROW = ("lr", "l2", "decay", "beta1_low", "beta1_high", "beta2", "eps", "alpha_low", "alpha_high", "dampening",
       "sign", "nesterov", "beta1_low_rest", "beta1_high_rest", "beta2_rest", "free")  # fmt: skip
"""Hyper-parameters of a group as a row of float32 on the device. What float32 rounds off a beta is its ``_rest``: 1 - beta
and log beta need it. ``sign`` is -1 where the objective is maximised, ``nesterov`` 0 or 1."""
COUNTS = ("step", "log_beta1", "log_beta1_rest")
"""What is counted for each tensor, float32: its steps, and, in the form "product", the sum of log beta1 over them with its
rounding error."""
LOG_OF_ZERO = -200.0
"""Stands for log 0: its exponential vanishes beside 1 in any precision, and sums of it stay finite."""


class Hyper(NamedTuple):
    """Hyper-parameters of a group: numbers, or 0-dim tensors on the device of its parameters."""

    lr: Number
    l2: Number = 0.0
    decay: Number = 0.0
    beta1: tuple[Number, Number] = (0.9, 0.9)
    beta2: Number = 0.999
    eps: Number = 1e-8
    alpha: tuple[Number, Number] = (0.5, 0.5)
    dampening: Number = 0.0
    sign: Number = 1.0
    nesterov: Number = 0.0

    @property
    def row(self) -> list[Number]:
        """In the order of :data:`ROW`; what float32 rounds off a tensor is not known."""
        betas, rests = zip(*map(_in_two, (*self.beta1, self.beta2)))
        return [self.lr, self.l2, self.decay, *betas, self.eps, *self.alpha, self.dampening, self.sign,
                self.nesterov, *rests, 0.0]  # fmt: skip

    @staticmethod
    def of_row(row: Tensor) -> Hyper:
        """From a row, in float64."""
        lr, l2, decay, low, high, beta2, eps, alpha_low, alpha_high, dampening, sign, nesterov, *rests, _ = (
            row.double().unbind()
        )
        low, high, beta2 = (beta + rest for beta, rest in zip((low, high, beta2), rests))
        alpha = (alpha_low, alpha_high)
        return Hyper(lr, l2, decay, (low, high), beta2, eps, alpha, dampening, sign, nesterov)


def _in_two(beta: Number) -> tuple[Number, float]:
    """A number in float32, and what that rounds off; a tensor as it is."""
    if isinstance(beta, Tensor):
        return beta, 0.0
    (rounded,) = struct.unpack("f", struct.pack("f", beta))
    return rounded, beta - rounded


class Scalars(NamedTuple):
    """What one step does to every element: numbers, or 0-dim tensors."""

    step_size: Number
    l2: Number
    shrink: Number
    beta1: Number
    gain: Number
    beta2: Number
    square: Number
    """1 - beta2, of the exact beta2."""
    eps: Number
    alpha: Number
    root: Number
    """correction2^alpha."""
    scale: Number
    """What multiplies gradients."""
    nesterov: Number
    average: bool
    """Whether gain is 1 - beta1."""

    def beside(self, p: Tensor) -> Scalars:
        """In the dtype that ``p`` is computed in, on its device."""
        return Scalars(*(x.to(p.device, wide_dtype(p)) if isinstance(x, Tensor) else x for x in self))


def step_scalars(hyper: Hyper, form: str, second: bool, phase: Number, counts: Sequence[Number]) -> Scalars:
    """The scalars of a step from hyper-parameters, phase and counts before the step; in float64."""
    step, log, rest = counts
    beta1, alpha = _chosen(phase, *hyper.beta1), _chosen(phase, *hyper.alpha)
    step_size, gain, root = hyper.lr, 1 - beta1, 1.0
    if form == "sum":
        gain = _chosen(step, 1.0, 1 - hyper.dampening)
    else:
        log = log_of(beta1) * (step + 1) if form == "average" else log + rest + log_of(beta1)
        step_size = step_size / _one_minus_exp(log)
    if second:
        root = _one_minus_exp(log_of(hyper.beta2) * (step + 1)) ** alpha
    return Scalars(step_size, hyper.l2, 1 - hyper.lr * hyper.decay, beta1, gain, hyper.beta2, 1 - hyper.beta2, hyper.eps,
                   alpha, root, hyper.sign, hyper.nesterov, form != "sum")  # fmt: skip


def _chosen(which: Number, at_zero: Number, otherwise: Number) -> Number:
    if not isinstance(which, Tensor):
        return otherwise if which else at_zero
    pair = [
        x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.float64, device=which.device)
        for x in (at_zero, otherwise)
    ]
    return torch.where(which == 0, *pair)


def log_of(beta: Number) -> Number:
    if isinstance(beta, Tensor):
        return beta.log().clamp(min=LOG_OF_ZERO)
    return math.log(beta) if beta > 0 else LOG_OF_ZERO


def _one_minus_exp(x: Number) -> Number:
    return -torch.expm1(x) if isinstance(x, Tensor) else -math.expm1(x)


def count_step(counts: Tensor, rows: Sequence[int], form: str, beta1: Number) -> None:
    """Count a step of the tensors with these rows of ``counts`` (n, 3); logarithms only where the form asks for them."""
    index = slice(None) if len(rows) == len(counts) else torch.tensor(rows, device=counts.device)
    counts[index, 0] += 1
    if form == "product":
        _, log, rest = counts[index].unbind(1)
        log = log.double() + rest.double() + log_of(beta1)
        rounded = log.float()
        counts[index, 1:] = torch.stack([rounded, (log - rounded).float()], 1)


def advanced(
    p: Tensor, g: Tensor, m: Tensor, v: Optional[Tensor], s: Scalars
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """(p, m, v) after a step, of one dtype; differentiable."""
    g = _times(g, s.scale)
    if not _is(s.l2, 0):
        g = _plus(g, p, s.l2)
    p = _times(p, s.shrink)
    if s.average and not isinstance(s.gain, Tensor):
        m = torch.lerp(m, g, s.gain)
    else:
        m = _plus(m * s.beta1, g, s.gain)
    u = m if _is(s.nesterov, 0) else _plus(g, m, s.beta1)
    if isinstance(s.nesterov, Tensor):
        u = torch.where(s.nesterov == 0, m, u)
    if v is None:
        return _plus(p, u, -s.step_size), m, None
    if isinstance(s.beta2, Tensor):
        v = v * s.beta2 + g * g * s.square
    else:
        v = torch.addcmul(v * s.beta2, g, g, value=s.square)
    denominator = _power(v, s) / s.root + s.eps
    if isinstance(s.step_size, Tensor):
        return p - u * s.step_size / denominator, m, v
    return torch.addcdiv(p, u, denominator, value=-s.step_size), m, v


def _is(x: Number, value: float) -> bool:
    return not isinstance(x, Tensor) and x == value


def _times(x: Tensor, a: Number) -> Tensor:
    return x if _is(a, 1) else x * a


def _plus(x: Tensor, y: Tensor, a: Number) -> Tensor:
    return x + y * a if isinstance(a, Tensor) else torch.add(x, y, alpha=a)


def _power(v: Tensor, s: Scalars) -> Tensor:
    if _is(s.alpha, 0.5) and _is_positive(s.eps):
        return v.sqrt()  # beside eps, the smallest normal number is nothing
    v = v.clamp(min=torch.finfo(v.dtype).tiny)
    return v.sqrt() if _is(s.alpha, 0.5) else v.pow(s.alpha)


def _is_positive(x: Number) -> bool:
    return not isinstance(x, Tensor) and x > 0


def advance_all(
    p: list[Tensor], g: list[Tensor], m: list[Tensor], v: list[Tensor], s: Scalars, own_gradients: bool
) -> None:
    """The same as :func:`advanced`, in place on lists. ``own_gradients``: whether those may be changed too."""
    if not _is(s.scale, 1):
        g, own_gradients = list(torch._foreach_mul(g, s.scale)), True
    if not _is(s.l2, 0):
        g = _plus_all_(g, p, s.l2) if own_gradients else _plus_all(g, p, s.l2)
    if not _is(s.shrink, 1):
        torch._foreach_mul_(p, s.shrink)
    if s.average and not isinstance(s.gain, Tensor):
        torch._foreach_lerp_(m, g, s.gain)
    else:
        torch._foreach_mul_(m, s.beta1)
        _plus_all_(m, g, s.gain)
    u = m if _is(s.nesterov, 0) else _plus_all(g, m, s.beta1)
    if not v:
        _plus_all_(p, u, -s.step_size)
        return
    torch._foreach_mul_(v, s.beta2)
    if isinstance(s.beta2, Tensor):
        squares = torch._foreach_mul(g, g)
        torch._foreach_mul_(squares, s.square)
        torch._foreach_add_(v, squares)
    else:
        torch._foreach_addcmul_(v, g, g, value=s.square)
    denominator = _power_all(v, s)
    torch._foreach_div_(denominator, s.root)
    # A single tensor would be read by the host there.
    torch._foreach_add_(denominator, [s.eps] * len(p) if isinstance(s.eps, Tensor) else s.eps)
    if isinstance(s.step_size, Tensor):
        u = torch._foreach_mul(u, s.step_size)
        torch._foreach_div_(u, denominator)
        torch._foreach_sub_(p, u)
    else:
        torch._foreach_addcdiv_(p, u, denominator, value=-s.step_size)


def _plus_all(x: Sequence[Tensor], y: Sequence[Tensor], a: Number) -> list[Tensor]:
    if isinstance(a, Tensor):
        return list(torch._foreach_add(x, torch._foreach_mul(y, a)))
    return list(torch._foreach_add(x, y, alpha=a))


def _plus_all_(x: list[Tensor], y: Sequence[Tensor], a: Number) -> list[Tensor]:
    if isinstance(a, Tensor):
        torch._foreach_add_(x, torch._foreach_mul(y, a))
    else:
        torch._foreach_add_(x, y, alpha=a)
    return x


def _power_all(v: list[Tensor], s: Scalars) -> list[Tensor]:
    if _is(s.alpha, 0.5) and _is_positive(s.eps):
        return list(torch._foreach_sqrt(v))
    clamped = list(torch._foreach_clamp_min(v, torch.finfo(v[0].dtype).tiny))
    if isinstance(s.alpha, Tensor):
        return [x.pow_(s.alpha) for x in clamped]
    torch._foreach_sqrt_(clamped) if s.alpha == 0.5 else torch._foreach_pow_(clamped, s.alpha)
    return clamped


class Draw(NamedTuple):
    """What the random bits of one tensor depend on, beside the element."""

    seed: int
    step: Number
    row: int


def random_bits(draw: Draw, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """16 bits in int32 for each element of ``like`` in its layout: for the parameter, the first and the second moment.

    With ``hash`` as in :mod:`.dropout` and i the place of an element in memory:

        key = hash(hash(seed xor step) xor row),   word = hash(key xor i),   other = hash(word xor key)
        parameter: lower half of word,   first moment: upper half of word,   second moment: lower half of other
    """
    step = torch.as_tensor(draw.step, device=like.device).to(torch.int32)
    key = hash_bits(hash_bits(step ^ draw.seed) ^ draw.row)
    word = hash_bits(key ^ _memory_order(like))
    return word & 0xFFFF, (word >> 16) & 0xFFFF, hash_bits(word ^ key) & 0xFFFF


def _memory_order(like: Tensor) -> Tensor:
    place = torch.arange(like.numel(), dtype=torch.int32, device=like.device)
    return place.as_strided(like.shape, like.stride()) if is_dense(like) else place.view(like.shape)


def is_dense(t: Tensor) -> bool:
    """Whether the elements of ``t`` fill a block of memory, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape)):
        if size != 1:
            if stride != expected:
                return t.numel() == 0
            expected *= size
    return True


def _rounded(x: Tensor, dtype: torch.dtype, bits: Optional[Tensor]) -> Tensor:
    """``x`` in ``dtype``, up or down at random where there are bits and it is narrower."""
    if bits is None or dtype != torch.bfloat16:
        return x.to(dtype)
    # bfloat16 is the upper half of float32: what is added carries into it as often as the lower half is large.
    carried = ((x.view(torch.int32) + bits) & -65536).view(torch.float32)
    return torch.where(torch.isfinite(x), carried, x).to(dtype)


class Moments(NamedTuple):
    """Lists of tensors, one of each for every parameter; ``second`` and ``spare`` may be empty.

    spare: rounding errors of half-precision parameters ("kahan").
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    first: Sequence[Tensor]
    second: Sequence[Tensor] = ()
    spare: Sequence[Tensor] = ()

    def part(self, indices: Sequence[int]) -> Moments:
        return Moments(*([tensors[i] for i in indices] if tensors else [] for tensors in self))


def update_one_by_one(moments: Moments, s: Scalars, draws: Sequence[Optional[Draw]]) -> Iterator[Moments]:
    """New values of each tensor in the dtypes of the old ones (no gradients): the reference."""
    params, grads, first, second, spare = moments
    for i, (p, g, m) in enumerate(zip(params, grads, first)):
        dtype = wide_dtype(p)
        bits = random_bits(draws[i], p) if draws[i] else (None, None, None)
        v, c = second[i] if second else None, spare[i] if spare else None
        wide = p.to(dtype) if c is None else p.to(dtype) + c.to(dtype)
        new, new_m, new_v = advanced(
            wide, g.to(dtype), m.to(dtype), None if v is None else v.to(dtype), s.beside(p)
        )
        new_p = _rounded(new, p.dtype, bits[0])
        yield Moments(
            [new_p],
            [],
            [_rounded(new_m, m.dtype, bits[1])],
            [] if v is None else [_rounded(new_v, v.dtype, bits[2])],
            [] if c is None else [(new - new_p.to(dtype)).to(c.dtype)],
        )


SLICE = 1 << 18
"""Elements that the list functions take at a time on a CPU: what they leave between stays in its cache."""


def update_all(moments: Moments, s: Scalars, draws: Sequence[Optional[Draw]]) -> None:
    """The same as :func:`update_one_by_one`, in place, with the list functions of PyTorch."""
    for indices in _alike(moments):
        s_here = s.beside(moments.params[indices[0]])
        for some in _slices(moments.params, indices):
            _update_slice(moments.part(some), s_here, [draws[i] for i in some])


def _update_slice(moments: Moments, s: Scalars, draws: Sequence[Optional[Draw]]) -> None:
    dtype = wide_dtype(moments.params[0])
    if all(not tensors or tensors[0].dtype == dtype for tensors in moments):
        params, grads, first, second, _ = moments
        advance_all(params, grads, first, second, s, own_gradients=False)
        return
    p, g, m, v, c = ([t.to(dtype) for t in tensors] for tensors in moments)
    if c:
        torch._foreach_add_(p, c)
    advance_all(p, g, m, v, s, own_gradients=moments.grads[0].dtype != dtype)
    _store_all(moments, p, m, v, draws)


def _alike(moments: Moments) -> list[list[int]]:
    """Indices of tensors of equal device and dtypes."""
    lists = [tensors for tensors in moments if tensors]
    if len({t.device for t in lists[0]}) == 1 and all(
        len({t.dtype for t in tensors}) == 1 for tensors in lists
    ):
        return [list(range(len(lists[0])))]
    kinds: dict[Any, list[int]] = {}
    for i, p in enumerate(moments.params):
        kinds.setdefault((p.device, *(tensors[i].dtype for tensors in lists)), []).append(i)
    return list(kinds.values())


def _slices(params: Sequence[Tensor], indices: list[int]) -> Iterator[list[int]]:
    """The indices in slices of at least ``SLICE`` elements on a CPU, all at once elsewhere."""
    if params[indices[0]].device.type != "cpu":
        yield indices
        return
    start, size = 0, 0
    for end, i in enumerate(indices, start=1):
        size += params[i].numel()
        if size >= SLICE or end == len(indices):
            yield indices[start:end]
            start, size = end, 0


def _store_all(
    moments: Moments, p: list[Tensor], m: list[Tensor], v: list[Tensor], draws: Sequence[Optional[Draw]]
) -> None:
    """Round what was computed into the tensors; what was computed in place stays."""
    params, _, first, second, spare = moments
    for i, param in enumerate(params):
        bits = random_bits(draws[i], param) if draws[i] else (None, None, None)
        pairs = [(param, p[i]), (first[i], m[i])] + ([(second[i], v[i])] if second else [])
        for (old, new), old_bits in zip(pairs, bits):
            if new is not old:
                old.copy_(_rounded(new, old.dtype, old_bits))
        if spare:
            spare[i].copy_(p[i] - param.to(p[i].dtype))


def gate_step(
    control: Optional[Tensor],
    history: Optional[Tensor],
    loss: Optional[Tensor],
    average: str,
    share: float,
    same: bool,
) -> tuple[Number, Optional[Tensor], Optional[Tensor]]:
    """The phase of a step, and control block and window after it. ``same``: the loss decides on its own step."""
    if control is None:
        return 1.0, None, None
    after, history_after = control, history
    if loss is not None:
        after, history_after = observed(control, history, loss.float(), average, share)
    phase = (after if same else control)[PHASE]
    return phase, stepped(after, phase), history_after


def _moment_update_reference(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    spare: Sequence[Tensor],
    groups: Sequence[int],
    places: Sequence[int],
    rows: Tensor,
    counts: Tensor,
    control: Optional[Tensor],
    history: Optional[Tensor],
    loss: Optional[Tensor],
    clip: Optional[Tensor],
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
    form: str,
    average: str,
    share: float,
    same: bool,
    rounding: str,
    seed: int,
) -> None:
    moments = Moments(params, grads, first, second, spare)
    phase, new_control, new_history = gate_step(control, history, loss, average, share, same)
    new_counts = counts.clone()
    changed = []
    for i, (group, place) in enumerate(zip(groups, places)):
        hyper, step = Hyper.of_row(rows[group]), counts[place].double()
        s = step_scalars(hyper, form, bool(second), phase, step.unbind())
        part = moments.part([i])
        for factor in (clip, None if grad_scale is None else 1 / grad_scale):
            if factor is not None:
                s = s._replace(scale=s.scale * factor)
        draw = Draw(seed, step[0], place) if rounding == "stochastic" else None
        changed += zip(part, next(update_one_by_one(part, s, [draw])))
        count_step(new_counts, [place], form, s.beta1)
    changed.append(([counts, control, history], [new_counts, new_control, new_history]))
    for old, new in ((o, n) for olds, news in changed for o, n in zip(olds, news) if o is not None):
        old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))


def _flops(
    params: Sequence[Tensor], grads: object, first: object, second: Sequence[Tensor], *_: object
) -> tuple[int, int]:
    return sum(p.numel() for p in params) * (12 if second else 6), 0


@device_function
def _log_beta(beta, rest):
    """log(beta + rest); the hardware's logarithm is inaccurate near 1, where betas are."""
    x = 1.0 - beta - rest
    s = x / (2.0 - x)  # log(1 - x) = -2 atanh(s)
    q = s * s
    series = s * (2 + q * (2 / 3 + q * (2 / 5 + q * (2 / 7 + q * (2 / 9 + q * (2 / 11 + q * (2 / 13)))))))
    far = tl.log(tl.maximum(beta, 1e-37)) + rest
    near = x < 0.5
    return tl.where(near, -series, tl.where(beta > 0, far, -200.0))


@device_function
def _one_minus_exponential(x):
    """1 - exp(x) for x <= 0, without cancellation near 0."""
    y = tl.maximum(x, -0.5)
    series = 1 + y / 2 * (1 + y / 3 * (1 + y / 4 * (1 + y / 5 * (1 + y / 6 * (1 + y / 7 * (1 + y / 8))))))
    return tl.where(x > -0.5, -y * series, 1 - tl.exp(x))


@device_function
def _power_of(v, alpha):
    """v^alpha for normal v > 0, to float32's accuracy, between its smallest normal number and its largest.

    With v = f 2^k, 1/sqrt(2) <= f < sqrt(2), the exponent alpha k + alpha log2 f is taken apart into an integer and a small
    rest: the first product is exact for the upper half of alpha's bits.
    """
    bits = v.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True)
    upper = (alpha.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    kf = k.to(tl.float32)
    whole = tl.floor(upper * kf + 0.5)
    rest = (upper * kf - whole) + ((alpha - upper) * kf + alpha * tl.log2(f))
    whole = tl.minimum(tl.maximum(whole, -126.0), 127.0)
    rest = tl.minimum(tl.maximum(rest, -126.0), 127.0)
    scale = ((whole.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(tl.exp2(rest) * scale, 1.1754944e-38), 3.4028234e38)


@device_function
def _hash32(x):
    """The hash of :mod:`.dropout` on int32."""
    return kernel_hash(x.to(tl.uint32, bitcast=True)).to(tl.int32, bitcast=True)


@device_function
def _narrowed(x, bits, KIND: tl.constexpr, RANDOM: tl.constexpr):
    """Float32 ``x`` rounded to ``KIND``, still in float32; ``RANDOM`` rounds to bfloat16 up or down."""
    if KIND == tl.bfloat16:
        word = x.to(tl.int32, bitcast=True)
        if RANDOM:
            carried = word + bits
        else:
            carried = word + 0x7FFF + ((word >> 16) & 1)  # to nearest, ties to even
        x = tl.where(is_finite(x), (carried & -65536).to(tl.float32, bitcast=True), x)
    return x.to(KIND).to(tl.float32)


@device_function
def _update_tile(
    p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, start, size, key, scale, step_size, l2, shrink, beta1, gain, beta2, square,
    eps, alpha, root, nesterov, TILE: tl.constexpr, FULL: tl.constexpr, ROUNDING: tl.constexpr,
):  # fmt: skip
    """Update ``TILE`` elements from ``start`` on, those before ``size`` unless the tile is full."""
    offsets = tl.arange(0, TILE)
    mask = None if FULL else offsets < size - start
    p = tl.load(p_ptr + start + offsets, mask=mask).to(tl.float32)
    if c_ptr is not None:
        p += tl.load(c_ptr + start + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + start + offsets, mask=mask).to(tl.float32) * scale
    g = tl.where(l2 != 0, g + l2 * p, g)
    p = p * shrink
    m = tl.load(m_ptr + start + offsets, mask=mask).to(tl.float32)
    m = beta1 * m + gain * g
    u = tl.where(nesterov != 0, g + beta1 * m, m)
    P: tl.constexpr = p_ptr.dtype.element_ty
    M: tl.constexpr = m_ptr.dtype.element_ty
    RANDOM: tl.constexpr = ROUNDING == "stochastic"
    word = key
    if RANDOM:
        word = _hash32(key ^ (tl.cast(start, tl.int64).to(tl.int32) + offsets))
    if v_ptr is not None:
        v = tl.load(v_ptr + start + offsets, mask=mask).to(tl.float32)
        v = beta2 * v + square * g * g
        V: tl.constexpr = v_ptr.dtype.element_ty
        stored = _narrowed(v, _hash32(word ^ key) & 0xFFFF, V, RANDOM)
        tl.store(v_ptr + start + offsets, stored.to(V), mask=mask)
        v = tl.maximum(v, 1.1754944e-38)
        if alpha == 0.5:
            power = tl.sqrt_rn(v)
        else:
            power = _power_of(v, alpha)
        p -= step_size * u / (power / root + eps)
    else:
        p -= step_size * u
    tl.store(m_ptr + start + offsets, _narrowed(m, (word >> 16) & 0xFFFF, M, RANDOM).to(M), mask=mask)
    rounded = _narrowed(p, word & 0xFFFF, P, RANDOM)
    tl.store(p_ptr + start + offsets, rounded.to(P), mask=mask)
    if c_ptr is not None:
        lost = _narrowed(p - rounded, word, P, False)
        tl.store(c_ptr + start + offsets, lost.to(P), mask=mask)


@device_function
def _pointer(table_ptr, place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address at ``place`` of the table as a pointer; None where there is no such list."""
    pointer = None
    if TYPE is not None:
        pointer = tl.load(table_ptr + place).to(tl.pointer_type(TYPE))
        if ALIGNED:
            pointer = tl.multiple_of(pointer, 16)
    return pointer


@device_function
def _commit(
    members_ptr, members, rows_ptr, counts_ptr, control_ptr, history_ptr, loss_ptr, mean, rest, count, phase, place,
    used, WIDTH: tl.constexpr, FORM: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """Count the step of every tensor, and write the control block."""
    for i in range(0, members, WIDTH):
        offsets = i + tl.arange(0, WIDTH)
        mask = offsets < members
        counted = counts_ptr + 3 * tl.load(members_ptr + offsets, mask=mask, other=0)
        row = rows_ptr + 16 * tl.load(members_ptr + members + offsets, mask=mask, other=0)
        tl.store(counted, tl.load(counted, mask=mask) + 1, mask=mask)
        if FORM == "product":
            beta = tl.load(row + tl.where(used != 0, 4, 3), mask=mask, other=0.5)
            beta_rest = tl.load(row + tl.where(used != 0, 13, 12), mask=mask, other=0.0)
            log, error = two_sum(tl.load(counted + 1, mask=mask), _log_beta(beta, beta_rest))
            log, error = two_sum(log, error + tl.load(counted + 2, mask=mask))
            tl.store(counted + 1, log, mask=mask)
            tl.store(counted + 2, error, mask=mask)
    if control_ptr is not None:
        if KIND == "window" and loss_ptr is not None:
            loss = tl.load(loss_ptr).to(tl.float32)
            before = tl.load(control_ptr + 6).to(tl.int32)
            tl.store(history_ptr + before, loss, mask=is_finite(loss))
        tl.store(control_ptr, mean)
        tl.store(control_ptr + 1, rest)
        tl.store(control_ptr + 2, count)
        tl.store(control_ptr + 3, phase)
        tl.store(control_ptr + 4, tl.load(control_ptr + 4) + (1 - used))
        tl.store(control_ptr + 5, tl.load(control_ptr + 5) + used)
        tl.store(control_ptr + 6, place)


@kernel
def _moment_update_kernel(
    table_ptr, members_ptr, rows_ptr, counts_ptr, done_ptr, control_ptr, history_ptr, loss_ptr, clip_ptr,
    grad_scale_ptr, found_inf_ptr, tensors, members, programs, window, share, seed,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    FORM: tl.constexpr, KIND: tl.constexpr, SAME: tl.constexpr, ROUNDING: tl.constexpr, TILE: tl.constexpr,
    TILES: tl.constexpr, NARROW: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    mean, rest, count, place, phase = 0.0, 0.0, 0.0, 0.0, 1.0
    used = phase
    if control_ptr is not None:
        mean, rest, count = tl.load(control_ptr), tl.load(control_ptr + 1), tl.load(control_ptr + 2)
        phase, place = tl.load(control_ptr + 3), tl.load(control_ptr + 6)
        used = phase
        if loss_ptr is not None:
            mean, rest, count, phase, place = observe(
                mean, rest, count, phase, place, tl.load(loss_ptr).to(tl.float32), history_ptr, window, share, KIND,
            )  # fmt: skip
        if SAME:
            used = phase
    skipped = 0.0
    if found_inf_ptr is not None:
        skipped = tl.load(found_inf_ptr).to(tl.float32)
    if skipped == 0:
        entry = tl.load(table_ptr + 8 * tensors + tl.program_id(0))
        _update_chunk(
            table_ptr, entry >> 32, entry & 0xFFFFFFFF, rows_ptr, counts_ptr, clip_ptr, grad_scale_ptr, used,
            tensors, seed, P, G, M, V, C, ALIGNED, FORM, ROUNDING, TILE, TILES, NARROW,
        )  # fmt: skip
    # Every thread has read what the last program is about to change.
    tl.debug_barrier()
    finished = tl.atomic_add(done_ptr, 1, sem="acq_rel") + 1
    if finished == programs:
        tl.store(done_ptr, 0)
        if skipped == 0:
            _commit(
                members_ptr, members, rows_ptr, counts_ptr, control_ptr, history_ptr, loss_ptr, mean, rest, count,
                phase, place, used, WIDTH, FORM, KIND,
            )  # fmt: skip


@device_function
def _update_chunk(
    table_ptr, i, chunk, rows_ptr, counts_ptr, clip_ptr, grad_scale_ptr, used, tensors, seed,
    P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ALIGNED: tl.constexpr,
    FORM: tl.constexpr, ROUNDING: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Update chunk ``chunk`` of tensor ``i``: the scalars of the step, full tiles, then what remains in narrow ones."""
    row = rows_ptr + 16 * tl.load(table_ptr + 6 * tensors + i)
    counted = tl.load(table_ptr + 7 * tensors + i)
    step = tl.load(counts_ptr + 3 * counted)
    lr, l2, decay = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    beta1, beta1_rest = tl.load(row + tl.where(used != 0, 4, 3)), tl.load(row + tl.where(used != 0, 13, 12))
    scale, nesterov = tl.load(row + 10), tl.load(row + 11)
    step_size, gain = lr, 1 - beta1 - beta1_rest
    if FORM == "sum":
        gain = tl.where(step == 0, 1.0, 1 - tl.load(row + 9))
    elif FORM == "average":
        step_size = lr / _one_minus_exponential(_log_beta(beta1, beta1_rest) * (step + 1))
    else:
        log = tl.load(counts_ptr + 3 * counted + 1) + tl.load(counts_ptr + 3 * counted + 2)
        step_size = lr / _one_minus_exponential(log + _log_beta(beta1, beta1_rest))
    beta2, square, eps, alpha, root = 0.0, 0.0, 0.0, 0.5, 1.0
    if V is not None:
        beta2, beta2_rest, eps = tl.load(row + 5), tl.load(row + 14), tl.load(row + 6)
        alpha = tl.load(row + tl.where(used != 0, 8, 7))
        square = 1 - beta2 - beta2_rest
        correction = _one_minus_exponential(_log_beta(beta2, beta2_rest) * (step + 1))
        if alpha == 0.5:
            root = tl.sqrt_rn(correction)
        else:
            root = _power_of(correction, alpha)
    if clip_ptr is not None:
        scale *= tl.load(clip_ptr).to(tl.float32)
    if grad_scale_ptr is not None:
        scale = tl.div_rn(scale, tl.load(grad_scale_ptr).to(tl.float32))
    key = seed
    if ROUNDING == "stochastic":
        key = _hash32(_hash32(step.to(tl.int32) ^ seed) ^ counted.to(tl.int32))
    p_ptr, g_ptr = _pointer(table_ptr, i, P, ALIGNED), _pointer(table_ptr, tensors + i, G, ALIGNED)
    # One assignment each: Triton 3.6 has no None in a tuple.
    m_ptr = _pointer(table_ptr, 2 * tensors + i, M, ALIGNED)
    v_ptr = _pointer(table_ptr, 3 * tensors + i, V, ALIGNED)
    c_ptr = _pointer(table_ptr, 4 * tensors + i, C, ALIGNED)
    start = chunk * (TILE * TILES)
    end = tl.minimum(tl.load(table_ptr + 5 * tensors + i), start + TILE * TILES)
    full = start + (end - start) // TILE * TILE
    for at in range(start, full, TILE):
        _update_tile(
            p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, at, end, key, scale, step_size, l2, 1 - lr * decay, beta1, gain,
            beta2, square, eps, alpha, root, nesterov, TILE, True, ROUNDING,
        )  # fmt: skip
    for at in range(full, end, NARROW):
        _update_tile(
            p_ptr, g_ptr, m_ptr, v_ptr, c_ptr, at, end, key, scale, step_size, l2, 1 - lr * decay, beta1, gain,
            beta2, square, eps, alpha, root, nesterov, NARROW, False, ROUNDING,
        )  # fmt: skip


WARPS = 4
PER_THREAD = 8
"""Elements that a thread holds of each tensor: 16 bytes of the narrowest, and few enough to stay in registers."""
TILES = 8
"""Full tiles of one program: they share the scalars of the step."""
_LISTS = 5
_TRITON = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class _Part:
    """The tensors of one launch: equal dtypes, equally aligned."""

    types: dict[str, Any]
    indices: list[int]
    table: Tensor
    programs: int


class MomentTable:
    """Where the tensors of a step are, as the kernel reads it: addresses, sizes, and which program does which chunk.

    The table stays valid as long as no tensor moves (:meth:`follow`); a step with it starts one kernel for each combination
    of dtypes, and copies only tensors whose layout is not that of their parameter, or whose parameter has gaps. It holds
    addresses, not tensors: gradients that their owner drops are free.

    Args:
        moments: the tensors, on one device; ``spare`` may hold None for parameters that need none.
        groups: for each parameter, its row of hyper-parameters.
        places: for each parameter, its row of counts.
    """

    def __init__(self, moments: Moments, groups: Sequence[int], places: Sequence[int]) -> None:
        params = moments.params
        self.device = params[0].device
        self.groups, self.places = groups, places
        self.stand_ins: dict[tuple[int, int], Tensor] = {}
        """By list and index: tensors in the dense layout of their parameter, in the place of those that are not."""
        self.hosts: list[Tensor] = []
        layouts = [p if is_dense(p) else torch.empty_like(p) for p in params]
        lists = [self._dense(k, tensors, layouts) for k, tensors in enumerate(moments)]
        self.width = WARPS * (64 if target_of(params[0]).backend == "hip" else 32)
        self.members = self._on_device([*places, *groups])
        self.done = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.parts = [self._part(lists, *kind) for kind in _kinds(lists)]
        self.programs = sum(part.programs for part in self.parts)
        self._gradient_layouts, self._addresses = _layouts(moments.grads), _addresses(moments)

    def follow(self, moments: Moments, *, move_gradients: bool) -> bool:
        """Return whether the table is that of these tensors, which must be in the same order.

        Gradients are usually made anew in every step. With ``move_gradients`` the table takes up their new addresses, if
        nothing else has changed: one small copy. Without it they count as changed.

        This looks at every tensor in every step, so it looks at little. Gradients are compared by address, dtype, strides and
        size. Parameters and moments are compared by address: where their dtype or strides change, torch moves them to other
        memory. A parameter that becomes another view of its memory shows in its gradient, which has its shape and strides.
        """
        if _layouts(moments.grads) != self._gradient_layouts:
            return False
        addresses = _addresses(moments)
        if addresses == self._addresses:
            return True
        others = zip(
            addresses[:_GRADS] + addresses[_GRADS + 1 :],
            self._addresses[:_GRADS] + self._addresses[_GRADS + 1 :],
        )
        if not move_gradients or any(now != then for now, then in others):
            return False
        if not _all_aligned(addresses[_GRADS]) or not _all_aligned(self._addresses[_GRADS]):
            return False  # they may be for another variant of the kernel
        self._addresses = addresses
        self._move_gradients(addresses[_GRADS])
        return True

    def _move_gradients(self, addresses: list[int]) -> None:
        stand_ins = {i: t.data_ptr() for (k, i), t in self.stand_ins.items() if k == _GRADS}
        if stand_ins:
            addresses = [stand_ins.get(i, address) for i, address in enumerate(addresses)]
        for part in self.parts:
            count = len(part.indices)
            own = addresses if count == len(addresses) else [addresses[i] for i in part.indices]
            part.table[_GRADS * count : (_GRADS + 1) * count].copy_(self._on_host(own), non_blocking=True)

    def _dense(
        self, k: int, tensors: Sequence[Optional[Tensor]], layouts: Sequence[Tensor]
    ) -> list[Optional[Tensor]]:
        for i, (tensor, layout) in enumerate(zip(tensors, layouts)):
            if tensor is not None and not _same_layout(tensor, layout):
                self.stand_ins[k, i] = torch.empty_like(layout, dtype=tensor.dtype)
        return [self.stand_ins.get((k, i), tensor) for i, tensor in enumerate(tensors)]

    def _part(self, lists: list[list[Tensor]], types: dict[str, Any], indices: list[int]) -> _Part:
        sizes = [lists[0][i].numel() for i in indices]
        chunk = self.width * PER_THREAD * TILES
        entries = [
            (place << 32) + at for place, size in enumerate(sizes) for at in range(max(1, -(-size // chunk)))
        ]
        addresses = [[_address(tensors[i]) if tensors else 0 for i in indices] for tensors in lists]
        rows = [*addresses, sizes, [self.groups[i] for i in indices], [self.places[i] for i in indices]]
        return _Part(
            types, indices, self._on_device([x for row in (*rows, entries) for x in row]), len(entries)
        )

    def _on_device(self, numbers: list[int]) -> Tensor:
        # A graph that the copy is captured into does it again at every replay.
        self.hosts.append(self._on_host(numbers))
        return self.hosts[-1].to(self.device, non_blocking=True)

    def _on_host(self, numbers: list[int]) -> Tensor:
        host = torch.frombuffer(array("q", numbers), dtype=torch.int64)
        # PyTorch hands out pinned memory again only once the copy from it is done.
        return host.pin_memory() if self.device.type == "cuda" else host

    def launch(
        self,
        moments: Moments,
        rows: Tensor,
        counts: Tensor,
        control: Optional[Tensor] = None,
        history: Optional[Tensor] = None,
        loss: Optional[Tensor] = None,
        clip: Optional[Tensor] = None,
        grad_scale: Optional[Tensor] = None,
        found_inf: Optional[Tensor] = None,
        *,
        form: str,
        average: str = "mean",
        share: float = 0.0,
        same: bool = False,
        rounding: str = "nearest",
        seed: int = 0,
    ) -> None:
        """Do one step on the tensors, which lie where they lay when the table was made.

        The arguments are those of :func:`moment_update`, tensors on the tensors' device.
        """
        for (k, i), stand_in in self.stand_ins.items():
            stand_in.copy_(moments[k][i])
        tile = self.width * PER_THREAD
        for part in self.parts:
            launch(
                _moment_update_kernel, (part.programs,), part.table, self.members, rows, counts, self.done, control,
                history, loss, clip, grad_scale, found_inf, len(part.indices), len(self.places), self.programs,
                0 if history is None else len(history), share, seed, **part.types, FORM=form, KIND=average, SAME=same,
                ROUNDING=rounding, TILE=tile, TILES=TILES, NARROW=self.width, WIDTH=self.width, num_warps=WARPS,
            )  # fmt: skip
        for (k, i), stand_in in self.stand_ins.items():
            if moments[k] is not moments.grads:
                moments[k][i].copy_(stand_in)


_GRADS = Moments._fields.index("grads")
_DTYPE = attrgetter("dtype")


def _layouts(tensors: Sequence[Tensor]) -> list[list[Any]]:
    """Strides, dtypes and sizes, by one pass in C for each."""
    return [list(map(of, tensors)) for of in (Tensor.stride, _DTYPE, Tensor.numel)]


def _addresses(moments: Moments) -> list[list[int]]:
    lists = [*moments[:-1], [t for t in moments.spare if t is not None]]
    return [list(map(Tensor.data_ptr, tensors)) for tensors in lists]


def _all_aligned(addresses: list[int]) -> bool:
    return reduce(or_, addresses, 0) % 16 == 0


def _address(tensor: Optional[Tensor]) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _same_layout(tensor: Tensor, layout: Tensor) -> bool:
    return tensor.stride() == layout.stride() and is_dense(tensor)


def _kinds(lists: list[list[Tensor]]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Dtypes and alignment of the tensors of one launch, as the kernel's constants, and which they are."""
    kinds: dict[Any, list[int]] = {}
    for i in range(len(lists[0])):
        tensors = [tensors[i] if tensors else None for tensors in lists]
        aligned = all(_address(t) % 16 == 0 for t in tensors)
        kinds.setdefault((*(t if t is None else t.dtype for t in tensors), aligned), []).append(i)
    for (*dtypes, aligned), indices in kinds.items():
        types = {name: d if d is None else getattr(tl, _TRITON[d]) for name, d in zip("PGMVC", dtypes)}
        yield {**types, "ALIGNED": aligned}, indices


def _moment_update_triton(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    spare: Sequence[Tensor],
    groups: Sequence[int],
    places: Sequence[int],
    rows: Tensor,
    counts: Tensor,
    control: Optional[Tensor],
    history: Optional[Tensor],
    loss: Optional[Tensor],
    clip: Optional[Tensor],
    grad_scale: Optional[Tensor],
    found_inf: Optional[Tensor],
    form: str,
    average: str,
    share: float,
    same: bool,
    rounding: str,
    seed: int,
) -> None:
    if not params or not launchable(params[0]):
        return
    moments = Moments(params, grads, first, second, spare)
    MomentTable(moments, groups, places).launch(
        moments, rows, counts, control, history, loss, clip, grad_scale, found_inf,
        form=form, average=average, share=share, same=same, rounding=rounding, seed=seed,
    )  # fmt: skip


OPERATOR = Operator(
    _moment_update_reference,
    _flops,
    Fused(_moment_update_triton),
    mutates=("params", "first", "second", "spare", "counts", "control", "history"),
)


def fused_obstacle(tensors: Sequence[Tensor]) -> Optional[str]:
    """Why the kernel cannot update these tensors; None if it can. It has no products of matrices, which is all that
    keeps other operators from bfloat16 under Triton's interpreter."""
    return obstacle(tensors, {t.dtype for t in tensors if t.is_floating_point()} - {torch.bfloat16})


def moment_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] = (),
    spare: Sequence[Tensor] = (),
    *,
    groups: Sequence[int],
    places: Sequence[int],
    rows: Tensor,
    counts: Tensor,
    form: str,
    control: Tensor | None = None,
    history: Tensor | None = None,
    loss: Tensor | None = None,
    clip: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    average: str = "mean",
    share: float = 0.0,
    same: bool = False,
    rounding: str = "nearest",
    seed: int = 0,
    backend: str | None = None,
) -> None:
    """Update parameters, moments, counts and the loss gate in place; see the formula above.

    The optimizers of this package keep a :class:`MomentTable` instead, which this function makes anew at every call.

    Args:
        params: the parameters.
        grads: their gradients, which stay as they are.
        first: first moments (momentum buffers), one per parameter.
        second: second moments, one per parameter; none: no division.
        spare: rounding errors of the parameters, one per parameter, for ``rounding="kahan"``; else none.
        groups: for each parameter, its row in ``rows``.
        places: for each parameter, its row in ``counts``; no two have the same.
        rows: Tensor (G, 16). Hyper-parameters of each group, in the order of :data:`ROW`.
        counts: Tensor (n, 3). In the order of :data:`COUNTS`; zero at first.
        form: one of :data:`FORMS`.
        control: Tensor (8,), see :mod:`.loss_gate`; none: phase 1.
        history: Tensor (W,), the losses in the window of ``average="window"``; zero at first.
        loss: Tensor (). None: the gate stays as it is.
        clip: Tensor (), multiplies every gradient.
        grad_scale: Tensor (), divides every gradient.
        found_inf: Tensor (). Not 0: nothing changes.
        average, share: see :mod:`.loss_gate`.
        same: the loss decides on this step, and not on the next one.
        rounding: one of :data:`ROUNDINGS`.
        seed: of stochastic rounding, 32 bits with sign.
        backend: see :mod:`trgnet.kernels.backend`; "recompute" has nothing to recompute here.

    Raises:
        ValueError: lists of different lengths, a tensor whose shape is not its parameter's, or an unknown name.
    """
    lists = (("grads", grads), ("first", first), ("second", second), ("spare", spare))
    for name, tensors in lists:
        optional = name in ("second", "spare")
        if not (optional and not tensors) and [t.shape for t in tensors] != [p.shape for p in params]:
            raise ValueError(
                f"moment_update: {name} has the shapes {[tuple(t.shape) for t in tensors]}, expected those "
                f"of params, {[tuple(p.shape) for p in params]}"
            )
    for name, value, known in (
        ("form", form, FORMS),
        ("average", average, AVERAGES),
        ("rounding", rounding, ROUNDINGS),
    ):
        if value not in known:
            raise ValueError(f"moment_update: {name} is {value!r}, expected one of {', '.join(known)}")
    with torch.no_grad():
        OPERATOR(
            list(params), list(grads), list(first), list(second), list(spare), list(groups), list(places), rows,
            counts, control, history, loss, clip, grad_scale, found_inf, form, average, share, same, rounding, seed,
            backend=backend,
        )  # fmt: skip
