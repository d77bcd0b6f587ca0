"""Co-teaching (Han et al. 2018, arXiv 1804.06872)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from experiments.checks import MOST_EPOCHS, require, require_whole
from experiments.methods.method import Method
from experiments.training.data_parallel import gather, shard
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult


@dataclass(frozen=True)
class CoTeaching(Method):
    """Two networks, each of which picks the samples of a batch with the smallest losses for the
    other to learn from. The share that they leave out rises from 0 to the forget rate over the
    first epochs. The first network is what is tested and kept.

    Other than the authors, Adam keeps its first moment's decay of 0.9, which they lower to 0.1
    after 80 of 200 epochs, and the mean loss is not divided by the number of samples once more,
    which Adam would hardly notice. Two forward and backward passes a sample.
    """

    REPLACES: ClassVar[str] = "procedure"

    forget_rate: float | None = None
    """The share of a batch that is left out in the end, from 0 to below 1. If not given: the share
    of labels that are wrong, which the method is told."""

    forget_epochs: int = 10
    """Epochs over which that share rises; at most half of all epochs."""

    def __post_init__(self) -> None:
        rate = self.forget_rate
        require("forget_rate", rate, rate is None or 0 <= rate < 1, "a number from 0 to below 1")
        require_whole("forget_epochs", self.forget_epochs, 1, MOST_EPOCHS)

    @property
    def label(self) -> str:
        rate = "" if self.forget_rate is None else f"{self.forget_rate:g}"
        rise = "" if self.forget_epochs == 10 else f"-rise{self.forget_epochs}"
        return f"co-teaching{rate}{rise}"

    def procedure(self, parts: Parts) -> Procedure:
        rate = self.forget_rate
        if rate is None:
            rate = parts.task.wrong_labels()
        if rate is None:
            raise ValueError(
                "--forget-rate: got none, and nobody knows which labels are wrong; takes a number "
                "from 0 to below 1"
            )
        return CoTeachingProcedure(parts, rate, self.forget_epochs)


class CoTeachingProcedure(Procedure):
    """Two networks that differ in their initial weights."""

    NETWORKS: ClassVar[int] = 2
    PASSES: Passes = Passes(2, 2)
    CHANGES: ClassVar[bool] = True

    def __init__(self, parts: Parts, rate: float, rise: int) -> None:
        super().__init__(parts)
        self.rate = rate
        self.rise = max(1, min(rise, parts.config.epochs // 2))
        self.left_out = 0.0

    def begin_epoch(self, epoch: int) -> Passes:
        self.left_out = left_out(epoch, self.rate, self.rise)
        return super().begin_epoch(epoch)

    def step(self, batch: Batch) -> StepResult:
        with self.parts.autocast():
            logits = [forward(batch.inputs).float() for forward in self.forwards]
            losses = [
                self.loss(number).samples(scores, batch.labels, batch.indices)
                for number, scores in enumerate(logits)
            ]
        picked = [picks(own.detach(), self.left_out) for own in losses]
        means = [kept_mean(losses[n], *picked[1 - n]) for n in range(2)]
        for number, mean in enumerate(means):
            self.follow(mean, number)
        return StepResult(means[0].detach() / batch.share, logits[0].detach())


def left_out(epoch: int, rate: float, rise: int) -> float:
    """The share of a batch that is left out in `epoch`, counted from 0."""
    return rate if epoch >= rise else rate * epoch / max(1, rise - 1)


def picks(losses: Tensor, share: float) -> tuple[Tensor, int]:
    """Which of this process's samples are among the smallest losses of the whole batch, without a
    share of it, and how many those are on all processes."""
    everyone = gather(losses)
    count = max(1, int((1 - share) * len(everyone)))
    smallest = everyone.argsort(stable=True)[:count]
    picked = torch.zeros_like(everyone, dtype=torch.bool).index_fill_(0, smallest, True)
    return shard(picked), count


def kept_mean(losses: Tensor, picked: Tensor, count: int) -> Tensor:
    """This process's share of the mean over the picked samples."""
    return torch.where(picked, losses, 0.0).sum() / count
