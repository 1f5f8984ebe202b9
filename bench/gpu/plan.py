"""What is done, the most important first."""

from __future__ import annotations

import os
import shutil
import site
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from trgnet.kernels.examples import Size

from ..operators import OPERATORS
from ..optimizers import FAMILIES
from .processes import Item

PRECISIONS = ("float32", "tf32", "bfloat16")
"""Of the timed phases."""
PHASES = ("values", "sanitizer", "warm", "sync", "step", "graph", "profile", "optimizers", "operators")

MEASUREMENTS = "bench.gpu.measurements:"
GIB = 2**30
MEMORY, MUCH_MEMORY = 2 * GIB, 12 * GIB
"""Of a check of values with its truth in float64 at the published size: of most operators, and of those on all joints."""
ON_JOINTS = "dynamic_graph_conv", "multiscale_graph_conv", "masked_batch_norm"
SHARE_TOGETHER = 0.4
"""Of the time: for the items that run side by side."""
HEAVIEST = (
    "attention_layer",
    "dynamic_graph_conv",
    "fusion_layer",
    "multiscale_graph_conv",
    "dilated_residual",
)
"""The operators that take the most of a step."""
BY_IMPORTANCE = *HEAVIEST, *(name for name in OPERATORS if name not in HEAVIEST)


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run, and how long each thing is timed."""

    checked: tuple[Size, ...]
    """Of values. The lengths 3 and 63 are unaligned, and 17 frames, 19 joints and 16 features fill no tile. No sequence is of a
    single frame, padded ones included: its norm over time has variance 0, which multiplies rounding errors by 316."""
    sanitized: Size
    timed: Size
    seconds: float
    parameters: tuple[str, ...]
    """Of the optimizers, by their names in :data:`bench.optimizers.SIZES`."""


PUBLISHED = Size(n=8, t=6000, segments=320)
FULL = Sizes(
    checked=(
        Size(n=2, t=63, segments=4),
        Size(n=2, t=3, segments=2),
        Size(n=3, c=3, t=17, v=19, f=16, hops=3, k=5, segments=6, d=40),
        Size(n=2, t=128, segments=4),
        PUBLISHED,
    ),
    sanitized=Size(n=2, t=63, segments=4),
    timed=PUBLISHED,
    seconds=0.4,
    parameters=("wrn-28-10", "trg-net"),
)
_LEAST = Size(n=2, c=3, t=5, v=3, f=8, hops=2, k=4, segments=2, d=16)
TINY = Sizes(
    checked=(_LEAST,),
    sanitized=_LEAST,
    timed=Size(n=2, t=152, segments=4),
    seconds=0.0,
    parameters=("trg-net",),
)


@dataclass(frozen=True)
class Part:
    """Items that run in a number of processes at a time, for at most a share of the time that is left."""

    items: list[Item]
    lanes: int = 1
    share: float = 1.0


def plan(sizes: Sizes, on_gpu: bool, phases: Sequence[str] = PHASES, match: str = "") -> list[Part]:
    """The items of some phases whose names contain a text.

    Args:
        sizes: FULL or TINY.
        on_gpu: whether there is a GPU; without one nothing is compiled by torch.compile, which takes minutes there.
        phases: some of PHASES.
        match: a part of ``phase: name``.
    """
    environment = {"TRGNET_VERIFY": "0"}  # kernels are measured whether they are right or not
    if not on_gpu:
        environment |= {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
        }  # tiny tensors gain nothing by threads

    def chosen(items: Iterable[Item], **others: str) -> list[Item]:
        return [
            replace(item, environment=environment | others | item.environment)
            for item in items
            if item.phase in phases
            and match in f"{item.phase}: {item.name}"
            and (on_gpu or not compiled(item))
        ]

    side_by_side = chosen(untimed(sizes), OMP_NUM_THREADS="1")
    one_by_one = chosen(timed(sizes, on_gpu))
    share = SHARE_TOGETHER if one_by_one else 1.0
    return [Part(side_by_side, os.cpu_count() or 1, share), Part(one_by_one)]


def compiled(item: Item) -> bool:
    """Whether it goes through torch.compile."""
    return item.phase == "warm" or item.arguments.get("provider") == "compiled"


def untimed(sizes: Sizes) -> Iterator[Item]:
    """What may run side by side."""
    program = find_sanitizer()
    yield from values(sizes, "float32")
    yield from warm(sizes)
    for precision in PRECISIONS[1:]:
        yield from values(sizes, precision)
    yield from sanitizer(sizes, "float32", program)
    yield from values(sizes, "float16")
    yield from sanitizer(sizes, "bfloat16", program)


FACTS = Item("facts", "facts", MEASUREMENTS + "facts", {}, 90)


def values(sizes: Sizes, precision: str) -> Iterator[Item]:
    """A process for each operator."""
    checked = [asdict(size) for size in sizes.checked]
    # The optimizers multiply no matrices, and know no size of a batch.
    others = [] if precision == "tf32" else [("moment_update", checked[:1])]
    for name, sizes_of_it in [*((name, checked) for name in BY_IMPORTANCE), *others]:
        yield Item(
            "values",
            f"{name}, {precision}",
            MEASUREMENTS + "values",
            {"name": name, "precision": precision, "sizes": sizes_of_it},
            limit=150,
            alone=True,
            memory=MUCH_MEMORY if name in ON_JOINTS else MEMORY,
        )


def warm(sizes: Sizes) -> Iterator[Item]:
    """torch.compile of the network in every precision."""
    for precision in PRECISIONS:
        arguments = {"precision": precision, "size": asdict(sizes.timed)}
        function = MEASUREMENTS + "warm"
        yield Item("warm", precision, function, arguments, limit=200, alone=True, memory=MUCH_MEMORY)


def sanitizer(sizes: Sizes, precision: str, program: str | None) -> Iterator[Item]:
    """Every operator once under compute-sanitizer; one item that says so where there is none."""
    if program is None:
        yield Item("sanitizer", precision, MEASUREMENTS + "no_sanitizer", {}, limit=60, alone=True)
        return
    # Without torch's cache every tensor is an allocation of its own, whose ends are known.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = (program, "--tool", "memcheck", "--error-exitcode", "66", "--print-limit", "5",
               "--target-processes", "application-only")  # fmt: skip
    for name in (*BY_IMPORTANCE, "moment_update"):
        yield Item(
            "sanitizer",
            f"{name}, {precision}",
            MEASUREMENTS + "sanitize",
            {"name": name, "precision": precision, "size": asdict(sizes.sanitized)},
            limit=120,
            alone=True,
            memory=MEMORY,
            command=command,
            environment=environment,
        )


def find_sanitizer() -> str | None:
    """The path of compute-sanitizer: on PATH, in a CUDA toolkit, or in a package of NVIDIA's."""
    name = "compute-sanitizer"
    if found := shutil.which(name):
        return found
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")), *Path("/usr/local").glob("cuda*")]
    folders += [Path(packages) / "nvidia" for packages in site.getsitepackages()]
    for folder in folders:
        for found in sorted(folder.glob(f"**/{name}")):
            if found.is_file() and os.access(found, os.X_OK):
                return str(found)
    return None


def timed(sizes: Sizes, on_gpu: bool) -> Iterator[Item]:
    """Everything that has to be alone on the device."""
    size, seconds = asdict(sizes.timed), sizes.seconds
    steps = {"size": size, "seconds": 2 * seconds}

    def step(provider: str, precision: str, limit: float) -> Item:
        arguments = {"provider": provider, "precision": precision} | steps
        return Item("step", f"{provider}, {precision}", MEASUREMENTS + "step", arguments, limit)

    for precision in PRECISIONS:
        own = {"precision": precision, "size": size}
        yield Item("sync", precision, MEASUREMENTS + "sync", own, 120)
        yield step("ours", precision, 120)
        yield Item("graph", precision, MEASUREMENTS + "graph", own | {"seconds": seconds}, 60)
        yield Item("profile", precision, MEASUREMENTS + "profile", own, 60)
    for precision in PRECISIONS:
        yield step("reference", precision, 90)
    yield from optimizer_items(sizes, on_gpu)
    yield from operator_items(sizes, ("ours", "reference"))
    for precision in PRECISIONS:
        yield step("compiled", precision, 120)
    yield step("published", "tf32", 90)
    yield from operator_items(sizes, ("published",))
    yield step("published", "float32", 90)
    yield step("published", "bfloat16", 90)
    yield from operator_items(sizes, ("compiled",))


def optimizer_items(sizes: Sizes, on_gpu: bool) -> Iterator[Item]:
    """The fused optimizers of every family; on a CPU those that work on lists."""
    for parameters in sizes.parameters:
        for family, name in optimizer_names("fused" if on_gpu else "lists"):
            yield Item(
                "optimizers",
                f"{parameters}, {name}",
                MEASUREMENTS + "optimizer_times",
                {"family": family, "name": name, "parameters": parameters, "seconds": sizes.seconds},
                limit=60,
            )


def optimizer_names(kind: str) -> list[tuple[str, str]]:
    """Families and names of the optimizers of a kind, and torch's fused ones."""
    return [
        (family, name)
        for family, providers in FAMILIES.items()
        for name in providers
        if name.endswith(kind) or name.startswith("torch") and name.endswith("fused")
    ]


def operator_items(sizes: Sizes, providers: Sequence[str]) -> Iterator[Item]:
    """Every operator, those first that take the most of a step."""
    for precision in PRECISIONS:
        for name in BY_IMPORTANCE:
            for provider in providers:
                arguments = {"name": name, "provider": provider, "precision": precision}
                yield Item(
                    "operators",
                    f"{name}, {precision}, {provider}",
                    MEASUREMENTS + "operator_times",
                    arguments | {"size": asdict(sizes.timed), "seconds": sizes.seconds / 2},
                    limit=60,
                )
