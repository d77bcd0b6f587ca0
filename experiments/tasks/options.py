"""The options of a task, and how it is trained unless told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

if TYPE_CHECKING:
    from experiments.config import RunConfig


@dataclass(frozen=True)
class Recipe:
    """Defaults of a run."""

    epochs: int
    batch_size: int
    lr: float
    schedule: str
    noise: float | None
    noise_kind: str
    weight_decay: float = 0.0
    """Decoupled, of every method that has none of its own; falls with the learning rate."""
    validation: float = 0.0
    threads: int | None = None
    """None stands for PyTorch's choice."""


@dataclass(frozen=True)
class TaskOptions:
    """Options that take effect with the data sets of one task only; its fields are on the command
    line. None stands for the default, which `resolved` fills in."""

    DATASETS: ClassVar[tuple[str, ...]]
    NOISE_KINDS: ClassVar[tuple[str, ...]]
    SELECTS_EPOCH: ClassVar[bool] = False
    """The best epoch on held-out samples is kept, whatever the method."""
    LEGACY: ClassVar[Mapping[str, Any]] = {}
    """As of `Method`."""
    TRAINED_ON: ClassVar[tuple[str, ...]] = ("dataset", "train_size", "validation")
    """Options that say which samples are trained on."""
    ON_THE_MACHINE: ClassVar[tuple[str, ...]] = ()
    """Options whose default can depend on the machine."""

    def given(self) -> list[str]:
        """The options that differ from their defaults."""
        fields = dataclasses.fields(self)
        return [field.name for field in fields if getattr(self, field.name) != field.default]

    def check(self, config: RunConfig) -> None:
        """Raises ValueError for options of the run that do not go together with the task."""

    def resolved(self, config: RunConfig, gpu: bool) -> Self:
        """These options, with what was left to a default filled in."""
        return self

    def recipe(self, config: RunConfig) -> Recipe:
        """What suits the data set and the network."""
        raise NotImplementedError

    def evaluation_options(self) -> dict[str, Any]:
        """As of `Method`."""
        return {}

    @property
    def part(self) -> str:
        """What the name of a run always tells of them."""
        return ""
