"""Program: Triton kernels of the emulator's own tests, compiled for an H100, as JSON.

    python -m tests.ptx.kernels

For each of KERNELS its code and the bytes of shared memory that a block of it asks for.
"""

from __future__ import annotations

import json
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(
    a_ptr, b_ptr, c_ptr, length, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr
):
    """C (M, N) = A (M, length) B (length, N), of one block; ``length`` is a multiple of K."""
    rows, columns, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    result = tl.zeros((M, N), tl.float32)
    for start in range(0, length, K):
        a = tl.load(a_ptr + rows[:, None] * length + (start + k)[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + columns[None, :])
        result = tl.dot(a, b, result, input_precision=PRECISION)
    tl.store(c_ptr + rows[:, None] * N + columns[None, :], result)


KERNELS: dict[str, dict[str, Any]] = {
    "eight columns": dict(kind="fp32", num_warps=8, num_stages=1, M=64, N=16, K=32),
    "sixteen columns": dict(kind="fp32", num_warps=4, num_stages=1, M=64, N=16, K=32),
    "pipelined": dict(kind="fp16", num_warps=4, num_stages=3, M=64, N=32, K=32),
}
"""How :func:`product` is compiled. Eight warps share sixteen columns by two."""


def compiled(kind: str, num_warps: int, num_stages: int, **tile: int) -> dict[str, Any]:
    """Code and shared memory of the product in one way."""
    constants = {**tile, "PRECISION": "tf32"}
    source = ASTSource(
        fn=product,
        signature={"a_ptr": f"*{kind}", "b_ptr": f"*{kind}", "c_ptr": "*fp32", "length": "i32"}
        | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    code = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    return {
        "ptx": code.asm["ptx"],
        "shared": code.metadata.shared,
        "num_warps": num_warps,
        "kind": kind,
        **tile,
    }


if __name__ == "__main__":
    print(json.dumps({name: compiled(**options) for name, options in KERNELS.items()}))
