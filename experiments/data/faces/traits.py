"""What a face looks like apart from its expression: who it is, how it is held, how it is lit.

Lengths are in face units: half the height of the middle face is 1, x points right, y points down
and the origin is the middle of the face. Angles are in radians, all else is a share of 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Self

import torch
from torch import Tensor


def _span(low: float, high: float) -> dict[str, tuple[float, float]]:
    """Says that a trait is uniform between `low` and `high`."""
    return {"span": (low, high)}


@dataclass(frozen=True, eq=False)
class Traits:
    """Named values of shape `[N]`, one for each face; indexing selects faces."""

    @classmethod
    def count(cls) -> int:
        """How many traits there are."""
        return len(fields(cls))

    @classmethod
    def of(cls, latent: Tensor) -> Self:
        """Turns standard normal `[N, count]` into traits uniform over their spans."""
        shares = 0.5 + 0.5 * torch.erf(latent / math.sqrt(2))
        spans = torch.tensor([trait.metadata["span"] for trait in fields(cls)])
        return cls(*torch.lerp(spans[:, 0], spans[:, 1], shares).unbind(1))

    @classmethod
    def middle(cls, count: int) -> Self:
        """`count` faces with every trait in the middle of its span."""
        return cls.of(torch.zeros(count, cls.count()))

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def __getitem__(self, index) -> Self:
        return type(self)(*(getattr(self, trait.name)[index] for trait in fields(self)))


@dataclass(frozen=True, eq=False)
class Identity(Traits):
    """What stays the same for a subject."""

    face_width: Tensor = field(metadata=_span(0.70, 0.82))
    jaw: Tensor = field(metadata=_span(0.02, 0.22))
    """How much the face narrows towards the chin."""
    melanin: Tensor = field(metadata=_span(0.0, 1.0))
    redness: Tensor = field(metadata=_span(-1.0, 1.0))
    hair_lightness: Tensor = field(metadata=_span(0.0, 1.0))
    hair_warmth: Tensor = field(metadata=_span(0.0, 1.0))
    hair_length: Tensor = field(metadata=_span(-0.2, 1.6))
    """Where the hair ends."""
    hairline: Tensor = field(metadata=_span(-0.82, -0.64))
    parting: Tensor = field(metadata=_span(-0.25, 0.25))
    """Slope of the hairline."""
    eye_distance: Tensor = field(metadata=_span(0.31, 0.37))
    eye_width: Tensor = field(metadata=_span(0.150, 0.185))
    eye_opening: Tensor = field(metadata=_span(0.85, 1.15))
    eye_slant: Tensor = field(metadata=_span(-0.025, 0.02))
    iris_lightness: Tensor = field(metadata=_span(0.0, 1.0))
    brow_height: Tensor = field(metadata=_span(-0.37, -0.31))
    brow_thickness: Tensor = field(metadata=_span(0.032, 0.060))
    brow_arch: Tensor = field(metadata=_span(0.02, 0.06))
    nose_width: Tensor = field(metadata=_span(0.11, 0.16))
    nose_length: Tensor = field(metadata=_span(0.20, 0.28))
    mouth_height: Tensor = field(metadata=_span(0.52, 0.58))
    mouth_width: Tensor = field(metadata=_span(0.25, 0.31))
    mouth_slope: Tensor = field(metadata=_span(-0.015, 0.015))
    """How far the corners of the resting mouth hang."""
    lip_fullness: Tensor = field(metadata=_span(0.75, 1.25))
    folds: Tensor = field(metadata=_span(0.0, 0.25))
    """How deep the nasolabial fold of the resting face is."""
    wrinkles: Tensor = field(metadata=_span(0.75, 1.15))
    """How deep the lines are that an expression makes."""
    texture: Tensor = field(metadata=_span(0.0, 1.0))
    """Which patch of skin the face shows."""
    freckles: Tensor = field(metadata=_span(0.02, 0.06))


@dataclass(frozen=True, eq=False)
class Pose(Traits):
    """How the head is held, and where the eyes look."""

    shift_x: Tensor = field(metadata=_span(-0.08, 0.08))
    shift_y: Tensor = field(metadata=_span(-0.06, 0.06))
    zoom: Tensor = field(metadata=_span(0.93, 1.07))
    roll: Tensor = field(metadata=_span(-0.16, 0.16))
    yaw: Tensor = field(metadata=_span(-0.30, 0.30))
    pitch: Tensor = field(metadata=_span(-0.16, 0.16))
    gaze_x: Tensor = field(metadata=_span(-0.25, 0.25))
    gaze_y: Tensor = field(metadata=_span(-0.10, 0.10))


@dataclass(frozen=True, eq=False)
class Scene(Traits):
    """Light, background and sensor noise."""

    gain: Tensor = field(metadata=_span(0.82, 1.12))
    light_x: Tensor = field(metadata=_span(-0.28, 0.28))
    """How much brighter the right is than the middle."""
    light_y: Tensor = field(metadata=_span(-0.22, 0.06))
    warmth: Tensor = field(metadata=_span(-0.06, 0.06))
    background_red: Tensor = field(metadata=_span(0.40, 0.72))
    background_green: Tensor = field(metadata=_span(0.40, 0.72))
    background_blue: Tensor = field(metadata=_span(0.40, 0.72))
    background_slope: Tensor = field(metadata=_span(-0.12, 0.12))
    clothes: Tensor = field(metadata=_span(0.0, 1.0))
    noise: Tensor = field(metadata=_span(0.008, 0.022))
    """Standard deviation of the sensor noise."""
    noise_offset: Tensor = field(metadata=_span(0.0, 1.0))
    """Which patch of noise the frame shows."""
