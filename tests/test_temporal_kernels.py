"""What is particular to the Triton kernels of the temporal layers: dropout, dilations, strides, launches, forms of a pass.

What all kernels have in common is tested in tests/test_triton.py.
"""

from __future__ import annotations

import pytest
import torch
from operators import arguments, converted
from torch import Tensor
from trgnet.kernels import BackendError, launch, operator
from trgnet.kernels.launch import Target, record_launches

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = ("fusion_layer", "dilated_residual")


def layer_arguments(name: str, *size: int, dtype: torch.dtype = torch.float32) -> list:
    return list(converted(arguments(name, *size), dtype, DEVICE))


def compare(name: str, args: list, tolerance: float = 1e-4) -> None:
    """Value and gradients of the kernels and of the reference, both in the arguments' precision."""
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    ours, truth = (operator(name)(*args, backend=backend) for backend in ("triton", "reference"))
    weights = torch.linspace(-1, 1, truth.numel(), device=DEVICE).view(truth.shape).to(truth.dtype)
    got, expected = (torch.autograd.grad(out, wanted, weights) for out in (ours, truth))
    for a, b in zip((ours, *got), (truth, *expected), strict=True):
        assert a.dtype == b.dtype
        scale = 1 + b.abs().max()
        torch.testing.assert_close(a / scale, b / scale, rtol=tolerance, atol=tolerance)


def only_dropout(name: str, n: int, t: int, f: int) -> list:
    """Arguments with which a layer is the dropout of a constant."""
    args = layer_arguments(name, n, t, 1, f)
    args = [torch.zeros_like(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    if name == "fusion_layer":
        args[1], args[2], args[5] = args[1] + 1, torch.ones_like(args[2]), torch.eye(f, device=DEVICE)
    else:
        args[1], args[5] = torch.ones_like(args[1]), args[5] + 1
    return args


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("p", [0.05, 0.9])
def test_dropout_is_that_of_the_reference_element_by_element(name: str, p: float):
    args = only_dropout(name, 3, 70, 24)
    args[-1] = p
    ours, truth = (operator(name)(*args, backend=backend) for backend in ("triton", "reference"))
    assert torch.equal(ours == 0, truth == 0)
    assert abs((ours == 0).float().mean() - p) < 0.03
    torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("name", LAYERS)
def test_without_dropout(name: str):
    seed = 7 if name == "fusion_layer" else 6
    args = layer_arguments(name, 2, 33, 1, 8)
    args[-1] = 0.0
    compare(name, args)
    unseeded = [*args[:seed], None, *args[seed + 1 :]]
    assert torch.equal(operator(name)(*args, backend="triton"), operator(name)(*unseeded, backend="triton"))


@pytest.mark.parametrize(("t", "dilation"), [(1, 1), (40, 512), (48, 16), (67, 33)])
def test_dilations(t: int, dilation: int):
    args = layer_arguments("dilated_residual", 3, t, 1, 24)
    args[7] = dilation
    compare("dilated_residual", args)


@pytest.mark.parametrize("name", [*LAYERS, "attention_layer"])
@pytest.mark.parametrize("target", [Target("cuda", 80), Target("cuda", 90), Target("hip", "gfx942")], ids=str)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_every_form_of_the_passes(name: str, target: Target, precision: str, monkeypatch: pytest.MonkeyPatch):
    """Tiles and passes differ by architecture and precision; here all of them run, where the arithmetic is the same."""
    if DEVICE == "cuda":
        pytest.skip("a GPU runs the form of its own architecture")
    monkeypatch.setattr(launch, "_forced_target", target)
    torch.set_float32_matmul_precision(precision)
    try:
        compare(name, layer_arguments(name, 2, 50, 1, 16))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_strided_spatial_projection_is_read_where_it_lies():
    args = layer_arguments("fusion_layer", 3, 32, 1, 16)
    groups = torch.randn(3, 4, 16, 32, device=DEVICE)
    view = groups.unbind(1)[2]
    assert not view.is_contiguous() and launch.planes(view) is view
    transposed = view.mT.contiguous().mT
    assert launch.planes(transposed).is_contiguous() and torch.equal(launch.planes(transposed), view)
    args[1] = view.requires_grad_()
    compare("fusion_layer", args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_padded_frames_of_the_fusion_layer_may_hold_anything(dtype: torch.dtype):
    args = layer_arguments("fusion_layer", 2, 20, 1, 8, dtype=dtype)
    mask = args[2]
    results = []
    for filling in (0.0, float("nan")):
        filled = [a.detach().masked_fill(~mask, filling).requires_grad_() for a in args[:2]]
        inputs = [*filled, *args[2:]]
        out = operator("fusion_layer")(*inputs, backend="triton")
        wanted = [a for a in inputs if isinstance(a, Tensor) and a.requires_grad]
        results.append([out, *torch.autograd.grad(out, wanted, torch.ones_like(out))])
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_leaves_the_dtype_to_the_residual(name: str):
    """As in the reference, where a residual of float32 keeps the sum in float32."""
    args = layer_arguments(name, 2, 16, 1, 8)
    with torch.autocast(DEVICE, dtype=torch.float16):
        ours, plain = (operator(name)(*args, backend=backend) for backend in ("triton", "reference"))
    assert ours.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    ("name", "forward", "backward"), [("fusion_layer", 1, 1), ("dilated_residual", 2, 3)]
)
def test_launches(name: str, forward: int, backward: int):
    """Those of backward are followed by one sum."""
    args = layer_arguments(name, 2, 64, 1, 64)
    with record_launches(Target("cuda", 90)) as recorded:
        operator(name).triton.forward(*args)
        assert len(recorded) == forward
        operator(name).triton_passes(args, torch.empty_like)
    assert len(recorded) == 2 * forward + backward


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("features", [12, 72])
def test_other_widths_go_to_plain_pytorch(name: str, features: int):
    args = layer_arguments(name, 1, 4, 1, features)
    assert operator(name).choose(args, None) == ("reference" if DEVICE == "cuda" else "analytic")
    with pytest.raises(BackendError, match=f"{features} features; the kernels need a multiple of 8 up to 64"):
        operator(name)(*args, backend="triton")


def attention_arguments(*size: int, dtype: torch.dtype = torch.float32, source: bool = True) -> list:
    """Without dropout, in the decoder or the encoder form."""
    args = layer_arguments("attention_layer", *size, dtype=dtype)
    args[2] = args[2] if source else None
    args[-2:] = 0.0, 0.0
    return args


def test_encoder_form_of_the_attention_layer():
    args = layer_arguments("attention_layer", 3, 45, 1, 24)
    args[2], args[15] = None, 3
    compare("attention_layer", args)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("triton", torch.float32)],
    ids=("reference", "triton"),
)
def test_gradients_through_the_normaliser(backend: str, dtype: torch.dtype):
    """Of values that do not change over time every average is the same: queries and keys have no say in it.

    What reaches them through the weighted sum is then what reaches them through the normaliser, with the other sign.
    """
    args = attention_arguments(2, 40, 1, 16, dtype=dtype)
    args[2] = args[2].detach()[..., :1].expand(-1, -1, 40).contiguous()
    out = operator("attention_layer")(*args, backend=backend)
    weights = torch.linspace(-1, 1, out.numel(), device=DEVICE, dtype=dtype).view(out.shape)
    of_values, *of_both = torch.autograd.grad(out, (args[7], args[5], args[6]), weights)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-6  # the 1e-6 beside the sum of keys
    assert of_values.norm() > 1
    assert all(gradient.norm() < tolerance * of_values.norm() for gradient in of_both)
    # Where values do change, they have.
    args = attention_arguments(2, 40, 1, 16, dtype=dtype)
    out = operator("attention_layer")(*args, backend=backend)
    assert all(gradient.norm() > 1 for gradient in torch.autograd.grad(out, (args[5], args[6]), weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_channels_without_variance_leave_padded_frames_harmless(dtype: torch.dtype):
    """Of one real frame the variance is 0: the norm multiplies what is on padded frames by 316."""
    args = attention_arguments(1, 32, 1, 16, dtype=dtype, source=False)
    args[1] = torch.arange(32, device=DEVICE).view(1, 1, -1) < 1
    args[0] = (args[0].detach() * args[1]).requires_grad_()
    args[3] = (100 * args[3].detach()).requires_grad_()
    for backend in ("triton", "reference"):
        out = operator("attention_layer")(*args, backend=backend)
        wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
        assert all(a.isfinite().all() for a in (out, *torch.autograd.grad(out.float().sum(), wanted)))


def test_parameters_and_inputs_of_other_dtypes():
    args = attention_arguments(2, 16, 1, 8)
    mixed = [a.detach().half() if i in (2, 7, 9) else a for i, a in enumerate(args)]
    got, expected = (operator("attention_layer")(*a, backend="triton") for a in (mixed, args))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
