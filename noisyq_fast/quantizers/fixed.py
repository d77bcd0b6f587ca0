"""Quantization with given, fixed scales."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from noisyq_fast.backends.reference.levels import Levels
from noisyq_fast.grid import SIGNED
from noisyq_fast.integer.codes import Codes
from noisyq_fast.operators import checks
from noisyq_fast.operators.granularity import Axis, Groups, by_group
from noisyq_fast.operators.quantize import dequantize
from noisyq_fast.quantizers.quantizer import Quantizer, with_name_in_errors


class Fixed(Quantizer):
    """Quantizes with given scales, such as from a post-training method or a file. They are the same
    in training and in evaluation, and the gradient is passed on unchanged.

    Args:
        scale: float32, ``[]`` or one for each index of ``axis``; with a ``group_size``
            ``[output channels, input channels / group_size]``.
        bits: width of the codes, 2..8.
        axis: as for `AbsMax`, except ``"token"``.
        grid: as for `AbsMax`.
        group_size: as for `AbsMax`.
        zero_point: the codes of the value 0, in the shape of ``scale``; on the affine grid only.

    Attributes:
        scale, zero_point: buffers.

    Raises:
        ValueError: scales that are not positive and finite, or of another shape; a zero point that
            is not a code, that is missing on the affine grid or given on another.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.Fixed(torch.tensor([0.1, 0.5]), bits=4, axis=0)
        >>> quantizer(torch.tensor([[0.12, -5.0], [0.6, 0.2]]))
        tensor([[ 0.1000, -0.7000],
                [ 0.5000,  0.0000]])
    """

    KIND: ClassVar[int] = 8
    gives_codes: ClassVar[bool] = True

    axis: int | None
    scale: Tensor
    zero_point: Tensor | None

    def __init__(
        self,
        scale: Tensor,
        bits: int = 4,
        axis: Axis = None,
        grid: str = SIGNED,
        group_size: int | None = None,
        zero_point: Tensor | None = None,
    ) -> None:
        super().__init__(bits, axis, grid, group_size)
        checks.tensors(scale=scale)
        dimensions = 2 if group_size else 0 if axis is None else 1
        if isinstance(axis, str) or scale.dim() != dimensions:
            takes = "[output channels, groups]" if group_size else "[]" if axis is None else "[n]"
            raise ValueError(
                f"scale: got shape {list(scale.shape)} with axis {axis!r}, takes {takes}"
            )
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError("scale: got a value that is not positive and finite")
        if (zero_point is not None) != self.grid.is_affine:
            takes = "one on the affine grid, none on the others"
            got = "none" if zero_point is None else "one"
            raise ValueError(f"zero_point: got {got} on the {grid} grid, takes {takes}")
        self.register_buffer("scale", scale.detach().clone().float())
        if zero_point is not None:
            checks.tensors(zero_point=zero_point)
            least, most = self.grid.code_min, self.grid.code_max
            known = zero_point.shape == scale.shape and not zero_point.is_floating_point()
            if not known or not bool(((zero_point >= least) & (zero_point <= most)).all()):
                takes = f"codes from {least} to {most} in the shape of scale"
                raise ValueError(f"zero_point: got {zero_point}, takes {takes}")
            zero_point = zero_point.detach().to(torch.uint8, copy=True)
        self.register_buffer("zero_point", zero_point)

    def fake_quantize(self, x: Tensor) -> Tensor:
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self._values(x)
        return self._values(x.detach()) + (x - x.detach())  # the difference is 0

    def _values(self, x: Tensor) -> Tensor:
        if not by_group(self.axis, self.group_size):
            return self._levels().values(x, self.axis)
        groups = Groups(x, self.axis, self.group_size)
        return groups.restored(self._levels(groups).values(groups.x, 0))

    def values_of(self, codes: Tensor) -> Tensor:
        """The dequantized values, float32, of codes."""
        scale, zero_point = self.scale, self.zero_point
        return dequantize(
            codes, scale, self.axis, zero_point=zero_point, group_size=self.group_size
        )

    @with_name_in_errors
    def codes(self, x: Tensor) -> Codes:
        if by_group(self.axis, self.group_size):
            groups = Groups(x.detach(), self.axis, self.group_size)
            codes = groups.restored(self._levels(groups).codes(groups.x, 0))
        else:
            codes = self._levels().codes(x.detach(), self.axis)
        zero_points = [] if self.zero_point is None else [self.zero_point]
        return self._codes(x, codes, self.scale, *zero_points)

    def _levels(self, groups: Groups | None = None) -> Levels:
        scale, zero_point = self.scale, self.zero_point
        zero: Any = torch.zeros_like(scale) if zero_point is None else zero_point.float()
        of_groups: Any = scale
        if groups is not None:
            of_groups, zero = groups.flat("scale", scale), groups.flat("zero_point", zero)
        return Levels(of_groups, zero, self.grid)
