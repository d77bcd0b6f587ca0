"""The faces data set: pictures, how strongly action units act in them, and what annotators say."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from experiments.data.faces.action_units import AUS
from experiments.data.faces.annotators import annotate
from experiments.data.faces.expressions import THRESHOLD, intensities
from experiments.data.faces.renderer import Parameters, render
from experiments.data.faces.sequences import drift
from experiments.data.faces.traits import Identity, Pose, Scene
from experiments.seeds import ANNOTATORS, mixed

_PARTS = 3


@dataclass(frozen=True, eq=False)
class Faces:
    """`N` frames, those of a subject and of a sequence in a row."""

    images: Tensor
    """uint8 `[N, H, W, 3]`."""
    intensity: Tensor
    """Of each of `AUS`, 0..1, float32 `[N, 12]`."""
    truth: Tensor
    """Whether it is above the threshold, int8 `[N, 12]`."""
    given: Tensor
    """The annotator's label, int8 `[N, 12]`."""
    lips_part: Tensor
    """Intensity of the unlabelled AU 25, float32 `[N]`."""
    subject: Tensor
    """int64 `[N]`, as all that follow."""
    sequence: Tensor
    """Counted through all subjects."""
    annotator: Tensor
    """Each subject is coded by one."""
    part: Tensor
    """0, 1 or 2, with subjects of its own: 14, 14 and 13 of 41, as BP4D's folds."""

    @classmethod
    def generate(
        cls,
        subjects: int = 41,
        frames_per_subject: int = 256,
        seed: int = 0,
        disagreement: float = 1.0,
        size: int = 64,
        sequence_frames: int = 32,
        annotators: int = 4,
        annotators_seed: int = 0,
    ) -> Faces:
        """Draws a data set; one seed shows the same pictures, whatever the annotators do."""
        sequences, rest = divmod(frames_per_subject, sequence_frames)
        if rest or not sequences:
            raise ValueError(
                f"frames_per_subject: got {frames_per_subject}, "
                f"takes a multiple of sequence_frames, {sequence_frames}"
            )
        generator = torch.Generator().manual_seed(seed)
        shape = subjects, sequences, sequence_frames
        count = subjects * frames_per_subject
        sequence = torch.arange(subjects * sequences).repeat_interleave(sequence_frames)
        subject = sequence // sequences
        annotator = subject % annotators

        drawn = intensities(*shape, generator).flatten(0, 2)
        identity = Identity.of(torch.randn(subjects, Identity.count(), generator=generator))
        pose = Pose.of(drift(*shape, Pose.count(), generator, motion_share=0.4).flatten(0, 2))
        scene = Scene.of(drift(*shape, Scene.count(), generator, subject_share=0.5).flatten(0, 2))
        scene = replace(scene, noise_offset=torch.rand(count, generator=generator))

        intensity = drawn[:, : len(AUS)]
        return cls(
            images=render(Parameters(identity[subject], pose, scene, drawn), size),
            intensity=intensity,
            truth=(intensity > THRESHOLD).to(torch.int8),
            given=annotate(
                intensity,
                annotator,
                sequence,
                disagreement,
                torch.Generator().manual_seed(mixed(seed, ANNOTATORS, annotators_seed)),
            ),
            lips_part=drawn[:, -1],
            subject=subject,
            sequence=sequence,
            annotator=annotator,
            part=subject * _PARTS // subjects,
        )
