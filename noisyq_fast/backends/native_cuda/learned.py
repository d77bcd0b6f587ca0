"""Learned quantizers (``csrc/cuda/learned.cu``)."""

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import DTYPE_CODES, channel_layout, dense, like
from noisyq_fast.backends.native_cuda.launch import launch, splits_of
from noisyq_fast.rules import CHUNK, NAMES, Rule

operators = Operators()


@operators.register
def fake_quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    x, y = dense(x)
    _map_learned("fake_quantize_learned", x, parameters, y, rule, axis)
    return y


@operators.register
def quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    x, codes = dense(x, torch.int16)
    _map_learned("quantize_learned", x, parameters, codes, rule, axis)
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
    if x.numel() == 0:
        return dx, torch.zeros_like(parameters)
    x, grad = like(x, dx), like(grad, dx)
    outer, channels, inner = channel_layout(dx, axis)
    arguments = parameters.contiguous(), rule, channels, gradient_scale
    if (outer == 1 or channels == 1) and grad.dtype == x.dtype:
        return dx, _learned_backward(grad, x, dx, *arguments)
    # Channels that are not contiguous, and gradients of another dtype, are rare: they are copied.
    memory = (outer, channels, inner), (channels * inner, inner, 1)
    x, grad = (t.as_strided(*memory).transpose(0, 1).float().contiguous() for t in (x, grad))
    of_channels = torch.empty_like(x)
    sums = _learned_backward(grad, x, of_channels, *arguments)
    dx.as_strided(*memory).transpose(0, 1).copy_(of_channels)
    return dx, sums


def _map_learned(
    kernel: str, x: Tensor, parameters: Tensor, y: Tensor, rule: Rule, axis: int | None
) -> None:
    layout = channel_layout(y, axis)
    if layout[0] > 0:
        parameters = parameters.contiguous()
        launch(
            kernel,
            x,
            DTYPE_CODES[x.dtype],
            x.data_ptr(),
            parameters.data_ptr(),
            y.data_ptr(),
            *layout,
            splits_of(x, layout)[1],
            *_rule_arguments(rule),
        )


def _learned_backward(
    grad: Tensor,
    x: Tensor,
    dx: Tensor,
    parameters: Tensor,
    rule: Rule,
    channels: int,
    gradient_scale: float,
) -> Tensor:
    """For contiguous channels: writes ``dx``, and returns the gradient of the parameters."""
    size = x.numel() // channels
    sums = torch.empty_like(parameters)
    partial = parameters.new_empty(sums.numel() * _partial_sums(size))
    launch(
        "fake_quantize_learned_backward",
        x,
        DTYPE_CODES[x.dtype],
        grad.data_ptr(),
        x.data_ptr(),
        parameters.data_ptr(),
        dx.data_ptr(),
        sums.data_ptr(),
        partial.data_ptr(),
        channels,
        size,
        *_rule_arguments(rule),
        gradient_scale,
    )
    return sums


def _rule_arguments(rule: Rule) -> tuple[int, int, int]:
    return NAMES.index(rule.name), rule.low, rule.high


def _partial_sums(size: int) -> int:
    """The number of partial sums of chunks of a channel of ``size`` elements."""
    chunks = -(-size // CHUNK)
    return 0 if chunks <= 1 else chunks + _partial_sums(chunks)
