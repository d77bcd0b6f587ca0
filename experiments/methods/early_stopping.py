"""Early stopping on held-out samples, whose labels are as noisy as those trained on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.checks import MOST_EPOCHS, require_whole
from experiments.methods.method import Method
from experiments.training.finite import require_finite


@dataclass(frozen=True)
class EarlyStopping(Method):
    """Stops when the score on held-out samples (accuracy, or F1 of action units) has not risen for
    some epochs, and goes back to the weights of the best one (the first, among equals)."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"patience": 10}

    patience: int | None = None
    """Epochs without a better score on held-out samples after which training stops.
    Needs --validation, which is then 0.1 unless given. Always on for faces."""

    def __post_init__(self) -> None:
        require_whole("patience", self.patience, 1, MOST_EPOCHS)

    @property
    def label(self) -> str:
        return f"early-stopping{self.patience}"

    def end_epoch(self, model: nn.Module, state: dict[str, Any], metrics: Any) -> bool:
        weights = model.state_dict()
        if (
            not state
            or metrics.validation_score > state["score"]
            or _shapes(weights) != _shapes(state["weights"])  # pruned: older weights do not fit
        ):
            state["score"] = metrics.validation_score
            state["epoch"] = metrics.epoch
            state["weights"] = {name: tensor.clone() for name, tensor in weights.items()}
        return metrics.epoch - state["epoch"] >= self.patience

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str | None:
        if not state:
            return None
        model.load_state_dict(state["weights"])
        return f"weights of epoch {state['epoch']} restored, validation score {state['score']:.2%}"

    def check(self, model: nn.Module, state: dict[str, Any], history: list[Any]) -> None:
        score, epoch, weights = state["score"], state["epoch"], state["weights"]
        scores = [(metrics.epoch, metrics.validation_score) for metrics in history]
        if type(epoch) is not int or (epoch, score) not in scores:
            raise ValueError(f"got epoch {epoch!r} as the best, with a score that it did not have")
        if _shapes(weights) != _shapes(model.state_dict()):
            raise ValueError("the weights of the best epoch have other names or shapes")
        require_finite(weights.items(), "in the best epoch")


def _shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in weights.items()}
