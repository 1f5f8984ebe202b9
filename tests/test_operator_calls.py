"""An ordinary call of an operator is that of its torch.library op, which compilers and modes still see."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from operators import arguments, as_tuple, converted, gradients
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from trgnet.kernels import BackendError, operator, operator_table, use_backend
from trgnet.kernels.launch import Target, record_launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The optimizer's operator works in place and is called through its op alone.
OPERATORS = [(name, backends) for name, backends in operator_table() if name != "moment_update"]
BACKENDS = [(name, b) for name, backends in OPERATORS for b in backends if b in ("recompute", "triton")]
TRITON = [name for name, backend in BACKENDS if backend == "triton"]
HOOKED = [
    (name, b) for name, b in BACKENDS if name in ("class_loss", "dilated_residual", "pairwise_distance")
]
"""One that keeps more than its outputs, one that keeps its inputs alone, one that keeps an output; all of them quick."""
ONCE = [(name, b) for name, backends in OPERATORS for b in backends if b != "reference"]
SMALL = (1, 9, 3, 8)

needs_triton = pytest.mark.skipif(not TRITON, reason="needs Triton")


def case(name: str) -> tuple:
    return converted(arguments(name, *SMALL), torch.float32, DEVICE)


def call(name: str, args: tuple, backend: str) -> tuple[Tensor, ...]:
    return as_tuple(operator(name)(*args, backend=backend))


@contextmanager
def through_the_op() -> Iterator[None]:
    """Calls go through torch.library within the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["trgnet.kernels.operator"], "_is_eager", lambda args: False)
        yield


@contextmanager
def counted_ops(name: str) -> Iterator[Counter[str]]:
    """Counts the calls of the operator's ops."""
    op, calls = operator(name), Counter()

    def counting(attribute: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            calls[attribute] += 1
            return original(*args)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for attribute in ("op", "triton_op"):
            patch.setattr(op, attribute, counting(attribute, getattr(op, attribute)))
        yield calls


def assert_same(got: Any, expected: Any) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype and ours.requires_grad == theirs.requires_grad
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_results_are_those_of_the_op_bit_for_bit(name: str, backend: str):
    args = tuple(
        a.detach()
        .repeat_interleave(2)[::2]
        .requires_grad_(a.requires_grad)  # vectors that are not contiguous
        if isinstance(a, Tensor) and a.dim() == 1
        else a
        for a in case(name)
    )
    with counted_ops(name) as calls:
        got = call(name, args, backend)
        assert not calls
        with through_the_op():
            expected = call(name, args, backend)
        assert calls.total() == 1
    assert_same(got, expected)
    assert_same(gradients(got, args), gradients(expected, args))


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_gradients_that_nobody_needs_are_none(name: str, backend: str):
    args = case(name)
    wanted = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad]
    for position in (wanted[0], wanted[-1]):
        only = tuple(a.detach() if isinstance(a, Tensor) and i != position else a for i, a in enumerate(args))
        outputs = call(name, only, backend)
        with through_the_op():
            expected = call(name, only, backend)
        assert_same(gradients(outputs, only), gradients(expected, only))
    none = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    assert not any(output.requires_grad for output in call(name, none, backend))


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_calls_that_record_nothing(name: str, backend: str, mode: type):
    args = case(name)
    expected = [out.detach() for out in call(name, args, backend)]
    with mode():
        got = call(name, args, backend)
    assert_same(got, expected)
    assert all(out.is_inference() == (mode is torch.inference_mode) for out in got)


@pytest.mark.parametrize(("name", "backend"), BACKENDS)
def test_autocast(name: str, backend: str):
    args = case(name)
    with torch.autocast(DEVICE, dtype=torch.float16):
        got = call(name, args, backend)
        with through_the_op():
            expected = call(name, args, backend)
        within = gradients(got, args, retain_graph=True)
    assert_same(got, expected)
    outside = gradients(got, args)
    assert_same(outside, gradients(expected, args))
    assert_same(outside, within)


@pytest.mark.parametrize(("name", "backend"), ONCE)
def test_second_derivatives_are_refused(name: str, backend: str):
    dtype = torch.float32 if backend == "triton" else torch.float64
    args = converted(arguments(name, *SMALL), dtype, DEVICE if backend != "analytic" else "cpu")
    wanted = next(a for a in args if isinstance(a, Tensor) and a.requires_grad)
    with pytest.raises(RuntimeError, match=f"{name}: backend '{backend}' can be differentiated once only"):
        torch.autograd.grad(call(name, args, backend)[0].sum(), wanted, create_graph=True)


# ---------------------------------------------------------------- hooks and wrappers


@pytest.mark.parametrize(("name", "backend"), HOOKED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(name: str, backend: str, reentrant: bool):
    args = case(name)
    expected = gradients(call(name, args, backend), args)
    outputs = checkpoint(lambda *a: call(name, a, backend), *args, use_reentrant=reentrant)
    if reentrant:  # it goes with backward() alone
        generator = torch.Generator().manual_seed(1)
        projected = [o for o in outputs if o.requires_grad]
        weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in projected]
        torch.autograd.backward(projected, weights)
        got = [a.grad for a in args if isinstance(a, Tensor) and a.requires_grad]
        got = [torch.zeros_like(e) if g is None else g for g, e in zip(got, expected, strict=True)]
    else:
        got = gradients(outputs, args)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("name", "backend"), HOOKED)
def test_saved_tensors_may_be_moved_elsewhere(name: str, backend: str):
    args = case(name)
    expected = gradients(call(name, args, backend), args)
    with torch.autograd.graph.save_on_cpu():
        outputs = call(name, args, backend)
    assert_same(gradients(outputs, args), expected)


def test_an_argument_that_was_changed_is_noticed():
    args = case("fusion_layer")
    outputs = call("fusion_layer", args, "recompute")
    with torch.no_grad():
        args[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(outputs, args)


@pytest.mark.parametrize("backend", ["recompute", pytest.param("triton", marks=needs_triton)])
def test_data_parallel(tmp_path: Path, backend: str):
    x, mask, *weights, seed, dilation, p = case("dilated_residual")

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([torch.nn.Parameter(w.detach().clone()) for w in weights])

        def forward(self, x: Tensor) -> Tensor:
            return operator("dilated_residual")(x, mask, *self.weights, seed, dilation, p, backend=backend)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain, parallel = Layer(), Layer()
        for layer in (plain, DistributedDataParallel(parallel)):
            layer(x.detach()).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert_same([p.grad for p in parallel.parameters()], [p.grad for p in plain.parameters()])


@pytest.mark.parametrize("name", TRITON)
def test_kernels_do_not_depend_on_the_default_device(name: str):
    args = case(name)
    with torch.device("meta"):
        got = call(name, args, "triton")
        got_gradients = gradients_without_factories(got, args)
    expected = call(name, args, "triton")
    assert_same(got, expected)
    assert_same(got_gradients, gradients_without_factories(expected, args))


def gradients_without_factories(outputs: tuple[Tensor, ...], args: tuple) -> list[Tensor]:
    projected = [out for out in outputs if out.requires_grad]
    wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
    return list(torch.autograd.grad(projected, wanted, [out.detach() for out in projected]))


# ---------------------------------------------------------------- who sees the op


class Names(TorchDispatchMode):
    """Records the names of what it is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def seen_by_a_mode(function: Callable, x: Tensor) -> list[str]:
    with Names() as names:
        function(x)
    return names.seen


def seen_by_fake_tensors(function: Callable, x: Tensor) -> list[str]:
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, Names() as names:
        result = function(fake.from_tensor(x))
    assert result.shape == x.shape
    return names.seen


def seen_by_make_fx(function: Callable, x: Tensor) -> list[str]:
    return [str(node.target) for node in make_fx(function)(x).graph.nodes]


def seen_by_jit(function: Callable, x: Tensor) -> list[str]:
    with pytest.warns(DeprecationWarning):
        graph = torch.jit.trace(function, x, check_trace=False).graph
    return [node.kind().replace("::", ".") + ".default" for node in graph.nodes()]


def seen_by_a_compiler(function: Callable, x: Tensor) -> list[str]:
    seen: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend=compiler)(x)
    return seen


def seen_by_export(function: Callable, x: Tensor) -> list[str]:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    with torch.no_grad():
        return [str(node.target) for node in torch.export.export(Module(), (x,)).graph.nodes]


LOOKS = (seen_by_a_mode, seen_by_fake_tensors, seen_by_make_fx, seen_by_a_compiler, seen_by_export)


@pytest.mark.parametrize(
    ("look", "backend"),
    [
        *((look, "recompute") for look in (*LOOKS, seen_by_jit)),
        # torch.jit takes no op that returns a tuple of one tensor.
        *(pytest.param(look, "triton", marks=needs_triton) for look in LOOKS),
    ],
)
def test_what_looks_at_operations_sees_the_op(look: Callable, backend: str):
    x, *rest = (a.detach() if isinstance(a, Tensor) else a for a in case("dilated_residual"))
    seen = look(lambda x: operator("dilated_residual")(x, *rest, backend=backend), x)
    name = "trgnet.dilated_residual" + ("_triton" if backend == "triton" else "") + ".default"
    assert seen.count(name) == 1, seen


class Subclass(Tensor):
    """A tensor that wants to be told of what is done with it."""


@pytest.mark.parametrize("backend", ["recompute", pytest.param("triton", marks=needs_triton)])
def test_subclasses_of_tensors_see_the_op(backend: str):
    x, *rest = case("dilated_residual")
    with counted_ops("dilated_residual") as calls:
        out = operator("dilated_residual")(x.as_subclass(Subclass), *rest, backend=backend)
    assert calls.total() == 1 and isinstance(out, Subclass)


@pytest.mark.parametrize(("name", "backend"), ONCE)
def test_transforms_of_functions_take_the_reference(name: str, backend: str):
    dtype = torch.float32 if backend == "triton" else torch.float64
    args = list(converted(arguments(name, *SMALL), dtype, DEVICE if backend == "triton" else "cpu"))
    position = next(i for i, a in enumerate(args) if isinstance(a, Tensor) and a.requires_grad)

    def loss(x: Tensor, choice: str | None) -> Tensor:
        outputs = as_tuple(operator(name)(*args[:position], x, *args[position + 1 :], backend=choice))
        return outputs[0].sum()

    (expected,) = torch.autograd.grad(loss(args[position], "reference"), args[position])
    torch.testing.assert_close(torch.func.grad(loss)(args[position].detach(), None), expected)
    with pytest.raises(BackendError, match="inside of a transform of torch.func, which needs the reference"):
        torch.func.grad(loss)(args[position].detach(), backend)


# ---------------------------------------------------------------- launches


@pytest.mark.parametrize("name", TRITON)
def test_ordinary_calls_launch_what_the_op_launches(name: str):
    args = converted(arguments(name, *SMALL), torch.float32, "meta")

    def launches() -> list[str]:
        with record_launches(Target("cuda", 90)) as recorded, use_backend("triton"):
            outputs = [out for out in as_tuple(operator(name)(*args)) if out.requires_grad]
            wanted = [a for a in args if isinstance(a, Tensor) and a.requires_grad]
            torch.autograd.grad(outputs, wanted, [torch.empty_like(out) for out in outputs])
        return [launch.kernel.__name__ for launch in recorded]

    with through_the_op():
        expected = launches()
    assert len(expected) >= 2 and launches() == expected


# ---------------------------------------------------------------- compilers of older releases


@pytest.mark.parametrize("name", [name for name, _ in OPERATORS])
def test_compiling_never_asks_what_torch_2_11_cannot_trace(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its dynamo knows whether autocast is on and what it converts to, and not whether a device has it."""

    def untraceable(device: str) -> bool:
        raise AssertionError("torch.amp.is_autocast_available is traced")

    monkeypatch.setattr(torch.amp, "is_autocast_available", untraceable)
    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", untraceable)
    args = arguments(name, *SMALL)
    torch._dynamo.reset()
    compiled = torch.compile(operator(name), fullgraph=True, backend="eager")
    got, expected = as_tuple(compiled(*args)), as_tuple(operator(name)(*args, backend="reference"))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
