"""Generalized cross-entropy (Zhang & Sabuncu 2018, arXiv 1805.07836)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.checks import require
from experiments.losses import Loss, Trained
from experiments.methods.method import Method


@dataclass(frozen=True)
class GCE(Method):
    """`(1 - p_y^q) / q` for the probability `p_y` of the given class: cross-entropy as q goes to 0,
    the mean absolute error at 1.

    Truncated, a sample with `p_y <= k` has the constant loss `(1 - k^q) / q`, and so no gradient.
    As in the paper, which samples these are is looked up every twelfth of the epochs, from a third
    of them on: every 10 of 120 from 40. The paper asks the best network so far, here it is the one
    at hand. The paper's learning rate and weight decay are not taken over.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"gce_q": 0.7}
    REPLACES: ClassVar[str] = "loss"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "label_smoothing": "whose labels are not one class, as this loss takes them"
    }

    gce_q: float | None = None
    """The exponent q, above 0 and up to 1."""

    gce_threshold: float | None = None
    """The truncated loss, with this threshold k between 0 and 1 (0.5 in the paper). If not given:
    not truncated."""

    def __post_init__(self) -> None:
        q, k = self.gce_q, self.gce_threshold
        require("gce_q", q, q is None or 0 < q <= 1, "a number above 0, up to 1")
        require("gce_threshold", k, k is None or 0 < k < 1, "a number between 0 and 1")

    @property
    def label(self) -> str:
        above = "" if self.gce_threshold is None else f"-above{self.gce_threshold:g}"
        return f"gce{self.gce_q:g}{above}"

    def loss(self, loss: Loss, model: nn.Module, task: Any) -> Loss:
        if self.gce_threshold is None:
            return GeneralizedCrossEntropy(self.gce_q)
        return TruncatedGCE(self.gce_q, self.gce_threshold, task.count("trained"))


class GeneralizedCrossEntropy(Loss):
    """`(1 - p_y^q) / q`."""

    def __init__(self, q: float) -> None:
        super().__init__()
        self.q = q

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        # By the logarithm: a power of a p_y that is 0 has no finite gradient.
        return -torch.expm1(-self.q * F.cross_entropy(logits, labels, reduction="none")) / self.q


class TruncatedGCE(GeneralizedCrossEntropy):
    """Constant for the samples that are not `kept`."""

    kept: Tensor

    def __init__(self, q: float, threshold: float, count: int) -> None:
        super().__init__(q)
        self.threshold = threshold
        self.register_buffer("kept", torch.ones(count, dtype=torch.bool))

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        constant = (1 - self.threshold**self.q) / self.q
        losses = super().samples(logits, labels, indices)
        return torch.where(self.kept[indices], losses, constant)

    def begin_epoch(self, epoch: int, epochs: int, trained: Trained) -> int:
        first, every = max(1, round(epochs / 3)), max(1, round(epochs / 12))
        if epoch < first or (epoch - first) % every:
            return 0
        self.choose(*trained())
        return 1

    def choose(self, logits: Tensor, labels: Tensor) -> None:
        """Keeps the samples whose given class has more than the threshold."""
        self.kept.copy_(
            F.cross_entropy(logits, labels, reduction="none").neg().exp() > self.threshold
        )
