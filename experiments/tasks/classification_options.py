"""The options of runs on images that have a class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from experiments.checks import Choice, require, require_choice
from experiments.data import DATASETS
from experiments.data.cifar10n import HUMAN_LABELS
from experiments.data.noise import NOISE_KINDS
from experiments.models import MODELS
from experiments.tasks.options import Recipe, TaskOptions

if TYPE_CHECKING:
    from experiments.config import RunConfig

NoiseOver = Literal["subset", "all"]
_RECIPE = Recipe(
    epochs=200, batch_size=128, lr=1e-3, schedule="steps", noise=0.4, noise_kind="symmetric"
)


@dataclass(frozen=True)
class ClassificationOptions(TaskOptions):
    """Data sets of images that have a class only."""

    DATASETS: ClassVar[tuple[str, ...]] = tuple(DATASETS)
    NOISE_KINDS: ClassVar[tuple[str, ...]] = (*NOISE_KINDS, *HUMAN_LABELS)
    LEGACY: ClassVar[Mapping[str, Any]] = {"model": "resnet20", "noise_over": "subset"}

    model: Choice[str, MODELS] | None = None
    """The network. resnet20: 0.27 million parameters. resnet18_cifar: 11
    million, which fit wrong labels in fewer epochs, at 14 times the computation. If not given:
    resnet20."""

    noise_over: NoiseOver = "subset"
    """What noise is drawn over. subset: the images of --train-size. all: all
    training images, so that a larger --train-size holds a smaller one with the same wrong labels,
    as human labels always do; the share of noise in a subset is then that of all but for chance."""

    def __post_init__(self) -> None:
        require_choice("noise_over", self.noise_over, get_args(NoiseOver))
        if self.model is not None:
            require_choice("model", self.model, tuple(MODELS))

    def check(self, config: RunConfig) -> None:
        noise = config.noise
        require("noise", noise, noise is None or 0 <= noise <= 1, "a share from 0 to 1")
        if config.noise_kind in HUMAN_LABELS:
            if config.dataset != "cifar10":
                raise ValueError(
                    f"--noise-kind: got {config.noise_kind}, which is for --dataset cifar10"
                )
            if noise is not None:
                raise ValueError(f"--noise: got {noise} with human labels, which bring their own")

    def resolved(self, config: RunConfig, gpu: bool) -> ClassificationOptions:
        return dataclasses.replace(self, model=self.model or "resnet20")

    def recipe(self, config: RunConfig) -> Recipe:
        # The digits are too small to gain much from threads, and busy cores cost a lot.
        threads = 1 if config.dataset == "digits" else None
        noise = None if config.noise_kind in HUMAN_LABELS else _RECIPE.noise
        return dataclasses.replace(_RECIPE, threads=threads, noise=noise)

    def evaluation_options(self) -> dict[str, Any]:
        return {} if self.model in (None, self.LEGACY["model"]) else {"model": self.model}
