"""The output of an integer layer before it is written as floats.

After `fuse_`, an integer layer returns its exact sums, v, as a `Deferred`: a tensor that knows how its
values would be made,::

    y = relu(v * factor + term + residual)

of which a batch norm changes factor and term, an addition the residual and a ReLU the rest. The
quantizer of the next layer then makes its codes of it in one pass, and takes their range from the
least and the largest v of each channel: rounding is monotone, so the extremes of y are those of its
line. Whatever else reads the tensor gets its values, which are made then and kept, so that a model
computes the same bits whoever reads what.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from noisyq_fast import checks, gradients
from noisyq_fast.backends import select
from noisyq_fast.backends.reference import NEGATIVE, NOTHING
from noisyq_fast.grid import Grid


@dataclass(frozen=True, eq=False)
class Sums:
    """Exact sums of products of codes, ``[N, C, ...]`` or ``[N, C]``.

    Attributes:
        values: float32, or int16 where that is wide enough.
        scale: float32 ``[C]``: what they are to be multiplied by.
        bias: ``[C]`` or ``None``.
        bound: no ``|v|`` is above it.
        product: what the gradient of ``v * scale + bias`` flows to; without values.
        layer: whose sums they are.
        moments: of each channel, as from `reference_integer.moments`; ``None``: not known.
        again: what `convolve_sums` made them of, to be saved for the backward in their place.
    """

    values: Tensor
    scale: Tensor
    bias: Tensor | None
    bound: int
    product: Tensor
    layer: nn.Module
    moments: tuple[Tensor, ...] | None = None
    again: tuple[Any, ...] | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """A batch norm that was applied to sums.

    Attributes:
        mean: of v, float32 ``[C]``; inverse: 1 / standard deviation; both as they were used.
        uses_batch: whether they are of the batch, so that gradients flow through them.
    """

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    inverse: Tensor
    uses_batch: bool


@dataclass(frozen=True, eq=False)
class Chain:
    sums: Sums
    factor: Tensor
    term: Tensor
    norm: Norm | None = None
    residual: Tensor | None = None
    residual_source: Tensor | None = None
    relu: bool = False

    def compute(self, name: str) -> Callable:
        return select(name, self.sums.values.device.type)


class Record:
    """What chains went on with while `fuse_` looks: of each layer the steps, and its norms."""

    def __init__(self) -> None:
        self.steps: dict[nn.Module, list[str]] = {}
        self.norms: dict[nn.Module, list[nn.Module]] = {}
        self.reads: list[nn.Module] = []


_records: list[Record] = []


@contextlib.contextmanager
def recording() -> Iterator[Record]:
    _records.append(Record())
    try:
        yield _records[-1]
    finally:
        _records.pop()


def record(chain: Chain, step: str) -> None:
    for found in _records:
        steps = found.steps.setdefault(chain.sums.layer, [])
        if step not in steps:
            steps.append(step)


def deferrable(x: Tensor) -> bool:
    """Whether a tensor has values, and nothing traces or transforms what is computed of them."""
    if torch.compiler.is_compiling():
        return False
    return isinstance(x, Deferred) or checks.is_plain(x)


class _ChainGradient(torch.autograd.Function):
    """From the gradient of a chain's y to those of its product, norm and residual."""

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
        ctx.dtypes = [None if x is None else x.dtype for x in (weight, bias)]
        return _without_values(product.shape, product)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, factor, term, mean, inverse, weight, zeros, *of_sums = ctx.saved_tensors
        values = of_sums[0]

        def compute(name: str) -> Callable:
            return select(name, values.device.type)

        if ctx.how is not None:
            values, _ = compute("convolve_sums")(*of_sums, *ctx.how, False)
        relu = ctx.relu
        _, to_weight, to_bias, to_residual = ctx.needs_input_grad[:4]
        if zeros is not None:  # behind an addition, where the sums alone do not tell
            grad = torch.ops.noisyq.zero_clipped(gradients.laid_out(grad, values.stride()), zeros)
            relu = False
        residual = grad if to_residual else None
        of_weight = of_bias = None
        if mean is not None:
            line, of_weight, of_bias = compute("grads_of_norm")(
                *(grad, values, factor, term, relu, mean, inverse, scale, weight, ctx.uses_batch)
            )
            grad = compute("grads_of_sums")(grad, values, factor, term, relu, mean, *line)
        elif relu:
            one, zero = torch.ones_like(factor), torch.zeros_like(factor)
            grad = compute("grads_of_sums")(
                *(grad, values, factor, term, relu, zero, one, zero, zero)
            )
        of_weight = of_weight.to(ctx.dtypes[0]) if to_weight else None
        of_bias = of_bias.to(ctx.dtypes[1]) if to_bias else None
        return grad, of_weight, of_bias, residual, None, None


class _Written(torch.autograd.Function):
    """The values of a deferred tensor, whose gradient is its own."""

    @staticmethod
    def forward(ctx: Any, deferred: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Deferred(Tensor):
    """A tensor whose values are made when something reads them."""

    _chain: Chain
    _values: Tensor | None
    _extremes: Tensor | None
    _format: torch.memory_format
    _instead: Deferred | None

    @staticmethod
    def of_sums(sums: Sums, format_: torch.memory_format) -> Deferred:
        term = torch.zeros_like(sums.scale) if sums.bias is None else sums.bias.detach().float()
        # Nothing follows yet: the gradient is that of the product.
        return _deferred(sums.product, Chain(sums, sums.scale, term), format_)

    # What continues a chain.

    @property
    def chain(self) -> Chain:
        return self.current()._chain

    def current(self) -> Deferred:
        """What the tensor has become by operations in place."""
        found = self
        while found._instead is not None:
            found = found._instead
        return found

    def is_sums(self) -> bool:
        """Whether nothing followed the product yet."""
        own = self.current()
        chain = own._chain
        return (
            own._values is None and chain.norm is None and not chain.relu and chain.residual is None
        )

    def measured(self) -> Sums:
        """The sums, with the moments of each channel."""
        own = self.current()
        sums = own._chain.sums
        if sums.moments is None:
            values, *moments = own._chain.compute("moments")(sums.values, sums.bound)
            sums = replace(sums, values=values, moments=tuple(moments))
            own._chain = replace(own._chain, sums=sums)
        return sums

    def normalized(self, module: nn.Module, norm: Norm, factor: Tensor, term: Tensor) -> Deferred:
        record(self.chain, "batch norm")
        for found in _records:
            found.norms.setdefault(self.chain.sums.layer, []).append(module)
        chain = replace(self.chain, norm=norm, factor=factor, term=term)
        return _extended(chain, self.current()._format)

    def rectified(self) -> Deferred:
        own = self.current()
        chain = own._chain
        if own._values is not None or chain.relu:
            return None
        record(chain, "ReLU")
        chain = replace(chain, relu=True)
        if chain.residual is None:
            return _extended(chain, own._format)
        wants_zeros = torch.is_grad_enabled()
        values, zeros, range_ = _mapped(chain, wants_zeros)
        made = _extended(chain, own._format, zeros)
        made._raw, made._extremes = values, range_
        return made

    def plus(self, other: Tensor) -> Deferred | None:
        own = self.current()
        chain = own._chain
        if (
            own._values is not None
            or chain.relu
            or chain.residual is not None
            or not isinstance(other, Tensor)
            or other.shape != self.shape
            or other.dtype != torch.float32
            or other.device != self.device
        ):
            return None
        record(chain, "addition")
        source = other
        if isinstance(other, Deferred):
            other, source = other.values(), other.source
        return _extended(replace(chain, residual=other, residual_source=source), own._format)

    # What ends one.

    def values(self) -> Tensor:
        """An ordinary tensor."""
        own = self.current()
        if own._values is None:
            for found in _records:
                found.reads += [own._chain.sums.layer] * (own._chain.norm is None)
            raw = own._raw
            if raw is None:
                raw, _, own._extremes = _mapped(own._chain, False)
            raw = raw.contiguous(memory_format=own._format)
            with torch._C.DisableTorchFunctionSubclass():
                own._values = (
                    _Written.apply(own._carrier, raw) if own._carrier.requires_grad else raw
                )
            own._raw = None
        return own._values

    def range_on(self, grid: Grid) -> Tensor:
        """As `reference.range_of`, of the tensor as a whole."""
        own = self.current()
        if own._extremes is None:
            own.measured()
            own._extremes = _extremes(own._chain)
        low, high = own._extremes
        if grid.is_affine:
            return own._extremes
        return high if grid.is_unsigned else torch.maximum(-low, high)

    def masks_none(self, masked: str) -> bool:
        """Whether no element would be without a gradient in its own range."""
        return masked == NOTHING or (masked == NEGATIVE and self.chain.relu)

    def codes_within(self, range_: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor] | None:
        """Codes, scale and zero point in a range; None where values are there to be quantized."""
        own = self.current()
        chain = own._chain
        record(chain, "quantizer")
        if own._values is not None or own._raw is not None or chain.residual is not None:
            return None
        return chain.compute("codes_of_sums")(
            chain.sums.values, chain.factor, chain.term, chain.relu, range_, grid
        )

    @property
    def source(self) -> Tensor:
        """What gradients of the values flow to."""
        return self.current()._carrier

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_THE_SHELL:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is _DTYPE:
            return torch.float32  # of gradients it can be another
        follow = _FOLLOWS.get(func)
        if follow is not None:
            made = follow(*args, **kwargs)
            if made is not None:
                return made
        return func(*map(_with_values, args), **{k: _with_values(v) for k, v in kwargs.items()})


def memory_format(x: Tensor) -> torch.memory_format:
    if isinstance(x, Deferred):
        return x.current()._format
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_last else torch.contiguous_format


def _with_values(argument: Any) -> Any:
    if isinstance(argument, tuple | list | dict):
        return pytree.tree_map(_as_values, argument)
    return _as_values(argument)


def _as_values(x: Any) -> Any:
    return x.values() if isinstance(x, Deferred) else x


def _without_values(shape: torch.Size, like: Tensor) -> Tensor:
    """A tensor for gradients to flow to, of one element of memory."""
    return torch.zeros((), dtype=like.dtype, device=like.device).expand(shape)


def _deferred(carrier: Tensor, chain: Chain, format_: torch.memory_format) -> Deferred:
    made = carrier.as_subclass(Deferred)
    made._carrier = carrier
    made._chain = chain
    made._values = made._raw = made._extremes = made._instead = None
    made._format = format_
    return made


def _extended(chain: Chain, format_: torch.memory_format, zeros: Tensor | None = None) -> Deferred:
    sums, norm = chain.sums, chain.norm
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    with torch._C.DisableTorchFunctionSubclass():
        if torch.is_grad_enabled():
            carrier = _ChainGradient.apply(
                sums.product, weight, bias, chain.residual_source, chain, zeros
            )
        else:
            carrier = _without_values(sums.product.shape, sums.product)
        return _deferred(carrier, chain, format_)


def _mapped(chain: Chain, wants_zeros: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    with torch.no_grad():
        return chain.compute("map_sums")(
            *(chain.sums.values, chain.factor, chain.term, chain.residual, chain.relu),
            *(wants_zeros, True),
        )


def _extremes(chain: Chain) -> Tensor:
    """min(y, 0) and max(y, 0)."""
    low, high = (end * chain.factor + chain.term for end in chain.sums.moments[2:])
    low, high = torch.minimum(low, high).amin(), torch.maximum(low, high).amax()
    low = torch.zeros_like(low) if chain.relu else low.clamp(max=0)
    return torch.stack([low, high.clamp(min=0)])


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


# What a chain goes on with: None where it does not, and values are made.


def _relu(x: Deferred, inplace: bool = False) -> Tensor | None:
    made = x.rectified()
    return _in_place(x, made) if inplace and made is not None else made


def _add(x: Any, y: Any, *, alpha: float = 1) -> Tensor | None:
    if alpha != 1:
        return None
    if isinstance(x, Deferred):
        made = x.plus(y)
        if made is not None:
            return made
    return y.plus(x) if isinstance(y, Deferred) and isinstance(x, Tensor) else None


def _add_in_place(x: Any, y: Any, *, alpha: float = 1) -> Tensor | None:
    if alpha != 1 or not isinstance(x, Deferred):
        return None
    made = x.plus(y)
    return None if made is None else _in_place(x, made)


def _mean(
    x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Any = None
) -> Tensor | None:
    if not isinstance(x, Deferred) or x.dim() != 4 or dtype is not None or out is not None:
        return None
    if not isinstance(dim, tuple | list) or sorted(d % 4 for d in dim) != [2, 3]:
        return None
    return mean_of_pixels(x.values(), keepdim)


def _pool(x: Any, output_size: Any) -> Tensor | None:
    if not isinstance(x, Deferred) or x.dim() != 4 or output_size not in (1, (1, 1), [1, 1]):
        return None
    return mean_of_pixels(x.values(), keepdim=True)


def _in_place(x: Deferred, made: Deferred) -> Deferred:
    x.current()._instead = made
    return made


_DTYPE = Tensor.dtype.__get__
_FOLLOWS: dict[Callable, Callable] = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: lambda x: _relu(x, True),
    Tensor.relu_: lambda x: _relu(x, True),
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.add_: _add_in_place,
    Tensor.__iadd__: _add_in_place,
    torch.mean: _mean,
    Tensor.mean: _mean,
    F.adaptive_avg_pool2d: _pool,
}
_OF_THE_SHELL = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "ndim", "device", "layout", "requires_grad", "is_cuda")
        + ("is_sparse", "is_nested", "is_meta", "is_quantized", "grad_fn", "is_leaf")
    ),
}
