"""Predicts how long a kernel takes on an H100, from its machine code and a trace of its execution.

One multiprocessor is simulated, instruction by instruction. It has resident blocks, four schedulers, register dependencies,
barriers, arithmetic pipes, tensor cores, and shared memory with bank conflicts. Loads wait for its share of the bandwidth of
L2 and DRAM. All other multiprocessors are taken to do the same. Sizes and rates of :class:`Machine` are the published ones
of the H100 SXM; latencies are those of microbenchmarks, DRAM's rate is fitted to measured kernels (:mod:`bench.predict`).
Not modelled: instruction caches, the order in which blocks reach L2, and what other kernels leave in it.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass, field

from .sass import Code, Instruction
from .sass_run import SECTOR, Access, Trace


@dataclass(frozen=True)
class Machine:
    """Sizes, rates per clock of one multiprocessor, and latencies in clocks."""

    multiprocessors: int = 132
    clock: float = 1.70e9
    registers: int = 65536
    shared: int = 228 * 1024
    warps: int = 64
    l2_capacity: float = 50e6
    dram: float = 3.15e12
    """Bytes per second, read and written."""
    copy: float = 2.94e12
    """The same of a copy in PyTorch, as measured: what floors are computed with."""
    l2: float = 5.5e12
    port: float = 64.0
    """Bytes per clock between a multiprocessor and L2."""
    tf32: float = 1024.0
    """Multiplications and additions of the tensor cores per clock, by wgmma."""
    bf16: float = 2048.0
    synchronous: float = 0.62
    """Share of these rates that mma.sync reaches."""
    dram_latency: float = 600.0
    l2_latency: float = 280.0
    l1: float = 256 * 1024
    """Bytes of L1 and shared memory together."""
    least: float = 2.0
    """Sectors that L2 could move in the time of one that is alone in its 128-byte line."""
    line: float = 1.0
    """Clocks for each 128-byte line of an access."""
    l1_latency: float = 38.0
    shared_latency: float = 30.0
    alu_latency: float = 5.0
    slow_latency: float = 22.0
    tensor_latency: float = 26.0
    wgmma_latency: float = 60.0
    barrier_latency: float = 25.0
    issue: float = 1.0
    """Clocks between two instructions of a scheduler."""
    dependent: float = 1.0
    """Further clocks between two instructions of one warp."""
    stagger: float = 60.0
    """Clocks between the starts of two blocks of a multiprocessor."""
    turnover: float = 200.0
    """Clocks from the end of a block to the start of the next one."""
    start: float = 2.0e-6
    """Seconds from the start of a kernel to that of its blocks and from their end to its own."""
    launch: float = 0.5e-6
    """Seconds between two kernels of a CUDA graph."""


H100 = Machine()

_TWO_CLOCKS = {
    "IADD3", "LOP3", "SHF", "ISETP", "LEA", "SEL", "FSEL", "PRMT", "FMNMX", "FSETP", "VIADD", "VIMNMX", "PLOP3", "IMNMX", "IABS",
    "SGXT", "BMSK", "P2R", "R2P", "HSETP2", "HMNMX2", "VIADDMNMX", "F2FP", "I2FP", "MOV", "POPC", "FLO", "VOTE",
}  # fmt: skip
_SLOW = {"MUFU", "F2F", "F2I", "I2F", "S2R", "I2I"}
_CARVEOUTS = tuple(1024 * size for size in (0, 8, 16, 32, 64, 100, 132, 164, 196, 228))
"""What of L1 can be shared memory; the rest stays a cache."""
_GLOBAL_LOADS = {"LDG", "LD", "LDGSTS", "ATOMG"}
_GLOBAL_STORES = {"STG", "ST", "RED"}
_SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
LIMITERS = ("issue", "arithmetic", "tensor", "shared", "l2", "dram", "latency")


@dataclass(frozen=True)
class Prediction:
    """Seconds that a kernel takes, and that it would take if one resource were all it needed."""

    seconds: float
    floor: float
    """Seconds that a copy of the bytes of its arguments that it touches would take, each once."""
    resources: dict[str, float]
    occupancy: int
    """Blocks of one multiprocessor at a time."""
    blocks: int

    @property
    def limiter(self) -> str:
        """The resource that takes most of the time; latency if none takes two thirds of it."""
        name = max(self.resources, key=self.resources.__getitem__)
        return name if self.resources[name] > 0.66 * self.seconds else "latency"


@dataclass
class _Step:
    """What one instruction costs a warp."""

    sources: tuple[str, ...]
    results: tuple[str, ...]
    kind: str
    pipe: str | None = None
    clocks: float = 0.0
    """Of its pipe."""
    latency: float = 0.0
    shared: float = 0.0
    """Clocks of the shared memory."""
    sectors: float = 0.0
    """Sectors from L2."""
    misses: float = 0.0
    """Share of them among those it accesses."""
    groups: int = 0
    """Groups of copies or products that a wait leaves open."""


@dataclass
class _Warp:
    block: int
    scheduler: int
    registers: list[float]
    """When the value of each register is there."""
    at: int = 0
    products: float = 0.0
    """When its tensor-core products are done."""
    copies: list[float] = field(default_factory=list)
    """When each group of its asynchronous copies is there."""
    open_copies: float = 0.0


def occupancy(code: Code, warps: int, machine: Machine = H100) -> int:
    """Blocks that a multiprocessor has room for."""
    per_warp = -(-code.registers * 32 // 256) * 256
    by_registers = machine.registers // (per_warp * warps) if per_warp else 32
    return max(1, min(by_registers, machine.shared // (code.shared + 1024), machine.warps // warps, 32))


def predict(
    code: Code, trace: Trace, grid: tuple[int, ...], sizes: dict[str, int], machine: Machine = H100
) -> Prediction:
    """Predict the time of a launch; ``sizes`` are the bytes of its tensors by parameter."""
    blocks = math.prod(grid)
    room = occupancy(code, trace.warps, machine)
    unique = _unique_bytes(trace, blocks, sizes)
    by_instruction = _l2_sectors(code, trace, _l1_hits(code, trace, room, machine), machine)
    steps = _steps(code, trace, by_instruction, machine)
    moved = sum(by_instruction.values()) / trace.blocks * SECTOR * blocks
    # What fits into L2 is there from the kernel before, or stays for the next one.
    missing = min(1.0, max(0.0, unique / machine.l2_capacity - 0.5)) * unique
    share = min(1.0, missing / max(1.0, moved))
    busy = min(blocks, machine.multiprocessors)
    simulation = _Simulation(steps, trace.path, trace.warps, busy, share, machine)
    clocks = simulation.run(-(-blocks // machine.multiprocessors), room)
    seconds = clocks / machine.clock
    resources = _resources(trace, steps, blocks, machine)
    resources["l2"] = moved / machine.l2
    resources["dram"] = missing / machine.dram
    seconds = max(seconds, resources["dram"], resources["l2"])
    return Prediction(seconds + machine.start, unique / machine.copy, resources, room, blocks)


def _unique_bytes(trace: Trace, blocks: int, sizes: dict[str, int]) -> float:
    """Bytes that are read or written, each once."""
    return sum(min(sizes[name], mean * SECTOR * blocks) for (name, _), mean in trace.touched.items())


def _l1_hits(code: Code, trace: Trace, room: int, machine: Machine) -> float:
    """Share of the repeated accesses of a block that L1 still has."""
    taken = room * (code.shared + 1024) if code.shared else 0
    left = machine.l1 - min(size for size in _CARVEOUTS if size >= min(taken, _CARVEOUTS[-1]))
    # About two thirds of what a block touches lies between two uses of the same sector.
    between = 0.65 * SECTOR * sum(mean for (_, kind), mean in trace.touched.items() if kind == "load")
    return min(1.0, left / max(1.0, between)) ** 2


def _l2_sectors(code: Code, trace: Trace, hits: float, machine: Machine) -> dict[int, float]:
    """Sectors that L2 moves, by the number of the instruction, for all sampled blocks; scattered ones count more."""
    moved = {}
    for i, access in trace.accesses.items():
        one = code.instructions[i]
        cached = one.opcode in _GLOBAL_LOADS and "BYPASS" not in one.modifiers
        share = (access.first + (access.sectors - access.first) * (1 - hits)) / max(1, access.sectors)
        moved[i] = max(access.sectors, access.lines * machine.least) * (share if cached else 1.0)
    return moved


def _steps(code: Code, trace: Trace, moved: dict[int, float], machine: Machine) -> list[_Step]:
    """The costs of every instruction, for one warp."""
    return [_step(one, trace, i, moved.get(i, 0.0), machine) for i, one in enumerate(code.instructions)]


def _step(one: Instruction, trace: Trace, i: int, moved: float, machine: Machine) -> _Step:
    warps = max(1, int(trace.executed[i]))
    step = _Step(one.sources, one.results, "plain", latency=machine.alu_latency)
    access = trace.accesses.get(i)
    opcode = one.opcode
    if one.shape is not None:
        return _product(one, step, machine)
    if opcode in _GLOBAL_LOADS:
        step.kind = "copy" if opcode == "LDGSTS" else "load"
        step.sectors, step.misses = moved / warps, min(1.0, moved / max(1, access.sectors)) if access else 0.0
        step.pipe, step.clocks = "memory", _line_clocks(access, machine) / warps if access else 1.0
        step.shared = access.cycles / warps if access and opcode == "LDGSTS" else 0.0
    elif opcode in _GLOBAL_STORES:
        step.kind, step.sectors = "store", moved / warps
        step.pipe, step.clocks = "memory", _line_clocks(access, machine) / warps if access else 1.0
    elif opcode in _SHARED or opcode == "SHFL":
        step.kind, step.latency = "shared", machine.shared_latency
        step.shared = access.cycles / warps if access else 1.0
    elif opcode in ("BAR", "WARPGROUP", "DEPBAR", "LDGDEPBAR"):
        step.kind = opcode
        step.groups = int(one.operands[1], 16) if opcode == "DEPBAR" and len(one.operands) > 1 else 0
        if opcode == "WARPGROUP" and "DEPBAR" not in one.modifiers:
            step.kind = "plain"
    elif opcode in _SLOW:
        step.pipe, step.clocks, step.latency = "slow", 8.0 if opcode != "S2R" else 2.0, machine.slow_latency
    elif opcode in _TWO_CLOCKS:
        step.pipe, step.clocks = "integer", 2.0
    elif opcode == "IMAD":
        step.pipe, step.clocks = "float", 1.0 if one.modifiers & {"MOV", "IADD", "SHL"} else 2.0
    elif opcode in ("FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "HMUL2"):
        step.pipe, step.clocks = "float", 1.0
    return step


def _line_clocks(access: Access, machine: Machine) -> float:
    return max(access.lines * machine.line, access.sectors / 4)


def _product(one: Instruction, step: _Step, machine: Machine) -> _Step:
    rows, columns, depth = one.shape
    rate = (machine.tf32 if "TF32" in one.modifiers else machine.bf16) / 4
    step.pipe = "tensor"
    if one.opcode == "HGMMA":
        step.kind, step.clocks = "wgmma", rows * columns * depth / 4 / rate
        item = 4 if "TF32" in one.modifiers else 2
        from_shared = columns * depth + (rows * depth if one.operands[1].startswith("gdesc") else 0)
        step.shared = from_shared * item / 128 / 4
        # The accumulators are those of the products before it, which are waited for by DEPBAR only.
        step.sources = tuple(r for r in step.sources if r not in one.results)
    else:
        step.clocks = rows * columns * depth / rate / machine.synchronous
        step.latency = machine.tensor_latency
    return step


def _resources(trace: Trace, steps: list[_Step], blocks: int, machine: Machine) -> dict[str, float]:
    """Seconds of each resource of the multiprocessors, if all of them share the work evenly."""
    totals = dict.fromkeys(("issue", "integer", "float", "slow", "tensor", "shared", "memory"), 0.0)
    for step, executed in zip(steps, trace.executed):
        totals["issue"] += executed * machine.issue / 4
        totals["shared"] += executed * step.shared
        if step.pipe is not None:
            totals[step.pipe] += executed * step.clocks / (1 if step.pipe == "memory" else 4)
    busy = min(blocks, machine.multiprocessors)
    scale = blocks / trace.blocks / busy / machine.clock
    arithmetic = max(totals[name] for name in ("integer", "float", "slow"))
    shared = totals["shared"] + totals["memory"]
    return {
        "issue": totals["issue"] * scale, "arithmetic": arithmetic * scale, "tensor": totals["tensor"] * scale,
        "shared": shared * scale,
    }  # fmt: skip


class _Simulation:
    """The blocks of one multiprocessor."""

    def __init__(
        self, steps: list[_Step], path: list[int], warps: int, busy: int, share: float, machine: Machine
    ) -> None:
        self.warps, self.machine = warps, machine
        self.names = {
            name: i for i, name in enumerate(sorted({r for s in steps for r in (*s.sources, *s.results)}))
        }
        plain = [self._numbered(step) for step in steps]
        self.path = [plain[i] for i in path]
        per_clock = busy * machine.clock
        self.l2_clocks = SECTOR / min(machine.port, machine.l2 / per_clock)
        self.dram_clocks = SECTOR * share / (machine.dram / per_clock)
        # Most loads of a kernel that streams wait for DRAM, most of one that lives in L2 do not.
        from_dram = min(1.0, 2 * share)
        self.memory_latency = machine.l2_latency * (1 - from_dram) + machine.dram_latency * from_dram
        self.schedulers = [0.0] * 4
        self.pipes = [[0.0] * 4 for _ in _PIPES]
        self.shared_free = self.l2_free = self.dram_free = 0.0

    def _numbered(self, step: _Step) -> tuple:
        """The step with numbers for names: the loop below is all the time that a prediction takes."""
        sources = tuple(self.names[r] for r in step.sources)
        results = tuple(self.names[r] for r in step.results)
        pipe = _PIPES.index(step.pipe) if step.pipe in _PIPES else -1
        kind = _KINDS.index(step.kind)
        return (
            sources,
            results,
            kind,
            pipe,
            step.clocks,
            step.latency,
            step.shared,
            step.sectors,
            step.misses,
            step.groups,
        )

    def run(self, blocks: int, room: int) -> float:
        """Clocks until so many blocks are done, ``room`` at a time."""
        room = min(room, blocks)
        waves = max(1, min(3, int(MOST_EVENTS / (len(self.path) * self.warps * room))))
        count = min(blocks, waves * room)
        ends = self._blocks(count, room)
        if waves == 1:
            return ends[-1] * -(-blocks // count)
        # The first blocks start together and fill the pipes; the others follow at the rate of the last ones.
        return ends[-1] + (ends[-1] - ends[room - 1]) / max(1, count - room) * (blocks - count)

    def _blocks(self, count: int, room: int) -> list[float]:
        """When each of ``count`` blocks is done."""
        queue: list[tuple[float, int]] = []
        warps: list[_Warp] = []
        waiting: dict[int, list[int]] = {}
        left: dict[int, int] = {}
        ends: list[float] = []

        def begin(block: int, time: float) -> None:
            left[block] = self.warps
            for i in range(self.warps):
                scheduler = (block * self.warps + i) % 4
                warps.append(_Warp(block, scheduler, registers=[0.0] * len(self.names)))
                heapq.heappush(queue, (time, len(warps) - 1))

        for block in range(room):
            begin(block, self.machine.stagger * block)
        started = room
        while queue:
            time, number = heapq.heappop(queue)
            warp = warps[number]
            time = self._issue(warp, time, queue)
            if time >= 0:
                heapq.heappush(queue, (time, number))
            elif warp.at == len(self.path):
                left[warp.block] -= 1
                if not left[warp.block]:
                    ends.append(-time)
                    if started < count:
                        begin(started, self.machine.turnover - time)
                        started += 1
            else:
                there = waiting.setdefault(warp.block, [])
                there.append(number)
                if len(there) == left[warp.block]:
                    for other in waiting.pop(warp.block):
                        heapq.heappush(queue, (self.machine.barrier_latency - time, other))
        return sorted(ends)

    def _issue(self, warp: _Warp, time: float, queue: list[tuple[float, int]]) -> float:
        """Execute instructions from ``time`` on, until another warp is earlier; when to come back.

        Negative times are those of a barrier, or of the end.
        """
        machine, path, registers, scheduler = self.machine, self.path, warp.registers, warp.scheduler
        schedulers, pipes, pace = self.schedulers, self.pipes, machine.issue + machine.dependent
        at, length = warp.at, len(self.path)
        while at < length:
            sources, results, kind, pipe, clocks, latency, shared, sectors, misses, groups = path[at]
            start = schedulers[scheduler]
            if start < time:
                start = time
            for register in sources:
                if registers[register] > start:
                    start = registers[register]
            if kind == _WAIT_PRODUCTS:
                start = max(start, warp.products)
            elif kind == _WAIT_COPIES:
                if len(warp.copies) > groups:
                    start = max(start, warp.copies[-1 - groups])
            elif pipe >= 0 and kind != _WGMMA and pipes[pipe][scheduler] > start:
                start = pipes[pipe][scheduler]
            if queue and start > queue[0][0] and start > time:
                warp.at = at
                return start
            schedulers[scheduler] = start + machine.issue
            done = start + latency
            if pipe >= 0:
                free = pipes[pipe][scheduler]
                pipes[pipe][scheduler] = (free if free > start else start) + clocks
            if kind:
                if kind == _SHARED_ACCESS:
                    self.shared_free = max(self.shared_free, start) + shared
                    done = self.shared_free + latency
                elif kind == _LOAD or kind == _COPY:
                    self.shared_free = done = max(self.shared_free, start) + clocks + shared
                    done += machine.l1_latency
                    if sectors:
                        there = max(self.shared_free, self._moved(start, sectors)) + self.memory_latency
                        done += (there - done) * misses if there > done else 0.0
                    if kind == _COPY:
                        warp.open_copies = max(warp.open_copies, done)
                elif kind == _STORE:
                    self.shared_free = max(self.shared_free, start) + clocks
                    self._moved(start, sectors)
                elif kind == _WGMMA:
                    self.shared_free = max(self.shared_free, start) + shared
                    warp.products = max(pipes[pipe][scheduler], self.shared_free) + machine.wgmma_latency
                elif kind == _END_COPIES:
                    warp.copies.append(warp.open_copies)
                elif kind == _BARRIER:
                    warp.at = at + 1
                    return -start
            if kind != _WGMMA:
                for register in results:
                    registers[register] = done
            at += 1
            time = start + pace
        warp.at = at
        return -time

    def _moved(self, start: float, sectors: float) -> float:
        """When so many sectors have passed L2 and, as far as they are from there, DRAM."""
        self.l2_free = max(self.l2_free, start) + sectors * self.l2_clocks
        self.dram_free = max(self.dram_free, start) + sectors * self.dram_clocks
        return max(self.l2_free, self.dram_free)


_PIPES = ("integer", "float", "slow", "tensor")
_KINDS = ("plain", "shared", "load", "copy", "store", "wgmma", "BAR", "WARPGROUP", "DEPBAR", "LDGDEPBAR")
_SHARED_ACCESS, _LOAD, _COPY, _STORE, _WGMMA, _BARRIER, _WAIT_PRODUCTS, _WAIT_COPIES, _END_COPIES = range(
    1, len(_KINDS)
)

MOST_EVENTS = 120_000
"""Instructions of all warps that are simulated, if the blocks are short; the others follow at the same rate."""
