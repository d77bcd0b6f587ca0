"""AdderNet (Chen et al. 2019, arXiv 1912.13200)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from experiments.methods.method import Method
from experiments.models.replacing import inner_layers
from noisyq_fast import AdderConv2d, AdderLinear


@dataclass(frozen=True)
class Adder(Method):
    """Convolutions and linear layers but the first and the last sum absolute differences,
    `-sum |W - x|`, in place of products.

    As in the authors' code: the gradients of W and x are `x - W` and `clip(W - x, -1, 1)`, that of a
    layer's W gets the length `sqrt(k) / 5` of its k numbers, W starts as normal numbers, and zeros
    around the picture count. Other than there, the optimizer is Adam, shortcuts stay as the network
    has them, and there is no batch norm after the classifier. Several processes normalise their own
    gradients before they are added.
    """

    REPLACES: ClassVar[str] = "layers"

    @property
    def label(self) -> str:
        return "adder"

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        layers = inner_layers(model, example)
        if not layers:
            raise ValueError(
                f"adder: {type(model).__name__} has no convolution or linear layer between the "
                "first and the last"
            )
        for name, layer in layers.items():
            try:
                model.set_submodule(name, _adding(layer))
            except ValueError as error:
                raise ValueError(f"adder: layer {name}: {error}") from error
        return model

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str:
        layers = [m for m in model.modules() if isinstance(m, AdderConv2d | AdderLinear)]
        numbers = sum(layer.weight.numel() for layer in layers)
        return f"{len(layers)} layers add, with {numbers:,} weights; their additions count as MACs"


def _adding(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        return AdderLinear(layer.in_features, layer.out_features, bias)
    AdderConv2d.check(layer)
    return AdderConv2d(
        layer.in_channels,
        layer.out_channels,
        layer.kernel_size,
        layer.stride,
        layer.padding,
        bias=bias,
    )
