"""Symmetric cross-entropy (Wang et al. 2019, arXiv 1908.06112)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.checks import require
from experiments.losses import Loss
from experiments.methods.method import Method

_SMALLEST_PROBABILITY = 1e-7
_SMALLEST_LABEL = 1e-4


@dataclass(frozen=True)
class SCE(Method):
    """`a CE + b RCE`: cross-entropy, and the same with label and prediction exchanged,

        RCE = -sum_c p_c log y_c

    where a label that is 0 counts as 1e-4, so that `RCE = 9.21 (1 - p_y)` for one class. So in the
    authors' code; that the paper speaks of `log 0 = -4` instead is unverified.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"sce_alpha": 0.1, "sce_beta": 1.0}
    REPLACES: ClassVar[str] = "loss"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})

    sce_alpha: float | None = None
    """The factor a of the cross-entropy, from 0 (0.1, as for CIFAR-10; 6 for CIFAR-100)."""

    sce_beta: float | None = None
    """The factor b of the reverse cross-entropy, from 0 (1, as for CIFAR-10; 0.1 for CIFAR-100)."""

    def __post_init__(self) -> None:
        for name in self.DEFAULTS:
            factor = getattr(self, name)
            accepted = factor is None or 0 <= factor < 1e6
            require(name, factor, accepted, "a number from 0 to below 1,000,000")

    @property
    def label(self) -> str:
        return f"sce{self.sce_alpha:g}-{self.sce_beta:g}"

    def loss(self, loss: Loss, model: nn.Module, task: Any) -> Loss:
        return SymmetricCrossEntropy(self.sce_alpha, self.sce_beta)


class SymmetricCrossEntropy(Loss):
    """`a CE + b RCE`."""

    def __init__(self, alpha: float, beta: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.beta = beta

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        y = labels
        if not labels.is_floating_point():
            y = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
        p = logits.softmax(1).clamp(_SMALLEST_PROBABILITY, 1)
        forward = -(y * p.log()).sum(1)
        reverse = -(p * y.clamp(_SMALLEST_LABEL, 1).log()).sum(1)
        return self.alpha * forward + self.beta * reverse
