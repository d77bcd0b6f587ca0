"""The penalty of defensive quantization (Lin et al. 2019, arXiv 1904.08444)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.checks import require
from experiments.losses import Changed, Loss, total
from experiments.methods.method import Method
from experiments.models.layers import LAYERS
from noisyq_fast import GroupedLinear


@dataclass(frozen=True)
class Defensive(Method):
    """Adds `b / 2` times the sum of `||M M^T - I||^2` over layers to the loss, which draws the
    Lipschitz constant of each layer to 1. M is the weight as a matrix with a row for each output,
    or its transpose, whichever has fewer rows: they differ by a constant.

    Alone, of a float network; together with quant, that of the paper. M is the float weight then,
    not the quantized one. Weight decay, which the penalty replaces, is off. That the weight is the
    float one and that the last layer counts are unverified, and so is b: the paper's was not to be
    had, 0.0003 is that of Parseval networks. The network, the optimizer and the rate are those of
    all methods.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"defensive": 0.0003}
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "weight_decay": "which draws weights to 0, where this draws their singular values to 1"
    }

    defensive: float | None = None
    """The factor b of the penalty, from 0."""

    def __post_init__(self) -> None:
        b = self.defensive
        require("defensive", b, b is None or 0 <= b < 1e6, "a number from 0 to below 1,000,000")

    @property
    def label(self) -> str:
        return f"defensive{self.defensive:g}"

    def recipe(self, recipe: Any) -> Any:
        return replace(recipe, weight_decay=0.0)

    def loss(self, loss: Loss, model: nn.Module, task: Any) -> Loss:
        def added() -> Tensor:
            layers = (layer for layer in model.modules() if isinstance(layer, LAYERS))
            return self.defensive / 2 * total(penalty(matrices(layer)) for layer in layers)

        return Changed(loss, added=added)


def matrices(layer: LAYERS) -> Tensor:
    """The weight of a convolution or linear layer as matrices `[groups, O, I]`."""
    weight = layer.weight
    if isinstance(layer, GroupedLinear):
        return weight
    return weight.reshape(getattr(layer, "groups", 1), -1, weight[0].numel())


def penalty(matrices: Tensor) -> Tensor:
    """The sum of `||M M^T - I||^2` over matrices `[groups, O, I]`, of the smaller product."""
    if matrices.shape[1] > matrices.shape[2]:
        matrices = matrices.mT
    # In full precision, whatever the layers compute in.
    with torch.autocast(matrices.device.type, enabled=False):
        products = matrices @ matrices.mT
        identity = torch.eye(products.shape[1], dtype=products.dtype, device=products.device)
        return (products - identity).square().sum()
