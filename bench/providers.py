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


def precision_of(name: str) -> torch.autocast:
    """Operations in the block run in one of PRECISIONS, or in "float64" if their tensors do."""
    return torch.autocast(DEVICE.type, torch.bfloat16, enabled=name == "bfloat16")


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function through torch.compile, for fixed shapes; dropout draws what it draws without."""
    import torch._inductor.config  # takes seconds

    torch._inductor.config.fallback_random = True
    torch._dynamo.config.recompile_limit = 64  # one code object serves every case here
    return torch.compile(function, dynamic=False)
