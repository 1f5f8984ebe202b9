"""The frame that every operator of this package shares.

An operator is one mathematical function with a plain reference, a count of its work and a ``torch.library`` op
of the same name (``torch.ops.trgnet.NAME``) with a fake implementation and autograd; one that works in place
has neither outputs nor autograd. Where it has Triton kernels, ``torch.ops.trgnet.NAME_triton`` launches them and
``NAME_triton_backward`` those of the gradient. Its file reads: formula and shapes, reference, FLOPs, passes in PyTorch with
the gradient written out where it has them, kernels, public function.

The ``torch.library`` ops are for compilers and whatever else looks at single operations. Ordinary calls go through a
``torch.autograd.Function`` that does the same and costs less host time (``python -m bench.host``).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import Parameter

from .backend import BackendError, checked_backend, current_backend
from .launch import obstacle
from .precision import autocast_dtype, without_autocast
from .verification import verified

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
    preferred: Callable[..., bool] = lambda *_: True
    """Called with the arguments; returns whether backend ``auto`` takes these passes where it can."""


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
            self.op = _register(self.name, reference, statistics)
            self.triton_op = _register_triton(self.name, triton, statistics) if triton else None
            self._functions = self._eager_functions()
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
            if _is_transformed():
                return "reference"
            if self._prefers_triton(args):
                return "triton"
            return "analytic" if self.analytic and self._analytic_obstacle(args) is None else "reference"
        if choice not in self.backends:
            raise BackendError(
                f"{self.name}: backend {choice!r} is forced, but this operator has only "
                f"{', '.join(self.backends)}; choose one of them or 'auto' (argument backend=, use_backend() "
                "or TRGNET_BACKEND)"
            )
        reason = self._forced_obstacle(choice, args)
        if reason is not None:
            raise BackendError(f"{self.name}: backend {choice!r} is forced, but {reason}")
        return choice

    def _prefers_triton(self, args: Sequence[Any]) -> bool:
        """Whether ``auto`` takes the Triton kernels."""
        able = self.triton and _on_gpu(args) and self.triton.preferred(*args)
        return bool(able) and self._obstacle(args, automatic=True) is None

    def _forced_obstacle(self, choice: str, args: Sequence[Any]) -> str | None:
        """Why a backend that the operator has cannot run with these arguments; None if it can."""
        if choice == "reference":
            return None
        if _is_transformed():
            return "the call is inside of a transform of torch.func, which needs the reference"
        obstacles = {"triton": self._obstacle, "analytic": self._analytic_obstacle}
        return obstacles[choice](args) if choice in obstacles else None

    def _obstacle(self, args: Sequence[Any], automatic: bool = False) -> str | None:
        """Why the Triton kernels cannot run, or may not if they are not forced, with these arguments; else None."""
        tensors = _tensors(args)
        narrow = autocast_dtype(tensors[0].device.type)
        dtypes = {
            narrow if narrow and i in self.triton.narrowed else a.dtype
            for i, a in enumerate(args)
            if isinstance(a, Tensor) and a.is_floating_point()
        }
        reason = obstacle(tensors, dtypes) or self.triton.unsupported(*args)
        if reason is None and automatic and not verified(self.name, dtypes, tensors[0]):
            return "they have not passed their check on this device"
        return reason

    def _analytic_obstacle(self, args: Sequence[Any]) -> str | None:
        """Why the passes in PyTorch cannot run with these arguments; None if they can."""
        return _analytic_obstacle(args) or self.analytic.unsupported(*args)

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        choice = self.choose(args, backend)
        if choice == "reference":
            return self.reference(*args)
        if choice == "triton":
            args = _autocast(args, self.triton.narrowed)
        if choice == "analytic" or (not self._mutates and _is_eager(args)):
            return self._functions[choice].apply(*args)
        if choice == "recompute":
            return self.op(*args)
        outputs = self.triton_op(*args)
        return None if self._mutates else _visible(outputs, self.triton.kept)

    def _eager_functions(self) -> dict[str, type[torch.autograd.Function]]:
        """Make an autograd.Function of every implementation but the reference."""
        statistics = self.statistics
        recompute = _recomputation(self.reference)
        functions = {
            "recompute": _function(self.name, "recompute", _fresh(self.reference), recompute, 0, statistics)
        }
        for backend, passes, wrap in (
            ("analytic", self.analytic, _plain),
            ("triton", self.triton, _launcher),
        ):
            if passes:
                backward = wrap(passes.backward)
                gradient = _written_out(passes, statistics, backward, torch._C._AutoDispatchBelowAutograd)
                functions[backend] = _function(
                    self.name, backend, wrap(passes.forward), gradient, passes.kept, statistics
                )
        return functions

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
    sizes: dict[str, int] = {}
    for name, (tensor, pattern) in tensors.items():
        if tensor is None:
            continue
        axes, shape = pattern.split(), tensor.shape
        fits = len(axes) == len(shape)
        for axis, size in zip(axes, shape):
            fits = fits and size == sizes.setdefault(axis, int(axis) if axis.isdigit() else size)
        if not fits:
            before = dict(itertools.islice(tensors.items(), list(tensors).index(name)))
            known = check_shapes(operator_name, **before)  # of unknown axes the names are shown
            expected = (axis if axis.isdigit() else str(known.get(axis, axis)) for axis in axes)
            raise ValueError(
                f"{operator_name}: {name} has shape {tuple(shape)}, expected ({', '.join(axes)}) = "
                f"({', '.join(expected)})"
            )
    return sizes


def check_mask(operator_name: str, mask: Tensor) -> None:
    """Raise TypeError unless the mask is bool (a float mask would weight frames instead of selecting them)."""
    if mask.dtype != torch.bool:
        raise TypeError(
            f"{operator_name}: mask has dtype {mask.dtype}, expected torch.bool (True on real frames)"
        )


def _register_in_place(name: str, function: Callable[..., None], mutates: tuple[str, ...]) -> Any:
    """Make ``torch.ops.trgnet.NAME`` that changes some of its arguments and returns nothing."""
    return torch.library.custom_op(f"trgnet::{name}", function, mutates_args=mutates)


def _register(name: str, reference: Callable[..., Any], statistics: int) -> Any:
    """Make ``torch.ops.trgnet.NAME`` from the reference: opaque to autograd, recomputed in backward."""
    schema = torch.library.infer_schema(reference, mutates_args=())
    op = torch.library.custom_op(f"trgnet::{name}", _fresh(reference), mutates_args=(), schema=schema)
    op.register_fake(reference)
    _register_autograd(op, _recomputation(reference), statistics)
    return op


def _register_triton(name: str, fused: Fused, statistics: int) -> Any:
    """Make ``torch.ops.trgnet.NAME_triton`` and ``NAME_triton_backward`` from a fused implementation."""

    def custom_op(op_name: str, function: Callable[..., Any]) -> Any:
        schema = torch.library.infer_schema(function, mutates_args=())
        op = torch.library.custom_op(
            f"trgnet::{op_name}", _launcher(function), mutates_args=(), schema=schema
        )
        op.register_fake(_launcher(function))
        return op

    op = custom_op(f"{name}_triton", fused.forward)
    backward_op = custom_op(f"{name}_triton_backward", fused.backward)
    by_products = statistics + fused.kept
    _register_autograd(op, _written_out(fused, by_products, backward_op), by_products)
    return op


def _register_autograd(op: Any, gradient: _Gradient, by_products: int) -> None:
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        outputs = _as_tuple(output)
        gradient.save(ctx, inputs, outputs)
        _mark(ctx, outputs, by_products)

    op.register_autograd(gradient.backward, setup_context=setup_context)


def _launcher(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that launches kernels: contiguous vectors in, tensors out, autocast off."""

    @functools.wraps(function)
    def launcher(*args: Any) -> tuple[Tensor, ...]:
        like = _first(args)
        # Kernels read vectors by their index alone.
        args = [a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in args]
        with without_autocast(like):
            return tuple([like.new_empty(0) if out is None else out for out in function(*args)])

    return launcher


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of PyTorch operations: autocast off."""

    def call(*args: Any) -> Any:
        with without_autocast(_first(args)):
            return function(*args)

    return call


@dataclass(frozen=True)
class _Gradient:
    """How autograd differentiates an implementation, in an op and in a plain function alike."""

    save: Callable[[Any, Sequence[Any], Sequence[Tensor]], None]
    """Called with autograd's context, the arguments and all outputs."""
    backward: Callable[..., tuple[Tensor | None, ...]]
    """Called with the context and the gradients of the outputs."""


def _recomputation(reference: Callable[..., Any]) -> _Gradient:
    """The gradient by evaluating the reference again, which autograd differentiates then."""

    def save(ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        _save(ctx, args)
        ctx.autocast = _autocast_state(args)

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        args, _ = _saved(ctx)
        with ctx.autocast():
            return _recomputed_gradients(reference, args, ctx.needs_input_grad, grad_outputs)

    return _Gradient(save, backward)


def _written_out(
    fused: Fused, by_products: int, call: Callable[..., Any], guard: Callable[[], Any] = nullcontext
) -> _Gradient:
    """The gradient that ``fused.backward`` computes; ``call`` is that function, or an op that calls it.

    ``by_products`` says how many of the outputs that autograd knows, the last ones, have no gradient. Saved tensors are
    asked for outside of ``guard``: for checkpointing that evaluates the forward pass again.
    """

    def save(ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor]) -> None:
        _save(ctx, args, [outputs[i] for i in fused.saved])

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        args, saved = _saved(ctx)
        needed = [ctx.needs_input_grad[i] for i in fused.differentiable]
        differentiable = grad_outputs[: len(grad_outputs) - by_products]
        with guard():
            computed = fused.unpack(call(*differentiable, *args, *saved, needed), args)
        gradients: list[Tensor | None] = [None] * len(args)
        for i, gradient, need in zip(fused.differentiable, computed, needed, strict=True):
            gradients[i] = gradient if need else None
        return tuple(gradients)

    return _Gradient(save, backward)


def _save(ctx: Any, args: Sequence[Any], outputs: Sequence[Tensor] = ()) -> None:
    ctx.save_for_backward(*[a for a in args if isinstance(a, Tensor)], *outputs)
    ctx.rest = [None if isinstance(a, Tensor) else (a,) for a in args]


def _saved(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    """The arguments and the outputs that :func:`_save` was called with."""
    tensors = iter(ctx.saved_tensors)
    args = [next(tensors) if other is None else other[0] for other in ctx.rest]
    return args, list(tensors)


def _mark(ctx: Any, outputs: Sequence[Tensor], by_products: int) -> None:
    """Tell autograd that the last outputs have no gradient."""
    if by_products:
        ctx.mark_non_differentiable(*outputs[-by_products:])
        ctx._materialize_non_diff_grads = False  # or autograd writes zeros as large as they are


def _function(
    name: str, backend: str, call: Callable[..., Any], gradient: _Gradient, kept: int, statistics: int
) -> type[torch.autograd.Function]:
    """Make an autograd.Function of an implementation, for calls that :func:`_is_eager` is true of.

    As inside of a ``torch.library`` op, calls of torch do not go by way of autograd, which has nothing to record and
    takes a microsecond of each. ``call`` returns ``kept`` outputs more than the caller sees.
    """

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            outputs = _as_tuple(call(*args))
        gradient.save(ctx, args, outputs)
        _mark(ctx, outputs[: len(outputs) - kept], statistics)
        return _visible(outputs, kept)

    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # the gradient would pass for one that depends on nothing
            raise RuntimeError(
                f"{name}: backend {backend!r} can be differentiated once only, got create_graph=True; choose backend "
                "'reference' (argument backend=, use_backend() or TRGNET_BACKEND)"
            )
        return gradient.backward(ctx, *grad_outputs)

    passes = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{name}_{backend}", (torch.autograd.Function,), passes)


def _is_eager(args: Sequence[Any]) -> bool:
    """Whether nothing but autograd has to know of a call: no compiler, tracer, mode or subclass of tensors."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
        and all(type(a) in (Tensor, Parameter) for a in args if isinstance(a, Tensor))
    )


def _is_transformed() -> bool:
    """Whether the call is inside of a transform of torch.func; compilers unfold those."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _visible(outputs: tuple[Tensor, ...], kept: int) -> Any:
    """What the caller sees of the outputs of an implementation."""
    outputs = outputs[: len(outputs) - kept]
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
    if autocast_dtype("cpu") is not None:
        return "autocast is on; it computes in the precision of its tensors"
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        return f"it has {', '.join(sorted(map(str, dtypes)))} tensors; it computes in float32 or float64, one of them"
    return None


def _on_gpu(args: Sequence[Any]) -> bool:
    return _first(args).is_cuda


def _first(args: Sequence[Any]) -> Tensor:
    return args[0] if isinstance(args[0], Tensor) else _tensors(args)[0]


def _autocast(args: Sequence[Any], positions: Sequence[int]) -> Sequence[Any]:
    """The arguments, those at ``positions`` in autocast's dtype where autocast is on for their device."""
    dtype = autocast_dtype(_first(args).device.type)
    if dtype is None:
        return args
    return [a.to(dtype) if i in positions and a is not None else a for i, a in enumerate(args)]


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
    dtype = autocast_dtype(device)
    return nullcontext if dtype is None else lambda: torch.autocast(device, dtype=dtype)


def _fresh(reference: Callable[..., Any]) -> Callable[..., Any]:
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
    found: list[Tensor] = []
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            found += _tensors(a)
    return found


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
