"""How Triton kernels are declared, configured and launched.

A kernel is decorated with :func:`kernel` and started by :func:`launch`, nothing else: so a table of compiled code, a
count of compilations and a run under Triton's interpreter need no knowledge of single kernels.

Conventions of every kernel:

- Names ending in ``_ptr`` are pointers, ``tl.constexpr`` parameters are configuration, the rest are sizes and strides.
  Sizes are not specialised: a new length compiles nothing.
- The length comes divided by ``UNIT``, 16 where it divides by it and 1 elsewhere (:func:`unit`). The product
  ``T * UNIT`` tells the compiler that rows are aligned, and with that to use 16-byte accesses.
- What a program adds to a base pointer is computed in 64 bits, offsets within its tile in 32 (``TILE_LIMIT``).
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # Triton is not made for every platform; the reference runs there
    triton = tl = None

ALIGNMENT = 16
"""Elements by which lengths divide in aligned kernels; also the bytes of the widest access."""

TILE_LIMIT = 2**31
"""Offsets within a tile are 32-bit."""

_SHARED_MEMORY = {
    80: 166_912,
    86: 101_376,
    89: 101_376,
    90: 232_448,
    100: 232_448,
    103: 232_448,
    120: 101_376,
}
"""Bytes that one block may use, by compute capability (CUDA C++ programming guide)."""


@dataclass(frozen=True)
class Target:
    """What code is compiled for: backend ``cuda``, ``hip`` or ``interpreter``; architecture such as 90 or gfx942."""

    backend: str
    arch: int | str = 0

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that one block may use; unknown devices are taken for small ones."""
        if self.backend == "interpreter":
            return _SHARED_MEMORY[90]
        return 65_536 if self.backend == "hip" else _SHARED_MEMORY.get(self.arch, 101_376)


@dataclass(frozen=True)
class Span:
    """Memory of a tensor argument: ``length`` elements from its first to its last."""

    dtype: torch.dtype
    length: int


@dataclass(frozen=True)
class Launch:
    """One recorded start of a kernel."""

    kernel: Any
    types: tuple[tuple[str, str], ...]
    """(parameter, Triton type), ``*`` before a pointer's."""
    aligned: frozenset[str]
    """Pointers that are known to be multiples of 16 bytes."""
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    grid: tuple[int, ...] = ()
    arguments: tuple[tuple[str, Any], ...] = ()
    """(parameter, number, or :class:`Span` of a tensor); absent ones are left out."""

    @property
    def name(self) -> str:
        """The kernel's name as tables have it."""
        return self.kernel.__name__.strip("_").removesuffix("_kernel")

    @property
    def compilation(self) -> tuple[Any, ...]:
        """What makes Triton compile anew when it changes."""
        return self.kernel, self.types, self.aligned, self.constants, self.num_warps, self.num_stages


def kernel(function: Callable[..., None]) -> Any:
    """Declare a Triton kernel, see the conventions above."""
    if triton is None:
        return function
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    kinds = function.__annotations__
    sizes = [name for name in names if name not in kinds and not name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=sizes)


def device_function(function: Callable[..., Any]) -> Any:
    """Declare a function that kernels call."""
    return function if triton is None else triton.jit(function)


def constant(value: int | float) -> Any:
    """Declare a number of a module that its kernels use."""
    return value if triton is None else tl.constexpr(value)


def interpreted() -> bool:
    """Whether kernels run under Triton's interpreter, on CPU tensors (TRITON_INTERPRET=1 at import)."""
    return _INTERPRETED


# Triton reads the variable when a kernel is declared, which is when this package is imported.
_INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in (
    "1",
    "true",
    "on",
    "y",
    "yes",
)

_recorded: list[Launch] | None = None
_forced_target: Target | None = None


@contextmanager
def record_launches(target: Target | None = None) -> Iterator[list[Launch]]:
    """Within the block kernels are recorded instead of started, as for ``target``; tensors may be on meta."""
    global _recorded, _forced_target
    before = _recorded, _forced_target
    _recorded, _forced_target = [], target or _forced_target
    try:
        yield _recorded
    finally:
        _recorded, _forced_target = before


def target_of(tensor: Tensor) -> Target:
    """The target that kernels on this tensor are compiled for."""
    if _forced_target is not None:
        return _forced_target
    if not tensor.is_cuda:
        return Target("interpreter")
    return _device_target(tensor.device.index or 0)


@functools.lru_cache
def _device_target(index: int) -> Target:
    if torch.version.hip:
        return Target("hip", torch.cuda.get_device_properties(index).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(index)
    return Target("cuda", 10 * major + minor)


def launchable(tensor: Tensor) -> bool:
    """Whether kernels on this tensor can start (or be recorded): not where only shapes are asked for."""
    if isinstance(tensor, FakeTensor):
        return False
    return _recorded is not None or tensor.device.type != "meta"


def obstacle(tensors: Sequence[Tensor], dtypes: set[torch.dtype]) -> str | None:
    """Why Triton cannot run on these tensors, whatever the operator; None if it can.

    ``dtypes`` are the floating-point ones that the kernels get them in.
    """
    if triton is None:
        return "Triton is not installed"
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        return f"its tensors are on {', '.join(sorted(map(str, devices)))}; move them to one device"
    (device,) = devices
    if device.type == "meta" or (device.type == "cpu" and interpreted()):
        interpreter = interpreted()
    elif device.type == "cuda":
        if interpreted():
            return "TRITON_INTERPRET is set: Triton's interpreter runs on CPU tensors"
        target = target_of(tensors[0])
        if target.backend == "cuda" and target.arch < 80:
            return f"its GPU has compute capability {target.arch / 10}; the kernels need 8.0 or later"
        interpreter = False
    else:
        return f"its tensors are on {device}; Triton needs a GPU, or TRITON_INTERPRET=1 to try it on the CPU"
    unknown = dtypes - {torch.float32, torch.float16, torch.bfloat16}
    if unknown:
        return f"it has {', '.join(sorted(map(str, unknown)))} tensors; Triton computes in float32, float16 and bfloat16"
    if interpreter:
        return known_miscompile("interpreted bfloat16 dot") if torch.bfloat16 in dtypes else None
    return known_miscompile("compiled reduction")


@dataclass(frozen=True)
class Miscompile:
    """A construct that a range of Triton versions computes wrongly."""

    construct: str
    versions: tuple[str, str]
    """First version that has the fault, first that has not."""
    what: str


MISCOMPILES = (
    Miscompile(
        "interpreted bfloat16 dot", ("3.0", "99"),
        "Triton's interpreter computes products of bfloat16 matrices wrongly; use float32 or float16, or a GPU",
    ),
    # Triton issue 11186. Consulted for every operator: only the optimizer's kernel does without reductions.
    Miscompile(
        "compiled reduction", ("3.8.0", "3.9.0"),
        "Triton 3.8 compiles reductions wrongly; install triton 3.7.1 (pip install triton==3.7.1)",
    ),
)  # fmt: skip


def known_miscompile(construct: str) -> str | None:
    """Return what goes wrong with ``construct`` in the installed Triton; None where nothing is known to."""
    for fault in MISCOMPILES:
        if fault.construct == construct:
            first, fixed = map(_version, fault.versions)
            if first <= _version(triton.__version__) < fixed:
                return fault.what
    return None


def _version(text: str) -> tuple[int, ...]:
    """Numbers of a version; what follows them (``+git``, ``rc1``) is left out."""
    return tuple(map(int, re.match(r"[\d.]*\d", text).group().split(".")))


def dot_precision(tensor: Tensor) -> str:
    """``input_precision`` of products of tensors like this one.

    float32 goes through tf32 only where torch.get_float32_matmul_precision() allows it; elsewhere through three tf32
    products, which keep float32's accuracy, on NVIDIA's matrix units, and exactly where there are float32 ones.
    """
    if tensor.dtype != torch.float32 or target_of(tensor).backend != "cuda":
        return "ieee"
    return "tf32x3" if exact_float32() else "tf32"


def exact_float32() -> bool:
    """Whether products of float32 matrices must keep float32's accuracy."""
    # The newer setting: where it was used, asking for the older one is an error.
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    if setting in ("tf32", "ieee"):
        return setting == "ieee"
    return torch.get_float32_matmul_precision() == "highest"


def unit(length: int) -> int:
    """The UNIT that a length is given in: 16 where it divides by it, else 1."""
    return ALIGNMENT if length % ALIGNMENT == 0 else 1


def rows(tensor: Tensor) -> Tensor:
    """``tensor`` itself where it is contiguous and aligned, else a copy that is."""
    tensor = tensor.contiguous()
    return tensor if _aligned(tensor) else tensor.clone()


def planes(tensor: Tensor) -> Tensor:
    """``tensor`` (N, F, T) itself where every sequence is contiguous and aligned, wherever the next one is, else a copy."""
    _, _, t = tensor.shape
    fits = tensor.stride()[1:] == (t, 1) and tensor.stride(0) % unit(t) == 0 and _aligned(tensor)
    return tensor if fits else rows(tensor)


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``size`` and ``least``."""
    return max(least, 1 << (size - 1).bit_length())


def cdiv(size: int, tile: int) -> int:
    """Number of tiles that cover ``size``."""
    return (size + tile - 1) // tile


def launch(
    function: Any,
    grid: tuple[int, ...],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: Any,
) -> None:
    """Start a kernel on the device of its tensors, or record it (:func:`record_launches`).

    ``args`` are its pointers, sizes and strides in order, ``constants`` its compile-time parameters.
    """
    if _recorded is not None:
        _recorded.append(_describe(function, grid, args, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    # Triton 3.10 stops fusing multiplications and additions by default, which costs speed: said explicitly.
    options = {} if interpreted() else {"enable_fp_fusion": True}
    with torch.cuda.device(device) if device.type == "cuda" else _silent_numpy():
        function[grid](*args, num_warps=num_warps, num_stages=num_stages, **constants, **options)


@contextmanager
def _silent_numpy() -> Iterator[None]:
    """Without the interpreter's warnings: lanes that are masked out may compute anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _describe(
    function: Any,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    num_warps: int,
    num_stages: int,
) -> Launch:
    names = [name for name in function.arg_names if name not in constants]
    named = dict(zip(names, args, strict=True))
    # An absent tensor is a compile-time None.
    absent = tuple((name, None) for name, value in named.items() if value is None)
    present = {name: value for name, value in named.items() if value is not None}
    return Launch(
        function,
        tuple((name, _triton_type(value)) for name, value in present.items()),
        frozenset(name for name, value in present.items() if isinstance(value, Tensor) and _aligned(value)),
        tuple(sorted(constants.items())) + absent,
        num_warps,
        num_stages,
        tuple(grid),
        tuple(
            (name, _span(value) if isinstance(value, Tensor) else value) for name, value in present.items()
        ),
    )


def _span(tensor: Tensor) -> Span:
    """The memory between the first and the last element, which strides may leave gaps in."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return Span(tensor.dtype, last + 1 if tensor.numel() else 0)


_TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.bool: "i1", torch.int64: "i64",
    torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


def _triton_type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _aligned(tensor: Tensor) -> bool:
    return tensor.device.type == "meta" or tensor.data_ptr() % ALIGNMENT == 0
