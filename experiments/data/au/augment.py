"""Faces turned, zoomed and mirrored at random, a whole batch at a time."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_DEGREES, _ZOOM = 10.0, 0.1


def draw(count: int, generator: torch.Generator) -> Tensor:
    """Views at random, float32 `[count, 3]`: an angle of up to 10 degrees in radians, a zoom
    from 0.9 to 1.1, and -1 (mirrored) or 1."""
    angle, zoom, side = torch.rand(3, count, generator=generator)
    limit = math.radians(_DEGREES)
    return torch.stack(
        [limit * (2 * angle - 1), 1 + _ZOOM * (2 * zoom - 1), torch.where(side < 0.5, -1.0, 1.0)], 1
    )


def transformed(images: Tensor, views: Tensor) -> Tensor:
    """Images `[B, C, H, W]`, each in its view `[B, 3]`, interpolated linearly; what comes in from
    outside has the value of the edge."""
    angle, zoom, mirror = views.unbind(1)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    rows = torch.stack([mirror * cos, -sin, mirror * sin, cos], 1).view(-1, 2, 2)
    matrices = F.pad(rows, (0, 1))  # no shift
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)
