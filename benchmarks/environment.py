"""What results on a GPU depend on."""

import platform
import subprocess
from pathlib import Path

import torch

import noisyq_fast

UNKNOWN = "unknown"


def environment() -> dict[str, str]:
    info = noisyq_fast.info()
    properties = torch.cuda.get_device_properties("cuda")
    return {
        "commit": commit(),
        "gpu": properties.name,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda or UNKNOWN,
        "torch": torch.__version__,
        "triton": info.versions.get("triton", UNKNOWN),
        "python": platform.python_version(),
        **{f"backend {name}": reason or "usable" for name, reason in info.backends.items()},
    }


def commit() -> str:
    """The one that is checked out, and whether files differ from it."""
    head = output_of("git", "rev-parse", "HEAD")
    changed = head != UNKNOWN and output_of("git", "status", "--porcelain") != UNKNOWN
    return f"{head} with changes" if changed else head


def output_of(*command: str) -> str:
    """The first line of what a program prints, if there is such a program and such a line."""
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    lines = result.stdout.strip().splitlines()
    return lines[0] if result.returncode == 0 and lines else UNKNOWN
