"""The network through torch.compile, and the compiler's failures as messages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .data import Segments
from .errors import UserError, one_line
from .model import Output, TRGNet

REMEDY = "set train.compile=false (leave --compile away)"


class CompiledNetwork(nn.Module):
    """The network compiled for training: once for every number of sequences, whatever the lengths.

    `model` itself stays as it is: its weights are shared and keep their names, and called itself, as evaluation
    does, it is not compiled.

    Raises:
        UserError: torch cannot compile on this Python or platform.
    """

    def __init__(self, model: TRGNet) -> None:
        super().__init__()
        try:
            self.compiled = torch.compile(model)
        except RuntimeError as error:
            raise UserError(f"train.compile cannot be used here: {one_line(error)}; {REMEDY}") from error

    def forward(self, x: Tensor, mask: Tensor, joint_graph: Tensor, segments: Segments) -> Output:
        """As :meth:`trgnet.TRGNet.forward` in training mode."""
        columns = (segments.batch, segments.start, segments.length, segments.label)
        for tensor, axis in [(x, 3), (mask, 2), *((column, 0) for column in columns)]:
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return self.compiled(x, mask, joint_graph, segments)


@contextmanager
def compile_errors() -> Iterator[None]:
    """Turns a failure of the compiler, which may come to the backward pass only in it, into a UserError."""
    from torch._dynamo.exc import TorchDynamoException  # takes seconds, and only who compiles needs it

    try:
        yield
    except TorchDynamoException as error:
        raise UserError(
            f"train.compile: torch.compile failed with {type(error).__name__}: {one_line(error)}; {REMEDY}"
        ) from error
