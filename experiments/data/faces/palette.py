"""The colours of a face."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.data.faces.traits import Identity

_PALE, _DARK = (0.95, 0.78, 0.67), (0.42, 0.28, 0.21)
_BLACK, _RED, _BLOND = (0.07, 0.06, 0.06), (0.50, 0.24, 0.12), (0.72, 0.58, 0.38)
_BROWN, _BLUE = (0.18, 0.11, 0.07), (0.34, 0.46, 0.54)


@dataclass(frozen=True, eq=False)
class Palette:
    """Red, green and blue in 0..1, each `[N, 3]`."""

    skin: Tensor
    lips: Tensor
    hair: Tensor
    brows: Tensor
    iris: Tensor

    @classmethod
    def of(cls, who: Identity) -> Palette:
        """Dark skin goes with dark hair and dark eyes."""
        paleness = 1 - who.melanin
        tint = 0.025 * who.redness[:, None] * torch.tensor([1.0, 0.0, -1.0])
        skin = mix(_PALE, _DARK, who.melanin) + tint
        dark_hair = mix(_BLACK, _RED, 0.5 * who.hair_warmth)
        hair = mix(dark_hair, _BLOND, (who.hair_lightness * paleness).square())
        return cls(
            skin=skin,
            lips=skin * torch.tensor([0.80, 0.52, 0.53]),
            hair=hair,
            brows=0.7 * hair + 0.08 * skin,
            iris=mix(_BROWN, _BLUE, who.iris_lightness * paleness),
        )


def mix(start, end, share: Tensor) -> Tensor:
    """From the colour `start` to `end` by `share` `[N]`."""
    return torch.lerp(torch.as_tensor(start), torch.as_tensor(end), share[:, None])


def same(red: float, green: float, blue: float) -> Tensor:
    """One colour for all faces, `[1, 3]`."""
    return torch.tensor([[red, green, blue]])
