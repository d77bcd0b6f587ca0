"""A training step that is recorded once and replayed."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_WARM_UP = 3


class GraphedStep:
    """Calls `step` on its own stream for the first batches, which let libraries choose their
    kernels, then records it as a CUDA graph. Batches of another size are computed as they come.

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
        if self.calls <= _WARM_UP:
            return self._on_side_stream(inputs, constants)
        for given, kept in zip(inputs, self.inputs, strict=True):
            kept.copy_(given)
        if self.graph is None:
            self._record(constants)
        self.graph.replay()
        return self.outputs

    def _on_side_stream(self, inputs: tuple[Tensor, ...], constants: dict[str, Any]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            outputs = self.step(*inputs, **constants)
        torch.cuda.current_stream().wait_stream(side)
        return outputs

    def _record(self, constants: dict[str, Any]) -> None:
        self.graph = torch.cuda.CUDAGraph()
        # Threads that fetch the next pictures go on meanwhile.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.outputs = self.step(*self.inputs, **constants)
