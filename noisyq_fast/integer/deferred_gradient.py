"""The gradient of an integer layer's sums before it is written as floats.

The backward of the layer computes it on the fly, a few pixels at a time, where it multiplies it;
any other reader gets its values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from noisyq_fast.backends import select
from noisyq_fast.backends.reference.sums import GradOfSums


class DeferredGradient(Tensor):
    """A tensor whose values are computed when something reads them."""

    made_of: GradOfSums
    _computed: Tensor | None
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @classmethod
    def of(cls, made_of: GradOfSums) -> DeferredGradient:
        grad, sums = made_of.grad, made_of.sums
        made = Tensor._make_wrapper_subclass(
            cls, sums.shape, strides=sums.stride(), dtype=grad.dtype, device=grad.device
        )
        made.made_of, made._computed = made_of, None
        return made

    def current(self) -> GradOfSums | Tensor:
        """The values if they were computed, else the tensors that they are computed from."""
        return self.made_of if self._computed is None else self._computed

    def values(self) -> Tensor:
        """The values, as an ordinary tensor."""
        if self._computed is None:
            compute = select("grads_of_sums", self.made_of.sums.device.type)
            self._computed = compute(*self.made_of)
        return self._computed

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(cls, cls.values, (args, kwargs or {}))
        return func(*args, **kwargs)
