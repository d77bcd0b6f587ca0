"""One training in several processes, started with torchrun: each computes a part of every batch.

In a single process everything here is a no-op.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisyq_fast import sync_ranges_
from noisyq_fast.layers.layer import QuantLayer


@contextmanager
def process_group(device_type: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, and gives this one's device.

    An error inside ends this process without leaving the group in order, which would wait for the
    others; torchrun ends those.
    """
    if started() <= 1:
        yield torch.device(device_type)
        return
    if device_type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device(device_type)
        dist.init_process_group("gloo")
    yield device
    dist.destroy_process_group()


def started() -> int:
    """How many processes torchrun started, even before they have joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0; torchrun's before it joins the others."""
    if size() > 1:
        return dist.get_rank()
    return int(os.environ["RANK"]) if started() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def shard(batch: Tensor) -> Tensor:
    """This rank's part of a batch along the first dimension; the parts differ by one at most.

    Example:
        >>> shard(torch.arange(5))  # in a single process
        tensor([0, 1, 2, 3, 4])
    """
    return batch.tensor_split(size())[rank()]


@torch.no_grad()
def gather(part: Tensor) -> Tensor:
    """The parts of all ranks, put together along the first dimension, on every rank.

    Args:
        part: at least 1-d, on the rank's device; only the first dimension may differ.

    Returns:
        Their concatenation in the order of the ranks: the inverse of `shard`. Without gradient.
    """
    if size() == 1:
        return part.detach()
    counts = _all_gather(torch.tensor([len(part)], device=part.device))
    lengths: list[int] = torch.cat(counts).tolist()
    # The backends gather tensors of one shape.
    padded = part.new_zeros(max(lengths), *part.shape[1:])
    padded[: len(part)] = part
    parts = _all_gather(padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def sum_(x: Tensor) -> Tensor:
    """The sum of all ranks' `x`, in its place; returns it."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def sum_gradients_(model: nn.Module) -> None:
    """Makes every gradient the sum of all ranks' gradients, in one message.

    The networks here are so small that overlapping it with the backward pass would gain nothing.
    """
    if size() == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = sum_(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view(gradient.shape))


def from_main(value: Any) -> Any:
    """The main process's `value`, on every rank."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def _all_gather(x: Tensor) -> list[Tensor]:
    outputs = [torch.empty_like(x) for _ in range(size())]
    dist.all_gather(outputs, x)
    return outputs


def synchronize_(model: nn.Module) -> nn.Module:
    """Makes batch norms and activation ranges those of the whole batch; returns the model."""
    if size() == 1:
        return model
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        sync_ranges_(model)
    return convert_batch_norm_(model)


def convert_batch_norm_(model: nn.Module) -> nn.Module:
    """Gives every batch norm the statistics of the ranks' batches together; returns the model.

    Parameters, buffers and their names stay. Call it when the model is on its device.
    """
    if size() == 1:
        return model
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(_BatchNorm):
    """`torch.nn.SyncBatchNorm`, which takes tensors on accelerators only, for the CPU.

    A rank's part of the batch may be empty. As in torch, the gradients of weight and bias are the
    rank's own, for `DistributedDataParallel` to reduce.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        mean, var = batch_statistics(self, x)
        scale = torch.rsqrt(var + self.eps)
        if self.affine:
            scale = scale * self.weight
        y = (x - _along_channels(mean, x)) * _along_channels(scale, x)
        if self.affine:
            y = y + _along_channels(self.bias, x)
        return y.to(x.dtype)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"x: got shape {list(x.shape)}, takes [B, C, ...]")


def batch_statistics(norm: _BatchNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of `x` over all ranks; moves the running ones.

    From `[B, C, ...]` to twice `[C]`, at least float32. Gradients go to the inputs of all ranks.
    """
    count = _count(x)
    # A GPU that waits for the other ranks would make us wait for the number.
    if (size() == 1 or not x.is_cuda) and count < 2:
        raise ValueError(f"x: got {count:.0f} values per channel in training, takes 2 or more")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    others = [dimension for dimension in range(x.ndim) if dimension != 1]
    # In float64, because a mean far from zero has few digits after the point.
    mean = (_Sum.apply(x.sum(others, dtype=torch.float64)) / count).to(x.dtype)
    var = _Sum.apply((x - _along_channels(mean, x)).square().sum(others)) / count
    if norm.track_running_stats:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
        momentum = norm.momentum
        if momentum is None:  # the mean of all batches
            momentum = 1 / norm.num_batches_tracked.item()
        with torch.no_grad():
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), momentum)
    return mean, var


def _count(x: Tensor) -> int | Tensor:
    """How many values a channel of `x` has on all ranks."""
    count = x.numel() // x.shape[1]
    if size() == 1:
        return count
    return sum_(torch.full((), count, dtype=torch.float64, device=x.device))


class _Sum(torch.autograd.Function):
    """The sum of all ranks' `x`, on which every rank's loss may depend."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return sum_(grad.clone())


def _along_channels(per_channel: Tensor, x: Tensor) -> Tensor:
    return per_channel.view(-1, *[1] * (x.ndim - 2))
