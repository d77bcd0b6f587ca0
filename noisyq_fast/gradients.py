"""The gradients of the operators.

Each function takes ``below_autograd``, which computes the operator, and then its arguments.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noisyq_fast import checks


class StraightThrough(torch.autograd.Function):
    """dy/dx = 1. Nothing is computed and nothing is saved."""

    @staticmethod
    def forward(ctx: Any, below_autograd: Callable, x: Tensor, *others: object) -> Tensor:
        ctx.others = len(others)
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad, *[None] * ctx.others


class StraightThroughEach:
    """`StraightThrough` for each tensor of a list: none has to wait for another's gradient."""

    @staticmethod
    def apply(below_autograd: Callable, tensors: list[Tensor], *_: object) -> list[Tensor]:
        with torch.no_grad():
            outputs = below_autograd()
        return [
            StraightThrough.apply(lambda y=y: y, x) for x, y in zip(tensors, outputs, strict=True)
        ]


class ClippedStraightThrough(torch.autograd.Function):
    """dy/dx = 0 where the code was clamped, otherwise 1. Saves a bit for each element; where the
    operator was not asked for those, dy/dx = 1."""

    @staticmethod
    def forward(
        ctx: Any, below_autograd: Callable, x: Tensor, *others: object
    ) -> tuple[Tensor, Tensor]:
        ctx.others = len(others)
        y, clipped = below_autograd()
        ctx.strides = y.stride()
        ctx.save_for_backward(clipped)
        ctx.mark_non_differentiable(clipped)
        return y, clipped

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (clipped,) = ctx.saved_tensors
        if clipped.numel() > 0:
            if grad.stride() != ctx.strides:
                grad = grad.new_empty_strided(grad.shape, ctx.strides).copy_(grad)
            grad = torch.ops.noisyq.zero_clipped(grad, clipped)
        return None, grad, *[None] * ctx.others


class ZeroClipped(torch.autograd.Function):
    """Linear in the gradient that it masks."""

    @staticmethod
    def forward(ctx: Any, below_autograd: Callable, grad: Tensor, clipped: Tensor) -> Tensor:
        masked = below_autograd()
        ctx.strides = masked.stride()
        ctx.save_for_backward(clipped)
        return masked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (clipped,) = ctx.saved_tensors
        grad = grad.new_empty_strided(grad.shape, ctx.strides).copy_(grad)
        return None, torch.ops.noisyq.zero_clipped(grad, clipped), None


class Dequantize(torch.autograd.Function):
    """dy/dscale = codes."""

    @staticmethod
    def forward(
        ctx: Any, below_autograd: Callable, codes: Tensor, scale: Tensor, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.axis = checks.front_axis(axis, codes)
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        others = [d for d in range(codes.dim()) if d != ctx.axis]
        products = grad * codes
        return None, None, products.sum(others) if others else products, None
