"""Input ranges that agree across the processes of data-parallel training."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noisyq_fast.backends.reference.levels import range_of
from noisyq_fast.grid import Grid
from noisyq_fast.integer.deferred import Deferred
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.operators import checks
from noisyq_fast.quantizers import LearnedQuantizer, MovingAbsMax

_INFINITY = float("inf")


def sync_ranges_(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Makes quantized layers observe, in training, the range over the batches of all ranks.

    Inputs are then quantized, and the moving averages updated, with the same bits as in one process
    with the whole batch; ranks that start with equal ranges keep them equal. In training, each
    layer adds one all-reduce to the forward, of 4 bytes per range (8 on an affine grid); in
    evaluation there is none. Like `torch.nn.SyncBatchNorm`, layers compute as before if there are
    no other ranks: in a group of one, or while `torch.distributed` is not initialized. Learned
    quantizers initialize their parameters from the first batch of all ranks; afterwards the
    averaging of gradients keeps these equal.

    Args:
        model: a module with quantized layers, such as `quantize_model_` returns. Changed in place;
            the names in its state dict stay.
        process_group: the ranks that share a batch; ``None``: all. In training, every rank must
            call the same layers in the same order. A rank's part of the batch may be empty.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or ``process_group`` not a group of this process.
        ValueError: a model without quantized layers.

    Example:
        >>> import noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> model = noisyq_fast.sync_ranges_(noisyq_fast.quantize_model_(model))

        Then, as usual: ``torch.nn.parallel.DistributedDataParallel(model)``.
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
    """Reduces a tensor over all ranks, to initialize a learned quantizer."""

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
    """The range of a batch that is spread over the ranks."""

    process_group: dist.ProcessGroup | None
    grid: Grid

    def __deepcopy__(self, memo: dict[int, Any]) -> "_RangeOfRanks":
        return self  # A process group cannot be copied.

    @torch.no_grad()
    def __call__(self, x: Tensor, axis: int | None) -> Tensor | None:
        """Like `range_of`, but over all ranks; infinite, which is not recorded, if no rank has
        elements. None if there are no other ranks.

        A NaN becomes infinity: either makes the batch NaN and is not recorded, but the maximum of
        some communication backends drops a NaN.
        """
        if not has_other_ranks(self.process_group):
            return None
        ends = x.range_on(self.grid) if isinstance(x, Deferred) and axis is None else None
        ends = range_of(x, self.grid, checks.front_axis(axis, x)) if ends is None else ends.clone()
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
