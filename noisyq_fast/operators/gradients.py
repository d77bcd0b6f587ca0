"""The gradients of the operators, in reverse mode and in forward mode.

Each class takes ``below_autograd``, which computes the operator, and then the operator's arguments.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from noisyq_fast.backends.reference import learned
from noisyq_fast.operators import checks, dispatch
from noisyq_fast.rules import Rule


def apply_outside_transforms(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, without its search for tensors that have escaped from `torch.func`."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


class Gradient(torch.autograd.Function):
    """A `torch.autograd.Function` that also works inside `torch.func.grad`, `jvp` and the like."""

    @classmethod
    def apply(cls, below_autograd: Callable, *arguments: Any) -> Any:
        if not torch._C._are_functorch_transforms_active():
            return apply_outside_transforms(cls, below_autograd, *arguments)
        # torch.func calls an operator once for each of its nested transforms: this is one of them.
        with enable_single_level_autograd_function():
            return apply_outside_transforms(cls, lambda: unrecorded(below_autograd), *arguments)


def wanted() -> bool:
    """Whether derivatives are recorded now. Forward mode ignores no_grad()."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0


def unrecorded(below_autograd: Callable) -> Any:
    """The operator's value, unrecorded by this transform; outer transforms may record it."""
    further_out = torch._C._are_functorch_transforms_active()
    if not further_out and forward_ad._current_level < 0:
        records = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return below_autograd()
        finally:
            torch._C._set_grad_enabled(records)
    with torch.set_grad_enabled(further_out), forward_ad._set_fwd_grad_enabled(further_out):
        return below_autograd()


class StraightThrough(Gradient):
    """dy/dx = 1. Nothing is computed and nothing is saved."""

    @staticmethod
    def forward(ctx: Any, below_autograd: Callable, x: Tensor, *others: object) -> Tensor:
        ctx.others = len(others)
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, grad, *[None] * ctx.others

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *others: object) -> Tensor:
        return tangent


class StraightThroughEach(Gradient):
    """`StraightThrough` for each tensor of a list, so that each gradient passes on its own."""

    @classmethod
    def apply(cls, below_autograd: Callable, tensors: list[Tensor], *_: object) -> list[Tensor]:
        outputs = unrecorded(below_autograd)
        return [
            StraightThrough.apply(lambda y=y: y, x) for x, y in zip(tensors, outputs, strict=True)
        ]


class ClippedStraightThrough(Gradient):
    """dy/dx = 0 where the operator's mask is set, otherwise 1. Saves the mask, one bit per element,
    unless it is empty, which means 1 everywhere."""

    @staticmethod
    def forward(
        ctx: Any, below_autograd: Callable, x: Tensor, *others: object
    ) -> tuple[Tensor, Tensor]:
        ctx.others = len(others)
        y, clipped = below_autograd()
        ctx.strides = y.stride()
        ctx.masks = clipped.numel() > 0 and not _is_known_to_be_zero(clipped)
        if ctx.masks:
            ctx.save_for_backward(clipped)
            ctx.save_for_forward(clipped)
        ctx.mark_non_differentiable(clipped)
        return y, clipped

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, ClippedStraightThrough._masked(ctx, grad), *[None] * ctx.others

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *others: object) -> tuple[Tensor, None]:
        return ClippedStraightThrough._masked(ctx, tangent), None

    @staticmethod
    def _masked(ctx: Any, derivative: Tensor) -> Tensor:
        if not ctx.masks:
            return derivative
        (clipped,) = ctx.saved_tensors
        return torch.ops.noisyq.zero_clipped(laid_out(derivative, ctx.strides), clipped)


class ZeroClipped(Gradient):
    """Masks a gradient; linear in it."""

    @staticmethod
    def forward(ctx: Any, below_autograd: Callable, grad: Tensor, clipped: Tensor) -> Tensor:
        masked = below_autograd()
        ctx.strides = masked.stride()
        ctx.save_for_backward(clipped)
        ctx.save_for_forward(clipped)
        return masked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, ZeroClipped.jvp(ctx, None, grad), None

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor, *others: object) -> Tensor:
        (clipped,) = ctx.saved_tensors
        return torch.ops.noisyq.zero_clipped(laid_out(tangent, ctx.strides), clipped)


class Dequantize(Gradient):
    """dy/dscale = codes."""

    @staticmethod
    def forward(
        ctx: Any, below_autograd: Callable, codes: Tensor, scale: Tensor, axis: int | None
    ) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.save_for_forward(codes)
        ctx.axis = checks.front_axis(axis, codes)
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (codes,) = ctx.saved_tensors
        others = [d for d in range(codes.dim()) if d != ctx.axis]
        products = grad * codes
        return None, None, products.sum(others) if others else products, None

    @staticmethod
    def jvp(ctx: Any, _: None, codes_tangent: None, tangent: Tensor, axis: None) -> Tensor:
        (codes,) = ctx.saved_tensors
        return torch.ops.noisyq.dequantize(codes, tangent, ctx.axis)


class DequantizeOnGrid(Gradient):
    """dy/dscale = codes - zero_point."""

    @staticmethod
    def forward(
        ctx: Any,
        below_autograd: Callable,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        axis: int | None,
    ) -> Tensor:
        ctx.axis = checks.front_axis(axis, codes)
        ctx.save_for_backward(codes, zero_point)
        ctx.save_for_forward(codes, zero_point)
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, zero_point = ctx.saved_tensors
        others = [d for d in range(codes.dim()) if d != ctx.axis]
        ones = grad.new_ones([] if ctx.axis is None else [codes.shape[ctx.axis]])
        steps = torch.ops.noisyq.dequantize_on_grid(codes, ones.float(), zero_point, ctx.axis)
        products = grad * steps
        return None, None, products.sum(others) if others else products, None, None

    @staticmethod
    def jvp(ctx: Any, _: None, codes: None, tangent: Tensor, *others: None) -> Tensor:
        codes, zero_point = ctx.saved_tensors
        return torch.ops.noisyq.dequantize_on_grid(codes, tangent, zero_point, ctx.axis)


class Learned(Gradient):
    """The derivatives of the rule, computed and summed by another operator."""

    @staticmethod
    def forward(
        ctx: Any,
        below_autograd: Callable,
        x: Tensor,
        parameters: Tensor,
        rule: str,
        low: int,
        high: int,
        axis: int | None,
        gradient_scale: float,
    ) -> Tensor:
        ctx.rule = rule, low, high, checks.front_axis(axis, x)
        ctx.gradient_scale = gradient_scale
        ctx.save_for_backward(x, parameters)
        ctx.save_for_forward(x, parameters)
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operator = torch.ops.noisyq.fake_quantize_learned_backward
        dx, d_parameters = operator(grad, *ctx.saved_tensors, *ctx.rule, ctx.gradient_scale)
        return None, dx, d_parameters, *[None] * 5

    @staticmethod
    def jvp(
        ctx: Any, _: None, x_tangent: Tensor, parameters_tangent: Tensor, *others: None
    ) -> Tensor:
        x, parameters = ctx.saved_tensors
        *rule, axis = ctx.rule
        by_x, *by_each = learned.derivatives(x, parameters, Rule(*rule), axis)
        tangent = torch.zeros_like(by_x) if x_tangent is None else by_x * x_tangent
        if parameters_tangent is not None:
            along = [-1 if d == axis else 1 for d in range(x.dim())] if axis is not None else []
            for derivative, p in zip(by_each, parameters_tangent.unbind(), strict=True):
                tangent = tangent + derivative * p.reshape(along)
        return tangent.to(x.dtype)


class Adder(Gradient):
    """The gradients of AdderNet, which are not derivatives: of ``-|w - x|``, ``x - w`` for w and
    ``clip(w - x, -1, 1)`` for x."""

    @staticmethod
    def forward(
        ctx: Any,
        below_autograd: Callable,
        x: Tensor,
        weight: Tensor,
        stride: list[int],
        padding: list[int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.others = stride, padding
        return below_autograd()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, of_x, of_weight, *_ = ctx.needs_input_grad
        arguments = grad, *ctx.saved_tensors, *ctx.others
        noisyq = torch.ops.noisyq
        dx = noisyq.adder_conv2d_input_gradient(*arguments) if of_x else None
        dw = noisyq.adder_conv2d_weight_gradient(*arguments) if of_weight else None
        return None, dx, dw, None, None


def _is_known_to_be_zero(mask: Tensor) -> bool:
    """Whether no bit is set. Checked only for plain tensors on the CPU: others may have no values
    yet, or the check would synchronize with the device."""
    return dispatch.is_plain(mask) and mask.device.type == "cpu" and not mask.any()


def laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` with the strides of the tensor whose bits were saved."""
    if x.stride() == strides:
        return x
    return x.new_empty_strided(x.shape, strides).copy_(x)
