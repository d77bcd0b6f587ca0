"""Batch norm of exact sums, with exact statistics.

For the N sums v of a channel, which are integers, and their scale s::

    S1  = sum v                  S2 = sum v^2            exact
    p   = rint(S1 / N)           d  = S1 - N p           exact
    C   = S2 - p (2 S1 - N p)                            exact; the sum of (v - p)^2
    mean     = (p + d / N) s     variance = (C - d^2 / N) / N s^2
    inverse  = float32(1 / sqrt(variance + eps))
    factor   = float32(weight inverse s)      term = float32(bias - mean weight inverse)
    y        = v factor + term

where everything that is not exact is rounded once for each operation, in float64, and in float32
in the last line. So nothing depends on an order of summation. A bias of the layer cancels; the
running mean includes it. Momentum, the unbiased running variance and evaluation are those of
`torch.nn.BatchNorm2d`. A `torch.nn.SyncBatchNorm` adds S1, S2 and N of all ranks, exactly.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisyq_fast.backends import select
from noisyq_fast.backends.reference.sums import Running, along_channels, channel_axis, line, track
from noisyq_fast.data_parallel import has_other_ranks
from noisyq_fast.integer.chain import Norm, records
from noisyq_fast.integer.deferred import Deferred, deferrable, outside_graphs
from noisyq_fast.layers.made import Made, can_be_watched
from noisyq_fast.operators import gradients
from noisyq_fast.operators.declare import declare
from noisyq_fast.quantizers.moving_absmax import in_backward


class _NormGradient(gradients.Gradient):
    """The gradient of a batch norm of sums, as in a chain."""

    @staticmethod
    def forward(ctx: Any, below_autograd: Any, product: Tensor, *others: Any) -> Tensor:
        weight, bias, sums, scale, factor, term, mean, inverse, uses_batch = others
        saved = weight, sums, scale, factor, term, mean, inverse
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.uses_batch = uses_batch
        ctx.dtype = product.dtype
        ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias)]
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, sums, scale, factor, term, mean, inverse = ctx.saved_tensors
        grad, of_weight, of_bias = torch.ops.noisyq.grads_of_norm_of_sums(
            *(grad, weight, sums, scale, factor, term, mean, inverse, ctx.uses_batch)
        )
        to_weight, to_bias = ctx.needs_input_grad[2:4]
        of_weight = of_weight.to(ctx.dtypes[0]) if to_weight else None
        of_bias = of_bias.to(ctx.dtypes[1]) if to_bias else None
        return None, grad, of_weight, of_bias, *[None] * 7

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        weight, sums, scale, _, _, mean, inverse = ctx.saved_tensors
        _, of_product, of_weight, of_bias, *_ = tangents

        def along(x: Tensor) -> Tensor:
            return along_channels(x.float(), sums)

        normalized = (sums.float() - along(mean)) * along(inverse * scale)
        parts: list[Tensor] = []
        if of_product is not None:
            slope = inverse if weight is None else inverse * weight
            tangent = of_product.float()
            if ctx.uses_batch:
                others = [d for d in range(sums.dim()) if d != channel_axis(sums) % sums.dim()]
                tilt = (tangent * normalized).mean(others, keepdim=True)
                tangent = tangent - tangent.mean(others, keepdim=True) - normalized * tilt
            parts.append(tangent * along(slope))
        if of_weight is not None:
            parts.append(normalized * along(of_weight))
        if of_bias is not None:
            parts.append(along(of_bias).expand(sums.shape))
        nothing: Any = 0
        return sum(parts, nothing).to(ctx.dtype)


if TYPE_CHECKING:
    _Mixed = _BatchNorm
else:
    _Mixed = object  # it is mixed with one of several classes

LARGEST_SUM = 2**31 - 2**7
"""The largest float below 2^31. The squares of sums up to it are exact in 64 bits."""


def _statistics(sums: Tensor, *others: Any) -> tuple:
    if others[-1] > LARGEST_SUM:
        raise ValueError(f"bound: got {others[-1]}, takes up to {LARGEST_SUM}")
    return sums, *others


_statistics_of_sums = declare(
    "statistics_of_sums(Tensor sums, Tensor scale, Tensor? weight, Tensor? bias, float eps, "
    "int bound) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    prepare=_statistics,
    shape=lambda sums, scale, *_: (
        *(torch.empty_like(scale) for _ in range(4)),
        *(torch.empty_like(scale, dtype=torch.float64) for _ in range(2)),
    ),
    gradient=None,
)
_norm_of_sums = declare(
    "norm_of_sums(Tensor product, Tensor? weight, Tensor? bias, Tensor sums, Tensor scale, "
    "Tensor factor, Tensor term, Tensor mean, Tensor inverse, bool uses_batch) -> Tensor",
    prepare=lambda *arguments: arguments,
    shape=lambda product, *_: torch.empty_like(product),
    gradient=_NormGradient,
)
_grads_of_norm_of_sums = declare(
    "grads_of_norm_of_sums(Tensor grad, Tensor? weight, Tensor sums, Tensor scale, Tensor factor, "
    "Tensor term, Tensor mean, Tensor inverse, bool uses_batch) -> (Tensor, Tensor, Tensor)",
    prepare=lambda *arguments: arguments,
    shape=lambda grad, _, sums, scale, *__: (
        torch.empty_like(grad),
        torch.empty_like(scale),
        torch.empty_like(scale),
    ),
    gradient=None,
)


@dataclass(frozen=True)
class _Ranks:
    """The ranks over which a batch is spread."""

    process_group: dist.ProcessGroup | None

    @torch.no_grad()
    def added(self, sum_: Tensor, squares: Tensor, count: int) -> tuple[tuple[Tensor, Tensor], int]:
        """The sums of v and of v^2 over all ranks, and the number of v."""
        parts = torch.cat([sum_, squares.flatten(), sum_.new_tensor([count])])
        dist.all_reduce(parts, dist.ReduceOp.SUM, self.process_group)
        total, squares, count = parts.split([len(sum_), 2 * len(sum_), 1])
        upper, lower = squares.reshape(-1, 2).unbind(1)
        squares = torch.stack([upper + (lower >> 32), lower & 0xFFFFFFFF], 1)
        return (total.contiguous(), squares), int(count)

    def line(
        self,
        count: int,
        line: tuple[Tensor, ...],
        of_weight: Tensor,
        of_bias: Tensor,
        spread: Tensor,
    ) -> tuple[Tensor, ...]:
        """Slope, shift and tilt for the whole batch: the ranks' gradients of weight and bias are
        added in the order of the ranks, in float64."""
        part = torch.stack([of_bias, of_weight]).double()
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.process_group))]
        dist.all_gather(parts, part, self.process_group)
        slope = line[0].double()
        of_bias, of_weight = functools.reduce(torch.add, parts)
        shift = slope * of_bias / count
        tilt = slope * spread.double() * of_weight / count
        return line[0], shift.float(), tilt.float()


class ExactBatchNorm(_Mixed):
    """A batch norm after `fuse_`: it normalizes the exact sums of the layer before it. For other
    inputs it is an ordinary batch norm. (`noisyq_fast.integer.norm_classes` makes its classes.)

    Attributes:
        follows: the layer before it; in a tuple, so that it is not registered as a submodule.
        float_class: what the batch norm was.
        has_own_forward: whether the class has a forward of its own. Then what that normalizes may
            be something else than the input of the module.
    """

    float_class: type[nn.Module]
    has_own_forward: bool = False
    follows: tuple[Any, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(input, Deferred):
            made = self.of_deferred(input, self.num_batches_tracked)
            if made is not None:
                return made
        elif not self.has_own_forward and self.is_normalized(input):
            if self.moves_statistics():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked.add_(1)
            return input
        return super().forward(input)

    def is_normalized(self, input: Tensor) -> bool:
        """Whether the layer before it has called `of_sums`."""
        return len(self.follows) > 0 and self.follows[0].normalizes(input)

    def of_sums(
        self, product: Tensor, sums: Tensor, scale: Tensor, bias: Tensor | None, bound: int
    ) -> Tensor:
        """For traced graphs: normalizes sums that are an ordinary tensor. Gradients flow to
        ``product``. The batch is not counted: the forward does that."""
        count = sums.numel() // scale.numel()

        def statistics(running: Running | None, *affine: Tensor | None) -> tuple[Tensor, ...]:
            found = _statistics_of_sums(sums, scale, *affine, self.eps, bound)
            if running is not None:
                *_, mean, variance = found
                track(running, mean, variance, count)
            return found

        batches = self.num_batches_tracked
        with torch.no_grad():
            batches = None if batches is None else batches.clone()
            factor, term, norm = self._line(scale, bias, count, statistics, batches)
        of_batch = norm.uses_batch
        return _norm_of_sums(
            *(product, self.weight, self.bias, sums, scale),
            *(factor, term, norm.mean, norm.inverse, of_batch),
        )

    @outside_graphs
    def of_deferred(self, x: Deferred, batches: Tensor | None) -> Deferred | None:
        """Normalizes sums; ``None`` if ``x`` is something else. ``batches`` is the number of
        batches before; this one is added."""
        if not x.is_sums():
            return None
        sums = x.chain.sums
        count = sums.values.numel() // sums.scale.numel()
        ranks = self.ranks_of_batch()
        if ranks is not None:
            sum_, squares, *_ = _moments(x)
            moments, count = ranks.added(sum_, squares, count)

        def statistics(running: Running | None, *affine: Tensor | None) -> tuple[Tensor, ...]:
            found = _moments(x)[:2] if ranks is None else moments
            compute = select("normalization", sums.values.device.type)
            return compute(*found, count, sums.scale, *affine, self.eps, running)

        bias = None if sums.bias is None else sums.bias.detach()
        factor, term, norm = self._line(sums.scale, bias, count, statistics, batches)
        if ranks is not None:
            norm = norm._replace(of_ranks=functools.partial(ranks.line, count))
        return x.normalized(self, norm, factor, term)

    def ranks_of_batch(self) -> _Ranks | None:
        """The ranks over which the batch is spread; None if there are none."""
        if not isinstance(self, nn.SyncBatchNorm) or not self._takes_batch() or records:
            return None
        return _Ranks(self.process_group) if has_other_ranks(self.process_group) else None

    def _takes_batch(self) -> bool:
        return self.training or self.running_mean is None

    def moves_statistics(self) -> bool:
        """Whether the batch moves the running statistics."""
        return self.training and self.track_running_stats and not in_backward()

    def _line(
        self,
        scale: Tensor,
        bias: Tensor | None,
        count: int,
        statistics: Any,
        batches: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Norm]:
        """Factor and term of the sums, and the norm that they come from."""
        keeps_numbers = self.weight is not None or self.running_mean is not None
        if keeps_numbers and len(scale) != self.num_features:
            got = f"got a layer of {len(scale)} channels before it"
            raise ValueError(f"batch norm: {got}, takes {self.num_features}")
        weight, own_bias = self.weight, self.bias
        affine = [None if x is None else x.detach() for x in (weight, own_bias)]
        of_batch = self._takes_batch()
        if of_batch:
            if self.training and count <= 1:
                raise ValueError(
                    "expected more than 1 value per channel in training, got a batch norm of 1"
                )
            running = self._running(bias, batches) if self.moves_statistics() else None
            factor, term, mean, inverse, *_ = statistics(running, *affine)
        else:
            factor, term, mean, inverse = self._running_line(scale, bias, *affine)
        return factor, term, Norm(weight, own_bias, mean, inverse, of_batch)

    def _running_line(
        self, scale: Tensor, bias: Tensor | None, *affine: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The line from running statistics; with frozen weights the cached one, if the scale is the
        same (it is NaN if an input was)."""
        made = self.follows[0].made_of_weights if self.follows else None
        if made is None or scale.device.type != "cpu" or not deferrable(scale):
            return self._computed_line(scale, bias, *affine)
        of = self.running_mean, self.running_var, bias, self.weight, self.bias
        if not can_be_watched(of):
            return self._computed_line(scale, bias, *affine)
        # The scale is a new tensor at every call, so its values are compared.
        before = made.get(("line", ""))
        options = self.eps, scale.tolist()
        if before is None or not before.is_of(of, options):
            before = made["line", ""] = Made(self._computed_line(scale, bias, *affine), of, options)
        return before.value

    def _computed_line(
        self, scale: Tensor, bias: Tensor | None, *affine: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        assert self.running_mean is not None
        assert self.running_var is not None
        mean = self.running_mean.double()
        if bias is not None:
            mean = mean - bias.double()
        inverse = (1 / (self.running_var.double() + self.eps).sqrt()).float()
        factor, term = line(mean, inverse, scale, *affine)
        return factor, term, (mean / scale.double()).float(), inverse

    def _running(self, bias: Tensor | None, batches: Tensor | None) -> Running:
        momentum = self.momentum
        assert batches is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        if momentum is None:
            momentum = 1 / (float(batches) + 1)
        return Running(self.running_mean, self.running_var, batches, bias, momentum)


def _moments(x: Deferred) -> tuple[Tensor, ...]:
    moments = x.measured().moments
    assert moments is not None
    return moments
