"""One training in several processes, started with torchrun: each computes a part of every batch.

In a single process everything here is a no-op.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from noisyq_fast import sync_ranges_
from noisyq_fast.layers import QuantLayer


@contextmanager
def process_group(device_type: str) -> Iterator[torch.device]:
    """Joins the processes that torchrun started, and gives this one's device.

    An error inside ends this process without leaving the group in order, which would wait for the
    others; torchrun ends those.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
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


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if size() > 1 else 0


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
    lengths = _all_gather(torch.tensor([len(part)], device=part.device))
    lengths = torch.cat(lengths).tolist()
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
    """Gives every `BatchNorm2d` the statistics of the ranks' batches together; returns the model.

    Parameters, buffers and their names stay. Call it when the model is on its device.
    """
    if size() == 1:
        return model
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm
    return model


class SyncBatchNorm(nn.BatchNorm2d):
    """`torch.nn.SyncBatchNorm`, which takes tensors on accelerators only, for the CPU.

    A rank's part of the batch may be empty. As in torch, the gradients of weight and bias are the
    rank's own, for `DistributedDataParallel` to reduce.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or size() == 1:
            return super().forward(x)
        self._check_input_dim(x)
        mean, var, count = _moments(x)
        if count < 2:
            raise ValueError(f"x: got {count:.0f} values per channel in training, takes 2 or more")
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = self.momentum
            if momentum is None:  # the mean of all batches
                momentum = 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return _Normalize.apply(x, self.weight, self.bias, mean, var, count, self.eps)


@torch.no_grad()
def _moments(x: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all ranks, and how many values those are of."""
    count = x.numel() // x.shape[1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = x.sum((0, 2, 3)) / max(count, 1)
    squares = (x - _along_channels(mean)).square_().sum((0, 2, 3)).double()
    # Squares about zero add up across ranks; float64, because then the mean is subtracted again.
    mean = mean.double()
    counts = torch.full_like(mean, count)
    sums = torch.stack([counts, count * mean, squares + count * mean.square()])
    dist.all_reduce(sums)
    counts, mean, squares = sums[0], sums[1] / sums[0], sums[2] / sums[0]
    var = (squares - mean.square()).clamp(min=0)
    return mean.to(x.dtype), var.to(x.dtype), counts[0].item()


class _Normalize(torch.autograd.Function):
    """Normalizes with statistics that depend on the inputs of all ranks."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: float,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count = count
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        normalized = (x - _along_channels(mean)).mul_(_along_channels(invstd))
        grad_bias = grad.sum((0, 2, 3), dtype=mean.dtype)
        grad_weight = (grad * normalized).sum((0, 2, 3))
        # Through mean and variance each value acts on the outputs of all ranks.
        sums = torch.stack([grad_bias, grad_weight])
        dist.all_reduce(sums)
        along_bias, along_weight = map(_along_channels, sums / ctx.count)
        scale = invstd if weight is None else weight * invstd
        grad_x = (grad - along_bias).sub_(normalized.mul_(along_weight))
        return (
            grad_x.mul_(_along_channels(scale)).to(x.dtype),
            grad_weight if ctx.needs_input_grad[1] else None,
            grad_bias if ctx.needs_input_grad[2] else None,
            *[None] * 4,
        )


def _along_channels(per_channel: Tensor) -> Tensor:
    return per_channel.reshape(-1, 1, 1)
