"""The convolution of AdderNet (arXiv 1912.13200) and its gradients: the executable specification.

With the zero-padded input ``X``, whose padding counts too, and elements ``k`` of a window::

    Y[o, n]  = -sum_k |W[o, k] - X[k, n]|
    dX[k, n] = sum_o clip(W[o, k] - X[k, n], -1, 1) dY[o, n]
    dW[o, k] = sum_n (X[k, n] - W[o, k]) dY[o, n]

Terms are added one after the other, starting from 0, so that all backends give the same bits: for Y
in the order of kernel rows, kernel columns and input channels; for dX of rows, columns and output
channels; for dW over the positions of an image, row after row, and then over the images. No
temporary tensor has an axis of terms besides those of the output.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from noisyq_fast.backends.backend import Operators
from noisyq_fast.operators.checks import Pair, output_size

operators = Operators()


def channels_last(size: list[int], like: Tensor) -> Tensor:
    """An empty tensor with the channels last, the layout of outputs with positions."""
    return torch.empty(
        size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


@operators.register
def adder_conv2d(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
    size = output_size(x, weight, stride, padding)
    y = channels_last([len(x), len(weight), *size], x).zero_()
    for i, j, window in windows(x, weight, size, stride, padding):
        for c in range(x.shape[1]):
            y -= (weight[:, c, i, j, None, None] - window[:, c : c + 1]).abs()
    return y


@operators.register
def adder_conv2d_input_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    size = list(grad.shape[2:])
    dx = torch.zeros_like(_padded(x, padding))
    of_x = windows(x, weight, size, stride, padding)
    of_dx = windows(dx, weight, size, stride, (0, 0))
    for (i, j, window), (_, _, sums) in zip(of_x, of_dx, strict=True):
        for o in range(len(weight)):
            slope = (weight[o, :, i, j, None, None] - window).clamp(-1, 1)
            sums += slope * grad[:, o : o + 1]
    rows, columns = padding
    inner = dx[:, :, rows : rows + x.shape[2], columns : columns + x.shape[3]]
    return channels_last(list(x.shape), x).copy_(inner)


@operators.register
def adder_conv2d_weight_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    size = list(grad.shape[2:])
    dw = torch.zeros_like(weight)
    for i, j, window in windows(x, weight, size, stride, padding):
        of_images = weight.new_zeros(len(x), *weight.shape[:2])
        for p in range(size[0]):
            for q in range(size[1]):
                difference = window[:, None, :, p, q] - weight[:, :, i, j]
                of_images += difference * grad[:, :, None, p, q]
        for of_image in of_images:
            dw[:, :, i, j] += of_image
    return dw


def _padded(x: Tensor, padding: Pair) -> Tensor:
    rows, columns = padding
    return F.pad(x, (columns, columns, rows, rows))


def windows(
    x: Tensor, weight: Tensor, size: list[int], stride: Pair, padding: Pair
) -> Iterator[tuple[int, int, Tensor]]:
    """For each element of the kernel, the inputs it is combined with: a view in the output's
    shape."""
    x = _padded(x, padding) if any(padding) else x
    for i in range(weight.shape[2]):
        rows = slice(i, i + (size[0] - 1) * stride[0] + 1, stride[0])
        for j in range(weight.shape[3]):
            columns = slice(j, j + (size[1] - 1) * stride[1] + 1, stride[1])
            yield i, j, x[:, :, rows, columns]
