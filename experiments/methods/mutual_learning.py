"""Deep mutual learning (Zhang et al. 2018, arXiv 1706.00384)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from experiments.losses import imitation, total
from experiments.methods.method import Method
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult


@dataclass(frozen=True)
class MutualLearning(Method):
    """Two networks with other initial weights see the same batches; to the loss of each,
    `KL(p_other || p_own)` is added. The first network is what is tested and kept.

    As in the authors' code, both learn from one forward pass of each; that in the paper the second
    one meets the first one already updated is unverified. Other than there, the optimizer is Adam,
    with the rate and schedule of all methods. Two forward and backward passes a sample.
    """

    REPLACES: ClassVar[str] = "procedure"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})

    @property
    def label(self) -> str:
        return "mutual-learning"

    def procedure(self, parts: Parts) -> Procedure:
        return Mutual(parts)


class Mutual(Procedure):
    """Networks that differ in their initial weights, and learn from each other."""

    NETWORKS: ClassVar[int] = 2
    PASSES: Passes = Passes(2, 2)

    def step(self, batch: Batch) -> StepResult:
        with self.parts.autocast():
            logits = [forward(batch.inputs).float() for forward in self.forwards]
            losses = [
                loss(scores, batch.labels, batch.indices) + difference
                for loss, scores, difference in zip(
                    self.losses, logits, differences(logits), strict=True
                )
            ]
        for number, loss in enumerate(losses):
            self.follow(loss * batch.share, number)
        return StepResult(losses[0].detach(), logits[0].detach())


def differences(logits: Sequence[Tensor]) -> list[Tensor]:
    """For each network the mean of `KL(p_other || p_own)` over the others."""
    return [
        total(imitation(own, other) for other in logits if other is not own) / (len(logits) - 1)
        for own in logits
    ]
