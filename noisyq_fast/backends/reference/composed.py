"""Operators that are composed of the same functions in every backend: products with their scales,
the gradients of a convolution, and the batch norm of sums."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.reference import sums
from noisyq_fast.backends.reference.products import (
    as_rows,
    convolve_codes,
    float_steps,
    laid_out_like,
    multiply_codes,
)
from noisyq_fast.backends.reference.sums import GradOfSums


def products(convolve: Callable, multiply: Callable, map_sums: Callable) -> Operators:
    """The products with their scales, composed of these functions."""
    operators = Operators()

    def scaled(
        sums: Tensor, scale: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        factor = scale * weight_scale
        term = torch.zeros_like(factor) if bias is None else bias.float().contiguous()
        return map_sums(sums, factor, term, None, False, False, False)[0].to(dtype)

    @operators.register
    def integer_convolution(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        masked: Tensor | None,
        weight_codes: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        weight_masked: Tensor | None,
        *geometry: Any,
    ) -> Tensor:
        sums = convolve(codes, zero_point, weight_codes, weight_zero_point, *geometry)
        return laid_out_like(codes, scaled(sums, scale, weight_scale, bias, x.dtype))

    @operators.register
    def integer_linear(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        masked: Tensor | None,
        weight_codes: Tensor,
        weight_scale: Tensor,
        weight_zero_point: Tensor | None,
        weight_masked: Tensor | None,
    ) -> Tensor:
        sums = multiply(codes, zero_point, weight_codes, weight_zero_point)
        if scale.dim() == 0 and weight_codes.dim() == 2:
            y = scaled(as_rows(sums), scale, weight_scale, bias, x.dtype)
            # Not a view: outputs may be changed in place.
            return torch.ops.aten._unsafe_view(y, sums.shape)
        # One scale for each token or group: along the axes before the last.
        scale = scale.reshape([*scale.shape, *[1] * (codes.dim() - scale.dim())])
        factor = scale * weight_scale.reshape(*weight_codes.shape[:-2], 1, weight_codes.shape[-2])
        term = 0 if bias is None else bias.float().unsqueeze(-2)
        return (sums * factor + term).to(x.dtype)

    return operators


def convolution_gradients(float_steps: Callable, grads_of_sums: Callable) -> Operators:
    """The gradients of a convolution, composed of these functions."""
    operators = Operators()

    @operators.register
    def grads_of_convolution(
        grad: Tensor | GradOfSums,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        weight: Tensor,
        dtype: torch.dtype,
        to_x: bool,
        to_weight: bool,
        *geometry: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients for x and for ``weight``, which is dequantized; products in ``dtype``."""
        whole = grads_of_sums(*grad) if isinstance(grad, GradOfSums) else grad
        # Only the shape of x matters for its gradient.
        x = float_steps(codes, zero_point, dtype) if to_weight else without_values(codes, dtype)
        dx, dw, _ = torch.ops.aten.convolution_backward(
            *(whole.to(dtype), x, weight.to(dtype), None, *geometry, [to_x, to_weight, False])
        )
        return dx, dw.float() * scale if to_weight else None

    return operators


def without_values(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor in the shape of ``like`` for gradients to flow to, with memory for one element,
    which nothing reads."""
    return like.new_empty_strided(like.shape, (0,) * like.dim(), dtype=dtype or like.dtype)


def norm(compute: Mapping[str, Callable]) -> Operators:
    """The batch norm of sums, composed of the operators on sums of a backend."""
    operators = Operators()

    @operators.register
    def statistics_of_sums(
        sums: Tensor,
        scale: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        bound: int,
    ) -> tuple[Tensor, ...]:
        _, total, squares, _, _ = compute["moments"](sums, bound)
        count = sums.numel() // scale.numel()
        found = compute["normalization"](total, squares, count, scale, weight, bias, eps)
        return tuple(x.clone() for x in found)  # outputs of operators share no memory

    @operators.register
    def norm_of_sums(
        product: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        sums: Tensor,
        scale: Tensor,
        factor: Tensor,
        term: Tensor,
        *_: Any,
    ) -> Tensor:
        y, _, _ = compute["map_sums"](sums, factor, term, None, False, False, False)
        return torch.empty_like(product).copy_(y)

    @operators.register
    def grads_of_norm_of_sums(
        grad: Tensor,
        weight: Tensor | None,
        sums: Tensor,
        scale: Tensor,
        factor: Tensor,
        term: Tensor,
        mean: Tensor,
        inverse: Tensor,
        uses_batch: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        line, of_weight, of_bias = compute["grads_of_norm"](
            grad, sums, factor, term, False, mean, inverse, scale, weight, uses_batch
        )
        made = compute["grads_of_sums"](grad, sums, factor, term, False, mean, *line)
        # Outputs of operators share no memory.
        return torch.empty_like(grad).copy_(made), of_weight.clone(), of_bias.clone()

    return operators


operators = (
    products(convolve_codes, multiply_codes, sums.map_sums)
    | convolution_gradients(float_steps, sums.grads_of_sums)
    | norm(sums.operators)
)
