"""Early-learning regularization (Liu et al. 2020, arXiv 2007.00151)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.checks import require
from experiments.losses import Loss
from experiments.methods.method import Method
from experiments.training.data_parallel import gather

_SMALLEST = 1e-4


@dataclass(frozen=True)
class ELR(Method):
    """`CE + l log(1 - <t, p>)` with a target `t` for each sample, which keeps what the network said
    of it early on: before it is used, it becomes `b t + (1 - b) p`.

    The paper's learning rate and weight decay are not taken over.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"elr_lambda": 3.0, "elr_beta": 0.7}
    REPLACES: ClassVar[str] = "loss"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})

    elr_lambda: float | None = None
    """The factor l, from 0 (3, as for CIFAR-10; 7 for CIFAR-100)."""

    elr_beta: float | None = None
    """How much of a target stays, b, from 0 to below 1 (0.7, as for CIFAR-10; 0.9 for
    CIFAR-100)."""

    def __post_init__(self) -> None:
        factor, kept = self.elr_lambda, self.elr_beta
        accepted = factor is None or 0 <= factor < 1e6
        require("elr_lambda", factor, accepted, "a number from 0 to below 1,000,000")
        require("elr_beta", kept, kept is None or 0 <= kept < 1, "a number from 0 to below 1")

    @property
    def label(self) -> str:
        return f"elr{self.elr_lambda:g}-{self.elr_beta:g}"

    def loss(self, loss: Loss, model: nn.Module, task: Any) -> Loss:
        count, classes = task.count("trained"), task.classes
        return EarlyLearning(self.elr_lambda, self.elr_beta, count, classes)


class EarlyLearning(Loss):
    """Cross-entropy and the regularizer; the targets stay as they are in evaluation mode."""

    targets: Tensor

    def __init__(self, factor: float, kept: float, count: int, classes: int) -> None:
        super().__init__()
        self.factor = factor
        self.kept = kept
        self.register_buffer("targets", torch.zeros(count, classes))

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        p = logits.softmax(1).clamp(_SMALLEST, 1 - _SMALLEST)
        if self.training:
            self._update(p.detach(), indices)
        agreement = (self.targets[indices] * p).sum(1)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses + self.factor * (1 - agreement).log()

    def _update(self, p: Tensor, indices: Tensor) -> None:
        # Of all processes: the next epoch gives them other samples.
        p, indices = gather(p / p.sum(1, keepdim=True)), gather(indices)
        targets = self.kept * self.targets[indices] + (1 - self.kept) * p
        self.targets[indices] = targets.to(self.targets.dtype)
