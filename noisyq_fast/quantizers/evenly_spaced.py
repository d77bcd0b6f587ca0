"""Given, fixed, evenly spaced values that have no grid of one-byte codes."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from noisyq_fast.operators import checks
from noisyq_fast.quantizers.quantizer import Quantizer


class EvenlySpaced(Quantizer):
    """Rounds to the values ``offset + (k - middle) * step``, ``k`` from 0 to ``2^b - 1``.

    `Fixed` covers the grids of `Grid`. This class covers the values of `DSQ`, which have any
    offset, and the 256 values without 0 of 8-bit `AQD` and `SAT`. `noisyq_fast.load_integers`
    restores such weights with it. The gradient is passed on unchanged.

    Args:
        step: float32, ``[]`` or one for each index of ``axis``.
        offset: float32, in the shape of ``step``; ``None``: 0.
        bits: width of the codes, 2..8.
        axis: one step for each index of this axis; ``None``: one step.
        centered: whether ``middle`` is ``(2^b - 1) / 2``, so that the values lie around the offset;
            else it is 0.

    Raises:
        ValueError: steps that are not positive and finite, offsets that are not finite, or other
            shapes.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.EvenlySpaced(torch.tensor(0.5), bits=2, centered=True)
        >>> quantizer(torch.tensor([0.1, -0.7, 0.3, 9.0]))
        tensor([ 0.2500, -0.7500,  0.2500,  0.7500])
    """

    KIND: ClassVar[int] = 10

    step: Tensor
    offset: Tensor

    def __init__(
        self,
        step: Tensor,
        offset: Tensor | None = None,
        bits: int = 4,
        axis: int | None = None,
        centered: bool = False,
    ) -> None:
        super().__init__(bits, axis)
        checks.boolean("centered", centered)
        offset = torch.zeros_like(step) if offset is None else offset
        checks.tensors(step=step, offset=offset)
        for name, tensor in (("step", step), ("offset", offset)):
            if tensor.dim() != (axis is not None) or tensor.shape != step.shape:
                takes = "[]" if axis is None else "[n]"
                got = f"{list(tensor.shape)} with axis {axis!r}"
                raise ValueError(f"{name}: got shape {got}, takes {takes}")
        if not bool((step.isfinite() & (step > 0)).all()):
            raise ValueError("step: got a value that is not positive and finite")
        if not bool(offset.isfinite().all()):
            raise ValueError("offset: got a value that is not finite")
        self.centered = centered
        self.register_buffer("step", step.detach().clone().float())
        self.register_buffer("offset", offset.detach().clone().float())

    @property
    def largest(self) -> int:
        """The largest k."""
        return (1 << self.bits) - 1

    def fake_quantize(self, x: Tensor) -> Tensor:
        values = self.values_of(self.indices(x.detach())).to(x.dtype)
        values = torch.empty_like(x).copy_(values)
        if not (torch.is_grad_enabled() and x.requires_grad):
            return values
        return values + (x - x.detach())  # the difference is 0

    def indices(self, x: Tensor) -> Tensor:
        """k of each value, uint8; 0 for NaN."""
        step, offset = self._along(x)
        k = ((x.float() - offset) / step + self._middle).round().clamp(0, self.largest)
        return torch.empty_like(x, dtype=torch.uint8).copy_(k.nan_to_num(nan=0.0))

    def values_of(self, indices: Tensor) -> Tensor:
        step, offset = self._along(indices)
        return (indices.float() - self._middle) * step + offset

    @property
    def _middle(self) -> float:
        return self.largest / 2 if self.centered else 0.0

    def _along(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.axis is None:
            return self.step, self.offset
        shape = [-1 if d == self.axis % x.dim() else 1 for d in range(x.dim())]
        return self.step.view(shape), self.offset.view(shape)

    def _state(self) -> list[int]:
        return [*super()._state()[:3], int(self.axis is not None), int(self.centered)]

    def extra_repr(self) -> str:
        centered = ", centered=True" if self.centered else ""
        return f"bits={self.bits}, axis={self.axis!r}{centered}"

    @property
    def form(self) -> str:
        return f"evenly spaced {'tensor' if self.axis is None else 'channel'}"

    def width(self) -> str:
        return f"{self.bits} evenly spaced"
