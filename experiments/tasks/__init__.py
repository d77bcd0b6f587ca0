"""What can be learned: to tell what is on an image, or which action units move a face."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from experiments.tasks.action_units import ActionUnits
from experiments.tasks.classification import Classification
from experiments.tasks.options import Recipe, TaskOptions
from experiments.tasks.task import Part, Task

if TYPE_CHECKING:
    from experiments.config import FilledConfig
    from experiments.tasks.action_unit_options import ActionUnitOptions
    from experiments.tasks.classification_options import ClassificationOptions

__all__ = ["TASKS", "Options", "Part", "Recipe", "Task", "TaskOptions", "make", "of_dataset"]

TASKS: dict[str, type[Task]] = {"classification": Classification, "action_units": ActionUnits}

if TYPE_CHECKING:

    @dataclasses.dataclass(frozen=True)
    class Options:
        def __init__(self, **options: TaskOptions) -> None: ...
        @property
        def classification(self) -> ClassificationOptions: ...
        @property
        def action_units(self) -> ActionUnitOptions: ...
else:
    Options = dataclasses.make_dataclass(
        "Options",
        [(name, task.OPTIONS, task.OPTIONS()) for name, task in TASKS.items()],
        frozen=True,
    )
    """The options of all tasks, each task's under its name."""


def of_dataset(dataset: str | None) -> str:
    """The name of the task that a data set is for; the first one's for a data set that this version
    does not have."""
    for name, task in TASKS.items():
        if dataset in task.OPTIONS.DATASETS:
            return name
    return next(iter(TASKS))


def make(config: FilledConfig, data: Any, device: torch.device) -> Task:
    """The task of a run, with its data on `device` where they fit."""
    return config.task(config, data, device)
