"""Faces drawn by formula, as a data set of action units: nothing to download, the truth known."""

import hashlib
import os

import torch

from experiments.data.au.frames import Frames
from experiments.data.faces import AUS, Faces

_SUBJECTS = 41


def draw(image_size: int, frames_per_subject: int, disagreement: float, seed: int) -> Frames:
    """Draws 41 subjects; labels are those of annotators who disagree as `seed` says.

    The pictures are the same at every `disagreement` (0 gives the truth) and every `seed`.
    """
    size = _SUBJECTS * frames_per_subject * 3 * image_size**2
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    if size > most:
        raise ValueError(
            f"--frames-per-subject: got {frames_per_subject}, which are {size // 10**9:,} GB of "
            f"pictures at --image-size {image_size}; takes {most // 10**9:,} GB at most, half of "
            "this machine's memory"
        )
    faces = Faces.generate(
        subjects=_SUBJECTS,
        frames_per_subject=frames_per_subject,
        size=image_size,
        disagreement=disagreement,
        annotators_seed=seed,
    )
    digest = hashlib.sha256()
    for tensor in (faces.images, faces.given, faces.truth):
        digest.update(tensor.numpy().data)
    subjects = int(faces.subject[-1]) + 1
    return Frames(
        name="synthetic-au",
        aus=AUS,
        images=faces.images,
        row=torch.arange(len(faces.images)),
        given=faces.given,
        truth=faces.truth,
        subject=faces.subject,
        subjects=tuple(f"S{number:02}" for number in range(1, subjects + 1)),
        part=faces.part,
        checksum=digest.hexdigest(),
    )
