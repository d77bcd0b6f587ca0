"""Batch norm of exact sums, with exact statistics.

Over the N sums v of a channel, which are whole numbers, and the scale s they are to be multiplied by::

    S1  = sum v                  S2 = sum v^2            exact
    p   = rint(S1 / N)           d  = S1 - N p           exact
    C   = S2 - p (2 S1 - N p)                            exact; the sum of (v - p)^2
    mean     = (p + d / N) s     variance = (C - d^2 / N) / N s^2
    inverse  = float32(1 / sqrt(variance + eps))
    factor   = float32(weight inverse s)      term = float32(bias - mean weight inverse)
    y        = v factor + term

where all that is not exact is rounded once for each operation, in float64 but for the last line, which
is in float32. So nothing depends on an order of summation. A bias of the layer cancels; the running
mean includes it. Momentum, the unbiased running variance and evaluation are those of
`torch.nn.BatchNorm2d`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from noisyq_fast.backends.reference_integer import line
from noisyq_fast.integer.deferred import Deferred, Norm
from noisyq_fast.quantizers.moving_absmax import in_backward


class ExactBatchNorm:
    """What a batch norm gains from `fuse_`: that of `Deferred` sums. Of other tensors it is the batch
    norm that it was."""

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Deferred) and input.is_sums():
            return self._of_sums(input)
        return super().forward(input)

    def _of_sums(self, x: Deferred) -> Deferred:
        sums = x.chain.sums
        uses_batch = self.training or self.running_mean is None
        if uses_batch:
            factor, term, mean, inverse = self._of_batch(x)
        else:
            mean64 = self.running_mean.double()
            if sums.bias is not None:
                mean64 = mean64 - sums.bias.detach().double()
            inverse = (1 / (self.running_var.double() + self.eps).sqrt()).float()
            factor, term = line(
                mean64, inverse, sums.scale, _detached(self.weight), _detached(self.bias)
            )
            mean = (mean64 / sums.scale.double()).float()
        norm = Norm(self.weight, self.bias, mean, inverse, uses_batch)
        return x.normalized(norm, factor, term)

    def _of_batch(self, x: Deferred) -> tuple[Tensor, ...]:
        with torch.no_grad():
            sums = x.measured()
            count = sums.values.numel() // len(sums.scale)
            if count <= 1 and self.training:
                raise ValueError(
                    "Expected more than 1 value per channel when training, got input size "
                    f"{list(x.shape)}"
                )
            *of_map, batch_mean, variance = x.chain.compute("normalization")(
                *sums.moments[:2],
                count,
                sums.scale,
                _detached(self.weight),
                _detached(self.bias),
                self.eps,
            )
            if self.training and self.track_running_stats and not in_backward():
                if sums.bias is not None:
                    batch_mean = batch_mean + sums.bias.double()
                self._track(batch_mean, variance * (count / (count - 1)))
        return of_map

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        self.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:
            momentum = 1 / float(self.num_batches_tracked)
        for running, batch in ((self.running_mean, mean), (self.running_var, variance)):
            running.mul_(1 - momentum).add_(momentum * batch.to(running.dtype))


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


@functools.cache
def exact(norm: type[nn.Module]) -> type[nn.Module]:
    """The class of a batch norm with `ExactBatchNorm`."""
    namespace = {
        "__reduce_ex__": lambda self, _: (_new, (norm,), self.__getstate__()),
        "_float_class": norm,
    }
    return type(f"Exact{norm.__name__}", (ExactBatchNorm, norm), namespace)


def _new(norm: type[nn.Module]) -> nn.Module:
    cls = exact(norm)
    return cls.__new__(cls)
