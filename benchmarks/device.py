"""Times work on a GPU: in device events, as replayed CUDA graphs, from cold caches."""

import time
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import pytest
import torch
from comparison import OURS, Call, Comparison, time_in_turns
from torch import Tensor

from experiments.training.cuda_graph import WARM_UP, on_side_stream, record
from noisyq_fast import current_backend, use_backend
from noisyq_fast.backends import BACKENDS

T = TypeVar("T")

MOST_INPUTS = 200


def synchronized_clock() -> float:
    """For pytest-benchmark's own report."""
    torch.cuda.synchronize()
    return time.perf_counter()


# For `pytestmark` of a benchmark that needs a GPU.
MARKS = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device"),
    pytest.mark.usefixtures("compiled_afresh"),
    pytest.mark.benchmark(timer=synchronized_clock),
]


def compare_on_device(
    benchmark: Callable,
    comparison: Comparison,
    candidates: dict[str, Callable[[], Call]],
    rounds: int,
    calls: int = 1,
    capture: bool = True,
) -> None:
    """Times candidates on the GPU, for the table at the end.

    Args:
        benchmark: pytest-benchmark's fixture.
        comparison: receives the results.
        candidates: make what is timed. A peer that fails is left out, with a note.
        rounds: how often each is timed.
        calls: how many calls of an operator each candidate makes; times are of one call.
        capture: whether to replay CUDA graphs: the time of the device, without that of Python.
    """
    ready = {}
    for name, make in candidates.items():
        try:
            call = make()
            warm_up(call)
            if capture and waits_for_device(call):
                comparison.notes[name] = "waits for the device, so launched from Python each time"
            elif capture:
                call = Replay(call)
        except Exception as error:
            if name.startswith(OURS):
                raise
            comparison.notes[name] = f"not timed: {str(error).strip().splitlines()[0]}"
            continue
        ready[name] = call
    time_in_turns(benchmark, comparison, ready, rounds, lambda call: device_time(call) / calls)


def by_backend(make: Callable[[], Call]) -> dict[str, Callable[[], Call]]:
    """Ours, by each backend that is usable on the GPU, but for the reference, which is not fast."""
    names = [
        name
        for name, backend in BACKENDS.items()
        if name != "reference" and backend.takes("cuda") and backend.unavailable() is None
    ]
    return {our_name(name): lambda name=name: _with_backend(name, make()) for name in names}


def our_name(backend: str | None = None) -> str:
    """Of the row of a backend; without one, of the backend that is chosen by itself."""
    return f"{OURS} ({backend or current_backend('cuda')})"


def _with_backend(name: str, call: Call) -> Call:
    def run() -> None:
        with use_backend(name):
            call()

    return run


class Replay:
    """A call as a CUDA graph. It keeps the call, and so all the memory that the graph refers to."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.graph, _ = record(call)

    def __call__(self) -> None:
        self.graph.replay()


def warm_up(call: Call) -> None:
    """Compiles and allocates."""
    on_side_stream(call, times=WARM_UP)
    torch.cuda.synchronize()


def waits_for_device(call: Call) -> bool:
    """Asked before a capture, because one that fails spoils those that follow."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def device_time(call: Call) -> float:
    """Seconds between two events around the work of a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Leaves other things in the caches, and keeps the device busy while the host queues the call.
    _other_memory().sum()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


@cache
def _other_memory() -> Tensor:
    """512 MB, several times the L2 of any GPU."""
    return torch.ones(2**27, device="cuda")


def rotated(make: Callable[[], T], nbytes: int) -> list[T]:
    """Inputs to be used in turns, so that none is still in the L2 when it is used again."""
    l2 = torch.cuda.get_device_properties("cuda").L2_cache_size
    return [make() for _ in range(inputs_past(l2, nbytes))]


def inputs_past(l2: int, nbytes: int) -> int:
    """How many inputs fill the L2 twice: at least 2, and at most `MOST_INPUTS`, which is enough
    to make a graph's launch negligible; each is used once, from cold caches, a replay.

    Example:
        >>> inputs_past(60 << 20, 8 << 20), inputs_past(60 << 20, 1 << 30), inputs_past(1, 1 << 10)
        (15, 2, 2)
    """
    return max(2, min(-(-2 * l2 // nbytes), MOST_INPUTS))


def one_after_another(calls: list[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run
