"""Plain training, and the hooks through which other methods differ from it."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Baseline:
    """Cross-entropy and Adam. A method overrides what it changes; its fields are its options."""

    @property
    def label(self) -> str:
        """The method and its options, short, for the name of a run."""
        return "baseline"

    def model(self, model: nn.Module) -> nn.Module:
        """Changes the freshly initialised network."""
        return model

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of a training batch."""
        return F.cross_entropy(logits, labels)

    def optimizer(self, parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        """What updates the parameters; the trainer sets its learning rate each epoch."""
        return torch.optim.Adam(parameters, lr=lr, fused=True)
