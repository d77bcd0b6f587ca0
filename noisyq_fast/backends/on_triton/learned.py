"""Learned quantizers (`learned_kernels`)."""

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import channel_layout, dense, like
from noisyq_fast.backends.on_triton import launch
from noisyq_fast.rules import CHUNK, Rule

# Chunks per program: each chunk has 64 sums, so that a few chunks share a warp.
_CHUNKS = 4

operators = Operators()


@operators.register
def fake_quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    return _mapped(x, parameters, rule, axis, x.dtype)


@operators.register
def quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    return _mapped(x, parameters, rule, axis, torch.int16)


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
    size = outer * inner
    chunks = -(-size // CHUNK)
    partial = torch.empty(rule.parameters * channels, chunks, device=x.device)
    lies_together = outer == 1 or channels == 1
    launch.launch(
        x,
        _kernels().learned_backward,
        (-(-chunks // _CHUNKS), channels),
        4,
        grad,
        x,
        parameters.contiguous(),
        dx,
        partial,
        float(rule.low),
        float(rule.high),
        channels,
        None if lies_together else inner,
        size,
        chunks,
        rule.name,
        rule.parameters,
        _CHUNKS,
    )
    while partial.shape[1] > 1:
        rows, count = partial.shape
        sums = torch.empty(rows, -(-count // CHUNK), device=x.device)
        grid = sums.shape[1], rows
        launch.launch(x, _kernels().sum_chunks, grid, 1, partial, sums, count, sums.shape[1])
        partial = sums
    return dx, partial.reshape(parameters.shape) * gradient_scale


def _mapped(
    x: Tensor, parameters: Tensor, rule: Rule, axis: int | None, dtype: torch.dtype
) -> Tensor:
    x, y = dense(x, dtype)
    ends = float(rule.low), float(rule.high)
    arguments = parameters.contiguous(), y, *ends, rule.name, rule.parameters
    launch.launch_map(_kernels().quantize_learned, x, axis, *arguments)
    return y


@cache
def _kernels() -> ModuleType:
    from noisyq_fast.backends.on_triton import learned_kernels

    return learned_kernels
