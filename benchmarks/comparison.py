"""Times an operator and its peers in one process, in turns."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from experiments.allocator import page_faults

Call = Callable[[], object]
OURS = "noisyq_fast"


@dataclass
class Comparison:
    """What was measured: seconds of each round, and page faults of a call, by candidate."""

    title: str
    bytes_moved: int | None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, float] = field(default_factory=dict)

    def table(self) -> str:
        """Medians, and how many times longer than ours each candidate takes."""
        medians = {name: statistics.median(times) for name, times in self.seconds.items()}
        rows = [["", "median", "ratio to noisyq_fast", "page faults"]]
        if self.bytes_moved:
            rows[0].insert(2, "GB/s")
        for name in sorted(medians, key=medians.get):
            row = [
                name,
                f"{1e3 * medians[name]:.3f} ms",
                f"{medians[name] / medians[OURS]:.2f}",
                f"{self.faults[name]:.0f}",
            ]
            if self.bytes_moved:
                row.insert(2, f"{self.bytes_moved / medians[name] / 1e9:.1f}")
            rows.append(row)
        rows.insert(1, ["---", *["---:"] * (len(rows[0]) - 1)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
            for row in rows
        ]
        return "\n".join([f"**{self.title}**", "", *lines])


COMPARISONS: list[Comparison] = []


def compare(
    benchmark: Callable,
    title: str,
    candidates: dict[str, Call],
    rounds: int,
    bytes_moved: int | None = None,
) -> None:
    """Times all candidates in turns, in a random order each round, for the table at the end.

    pytest-benchmark measures ours between the rounds, for its own report.
    """
    result = Comparison(title, bytes_moved, {name: [] for name in candidates})
    for call in candidates.values():
        for _ in range(3):  # compiles, fills caches, keeps freed memory
            call()

    def time_all() -> None:
        for name in random.sample(sorted(candidates), len(candidates)):
            start = time.perf_counter()
            candidates[name]()
            result.seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(candidates[OURS], setup=time_all, rounds=rounds)
    for name, call in candidates.items():
        before = page_faults()
        for _ in range(5):
            call()
        result.faults[name] = (page_faults() - before) / 5
    benchmark.extra_info["seconds"] = result.seconds
    COMPARISONS.append(result)
