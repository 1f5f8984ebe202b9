"""1x1 convolution over frames: one matrix for all sequences, or one for each of M interleaved groups of them.

    y[b,o,t] = bias[o] + sum_c weight[b mod M, o, c] x[b,c,t]

and its gradients:

    grad_x[b,c,t]      = sum_o weight[b mod M, o, c] grad_y[b,o,t]
    grad_weight[m,o,c] = sum_(b mod M = m) sum_t grad_y[b,o,t] x[b,c,t],     grad_bias[o] = sum_(b,t) grad_y[b,o,t]

Shapes: x (B, C, T), weight (M, F, C), bias (F,) -> y (B, F, T).

The kernels are for exact float32 on NVIDIA GPUs, where torch multiplies without tensor cores and cuts no sum over frames
into parts. They compute three tf32 products of operands split in two, which keeps float32's accuracy. :mod:`.backend`
``auto`` leaves tf32 and half precision to torch. The multi-scale graph convolution uses the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor

from .frame_statistics import new_parts, store_rows_part
from .frame_tiles import needs_split_products
from .launch import (
    TILE_LIMIT,
    Target,
    cdiv,
    device_function,
    dot_precision,
    exact_float32,
    kernel,
    launch,
    launchable,
    power_of_two,
    rows,
    target_of,
    tl,
    unit,
)
from .operator import Fused, Operator, check_shapes

PROGRAMS = 528
"""Programs of a weight gradient: about four for each processor of an H100."""


def pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1x1 convolution over the last axis: weight (O, F) times x (N, F, T), plus bias (O,) -> (N, O, T)."""
    # Not weight @ x: matmul would fold batch and time together, which copies x transposed.
    return torch.baddbmm(bias.view(1, -1, 1), weight.expand(len(x), -1, -1), x)


def analytic_pointwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """:func:`pointwise` in the analytic passes: not one call, which writes the bias everywhere before the product does."""
    return torch.bmm(weight.expand(len(x), -1, -1), x).add_(bias.view(1, -1, 1))


def pointwise_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of :func:`pointwise` by ``x``, (N, F, T), from that of its output, (N, O, T)."""
    return torch.bmm(weight.mT.expand(len(grad), -1, -1), grad)


def pointwise_parameter_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`pointwise` by ``weight``, (O, F), and ``bias``, (O,), from that of its output, (N, O, T)."""
    return torch.bmm(grad, x.mT).sum(0), grad.sum((0, 2))


def _pointwise_conv_reference(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    batch = x.shape[0]
    matrices = weight.expand(batch, -1, -1) if len(weight) == 1 else _repeated(weight, batch)
    return torch.bmm(matrices, x) if bias is None else torch.baddbmm(bias.view(1, -1, 1), matrices, x)


def _repeated(weight: Tensor, batch: int) -> Tensor:
    """The matrix of every sequence, (B, F, C)."""
    return weight if len(weight) == batch else weight.repeat(batch // len(weight), 1, 1)


def _flops(x: Tensor, weight: Tensor, *_: object) -> tuple[int, int]:
    product = 2 * x.numel() * weight.shape[1]
    return product, 2 * product


@device_function
def tf32(x):
    """Round float32 to the nearest tf32, whose lowest 13 bits are zero."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -8192).to(tl.float32, bitcast=True)


@device_function
def add_split_product(a, a_rest, b, b_rest, total):
    """Add (a + a_rest) @ (b + b_rest) of tf32 operands, less the product of the rests, to ``total``."""
    total = tl.dot(a_rest, b, total, input_precision="tf32")
    total = tl.dot(a, b_rest, total, input_precision="tf32")
    return tl.dot(a, b, total, input_precision="tf32")


@device_function
def add_product_of_rows(a, b, total, PRECISION: tl.constexpr):
    """Add a @ b^T to ``total``."""
    if PRECISION == "tf32x3":
        a_rounded, b_rounded = tf32(a), tf32(b)
        return add_split_product(
            a_rounded, a - a_rounded, tl.trans(b_rounded), tl.trans(b - b_rounded), total
        )
    else:
        return tl.dot(a, tl.trans(b), total, input_precision=PRECISION)


@kernel
def _pointwise_pack_kernel(
    weight_ptr, packed_ptr, R, K, matrix, row, column, NR, NK, PLANE, BR: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Copy matrices (M, R, K) with these strides into (M, NR * BR, NK * BK), padded with zeros.

    Precision tf32 rounds them, tf32x3 stores what rounding lost ``PLANE`` elements behind.
    """
    i_k, i_r, i_m = tl.program_id(0) % NK, (tl.program_id(0) // NK) % NR, tl.program_id(0) // (NK * NR)
    o_r, o_k = i_r * BR + tl.arange(0, BR), i_k * BK + tl.arange(0, BK)
    inside = (o_r < R)[:, None] & (o_k < K)[None, :]
    weight_ptr += i_m.to(tl.int64) * matrix
    w = tl.load(weight_ptr + o_r[:, None] * row + o_k[None, :] * column, mask=inside, other=0.0)
    packed_ptr += i_m.to(tl.int64) * (NR * BR) * (NK * BK)
    place = o_r[:, None] * (NK * BK) + o_k[None, :]
    if PRECISION == "ieee":
        tl.store(packed_ptr + place, w.to(packed_ptr.dtype.element_ty))
    else:
        w = w.to(tl.float32)
        rounded = tf32(w)
        tl.store(packed_ptr + place, rounded)
        if PRECISION == "tf32x3":
            tl.store(packed_ptr + PLANE.to(tl.int64) + place, tf32(w - rounded))


@kernel
def _pointwise_kernel(
    x_ptr, packed_ptr, bias_ptr, mask_ptr, y_ptr, parts_ptr, M, R, K, STEPS, T, NT, NR, P, GROUP, PLANE,
    BR: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows R of one block of frames; ``GROUP`` consecutive rows share a bias and statistics."""
    T = T * UNIT
    i_r, i_t = tl.program_id(0) % NR, (tl.program_id(0) // NR) % NT
    i_b = tl.program_id(0) // (NR * NT)
    o_r, o_k, o_t = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BT)
    m_t = o_t < T - i_t * BT
    width = STEPS * BK
    x_ptr += i_b.to(tl.int64) * K * T + i_t * BT
    packed_ptr += ((i_b % M).to(tl.int64) * NR + i_r) * BR * width
    p_x = x_ptr + o_k[:, None] * T + o_t[None, :]
    p_w = packed_ptr + o_r[:, None] * width + o_k[None, :]
    # Frames come first: tf32 products need both operands contiguous along the sum in shared memory, or the first one in
    # registers, where it is split.
    y = tl.zeros([BT, BR], tl.float32)
    for i in range(0, STEPS):
        # Columns of zeros in the matrix do not make up for a NaN beyond the last row of x.
        x = tl.load(p_x, mask=(i * BK + o_k < K)[:, None] & m_t[None, :], other=0.0)  # [BK, BT]
        a, w = tl.trans(x), tl.trans(tl.load(p_w))
        if PRECISION == "ieee":
            y = tl.dot(a, w, y, input_precision="ieee")
        else:
            rounded = tf32(a)
            if PRECISION == "tf32":
                y = tl.dot(rounded, w, y, input_precision="tf32")
            else:
                y = add_split_product(rounded, a - rounded, w, tl.trans(tl.load(p_w + PLANE.to(tl.int64))), y)
        p_x += BK * T.to(tl.int64)
        p_w += BK
    y = tl.trans(y)  # [BR, BT]
    row = i_r * BR + o_r
    m_r, channel = row < R, row // GROUP
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channel, mask=m_r, other=0.0).to(tl.float32)[:, None]
    if parts_ptr is not None:
        real = m_t & (tl.load(mask_ptr + i_b.to(tl.int64) * T + i_t * BT + o_t, mask=m_t, other=0) != 0)
        part = (i_b * NT + i_t) * GROUP + row % GROUP
        count = tl.sum(real.to(tl.float32))
        store_rows_part(parts_ptr, part, y, real, channel, m_r, R // GROUP, P, count)
    y_ptr += (i_b.to(tl.int64) * R + i_r * BR) * T + i_t * BT
    inside = m_r[:, None] & m_t[None, :]
    tl.store(y_ptr + o_r[:, None] * T + o_t[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@kernel
def _pointwise_weight_kernel(
    grad_ptr, x_ptr, out_ptr, B, R, C, T, STEPS, NS, NR, NC, LENGTH, SUMS: tl.constexpr, BR: tl.constexpr,
    BC: tl.constexpr, BT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of grad x^T over ``STEPS`` blocks of frames of one sequence; SUMS: and the sums of the rows of grad.

    out_ptr: for each part a matrix (R, C), behind it the sums (R,); ``LENGTH`` values.
    """
    T = T * UNIT
    i_c, i_r = tl.program_id(0) % NC, (tl.program_id(0) // NC) % NR
    i_s = (tl.program_id(0) // (NC * NR)) % NS
    i_b = (tl.program_id(0) // (NC * NR * NS)).to(tl.int64)
    o_r, o_c, o_t = tl.arange(0, BR), tl.arange(0, BC), tl.arange(0, BT)
    m_r, m_c = (i_r * BR + o_r < R)[:, None], (i_c * BC + o_c < C)[:, None]
    grad_ptr += (i_b * R + i_r * BR) * T + i_s * (STEPS * BT)
    x_ptr += (i_b * C + i_c * BC) * T + i_s * (STEPS * BT)
    p_grad, p_x = grad_ptr + o_r[:, None] * T + o_t[None, :], x_ptr + o_c[:, None] * T + o_t[None, :]
    total, row_sum = tl.zeros([BR, BC], tl.float32), tl.zeros([BR], tl.float32)
    for i in range(0, STEPS):
        m_t = ((i_s * STEPS + i) * BT + o_t < T)[None, :]
        grad = tl.load(p_grad, mask=m_r & m_t, other=0.0)  # [BR, BT]
        x = tl.load(p_x, mask=m_c & m_t, other=0.0)  # [BC, BT]
        if SUMS:
            row_sum += tl.sum(grad.to(tl.float32), 1)
        total = add_product_of_rows(grad, x, total, PRECISION)
        p_grad += BT
        p_x += BT
    out_ptr += (i_s * B + i_b) * LENGTH
    row, column = i_r * BR + o_r, i_c * BC + o_c
    tl.store(out_ptr + row[:, None] * C + column[None, :], total, mask=m_r & (column < C)[None, :])
    if SUMS and i_c == 0:
        tl.store(out_ptr + R * C + row, row_sum, mask=row < R)


def has_own_products(x: Tensor) -> bool:
    """Whether products of tensors like x run on these kernels where there is a choice, and not on torch's."""
    return x.dtype == torch.float32 and exact_float32() and target_of(x).backend != "hip"


def unsupported_frames(x: Tensor, *_: object) -> str | None:
    """Why the kernels cannot take x, whose last axis is time; None if they can."""
    if 128 * x.shape[-1] >= TILE_LIMIT:
        return f"{x.shape[-1]} frames exceed 32-bit offsets within a tile; split the sequence"
    return None


def _tile(x: Tensor, features: int) -> dict[str, int]:
    """Tile of a product. A warpgroup of Hopper has 64 frames at a time and all ``BR`` rows, at least 16."""
    target = target_of(x)
    # Blackwell alone has the first operand of a product in tensor memory, the others in registers.
    narrow = x.dtype == torch.float32 and (target.backend != "cuda" or target.arch < 100)
    aligned = unit(x.shape[2]) > 1
    return {
        "BR": min(128 if aligned else 64, power_of_two(features, 16)),
        "BK": 16 if narrow else 32,
        "BT": 256 if target == Target("cuda", 90) and aligned else 128,
    }


def _stages(x: Tensor) -> int:
    """Return the stages of the loads. On Hopper one: Triton 3.7.1 would overwrite operands of products that still run.

    Found by executing the compiled code (``tests/ptx``).
    """
    return 1 if target_of(x) == Target("cuda", 90) else 3


def launch_pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, group: int = 1, mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return y (B, F, T) and, with a mask (B, 1, T), the parts of the statistics of each ``group`` of its rows.

    x (B, C, T), weight (M, F, C) of any strides, bias (F / group,).
    """
    (batch, channels, t), (matrices, features, _) = x.shape, weight.shape
    y = x.new_empty(batch, features, t)
    if not launchable(x):
        return y, None if mask is None else new_parts(x, features // group, 0)
    tile, align, precision = _tile(x, features), unit(t), dot_precision(x)
    nr, steps, nt = cdiv(features, tile["BR"]), cdiv(channels, tile["BK"]), cdiv(t, tile["BT"])
    planes = 2 if precision == "tf32x3" else 1
    packed = x.new_empty(planes, matrices, nr * tile["BR"], steps * tile["BK"])
    plane = packed[0].numel()
    launch(
        _pointwise_pack_kernel, (matrices * nr * steps,), weight, packed, features, channels, *weight.stride(), nr,
        steps, plane, BR=tile["BR"], BK=tile["BK"], PRECISION=precision,
    )  # fmt: skip
    count = batch * nt * group
    parts = None if mask is None else new_parts(x, features // group, count)
    launch(
        _pointwise_kernel, (batch * nt * nr,), rows(x), packed, bias, None if mask is None else rows(mask), y, parts,
        matrices, features, channels, steps, t // align, nt, nr, count, group, plane, UNIT=align, PRECISION=precision,
        num_warps=8, num_stages=_stages(x), **tile,
    )  # fmt: skip
    return y, parts


def launch_pointwise_weight(grad: Tensor, x: Tensor, matrices: int, sums: bool) -> Tensor:
    """Return grad x^T for each of M matrices, (M, F * C), with ``sums`` followed by those of the rows of grad, (F,).

    In float32, added up over the parts of the frames in a fixed order.
    """
    (batch, features, t), channels = grad.shape, x.shape[1]
    length = features * (channels + sums)
    if not launchable(x):
        return x.new_empty(matrices, length, dtype=torch.float32)
    # Rows first: a product on tensor cores splits its first operand in registers, the second one in shared memory.
    before_hopper = target_of(x).backend == "cuda" and target_of(x).arch < 90
    most = 64 if before_hopper and needs_split_products(x) else 128  # rows that registers have room for
    tile = {"BR": min(most, power_of_two(features, 64)), "BC": min(64, power_of_two(channels, 16)), "BT": 32}
    align = unit(t)
    nr, nc, nt = cdiv(features, tile["BR"]), cdiv(channels, tile["BC"]), cdiv(t, tile["BT"])
    steps = cdiv(nt, cdiv(PROGRAMS, max(1, batch * nr * nc)))
    ns = cdiv(nt, max(1, steps))
    parts = x.new_empty(ns, batch, length, dtype=torch.float32)
    launch(
        _pointwise_weight_kernel, (batch * ns * nr * nc,), rows(grad), rows(x), parts, batch, features, channels,
        t // align, steps, ns, nr, nc, length, SUMS=sums, UNIT=align, PRECISION=dot_precision(x),
        num_warps=8 if tile["BR"] == 128 or target_of(x) != Target("cuda", 90) else 4, num_stages=_stages(x), **tile,
    )  # fmt: skip
    return parts.view(ns, batch // matrices, matrices, length).sum((0, 1))


def product(weight: Tensor, x: Tensor) -> Tensor:
    """weight (F, C) times x (B, C, T) -> (B, F, T), of kernels or of torch."""
    if has_own_products(x):
        return launch_pointwise(x, weight.unsqueeze(0), None)[0]
    return torch.bmm(weight.expand(len(x), -1, -1), x)


def product_gradients(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of ``weight`` in :func:`product`, (F, C), and the sums of the rows of grad, (F,); both float32."""
    if has_own_products(x):
        features, channels = grad.shape[1], x.shape[1]
        total = launch_pointwise_weight(grad, x, 1, True).squeeze(0)
        return total[: features * channels].view(features, channels), total[features * channels :]
    return torch.bmm(grad, x.mT).sum(0, dtype=torch.float32), grad.sum((0, 2), dtype=torch.float32)


def _forward(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> tuple[Tensor]:
    return (launch_pointwise(x, weight, bias)[0],)


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], needed: Sequence[bool]
) -> tuple[Tensor, Tensor]:
    """Gradient of x, and those of weight and bias behind one another for each matrix."""
    grad_x = of_parameters = None
    if needed[0]:
        grad_x, _ = launch_pointwise(grad, weight.mT, None)
    if needed[1] or needed[2]:
        of_parameters = launch_pointwise_weight(grad, x, len(weight), bias is not None)
    return grad_x, of_parameters


def _unpack(
    computed: tuple[Tensor | None, ...], args: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    (grad_x, of_parameters), (_, weight, bias) = computed, args
    if of_parameters is None or not of_parameters.numel():
        return grad_x, None, None
    grad_weight = of_parameters[:, : weight[0].numel()].reshape(weight.shape).to(weight.dtype)
    if bias is None:
        return grad_x, grad_weight, None
    by_matrix = of_parameters[:, weight[0].numel() :]
    grad_bias = by_matrix.squeeze(0) if len(weight) == 1 else by_matrix.sum(0)
    return grad_x, grad_weight, grad_bias.to(bias.dtype)


OPERATOR = Operator(
    _pointwise_conv_reference,
    _flops,
    Fused(
        _forward,
        _backward,
        differentiable=(0, 1, 2),
        unpack=_unpack,
        narrowed=(0,),
        unsupported=unsupported_frames,
        preferred=lambda x, *_: has_own_products(x),
    ),
)


def pointwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """1x1 convolution over the last axis.

    Args:
        x: Tensor (B, C, T).
        weight: Tensor (F, C), or (M, F, C) with B a multiple of M: sequence b is multiplied with matrix b mod M.
        bias: Tensor (F,), optional.
        backend: see :mod:`trgnet.kernels.backend`. By default, code under torch.compile multiplies with torch.

    Returns:
        Tensor (B, F, T).

    Raises:
        ValueError: the shapes do not fit together.
    """
    weight = weight.unsqueeze(0) if weight.dim() == 2 else weight
    sizes = check_shapes("pointwise_conv", x=(x, "B C T"), weight=(weight, "M F C"), bias=(bias, "F"))
    if sizes["M"] == 0 or sizes["B"] % sizes["M"]:
        raise ValueError(
            f"pointwise_conv: there are {sizes['M']} matrices for {sizes['B']} sequences; expected a divisor of that"
        )
    if backend is None and torch.compiler.is_compiling():
        backend = "reference"  # Inductor's product: Dynamo would compile the operator anew for each number of frames
    return OPERATOR(x, weight, bias, backend=backend)
