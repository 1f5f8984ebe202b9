"""Program: facts of the optimizer's kernel as compiled for a GPU that need not be there, as JSON.

    python tests/moment_kernels.py ARCH

For each variant: spilled bytes, registers, float64 instructions, and how many loads and stores of 16 bytes it has. For
the loss gate alone, by kind of average: its floating-point instructions in PTX.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from trgnet.kernels.launch import Launch, kernel, launch, record_launches, tl
from trgnet.kernels.loss_gate import AVERAGES, observe
from trgnet.kernels.moment_update import Moments, MomentTable

from bench.compiled import ARCHITECTURES, Job, _facts, compile_launch
from bench.sass import tool

FLOAT, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
VARIANTS: dict[str, dict[str, Any]] = {
    "lcam": dict(dtypes=(FLOAT, FLOAT, None, None), form="sum", average="window", same=True),
    "gated": dict(dtypes=(FLOAT, FLOAT, FLOAT, None), form="product", average="ema"),
    "smes, kahan": dict(dtypes=(HALF, FLOAT, FLOAT, HALF), form="average", rounding="kahan"),
    "smes, stochastic": dict(dtypes=(BRAIN, BRAIN, BRAIN, None), form="average", rounding="stochastic"),
}


@kernel
def _gate_kernel(control_ptr, history_ptr, loss_ptr, window, share, KIND: tl.constexpr):
    mean, rest, count = tl.load(control_ptr), tl.load(control_ptr + 1), tl.load(control_ptr + 2)
    phase, place = tl.load(control_ptr + 3), tl.load(control_ptr + 6)
    new = observe(mean, rest, count, phase, place, tl.load(loss_ptr), history_ptr, window, share, KIND)
    for i in tl.static_range(5):
        tl.store(control_ptr + i, new[i])


def gate_instructions(arch: str, average: str) -> list[str]:
    """Floating-point instructions of the gate alone."""
    control, loss = (torch.empty(shape, device="meta") for shape in ((8,), ()))
    history = torch.empty(10, device="meta") if average == "window" else None
    with record_launches(ARCHITECTURES[arch]) as launches:
        launch(_gate_kernel, (1,), control, history, loss, 10, 0.25, KIND=average)
    ptx = compile_launch(launches[0], ARCHITECTURES[arch]).asm["ptx"]
    return sorted(set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z]\S*\.f(?:16|32|64))\b", ptx, re.M)))


def recorded(arch: str, dtypes: tuple, aligned: bool = True, size: int = 5000, **options: Any) -> Launch:
    """The launch of one step with everything that a step may have."""
    p, m, v, c = (None if d is None else torch.empty(size, dtype=d, device="meta") for d in dtypes)

    def scalar(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    history = scalar(10) if options.get("average") == "window" else None
    with record_launches(ARCHITECTURES[arch]) as launches:
        moments = Moments([p], [p], [m], *([t] if t is not None else [] for t in (v, c)))
        table = MomentTable(moments, [0], [0])
        for part in table.parts:
            part.types["ALIGNED"] = aligned
        table.launch(
            moments, scalar(1, 16), scalar(1, 3), scalar(8), history, *(scalar() for _ in range(4)), **options
        )
    (launch,) = launches
    return launch


def facts(launch: Launch, arch: str) -> dict[str, int]:
    compiled = compile_launch(launch, ARCHITECTURES[arch])
    code = _facts(Job("moment_update", "float32", arch), launch, compiled)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        sass = tool("nvdisasm", "-c", str(file))
    return {
        "spilled": code.spilled,
        "registers": code.registers,
        "float64": code.float64,
        "loads": len(re.findall(r"\bLDG\.E\S*\.128", sass)),
        "stores": len(re.findall(r"\bSTG\.E\S*\.128", sass)),
    }


if __name__ == "__main__":
    arch = sys.argv[1]
    found = {name: facts(recorded(arch, **variant), arch) for name, variant in VARIANTS.items()}
    found["unaligned"] = facts(recorded(arch, aligned=False, **VARIANTS["gated"]), arch)
    sizes = {
        recorded(arch, size=size, **VARIANTS["gated"]).compilation for size in (1, 16, 1000, 1024, 4_000_000)
    }
    found["compilations"] = {"count": len(sizes)}
    found["gate"] = {average: gate_instructions(arch, average) for average in AVERAGES}
    print(json.dumps(found))
