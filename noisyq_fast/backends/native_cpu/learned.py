"""Learned quantizers (``csrc/cpu/learned.cpp``)."""

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import DTYPE_CODES, channel_layout, core, dense, like
from noisyq_fast.backends.native_cpu.threads import threads
from noisyq_fast.rules import NAMES, Rule

operators = Operators()


@operators.register
def fake_quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    x, y = dense(x)
    parameters = parameters.contiguous()
    core.fake_quantize_learned(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        parameters.data_ptr(),
        y.data_ptr(),
        *_rest(y, rule, axis),
    )
    return y


@operators.register
def quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    x, codes = dense(x, torch.int16)
    parameters = parameters.contiguous()
    core.quantize_learned(
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        parameters.data_ptr(),
        codes.data_ptr(),
        *_rest(codes, rule, axis),
    )
    return codes


@operators.register
def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    parameters: Tensor,
    rule: Rule,
    axis: int | None,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    x, grad = like(x, dx), like(grad, dx)
    parameters = parameters.contiguous()
    sums = torch.empty_like(parameters)
    core.fake_quantize_learned_backward(
        DTYPE_CODES[grad.dtype],
        grad.data_ptr(),
        DTYPE_CODES[x.dtype],
        x.data_ptr(),
        parameters.data_ptr(),
        dx.data_ptr(),
        sums.data_ptr(),
        *_rest(dx, rule, axis),
    )
    return dx, sums.mul_(gradient_scale)


def _rest(x: Tensor, rule: Rule, axis: int | None) -> tuple[int, ...]:
    """The kernel arguments, from the layout on."""
    return *channel_layout(x, axis), NAMES.index(rule.name), rule.low, rule.high, threads()
