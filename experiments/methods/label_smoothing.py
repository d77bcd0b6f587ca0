"""Label smoothing (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.checks import require
from experiments.losses import Changed, Loss
from experiments.methods.method import Method


@dataclass(frozen=True)
class LabelSmoothing(Method):
    """Trains on `(1 - a) y + a / C` for the one-hot label `y` of `C` classes.

    Labels that answer several questions by yes or no are smoothed one by one, with `C = 2`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"label_smoothing": 0.1}

    label_smoothing: float | None = None
    """The share a of a label that all classes divide, from 0 to 1."""

    def __post_init__(self) -> None:
        share = self.label_smoothing
        accepted = share is None or 0 <= share <= 1
        require("label_smoothing", share, accepted, "a number from 0 to 1")

    @property
    def label(self) -> str:
        return f"label-smoothing{self.label_smoothing:g}"

    def loss(self, loss: Loss, model: nn.Module, task: Any) -> Loss:
        def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
            y, classes = labels, 2
            if not labels.is_floating_point():
                classes = logits.shape[1]
                y = F.one_hot(labels, classes).to(logits.dtype)
            return (1 - self.label_smoothing) * y + self.label_smoothing / classes

        return Changed(loss, labels=smoothed)
