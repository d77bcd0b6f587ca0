"""Dropout (Srivastava et al. 2014, JMLR 15), also of weights (Wan et al. 2013, ICML)."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from experiments.checks import require, require_choice
from experiments.methods.method import Method
from experiments.models.layers import LAYERS
from noisyq_fast import GroupedLinear

Where = Literal["classifier", "stages", "weights"]
TestFactor = Literal["keep", "drop"]


@dataclass(frozen=True)
class Dropout(Method):
    """Zeroes each number `x` with probability p in training, and none in evaluation.

    In training `m x / (1 - p)`, where `m` is 0 with probability p and else 1, drawn anew for every
    number and forward; in evaluation `f x / (1 - p)`. The factor `f = 1 - p` leaves `x` as it is on
    average in training and exactly in evaluation; `f = p` is the paper's literal text, a slip.

    This is the classic form, `m x` and `f x`, with both sides divided by `1 - p`.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"dropout": 0.1}

    dropout: float | None = None
    """The probability p, from 0 to below 1."""

    dropout_where: Where = "classifier"
    """What is dropped: the classifier's input, also what each stage puts out, or instead the
    weights of all convolutions and linear layers, as the paper's text says."""

    dropout_test_factor: TestFactor = "keep"
    """Multiplies at test by 1 - p (keep), or by p (drop), as the paper's text says."""

    def __post_init__(self) -> None:
        p = self.dropout
        require("dropout", p, p is None or 0 <= p < 1, "a number from 0 to below 1")
        for name, choices in (("dropout_where", Where), ("dropout_test_factor", TestFactor)):
            require_choice(name, getattr(self, name), get_args(choices))

    @property
    def label(self) -> str:
        where = "" if self.dropout_where == "classifier" else f"-{self.dropout_where}"
        times_p = "-times-p" if self.dropout_test_factor == "drop" else ""
        return f"dropout{self.dropout:g}{where}{times_p}"

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        if self.dropout_where == "weights":
            if any(is_parametrized(layer, "weight") for layer in layers(model)):
                raise ValueError(
                    "--dropout-where: got weights with a method that makes the weights from other "
                    "parameters (adder, hashed, lcnn), takes classifier or stages"
                )
            # Ahead of the hook that quantizes the weights, if any: that one has to see the zeros.
            model.register_forward_pre_hook(self._replace_weights, prepend=True)
            model.register_forward_hook(_put_weights_back, always_call=True)
            return model
        if self.dropout_where == "stages":
            for stage in stages(model):
                stage.register_forward_hook(self._replace_output)
        classifier(model).register_forward_pre_hook(self._replace_input)
        return model

    def evaluation_options(self) -> dict[str, Any]:
        return asdict(self) if self.dropout_test_factor == "drop" else {}

    def _dropped(self, x: Tensor, training: bool) -> Tensor:
        if training:
            return F.dropout(x, self.dropout)
        return x if self.dropout_test_factor == "keep" else x * (self.dropout / (1 - self.dropout))

    def _replace_input(self, module: nn.Module, args: tuple[Tensor]) -> Tensor:
        return self._dropped(args[0], module.training)

    def _replace_output(self, module: nn.Module, _args: object, out: Tensor) -> Tensor:
        return self._dropped(out, module.training)

    def _replace_weights(self, model: nn.Module, _args: object) -> None:
        # What is in the layer's own dict hides the parameter, which stays where it is.
        for layer in layers(model):
            vars(layer)["weight"] = self._dropped(layer.weight, layer.training)


def _put_weights_back(model: nn.Module, *_: object) -> None:
    for layer in layers(model):
        vars(layer).pop("weight", None)


def layers(model: nn.Module) -> list[LAYERS]:
    """The convolutions and linear layers."""
    return [module for module in model.modules() if isinstance(module, LAYERS)]


def classifier(model: nn.Module) -> nn.Module:
    """The last linear layer."""
    linear = [layer for layer in layers(model) if isinstance(layer, nn.Linear | GroupedLinear)]
    if not linear:
        raise ValueError(f"dropout: {type(model).__name__} has no linear layer")
    return linear[-1]


def stages(model: nn.Module) -> list[nn.Module]:
    """The modules that a network calls stage1, stage2 and so on."""
    stage = re.compile(r"(.*\.)?stage\d+")
    found = [module for name, module in model.named_modules() if stage.fullmatch(name)]
    if not found:
        raise ValueError(
            f"--dropout-where: got stages, but {type(model).__name__} has no stage1, stage2 ..."
        )
    return found
