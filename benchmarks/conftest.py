import gc
import platform

import pytest
import torch
from comparison import COMPARISONS
from environment import environment

import noisyq_fast
from experiments.training.allocator import keep_freed_memory

KEEPS_FREED_MEMORY = keep_freed_memory()


def pytest_report_header():
    return conditions()


def pytest_terminal_summary(terminalreporter):
    if COMPARISONS:
        terminalreporter.write_line("\n" + "\n".join(conditions()))
    for comparison in COMPARISONS:
        terminalreporter.write_line("\n" + comparison.table())


def conditions():
    """What the numbers depend on."""
    allocator = "glibc keeps freed memory" if KEEPS_FREED_MEMORY else "as it is"
    lines = [
        f"processor: {processor()}; threads: {torch.get_num_threads()}; allocator: {allocator}",
        f"torch {torch.__version__}; noisyq_fast backend: {noisyq_fast.current_backend()}",
    ]
    if torch.cuda.is_available():
        lines += [f"{name}: {value}" for name, value in environment().items()]
    return lines


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def compiled_afresh():
    """Every comparison compiles for its own shapes, and leaves memory to the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
