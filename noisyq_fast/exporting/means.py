"""The mean over all pixels that ends a chain of `fuse_` is summed in a fixed order. Graphs that are
traced have PyTorch's mean; that of an exported network is summed in the same order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from noisyq_fast.integer.chain import mean_of_pixels
from noisyq_fast.integer.deferred import Deferred

_MEANS = (torch.mean, Tensor.mean, F.adaptive_avg_pool2d)


class Means(TorchFunctionMode):
    """Sees all means of a call of the model; `again` makes those of chains as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.ends_chain: list[bool] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _MEANS:
            return func(*args, **(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        x = args[0] if args else (kwargs or {}).get("input")
        is_whole = made.shape[2:].numel() == 1 and made.dim() in (2, 4)
        self.ends_chain.append(
            isinstance(x, Deferred) and is_whole and made.shape[:2] == x.shape[:2]
        )
        return made

    def again(self) -> AbstractContextManager[object]:
        return _Again(self.ends_chain) if any(self.ends_chain) else nullcontext()


class _Again(TorchFunctionMode):
    def __init__(self, ends_chain: list[bool]) -> None:
        super().__init__()
        self.ends_chain = iter(ends_chain)

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if func not in _MEANS or not next(self.ends_chain, False):
            return made
        x = args[0] if args else (kwargs or {})["input"]
        if isinstance(x.shape[2], int) and isinstance(x.shape[3], int):
            return mean_of_pixels(x, keepdim=made.dim() == 4)
        return made
