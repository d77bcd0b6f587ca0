"""The scale is the largest magnitude, taken anew at every call."""

from typing import ClassVar

from torch import Tensor

from noisyq_fast.ops import fake_quantize, quantize
from noisyq_fast.quantizers.quantizer import Quantizer


class AbsMax(Quantizer):
    """`fake_quantize` as a module: the quantizer of weights in arXiv 2303.11803, section 3.1.

    Args:
        bits: width of the codes, 2..8.
        axis: one scale for each index of this axis: 0 stands for the output channels of a weight
            (a layer hands its weight over with these first). ``None``: one scale.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.AbsMax(bits=4)
        >>> quantizer(torch.tensor([[0.1, -0.7, 0.26], [10.0, 5.2, -70.0]]))
        tensor([[  0.1000,  -0.7000,   0.3000],
                [ 10.0000,  10.0000, -70.0000]])
    """

    KIND: ClassVar[int] = 1

    def __init__(self, bits: int = 4, axis: int | None = 0) -> None:
        super().__init__(bits, axis)

    def fake_quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(x, self.bits, self.axis)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The codes, int8, and the scales, float32, of ``x``, as from `quantize`."""
        return quantize(x, self.bits, self.axis)
