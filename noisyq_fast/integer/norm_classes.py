"""The classes of batch norms that `fuse_` makes exact: those of PyTorch, torchvision's
`FrozenBatchNorm2d`, and subclasses.

A subclass keeps its own forward. There `super().forward` is the exact batch norm, and so is
`torch.nn.functional.batch_norm`, called with the module's own statistics, weight and bias as by
`torch.nn.BatchNorm2d`: an activation or a dropout may follow. A forward that does something else
with its input reads the values, and `fuse_` leaves such a batch norm as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from noisyq_fast.integer.batch_norm import ExactBatchNorm
from noisyq_fast.integer.chain import record_refusal
from noisyq_fast.integer.deferred import Deferred

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_FROZEN = "torchvision.ops.misc.FrozenBatchNorm2d"  # of a package that is not imported here


def can_be_exact(module: nn.Module) -> bool:
    """Whether a module is a batch norm that can have the class of `exact`. A parametrized module
    has a class of its own, which changes back when it is not parametrized any more."""
    has_other = isinstance(module, ExactBatchNorm) or is_parametrized(module)
    return _base(type(module)) is not None and not has_other


def _base(norm: type[nn.Module]) -> type[nn.Module] | None:
    """The class of batch norms that a class is or derives from."""
    return next((cls for cls in norm.__mro__ if cls in _NORMS or _is_frozen(cls)), None)


def _is_frozen(cls: type) -> bool:
    return f"{cls.__module__}.{cls.__qualname__}" == _FROZEN


class _ExactFrozen(ExactBatchNorm):
    """Uses its running statistics in training too; they and its weight and bias are buffers."""

    num_batches_tracked = None

    @property
    def num_features(self) -> int:  # type: ignore[override]
        return len(self.weight)

    def moves_statistics(self) -> bool:
        return False

    def _takes_batch(self) -> bool:
        return False


class BatchNormCall(NamedTuple):
    """The arguments of `torch.nn.functional.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def is_own(self, norm: Any) -> bool:
        """Whether `torch.nn.BatchNorm2d` would call the function in the same way for this module,
        after it has counted the batch."""
        moves = norm.training and norm.track_running_stats
        running = norm.running_mean, norm.running_var
        tensors = *(running if moves or not norm.training else (None, None)), norm.weight, norm.bias
        if not all(given is own for given, own in zip(self[1:5], tensors, strict=True)):
            return False
        if self.training != (norm.training or norm.running_mean is None) or self.eps != norm.eps:
            return False
        batches, momentum = norm.num_batches_tracked, norm.momentum
        if moves and momentum is None and batches is not None:
            momentum = 1 / float(batches)
        return not moves or (batches is not None and self.momentum == momentum)


if TYPE_CHECKING:
    _Mixed = ExactBatchNorm
else:
    _Mixed = object  # `exact` mixes it with a subclass


class _OwnForward(_Mixed):
    """An exact batch norm whose class has a forward of its own."""

    has_own_forward = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _BatchNormOf(self, (*args, *kwargs.values())):
            return super().forward(*args, **kwargs)


class _BatchNormOf(TorchFunctionMode):
    """Within it, calls of `F.batch_norm` are exact if they normalize the input of a module as the
    module would."""

    def __init__(self, norm: ExactBatchNorm, inputs: tuple[Any, ...]) -> None:
        super().__init__()
        self.norm, self.inputs = norm, inputs
        self.is_done = False

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is F.batch_norm:
            return self._of(BatchNormCall(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))

    def _of(self, call: BatchNormCall) -> Tensor:
        norm, input = self.norm, call.input
        is_own = call.is_own(norm)
        if isinstance(input, Deferred):
            if is_own and norm.ranks_of_batch() is None:
                batches = norm.num_batches_tracked if norm.moves_statistics() else None
                # The forward has counted this batch already.
                made = norm.of_deferred(input, None if batches is None else batches - 1)
                if made is not None:
                    return made
        elif norm.is_normalized(input):
            is_input = any(input is given for given in self.inputs)
            if is_input and is_own and not self.is_done:
                self.is_done = True
                return input
            if is_input or is_own:
                raise ValueError(
                    f"{norm.float_class.__name__}: got a call of batch_norm with other arguments "
                    "than the module's own statistics and its input, or a second one, which cannot "
                    "be traced; call fuse_ again before"
                )
        if is_own:
            record_refusal(norm)
        return F.batch_norm(*call)


def _exact(norm: type[nn.Module]) -> Any:
    namespace = {
        "__reduce_ex__": lambda self, _: (_new, (norm,), self.__getstate__()),
        "float_class": norm,
    }
    base = _base(norm)
    assert base is not None  # see `can_be_exact`
    bases: tuple[type, ...] = _ExactFrozen if _is_frozen(norm) else ExactBatchNorm, norm
    if norm is not base:
        # In this order `super().forward` in the subclass is that of `ExactBatchNorm`.
        bases = norm, exact(base)
        if norm.forward is not base.forward:
            bases = _OwnForward, *bases
    return type(f"Exact{norm.__name__}", bases, namespace)


exact: Callable[..., Any] = functools.cache(_exact)
"""The class of a batch norm with `ExactBatchNorm`."""


def _new(norm: type[nn.Module]) -> nn.Module:
    cls = exact(norm)
    return cls.__new__(cls)
