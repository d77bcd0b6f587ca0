"""Layers of a network that are exchanged for others."""

from torch import Tensor, nn

from noisyq_fast.conversion.first_last import by_execution, by_registration


def inner_convolutions(model: nn.Module, example: Tensor | None) -> dict[str, nn.Conv2d]:
    """The ordinary convolutions, by name, that are neither first nor last of all layers: that
    neither see the network's input nor make its output, as an example shows, or else in the order
    in which they are registered."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    }
    if not layers:
        return {}
    found = by_registration(layers) if example is None else by_execution(model, layers, example)
    ends = found.first | found.last
    return {
        name: layer
        for name, layer in layers.items()
        if type(layer) is nn.Conv2d and name not in ends
    }
