"""Tensors as integers and scales."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from noisyq_fast.operators.quantize import dequantize_on_grid


@dataclass(frozen=True, eq=False)
class Codes:
    """A quantized tensor: ``(codes - zero_point) * scale``.

    Attributes:
        codes: int8 or uint8, in the shape of the tensor.
        scale: float32, one value, or one for each index of an axis, token or group.
        zero_point: uint8, in the shape of ``scale``, on an affine grid; else ``None``.
        largest: an upper bound of ``|code - zero_point|``.
        source: the tensor that was quantized. Gradients pass straight through to it.
        masked: packed bits, one for each element of ``codes`` in memory order, set if the element
            has no gradient; ``None`` if all have one.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.AbsMax(bits=4, axis=None)
        >>> quantizer.codes(torch.tensor([0.1, -0.7, 0.26])).codes
        tensor([ 1, -7,  3], dtype=torch.int8)
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    largest: int
    source: Tensor
    masked: Tensor | None = None

    def dequantized(self, axis: int | None = None) -> Tensor:
        """The dequantized values, float32; ``scale`` has one value, or one for each index of
        ``axis``."""
        return dequantize_on_grid(self.codes, self.scale, self.zero_point, axis)
