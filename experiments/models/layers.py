"""Which modules have weights that are trained as such: the others are norms."""

from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from noisyq_fast import GroupedLinear

LAYERS = nn.Conv2d | nn.Linear | GroupedLinear


def decayed(model: nn.Module) -> list[nn.Parameter]:
    """The weights of convolutions and linear layers, or what they are made from: no biases and no
    norms."""
    return [_trained(layer) for layer in model.modules() if isinstance(layer, LAYERS)]


def _trained(layer: Any) -> nn.Parameter:
    if is_parametrized(layer, "weight"):
        return layer.parametrizations.weight.original
    return layer.weight
