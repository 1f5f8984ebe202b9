"""Triton kernels against float64: values, gradients, odd sizes, strides, contracts of torch.library, memory, addresses.

On a machine without a GPU they run under Triton's interpreter, which conftest.py switches on. An operator that gets
kernels joins by itself, with a line in TRAITS and its backward formula; what is special to it is tested elsewhere.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import operators as formulas
import pytest
import torch
from allocations import Conversions, PeakMemory, PoisonedMemory
from operators import arguments, as_tuple, converted, lengths_mask, without_dropout
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from trgnet.kernels import BackendError, launch, operator, operator_table, use_backend
from trgnet.kernels.launch import Target, record_launches

from trgnet import kernels
from trgnet.model import SpatialModule
from trgnet.skeleton import SKELETONS

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The optimizer's operator works in place: tests/test_moment_update.py.
OPERATORS = [name for name, backends in operator_table() if "triton" in backends and name != "moment_update"]
HALF = [torch.float16] + (
    [] if launch.interpreted() else [torch.bfloat16]
)  # no bfloat16 products in the interpreter
NAN = float("nan")
Size = tuple[int, int, int, int]
"""Sequences, frames, joints, features: the arguments of :func:`operators.arguments`."""


def spatial_sizes() -> Iterator[Size]:
    """Every pair of joints and frames, each number of features and sequences many times; none that takes very long."""
    joints, frames, features, batches = (1, 11, 17, 19, 25, 33), (1, 15, 16, 17, 63, 200), (8, 16, 64), (1, 3)
    for (i, v), (j, t) in itertools.product(enumerate(joints), enumerate(frames)):
        n, f = batches[(i + j // 2) % 2], features[(i + j) % 3]
        f = f if n * f * v * t <= 60_000 else 8
        yield (n if n * f * v * t <= 60_000 else 1, t, v, f)


SPATIAL = tuple(spatial_sizes())
TEMPORAL = (
    (3, 17, 1, 16),
    (1, 1, 1, 8),
    (2, 2, 1, 64),
    (1, 15, 1, 16),
    (3, 16, 1, 8),
    (2, 63, 1, 64),
    (1, 200, 1, 16),
    (3, 97, 1, 32),
)
"""Without joints: few, as every program of the interpreter takes its time."""


@dataclass(frozen=True)
class Traits:
    """What is particular to one operator's arguments and results."""

    sizes: tuple[Size, ...] = TEMPORAL
    mask: int | None = None
    """Position of the mask."""
    padded: dict[int, float] = field(default_factory=dict)
    """Position of every other argument whose last axis is time -> what its padded frames are filled with. Where that is
    0 they must hold it, and their gradient may be any finite number."""
    ignores_padding: bool = True
    """Whether padded frames are without influence on gradients too."""
    segments: tuple[int, ...] = ()
    """Positions of the arguments that have a row for each segment, whatever the numbers of sequences and frames."""
    unit_terms: bool = True
    """Whether a gradient is a sum of products of size 1; not so where the outputs are means or normalised."""


TRAITS = {
    "multiscale_graph_conv": Traits(SPATIAL, mask=4, padded={0: NAN}, ignores_padding=False),
    "dynamic_graph_conv": Traits(SPATIAL, mask=4, padded={0: NAN}, ignores_padding=False),
    "masked_batch_norm": Traits(SPATIAL, mask=1, padded={0: NAN, 4: NAN}),
    "attention_layer": Traits(mask=1, padded={0: 0.0, 2: 0.0}),
    "fusion_layer": Traits(mask=2, padded={0: 0.0, 1: 0.0}),
    "dilated_residual": Traits(mask=1, padded={0: 0.0}),
    "class_loss": Traits(mask=3, padded={0: NAN, 1: 77, 2: 0.0}, unit_terms=False),
    "boundary_loss": Traits(mask=2, padded={0: NAN, 1: NAN}, unit_terms=False),
    "pointwise_conv": Traits(padded={0: NAN}, ignores_padding=False),
    "segment_mean": Traits(padded={0: NAN}, segments=(1, 2, 3), unit_terms=False),
    "pairwise_distance": Traits(
        ((1, 1, 1, 1), (14, 1, 1, 8), (30, 1, 1, 384), (62, 1, 1, 100)), segments=(0,), unit_terms=False
    ),
}


def cases(every: int = 1) -> list[tuple[str, Size]]:
    """Every operator that has kernels with each of its sizes, or one in ``every``."""
    return [(name, size) for name in OPERATORS for size in TRAITS[name].sizes[::every]]


def with_id(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


SMALL = (3, 17, 19, 16)


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both rules for float32: they choose different tiles and launches."""
    torch.set_float32_matmul_precision(request.param)
    yield
    torch.set_float32_matmul_precision("highest")


def moved(args: tuple, dtype: torch.dtype) -> tuple:
    """The arguments on the tested device."""
    return converted(args, dtype, DEVICE)


def call(name: str, args: tuple, backend: str = "triton") -> tuple[Tensor, ...]:
    return as_tuple(operator(name)(*args, backend=backend))


def gradients(outputs: tuple[Tensor, ...], args: tuple) -> list[Tensor]:
    """Gradients of a fixed random projection of the outputs, all of which depend on all arguments."""
    return formulas.gradients(outputs, args, allow_unused=False)


def leaves(args: tuple) -> list[int]:
    """Positions of the arguments that require gradients."""
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]


def on_real_frames(name: str, args: tuple, derivatives: list[Tensor]) -> list[Tensor]:
    """The gradients of ``leaves(args)``, 0 on the frames where the argument has to be 0."""
    traits = TRAITS[name]
    assert all(derivative.isfinite().all() for derivative in derivatives)
    return [
        d * args[traits.mask].to(d) if traits.padded.get(i) == 0 else d
        for i, d in zip(leaves(args), derivatives, strict=True)
    ]


def results(name: str, args: tuple, backend: str, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then gradients; statistics that the reference leaves to the norm are taken from its output."""
    args = moved(args, dtype)
    outputs, by_products = list(call(name, args, backend)), operator(name).statistics
    derivatives = on_real_frames(name, args, gradients(tuple(outputs), args))
    if by_products and not outputs[-1].numel():
        outputs[-by_products:] = formulas.statistics(outputs[0].double(), args[TRAITS[name].mask])
    return [r.detach() for r in (*outputs, *derivatives)]


def assert_as_good_as_plain(
    name: str,
    args: tuple,
    dtype: torch.dtype,
    got: list[Tensor] | None = None,
    plain: list[Tensor] | None = None,
) -> None:
    """Every result at most twice as wrong as plain PyTorch in ``dtype`` (or ``plain``), or as rounding explains.

    The inputs are of size 1, so a gradient that adds up M of their products is of size sqrt(M), even where this one
    happens to cancel. It is off by a rounding of its operands and, added up in float32, by sqrt(M) roundings of those.
    """
    truth = results(name, args, "reference", torch.float64)
    plain = results(name, args, "reference", dtype) if plain is None else plain
    ours = results(name, args, "triton", dtype) if got is None else got
    flops = operator(name).cost(*args).flops
    for i, (our, rough, true) in enumerate(zip(ours, plain, truth, strict=True)):
        assert our.shape == true.shape and our.dtype in (rough.dtype, torch.float32), f"result {i}"
        if not true.numel():
            continue
        terms = flops / 2 / true.numel()
        # Of outputs so many values are compared that not all of them cancel.
        is_output = i < len(truth) - len(leaves(args))
        cancels = not is_output and TRAITS[name].unit_terms
        scale = max(true.abs().max().item(), terms**0.5 if cancels else 0.0)
        error, allowed = (our.double() - true).abs(), (rough.double() - true).abs()
        floor = (torch.finfo(torch.float32).eps * terms**0.5 + torch.finfo(dtype).eps) * scale
        assert error.max() <= 2 * allowed.max() + floor, (
            f"result {i}: {error.max()} > 2 * {allowed.max()} + {floor}"
        )
        rms, allowed_rms = error.square().mean().sqrt(), allowed.square().mean().sqrt()
        floor /= min(4.0, true.numel() ** 0.5)
        assert rms <= 2 * allowed_rms + floor, f"result {i}: rms {rms} > 2 * {allowed_rms} + {floor}"


@pytest.mark.parametrize(("name", "size"), cases(), ids=with_id)
def test_float32_against_float64(name: str, size: tuple[int, ...]):
    assert_as_good_as_plain(name, arguments(name, *size), torch.float32)


@pytest.mark.parametrize(("name", "size"), cases(every=5), ids=with_id)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_precision_against_float64(name: str, dtype: torch.dtype, size: tuple[int, ...]):
    args = converted(converted(arguments(name, *size), dtype), torch.float64)  # numbers that float16 has
    assert_as_good_as_plain(name, args, dtype)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("size", [(2, 40, 25, 24), (2, 16, 33, 8)], ids=str)
def test_both_precisions_of_float32(name: str, size: tuple[int, ...], matmul_precision: None):
    args = arguments(name, *size)
    if launch.interpreted() or launch.exact_float32():
        assert_as_good_as_plain(name, args, torch.float32)
    else:  # tf32 has the mantissa of float16, and matrix units cut numbers off instead of rounding them
        got = results(name, args, "triton", torch.float32)
        inputs = tuple(
            cut_to_tf32(a).requires_grad_(a.requires_grad)
            if isinstance(a, Tensor) and a.is_floating_point()
            else a
            for a in args
        )
        with ProductsInTf32():
            plain = results(name, inputs, "reference", torch.float32)
        assert_as_good_as_plain(name, args, torch.float16, got, plain)


def cut_to_tf32(x: Tensor) -> Tensor:
    """The tensor with 10 bits of mantissa, in float32."""
    return (x.detach().float().view(torch.int32) & ~0x1FFF).view(torch.float32)


class ProductsInTf32(TorchDispatchMode):
    """Cuts the operands of matrix products, as the matrix units do."""

    OPERANDS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "convolution": 0, "convolution_backward": 0}
    """By operation: the position of the first of two operands."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = self.OPERANDS.get(func.overloadpacket.__name__)
        if first is not None:
            cut = (cut_to_tf32(a) if isinstance(a, Tensor) else a for a in args[first : first + 2])
            args = (*args[:first], *cut, *args[first + 2 :])
        return func(*args, **(kwargs or {}))


def batch_norm_variants() -> dict[str, dict[int, object]]:
    """Changed arguments of masked_batch_norm by position."""
    mean, var = torch.randn(16).double(), torch.rand(16).double() + 0.5
    leaves = {5: mean.requires_grad_(), 6: var.requires_grad_()}
    return {
        "plain": {4: None, 8: False},
        "given statistics": leaves,
        "running statistics": {5: mean.detach(), 6: var.detach(), 4: None},
    }


@pytest.mark.parametrize("variant", batch_norm_variants())
def test_forms_of_batch_norm(variant: str):
    args = list(arguments("masked_batch_norm", *SMALL))
    for position, value in batch_norm_variants()[variant].items():
        args[position] = value
    assert_as_good_as_plain("masked_batch_norm", tuple(args), torch.float32)


def test_batch_norm_with_the_statistics_of_its_producer():
    args = list(arguments("masked_batch_norm", *SMALL))
    mean, var = formulas.statistics(args[0], args[1])
    told = [*args[:5], mean.float(), var.float(), True, *args[8:]]
    got = results("masked_batch_norm", tuple(told), "triton", torch.float32)
    assert_as_good_as_plain("masked_batch_norm", tuple(args), torch.float32, got)


@pytest.mark.parametrize("missing", [{3: None}, {4: None}, {3: None, 4: None}], ids=["bias", "mask", "both"])
def test_dynamic_graph_conv_without(missing: dict[int, None]):
    args = list(arguments("dynamic_graph_conv", *SMALL))
    for position in missing:
        args[position] = None
    args = moved(tuple(args), torch.float32)
    outputs, expected = (operator("dynamic_graph_conv")(*args, backend=b) for b in ("triton", "reference"))
    assert outputs[1].numel() == (0 if 4 in missing else 16)
    for a, b in zip(gradients(outputs, args), gradients(expected, args), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("split", [False, True], ids=["ieee", "split operands"])
@pytest.mark.parametrize(
    ("batch", "matrices", "channels", "features", "frames"),
    [(4, 4, 24, 80, 160), (6, 3, 200, 64, 49), (2, 1, 66, 130, 272), (3, 1, 1, 1, 16)],
    ids=str,
)
def test_matrices_of_pointwise_conv(
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    matrices: int,
    channels: int,
    features: int,
    frames: int,
    split: bool,
):
    """One matrix or several, more rows and columns than a tile has, and operands split as on NVIDIA GPUs."""
    if split and DEVICE == "cpu":
        monkeypatch.setattr(sys.modules["trgnet.kernels.pointwise"], "dot_precision", lambda x: "tf32x3")
    x, weight = (
        torch.randn(batch, channels, frames).double(),
        torch.randn(matrices, features, channels).double(),
    )
    args = (x.requires_grad_(), weight.requires_grad_(), None)
    truth, plain = (results("pointwise_conv", args, "reference", d) for d in (torch.float64, torch.float32))
    ours = results("pointwise_conv", args, "triton", torch.float32)
    for our, rough, true in zip(ours, plain, truth, strict=True):
        assert (our - true).abs().max() <= 3 * (rough - true).abs().max() + 1e-6 * true.abs().max()


@pytest.mark.parametrize("name", OPERATORS)
def test_strided_inputs_and_expanded_gradients(name: str):
    args = moved(arguments(name, *SMALL), torch.float32)
    strided = tuple(
        a.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.dim() > 1
        else a.detach().repeat_interleave(2)[::2].requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.dim() == 1
        else a
        for a in args
    )
    got, expected = (call(name, a) for a in (strided, args))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for outputs, inputs in ((got, strided), (expected, args)):
        wanted = [inputs[i] for i in leaves(inputs)]
        expanded = torch.ones((), device=DEVICE).expand_as(outputs[0])
        from_expanded = torch.autograd.grad(outputs[0], wanted, expanded, retain_graph=True)
        plain = torch.autograd.grad(outputs[0], wanted, expanded.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(from_expanded, plain, strict=True))


@pytest.mark.parametrize("name", [name for name in OPERATORS if TRAITS[name].padded])
def test_padding_changes_nothing_whatever_it_holds(name: str):
    """Two sequences, the second a third shorter; what follows its end is filled, and more frames of it are added."""
    traits, t, extra = TRAITS[name], 24, 13
    args = moved(arguments(name, 2, t, 5, 8), torch.float32)
    real = lengths_mask(2, t).to(DEVICE)

    def longer(position: int, a: object) -> object:
        if position != traits.mask and position not in traits.padded:
            return a
        padding = ~functional.pad(real, (0, extra)).view(2, *(1,) * (a.dim() - 2), t + extra)
        filled = functional.pad(a.detach(), (0, extra)).masked_fill(
            padding, traits.padded.get(position, False)
        )
        return filled.requires_grad_(a.requires_grad)

    def compare(ours: Tensor, truth: Tensor) -> None:
        """On real frames where the last axis is time."""
        assert ours.shape[-1:] in (truth.shape[-1:], (t + extra,))
        if ours.shape == truth.shape:
            torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
        else:
            for i, length in enumerate(real.sum((1, 2)).tolist()):
                torch.testing.assert_close(
                    ours[i, ..., :length], truth[i, ..., :length], rtol=1e-5, atol=1e-5
                )

    long = tuple(longer(i, a) for i, a in enumerate(args))
    outputs, padded_outputs = call(name, args), call(name, long)
    for a, b in zip(padded_outputs, outputs, strict=True):
        compare(a, b)
    if not traits.ignores_padding:
        return
    assert all(output.isfinite().all() for output in padded_outputs)
    weights = [torch.linspace(-1, 1, o.numel(), device=DEVICE).view(o.shape) for o in padded_outputs]
    weights = [w for w, o in zip(weights, outputs, strict=True) if o.requires_grad]

    def derivatives(inputs: tuple, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """With weights of the same values on the same frames."""
        projected = [o for o in results if o.requires_grad]
        cut = [w[..., : o.shape[-1]] if o.dim() else w for w, o in zip(weights, projected, strict=True)]
        return torch.autograd.grad(projected, [inputs[i] for i in leaves(inputs)], cut)

    for a, b in zip(derivatives(long, padded_outputs), derivatives(args, outputs), strict=True):
        assert a.isfinite().all()
        compare(a, b)


@pytest.mark.parametrize("name", OPERATORS)
def test_repeats_are_bitwise_equal_in_poisoned_memory(name: str):
    """A value that no program wrote would be NaN; a sum in changing order would differ."""
    args = moved(arguments(name, *SMALL), torch.float32)

    def run() -> list[Tensor]:
        with PoisonedMemory():
            outputs, derivatives = operator(name).triton_passes(
                args, lambda o: torch.linspace(-1, 1, o.numel(), device=DEVICE).view(o.shape)
            )
        fused = operator(name).triton
        outputs, positions = outputs[: len(outputs) - fused.kept], fused.differentiable
        assert [d is not None for d in derivatives] == [isinstance(args[i], Tensor) for i in positions]
        return [result for result in (*outputs, *derivatives) if result is not None]

    first = run()
    assert all(r.isfinite().all() for r in first)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str):
    torch.library.opcheck(operator(name).triton_op, moved(arguments(name, 2, 5, 3, 8), torch.float32))


@pytest.mark.parametrize("name", OPERATORS)
def test_only_what_is_needed_is_gradients(name: str):
    """Every gradient comes out the same if it is the only one that is asked for."""
    args = moved(arguments(name, 2, 17, 5, 8), torch.float32)
    everything = gradients(call(name, args), args)
    for expected, position in zip(everything, leaves(args), strict=True):
        only = tuple(a.detach() if isinstance(a, Tensor) and i != position else a for i, a in enumerate(args))
        (gradient,) = gradients(call(name, only), only)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-6)


# The backward formulas of the kernels' documentation, apart from the kernels, without dropout: NAME_backward.


def multiscale_graph_conv_backward(grad, x, hops, weight, bias, mask):
    by_hop = weight.unflatten(1, (len(hops), -1))
    matrix = torch.einsum("okc,kvu->ovcu", by_hop, hops)
    grad_matrix = torch.einsum("novt,ncut->ovcu", grad, x)
    return (
        torch.einsum("ovcu,novt->ncut", matrix, grad),
        torch.einsum("ovcu,okc->kvu", grad_matrix, by_hop),
        torch.einsum("ovcu,kvu->okc", grad_matrix, hops).flatten(1),
        grad.sum((0, 2, 3)),
    )


def dynamic_graph_conv_backward(grad, x, graph, beta, bias, mask):
    y = x + bias.view(-1, 1, 1)
    value, p, q = y[:, :-2], y[:, -2], y[:, -1]
    s = torch.tanh(p.unsqueeze(2) - q.unsqueeze(1))
    whole = graph.unsqueeze(-1) + beta * s.unsqueeze(1)
    grad_frame = torch.einsum("ncut,ncvt->nuvt", grad, value)
    a = beta * (1 - s * s) * grad_frame
    grad_value = torch.einsum("ncuvt,ncut->ncvt", whole, grad)
    grad_x = torch.cat([grad_value, a.sum(2).unsqueeze(1), -a.sum(1).unsqueeze(1)], 1)
    grad_graph = torch.einsum("ncut,ncvt->ncuv", grad, value)
    return grad_x, grad_graph, (s * grad_frame).sum().view(1), grad_x.sum((0, 2, 3))


def masked_batch_norm_backward(
    grad, grad_sum, x, mask, weight, bias, residual, mean, var, of_batch, frame_sum, eps
):
    real = mask.unsqueeze(1)
    count = mask.sum() * x.shape[2]
    used_mean, used_var = formulas.statistics(x, mask) if mean is None else (mean, var)
    rstd = (1 / torch.sqrt(used_var + eps)).view(-1, 1, 1)
    w, h = weight.view(-1, 1, 1), (x - used_mean.view(-1, 1, 1)) * rstd
    positive = h * w + bias.view(-1, 1, 1) + residual > 0
    g = (grad + grad_sum.unsqueeze(-1)) * (positive & real)
    grad_bias, grad_weight = g.sum((0, 2, 3)), (g * h).sum((0, 2, 3))
    if mean is not None:
        slope = weight * rstd.flatten()
        return (
            w * rstd * g,
            grad_weight,
            grad_bias,
            g,
            -slope * grad_bias,
            -slope * rstd.flatten() / 2 * grad_weight,
        )
    centred = g - (grad_bias.view(-1, 1, 1) + h * grad_weight.view(-1, 1, 1)) / count
    return w * rstd * centred * real, grad_weight, grad_bias, g


def attention_layer_backward(
    grad, x, mask, source, conv_weight, conv_bias, wqk, bqk, wv, bv, wo, bo, wc, bc, seeds, dilation, heads, scale, *_
):  # fmt: skip
    """Of the decoder form."""
    n, f, t = x.shape

    def tap(a, j):
        """a at frames t + (j - 1) d, zero outside."""
        return functional.pad(a, (dilation, dilation))[..., j * dilation : j * dilation + t]

    def product(weight, a):
        return torch.einsum("of,nft->not", weight, a)

    def of_product(weight, g, a):
        """Gradients of a product's input, weight and bias."""
        return product(weight.T, g), torch.einsum("not,nft->of", g, a), g.sum((0, 2))

    def per_head(a):
        return a.unflatten(1, (heads, -1))

    y = sum(product(conv_weight[..., j], tap(x, j)) for j in range(3)) + conv_bias[:, None]
    o, count = torch.relu(y), mask.sum(2, keepdim=True)
    mean = (o * mask).sum(2, keepdim=True) / count
    rstd = 1 / torch.sqrt(((o - mean).square() * mask).sum(2, keepdim=True) / count + 1e-5)
    h = (o - mean) * rstd * mask
    query, key = torch.sigmoid(product(wqk, h) + bqk[:, None]).chunk(2, 1)
    key = key * mask
    value = product(wv, source) + bv[:, None]
    sums = torch.einsum("nhvt,nhkt->nhvk", per_head(value), per_head(key))
    keys = (per_head(key).sum(3) + 1e-6).unsqueeze(3)
    normaliser = (keys * per_head(query)).sum(2, keepdim=True)
    attended = torch.einsum("nhvk,nhkt->nhvt", sums, per_head(query)) / normaliser
    r = scale * (product(wo, attended.flatten(1, 2)) + bo[:, None]) + o

    direct = grad * mask
    gr, output_gw, output_gb = of_product(wc, direct, r)
    ga, attention_gw, attention_gb = of_product(wo, scale * gr, attended.flatten(1, 2))
    u = per_head(ga) / normaliser
    share = (u * attended).sum(2, keepdim=True)
    g_query = torch.einsum("nhvk,nhvt->nhkt", sums, u) - keys * share
    g_sums = torch.einsum("nhvt,nhkt->nhvk", u, per_head(query))
    g_keys = -(per_head(query) * share).sum(3, keepdim=True)
    g_value = torch.einsum("nhvk,nhkt->nhvt", g_sums, per_head(key)).flatten(1, 2)
    g_key = (torch.einsum("nhvk,nhvt->nhkt", g_sums, per_head(value)) + g_keys).flatten(1, 2)
    g = torch.cat([g_query.flatten(1, 2) * query * (1 - query), g_key * key * (1 - key)], 1)
    gh, query_key_gw, query_key_gb = of_product(wqk, g, h)
    grad_source, value_gw, value_gb = of_product(wv, g_value, source)

    means = [(gh * a * mask).sum(2, keepdim=True) / count for a in (1, h)]
    gz = (gr + rstd * (gh - means[0] - h * means[1])) * mask * (y > 0)
    return (
        direct + sum(product(conv_weight[..., j].T, tap(gz, 2 - j)) for j in range(3)),
        grad_source,
        torch.stack([torch.einsum("not,nft->of", gz, tap(x, j)) for j in range(3)], 2),
        gz.sum((0, 2)),
        *(query_key_gw, query_key_gb, value_gw, value_gb, attention_gw, attention_gb, output_gw, output_gb),
    )


def fusion_layer_backward(grad, x, spatial, mask, w1, b1, w2, b2, seed, p):
    z = torch.einsum("of,nft->not", w1, x) + spatial + b1[:, None]
    distribution = (1 + torch.erf(z / 2**0.5)) / 2
    g = grad * mask
    density = torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5
    gz = torch.einsum("of,not->nft", w2, g) * (distribution + z * density)
    return (
        torch.einsum("of,not->nft", w1, gz) + g,
        gz,
        torch.einsum("not,nft->of", gz, x),
        gz.sum((0, 2)),
        torch.einsum("not,nft->of", g, z * distribution),
        g.sum((0, 2)),
    )


def dilated_residual_backward(grad, x, mask, conv_weight, conv_bias, weight, bias, seed, dilation, p):
    t, d = x.shape[2], dilation

    def tap(a, j):
        """a at frames t + (j - 1) d, zero outside."""
        return functional.pad(a, (d, d))[..., j * d : j * d + t]

    y = sum(torch.einsum("og,ngt->not", conv_weight[..., j], tap(x, j)) for j in range(3))
    y = y + conv_bias[:, None]
    gc = grad * mask
    gz = torch.einsum("of,not->nft", weight, gc) * (y > 0)
    return (
        gc + sum(torch.einsum("og,not->ngt", conv_weight[..., j], tap(gz, 2 - j)) for j in range(3)),
        torch.stack([torch.einsum("not,ngt->og", gz, tap(x, j)) for j in range(3)], 2),
        gz.sum((0, 2)),
        torch.einsum("not,nft->of", gc, torch.relu(y)),
        gc.sum((0, 2)),
    )


def class_loss_backward(grad_cross_entropy, grad_smoothness, logits, labels, similarity, mask, class_weights):
    n, k, t = logits.shape
    real = mask[:, 0]
    weight = torch.where((labels == 255) | ~real, 0, class_weights[labels.clamp(max=k - 1)])
    one_hot = functional.one_hot(labels.clamp(max=k - 1), k).transpose(1, 2)
    grad = grad_cross_entropy * weight.unsqueeze(1) / weight.sum() * (logits.softmax(1) - one_hot)
    slope = torch.zeros(n, k, t + 1, dtype=logits.dtype)
    for i, length in enumerate(real.sum(1).tolist()):
        z = logits[i, :, :length]
        later, earlier = z[:, 1:].log_softmax(1), z[:, :-1].log_softmax(1)
        step = later - earlier
        slope[i, :, 1:length] = (
            2 / (n * k * max(1, length - 1)) * similarity[i, 1:length] * step * (step.square() <= 16)
        )
        total = slope[i].sum(1, keepdim=True)
        grad[i, :, 1:length] -= grad_smoothness * total * later.exp()
        grad[i, :, : max(0, length - 1)] += grad_smoothness * total * earlier.exp()
    return grad + grad_smoothness * (slope[..., :-1] - slope[..., 1:])


def boundary_loss_backward(grad_loss, logits, target, mask, pos_weight):
    y, frames = target.unsqueeze(1), mask.sum(2, keepdim=True)
    each = (1 - y) * torch.sigmoid(logits) - pos_weight * y * torch.sigmoid(-logits)
    return grad_loss / (len(logits) * frames) * mask * each


def pointwise_conv_backward(grad, x, weight, bias):
    return (
        torch.einsum("oc,not->nct", weight[0], grad),
        torch.einsum("not,nct->oc", grad, x).unsqueeze(0),
        grad.sum((0, 2)),
    )


def segment_mean_backward(grad, x, batch, start, length):
    grad_x = torch.zeros_like(x)
    for s, (n, first, frames) in enumerate(zip(batch, start, length)):
        grad_x[n, :, first : first + frames] = grad[s].unsqueeze(1) / frames
    return grad_x


def pairwise_distance_backward(grad, f):
    difference = f.unsqueeze(1) - f.unsqueeze(0)  # (S, S, D)
    distance = difference.norm(dim=2)
    weight = torch.where(distance == 0, 0, (grad + grad.T) / distance)
    return torch.einsum("ij,ijd->id", weight, difference)


@pytest.mark.parametrize(
    ("name", "given"),
    [*((name, False) for name in OPERATORS), ("masked_batch_norm", True)],
    ids=lambda value: {True: "given statistics", False: ""}.get(value, value),
)
def test_backward_formulas_in_float64(name: str, given: bool):
    args = list(without_dropout(name, arguments(name, 3, 17, 5, 8)))
    if given:
        args[5:7] = [
            torch.randn(8).double().requires_grad_(),
            (torch.rand(8).double() + 0.5).requires_grad_(),
        ]
    outputs = as_tuple(getattr(formulas, name)(*args))
    outputs = [o for o in outputs if o.requires_grad]
    weights = [torch.randn_like(o) for o in outputs]
    expected = torch.autograd.grad(outputs, [args[i] for i in leaves(args)], weights)
    with torch.no_grad():
        got = as_tuple(globals()[f"{name}_backward"](*weights, *args))
    got, expected = on_real_frames(name, args, got), on_real_frames(name, args, expected)
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    # The kernels, called without autograd, follow the same formulas.
    remaining = iter(weights)
    _, computed = operator(name).triton_passes(
        moved(tuple(args), torch.float32), lambda o: next(remaining).to(o)
    )
    computed = [g.cpu().double() for g in computed if g is not None]
    for ours, truth in zip(on_real_frames(name, args, computed), got, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-3)


def spatial_module(dtype: torch.dtype, features: int = 16) -> SpatialModule:
    torch.manual_seed(0)
    module = SpatialModule(3, SKELETONS["tcg"].adjacency(), features, 8, 4)
    with torch.no_grad():
        for parameter in (module.alpha, module.beta):
            parameter.fill_(0.5)
    return module.to(DEVICE, dtype)


def spatial_inputs(dtype: torch.dtype, t: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 17, t, generator=generator, dtype=torch.float64)
    graph = torch.rand(17, 17, generator=generator, dtype=torch.float64)
    return x.to(DEVICE, dtype), formulas.lengths_mask(2, t).to(DEVICE), graph.to(DEVICE, dtype)


def spatial_results(module: SpatialModule, inputs: tuple[Tensor, ...], backend: str) -> list[Tensor]:
    """Output, gradients of the parameters, running statistics."""
    getattr(module, "_orig_mod", module).load_state_dict(
        spatial_module(next(module.parameters()).dtype).state_dict()
    )
    with use_backend(backend):
        out = module(*inputs)
        weights = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=torch.float64).view(out.shape)
        derivatives = torch.autograd.grad((out * weights).sum(), list(module.parameters()))
    return [out.detach(), *derivatives, *(b.clone() for b in module.buffers() if b.is_floating_point())]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_spatial_module_follows_the_reference(training: bool):
    truth, plain = (
        spatial_results(spatial_module(d).train(training), spatial_inputs(d), "reference")
        for d in (torch.float64, torch.float32)
    )
    ours = spatial_results(
        spatial_module(torch.float32).train(training), spatial_inputs(torch.float32), "triton"
    )
    for our, rough, true in zip(ours, plain, truth, strict=True):
        scale = true.abs().max()
        assert (our - true).abs().max() <= 4 * (rough - true).abs().max() + 1e-5 * scale


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_spatial_module_under_autocast(dtype: torch.dtype):
    """As close to float64 as plain PyTorch under autocast, in gradients too; the same tensors are narrow."""
    truth = spatial_results(spatial_module(torch.float64), spatial_inputs(torch.float64), "reference")
    module, inputs = spatial_module(torch.float32), spatial_inputs(torch.float32)
    with torch.autocast(DEVICE, dtype=dtype):
        plain, ours = (spatial_results(module, inputs, backend) for backend in ("reference", "triton"))
    for our, rough, true in zip(ours, plain, truth, strict=True):
        assert our.dtype == rough.dtype
        assert (our - true).norm() <= 2 * (rough - true).norm() + 0.01 * true.norm()


@pytest.mark.parametrize("name", ["dynamic_graph_conv", "multiscale_graph_conv"])
def test_autocast_converts_the_input_once(name: str):
    args = moved(arguments(name, 2, 16, 5, 8), torch.float32)
    with Conversions() as conversions, torch.autocast(DEVICE, dtype=torch.float16):
        operator(name)(*args, backend="triton")
    assert conversions.shapes.count(args[0].shape) == 1


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_spatial_module_in_half_precision(dtype: torch.dtype, backend: str):
    """All of it, without autocast."""
    truth = spatial_results(spatial_module(torch.float64), spatial_inputs(torch.float64), "reference")
    ours = spatial_results(spatial_module(dtype), spatial_inputs(dtype), backend)
    assert ours[0].dtype == dtype
    assert (ours[0] - truth[0]).norm() <= 0.02 * truth[0].norm()
    assert all(result.isfinite().all() for result in ours)


def test_spatial_module_compiles_once_for_all_lengths():
    """At most two graphs over five lengths, without a break."""
    graphs = []

    def count(graph: torch.fx.GraphModule, example: list) -> object:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    module = spatial_module(torch.float32)
    compiled = torch.compile(module, fullgraph=True, backend=count)
    with use_backend("triton"):
        for t in (16, 23, 32, 48, 61):
            inputs = spatial_inputs(torch.float32, t)
            module.load_state_dict(spatial_module(torch.float32).state_dict())
            expected = module(*inputs).detach()
            module.load_state_dict(spatial_module(torch.float32).state_dict())
            torch.testing.assert_close(compiled(*inputs), expected)
    assert 1 <= len(graphs) <= 2
    torch._dynamo.reset()


def test_compiled_gradients_of_the_spatial_module():
    torch._dynamo.reset()
    module, inputs = spatial_module(torch.float32), spatial_inputs(torch.float32, 23)
    expected = spatial_results(module, inputs, "triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, truth in zip(spatial_results(compiled, inputs, "triton"), expected, strict=True):
        # Compiled code leaves products over frames to torch, which adds up in another order. The gradient of the bias
        # before a norm is 0, and what is left of it is rounding.
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max() + 2e-4
    torch._dynamo.reset()


def test_gradcheck_of_the_public_functions_in_float64():
    """float64 goes to plain PyTorch by itself, on a GPU too."""
    args = moved(arguments("dynamic_graph_conv", 2, 4, 3, 8), torch.float64)
    assert operator("dynamic_graph_conv").choose(args, None) == (
        "reference" if DEVICE == "cuda" else "analytic"
    )
    x, graph, beta, bias, mask = args
    torch.autograd.gradcheck(
        lambda *a: kernels.dynamic_graph_conv(*a[:3], bias=a[3], mask=mask)[0],
        (x, graph, beta, bias),
        fast_mode=True,
    )
    x, hops, weight, bias, mask = moved(arguments("multiscale_graph_conv", 2, 4, 3, 4), torch.float64)
    torch.autograd.gradcheck(
        lambda *a: kernels.multiscale_graph_conv(*a, mask=mask)[0], (x, hops, weight, bias), fast_mode=True
    )
    x, mask, weight, bias, residual, *_ = moved(arguments("masked_batch_norm", 2, 4, 3, 4), torch.float64)
    torch.autograd.gradcheck(
        lambda x, w, b, r: kernels.masked_batch_norm(x, mask, w, b, residual=r, frame_sum=True)[:2],
        (x, weight, bias, residual),
        fast_mode=True,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dynamic_graph_conv_needs_no_more_than_its_tensors(dtype: torch.dtype):
    """Peak of forward and backward: inputs, output, their gradients, and at most 5 % of that."""
    n, f, v, t = 8, 64, 25, 6000
    meta = {"device": "meta", "dtype": dtype}
    args = (
        torch.empty(n, f + 2, v, t, **meta),
        torch.empty(n, f, v, v, **meta),
        torch.empty(1, **meta),
        torch.empty(f + 2, **meta),
        torch.empty(n, 1, t, device="meta", dtype=torch.bool),
    )
    with record_launches(Target("cuda", 90)) as recorded, PeakMemory(*args) as memory:
        (z, *_), (grad_x, *_) = operator("dynamic_graph_conv").triton_passes(args, torch.empty_like)
    assert len(recorded) >= 4 and grad_x.shape == args[0].shape

    def size(*tensors: Tensor) -> int:
        return sum(a.numel() * a.element_size() for a in tensors)

    inputs, needed = size(*args), size(z, z, *args[:4])  # z and its gradient
    assert needed <= memory.peak and memory.peak + inputs <= 1.05 * (needed + inputs)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_measured_peak_of_dynamic_graph_conv():
    n, f, v, t = 8, 64, 25, 6000
    generator = torch.Generator(DEVICE).manual_seed(0)
    x, graph, beta, bias = (
        torch.randn(*shape, generator=generator, device=DEVICE).requires_grad_()
        for shape in ((n, f + 2, v, t), (n, f, v, v), (1,), (f + 2,))
    )
    gradient = torch.randn(n, f, v, t, generator=generator, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    z, *_ = kernels.dynamic_graph_conv(x, graph, beta, bias=bias, backend="triton")
    torch.autograd.grad(z, (x, graph, beta, bias), gradient)
    added = torch.cuda.max_memory_allocated() - before
    whole = sum(a.numel() * 4 for a in (z, x, graph, beta, bias))
    assert added + before <= 1.05 * (whole + before)


def test_backend_is_chosen_by_device_and_refused_with_a_reason():
    op = operator("dynamic_graph_conv")
    args = moved(arguments("dynamic_graph_conv", 2, 5, 3, 8), torch.float32)
    assert op.backends == ("reference", "recompute", "analytic", "triton")
    assert op.choose(args, None) == ("triton" if DEVICE == "cuda" else "analytic")
    assert op.choose(args, "triton") == "triton"
    refused = {
        "float64": moved(args, torch.float64),
        "features; the kernels need a multiple of 8": moved(
            arguments("dynamic_graph_conv", 1, 5, 3, 12), torch.float32
        ),
        "129 joints": moved(arguments("dynamic_graph_conv", 1, 2, 129, 8), torch.float32),
    }
    for reason, impossible in refused.items():
        assert op.choose(impossible, None) == ("reference" if DEVICE == "cuda" else "analytic")
        with pytest.raises(
            BackendError, match=f"dynamic_graph_conv: backend 'triton' is forced, but .*{reason}"
        ):
            op(*impossible, backend="triton")
    with pytest.raises(BackendError, match="exceed 32-bit offsets"):
        op.choose((torch.empty(1, 10, 32, 2**23, device="meta"), *(a.to("meta") for a in args[1:])), "triton")


@pytest.mark.skipif(DEVICE == "cuda", reason="about machines without a GPU")
def test_bfloat16_is_refused_by_the_interpreter_and_everything_without_it():
    args = moved(arguments("dynamic_graph_conv", 2, 5, 3, 8), torch.bfloat16)
    with pytest.raises(BackendError, match="interpreter computes products of bfloat16 matrices wrongly"):
        operator("dynamic_graph_conv")(*args, backend="triton")
    program = (
        "import torch; from trgnet import kernels\n"
        "x, m = torch.randn(1, 8, 2, 3), torch.ones(1, 1, 3, dtype=torch.bool)\n"
        "try: kernels.masked_batch_norm(x, m, torch.ones(8), torch.ones(8), backend='triton')\n"
        "except kernels.BackendError as error: print(error)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    assert "tensors are on cpu; Triton needs a GPU, or TRITON_INTERPRET=1" in run.stdout


@pytest.mark.parametrize("version, refused", [("3.7.1", False), ("3.8.0+git1", True), ("3.9.0", False)])
def test_releases_of_triton_that_miscompile_are_refused(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(launch, "_INTERPRETED", False)
    monkeypatch.setattr(launch.triton, "__version__", version)
    mode, on_gpu, op = FakeTensorMode(), torch.device("cuda", 0), operator("fusion_layer")
    args = [
        FakeTensor(mode, a.detach().to("meta"), on_gpu) if isinstance(a, Tensor) else a
        for a in moved(arguments("fusion_layer", 2, 5, 3, 8), torch.float32)
    ]
    with record_launches(Target("cuda", 90)):
        assert op.choose(args, None) == ("reference" if refused else "triton")
        if refused:
            with pytest.raises(BackendError, match="compiles reductions wrongly; install triton 3.7.1"):
                op.choose(args, "triton")


N, F, V, T = 1075, 8, 25, 8000  # 2.15e9 values in the output of the dynamic graph convolution


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's")
def test_addresses_beyond_two_to_the_31(only_last_program: None):
    """The last program reads and writes the very end of tensors whose memory is reserved, but never touched elsewhere."""
    generator = torch.Generator().manual_seed(0)

    def huge(channels: int, frames: int) -> Tensor:
        x = torch.empty(N * 10 // channels, channels, V, T, dtype=torch.float16)
        assert x.numel() >= 2**31
        x[-1, :, :, -frames:] = torch.randn(channels, V, frames, generator=generator)
        return x

    def assert_end(got: Tensor, expected: Tensor) -> None:
        end = got[-1, ..., -expected.shape[-1] :]
        torch.testing.assert_close(end.float(), expected.float(), rtol=2e-3, atol=2e-2)

    conv = operator("dynamic_graph_conv")
    x, beta = huge(F + 2, 16), torch.ones(1)
    graph = torch.randn(N, F, V, V, generator=generator, dtype=torch.float16)
    end = x[-1:, ..., -16:].float()
    z, *_ = conv.triton.forward(x, graph, beta, None, None)
    assert_end(z, conv.reference(end, graph[-1:].float(), beta, None, None)[0][0])

    gradient = huge(F, 16)[-N:]
    grad_x, *_ = conv.triton.backward(gradient, x, graph, beta, None, None, [True, False, False, False])
    leaf = end.requires_grad_()
    out = conv.reference(leaf, graph[-1:].float(), beta, None, None)[0]
    (expected,) = torch.autograd.grad(out, leaf, gradient[-1:, ..., -16:].float())
    assert_end(grad_x, expected[0])
    del x, z, gradient, grad_x

    norm, wide = operator("masked_batch_norm"), huge(F, 128)
    weight, mean, mask = torch.full((F,), 2.0), torch.zeros(F), torch.zeros(len(wide), 1, T, dtype=torch.bool)
    mask[-1] = True
    out, *_ = norm.triton.forward(wide, mask, weight, mean, None, mean, weight, False, False, 1e-5)
    tail = wide[-1:, ..., -64:].float()
    expected, *_ = norm.reference(
        tail, mask[-1:, :, :64], weight, mean, None, mean, weight, False, False, 1e-5
    )
    assert_end(out[:, -1], expected[0, -1])
    del wide, out

    conv, skeleton = operator("multiscale_graph_conv"), huge(3, 64)
    hops, weight = torch.randn(2, V, V, generator=generator), torch.randn(F, 6, generator=generator)
    y, *_ = conv.triton.forward(skeleton, hops, weight, mean, None)
    expected = conv.reference(skeleton[-1:, ..., -64:].float(), hops, weight, mean, None)[0][0]
    # A program has 128 rows, of one channel's joints after another's: the last one has all of channels 6 and 7.
    torch.testing.assert_close(y[-1, 6:, :, -64:].float(), expected[6:], rtol=1e-2, atol=0.1)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_tensors_beyond_two_to_the_31_on_a_gpu():
    conv = operator("dynamic_graph_conv")
    x = torch.randn(N, F + 2, V, T, dtype=torch.float16, device=DEVICE)
    graph, beta = torch.randn(N, F, V, V, dtype=torch.float16, device=DEVICE), torch.ones(1, device=DEVICE)
    z, *_ = conv(x, graph, beta, None, None, backend="triton")
    expected, *_ = conv.reference(x[-1:].float(), graph[-1:].float(), beta, None, None)
    torch.testing.assert_close(z[-1:].float(), expected, rtol=2e-3, atol=5e-2)


def test_more_than_a_hundred_thousand_frames():
    """As one sequence; the statistics count every frame."""
    t = 100_017
    x, mask = torch.randn(1, 8, 1, t, device=DEVICE), torch.ones(1, 1, t, dtype=torch.bool, device=DEVICE)
    ones, zeros = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    out, total, mean, var = kernels.masked_batch_norm(x, mask, ones, zeros, frame_sum=True, backend="triton")
    expected = formulas.masked_batch_norm(x.double(), mask, ones, zeros, None, None, None, False, True, 1e-5)
    for ours, truth in zip((out, total, mean, var), expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, t", [(0, 5), (2, 0)])
@pytest.mark.parametrize("name", OPERATORS)
def test_empty_batches(name: str, n: int, t: int):
    traits = TRAITS[name]

    def emptied(position: int, a: object) -> object:
        if position in traits.segments:
            a = a.detach()[:0].requires_grad_(a.requires_grad)
        elif position == traits.mask or position in traits.padded:
            a = a.detach()[:n, ..., :t].requires_grad_(a.requires_grad)
        elif isinstance(a, Tensor) and a.dim() == 4:
            a = a.detach()[:n].requires_grad_(a.requires_grad)
        return a

    args = tuple(emptied(i, a) for i, a in enumerate(arguments(name, 2, 5, 3, 8)))
    args = moved(args, torch.float32)
    outputs = call(name, args)
    if outputs[0].dim():
        assert outputs[0].numel() == 0
    else:
        torch.testing.assert_close(outputs, call(name, args, "reference"), equal_nan=True)
    assert all(not gradient.any() for gradient in gradients(outputs, args))
