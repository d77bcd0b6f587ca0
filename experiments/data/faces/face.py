"""What the parts of a face know when they draw themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from experiments.data.faces.palette import Palette
from experiments.data.faces.traits import Identity, Pose, Scene


@dataclass(frozen=True, eq=False)
class Face:
    """A batch of faces; traits and intensities have shape `[N, 1, 1]` to go with the pixels."""

    who: Identity
    pose: Pose
    scene: Scene
    palette: Palette
    au: dict[int, Tensor]
    """Intensity of each drawn action unit, 0..1."""
