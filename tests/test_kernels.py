"""Every operator against its formula: values, gradients, backends, dtypes, padding, torch.library contracts."""

from __future__ import annotations

import os
import subprocess
import sys

import operators as formulas
import pytest
import torch
from allocations import LargestTensor
from operators import arguments, as_tuple, converted, gradients, without_dropout
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from trgnet.kernels import BackendError, Operator, operator, operator_table, use_backend
from trgnet.kernels.dilated_conv import analytic_dilated_conv, analytic_dilated_conv_gradients
from trgnet.kernels.dropout import dropout_kept
from trgnet.kernels.dynamic_graph_conv import BLOCK_ELEMENTS
from trgnet.kernels.operator import check_shapes

from trgnet import kernels

# The optimizer's operator works in place: tests/test_moment_update.py.
OPERATORS = [name for name, _ in operator_table() if name != "moment_update"]
ANALYTIC = [name for name in OPERATORS if operator(name).analytic]
ANALYTIC_CASES = [
    *((name, case) for name in ANALYTIC for case in ("padded", "unpadded")),
    *(("attention_layer", case) for case in ("encoder", "unpadded encoder")),
]
ON_A_CPU = [
    (name, backend) for name in OPERATORS for backend in operator(name).backends if backend != "triton"
]
"""Operators and backends that run on CPU tensors in every precision."""
SIZES = [(1, 1, 1), (1, 2, 3), (3, 15, 11), (2, 16, 5), (2, 17, 19), (3, 63, 4)]


def pairs(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[tuple[Tensor, Tensor]]:
    """Outputs beside each other, less statistics that a backend leaves to the norm, which are empty."""
    return [(o, e) for i, (o, e) in enumerate(zip(got, expected, strict=True)) if i == 0 or o.numel()]


def test_every_operator_has_a_formula_here():
    assert sorted(OPERATORS) == OPERATORS and len(OPERATORS) == 11
    assert all(hasattr(formulas, name) for name in OPERATORS)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients_follow_the_formula(name: str, size: tuple[int, int, int]):
    args = without_dropout(name, arguments(name, *size))
    if name == "attention_layer":  # its input is zero on padded frames, so no gradient belongs there
        got, expected = (
            (f(args[0] * args[1], *args[1:]),) for f in (operator(name), formulas.attention_layer)
        )
    else:
        got, expected = as_tuple(operator(name)(*args)), as_tuple(getattr(formulas, name)(*args))
    for ours, truth in pairs(got, expected):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)
    for ours, truth in zip(gradients(got, args), gradients(expected, args), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OPERATORS)
def test_recompute_equals_the_reference_bit_for_bit(name: str):
    args = arguments(name, 3, 17)
    expected = as_tuple(operator(name)(*args, backend="reference"))
    got = as_tuple(operator(name)(*args, backend="recompute"))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(gradients(got, args), gradients(expected, args), strict=True)
    )


@pytest.mark.parametrize("name", OPERATORS)
def test_recompute_saves_nothing_but_its_inputs(name: str):
    args = arguments(name, 3, 17)
    inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        operator(name)(*args, backend="recompute")
    assert saved and all(t.untyped_storage().data_ptr() in inputs for t in saved)


@pytest.mark.parametrize(("name", "backend"), ON_A_CPU)
def test_gradcheck(name: str, backend: str):
    args = arguments(name, 2, 4, 3, 4)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = as_tuple(operator(name)(*inputs, backend=backend))
        if name == "pairwise_distance":  # the distance of a row to itself has a kink
            outputs = (outputs[0][~torch.eye(len(inputs[0]), dtype=torch.bool)],)
        return tuple(o for o in outputs if o.requires_grad)

    assert torch.autograd.gradcheck(function, args)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str):
    torch.library.opcheck(operator(name).op, arguments(name, 2, 5, 3, 4))


@pytest.mark.parametrize("name", ["dynamic_graph_conv", "masked_batch_norm", "attention_layer", "class_loss"])
@pytest.mark.parametrize("backend", ["reference", "recompute"])
def test_compiles_as_one_graph_with_the_same_result(name: str, backend: str):
    args = arguments(name, 2, 16, 4, 4)
    compiled = torch.compile(
        lambda *a: operator(name)(*a, backend=backend), fullgraph=True, backend="aot_eager"
    )
    got, expected = as_tuple(compiled(*args)), as_tuple(operator(name)(*args))
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
    for ours, truth in zip(gradients(got, args), gradients(expected, args), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", OPERATORS)
def test_float32_is_as_good_as_its_rounding(name: str):
    truth = as_tuple(operator(name)(*arguments(name, 2, 63, 11, 16)))
    got = as_tuple(operator(name)(*converted(arguments(name, 2, 63, 11, 16), torch.float32)))
    for ours, exact in pairs(got, truth):
        assert ours.dtype == torch.float32
        assert (ours - exact).abs().max() <= 2e-5 * (1 + exact.abs().max())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", ["reference", "recompute"])
def test_bfloat16_autocast(name: str, backend: str):
    args = converted(arguments(name, 2, 31, 5, 16), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = as_tuple(operator(name)(*args, backend=backend))
    for ours, exact in zip(got, as_tuple(operator(name)(*args)), strict=True):
        assert (ours - exact).norm() <= 0.02 * (1 + exact.norm())
    for ours, exact in zip(
        gradients(got, args), gradients(as_tuple(operator(name)(*args)), args), strict=True
    ):
        assert torch.isfinite(ours).all()
        assert (ours - exact).norm() <= 0.1 * (1 + exact.norm())


@pytest.mark.parametrize("name", ["attention_layer", "masked_batch_norm", "segment_mean", "class_loss"])
def test_float16_reaches_over_long_sequences(name: str):
    """Sums over time and frame counts exceed 65504, the largest float16, and 2048, up to which it counts."""
    args = arguments(name, 1, 80_000, 2, 8)
    if name == "attention_layer":  # weights near those of a trained layer; sigmoids away from 0
        args = tuple(a / 3 if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    for ours, exact in zip(
        as_tuple(operator(name)(*converted(args, torch.float16))),
        as_tuple(operator(name)(*args)),
        strict=True,
    ):
        assert torch.isfinite(ours).all()
        assert (ours - exact).norm() <= 0.01 * exact.norm()


@pytest.mark.parametrize("name", OPERATORS)
def test_inputs_may_be_strided_and_gradients_expanded(name: str):
    args = arguments(name, 2, 12, 5, 8)
    strided = tuple(
        a.detach().transpose(0, -1).contiguous().transpose(0, -1).requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1
        else a
        for a in args
    )
    expected = as_tuple(operator(name)(*args, backend="reference"))

    def gradients_of_a_sum(out: Tensor, inputs: tuple) -> tuple[Tensor, ...]:
        wanted = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
        return torch.autograd.grad(out.sum(), wanted, allow_unused=True, materialize_grads=True)

    derivatives = gradients_of_a_sum(expected[0], args)
    for backend in (b for n, b in ON_A_CPU if n == name):
        got = as_tuple(operator(name)(*strided, backend=backend))
        for ours, truth in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)
        for ours, truth in zip(gradients_of_a_sum(got[0], strided), derivatives, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


def test_no_frame_graph_is_materialised():
    n, f, v, t = 1, 4, 25, 12_000
    args = converted(arguments("dynamic_graph_conv", n, t, v, f), torch.float32)
    with LargestTensor() as largest:
        operator("dynamic_graph_conv")(*args)[0].sum().backward()
    frame_graph = n * t * v * v
    assert largest.elements <= BLOCK_ELEMENTS < frame_graph / 3


@pytest.mark.parametrize("backend", ["reference", "recompute", "analytic"])
@pytest.mark.parametrize("frames_per_block", [1, 4, 7])
def test_blocks_of_frames_change_nothing(
    monkeypatch: pytest.MonkeyPatch, frames_per_block: int, backend: str
):
    n, t, v = 2, 17, 5
    module = sys.modules["trgnet.kernels.dynamic_graph_conv"]
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", frames_per_block * n * v * v)
    monkeypatch.setattr(module, "CACHED_ELEMENTS", frames_per_block * v * v)
    args = arguments("dynamic_graph_conv", n, t, v)
    got = as_tuple(operator("dynamic_graph_conv")(*args, backend=backend))
    expected = as_tuple(formulas.dynamic_graph_conv(*args))
    torch.testing.assert_close(got[0], expected[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(got, args), gradients(expected, args), rtol=1e-10, atol=1e-10)
    if backend == "analytic":
        return
    compiled = torch.compile(operator("dynamic_graph_conv"), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args, backend=backend)[0], expected[0], rtol=1e-12, atol=1e-12)


def test_no_hop_tensor_is_materialised():
    n, c, v, t, s, f = 1, 3, 5, 4000, 13, 4
    x = torch.randn(n, c, v, t, requires_grad=True)
    with LargestTensor() as largest:
        kernels.multiscale_graph_conv(
            x,
            torch.randn(s, v, v, requires_grad=True),
            torch.randn(f, s * c, requires_grad=True),
            torch.zeros(f),
        )[0].sum().backward()
    assert largest.elements <= max(c, f) * n * v * t < n * s * c * v * t


def test_batch_norm_with_given_statistics():
    args = list(arguments("masked_batch_norm", 2, 9))
    args[4:7] = [None, torch.randn(8).double(), torch.rand(8).double() + 0.5]
    for ours, truth in zip(
        operator("masked_batch_norm")(*args), formulas.masked_batch_norm(*args), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)


def test_encoder_form_of_the_attention_layer():
    args = list(without_dropout("attention_layer", arguments("attention_layer", 3, 21)))
    args[2] = None
    torch.testing.assert_close(
        operator("attention_layer")(*args), formulas.attention_layer(*args), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("p", [(0.05, 0.5), (0.0, 0.3), (0.25, 0.0)], ids=str)
def test_kept_elements_are_those_of_the_dropout(p: tuple[float, float]):
    x, seeds = torch.ones(3, 8, 1001), torch.tensor([-7, 2**40 + 7])
    for kept, probability, seed in zip(dropout_kept(x, p, seeds), p, seeds):
        expected = kernels.dropout(x, probability, seed)
        assert torch.equal(expected, x) if kept is None else torch.equal(kept, expected.ne(0).to(torch.uint8))
        (alone,) = dropout_kept(x, (probability,), seed)
        assert alone is kept is None or torch.equal(alone, kept)
    assert dropout_kept(x, p, None) == [None, None]


def test_dropout_depends_on_seed_and_position_only():
    seed = torch.tensor(123)
    x = torch.ones(2, 3, 50, dtype=torch.float64)
    mask = kernels.dropout(x, 0.3, seed)
    assert torch.equal(kernels.dropout(torch.ones(2, 3, 80).double(), 0.3, seed)[..., :50], mask)
    assert not torch.equal(kernels.dropout(x, 0.3, seed + 1), mask)
    assert not torch.equal(kernels.dropout(x, 0.3, seed + 2**32), mask)
    assert kernels.dropout(x, 0.0, seed) is x and kernels.dropout(x, 0.3, None) is x


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5])
def test_dropout_is_unbiased_and_uncorrelated(p: float):
    n, c, t = 4, 64, 1000
    dropped = kernels.dropout(torch.ones(n, c, t, dtype=torch.float64), p, torch.tensor(7))
    assert set(dropped.unique().tolist()) == {0.0, 1 / (1 - p)}
    kept = (dropped > 0).double()
    total = n * c * t
    assert abs(kept.mean() - (1 - p)) < 5 * (p * (1 - p) / total) ** 0.5
    centred = (kept - (1 - p)) / (p * (1 - p)) ** 0.5
    for shifted in (centred.roll(1, 2), centred.roll(1, 1), centred.roll(1, 0), centred.roll((1, 1), (1, 2))):
        assert abs((centred * shifted).mean()) < 5 / total**0.5


def test_channel_mask_is_unbiased_and_a_function_of_the_seed():
    mask = kernels.channel_mask(8, 64, 0.25, torch.tensor(3), torch.float64)
    assert mask.shape == (8, 64) and mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {0.0, 1 / 0.75}
    assert 0.1 < (mask == 0).double().mean() < 0.4
    assert torch.equal(kernels.channel_mask(9, 64, 0.25, torch.tensor(3), torch.float64)[:8], mask)
    assert not torch.equal(kernels.channel_mask(8, 64, 0.25, torch.tensor(4), torch.float64), mask)
    off = [
        kernels.channel_mask(8, 64, p, seed, torch.float64)
        for p, seed in ((0.25, None), (0.0, torch.tensor(3)))
    ]
    assert off == [None, None]


def test_segment_mean_leaves_out_frames_of_no_segment():
    x = torch.arange(12.0).view(1, 1, 12)
    means = kernels.segment_mean(x, *torch.tensor([[0, 0], [1, 7], [3, 2]]))
    assert means.squeeze(1).tolist() == [2.0, 7.5]
    # A table that is filled up to a fixed size with segments of length 0.
    means = kernels.segment_mean(x, *torch.tensor([[0, 0, 0, 0], [1, 7, 12, 12], [3, 2, 0, 0]]))
    assert means.squeeze(1).tolist() == [2.0, 7.5, 0.0, 0.0]
    assert kernels.segment_mean(x, *torch.zeros(3, 0, dtype=torch.int64)).shape == (0, 1)


def test_costs_are_counted_from_shapes():
    n, f, v, t = 8, 64, 25, 6000
    meta = {"device": "meta", "dtype": torch.float32}
    args = (
        torch.empty(n, f + 2, v, t, **meta),
        torch.empty(n, f, v, v, **meta),
        torch.empty(1, **meta),
        None,
        None,
    )
    plane = 4 * n * f * v * t
    forward, backward = (
        operator("dynamic_graph_conv").cost(*args),
        operator("dynamic_graph_conv").cost(*args, backward=True),
    )
    assert plane * 2 < forward.bytes < plane * 2.05 and plane * 3 < backward.bytes < plane * 3.09
    assert forward.flops == n * t * v * v * (3 * f + 3)
    for name in OPERATORS:
        cost = operator(name).cost(*arguments(name))
        assert (
            cost.bytes > 0 and 0 < cost.flops < operator(name).cost(*arguments(name), backward=True).flops * 2
        )


def test_backend_argument_beats_block_beats_automatic():
    op = operator("dynamic_graph_conv")
    args = arguments("dynamic_graph_conv")
    assert op.choose(args, None) == "analytic"
    with use_backend("recompute"):
        assert kernels.current_backend() == "recompute" and op.choose(args, None) == "recompute"
        assert op.choose(args, "reference") == "reference"
        with use_backend("auto"):
            assert op.choose(args, None) == "analytic"
    assert kernels.current_backend() == "auto"


@pytest.mark.parametrize("name", ANALYTIC)
def test_automatic_takes_the_analytic_passes_where_they_can_run(name: str):
    op, args = operator(name), arguments(name)
    assert op.choose(args, None) == "analytic" and op.choose(args, "reference") == "reference"
    assert op.choose(converted(args, torch.float32), None) == "analytic"
    with torch.no_grad():
        assert op.choose(args, None) == "analytic"
    refused = {
        "bfloat16": converted(args, torch.bfloat16),
        "float32, torch.float64": (args[0].float(), *args[1:]),
        "on meta; its passes in PyTorch are for CPUs": tuple(
            a.to("meta") if isinstance(a, Tensor) else a for a in args
        ),
    }
    with FakeTensorMode() as fake:
        refused["FakeTensor on cpu"] = tuple(
            fake.from_tensor(a) if isinstance(a, Tensor) else a for a in args
        )
    for reason, others in refused.items():
        assert op.choose(others, None) == "reference"
        with pytest.raises(BackendError, match=f"{name}: backend 'analytic' is forced, but .*{reason}"):
            op.choose(others, "analytic")
    with torch.autocast("cpu"), pytest.raises(BackendError, match="autocast is on"):
        op.choose(converted(args, torch.float32), "analytic")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the code is being compiled"):
        torch.compile(lambda *a: op(*a, backend="analytic"), fullgraph=True, backend="eager")(*args)


def test_analytic_loss_leaves_gradients_of_the_similarity_to_the_reference():
    op, (logits, labels, similarity, *rest) = operator("class_loss"), arguments("class_loss")
    args = (logits, labels, similarity.clone().requires_grad_(), *rest)
    assert op.choose(args, None) == "reference"
    with pytest.raises(BackendError, match="'analytic' is forced, but an argument other than the logits"):
        op.choose(args, "analytic")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_analytic_loss_lets_steps_of_just_the_limit_through(dtype: torch.dtype):
    # The first frame is like the last one, so the normalisers of both softmaxes over time are the same.
    logits = torch.tensor([0.0, 4.0, 0.0]).to(dtype).view(1, 1, 3).requires_grad_()
    rest = (
        torch.zeros(1, 3, dtype=torch.int64),
        torch.ones(1, 3, dtype=dtype),
        torch.ones(1, 1, 3).bool(),
        None,
    )
    got, expected = (
        torch.autograd.grad(operator("class_loss")(logits, *rest, backend=backend)[1], logits)[0]
        for backend in ("analytic", "reference")
    )
    assert expected[0, 0, 1] > 4
    torch.testing.assert_close(got, expected)


def test_operators_without_analytic_passes_say_so():
    with pytest.raises(BackendError, match="segment_mean: backend 'analytic' is forced, but .* has only"):
        operator("segment_mean")(*arguments("segment_mean"), backend="analytic")


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("name", "case"), ANALYTIC_CASES)
def test_analytic_passes_follow_the_reference_with_its_dropout(
    name: str, case: str, size: tuple[int, int, int]
):
    args = list(arguments(name, *size))
    if "unpadded" in case:
        args = [torch.ones_like(a) if isinstance(a, Tensor) and a.dtype == torch.bool else a for a in args]
    if "encoder" in case:
        args[2] = None
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    got, expected = (as_tuple(operator(name)(*args, backend=b)) for b in ("analytic", "reference"))
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-12)
    derivatives = gradients(got, args)
    for ours, truth in zip(derivatives, gradients(expected, args), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-11)
    again = as_tuple(operator(name)(*args, backend="analytic"))
    assert all(torch.equal(a, b) for a, b in zip(gradients(again, args), derivatives, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(args, before) if isinstance(a, Tensor)), (
        "an input was changed"
    )


@pytest.mark.parametrize(
    ("frames", "dilation"), [(9, 1), (9, 2), (9, 8), (9, 9), (9, 10), (1, 1), (1, 4)], ids=str
)
def test_convolution_by_products_is_the_convolution(frames: int, dilation: int):
    x, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((2, 4, frames), (6, 4, 3), (6,))
    )
    y = torch.conv1d(x, weight, bias, padding=dilation, dilation=dilation)
    gz = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight, bias), gz)
    with torch.no_grad():
        torch.testing.assert_close(analytic_dilated_conv(x, weight, bias, dilation), y)
        got = analytic_dilated_conv_gradients(gz, x, weight, dilation, torch.full_like(x, 3.0))
        torch.testing.assert_close((got[0] - 3.0, *got[1:]), expected)


def test_analytic_passes_do_not_depend_on_the_default_device():
    args = arguments("attention_layer", f=12)  # sizes that no other test has
    with torch.device("meta"):
        got = operator("attention_layer")(*args, backend="analytic")
    torch.testing.assert_close(got, operator("attention_layer")(*args, backend="reference"))


@pytest.mark.parametrize("name", ANALYTIC)
def test_analytic_passes_keep_less_than_autograd_would(name: str):
    args = arguments(name, 2, 200, 6, 16)
    inputs = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}

    def kept(backend: str) -> int:
        """Bytes beside the inputs and the output."""
        saved: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
            lambda t: t,
        ):
            out = as_tuple(operator(name)(*args, backend=backend))[0]
        return sum(n for at, n in saved.items() if at not in inputs | {out.untyped_storage().data_ptr()})

    # Of the attention layer: o, Q, K and r, and the masks of its dropouts in bytes.
    most = {"attention_layer": 5 * args[0].nbytes}.get(name, 2 * args[0].nbytes)
    assert kept("analytic") <= min(most, kept("reference"))


@pytest.mark.parametrize("name", ANALYTIC)
def test_analytic_passes_refuse_second_derivatives(name: str):
    args = arguments(name)
    with pytest.raises(RuntimeError, match=f"{name}: backend 'analytic' can be differentiated once only"):
        torch.autograd.grad(as_tuple(operator(name)(*args))[0].sum(), args[0], create_graph=True)


def test_forced_backend_never_falls_back(monkeypatch: pytest.MonkeyPatch):
    # Operators without a kernel; those that have one: tests/test_triton.py.
    for name in ("fusion_layer", "segment_mean"):
        monkeypatch.setattr(operator(name), "triton", None)
    args = arguments("fusion_layer")
    with use_backend("triton"), pytest.raises(BackendError, match="fusion_layer.*'triton' is forced"):
        operator("fusion_layer")(*args)
    with use_backend("triton"), pytest.raises(BackendError, match="segment_mean"):
        kernels.segment_mean(torch.zeros(1, 2, 3), *torch.zeros(3, 0, dtype=torch.int64))
    with pytest.raises(ValueError, match="unknown backend 'cuda'"):
        operator("fusion_layer")(*args, backend="cuda")


def test_backend_from_the_environment():
    code = "from trgnet import kernels; print(kernels.current_backend())"

    def run(value: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TRGNET_BACKEND": value}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert run("recompute").stdout.strip() == "recompute"
    assert run("").stdout.strip() == "auto"
    failed = run("fast")
    assert failed.returncode != 0 and "TRGNET_BACKEND: unknown backend 'fast'" in failed.stderr


def test_bad_shapes_and_dtypes_are_named():
    n, f, t = 2, 8, 9
    x, mask = torch.randn(n, f, t), torch.ones(n, 1, t, dtype=torch.bool)
    weights = {
        "conv_weight": torch.randn(f, f, 3),
        "conv_bias": torch.randn(f),
        "output_weight": torch.randn(f, f),
        "output_bias": torch.randn(f),
    }
    with pytest.raises(ValueError, match=r"mask has shape \(2, 1, 7\), expected \(N, 1, T\) = \(2, 1, 9\)"):
        kernels.dilated_residual(x, mask[..., :7], **weights)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 9\), expected \(N, 1, T\) = \(2, 1, 9\)"):
        kernels.dilated_residual(x, mask[:, 0], **weights)
    with pytest.raises(ValueError, match=r"weight has shape \(8, 7\), expected \(F, F\) = \(F, F\)"):
        check_shapes("layer", weight=(torch.ones(8, 7), "F F"), x=(x, "N F T"))
    assert check_shapes("layer", x=(x, "N F T"), none=(None, "F"), mask=(mask, "N 1 T"))["T"] == t
    with pytest.raises(TypeError, match="mask has dtype torch.float32, expected torch.bool"):
        kernels.dilated_residual(x, mask.float(), **weights)
    with pytest.raises(ValueError, match="dilation is 0"):
        kernels.dilated_residual(x, mask, **weights, dilation=0)
    with pytest.raises(ValueError, match="p is 1.0, expected a probability"):
        kernels.dilated_residual(x, mask, **weights, p=1.0)
    with pytest.raises(ValueError, match=r"weight has 7 input channels, expected S\*C = 2\*3 = 6"):
        kernels.multiscale_graph_conv(
            torch.randn(1, 3, 4, 5), torch.randn(2, 4, 4), torch.randn(6, 7), torch.randn(6)
        )
    with pytest.raises(KeyError, match="no operator 'nothing'"):
        operator("nothing")


def test_reference_is_named_after_its_operator():
    assert all(isinstance(operator(name), Operator) and operator(name).name == name for name in OPERATORS)
