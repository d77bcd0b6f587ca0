"""Products of codes: exact integer sums, then one scale.

For codes ``c``, ``d`` with scales ``s``, ``t`` and zero points ``z``, ``w`` (0 where there are
none)::

    acc = sum (c - z) (d - w)        exact
    v   = float32(acc)               one rounding
    y   = v * (s * t) + bias         one rounding each

so that outputs have the same bits on every backend and with every number of threads. Padding has
the value 0, so its code is z. Gradients are those of the product of the dequantized values, and
pass straight through to the tensors that were quantized::

    dx = product(dy, (d - w) t)      dw = product(dy, c - z) s      dbias = sum dy

Autocast does not change the forward; the products of the backward are computed in the lower
precision, which represents codes exactly; the scale of x is applied afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from noisyq_fast.backends import select
from noisyq_fast.backends.reference import composed
from noisyq_fast.backends.reference.composed import without_values
from noisyq_fast.backends.reference.products import (
    as_rows,
    channel_steps,
    float_steps,
    laid_out_like,
    without_autocast,
)
from noisyq_fast.backends.reference.sums import GradOfSums
from noisyq_fast.integer.chain import Sums
from noisyq_fast.integer.codes import Codes
from noisyq_fast.integer.deferred import Deferred, deferrable, memory_format
from noisyq_fast.integer.deferred_gradient import DeferredGradient
from noisyq_fast.operators import gradients
from noisyq_fast.operators.declare import declare
from noisyq_fast.operators.quantize import dequantize_on_grid, zero_clipped

_CODES = (torch.int8, torch.uint8)
_MOST_TERMS = 2**37
"""Sums of up to this many products of two one-byte codes are exact in float64."""


class Geometry(NamedTuple):
    """The geometry arguments of `torch.convolution`, in its order."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int


def _check_codes(name: str, codes: Tensor, zero_point: Tensor | None) -> None:
    if codes.dtype not in _CODES:
        raise TypeError(f"{name}: got {codes.dtype}, takes torch.int8 or torch.uint8")
    if zero_point is not None and codes.dtype != torch.uint8:
        raise TypeError(f"{name}: got int8 codes with a zero point, takes uint8 codes")


def _check_operands(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None
) -> None:
    _check_codes("codes", codes, zero_point)
    _check_codes("weight", weight, weight_zero_point)


def _check_terms(terms: int) -> None:
    if terms > _MOST_TERMS:
        raise ValueError(
            f"weight: got sums of {terms} terms, takes up to {_MOST_TERMS}, exact ones"
        )


def _convolution(
    codes: Tensor,
    zero_point: Tensor | None,
    weight: Tensor,
    weight_zero_point: Tensor | None,
    *how: Any,
) -> tuple:
    _check_operands(codes, zero_point, weight, weight_zero_point)
    _check_sizes(codes.shape, weight.shape, *how)
    return codes, zero_point, weight, weight_zero_point, *how


def _check_sizes(
    codes: torch.Size,
    weight: torch.Size,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    _: Sequence[int],
    groups: int,
) -> None:
    checked = ("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)
    for name, values, least in checked:
        if min(values) < least:
            raise ValueError(f"{name}: got {list(values)}, takes {least} or more")
    _check_terms(math.prod(weight))
    if weight[0] % groups:
        raise ValueError(f"groups: got {groups} for a weight of shape {list(weight)}")
    channels = weight[0] if transposed else weight[1] * groups
    if len(codes) != len(weight) or codes[1] != channels:
        of = f"{len(codes)} axes" if len(codes) != len(weight) else f"{codes[1]} channels"
        raise ValueError(
            f"codes: got shape {list(codes)}, so {of}, for a weight of shape {list(weight)} in "
            f"{groups} groups, takes {len(weight)} axes and {channels} channels"
        )
    kernel = [d * (k - 1) + 1 for k, d in zip(weight[2:], dilation, strict=True)]
    padded = [size + 2 * p for size, p in zip(codes[2:], padding, strict=True)]
    if not transposed and any(p < k for p, k in zip(padded, kernel, strict=True)):
        raise ValueError(
            f"codes: got images of {list(codes[2:])} pixels, {padded} with their padding, "
            f"takes at least the kernel, {kernel} with its dilation"
        )


_check_sizes_once = functools.lru_cache(maxsize=1024)(_check_sizes)


def _convolution_shape(codes: Tensor, _: object, weight: Tensor, __: object, *how: Any) -> Tensor:
    stride, padding, dilation, transposed, output_padding, groups = how
    like = codes.new_empty(codes.shape, dtype=torch.float32)
    with torch.autocast(codes.device.type, enabled=False):
        sums = torch.convolution(
            like,
            weight.new_empty(weight.shape, dtype=torch.float32),
            *(None, stride, padding, dilation, transposed, output_padding, groups),
        )
    return laid_out_like(codes, sums)


def _linear(
    codes: Tensor, zero_point: Tensor | None, weight: Tensor, weight_zero_point: Tensor | None
) -> tuple:
    _check_operands(codes, zero_point, weight, weight_zero_point)
    if codes.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"codes: got shape {list(codes.shape)} for a weight of shape {list(weight.shape)}, "
            f"takes [..., {weight.shape[-1]}]"
        )
    _check_terms(weight.shape[-1])
    return codes, zero_point, weight, weight_zero_point


convolve_codes = declare(
    "convolve_codes(Tensor codes, Tensor? zero_point, Tensor weight, Tensor? weight_zero_point, "
    "int[] stride, int[] padding, int[] dilation, bool transposed, int[] output_padding, "
    "int groups) -> Tensor",
    prepare=_convolution,
    shape=_convolution_shape,
    gradient=None,
)
multiply_codes = declare(
    "multiply_codes(Tensor codes, Tensor? zero_point, Tensor weight, Tensor? weight_zero_point) "
    "-> Tensor",
    prepare=_linear,
    shape=lambda codes, _, weight, __: codes.new_empty(
        [*codes.shape[:-1], weight.shape[-2]], dtype=torch.float32
    ),
    gradient=None,
)

_OPERANDS = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor codes, Tensor scale, Tensor? zero_point, "
    "Tensor? masked, Tensor weight_codes, Tensor weight_scale, Tensor? weight_zero_point, "
    "Tensor? weight_masked"
)


class _Product(gradients.Gradient):
    """The straight-through gradients of ``x`` and ``weight``. Their values are not used: the
    backward needs, and saves, only codes and scales."""

    grads: ClassVar[Callable[..., tuple[Tensor | None, Tensor | None]]]
    grad_of_bias: ClassVar[Callable[..., Tensor]]
    weight_values: ClassVar[Callable[..., Tensor]]
    product: ClassVar[Callable[..., Tensor]]
    along_outputs: ClassVar[Callable[..., Tensor]]

    @staticmethod
    def forward(ctx: Any, below_autograd: Any, x: Tensor, weight: Tensor, *others: Any) -> Tensor:
        bias, codes, scale, zero, masked, w_codes, w_scale, w_zero, w_masked, *geometry = others
        saved = codes, scale, zero, masked, w_codes, w_scale, w_zero, w_masked
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.geometry = geometry
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.compute_dtype = _autocast_dtype(codes.device.type)
        y = below_autograd()
        ctx.output_shape = y.shape
        return y

    @classmethod
    def _backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, zero, masked, w_codes, w_scale, w_zero, w_masked = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad[1:4]
        with without_autocast(grad.device.type):
            dx, dw = cls.grads(
                ctx, grad, codes, scale, zero, w_codes, w_scale, w_zero, to_x, to_weight
            )
            db = cls.grad_of_bias(grad.float(), w_codes) if to_bias else None
        dx = _unmasked(dx, codes, masked)
        dw = _unmasked(dw, w_codes, w_masked)
        grads = (
            None if g is None else g.to(dtype)
            for g, dtype in zip((dx, dw, db), ctx.dtypes, strict=True)
        )
        return None, *grads, *[None] * (8 + len(ctx.geometry))

    @classmethod
    def _jvp(cls, ctx: Any, *tangents: Tensor | None) -> Tensor:
        codes, scale, zero, masked, w_codes, w_scale, w_zero, w_masked = ctx.saved_tensors
        _, of_x, of_weight, of_bias, *_ = tangents
        parts: list[Tensor] = []
        if of_x is not None:
            weight = cls.weight_values(ctx, w_codes, w_scale, w_zero)
            parts.append(cls.product(ctx, _unmasked(of_x.float(), codes, masked), weight))
        if of_weight is not None:
            scale = scale.reshape([*scale.shape, *[1] * (codes.dim() - scale.dim())])
            x = _floats(codes, zero, torch.float32) * scale
            of_weight = _unmasked(of_weight.float(), w_codes, w_masked)
            parts.append(cls.product(ctx, x, of_weight))
        if of_bias is not None:
            parts.append(cls.along_outputs(of_bias.float(), w_codes))
        nothing: Any = 0
        return sum(parts, nothing).expand(ctx.output_shape).to(ctx.dtypes[0])


def _autocast_dtype(device_type: str) -> torch.dtype:
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return torch.float32


def _unmasked(grad: Tensor | None, codes: Tensor, masked: Tensor | None) -> Tensor | None:
    if grad is None or masked is None or masked.numel() == 0:
        return grad
    return zero_clipped(gradients.laid_out(grad, codes.stride()), masked)


class _Convolution(_Product):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Convolution._backward(ctx, grad)

    @staticmethod
    def grads(
        ctx: Any,
        grad: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        w_codes: Tensor,
        w_scale: Tensor,
        w_zero: Tensor | None,
        to_x: bool,
        to_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        w = _Convolution.weight_values(ctx, w_codes, w_scale, w_zero)
        compute = composed.operators["grads_of_convolution"]
        known = grad.current() if isinstance(grad, DeferredGradient) else grad
        if deferrable(codes) and (isinstance(known, GradOfSums) or deferrable(known)):
            compute = select("grads_of_convolution", codes.device.type)
        how = ctx.compute_dtype, to_x, to_weight, *ctx.geometry
        return compute(known, codes, scale, zero, w, *how)

    @staticmethod
    def grad_of_bias(grad: Tensor, _: Tensor) -> Tensor:
        return grad.sum([d for d in range(grad.dim()) if d != 1])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Convolution._jvp(ctx, *tangents)

    @staticmethod
    def weight_values(ctx: Any, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return _channel_values(codes, scale, zero, ctx.geometry)

    @staticmethod
    def product(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return torch.convolution(x, weight, None, *ctx.geometry)

    @staticmethod
    def along_outputs(of_bias: Tensor, weight: Tensor) -> Tensor:
        return of_bias.reshape([-1, *[1] * (weight.dim() - 2)])


def _floats(codes: Tensor, zero: Tensor | None, dtype: torch.dtype) -> Tensor:
    if not deferrable(codes):
        return float_steps(codes, zero, dtype)
    return select("float_steps", codes.device.type)(codes, zero, dtype)


def _channel_values(
    codes: Tensor, scale: Tensor, zero: Tensor | None, geometry: list[Any]
) -> Tensor:
    """The dequantized weight; it has one scale for each output channel."""
    *_, transposed, _, groups = geometry
    if not transposed:
        return dequantize_on_grid(codes, scale, zero, 0)
    values = channel_steps(codes, zero, transposed, groups).float()
    by_group = scale.reshape([groups, 1, -1, *[1] * (codes.dim() - 2)])
    return (values.unflatten(0, (groups, -1)) * by_group).flatten(0, 1)


class _Linear(_Product):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Linear._backward(ctx, grad)

    @staticmethod
    def grads(
        ctx: Any,
        grad: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero: Tensor | None,
        w_codes: Tensor,
        w_scale: Tensor,
        w_zero: Tensor | None,
        to_x: bool,
        to_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        dtype = ctx.compute_dtype
        dx = dw = None
        if to_x:
            w = _Linear.weight_values(ctx, w_codes, w_scale, w_zero)
            dx = grad.to(dtype) @ w.to(dtype)
        if to_weight:
            x, g = _floats(codes, zero, dtype), grad
            if scale.dim() > 0:  # one scale for each token or group
                g = grad.float() * scale.reshape([*scale.shape, *[1] * (codes.dim() - scale.dim())])
            if w_codes.dim() == 2:
                x, g = as_rows(x), as_rows(g)
            dw = (g.to(dtype).mT @ x).float()
            dw = dw * scale if scale.dim() == 0 else dw
        return dx, dw

    @staticmethod
    def grad_of_bias(grad: Tensor, weight: Tensor) -> Tensor:
        return grad.sum(-2) if weight.dim() > 2 else as_rows(grad).sum(0)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return _Linear._jvp(ctx, *tangents)

    @staticmethod
    def weight_values(ctx: Any, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        rows = codes.flatten(0, -2)
        of_rows = (None if x is None else x.flatten() for x in (scale, zero))
        return dequantize_on_grid(rows, *of_rows, 0).reshape(codes.shape)

    @staticmethod
    def product(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    @staticmethod
    def along_outputs(of_bias: Tensor, weight: Tensor) -> Tensor:
        return of_bias.unsqueeze(-2) if weight.dim() > 2 else of_bias


def _product_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, *others: Any) -> tuple:
    codes, _, zero, _, w_codes, _, w_zero, _ = others[:8]
    channels = w_codes.shape[:-1]
    if others[8:]:
        _convolution(codes, zero, w_codes, w_zero, *others[8:])
        *_, transposed, _, groups = others[8:]
        channels = [w_codes.shape[1] * groups if transposed else w_codes.shape[0]]
    else:
        _linear(codes, zero, w_codes, w_zero)
    for name, value in (("weight_scale", others[5]), ("bias", bias)):
        if value is not None and list(value.shape) != list(channels):
            raise ValueError(f"{name}: got shape {list(value.shape)}, takes {list(channels)}")
    return x, weight, bias, *others


def _product_shape(x: Tensor, _: object, __: object, codes: Tensor, *others: Any) -> Tensor:
    weight, geometry = others[3], others[7:]
    if geometry:
        like = _convolution_shape(codes, None, weight, None, *geometry)
    else:
        like = codes.new_empty([*codes.shape[:-1], weight.shape[-2]], dtype=torch.float32)
    return torch.empty_like(like, dtype=x.dtype)


integer_convolution = declare(
    f"integer_convolution({_OPERANDS}, int[] stride, int[] padding, int[] dilation, "
    "bool transposed, int[] output_padding, int groups) -> Tensor",
    prepare=_product_arguments,
    shape=_product_shape,
    gradient=_Convolution,
)
integer_linear = declare(
    f"integer_linear({_OPERANDS}) -> Tensor",
    prepare=_product_arguments,
    shape=_product_shape,
    gradient=_Linear,
)


def convolution(x: Codes, weight: Codes, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The convolution of ``x`` ``[N, C, ...]`` with ``weight``, which has one scale for each output
    channel; in the dtype of ``x.source``."""
    return integer_convolution(*_operands(x, weight, bias), *geometry)


def linear(x: Codes, weight: Codes, bias: Tensor | None) -> Tensor:
    """``x`` ``[..., I]`` times the transpose of ``weight`` ``[O, I]``; or, with ``[T, N, I]`` and
    ``[T, O, I]``, for each of T groups."""
    return integer_linear(*_operands(x, weight, bias))


def _operands(x: Codes, weight: Codes, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    of_x, of_weight = ((c.codes, c.scale, c.zero_point, c.masked) for c in (x, weight))
    return x.source, weight.source, bias, *of_x, *of_weight


def deferred_convolution(
    x: Codes, weight: Codes, bias: Tensor | None, geometry: Geometry, layer: nn.Module, like: Tensor
) -> Tensor:
    """`convolution` as a `Deferred`, whose values are computed when something reads them. ``layer``
    is the layer that computes it."""
    operands = x.codes, x.zero_point, weight.codes, weight.zero_point
    _check_operands(*operands)
    _check_sizes_once(x.codes.shape, weight.codes.shape, *geometry)
    stride, padding, dilation, _, _, groups = geometry
    made_of = (*operands, stride, padding, dilation, groups, bound(x, weight))
    measures = layer.training  # a batch norm may need statistics of the batch
    device_type = x.codes.device.type
    values, moments = select("convolve_sums", device_type)(*made_of, measures)
    scale = x.scale.detach() * weight.scale.detach()
    carrier = without_values(values, _autocast_dtype(device_type))
    if torch.is_grad_enabled():
        carrier = _Convolution.apply(lambda: carrier, *_operands(x, weight, bias), *geometry)
        if carrier.requires_grad:
            carrier.grad_fn.takes_deferred = True
    again = made_of if layer.recomputes else None
    sums = Sums(values, scale, bias, made_of[-1], carrier, layer, moments, again)
    return Deferred.of_sums(sums, memory_format(like))


def normalized_convolution(
    x: Codes,
    weight: Codes,
    bias: Tensor | None,
    geometry: Geometry,
    product: Tensor,
    norm: Any,
) -> Tensor:
    """The batch norm of ``product``, the output of `convolution`, from exact sums; for traced
    graphs."""
    operands = x.codes, x.zero_point, weight.codes, weight.zero_point
    sums = convolve_codes(*operands, *geometry)
    return norm.of_sums(product, sums, x.scale * weight.scale, bias, bound(x, weight))


def bound(x: Codes, weight: Codes) -> int:
    """An upper bound of the magnitude of the sums of a convolution."""
    return weight.codes[0].numel() * x.largest * weight.largest
