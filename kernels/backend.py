"""Which implementation of an operator runs.

Every operator has up to four implementations of one function:

``reference``
    Plain PyTorch, differentiated by autograd. Runs on every device and in every dtype.
``recompute``
    The reference behind one opaque ``torch.library`` op that keeps only its inputs and evaluates the
    reference again in the backward pass: less memory for more arithmetic.
``analytic``
    PyTorch operations with the gradient written out, for CPUs, where that pays: in place, without the tensors that
    autograd would keep. In float32 and float64, without autocast.
``triton``
    A fused GPU kernel, where one exists.

``auto`` takes the Triton kernel where the operator has one, all its tensors are on a GPU, the kernel can take them and
has passed its check there (:mod:`.verification`); else the analytic passes, where the operator has them, they can take the
tensors, and the code is not compiled; else the reference. Inside of transforms of torch.func it takes the reference. Only
the reference can be differentiated twice: force it for second derivatives. A forced backend never falls back: where it
cannot run, it raises :class:`BackendError`.

The choice is made, in this order, by the ``backend`` argument of the operator, by the innermost
:func:`use_backend` block, by the environment variable ``TRGNET_BACKEND`` (read at import), by ``auto``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "reference", "recompute", "analytic", "triton")


class BackendError(RuntimeError):
    """A backend was forced for an operator that cannot run on it."""


class BackendWarning(UserWarning):
    """``auto`` does not use an operator's Triton kernels; the message says why."""


def checked_backend(name: str, source: str) -> str:
    """Return ``name`` if it is a backend; ``source`` says in the error where it came from."""
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


# A plain module global, not a context variable: torch.compile guards on it and retraces when it changes.
_current = checked_backend(os.environ.get("TRGNET_BACKEND") or "auto", "environment variable TRGNET_BACKEND")


def current_backend() -> str:
    """Return the backend in force here: one of :data:`BACKENDS`."""
    return _current


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every operator called inside the block (and of its backward pass).

    >>> with use_backend("recompute"):
    ...     loss = model_loss(batch)

    The choice is global to the process, not to the thread.

    Raises:
        ValueError: an unknown name.
    """
    global _current
    previous, _current = _current, checked_backend(name, "use_backend")
    try:
        yield
    finally:
        _current = previous
