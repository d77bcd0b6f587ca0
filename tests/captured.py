"""CUDA graphs of calls."""

from experiments.training.cuda_graph import WARM_UP, on_side_stream, record


def captured(call):
    """A graph of the call, warmed up, and what the call returned."""
    on_side_stream(call, times=WARM_UP)
    return record(call)
