"""A chain of operations: the exact sums v of a layer, and how values y are computed from them::

    y = relu(v * factor + term + residual)

Also its gradient, and the record of chains from which `fuse_` decides.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from noisyq_fast.backends import select
from noisyq_fast.backends.reference.composed import without_values
from noisyq_fast.backends.reference.sums import GradOfSums
from noisyq_fast.integer.deferred_gradient import DeferredGradient
from noisyq_fast.operators import checks, gradients
from noisyq_fast.operators.quantize import zero_clipped


class Sums(NamedTuple):
    """Exact sums of products of codes, ``[N, C, ...]`` or ``[N, C]``.

    Attributes:
        values: float32, or int16 where that is wide enough.
        scale: float32 ``[C]``, the scale of the sums.
        bias: ``[C]`` or ``None``.
        bound: an upper bound of ``|v|``.
        product: the tensor to which the gradient of ``v * scale + bias`` flows; without values.
        layer: the layer that has computed the sums.
        moments: by channel, as from `reference.sums.moments`; ``None``: not known.
        again: the arguments of `convolve_sums`, saved for the backward in place of the sums.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None
    bound: int
    product: Tensor
    layer: Any  # a `QuantLayer`, whose module imports this one
    moments: tuple[Tensor, ...] | None = None
    again: tuple[Any, ...] | None = None


class Norm(NamedTuple):
    """A batch norm that was applied to sums.

    Attributes:
        weight, bias: of the batch norm, ``[C]`` or ``None``.
        mean: the mean of v that was used, float32 ``[C]``.
        inverse: 1 / standard deviation that was used, float32 ``[C]``.
        uses_batch: whether these are of the batch, so that gradients flow through them.
        of_ranks: for a batch that is spread over ranks, combines slope, shift and tilt, as from
            `reference.sums.grads_of_norm`, over the ranks; else ``None``.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    inverse: Tensor
    uses_batch: bool
    of_ranks: Callable | None = None


class Chain(NamedTuple):
    """The sums and the operations after them; ``line`` is the factor and the term of a batch
    norm."""

    sums: Sums
    line: tuple[Tensor, Tensor] | None = None
    norm: Norm | None = None
    residual: Tensor | None = None
    residual_source: Tensor | None = None
    relu: bool = False

    @property
    def factor(self) -> Tensor:
        return self.sums.scale if self.line is None else self.line[0]

    @property
    def term(self) -> Tensor:
        if self.line is not None:
            return self.line[1]
        scale, bias = self.sums.scale, self.sums.bias
        return torch.zeros_like(scale) if bias is None else bias.detach().float().contiguous()

    def compute(self, name: str) -> Callable:
        return select(name, self.sums.values.device.type)


class Record:
    """For `fuse_`: by layer, how often it gave sums, the operations of its chain and its batch
    norms; the layers whose sums something other than a batch norm has read; and the batch norms
    that have normalized something else than sums."""

    def __init__(self) -> None:
        self.runs: Counter[nn.Module] = Counter()
        self.steps: dict[nn.Module, list[str]] = {}
        self.norms: dict[nn.Module, list[nn.Module]] = {}
        self.reads: list[nn.Module] = []
        self.refused: list[nn.Module] = []


records: list[Record] = []


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    records.append(Record())
    try:
        yield records[-1]
    finally:
        records.pop()


def record(chain: Chain, step: str) -> None:
    for found in records:
        steps = found.steps.setdefault(chain.sums.layer, [])
        if step not in steps:
            steps.append(step)


def record_read(chain: Chain) -> None:
    if chain.norm is None:
        for found in records:
            found.reads.append(chain.sums.layer)


def record_refusal(norm: nn.Module) -> None:
    for found in records:
        found.refused.append(norm)


class ChainGradient(torch.autograd.Function):
    """Computes the gradients of a chain's product, norm and residual from that of its y."""

    @staticmethod
    def forward(
        ctx: Any,
        product: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        chain: Chain,
        zeros: Tensor | None,
    ) -> Tensor:
        norm = chain.norm
        of_norm = (None, None) if norm is None else (norm.mean, norm.inverse)
        sums = chain.sums
        of_sums = (sums.values,) if sums.again is None else sums.again[:4]
        ctx.how = None if sums.again is None else sums.again[4:]
        ctx.save_for_backward(
            *(sums.scale, chain.factor, chain.term, *of_norm),
            *(None if weight is None else weight.detach(), zeros, *of_sums),
        )
        ctx.relu = chain.relu
        ctx.uses_batch = norm is not None and norm.uses_batch
        ctx.of_ranks = None if norm is None else norm.of_ranks
        ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias)]
        return without_values(product)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if checks.is_gradient_batch(grad):
            raise RuntimeError(
                "got a batch of gradients (is_grads_batched=True or vectorize=True) of a model "
                "with fuse_, takes one at a time"
            )
        scale, factor, term, mean, inverse, weight, zeros, *of_sums = ctx.saved_tensors
        values = of_sums[0]

        def compute(name: str) -> Callable:
            return select(name, values.device.type)

        if ctx.how is not None:
            values, _ = compute("convolve_sums")(*of_sums, *ctx.how, False)
        relu = ctx.relu
        to_product, to_weight, to_bias, to_residual = ctx.needs_input_grad[:4]
        if zeros is not None:  # after an addition, the sign of y does not follow from the sums
            grad = zero_clipped(gradients.laid_out(grad, values.stride()), zeros)
            relu = False
        residual = grad if to_residual else None
        of_weight: Any = None
        of_bias: Any = None
        made_of: GradOfSums | None = None
        if mean is not None:
            line, of_weight, of_bias = compute("grads_of_norm")(
                *(grad, values, factor, term, relu, mean, inverse, scale, weight, ctx.uses_batch)
            )
            if ctx.of_ranks is not None:
                line = ctx.of_ranks(line, of_weight, of_bias, inverse * scale)
            made_of = GradOfSums(grad, values, factor, term, relu, mean, *line)
        elif relu:
            one, zero = torch.ones_like(factor), torch.zeros_like(factor)
            made_of = GradOfSums(grad, values, factor, term, relu, zero, one, zero, zero)
        if made_of is not None and to_product:
            of_layer, _ = ctx.next_functions[0]
            if getattr(of_layer, "takes_deferred", False):  # and nothing else reads it
                grad = DeferredGradient.of(made_of)
            else:
                grad = compute("grads_of_sums")(*made_of)
        of_weight = of_weight.to(ctx.dtypes[0]) if to_weight else None
        of_bias = of_bias.to(ctx.dtypes[1]) if to_bias else None
        return grad if to_product else None, of_weight, of_bias, residual, None, None


def mapped(chain: Chain, wants_zeros: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return chain.compute("map_sums")(
        *(chain.sums.values, chain.factor, chain.term, chain.residual, chain.relu),
        *(wants_zeros, True),
    )


def extremes(chain: Chain) -> Tensor:
    """The ends of y, as `reference.sums.ends` computes them."""
    if chain.sums.values.numel() == 0:
        return chain.factor.new_zeros(2)
    moments = chain.sums.moments
    assert moments is not None
    return chain.compute("ends_of_line")(*moments[2:], chain.factor, chain.term, chain.relu)


class _MeanOfPixels(torch.autograd.Function):
    """The mean over the last two axes in a fixed order: the second half is added to the first until
    one value is left; then one division."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.sizes = x.shape
        pixels = x.flatten(-2)
        while pixels.shape[-1] > 1:
            half = (pixels.shape[-1] + 1) // 2
            first, second = pixels[..., :half], pixels[..., half:]
            if first.shape == second.shape:
                pixels = first + second
            else:
                pixels = torch.cat([first[..., :-1] + second, first[..., -1:]], -1)
        total = pixels.squeeze(-1)
        return total / torch.full_like(total, ctx.sizes[-2] * ctx.sizes[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        *_, height, width = ctx.sizes
        return (grad / (height * width))[..., None, None].expand(ctx.sizes)


def mean_of_pixels(x: Tensor, keepdim: bool = False) -> Tensor:
    """The mean over the last two axes, equal to the bit on every device."""
    mean = _MeanOfPixels.apply(x)
    return mean[..., None, None] if keepdim else mean
