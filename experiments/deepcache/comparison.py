"""What reuse saves on a sequence of frames, and what it changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.deepcache.cached_inference import CachedInference


@dataclass(frozen=True)
class Comparison:
    """A network on every frame anew, and with reuse."""

    plain: Tensor
    """The outputs `[N, ...]` of the network itself."""
    cached: Tensor
    """The outputs with reuse."""
    saved: float
    """The share of multiply-accumulates that reuse saves."""
    plain_seconds: float
    """Those of a frame."""
    cached_seconds: float


@torch.no_grad()
def compare(
    model: nn.Module, prepare: Callable[[Tensor], Tensor], frames: Tensor, **options: Any
) -> Comparison:
    """Runs a network on frames uint8 `[N, H, W, C]`, one by one; arguments are those of
    `CachedInference`. Each frame is computed in both ways in turn, so that both times suffer alike
    from whatever else the machine does."""
    cached = CachedInference(model, prepare, **options)
    seconds = {"plain": 0.0, "cached": 0.0}
    outputs: dict[str, list[Tensor]] = {"plain": [], "cached": []}
    model(prepare(frames[:1]))  # libraries choose their kernels in the first call
    for frame in frames:
        for name, forward in (
            ("plain", lambda frame: model(prepare(frame[None]))),
            ("cached", cached),
        ):
            started = time.perf_counter()
            outputs[name].append(forward(frame))
            seconds[name] += time.perf_counter() - started
    return Comparison(
        torch.cat(outputs["plain"]),
        torch.cat(outputs["cached"]),
        cached.work.saved,
        seconds["plain"] / len(frames),
        seconds["cached"] / len(frames),
    )
