"""What is compared: providers of one function, and the precisions that it runs in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .device import DEVICE, ON_GPU

PROVIDERS = ("published", "reference", "compiled", "recompute", "ours")
"""Of operators and networks, in the order of the tables; see :mod:`bench`."""

BACKENDS = {"published": "auto", "compiled": "reference", "ours": "auto"}
"""Of the providers that are not called as the backend that they run on."""

PRECISIONS = ("float32", "bfloat16") if ON_GPU else ("float32",)
"""float32 does without tf32; bfloat16 is autocast, of float32 parameters."""


AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions that autocast narrows float32 to."""


def precision_of(name: str) -> torch.autocast:
    """Operations in the block run in a precision; whether float32 is tf32 is :func:`allow_tf32`'s."""
    return torch.autocast(DEVICE.type, AUTOCAST.get(name, torch.bfloat16), enabled=name in AUTOCAST)


def allow_tf32(allowed: bool) -> None:
    """Whether products and convolutions of float32 may use tf32, in the whole process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed  # True by default, unlike that of products


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, for fixed shapes; dropout draws what it draws without."""
    import torch._inductor.config  # takes seconds

    torch._inductor.config.fallback_random = True
    torch._dynamo.config.recompile_limit = 64  # one code object serves every case here
    return torch.compile(function, dynamic=False)
