"""Sharpness-aware minimization (Foret et al. 2020, arXiv 2010.01412), also adaptive (Kwon et al.
2021, arXiv 2102.11600)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.checks import require
from experiments.methods.method import Method
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult

_TINY = 1e-12


@dataclass(frozen=True)
class SAM(Method):
    """Steps down the gradient that the loss has at `w + e`, where `e = r g / ||g||` climbs along
    the gradient `g` at `w`; the norm is over all parameters. Adaptive, `e = r w^2 g / ||w g||`.

    Statistics of batch norm and ranges of activations are those of the first pass. Decoupled weight
    decay acts at `w`. Of several processes all follow one `e`. Two forward and backward passes a
    step. That r from 0.1 to 0.2 suits wrong labels is unverified.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"sam_rho": 0.05}
    REPLACES: ClassVar[str] = "procedure"

    sam_rho: float | None = None
    """The length r of the climb, above 0."""

    sam_adaptive: bool = False
    """Relative to the size of each weight; its r is ten times as large, 0.5 (unverified)."""

    def __post_init__(self) -> None:
        r = self.sam_rho
        require("sam_rho", r, r is None or 0 < r <= 1000, "a number above 0, up to 1,000")

    @property
    def label(self) -> str:
        return f"sam{self.sam_rho:g}" + ("-adaptive" if self.sam_adaptive else "")

    def procedure(self, parts: Parts) -> Procedure:
        return SAMProcedure(parts, self.sam_rho, self.sam_adaptive)


class SAMProcedure(Procedure):
    """Two passes a step."""

    PASSES: Passes = Passes(2, 2)

    def __init__(self, parts: Parts, rho: float, adaptive: bool) -> None:
        super().__init__(parts)
        self.rho = rho
        self.adaptive = adaptive

    def step(self, batch: Batch) -> StepResult:
        loss, logits = self._backward(batch)
        (network,) = self.networks
        parameters, buffers = list(network.parameters()), list(network.buffers())
        before = [tensor.detach().clone() for tensor in (*parameters, *buffers)]
        climb_(parameters, self.rho, self.adaptive)
        self.losses.eval()  # one that remembers samples does so once a step
        self._backward(batch)
        self.losses.train()
        with torch.no_grad():
            for tensor, value in zip((*parameters, *buffers), before, strict=True):
                tensor.copy_(value)
        self.optimizers[0].step()
        return StepResult(loss, logits)

    def _backward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        with self.parts.autocast():
            logits = self.forwards[0](batch.inputs).float()
            loss = self.losses[0](logits, batch.labels, batch.indices)
        self.gradients(loss * batch.share)
        return loss.detach(), logits.detach()


@torch.no_grad()
def climb_(parameters: Iterable[nn.Parameter], rho: float, adaptive: bool) -> None:
    """Moves parameters along their gradients, by `rho` in all."""
    moved = [parameter for parameter in parameters if parameter.grad is not None]
    scales = [parameter.abs() if adaptive else torch.ones_like(parameter) for parameter in moved]
    pairs = list(zip(moved, scales, strict=True))
    norm = torch.stack([(scale * p.grad).square().sum() for p, scale in pairs]).sum().sqrt()
    for parameter, scale in pairs:
        parameter.add_(rho / (norm + _TINY) * scale.square() * parameter.grad)
