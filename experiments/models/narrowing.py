"""The network that a slimmable one is at one of its widths, taken for itself."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

from torch import Tensor, nn

from experiments.models.slimmable import (
    FirstChannelsBlock,
    QuantSlimConv2d,
    QuantSlimLinear,
    SlimBasicBlock,
    SlimConv2d,
    SlimLinear,
    SlimNorm,
    Widths,
    set_width,
    slim_modules,
)
from noisyq_fast import QuantConv2d, Quantizer, QuantLayer, QuantLinear, disabled
from noisyq_fast.running import in_evaluation

_CLASSES = {SlimConv2d: (nn.Conv2d, QuantConv2d), SlimLinear: (nn.Linear, QuantLinear)}
_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {SlimBasicBlock: FirstChannelsBlock}


def narrowed(model: nn.Module, width: float, example: Tensor) -> nn.Module:
    """A copy of a network from `make_slimmable_` that has one of its widths alone, and gives its
    outputs to the bit: of ordinary layers with the parts of the parameters that are used.

    Args:
        model: stays as it is, but for its width.
        example: an input batch, on which it is run to see what each layer gets.

    Raises:
        ValueError: a width that the network does not have, or a network of one width.
        RuntimeError: a width whose statistics were not measured.
    """
    set_width(model, width)
    model = copy.deepcopy(model)
    inputs = _input_channels(model, example)
    for module, count in inputs.items():
        if isinstance(module, SlimNorm):
            _narrow_norm_(module, count)
        elif isinstance(module, SlimConv2d | SlimLinear):
            _narrow_layer_(module, count)
    for parent in list(model.modules()):
        if type(parent) in _BLOCKS:
            parent.__class__ = _BLOCKS[type(parent)]
        for name, child in parent._modules.items():
            if isinstance(child, SlimNorm) and child.widths.private:
                parent._modules[name] = child.active
    return model


def _input_channels(model: nn.Module, example: Tensor) -> dict[nn.Module, int]:
    """Of each layer and batch norm, at the width which is set."""
    found = {}

    def see(module: nn.Module, args: tuple[Tensor]) -> None:
        found[module] = args[0].shape[1]

    hooks = [module.register_forward_pre_hook(see) for module in slim_modules(model)]
    any_quantizer = any(isinstance(module, Quantizer) for module in model.modules())
    try:
        with in_evaluation(model), disabled(model) if any_quantizer else contextlib.nullcontext():
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _narrow_norm_(norm: SlimNorm, channels: int) -> None:
    norm.of_widths = nn.ModuleList([norm.active])
    norm.widths = Widths((1.0,), norm.widths.divisor, norm.widths.private)
    norm.set_width(1)
    if norm.weight is not None and norm.bias is not None:
        norm.weight, norm.bias = _first(norm.weight, channels), _first(norm.bias, channels)


def _narrow_layer_(layer: SlimConv2d | SlimLinear, inputs: int) -> None:
    count = layer.active
    if isinstance(layer, QuantSlimConv2d | QuantSlimLinear):
        if layer.weight_quantizer is not None and layer.keeps_channels():
            _narrow_quantizer_(layer.weight_quantizer, count)
        layer.input_quantizer = layer.active_quantizer
        del layer.narrower
    layer.weight = _first(layer.weight, count, inputs)
    layer.bias = None if layer.bias is None else _first(layer.bias, count)
    unit = "channels" if isinstance(layer, nn.Conv2d) else "features"
    setattr(layer, f"out_{unit}", count)
    setattr(layer, f"in_{unit}", inputs)
    for name in ("plan", "slims", "place", "active"):
        delattr(layer, name)
    ordinary, quantized = next(both for cls, both in _CLASSES.items() if isinstance(layer, cls))
    become: Any = layer
    if isinstance(layer, QuantLayer):
        become.__class__, become._float_class = quantized, ordinary
    else:
        become.__class__ = ordinary


def _narrow_quantizer_(quantizer: Quantizer, count: int) -> None:
    """Keeps the numbers of the first output channels alone."""
    for module in quantizer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(module, name, _first(parameter, count))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer[:count].clone())


def _first(parameter: Tensor, *counts: int) -> nn.Parameter:
    """The first indices of the first dimensions, as a parameter of its own."""
    part = parameter.detach()[tuple(map(slice, counts))].clone()
    return nn.Parameter(part, parameter.requires_grad)
