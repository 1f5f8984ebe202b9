"""Compiles every Triton kernel for GPUs that need not be there, and prints what came out.

    python -m bench.compiled                     # everything, which takes long; exit code 1 on a fault
    python -m bench.compiled --arch sm_90 --operator dynamic_graph_conv --precision bfloat16 --size published
    python -m bench.compiled --json FILE         # the same as records

    PYTHONPATH=DIR python -m bench.compiled      # with another release of Triton: pip install --no-deps --target DIR triton==3.9.0

One row is one kernel at the configuration that it is launched with: registers per thread, shared memory per block,
bytes that spill to local memory, the share of the bytes of its global accesses that are in 16-byte accesses, and the
numbers of tensor-core, of forbidden and of float64 instructions. The kernels are found by recording what the operators
launch, so a new one is here by itself. Sizes and options of the operators that make other kernels are listed in ``SIZES``
and ``VARIANTS``. Compiling needs Triton only (its NVIDIA tools come with it), no GPU and no particular torch.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._pytree import tree_map_only
from trgnet.kernels import operator, operator_table
from trgnet.kernels.examples import HALF_ARGUMENTS, Size, changed
from trgnet.kernels.launch import Launch, Target, interpreted, record_launches
from trgnet.kernels.self_check import float32_products

from . import sass
from .operators import make_case

ARCHITECTURES = {
    "sm_80": Target("cuda", 80),
    "sm_90": Target("cuda", 90),
    "sm_100": Target("cuda", 100),
    "gfx942": Target("hip", "gfx942"),
}
PRECISIONS = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
SIZES = {
    "published": Size(n=2, t=128),
    "unaligned": Size(n=2, t=100),
    "16 features": Size(n=2, t=128, f=16, v=17),
    "24 features": Size(n=2, t=100, f=24, v=33),
    "40 features": Size(n=2, t=128, f=40, v=19),
    "128 joints": Size(n=2, t=128, v=128),
}
"""One size of every kind that kernels differ in: lengths that are a multiple of 16 or not (neither the length itself nor
the batch matters), features that pad to 16, 32 and 64, and numbers of joints."""

PLAIN = "plain"
"""The variant as the network calls the operator."""
VARIED = ("published", "unaligned")
"""The sizes that variants are compiled at."""


def _variants() -> dict[str, dict[str, dict[int, Any]]]:
    """Return operator -> variant -> positions and values of the arguments that differ from the network's."""
    return {
        "multiscale_graph_conv": {"no statistics": {4: None}},
        "dynamic_graph_conv": {"no statistics": {3: None, 4: None}},
        "masked_batch_norm": {"no residual": {4: None}, "no frame sum": {8: False}},
        "attention_layer": {
            "no dropout": {13: None},
            "dilation 1": {14: 1},
            "1 head": {15: 1},
            "8 heads": {15: 8},
        },
        "fusion_layer": {"no dropout": {7: None}},
        "dilated_residual": {"no dropout": {6: None}, "dilation 1": {7: 1}},
        "moment_update": _moment_variants(),
    }


def _moment_variants() -> dict[str, dict[int, Any]]:
    """The branches of the optimizers' kernel. Weight decay, nesterov, maximize and exponents are numbers that it reads."""

    def tensors(dtype: torch.dtype = torch.float32, offset: int = 0) -> list[Tensor]:
        flat = torch.empty(64 * 64 * 9 + offset, dtype=dtype, device="meta")[offset:]
        return [flat.view(64, 64, 3, 3), flat[: 64 * 64 + 7]]

    params, grads, first, second, spare = range(5)
    control, history, loss, clip, grad_scale, found_inf, form, average, share, same, rounding = range(9, 20)
    lcam, smes = {second: [], form: "sum"}, {control: None, loss: None, form: "average"}
    plain = {clip: None, grad_scale: None, found_inf: None}
    window, ema = {history: torch.empty(10), average: "window"}, {average: "ema", share: 0.1}
    variants = {
        "LCAM": lcam,
        "LCAM, plain": lcam | plain,
        "LCAM, no loss": lcam | plain | {loss: None},
        "LCAM, window": lcam | window | {same: True},
        "LCAM, ema": lcam | ema,
        "SMES": smes,
        "SMES, plain": smes | plain,
        "GatedSMES, window": window,
        "GatedSMES, ema": ema | {same: True},
        "GatedSMES, sum": {form: "sum"},
        "GatedSMES, no second moment": {second: []},
    }
    for name, kind in (("LCAM", lcam), ("SMES", smes), ("GatedSMES", {})):

        def states(dtype: torch.dtype, kind: dict[int, Any] = kind) -> dict[int, Any]:
            return {k: tensors(dtype) for k in (first, second) if kind.get(k) != []}

        unaligned = {k: tensors(offset=1) for k in (params, grads, first, second) if kind.get(k) != []}
        variants[f"{name}, unaligned"] = kind | unaligned
        for dtype in (torch.float16, torch.bfloat16):
            half = {params: tensors(dtype), grads: tensors(dtype)}
            label = str(dtype).removeprefix("torch.")
            variants[f"{name}, {label}"] = kind | half | states(torch.float32)
            kahan = {spare: tensors(dtype), rounding: "kahan"}
            variants[f"{name}, {label}, Kahan"] = kind | half | states(torch.float32) | kahan
        stochastic = {rounding: "stochastic"}
        variants[f"{name}, bfloat16 states, stochastic"] = kind | states(torch.bfloat16) | stochastic
        variants[f"{name}, bfloat16, stochastic"] = kind | half | states(torch.bfloat16) | stochastic
    return variants


VARIANTS = _variants()


ALLOWED_SPILLS = {("gfx942", "3.6"): 44, ("gfx942", "3.9"): 84}
"""Bytes by architecture and release of Triton: its AMD backend needs some more registers for the dynamic graph
convolution there than that of 3.7, the release that torch comes with."""


@dataclass(frozen=True)
class Code:
    """Facts of one compiled kernel."""

    operator: str
    kernel: str
    precision: str
    arch: str
    num_warps: int
    registers: int
    shared: int
    shared_limit: int
    spilled: int
    wide: float
    """Share of the bytes of all global loads and stores, counted once each, that are in 16-byte accesses."""
    matrix: int
    forbidden: int
    """Tensor-core instructions of eight columns on Hopper, see :func:`trgnet.kernels.frame_tiles.one_warpgroup`."""
    float64: int
    triton: str
    size: str
    variant: str

    @property
    def faults(self) -> list[str]:
        """What must not be."""
        found = []
        release = ".".join(self.triton.split(".")[:2])
        if self.spilled > ALLOWED_SPILLS.get((self.arch, release), 0):
            found.append(f"spills {self.spilled} bytes")
        if self.forbidden:
            found.append(f"has {self.forbidden} tensor-core instructions of eight columns")
        if self.float64:
            found.append(f"has {self.float64} float64 instructions")
        if self.shared > self.shared_limit:
            found.append(f"needs {self.shared} bytes of shared memory, {self.arch} has {self.shared_limit}")
        return found


@dataclass(frozen=True)
class Job:
    """The kernels of one operator to be compiled; names are those of PRECISIONS, ARCHITECTURES and VARIANTS."""

    operator: str
    precision: str
    arch: str
    size: Size = SIZES["published"]
    variant: str = PLAIN


def triton_operators() -> list[str]:
    """The operators that have kernels."""
    return [name for name, backends in operator_table() if "triton" in backends]


def launches(job: Job) -> list[Launch]:
    """What forward and backward of an operator launch on the job's architecture, each compilation once."""
    return list({launch.compilation: launch for launch in recorded(job)}.values())


def recorded(job: Job) -> list[Launch]:
    """Every launch of forward and backward of an operator on the job's architecture, in order."""
    dtype = PRECISIONS[job.precision]
    changes = {} if job.variant == PLAIN else VARIANTS[job.operator][job.variant]
    forms = [changed(form, changes) for form in make_case(job.operator, job.size).forms]
    narrow = {*operator(job.operator).triton.narrowed, *HALF_ARGUMENTS.get(job.operator, ())} - changes.keys()
    with float32_products(job.precision), record_launches(ARCHITECTURES[job.arch]) as found:
        for form in forms:
            args = [_on_meta(a, dtype if i in narrow else None) for i, a in enumerate(form)]
            operator(job.operator).triton_passes(args, torch.empty_like)
    return found


def _on_meta(argument: Any, dtype: torch.dtype | None) -> Any:
    """Its tensors, those in a list too, without values; in ``dtype``, if there is one."""
    return tree_map_only(Tensor, lambda t: t.detach().to("meta", dtype or t.dtype), argument)


def compile_job(job: Job) -> list[Code]:
    """Compile what the job launches."""
    return [_facts(job, launch, compile_launch(launch, ARCHITECTURES[job.arch])) for launch in launches(job)]


def compile_launch(launch: Launch, target: Target) -> Any:
    """Compile the kernel of a recorded launch as Triton's just-in-time compiler would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    types, constants = dict(launch.types), dict(launch.constants)
    source = ASTSource(
        fn=launch.kernel,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs=constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    return triton.compile(source, target=gpu, options=options)


def _facts(job: Job, launch: Launch, compiled: Any) -> Code:
    import triton

    read = _amd_facts if job.arch.startswith("gfx") else _nvidia_facts
    return Code(
        operator=job.operator,
        kernel=launch.name,
        precision=job.precision,
        arch=job.arch,
        num_warps=launch.num_warps,
        shared=compiled.metadata.shared,
        shared_limit=ARCHITECTURES[job.arch].shared_memory,
        triton=triton.__version__,
        size=next((name for name, size in SIZES.items() if size == job.size), str(job.size)),
        variant=job.variant,
        **read(compiled.asm),
    )


def _nvidia_facts(asm: dict[str, Any]) -> dict[str, Any]:
    code = sass.read(asm["cubin"])
    accesses = [one.width for one in code.instructions if one.opcode in ("LDG", "STG", "LDGSTS")]
    return {
        "registers": code.registers,
        "spilled": code.stack,
        "wide": _wide_share(accesses),
        "matrix": sum(bool(re.match(r"[HIQBD]MMA|[HIQB]GMMA|UTC\w*MMA", name)) for name in code.names),
        "forbidden": sum(bool(sass.EIGHT_COLUMNS.match(name)) for name in code.names),
        "float64": sum(
            bool(re.match(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*\.F64|MUFU\.\w*64", name)) for name in code.names
        ),
    }


def _amd_facts(asm: dict[str, Any]) -> dict[str, Any]:
    code = asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code).group(1))

    widths = {
        "dwordx4": 16,
        "dwordx3": 12,
        "dwordx2": 8,
        "dword": 4,
        "ushort": 2,
        "short": 2,
        "ubyte": 1,
        "byte": 1,
    }
    accesses = [
        widths.get(re.sub(r"_d16(_hi)?$", "", kind), 4)
        for kind in re.findall(r"^\s*(?:global|buffer|flat)_(?:load|store)_(\w+)", code, re.M)
    ]
    return {
        "registers": field("vgpr_count") + field("agpr_count"),
        # Without memory of its own, a kernel spills scalar registers into lanes of vector registers.
        "spilled": 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
        if field("private_segment_fixed_size")
        else 0,
        "wide": _wide_share(accesses),
        "matrix": len(re.findall(r"^\s*v_mfma", code, re.M)),
        "forbidden": 0,
        "float64": len(re.findall(r"^\s*v_\w*f64", code, re.M)),
    }


def _wide_share(widths: list[int]) -> float:
    return sum(w for w in widths if w >= 16) / max(1, sum(widths))


def all_jobs(
    operators: Iterable[str],
    precisions: Iterable[str],
    archs: Iterable[str],
    sizes: Iterable[str],
    plain: bool = False,
) -> list[Job]:
    """Return the jobs of these names, those of variants included unless ``plain``."""
    return [
        Job(name, precision, arch, SIZES[size], variant)
        for name in operators
        for precision in precisions
        for arch in archs
        for size in sizes
        for variant in (PLAIN, *(VARIANTS.get(name, ()) if size in VARIED and not plain else ()))
    ]


def compile_all(jobs: Iterable[Job], processes: int) -> list[Code]:
    """Compile in several processes; in the order of the jobs, without rows that repeat an earlier size or variant."""
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        codes = [code for codes in pool.map(compile_job, jobs, chunksize=1) for code in codes]
    return list({replace(code, size="", variant=""): code for code in reversed(codes)}.values())[::-1]


def print_table(codes: Iterable[Code], console: Console) -> None:
    """One row for each kernel, precision and architecture."""
    table = Table("operator", "kernel", "precision", "arch", "warps", "registers", "shared", "spilled", "16-byte",
                  "matrix", "float64", "size", "variant")  # fmt: skip
    for code in codes:
        table.add_row(
            code.operator, code.kernel, code.precision, code.arch, str(code.num_warps), str(code.registers),
            str(code.shared), str(code.spilled), f"{code.wide:.0%}", str(code.matrix), str(code.float64),
            code.size, code.variant, style="red" if code.faults else None,
        )  # fmt: skip
    console.print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--operator", action="append", choices=triton_operators(), help="default: all")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="default: all")
    parser.add_argument("--size", action="append", choices=SIZES, help="default: all")
    parser.add_argument("--plain", action="store_true", help="without the variants of the operators")
    parser.add_argument("--json", type=Path, help="also write the records into this file")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="default: one for each core")
    options = parser.parse_args(arguments)
    if interpreted():
        parser.error("TRITON_INTERPRET is set: nothing would be compiled; unset it")
    jobs = all_jobs(
        options.operator or triton_operators(), options.precision or PRECISIONS, options.arch or ARCHITECTURES,
        options.size or SIZES, options.plain,
    )  # fmt: skip
    import triton

    codes = compile_all(jobs, options.processes)
    console = Console(width=170)
    console.print(f"triton {triton.__version__}, {date.today()}")
    print_table(codes, console)
    if options.json:
        options.json.write_text(json.dumps([asdict(code) for code in codes], indent=1))
    for code in codes:
        for fault in code.faults:
            console.print(
                f"{code.kernel}, {code.precision}, {code.arch}, {code.size}, {code.variant}: {fault}",
                style="red",
            )
    return int(any(code.faults for code in codes))


if __name__ == "__main__":
    sys.exit(main())
