"""A training step that is recorded once and replayed."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

WARM_UP = 3
"""Calls before a recording: they let libraries choose their kernels."""


def on_side_stream(call: Callable[[], T], times: int = 1) -> T:
    """Makes calls on a stream of their own, as a recording that is to come asks for; gives what the
    last returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            returned = call()
    torch.cuda.current_stream().wait_stream(side)
    return returned


def record(call: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of a call that has been made before, and what the call returned: each replay
    writes there."""
    graph = torch.cuda.CUDAGraph()
    # Threads that fetch the next pictures go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        returned = call()
    return graph, returned


class GraphedStep:
    """Calls `step` on its own stream for the first batches, then records it as a CUDA graph.
    Batches of another size are computed as they come.

    Inputs are copied to where the graph reads them, constants are recorded; outputs stay valid
    until the next call.
    """

    def __init__(self, step: Callable[..., Any]) -> None:
        # What a forward before has recorded may live on in a reference cycle (torch-pruning leaves
        # some), and with it the nodes that accumulate gradients: they would run on the stream of
        # that forward, which a recording forbids.
        gc.collect()
        self.step = step
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: tuple[Tensor, ...] | None = None
        self.outputs: Any = None
        self.calls = 0

    def __call__(self, *inputs: Tensor, **constants: Any) -> Any:
        if self.inputs is None:
            self.inputs = tuple(tensor.clone() for tensor in inputs)
        if any(given.shape != kept.shape for given, kept in zip(inputs, self.inputs, strict=True)):
            return self.step(*inputs, **constants)
        self.calls += 1
        if self.calls <= WARM_UP:
            return on_side_stream(partial(self.step, *inputs, **constants))
        for given, kept in zip(inputs, self.inputs, strict=True):
            kept.copy_(given)
        if self.graph is None:
            self.graph, self.outputs = record(partial(self.step, *self.inputs, **constants))
        self.graph.replay()
        return self.outputs
