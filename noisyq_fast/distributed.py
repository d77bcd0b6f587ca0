"""Input ranges that agree across the processes of data-parallel training."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from noisyq_fast import checks
from noisyq_fast.backends import reference
from noisyq_fast.layers import QuantLayer
from noisyq_fast.ops import fake_quantize_ema

_INFINITY = float("inf")


def sync_ranges_(model: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Makes quantized layers record, in training, the absmax of the batches of all ranks together.

    Inputs are then quantized, and ``running_absmax`` updated, to the bit as one process would do
    with the whole batch; ranks that start with equal ranges keep them equal. Each layer adds one
    all-reduce, of 4 bytes for each range, to a forward in training, and nothing otherwise. Like
    `torch.nn.SyncBatchNorm`, layers compute as before where there are no other ranks: in a group
    of one, or while `torch.distributed` is not initialized.

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
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without quantized layers, takes what "
            "quantize_model_ returns"
        )
    for layer in layers:
        layer.fake_quantize_input = _FakeQuantizeTogether(process_group)
    return model


@dataclass(frozen=True)
class _FakeQuantizeTogether:
    """`fake_quantize_ema`, but the batch is that of all ranks."""

    process_group: dist.ProcessGroup | None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_FakeQuantizeTogether":
        return self  # A process group cannot be copied.

    def __call__(
        self,
        x: Tensor,
        running_absmax: Tensor,
        bits: int,
        *,
        axis: int | None,
        averaging_constant: float,
        training: bool,
        ste: str,
        delayed: bool,
    ) -> Tensor:
        if not training or not self._has_other_ranks():
            return fake_quantize_ema(
                x,
                running_absmax,
                bits,
                axis,
                averaging_constant=averaging_constant,
                training=training,
                ste=ste,
                delayed=delayed,
            )
        absmax = self._absmax(x, checks.front_axis(axis, x))
        known = torch.where(running_absmax.isnan(), absmax, running_absmax) if delayed else absmax
        # With the batch's own absmax nothing clips.
        ste = ste if delayed else "identity"
        y = fake_quantize_ema(x, known, bits, axis, training=False, ste=ste)
        reference.average_(running_absmax, absmax, averaging_constant)
        return y

    def _has_other_ranks(self) -> bool:
        if not (dist.is_available() and dist.is_initialized()):
            return False
        return dist.get_world_size(self.process_group) > 1

    @torch.no_grad()
    def _absmax(self, x: Tensor, axis: int | None) -> Tensor:
        """Each group's largest magnitude on any rank; -inf, which is no observation, without
        elements.

        A NaN becomes infinity: as an absmax both mean a NaN batch that is not recorded, but not
        every backend's maximum keeps a NaN.
        """
        if x.numel() == 0:
            shape = [] if axis is None else [x.shape[axis]]
            absmax = torch.full(shape, -_INFINITY, dtype=torch.float32, device=x.device)
        else:
            absmax = reference.absmax_of(x, axis).nan_to_num(nan=_INFINITY, posinf=_INFINITY)
        dist.all_reduce(absmax, dist.ReduceOp.MAX, self.process_group)
        return absmax
