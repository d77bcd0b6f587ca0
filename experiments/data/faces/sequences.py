"""Random motion of many quantities at once, in short sequences of a subject's frames."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CYCLES = (0.5, 1.5)
"""A sequence holds about one onset, apex and offset."""


def drift(
    subjects: int,
    sequences: int,
    frames: int,
    channels: int,
    generator: torch.Generator,
    subject_share: float = 0.0,
    motion_share: float = 0.0,
) -> Tensor:
    """Standard normal values `[subjects, sequences, frames, channels]`, smooth over the frames.

    Of their variance, `subject_share` is the same for all frames of a subject, `motion_share`
    moves as `a cos(w t) + b sin(w t)` with normal `a` and `b`, which has variance 1 at every `t`,
    and the rest is the same for a sequence. All channels of a sequence move at one speed `w`, so
    that a combination of channels is such a motion, too.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, channels, generator=generator)

    low, high = _CYCLES
    cycles = low + (high - low) * torch.rand(subjects, sequences, 1, 1, generator=generator)
    phase = 2 * math.pi * cycles * torch.linspace(0, 1, frames)[:, None]
    cosine, sine = normal(subjects, sequences, 1), normal(subjects, sequences, 1)
    motion = cosine * phase.cos() + sine * phase.sin()
    rest = 1 - subject_share - motion_share
    return (
        math.sqrt(subject_share) * normal(subjects, 1, 1)
        + math.sqrt(rest) * normal(subjects, sequences, 1)
        + math.sqrt(motion_share) * motion
    )
