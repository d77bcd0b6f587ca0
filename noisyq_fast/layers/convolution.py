"""Convolutions on fake-quantized weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisyq_fast.grid import ODD, UNSIGNED
from noisyq_fast.integer import products
from noisyq_fast.integer.deferred import Deferred, deferrable, memory_format
from noisyq_fast.layers.layer import QuantLayer


def pads_of(layer: Any) -> list[int]:
    """The padding of a convolution of `torch.nn`, as `torch.nn.functional.pad` takes it. Some
    models change ``padding`` and ``dilation`` of convolutions that they were given."""
    if layer.padding_mode != "zeros":
        return layer._reversed_padding_repeated_twice  # as PyTorch does it
    axes = len(layer.kernel_size)
    dilation = _of_axes(layer.dilation, axes)
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, layer.kernel_size, strict=True)]
        return [pad for total in reversed(totals) for pad in (total // 2, total - total // 2)]
    padding = (0,) if layer.padding == "valid" else layer.padding
    return [pad for pad in reversed(_of_axes(padding, axes)) for _ in range(2)]


def _of_axes(value: Any, axes: int) -> tuple[int, ...]:
    """A number for each axis, of what PyTorch's convolutions take."""
    numbers = (value,) if isinstance(value, int) else tuple(value)
    return numbers * axes if len(numbers) == 1 else numbers


class _QuantConv(QuantLayer):
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Literal["zeros", "reflect", "replicate", "circular"]
    _conv_forward: Callable[..., Tensor]
    can_defer = True
    integer_axes = (None,)

    def compute_integers(self, x: Tensor) -> Tensor:
        follows_chain = isinstance(x, Deferred)
        unbatched = not follows_chain and x.dim() == len(self.kernel_size) + 1
        x, padding = self._padded(x.unsqueeze(0) if unbatched else x)
        axes = len(padding)
        geometry = products.Geometry(
            *(_of_axes(self.stride, axes), padding, _of_axes(self.dilation, axes)),
            *(False, (0,) * axes, self.groups),
        )
        codes, weight, bias = self.coded(x)
        operands = codes, weight, bias, geometry
        are_plain = deferrable(codes.codes) and deferrable(weight.codes)
        if self.defers and are_plain and (follows_chain or x.dtype == torch.float32):
            y = products.deferred_convolution(*operands, self, x)
        else:
            y = products.convolution(*operands)
            if self.norm and self.normalizes(y):
                y = products.normalized_convolution(*operands, y, *self.norm)
            if follows_chain:
                y = y.contiguous(memory_format=memory_format(x))
        return y.squeeze(0) if unbatched else y

    def why_float(self) -> str | None:
        quantizer = self.input_quantizer
        if quantizer is not None and quantizer.grid_of_codes == ODD and self._pads_before():
            return "the zeros around its input have no code on the odd grid"
        return super().why_float()

    def _pads_before(self) -> bool:
        """Whether zeros have to be added to the input before the product, which pads
        symmetrically."""
        pads = pads_of(self)
        return self.padding_mode == "zeros" and pads[::2] != pads[1::2]

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The input with the padding that the product cannot do, and the padding that it can.
        Padding before the quantizer changes no range, and the value 0 has a code."""
        pads = self._pads(x)
        none = (0,) * len(self.kernel_size)
        if self.padding_mode != "zeros":
            return F.pad(x, pads, mode=self.padding_mode), none
        return (x, tuple(pads[::-2])) if pads[::2] == pads[1::2] else (F.pad(x, pads), none)

    def _pads(self, x: Tensor) -> list[int]:
        """The padding of an input, as `torch.nn.functional.pad` takes it."""
        return pads_of(self)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """`torch.nn.Conv1d` on fake-quantized weights and inputs. Arguments as for `QuantLayer`."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """`torch.nn.Conv2d` on fake-quantized weights and inputs. Arguments as for `QuantLayer`.

    Example:
        >>> import torch, noisyq_fast
        >>> conv = noisyq_fast.QuantConv2d(3, 16, kernel_size=3, weight_bits=4, activation_bits=8)
        >>> conv(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 6, 6])
    """


class QuantSameConv2d(QuantConv2d):
    """The convolution of timm with the padding of TensorFlow (`Conv2dSame`), on fake-quantized
    weights and inputs: zeros for ``ceil(size / stride)`` outputs, one more at the end than before
    the input if their number is odd. Made by `quantize_model_`."""

    def _pads_before(self) -> bool:
        return True  # it depends on the input

    def _pads(self, x: Tensor) -> list[int]:
        pads: list[int] = []
        for i, size in enumerate(x.shape[-2:]):
            kernel, stride = self.dilation[i] * (self.kernel_size[i] - 1) + 1, self.stride[i]
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        return pads

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super().compute(F.pad(x, self._pads(x)), weight, bias)


class QuantConv3d(_QuantConv, nn.Conv3d):
    """`torch.nn.Conv3d` on fake-quantized weights and inputs. Arguments as for `QuantLayer`."""


class _QuantConvTranspose(QuantLayer):
    """Transposed convolutions. The weight is ``[in, out / groups, ...]``; group g has the g-th part
    of ``in``."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Any  # numbers; other convolutions take a str too
    dilation: tuple[int, ...]
    groups: int
    _output_padding: Callable[..., list[int]]
    integer_axes = (None,)

    def by_channel(self, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return weight.transpose(0, 1)
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def from_channels(self, by_channel: Tensor, weight: Tensor) -> Tensor:
        if self.groups == 1:
            return by_channel.transpose(0, 1)
        return by_channel.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def compute_integers(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        unbatched = x.dim() == len(self.kernel_size) + 1
        output_padding = self._output_padding_of(x, output_size)
        x = x.unsqueeze(0) if unbatched else x
        axes = len(self.kernel_size)
        stride, padding = _of_axes(self.stride, axes), _of_axes(self.padding, axes)
        dilation = _of_axes(self.dilation, axes)
        geometry = products.Geometry(
            stride, padding, dilation, True, tuple(output_padding), self.groups
        )
        codes, weight = self.input_codes(x), self.weight_codes()
        y = products.convolution(codes, weight, self.bias, geometry)
        return y.squeeze(0) if unbatched else y

    def why_float(self) -> str | None:
        if (
            self.groups > 1
            and self.weight_quantizer
            and self.weight_quantizer.grid_kind == UNSIGNED
        ):
            return "an unsigned weight of several groups has no product of codes"
        return super().why_float()

    def _output_padding_of(self, x: Tensor, output_size: list[int] | None) -> list[int]:
        return self._output_padding(
            *(x, output_size, self.stride, self.padding, self.kernel_size),
            *(len(self.kernel_size), self.dilation),
        )

    def compute(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        output_size: list[int] | None = None,
    ) -> Tensor:
        dimensions = len(self.kernel_size)
        padding = self._output_padding_of(x, output_size)
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dimensions - 1]
        return convolve(
            x, weight, bias, self.stride, self.padding, padding, self.groups, self.dilation
        )


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` on fake-quantized weights and inputs. Arguments as for
    `QuantLayer`."""


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` on fake-quantized weights and inputs. Arguments as for
    `QuantLayer`."""


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` on fake-quantized weights and inputs. Arguments as for
    `QuantLayer`."""
