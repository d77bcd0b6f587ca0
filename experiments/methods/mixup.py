"""mixup (Zhang et al. 2017, arXiv 1710.09412)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.checks import require
from experiments.losses import Loss
from experiments.methods.method import Method
from experiments.training.procedure import Batch, Parts, Procedure, StepResult


@dataclass(frozen=True)
class Mixup(Method):
    """Trains on `l x_i + (1 - l) x_j`, with a loss that is `l` times that of the one label and
    `1 - l` times that of the other. The factor `l`, from Beta(a, a), is one for a batch, and j a
    permutation of it; of several processes each draws its own.

    That a from 8 to 32 suits wrong labels is unverified. The paper's learning rate and weight decay
    are not taken over. What the network fits of the training labels is measured after each epoch,
    on images that are not mixed.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"mixup": 1.0}
    REPLACES: ClassVar[str] = "procedure"
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "elr": "which remembers what the network says of single images"
    }

    mixup: float | None = None
    """The parameter a of the Beta distribution, above 0."""

    def __post_init__(self) -> None:
        a = self.mixup
        require("mixup", a, a is None or 0 < a <= 1000, "a number above 0, up to 1,000")

    @property
    def label(self) -> str:
        return f"mixup{self.mixup:g}"

    def procedure(self, parts: Parts) -> Procedure:
        return MixupProcedure(parts, self.mixup)


class MixupProcedure(Procedure):
    """Follows the mixed loss."""

    def __init__(self, parts: Parts, alpha: float) -> None:
        super().__init__(parts)
        self.alpha = alpha

    def step(self, batch: Batch) -> StepResult:
        device = batch.inputs.device
        alpha = torch.full((), self.alpha, device=device)
        # Checked, it would ask the device for numbers, as a recorded step cannot.
        share = torch.distributions.Beta(alpha, alpha, validate_args=False).sample()
        order = torch.rand(len(batch.inputs), device=device).argsort()
        with self.parts.autocast():
            logits = self.forwards[0](mixed_inputs(batch.inputs, share, order)).float()
            loss = mixed_loss(self.loss(), logits, batch, share, order)
        self.follow(loss * batch.share)
        return StepResult(loss.detach(), None)


def mixed_inputs(inputs: Tensor, share: Tensor, order: Tensor) -> Tensor:
    """`l x + (1 - l) x[order]`."""
    return share * inputs + (1 - share) * inputs[order]


def mixed_loss(loss: Loss, logits: Tensor, batch: Batch, share: Tensor, order: Tensor) -> Tensor:
    """Of the logits of mixed inputs."""
    other = replace(batch, labels=batch.labels[order], indices=batch.indices[order])
    losses = [loss(logits, each.labels, each.indices) for each in (batch, other)]
    return share * losses[0] + (1 - share) * losses[1]
