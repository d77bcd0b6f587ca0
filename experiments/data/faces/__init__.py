"""Faces drawn by formula, whose action units are known and whose labels are noisy as people's are.

A stand-in for BP4D that needs no download: the same action units, about the same occurrence rates
and subject-exclusive parts.
"""

from experiments.data.faces.action_units import AUS, DRAWN_AUS
from experiments.data.faces.contact_sheet import contact_sheet
from experiments.data.faces.faces import Faces
from experiments.data.faces.renderer import Parameters, render
from experiments.data.faces.traits import Identity, Pose, Scene

__all__ = [
    "AUS",
    "DRAWN_AUS",
    "Faces",
    "Identity",
    "Parameters",
    "Pose",
    "Scene",
    "contact_sheet",
    "render",
]
