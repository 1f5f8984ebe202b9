"""Faults that a run of the emulator found."""

from __future__ import annotations

from dataclasses import dataclass, field

OUT_OF_BOUNDS = "out of bounds"
MISALIGNED = "misaligned"
RACE = "race"
UNINITIALISED = "uninitialised"
NOT_AWAITED = "not awaited"
NOT_FENCED = "not fenced"
PADDING = "no padding"


@dataclass
class Findings:
    """Faults by kind and instruction; an instruction that repeats a fault is counted, not listed again."""

    found: dict[tuple[str, str], str] = field(default_factory=dict)
    """(kind, instruction) -> what happened first."""
    counts: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, kind: str, instruction: str, what: str) -> None:
        """Add a fault of an instruction."""
        self.found.setdefault((kind, instruction), what)
        self.counts[kind, instruction] = self.counts.get((kind, instruction), 0) + 1

    @property
    def kinds(self) -> set[str]:
        """The kinds of the faults."""
        return {kind for kind, _ in self.found}

    def lines(self, kernel: str) -> list[str]:
        """One line for each fault."""
        return [
            f"{kernel}: {kind}: {what} ({self.counts[kind, instruction]} times) in {instruction}"
            for (kind, instruction), what in self.found.items()
        ]
