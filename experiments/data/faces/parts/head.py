"""Background, clothes, hair, ears and skin."""

from functools import cache

import torch
from torch import Tensor

from experiments.data.faces.canvas import Canvas
from experiments.data.faces.face import Face
from experiments.data.faces.palette import mix
from experiments.data.faces.traits import Scene

_GRAINS = 30
"""Grains of skin in a face unit."""


def draw(canvas: Canvas, face: Face) -> None:
    _draw_background(canvas, face.scene)
    _draw_hair(canvas, face)
    _draw_neck(canvas.rows(0.6, 9.0), face)
    _draw_skin(canvas, face)


def _draw_background(canvas: Canvas, scene: Scene) -> None:
    color = [scene.background_red, scene.background_green, scene.background_blue]
    canvas.rgb.copy_(torch.stack(color, 1))
    canvas.shade(scene.background_slope * canvas.u)


def _draw_hair(canvas: Canvas, face: Face) -> None:
    """Half an ellipse above the eyes, straight down from there."""
    width = face.who.face_width + 0.13
    above = (canvas.y + 0.12).clamp_(max=0)
    radius = ((canvas.x / width).square_() + (above / 0.98).square_()).sqrt_()
    covered = canvas.within(width * radius, width) * canvas.within(canvas.y, face.who.hair_length)
    canvas.paint(covered, face.palette.hair)


def _draw_neck(canvas: Canvas, face: Face) -> None:
    neck = canvas.within(canvas.x, 0.42) * canvas.within(0.5, canvas.y)
    canvas.paint(neck, 0.8 * face.palette.skin)
    collar = 1.12 - 0.25 * (canvas.x - 0.42).clamp_(min=0)
    clothes = mix((0.12, 0.14, 0.20), (0.75, 0.70, 0.62), face.scene.clothes.flatten())
    canvas.paint(canvas.within(collar, canvas.y), clothes)


def _draw_skin(canvas: Canvas, face: Face) -> None:
    who, skin = face.who, face.palette.skin
    middle = canvas.rows(-0.3, 0.35)
    ears = middle.ellipse(middle.x, who.face_width, 0.03, 0.09, 0.2)
    middle.paint(ears, 0.88 * skin)

    narrowing = 1 - who.jaw * canvas.y.clamp(min=0).square_()
    covered = canvas.ellipse(canvas.x / narrowing, 0.0, 0.05, who.face_width, 1.0)
    # Above the hairline, the hair behind the face stays.
    hairline = who.hairline + who.parting * canvas.u + 0.5 * canvas.x.square()
    covered *= canvas.within(hairline, canvas.y)
    canvas.paint(covered, skin)
    canvas.shade(covered * who.freckles * _grain(canvas, who.texture))


def _grain(canvas: Canvas, texture: Tensor) -> Tensor:
    """Standard normal grain that moves with the skin; `texture` in 0..1 chooses the patch."""
    column = ((canvas.u.clamp(-1, 1) + 1 + 2 * texture) * _GRAINS).long()
    row = ((canvas.y.clamp(-1, 1) + 1) * _GRAINS).long()
    return _grains().take(row * (4 * _GRAINS + 1) + column)


@cache
def _grains() -> Tensor:
    """Sums of 2 x 2 cells, so that a grain has no sharp edges."""
    cells = torch.randn(
        2 * _GRAINS + 2, 4 * _GRAINS + 2, generator=torch.Generator().manual_seed(0)
    )
    return 0.5 * (cells[1:, 1:] + cells[1:, :-1] + cells[:-1, 1:] + cells[:-1, :-1])
