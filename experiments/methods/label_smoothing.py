"""Label smoothing (Szegedy et al. 2015, arXiv 1512.00567, section 7)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from experiments.checks import require
from experiments.methods.method import Loss, Method


@dataclass(frozen=True)
class LabelSmoothing(Method):
    """Trains on `(1 - a) y + a / C` for the one-hot label `y` of `C` classes.

    Cross-entropy is linear in the target, so this is `(1 - a)` times the loss on the label plus `a`
    times the mean of the losses on all classes.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"label_smoothing": 0.1}

    label_smoothing: float | None = None
    """label_smoothing: the share a of a label that all classes divide, from 0 to 1 (0.1)."""

    def __post_init__(self) -> None:
        share = self.label_smoothing
        accepted = share is None or 0 <= share <= 1
        require("label_smoothing", share, accepted, "a number from 0 to 1")

    @property
    def label(self) -> str:
        return f"label-smoothing{self.label_smoothing:g}"

    def loss(self, loss: Loss, model: nn.Module) -> Loss:
        def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
            on_all_classes = -logits.log_softmax(1).mean()
            share = self.label_smoothing
            return (1 - share) * loss(logits, labels) + share * on_all_classes

        return smoothed
