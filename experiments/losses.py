"""Losses of a batch that know which samples they see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Trained = Callable[[], tuple[Tensor, Tensor]]
"""Gives the network's logits of all samples that are trained on, as they are, and their labels, in
the order of their indices. Takes a forward pass over them."""


class Loss(nn.Module):
    """Called with float32 logits `[B, C]`, labels and indices `[B]`, it gives the mean over the
    batch; `samples` gives the loss of each sample. A step calls one of the two, once.

    Labels are classes `[B]`, or probabilities of them `[B, C]`; or the probability of each of `C`
    answers `[B, C]`, NaN where it is unknown. Indices tell the samples among those trained on.
    What is remembered of samples is in buffers, which checkpoints hold.
    """

    def forward(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return self.samples(logits, labels, indices).mean()

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        """The loss of each sample, `[B]`."""
        raise NotImplementedError

    def begin_epoch(self, epoch: int, epochs: int, trained: Trained) -> int:
        """Before `epoch`, counted from 0, out of `epochs`; tells how often it called `trained`."""
        return 0


def imitation(logits: Tensor, others: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(softmax(others / T) || softmax(logits / T))`, the mean over the batch. No gradient
    goes to the logits of the other network."""
    own, other = ((z / temperature).log_softmax(1) for z in (logits, others.detach()))
    return temperature**2 * F.kl_div(own, other, log_target=True, reduction="batchmean")


def total(terms: Iterable[Tensor]) -> Tensor:
    """The sum of tensors, of which there is at least one."""
    nothing: Any = 0
    return sum(terms, nothing)


class CrossEntropy(Loss):
    """Of classes, or of probabilities of them."""

    def forward(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels)

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none")


class Changed(Loss):
    """Another loss, with changed labels or with something added.

    Args:
        loss: the other one.
        labels: gives the labels that it sees, from logits and labels.
        added: gives what is added to the loss of every sample.
    """

    def __init__(
        self,
        loss: Loss,
        labels: Callable[[Tensor, Tensor], Tensor] | None = None,
        added: Callable[[], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.labels = labels
        self.added = added

    def forward(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return self._changed(self.loss, logits, labels, indices)

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return self._changed(self.loss.samples, logits, labels, indices)

    def _changed(
        self, loss: Callable[..., Tensor], logits: Tensor, labels: Tensor, indices: Tensor
    ) -> Tensor:
        if self.labels is not None:
            labels = self.labels(logits, labels)
        value = loss(logits, labels, indices)
        return value if self.added is None else value + self.added()

    def begin_epoch(self, epoch: int, epochs: int, trained: Trained) -> int:
        return self.loss.begin_epoch(epoch, epochs, trained)
