"""The frame that every operator of this package shares.

An operator is one mathematical function with a plain reference, a count of its work and a ``torch.library`` op
of the same name (``torch.ops.trgnet.NAME``) with a fake implementation and autograd; one that works in place
has neither outputs nor autograd. Where it has Triton kernels, ``torch.ops.trgnet.NAME_triton`` launches them and
``NAME_triton_backward`` those of the gradient. Its file reads: formula and shapes, reference, FLOPs, passes in PyTorch with
the gradient written out where it has them, kernels, public function.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from .backend import BackendError, checked_backend, current_backend
from .launch import obstacle
from .precision import without_autocast

_OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Cost:
    """The least work an evaluation needs: bytes moved when each tensor is touched once, and FLOPs."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Fused:
    """An implementation of an operator by two passes of its own, of Triton kernels or of PyTorch operations.

    They are functions of tensors, called with autocast switched off. Those that launch kernels are annotated and run on
    fake tensors too (where they only allocate, see :func:`.launch.launchable`).
    """

    forward: Callable[..., Any]
    """With the signature of the reference; returns its outputs as a tuple, None in the place of an empty one, and behind
    them as many more as ``kept`` says."""
    backward: Callable[..., Any] | None = None
    """None where the operator works in place. Called with the gradients of the differentiable outputs, the arguments,
    the outputs that ``saved`` names, and a list that says of each of ``differentiable`` whether its gradient is needed.
    Returns a tuple of those gradients (see ``unpack``); None, or any tensor, in the place of one that is not needed."""
    differentiable: tuple[int, ...] = ()
    """Positions of the arguments that have gradients."""
    saved: tuple[int, ...] = ()
    """Positions of the outputs that ``backward`` takes."""
    kept: int = 0
    """How many outputs ``forward`` has more than the reference: for ``backward`` alone, the caller does not see them."""
    unpack: Callable[..., tuple[Tensor | None, ...]] = lambda computed, args: computed
    """Called with what ``backward`` returned and the arguments; returns the gradients in the order of
    ``differentiable``. Outputs of an op may not be views of each other: so one tensor of many gradients is split here."""
    narrowed: tuple[int, ...] = ()
    """Positions of the arguments that autocast converts to its dtype, as it does for a matrix product."""
    unsupported: Callable[..., str | None] = lambda *_: None
    """Called with the arguments; says why the passes cannot take them, None if they can."""


class Operator:
    """One function and its implementations.

    Args:
        reference: Plain PyTorch function; its annotations give the op's schema, its name (less a leading
            underscore and ``_reference``) the op's name. It returns a tensor or a tuple of tensors, runs on meta
            tensors, and draws no random numbers of its own (dropout takes a seed, see :mod:`.dropout`).
        flops: Called with the same arguments; returns (forward, backward) floating-point operations.
        triton: The implementation by kernels; None where there is none.
        analytic: That by PyTorch operations with the gradient written out; None where there is none.
        statistics: How many of the outputs, the last ones, are by-products without a gradient.
        mutates: Names of the arguments that are changed in place. Such an operator returns nothing and has no
            gradient.
    """

    def __init__(
        self,
        reference: Callable[..., Any],
        flops: Callable[..., tuple[int, int]],
        triton: Fused | None = None,
        statistics: int = 0,
        mutates: tuple[str, ...] = (),
        analytic: Fused | None = None,
    ) -> None:
        self.name = reference.__name__.removeprefix("_").removesuffix("_reference")
        self.reference = reference
        self.triton = triton
        self.analytic = analytic
        self.statistics = statistics
        self._flops = flops
        self._mutates = mutates
        if mutates:
            self.op = _register_in_place(self.name, reference, mutates)
            self.triton_op = (
                _register_in_place(f"{self.name}_triton", triton.forward, mutates) if triton else None
            )
        else:
            self.op = _register(self, statistics)
            self.triton_op = _register_triton(self.name, triton, statistics) if triton else None
        _OPERATORS[self.name] = self

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that this operator can be forced to."""
        own = {"analytic": self.analytic, "triton": self.triton}
        return ("reference", "recompute", *(name for name, passes in own.items() if passes))

    def choose(self, args: Sequence[Any], forced: str | None) -> str:
        """Return the backend that a call with these arguments runs on; raises BackendError."""
        choice = current_backend() if forced is None else checked_backend(forced, self.name)
        if choice == "auto":
            if self.triton and _on_gpu(args) and self._obstacle(args) is None:
                return "triton"
            return "analytic" if self.analytic and self._analytic_obstacle(args) is None else "reference"
        if choice not in self.backends:
            raise BackendError(
                f"{self.name}: backend {choice!r} is forced, but this operator has only "
                f"{', '.join(self.backends)}; choose one of them or 'auto' (argument backend=, use_backend() "
                "or TRGNET_BACKEND)"
            )
        obstacles = {"triton": self._obstacle, "analytic": self._analytic_obstacle}
        reason = obstacles.get(choice, lambda _: None)(args)
        if reason is not None:
            raise BackendError(f"{self.name}: backend {choice!r} is forced, but {reason}")
        return choice

    def _obstacle(self, args: Sequence[Any]) -> str | None:
        """Why the Triton kernels cannot run with these arguments; None if they can."""
        dtypes = {
            _dtype_of(a, narrow=i in self.triton.narrowed)
            for i, a in enumerate(args)
            if isinstance(a, Tensor) and a.is_floating_point()
        }
        return obstacle(_tensors(args), dtypes) or self.triton.unsupported(*args)

    def _analytic_obstacle(self, args: Sequence[Any]) -> str | None:
        """Why the passes in PyTorch cannot run with these arguments; None if they can."""
        return _analytic_obstacle(args) or self.analytic.unsupported(*args)

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        choice = self.choose(args, backend)
        if choice == "reference":
            return self.reference(*args)
        if choice == "analytic":
            return _Analytic.apply(self, *args)
        return self.op(*args) if choice == "recompute" else self._call_triton(*args)

    def _call_triton(self, *args: Any) -> Any:
        outputs = self.triton_op(*_narrowed(args, self.triton.narrowed))
        return None if self._mutates else _outputs(outputs, self.triton)

    def triton_passes(
        self, args: Sequence[Any], gradient: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Outputs and gradients of the Triton implementation, forward and backward, without torch.library and autograd.

        For checks of what it launches and needs. ``gradient`` makes the gradient of an output that has one.
        """
        if self._mutates:
            self.triton.forward(*args)
            return [], []
        outputs = list(self.triton.forward(*args))
        differentiable = outputs[: len(outputs) - self.statistics - self.triton.kept]
        gradients = [None if output is None else gradient(output) for output in differentiable]
        saved = [outputs[i] for i in self.triton.saved]
        needed = [isinstance(args[i], Tensor) for i in self.triton.differentiable]
        computed = self.triton.backward(*gradients, *args, *saved, needed)
        return outputs, list(self.triton.unpack(computed, args))

    def cost(self, *args: Any, backward: bool = False) -> Cost:
        """Return the least work for these arguments (tensors of any device, meta tensors included).

        Forward: every input read and every output written once. Backward: inputs and output gradients
        read, gradients of all floating-point inputs written. In place: what is changed is read and written.
        """
        inputs = _tensors(args)
        moved = _bytes(inputs)
        if self._mutates:
            named = dict(zip(inspect.signature(self.reference).parameters, args))
            moved += _bytes(_tensors([named[name] for name in self._mutates]))
        else:
            on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in args]
            moved += _bytes(_as_tuple(self.reference(*on_meta)))
        if backward:
            moved += _bytes([a for a in inputs if a.is_floating_point()])
        return Cost(moved, self._flops(*args)[int(backward)])


def operator(name: str) -> Operator:
    """Return the registered operator of this name; raises KeyError naming those that exist."""
    if name not in _OPERATORS:
        raise KeyError(f"no operator {name!r}; there are {', '.join(sorted(_OPERATORS))}")
    return _OPERATORS[name]


def operator_table() -> list[tuple[str, tuple[str, ...]]]:
    """Return (operator, backends it can run on) for every operator, by name."""
    return [(name, _OPERATORS[name].backends) for name in sorted(_OPERATORS)]


def check_shapes(operator_name: str, **tensors: tuple[Tensor | None, str]) -> dict[str, int]:
    """Check tensors against patterns such as ``"N F V T"`` that share their sizes, and return the sizes.

    A digit in a pattern stands for itself; a tensor that is None is skipped. Raises ValueError with the
    shape that was got and the one that was expected.
    """
    sizes: dict[str | int, int] = {}
    for name, (tensor, pattern) in tensors.items():
        if tensor is None:
            continue
        axes, shape = _axes(pattern), tensor.shape
        expected = [sizes.get(axis, axis) for axis in axes]  # names of axes that are yet unknown stay
        if len(axes) != len(shape) or any(
            want != got and type(want) is not str for want, got in zip(expected, shape)
        ):
            raise ValueError(
                f"{operator_name}: {name} has shape {tuple(shape)}, "
                f"expected ({', '.join(map(str, axes))}) = ({', '.join(map(str, expected))})"
            )
        sizes.update(zip(axes, shape))
    return sizes


def _axes(pattern: str) -> tuple[str | int, ...]:
    return tuple(int(axis) if axis.isdigit() else axis for axis in pattern.split())


def check_mask(operator_name: str, mask: Tensor) -> None:
    """Raise TypeError unless the mask is bool (a float mask would weight frames instead of selecting them)."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{operator_name}: mask has dtype {mask.dtype}, expected torch.bool (True on real frames)"
        )


def _register_in_place(name: str, function: Callable[..., None], mutates: tuple[str, ...]) -> Any:
    """Make ``torch.ops.trgnet.NAME`` that changes some of its arguments and returns nothing."""
    return torch.library.custom_op(f"trgnet::{name}", function, mutates_args=mutates)


def _register(operator: Operator, statistics: int) -> Any:
    """Make ``torch.ops.trgnet.NAME`` from the reference: opaque to autograd, recomputed in backward."""
    reference = operator.reference
    op = torch.library.custom_op(
        f"trgnet::{operator.name}",
        _without_aliases(reference),
        mutates_args=(),
        schema=torch.library.infer_schema(reference, mutates_args=()),
    )
    op.register_fake(reference)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*[a for a in inputs if isinstance(a, Tensor)])
        ctx.rest = [None if isinstance(a, Tensor) else (a,) for a in inputs]
        ctx.autocast = _autocast_state(inputs)
        if statistics:
            ctx.mark_non_differentiable(*output[-statistics:])

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if other is None else other[0] for other in ctx.rest]
        with ctx.autocast():
            return _recomputed_gradients(reference, args, ctx.needs_input_grad, grad_outputs)

    op.register_autograd(backward, setup_context=setup_context)
    return op


def _register_triton(name: str, fused: Fused, statistics: int) -> Any:
    """Make ``torch.ops.trgnet.NAME_triton`` and ``NAME_triton_backward`` from a fused implementation."""

    def custom_op(op_name: str, function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def launcher(*args: Any) -> Any:
            like = _tensors(args)[0]
            # Kernels read vectors by their index alone.
            args = [a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args]
            with without_autocast(like):
                return tuple(like.new_empty(0) if out is None else out for out in function(*args))

        schema = torch.library.infer_schema(function, mutates_args=())
        op = torch.library.custom_op(f"trgnet::{op_name}", launcher, mutates_args=(), schema=schema)
        op.register_fake(launcher)
        return op

    op = custom_op(f"{name}_triton", fused.forward)
    by_products = statistics + fused.kept
    backward_op = custom_op(f"{name}_triton_backward", fused.backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(
            *[a for a in inputs if isinstance(a, Tensor)], *[output[i] for i in fused.saved]
        )
        ctx.rest = [None if isinstance(a, Tensor) else (a,) for a in inputs]
        if by_products:
            ctx.mark_non_differentiable(*output[-by_products:])
            ctx._materialize_non_diff_grads = False  # or autograd writes zeros as large as they are

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        args = [next(tensors) if other is None else other[0] for other in ctx.rest]
        needed = [ctx.needs_input_grad[i] for i in fused.differentiable]
        differentiable = grad_outputs[: len(grad_outputs) - by_products]
        computed = fused.unpack(backward_op(*differentiable, *args, *tensors, needed), args)
        gradients: list[Tensor | None] = [None] * len(args)
        for i, gradient, need in zip(fused.differentiable, computed, needed, strict=True):
            gradients[i] = gradient if need else None
        return tuple(gradients)

    op.register_autograd(backward, setup_context=setup_context)
    return op


class _Analytic(torch.autograd.Function):
    """The two passes of an analytic implementation.

    No ``torch.library`` op, which is of use to compilers alone and takes longer to call: they get the reference. As inside
    of such an op, calls of torch do not go by way of autograd, which has nothing to record and takes a microsecond of each.
    """

    @staticmethod
    def forward(ctx: Any, operator: Operator, *args: Any) -> Any:
        fused, statistics = operator.analytic, operator.statistics
        ctx.name, ctx.fused = operator.name, fused
        with torch._C._AutoDispatchBelowAutograd():
            outputs = fused.forward(*args)
        ctx.tensors = [isinstance(a, Tensor) for a in args]
        ctx.rest = [a for a in args if not isinstance(a, Tensor)]
        ctx.save_for_backward(*[a for a in args if isinstance(a, Tensor)], *[outputs[i] for i in fused.saved])
        visible = _outputs(outputs, fused)
        if statistics:
            ctx.mark_non_differentiable(*visible[-statistics:])
        ctx.differentiable = len(outputs) - fused.kept - statistics
        return visible

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient would pass for one that depends on nothing
            raise RuntimeError(
                f"{ctx.name}: backend 'analytic' can be differentiated once only, got create_graph=True; choose backend "
                "'reference' (argument backend=, use_backend() or TRGNET_BACKEND)"
            )
        tensors, rest = iter(ctx.saved_tensors), iter(ctx.rest)
        args = [next(tensors) if is_tensor else next(rest) for is_tensor in ctx.tensors]
        needed = [ctx.needs_input_grad[1 + i] for i in ctx.fused.differentiable]
        with without_autocast(grad_outputs[0]), torch._C._AutoDispatchBelowAutograd():
            computed = ctx.fused.backward(*grad_outputs[: ctx.differentiable], *args, *tensors, needed)
        gradients: list[Tensor | None] = [None] * (1 + len(args))
        for i, gradient, need in zip(ctx.fused.differentiable, computed, needed, strict=True):
            gradients[1 + i] = gradient if need else None
        return tuple(gradients)


def _outputs(outputs: tuple[Tensor, ...], fused: Fused) -> Any:
    """What the caller sees of the outputs of ``fused``."""
    outputs = outputs[: len(outputs) - fused.kept]
    return outputs if len(outputs) > 1 else outputs[0]


def _analytic_obstacle(args: Sequence[Any]) -> str | None:
    """Why no passes in PyTorch can run with these arguments; None if they can."""
    if torch.compiler.is_compiling():
        return "the code is being compiled, which needs the reference"
    dtypes = set()
    for tensor in args:
        if not isinstance(tensor, Tensor):
            continue
        if not tensor.is_cpu or isinstance(tensor, FakeTensor):
            return f"it has a {type(tensor).__name__} on {tensor.device}; its passes in PyTorch are for CPUs"
        if tensor.is_floating_point():
            dtypes.add(tensor.dtype)
    if _autocast_dtype("cpu") is not None:
        return "autocast is on; it computes in the precision of its tensors"
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        return f"it has {', '.join(sorted(map(str, dtypes)))} tensors; it computes in float32 or float64, one of them"
    return None


def _on_gpu(args: Sequence[Any]) -> bool:
    first = next((a for a in args if isinstance(a, Tensor)), None)
    return (first is None or first.is_cuda) and all(tensor.is_cuda for tensor in _tensors(args))


def _narrowed(args: Sequence[Any], positions: Sequence[int]) -> list[Any]:
    """The arguments, those at ``positions`` in autocast's dtype where autocast is on for their device."""
    return [
        a.to(_dtype_of(a, narrow=True)) if i in positions and a is not None else a for i, a in enumerate(args)
    ]


def _dtype_of(tensor: Tensor, narrow: bool) -> torch.dtype:
    """The dtype that the kernels get a tensor in: autocast's where it narrows the tensor and is on, else its own."""
    return (_autocast_dtype(tensor.device.type) if narrow else None) or tensor.dtype


def _autocast_dtype(device: str) -> torch.dtype | None:
    """What the autocast region converts to; None outside of one."""
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _recomputed_gradients(
    reference: Callable[..., Any], args: Sequence[Any], needed: Sequence[bool], grad_outputs: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    with torch.enable_grad():
        leaves = [
            a.detach().requires_grad_(need) if isinstance(a, Tensor) else a for a, need in zip(args, needed)
        ]
        outputs = _as_tuple(reference(*leaves))
    pairs = [(out, grad) for out, grad in zip(outputs, grad_outputs) if out.requires_grad]
    wanted = [leaf for leaf, need in zip(leaves, needed) if need]
    gradients = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            wanted,
            [grad for _, grad in pairs],
            allow_unused=True,
            materialize_grads=True,
        )
    )
    return tuple(next(gradients) if need else None for need in needed)


def _autocast_state(inputs: Sequence[Any]) -> Callable[[], Any]:
    """Remember the autocast region of the forward pass: backward runs outside of it."""
    device = next(a.device.type for a in inputs if isinstance(a, Tensor))
    dtype = _autocast_dtype(device)
    return nullcontext if dtype is None else lambda: torch.autocast(device, dtype=dtype)


def _without_aliases(reference: Callable[..., Any]) -> Callable[..., Any]:
    """A custom op may not return its own input, which a reference may (dropout of probability 0)."""

    def fresh(*args: Any) -> Any:
        storages = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
        outputs = reference(*args)
        copied = tuple(
            o.clone() if o.untyped_storage().data_ptr() in storages else o for o in _as_tuple(outputs)
        )
        return copied if isinstance(outputs, tuple) else copied[0]

    return fresh


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """The tensors among the arguments, those in lists included."""
    return [leaf for leaf in tree_leaves(list(args)) if isinstance(leaf, Tensor)]


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
