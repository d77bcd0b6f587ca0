"""Input ranges that agree across the processes of data-parallel training."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noisyq_fast.backends import reference
from noisyq_fast.grid import Grid
from noisyq_fast.integer.deferred import Deferred
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.operators import checks
from noisyq_fast.quantizers import LearnedQuantizer, MovingAbsMax

_INFINITY = float("inf")


def sync_ranges_(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Makes quantized layers record, in training, the range of the batches of all ranks together.

    Inputs are then quantized, and the moving averages updated, to the bit as one process would do
    with the whole batch; ranks that start with equal ranges keep them equal. Each layer adds one
    all-reduce, of 4 bytes for each range (8 on an affine grid), to a forward in training, and
    nothing otherwise. Like `torch.nn.SyncBatchNorm`, layers compute as before where there are no
    other ranks: in a group of one, or while `torch.distributed` is not initialized. Quantizers that
    learn begin with the first batch of all ranks together; their parameters are then kept equal by
    whatever averages gradients.

    Args:
        model: a module with quantized layers, such as `quantize_model_` returns. Changed in place;
            the names in its state dict stay.
        process_group: the ranks that share a batch; ``None``: all. In training, each must call the
            same layers in the same order. A rank's part may be empty.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no module, or ``process_group`` no group of this process.
        ValueError: a model without quantized layers.

    Example:
        >>> import noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> model = noisyq_fast.sync_ranges_(noisyq_fast.quantize_model_(model))

        Then, as ever: ``torch.nn.parallel.DistributedDataParallel(model)``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        # torch.distributed.new_group returns an int to the ranks that are not in the group.
        raise TypeError(
            f"process_group: got {process_group!r}, takes None or a torch.distributed.ProcessGroup "
            "that this process belongs to"
        )
    if not any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ValueError(
            f"model: got {type(model).__name__} without quantized layers, takes what "
            "quantize_model_ returns"
        )
    for module in model.modules():
        if isinstance(module, MovingAbsMax):
            module.range_of_ranks = _RangeOfRanks(process_group, module.grid)
        elif isinstance(module, LearnedQuantizer):
            module.sum_of_ranks = _OfRanks(process_group, dist.ReduceOp.SUM)
            module.max_of_ranks = _OfRanks(process_group, dist.ReduceOp.MAX)
    return model


@dataclass(frozen=True)
class _OfRanks:
    """Values of all ranks, reduced: what a quantizer that learns begins with."""

    process_group: dist.ProcessGroup | None
    operation: Any

    def __deepcopy__(self, memo: dict[int, Any]) -> "_OfRanks":
        return self

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Tensor:
        if has_other_ranks(self.process_group):
            values = values.clone()
            dist.all_reduce(values, self.operation, self.process_group)
        return values


@dataclass(frozen=True)
class _RangeOfRanks:
    """The range of a batch of which every rank has a part."""

    process_group: dist.ProcessGroup | None
    grid: Grid

    def __deepcopy__(self, memo: dict[int, Any]) -> "_RangeOfRanks":
        return self  # A process group cannot be copied.

    @torch.no_grad()
    def __call__(self, x: Tensor, axis: int | None) -> Tensor | None:
        """As from `reference.range_of`, equal on all ranks; infinite, which is no observation,
        without elements. None where there are no other ranks.

        A NaN becomes infinity: as a range both mean a NaN batch that is not recorded, but not
        every backend's maximum keeps a NaN.
        """
        if not has_other_ranks(self.process_group):
            return None
        ends = x.range_on(self.grid) if isinstance(x, Deferred) and axis is None else None
        if ends is None:
            ends = reference.range_of(x, self.grid, checks.front_axis(axis, x))
        else:
            ends = ends.clone()
        if self.grid.is_affine:
            ends[0].neg_()  # so that both ends are maxima
        if x.numel() == 0:
            ends.fill_(-_INFINITY)
        ends = ends.nan_to_num(nan=_INFINITY, posinf=_INFINITY, neginf=-_INFINITY)
        dist.all_reduce(ends, dist.ReduceOp.MAX, self.process_group)
        if self.grid.is_affine:
            ends[0].neg_()
        return ends


def has_other_ranks(process_group: dist.ProcessGroup | None) -> bool:
    if not (dist.is_available() and dist.is_initialized()):
        return False
    return dist.get_world_size(process_group) > 1
