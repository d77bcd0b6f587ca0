"""What can be learned: to tell what is on an image, or which action units move a face."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from experiments import data
from experiments.config import RunConfig
from experiments.data import Dataset, au
from experiments.models.inception import torchvision_models
from experiments.tasks.action_units import ActionUnits
from experiments.tasks.classification import Classification
from experiments.tasks.task import Part, Task

__all__ = ["Data", "Part", "Task", "kind", "make", "read"]

Data = Dataset | au.Frames


def kind(config: RunConfig) -> type[Task]:
    """The task of a run."""
    return ActionUnits if config.detects_action_units else Classification


def read(config: RunConfig) -> Data:
    """The data of a run."""
    faces = config.faces
    if faces.encoder == "inception_v3":
        torchvision_models()  # which may be missing, told before pictures are decoded for hours
    if config.dataset == au.SYNTHETIC:
        return au.draw(faces.image_size, faces.frames_per_subject, config.noise, config.noise_seed)
    if config.detects_action_units:
        return au.load(
            config.dataset, config.data_dir, faces.image_size, faces.strict, faces.cache_dir
        )
    return _images(config.dataset, config.data_dir, config.download, config.train_size)


def make(config: RunConfig, data: Data, device: torch.device) -> Task:
    """The task of a run, with its data on `device` where they fit."""
    return kind(config)(config, data, device)


@functools.lru_cache(maxsize=4)
def _images(name: str, data_dir: Path | None, download: bool, train_size: int | None) -> Dataset:
    """Read once by a process that prepares many runs."""
    return data.load(name, data_dir, download).with_train_size(train_size)
