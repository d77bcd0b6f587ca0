"""Times candidates (ours and its peers) in one process, in turns."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.training.allocator import page_faults

Call = Callable[[], object]
OURS = "noisyq_fast"
UNITS = {"ms": 1e3, "us": 1e6}


@dataclass
class Comparison:
    """What was measured, by candidate.

    Attributes:
        title: what was computed, on what.
        bytes_moved: what a call reads and writes at least; ``None`` where that says little.
        ours: the candidate that the others are compared with.
        floor: the candidate that only copies as many bytes, if there is one.
        unit: of the table, a key of ``UNITS``.
        seconds: of each round.
        faults: page faults of a call.
        notes: what is special about a candidate, or why it could not be timed.
    """

    title: str
    bytes_moved: int | None = None
    ours: str = OURS
    floor: str | None = None
    unit: str = "ms"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        """Seconds, the fastest candidate first."""
        medians = {name: statistics.median(times) for name, times in self.seconds.items()}
        return dict(sorted(medians.items(), key=lambda item: item[1]))

    def table(self) -> str:
        """Medians, and how many times longer than ours each candidate takes."""
        medians = self.medians()
        columns = {
            "": [f"{name} *" if name in self.notes else name for name in medians],
            "median": [f"{UNITS[self.unit] * m:.3f} {self.unit}" for m in medians.values()],
        }
        if self.bytes_moved:
            columns["GB/s"] = [f"{self.bytes_moved / m / 1e9:.1f}" for m in medians.values()]
        columns[f"ratio to {self.ours}"] = [
            f"{m / medians[self.ours]:.2f}" for m in medians.values()
        ]
        if self.floor:
            columns["of the copy's speed"] = [
                f"{medians[self.floor] / m:.0%}" for m in medians.values()
            ]
        if self.faults:
            columns["page faults"] = [f"{self.faults[name]:.0f}" for name in medians]
        lines = markdown(columns)
        notes = ["", *[f"\\* {name}: {note}  " for name, note in self.notes.items()]]
        return "\n".join([f"**{self.title}**", "", *lines, *(notes if self.notes else [])])


@dataclass
class Sizes:
    """Bytes that training steps keep, by candidate, as a table with ratios to ``ours``.

    Attributes:
        saved: for the backward.
        peak: at most, beyond what there was before.
    """

    title: str
    ours: str
    saved: dict[str, int] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def table(self) -> str:
        columns = {"": list(self.saved)}
        for name, sizes in (("saved for backward", self.saved), ("peak", self.peak)):
            columns[name] = [f"{size / 2**20:.1f} MiB" for size in sizes.values()]
            columns[f"{name}, ratio to {self.ours}"] = [
                f"{size / sizes[self.ours]:.2f}" for size in sizes.values()
            ]
        return "\n".join([f"**{self.title}**", "", *markdown(columns)])


def markdown(columns: dict[str, list[str]]) -> list[str]:
    """The lines of a table; all columns but the first are numbers."""
    rows = [
        list(columns),
        ["---", *["---:"] * (len(columns) - 1)],
        *zip(*columns.values(), strict=True),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]


COMPARISONS: list[Comparison | Sizes] = []


def compare(
    benchmark: Callable,
    title: str,
    candidates: dict[str, Call],
    rounds: int,
    bytes_moved: int | None = None,
    ours: str = OURS,
) -> None:
    """Times candidates on the CPU, for the table at the end, which compares them with ``ours``."""
    comparison = Comparison(title, bytes_moved, ours)
    time_in_turns(benchmark, comparison, candidates, rounds, wall_time)
    for name, call in candidates.items():
        before = page_faults()
        for _ in range(5):
            call()
        comparison.faults[name] = (page_faults() - before) / 5


def time_in_turns(
    benchmark: Callable,
    comparison: Comparison,
    candidates: dict[str, Call],
    rounds: int,
    seconds: Callable[[Call], float],
) -> None:
    """Times all candidates in turns, in a random order each round.

    pytest-benchmark measures ours between the rounds, for its own report.
    """
    comparison.seconds = {name: [] for name in candidates}
    for call in candidates.values():
        for _ in range(3):  # compiles, fills caches, keeps freed memory
            call()

    def time_all() -> None:
        for name in random.sample(sorted(candidates), len(candidates)):
            comparison.seconds[name].append(seconds(candidates[name]))

    benchmark.pedantic(candidates[comparison.ours], setup=time_all, rounds=rounds)
    benchmark.extra_info["seconds"] = comparison.seconds
    COMPARISONS.append(comparison)


def wall_time(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
