"""From the parameters of faces to their pictures."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from experiments.data.faces.action_units import DRAWN_AUS
from experiments.data.faces.canvas import SPAN, Canvas
from experiments.data.faces.face import Face
from experiments.data.faces.palette import Palette
from experiments.data.faces.parts import PARTS
from experiments.data.faces.traits import Identity, Pose, Scene

_CHUNK = 32  # what a core works on at a time stays in its cache
_DEPTH = 0.6


@dataclass(frozen=True, eq=False)
class Parameters:
    """All that is seen of `N` faces."""

    identity: Identity
    pose: Pose
    scene: Scene
    intensity: Tensor
    """Of each of `DRAWN_AUS`, 0..1, `[N, 13]`."""

    def __len__(self) -> int:
        return len(self.intensity)

    def __getitem__(self, index) -> Parameters:
        return Parameters(
            self.identity[index], self.pose[index], self.scene[index], self.intensity[index]
        )


def render(parameters: Parameters, size: int = 64) -> Tensor:
    """Pictures as uint8 `[N, size, size, 3]`; each depends on its own parameters only.

    Uses as many cores as PyTorch does, each for pictures of its own: the steps are too short to
    share. Not to be called by several threads at once.
    """
    pictures = torch.empty(len(parameters), size, size, 3, dtype=torch.uint8)

    def draw(start: int) -> None:
        chunk = slice(start, start + _CHUNK)
        pictures[chunk] = _render(parameters[chunk], size)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, range(0, len(parameters), _CHUNK)))
    finally:
        torch.set_num_threads(threads)
    return pictures


def _render(parameters: Parameters, size: int) -> Tensor:
    each = slice(None), None, None
    face = Face(
        who=parameters.identity[each],
        pose=parameters.pose[each],
        scene=parameters.scene[each],
        palette=Palette.of(parameters.identity),
        au=dict(zip(DRAWN_AUS, parameters.intensity.T[:, :, None, None], strict=True)),
    )
    canvas = _blank(face.pose, size)
    for part in PARTS:
        part.draw(canvas, face)
    _light(canvas, face.scene)
    noisy = canvas.rgb.add_(_noise(face.scene, size))
    levels = noisy.mul_(255).add_(0.5).clamp_(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1)


def _blank(pose: Pose, size: int) -> Canvas:
    """Turns the head on a dome: what stands out in the middle moves most."""
    pixel = SPAN / (size * pose.zoom)
    axis = torch.arange(size) - (size - 1) / 2
    right = pixel * axis - pose.shift_x
    down = pixel * axis[:, None] - pose.shift_y
    cos, sin = pose.roll.cos(), pose.roll.sin()
    u, y = cos * right + sin * down, cos * down - sin * right
    u /= pose.yaw.cos()
    depth = _DEPTH * (1 - u * u - 0.5 * y * y).clamp_(min=0)
    u, y = u - pose.yaw * depth, y - pose.pitch * depth
    return Canvas(torch.empty(len(pixel), 3, size, size), u, u.abs(), y, pixel)


def _light(canvas: Canvas, scene: Scene) -> None:
    """Lambert's law on a dome, to first order."""
    u, y = canvas.u.clamp(-1, 1), canvas.y.clamp(-1, 1)
    dome = 0.18 * (u * u + 0.4 * y * y)
    brightness = scene.gain * (1 + scene.light_x * u + scene.light_y * y - dome)
    warmth = torch.tensor([1.0, 0.0, -1.0])[:, None, None] * scene.warmth[:, None]
    canvas.rgb.mul_(brightness[:, None]).mul_(1 + warmth)


@cache
def _normals(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def _noise(scene: Scene, size: int) -> Tensor:
    """Sensor noise `[N, 3, size, size]`, cut from one long row of normal numbers."""
    count = 3 * size * size
    starts = (scene.noise_offset.flatten() * count).long()
    cuts = _normals(2 * count).unfold(0, count, 1)[starts]
    return cuts.view(-1, 3, size, size) * scene.noise[:, None]
