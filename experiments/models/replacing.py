"""Layers of a network that are exchanged for others."""

from torch import Tensor, nn

from noisyq_fast.first_last import by_execution, by_registration

Layer = nn.Conv2d | nn.Linear


def plain_layers(model: nn.Module) -> dict[str, Layer]:
    """The ordinary convolutions and linear layers, by name."""
    return {name: m for name, m in model.named_modules() if type(m) in (nn.Conv2d, nn.Linear)}


def inner_layers(model: nn.Module, example: Tensor | None) -> dict[str, Layer]:
    """Those of them that are neither first nor last: that neither see the network's input nor make
    its output, as an example shows, or else as they are registered."""
    # Of any kind: a GroupedLinear can be the last.
    layers = {
        name: module
        for name, module in model.named_modules()
        if any(p.dim() > 1 for p in module.parameters(recurse=False))
    }
    if not layers:
        return {}
    found = by_registration(layers) if example is None else by_execution(model, layers, example)
    ends = found.first | found.last
    return {name: layer for name, layer in plain_layers(model).items() if name not in ends}
