"""Runs the benchmarks on the GPU, and writes what they measured as JSON and as Markdown tables.

The files, benchmarks/results/<name of the GPU>.json and .md, are replaced. Let nothing else run.
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import pytest
import torch
from environment import environment

HERE = Path(__file__).parent
METHOD = (
    "Medians of rounds in which all rows of a table took turns. Between device events; a call is "
    "part of a replayed CUDA graph that goes through inputs of twice the L2 and starts with cold "
    "caches, unless a note or the title says that it was launched from Python. GB/s: one read and "
    "one write of the tensor over the time. Nothing was asserted about times."
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-k", metavar="EXPRESSION", help="run only these (as pytest's -k)")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the results (%(default)s)"
    )
    parser.add_argument("--commit", help="what is measured, if not what git says is checked out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{parser.prog}: nothing measured: PyTorch finds no CUDA device", file=sys.stderr)
        return 1

    # Whole steps first: a run that is interrupted writes what it has.
    files = sorted((str(path) for path in HERE.glob("test_gpu_*.py")), reverse=True)
    selection = ["-k", options.k] if options.k else []
    status = pytest.main([*files, "--benchmark-only", "--benchmark-quiet", *selection])
    from comparison import COMPARISONS  # The one that the tests filled.

    if COMPARISONS:
        found = environment()
        if options.commit:
            found["commit"] = options.commit
        write(options.out, found, COMPARISONS)
    return int(status)


def write(folder: Path, found: dict[str, str], comparisons: list) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower())
    results = {"environment": found, "method": METHOD, "comparisons": list(map(entry, comparisons))}
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    about = "\n".join(f"- {name}: {value}" for name, value in found.items())
    tables = "\n\n".join(comparison.table() for comparison in comparisons)
    path.with_suffix(".md").write_text(f"# {found['gpu']}\n\n{about}\n\n{METHOD}\n\n{tables}\n")
    print(f"wrote {path}.json and {path}.md")


def entry(comparison) -> dict:
    """A comparison for JSON: of the rounds, the 20, 50 and 80 % quantiles in seconds."""
    quantiles = {}
    for name in comparison.medians():
        low, _, _, high = statistics.quantiles(comparison.seconds[name], n=5)
        quantiles[name] = [low, comparison.medians()[name], high]
    return {
        "title": comparison.title,
        "bytes_moved": comparison.bytes_moved,
        "ours": comparison.ours,
        "floor": comparison.floor,
        "seconds": quantiles,
        "notes": comparison.notes,
    }


if __name__ == "__main__":
    sys.exit(main())
