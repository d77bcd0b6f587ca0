"""AdderNet (Chen et al. 2019, arXiv 1912.13200)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize

from experiments.checks import require
from experiments.methods.method import Method
from experiments.models.replacing import inner_convolutions
from noisyq_fast import AdderConv2d


@dataclass(frozen=True)
class Adder(Method):
    """Convolutions but the first and the last layer sum absolute differences, `-sum |W - x|`, in
    place of products. Linear layers stay: those between have no batch norm before their ReLU, which
    would let nothing of such sums through.

    As in the authors' code: the gradients of W and x are `x - W` and `clip(W - x, -1, 1)`, that of
    a layer's W gets the length `sqrt(k) / 5` of its k numbers, W starts as normal numbers, and
    zeros around the picture count. Other than there, shortcuts stay as the network has them, and
    there is no batch norm after the classifier. The optimizer is Adam, whose steps have one length
    whatever that of the gradient, and the paper's steps are long, as these weights are: so W is
    `--adder-rate` times what is trained. Several processes normalise their own gradients before
    they are added.
    """

    REPLACES: ClassVar[str] = "layers"
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"adder_rate": 100.0}
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "prune": "which knows the filters of convolutions only",
        "defensive": "which bounds how much products can grow",
    }

    adder_rate: float | None = None
    """How many times as far as others a weight goes in a step of Adam, above 0."""

    def __post_init__(self) -> None:
        rate = self.adder_rate
        require("adder_rate", rate, rate is None or 0 < rate < 1e6, "a number above 0")

    @property
    def label(self) -> str:
        return "adder" if self.adder_rate == 100 else f"adder-rate{self.adder_rate:g}"

    def evaluation_options(self) -> dict[str, Any]:
        return {"adder_rate": self.adder_rate}

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        layers = inner_convolutions(model, example)
        if not layers:
            raise ValueError(
                f"adder: {type(model).__name__} has no convolution between the first and the last "
                "layer"
            )
        for name, layer in layers.items():
            try:
                adding = _adding(layer)
                parametrize.register_parametrization(adding, "weight", Scaled(self.adder_rate))
                model.set_submodule(name, adding)
            except ValueError as error:
                raise ValueError(f"adder: layer {name}: {error}") from error
        return model

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str:
        layers = [m for m in model.modules() if isinstance(m, AdderConv2d)]
        numbers = sum(layer.weight.numel() for layer in layers)
        return f"{len(layers)} layers add, with {numbers:,} weights; their additions count as MACs"


class Scaled(nn.Module):
    """``factor`` times a parameter."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * self.factor

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight / self.factor


def _adding(layer: nn.Conv2d) -> AdderConv2d:
    AdderConv2d.check(layer)
    return AdderConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        bias=layer.bias is not None,
    )
