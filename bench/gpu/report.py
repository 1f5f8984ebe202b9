"""The tables of a run, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .journal import BAD, Record, Run

LINES = 20
"""Rows of the kernels of a step."""
HEADINGS = {
    "ours": "ours",
    "reference": "plain PyTorch",
    "compiled": "torch.compile",
    "published": "published",
}


def document(run: Run) -> str:
    """The short tables: training step, optimizers and operators."""
    return _joined([title(run), steps(run), optimizers(run), operators(run)])


def everything(run: Run) -> str:
    """All tables, and what was not done."""
    kernels = [profile(record) for record in run.of("profile") if record.values]
    tables = values(run), sanitizer(run), sync(run), steps(run), *kernels, optimizers(run), operators(run)
    return _joined([title(run), *tables, undone(run)])


def title(run: Run) -> str:
    """Where, with what and when."""
    facts = run.facts
    driver = f", driver {facts['driver']}" if facts["driver"] else ""
    lines = [
        f"{facts['device']}{driver}, torch {facts['torch']}, triton {facts['triton']}, Python {facts['python']}, "
        f"commit {facts['commit'] or 'unknown'}, {facts['date']}"
    ]
    if facts.get("tiny"):
        lines.append("A trial at tiny sizes: its times say nothing.")
    if "copy_bandwidth" in facts:
        rates = ", ".join(
            f"{rate / 1e12:.3g} TFLOP/s {name}" for name, rate in facts.get("matrix_rate", {}).items()
        )
        lines.append(f"Copies {facts['copy_bandwidth'] / 1e9:.4g} GB/s; multiplies matrices with {rates}.")
    return "\n\n".join(lines)


def values(run: Run) -> str:
    """Errors beside float64, by operator and precision."""
    rows = []
    for record in run.of("values"):
        found, status = record.values, record.status
        name, _, precision = record.name.rpartition(", ")
        where = found.get("at", "") if status in BAD else ""
        verdict = "ok" if status == "done" else f"{status} {where}".strip()
        errors = _number(found.get("error")), _number(found.get("plain_error"))
        repeats = "yes" if found.get("repeats") else ""
        rows.append([name, precision, str(found.get("checks", "")), *errors, repeats, verdict])
    head = "values and gradients", "precision", "checks", "error", "plain PyTorch's", "repeats", "verdict"
    return _table(head, rows)


def sanitizer(run: Run) -> str:
    """What compute-sanitizer said."""
    return _table(("compute-sanitizer", ""), [[r.name, _ending(r)] for r in run.of("sanitizer")])


def sync(run: Run) -> str:
    """Whether a step waits for the GPU."""
    rows = [[r.name, "no" if r.status == "done" else _ending(r)] for r in run.of("sync")]
    return _table(("training step", "waits for the GPU"), rows)


def steps(run: Run) -> str:
    """Training steps by precision: time by provider, as a CUDA graph, on the device, and memory."""
    by = {record.name: record.values for record in run.of("step")}
    graphs = {record.name: record.values for record in run.of("graph")}
    precisions = list(dict.fromkeys([name.rpartition(", ")[2] for name in by] + list(graphs)))
    rows = []
    for precision in precisions:
        own, graph = by.get(f"ours, {precision}", {}), graphs.get(precision, {})
        row = [precision, _ms(graph.get("seconds")), _ms(graph.get("device_seconds"))]
        row += [_ms(by.get(f"{who}, {precision}", {}).get("seconds")) for who in HEADINGS]
        row += [_mb(by.get(f"{who}, {precision}", {}).get("peak_bytes")) for who in HEADINGS]
        rows.append([*row, _ms(own.get("host_seconds")), _count(own.get("launches"))])
    head = ["training step, ms", "ours, CUDA graph", "its kernels", *(HEADINGS[who] for who in HEADINGS)]
    return _table([*head, *(f"MB, {HEADINGS[who]}" for who in HEADINGS), "host time, ours", "launches"], rows)


def profile(record: Record) -> str:
    """The longest kernels of a step."""
    rows = [
        [f"`{name[:80]}`", _count(calls), _us(seconds)] for name, calls, seconds in record.values["kernels"]
    ]
    return _table((f"kernels of a step, {record.name}", "calls", "us"), rows[:LINES])


def optimizers(run: Run) -> str:
    """Steps of optimizers."""
    rows = []
    for record in run.of("optimizers"):
        found = record.values
        if "seconds" not in found:
            continue
        times = [
            _us(found.get(key)) for key in ("device_seconds", "floor_seconds", "seconds", "host_seconds")
        ]
        parameters, _, name = record.name.partition(", ")
        rows.append(
            [f"{parameters}, {found['tensors']} tensors", name, *times, _count(found.get("launches"))]
        )
    return _table(("optimizer step, us", "", "device", "floor", "whole", "host", "launches"), rows)


def operators(run: Run) -> str:
    """Operators: kernels' time of each provider, the floor, and ours as its multiple. Kernels that are wrong are marked."""
    wrong = {record.name for record in run.of("values") if record.status in BAD}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in run.of("operators"):
        name, precision, provider = record.name.split(", ")
        found.setdefault((name, precision), {})[provider] = record.values
    rows = []
    for (name, precision), by in found.items():
        for direction, called in (("forward", "forward"), ("both", "forward and backward")):
            cells = {who: part[direction] for who, part in by.items() if direction in part}
            if not cells:
                continue
            floor = next(iter(cells.values()))["floor_seconds"]
            shown = [_us(_device(cells.get(who))) for who in HEADINGS]
            own = _device(cells.get("ours"))
            ratio = "" if own is None else f"{own / floor:.2f}"
            mark = " (values are wrong)" if f"{name}, {precision}" in wrong else ""
            rows.append([f"{name}{mark}", precision, called, *shown, _us(floor), ratio])
    head = ("operator, us of its kernels", "precision", "", *HEADINGS.values(), "floor", "ours / floor")
    return _table(head, rows)


def undone(run: Run) -> str:
    """What is not done, and why; what was never reached is counted."""
    lines = [
        f"- {record.phase}: {record.name}: {record.status}: {_indented(record)}"
        for record in run.records
        if record.status != "done"
    ]
    missing = run.planned - len(run.records)
    lines += [f"- {missing} of {run.planned} items were not reached"] if missing else []
    return "\n".join(["Not done:", *lines]) if lines else ""


def _indented(record: Record) -> str:
    return (record.reason or "the run was killed").strip().replace("\n", "\n    ")


def _ending(record: Record) -> str:
    reason = (record.reason or "").partition("\n")[0]
    return "ok" if record.status == "done" else f"{record.status}: {reason}"


def _device(part: dict[str, Any] | None) -> float | None:
    return None if part is None else part.get("device_seconds")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{1e3 * value:.4g}"


def _us(value: float | None) -> str:
    return "" if value is None else f"{1e6 * value:.4g}"


def _mb(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f}"


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Empty without rows; columns without a cell are left out."""
    if not rows:
        return ""
    kept = [i for i in range(len(head)) if i == 0 or any(row[i] for row in rows)]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line[i].replace('|', '/') for i in kept)} |" for line in lines)
