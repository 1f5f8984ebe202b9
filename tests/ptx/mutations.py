"""Program: whether the emulator finds kernels that were made wrong, as JSON.

    python -m tests.ptx.mutations OPERATOR PRECISION INSTRUCTION

Each instruction that begins with INSTRUCTION, such as bar.sync, is left out of the code of the operator's kernels, one at a
time, forward and backward. For each kernel: how many there are, and the numbers of those that nothing was found without.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from trgnet.kernels import operator
from trgnet.kernels.examples import HALF_ARGUMENTS, Size
from trgnet.kernels.self_check import float32_products

from bench.compiled import PRECISIONS
from bench.operators import make_case

from .emulation import Emulation, emulated
from .findings import Findings
from .machine import Deadlock

SIZE = Size(n=1, c=4, v=5, f=64, t=40, hops=3, k=4, segments=4, d=16)


def removals(ptx: str, instruction: str) -> list[str]:
    """The code without one of the instructions that begin so, for each of them."""
    found = re.finditer(rf"(?:@!?%p\d+\s+)?{re.escape(instruction)}[^;]*;", ptx)
    return [ptx[: match.start()] + ptx[match.end() :] for match in found]


@dataclass
class Mutations(Emulation):
    """Runs every kernel with each change first; what those runs write is forgotten."""

    instruction: str = "bar.sync"
    missed: dict[str, list[int]] = field(default_factory=dict)
    """By kernel: the changes that nothing was found in."""
    tried: dict[str, int] = field(default_factory=dict)

    def run(self, name: str, ptx: str, *arguments: Any) -> Findings:
        if name not in self.tried:
            changed = removals(ptx, self.instruction)
            self.tried[name] = len(changed)
            self.missed[name] = [
                i for i, code in enumerate(changed) if not self._found(name, code, *arguments)
            ]
        return super().run(name, ptx, *arguments)

    def _found(self, name: str, ptx: str, *arguments: Any) -> bool:
        try:
            return bool(super().run(name, ptx, *arguments, trial=True).found)
        except Deadlock:
            return True


def _detached(argument: Any, dtype: torch.dtype | None) -> Any:
    """An argument without gradients; its tensors in ``dtype``, if there is one."""
    return tree_map_only(Tensor, lambda t: t.detach().to(dtype or t.dtype), argument)


def mutate(name: str, precision: str, instruction: str, size: Size = SIZE) -> Mutations:
    """Forward and backward of an operator with changed kernels."""
    dtype = PRECISIONS[precision]
    narrow = {*operator(name).triton.narrowed, *HALF_ARGUMENTS.get(name, ())}
    with float32_products(precision), emulated(Mutations(instruction=instruction)) as mutations:
        for form in make_case(name, size).forms:
            args = [_detached(a, dtype if i in narrow else None) for i, a in enumerate(form)]
            operator(name).triton_passes(args, torch.ones_like)
    return mutations


if __name__ == "__main__":
    mutations = mutate(*sys.argv[1:4])
    print(json.dumps({name: [n, mutations.missed[name]] for name, n in mutations.tried.items()}))
