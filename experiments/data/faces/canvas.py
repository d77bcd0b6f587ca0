"""A batch of pictures in face coordinates, and the soft shapes drawn on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SPAN = 2.32
"""Face units from the left to the right edge of a picture at zoom 1."""


@dataclass(frozen=True, eq=False)
class Canvas:
    """Pixels `rgb` `[N, 3, H, W]` in 0..1, with the face coordinates of each in `u`, `y`.

    `x = |u|`: what is drawn once appears on both sides. Per-face values have shape `[N, 1, 1]`.
    """

    rgb: Tensor
    u: Tensor
    x: Tensor
    y: Tensor
    pixel: Tensor
    """Size of a pixel in face units."""

    def rows(self, top: float, bottom: float) -> Canvas:
        """A view of the rows that come within 0.1 of `top <= y <= bottom` in any picture.

        Drawing on fewer pixels is faster.
        """
        met = ((self.y >= top - 0.1) & (self.y <= bottom + 0.1)).any(2).any(0).nonzero()
        start, end = (int(met[0]), int(met[-1]) + 1) if len(met) else (0, 0)
        u, x, y = (part[:, start:end] for part in (self.u, self.x, self.y))
        return Canvas(self.rgb[:, :, start:end], u, x, y, self.pixel)

    def paint(self, coverage: Tensor, color: Tensor) -> None:
        """Mixes `color` `[N, 3]` in, by `coverage` `[N, H, W]` in 0..1."""
        self.rgb.lerp_(color[:, :, None, None], coverage[:, None])

    def shade(self, darkness: Tensor) -> None:
        """Takes the share `darkness` `[N, H, W]` of the light away; negative values add light."""
        self.rgb.addcmul_(self.rgb, darkness[:, None], value=-1)

    def between(self, top: Tensor, bottom: Tensor) -> Tensor:
        """Coverage of `top < y < bottom`, with anti-aliased edges."""
        inside = torch.minimum(self.y - top, bottom - self.y)
        return inside.div_(self.pixel).add_(0.5).clamp_(0, 1)

    def within(self, distance, limit) -> Tensor:
        """Coverage of `distance < limit`, with anti-aliased edges."""
        return (limit - distance).div_(self.pixel).add_(0.5).clamp_(0, 1)

    def ellipse(self, x: Tensor, cx, cy, rx, ry) -> Tensor:
        """Coverage of an ellipse, with anti-aliased edges."""
        radius = (((x - cx) / rx).square_() + ((self.y - cy) / ry).square_()).sqrt_()
        return (1 - radius).mul_(ry / self.pixel).add_(0.5).clamp_(0, 1)


def bump(t: Tensor, d: Tensor) -> Tensor:
    """A soft stroke `(1 - t^2)(1 - d^2)`, 0 outside of `|t| < 1`, `|d| < 1`.

    `t` runs along the stroke and `d` across it.
    """
    return (1 - t * t).clamp_(min=0).mul_((1 - d * d).clamp_(min=0))
