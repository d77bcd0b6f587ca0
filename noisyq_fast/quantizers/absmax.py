"""Scales from the absmax, or the range, of the tensor itself, computed at every call."""

from typing import ClassVar

from torch import Tensor

from noisyq_fast.backends.reference.masks import pack_like
from noisyq_fast.grid import SIGNED, UNSIGNED
from noisyq_fast.integer.codes import Codes
from noisyq_fast.operators import gradients
from noisyq_fast.operators.granularity import Axis
from noisyq_fast.operators.quantize import fake_quantize, quantize
from noisyq_fast.quantizers.quantizer import Quantizer, with_name_in_errors


class AbsMax(Quantizer):
    """`fake_quantize` as a module: the quantizer of weights in arXiv 2303.11803, section 3.1.

    Args:
        bits: width of the codes, 2..8.
        axis: one scale for each index of this axis: 0 is the output channels of a weight (a layer
            passes its weight with these first). ``None``: one scale; ``"token"``: one for each
            index of all axes but the last (for activations; in evaluation too).
        grid: ``"signed"``, ``"full"``, ``"unsigned"``, ``"affine"`` or ``"odd"``, as in `Grid`.
        group_size: the number of consecutive input channels (with all kernel positions) of an
            output channel that share a scale, as for `fake_quantize`.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.AbsMax(bits=4)
        >>> quantizer(torch.tensor([[0.1, -0.7, 0.26], [10.0, 5.2, -70.0]]))
        tensor([[  0.1000,  -0.7000,   0.3000],
                [ 10.0000,  10.0000, -70.0000]])
        >>> noisyq_fast.AbsMax(bits=4, group_size=32)
        AbsMax(bits=4, group_size=32)
        >>> noisyq_fast.AbsMax(bits=8, axis="token", grid="affine")
        AbsMax(bits=8, axis='token', grid='affine')
    """

    KIND: ClassVar[int] = 1
    gives_codes: ClassVar[bool] = True

    def __init__(
        self,
        bits: int = 4,
        axis: Axis = 0,
        grid: str = SIGNED,
        group_size: int | None = None,
    ) -> None:
        super().__init__(bits, axis, grid, group_size)

    def fake_quantize(self, x: Tensor) -> Tensor:
        return fake_quantize(
            x, self.bits, self.axis, grid=self.grid_kind, group_size=self.group_size
        )

    @with_name_in_errors
    def codes(self, x: Tensor) -> Codes:
        codes, scale, *zero_point = quantize(
            x, self.bits, self.axis, grid=self.grid_kind, group_size=self.group_size
        )
        masked = None
        if self.grid_kind == UNSIGNED and gradients.wanted():
            masked = pack_like(codes, x < 0)
        known = zero_point[0] if zero_point else None
        return self._codes(x, codes, scale, known, masked)
