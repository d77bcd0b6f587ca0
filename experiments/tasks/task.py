"""What is learned, and how it is scored: all that the training loop leaves open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from experiments.losses import Loss
from experiments.tasks.options import TaskOptions
from experiments.training import data_parallel

if TYPE_CHECKING:
    from experiments.config import FilledConfig
    from experiments.reporting.report import Report

Part = Literal["trained", "held_out", "test"]
Scores = dict[str, float | None]


class Task(ABC):
    """Images, their labels, a network for them, a loss, and scores.

    Samples of a part are counted from 0 in an order of their own.
    """

    OPTIONS: ClassVar[type[TaskOptions]]

    LABELS: ClassVar[Literal["classes", "answers"]]
    """What labels are: a class a sample, or the answers to several questions by yes or no."""

    SAMPLES: ClassVar[str]
    """What samples are, for the user."""

    LEGEND: ClassVar[str]
    """What `line` shows of an epoch."""

    SCORE: ClassVar[str]
    """The score on held-out samples by which epochs are compared, such as accuracy."""

    @abstractmethod
    def __init__(self, config: FilledConfig, data: Any, device: torch.device) -> None:
        """Takes the data to the device, where they fit."""

    OBJECTS: ClassVar[tuple[str, ...]] = ()
    """The numbers of a result that are one for each of several things, by name."""

    @staticmethod
    @abstractmethod
    def read(config: FilledConfig) -> Any:
        """The data of a run, with their `checksum`."""

    @staticmethod
    @abstractmethod
    def report() -> Report:
        """What is made of finished runs."""

    @abstractmethod
    def count(self, part: Part) -> int:
        """How many samples a part has."""

    @abstractmethod
    def network(self) -> nn.Module:
        """A freshly initialised network, from PyTorch's random numbers, on the CPU."""

    @abstractmethod
    def loss(self) -> Loss:
        """What is minimized where no method says otherwise."""

    @abstractmethod
    def labels(self, part: Part) -> Tensor:
        """The given labels of a part's samples, as the loss takes them."""

    def truth(self) -> Tensor | None:
        """The true labels of the samples that are trained on; None where nobody knows."""
        return None

    @property
    @abstractmethod
    def classes(self) -> int:
        """How many logits a sample has: one for each class, or for each answer."""

    @abstractmethod
    def wrong_labels(self) -> float | None:
        """The share of the given training labels that are wrong; None where nobody knows."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Views at random, one row a sample: how augmentation changes it."""

    @abstractmethod
    def batches(
        self, order: Tensor, views: Tensor, sizes: list[int]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        """This process's part of each batch, in `sizes`, of the trained samples in `order`, which
        are seen in `views`: the samples, and what `pair` takes."""

    @abstractmethod
    def pair(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        """The network's input, and the labels. Can be recorded in a CUDA graph."""

    @abstractmethod
    def inputs(self, part: Part, samples: Tensor) -> Tensor:
        """The network's input for samples of a part, as they are."""

    @abstractmethod
    def predicted(self, logits: Tensor) -> Tensor:
        """What the network says, as integers, one row a sample."""

    @abstractmethod
    def epoch_scores(
        self, predicted: Tensor, held_out: Tensor | None, test: Tensor | None
    ) -> Scores:
        """Scores of an epoch by name, from what was `predicted` of the trained samples while they
        were trained on, and from the logits of the other parts, where there are any.

        `validation_` and `SCORE` is the one by which epochs are compared.
        """

    @abstractmethod
    def result(self, trained: Tensor, held_out: Tensor | None, test: Tensor) -> dict[str, Any]:
        """What the finished network is worth, from its logits on all parts."""

    @abstractmethod
    def line(self, scores: Scores) -> str:
        """An epoch's main scores, for the user."""

    @staticmethod
    @abstractmethod
    def summary(result: dict[str, Any]) -> str:
        """The main score of a result, for the user."""

    @abstractmethod
    def label_arrays(self) -> dict[str, np.ndarray]:
        """The labels trained on and, where it is known, the truth."""


def shards(order: Tensor, views: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's part of each batch: samples and views."""
    for batch, batch_views in zip(order.split(sizes), views.split(sizes), strict=True):
        yield data_parallel.shard(batch), data_parallel.shard(batch_views)


def percent(share: float | None) -> str:
    """A share of 1 in a column of fixed width."""
    return "   -   " if share is None else f"{share:7.2%}"
