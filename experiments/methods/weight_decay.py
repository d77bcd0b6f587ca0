"""Weight decay, decoupled (Loshchilov & Hutter 2017, arXiv 1711.05101) or in the loss."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from experiments.checks import require, require_choice
from experiments.losses import Changed, Loss, total
from experiments.methods.method import Method
from experiments.models.layers import decayed

Form = Literal["decoupled", "loss"]


@dataclass(frozen=True)
class WeightDecay(Method):
    """Draws the weights of convolutions and linear layers towards 0; never biases and norms.

    decoupled: `W -= lr a W` in each step, beside Adam's step. loss: `a sum ||W||^2` is added to the
    loss, as the paper's formula says, and so goes through Adam's normalisation.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"weight_decay": 0.01}

    weight_decay: float | None = None
    """The factor a, from 0."""

    weight_decay_form: Form = "decoupled"
    """Beside Adam's step (AdamW), or a * sum of squares in the loss, as the paper's formula
    says."""

    def __post_init__(self) -> None:
        factor = self.weight_decay
        accepted = factor is None or 0 <= factor < 1e6
        require("weight_decay", factor, accepted, "a number from 0 to below 1,000,000")
        require_choice("weight_decay_form", self.weight_decay_form, get_args(Form))

    @property
    def label(self) -> str:
        in_loss = "-in-loss" if self.weight_decay_form == "loss" else ""
        return f"weight-decay{self.weight_decay:g}{in_loss}"

    def recipe(self, recipe: Any) -> Any:
        return replace(recipe, weight_decay=0.0)

    def optimizer_options(self) -> dict[str, Any]:
        return {"weight_decay": self.weight_decay} if self.weight_decay_form == "decoupled" else {}

    def loss(self, loss: Loss, model: nn.Module, task: Any) -> Loss:
        if self.weight_decay_form == "decoupled":
            return loss

        def penalty() -> Tensor:
            squares = total(weight.square().sum() for weight in decayed(model))
            return self.weight_decay * squares

        return Changed(loss, added=penalty)
