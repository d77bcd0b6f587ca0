"""The convolution of AdderNet and its gradients (``csrc/cpu/adder.cpp``), of float32; other dtypes
are left to the specification."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.kernel_arguments import core
from noisyq_fast.backends.native_cpu.threads import threads
from noisyq_fast.backends.reference import adder as reference
from noisyq_fast.backends.reference.adder import channels_last
from noisyq_fast.operators.checks import Pair, output_size

_BLOCK = 16
"""Channels per block in tensors that kernels read by the vector."""

operators = Operators()


@operators.register
def adder_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    if x.dtype != torch.float32:
        return reference.adder_conv2d(x, weight, stride, padding)
    size = output_size(x, weight, stride, padding)
    padded = _padded(x.permute(0, 2, 3, 1), padding).contiguous()
    weights = _blocks(weight.permute(2, 3, 1, 0))
    y = channels_last([len(x), len(weights) * _BLOCK, *size], x)
    shape = _shape(padded.shape, y.shape[1], weight, stride, padding, size)
    core.adder_forward(*_addresses(padded, weights, y), shape, threads())
    if y.shape[1] == len(weight):
        return y
    return channels_last([len(x), len(weight), *size], x).copy_(y[:, : len(weight)])


@operators.register
def adder_conv2d_input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    if x.dtype != torch.float32:
        return reference.adder_conv2d_input_gradient(grad, x, weight, stride, padding)
    blocks, weights = _blocks(x.permute(0, 2, 3, 1)), _blocks(weight.permute(2, 3, 0, 1))
    sums = torch.empty_like(blocks)
    border = [
        width
        for side, out, kernel, step, pad in zip(
            x.shape[2:], grad.shape[2:], weight.shape[2:], stride, padding, strict=True
        )
        for width in (max(0, kernel - 1 - pad), max(0, (side - 1 + pad) // step + 1 - out))
    ]
    around = F.pad(grad.permute(0, 2, 3, 1), (0, 0, *border[2:], *border[:2])).contiguous()
    shape = _shape(blocks.shape, len(weight), weight, stride, padding, grad.shape[2:])
    core.adder_input_gradient(*_addresses(blocks, weights, around, sums), shape, border, threads())
    return channels_last(list(x.shape), x).copy_(_joined(sums, x.shape[1]).permute(0, 3, 1, 2))


@operators.register
def adder_conv2d_weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    if x.dtype != torch.float32:
        return reference.adder_conv2d_weight_gradient(grad, x, weight, stride, padding)
    blocks = _blocks(_padded(x.permute(0, 2, 3, 1), padding))
    weights = _blocks(weight.permute(2, 3, 0, 1))
    sums = torch.empty_like(weights)
    of_positions = grad.permute(0, 2, 3, 1).contiguous()
    shape = _shape(blocks.shape, len(weight), weight, stride, padding, grad.shape[2:])
    core.adder_weight_gradient(*_addresses(blocks, weights, of_positions, sums), shape, threads())
    return torch.empty_like(weight).copy_(_joined(sums, x.shape[1]).permute(2, 3, 0, 1))


def _padded(x: Tensor, padding: Pair) -> Tensor:
    """``x``, zero-padded, as ``[N, H, W, C]``."""
    rows, columns = padding
    return F.pad(x, (0, 0, columns, columns, rows, rows))


def _blocks(x: Tensor) -> Tensor:
    """The last axis, padded with zeros, in blocks of channels; blocks are the first axis."""
    filled = F.pad(x, (0, -x.shape[-1] % _BLOCK))
    return filled.unflatten(-1, (-1, _BLOCK)).movedim(-2, 0).contiguous()


def _joined(blocks: Tensor, channels: int) -> Tensor:
    """Undoes `_blocks`."""
    return blocks.movedim(0, -2).flatten(-2)[..., :channels]


def _shape(
    x: Sequence[int],
    outputs: int,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    size: Sequence[int],
) -> list[int]:
    """The sizes that the kernels take, for ``x`` ``[N, H, W, C]`` or ``[blocks, N, H, W, 16]``."""
    *blocks, images, rows, columns, channels = x
    inputs = math.prod(blocks) * channels
    kernel = weight.shape[2:]
    return [images, rows, columns, inputs, outputs, *kernel, *stride, *padding, *size]


def _addresses(*tensors: Tensor) -> list[int]:
    return [x.data_ptr() for x in tensors]
