"""A picture of what the action units look like."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw, ImageFont

from experiments.data.faces.action_units import DRAWN_AUS, NAMES
from experiments.data.faces.renderer import Parameters, render
from experiments.data.faces.traits import Identity, Pose, Scene

EXPRESSIONS = (
    (),
    (1,),
    (2,),
    (1, 2),
    (1, 2, 25),
    (4,),
    (6,),
    (7,),
    (4, 7),
    (10,),
    (12,),
    (6, 12),
    (14,),
    (15,),
    (17,),
    (15, 17),
    (23,),
    (24,),
    (25,),
    (12, 25),
)
"""Which action units are at full intensity."""

_COLUMNS = 10
_TITLE = 76
"""Height of the titles in pixels."""


def contact_sheet(
    subjects: int = 4, size: int = 64, enlarge: int = 2, seed: int = 0
) -> Image.Image:
    """Shows `EXPRESSIONS` in columns and subjects in rows, the first of them frontal."""
    generator = torch.Generator().manual_seed(seed)
    identity, pose, scene = (
        torch.randn(subjects, kind.count(), generator=generator) for kind in (Identity, Pose, Scene)
    )
    pose[0] = scene[0] = 0
    looks = Identity.of(identity), Pose.of(pose), Scene.of(scene)

    side = size * enlarge
    band = _TITLE + subjects * side
    bands = math.ceil(len(EXPRESSIONS) / _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * side, bands * band), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for n, aus in enumerate(EXPRESSIONS):
        left, top = n % _COLUMNS * side, n // _COLUMNS * band
        draw.text((left + 4, top + 2), _title(aus), "black", font)
        shown = torch.tensor([[float(au in aus) for au in DRAWN_AUS]]).expand(subjects, -1)
        faces = render(Parameters(*looks, shown), size)
        column = Image.fromarray(faces.view(-1, size, 3).numpy())
        column = column.resize((side, subjects * side), Image.Resampling.NEAREST)
        sheet.paste(column, (left, top + _TITLE))
    return sheet


def _title(aus: tuple[int, ...]) -> str:
    if not aus:
        return "neutral"
    title = "AU " + " + ".join(map(str, aus))
    return title + "\n" + NAMES[aus[0]].replace(" ", "\n") if len(aus) == 1 else title
