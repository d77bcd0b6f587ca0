"""Turning a model's layers into quantized ones, in place."""

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn

from noisyq_fast.grouped import GroupedLinear, QuantGroupedLinear
from noisyq_fast.layers import (
    DEFAULT_AVERAGING_CONSTANT,
    DEFAULT_BITS,
    PER_GROUP,
    QuantConv2d,
    QuantizeWeightsTogether,
    QuantLinear,
    check_quantizer,
)

QUANTIZED = {
    nn.Conv2d: QuantConv2d,
    nn.Linear: QuantLinear,
    GroupedLinear: QuantGroupedLinear,
}


def quantize_model_(
    model: nn.Module,
    weight_bits: int = DEFAULT_BITS,
    activation_bits: int = DEFAULT_BITS,
    first_last_bits: int | None = 8,
    averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
    delayed: bool = False,
    ste: str = "identity",
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
    input_ranges: str = PER_GROUP,
) -> nn.Module:
    """Makes the layers of a model quantized, for training with any ordinary loop: every `Conv2d`,
    `Linear` and `GroupedLinear`.

    Modules and parameters stay the same objects, so optimizers, hooks, tied weights and state-dict
    names remain valid; each layer gains one buffer, ``running_absmax``.

    Args:
        model: any module; a single layer too. Changed in place.
        weight_bits: width of the weights, 2..8.
        activation_bits: width of the layers' inputs, 2..8.
        first_last_bits: width of weights and inputs of the first and the last layer, in the order
            of ``model.named_modules()``; ``None`` treats them like the others.
        averaging_constant: weight of a batch in the moving average of an input's absmax, 0..1.
        delayed, ste: as for `fake_quantize_ema`, for the layers' inputs.
        overrides: for layers by name, the options that differ (``weight_bits``,
            ``activation_bits``, ``averaging_constant``, ``delayed``, ``ste``, and of a
            `GroupedLinear` ``input_ranges``); ``None`` keeps a layer in float.
        input_ranges: as for `QuantGroupedLinear`, for the `GroupedLinear` layers.

    Returns:
        ``model``.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: a value out of range, a model without layers to quantize or with layers that
            are quantized already, or an override that names no layer or no option. The model is
            then as it was.

    Warns:
        UserWarning: for subclasses of these layers, which stay float: their own forward might not
            be what a quantized layer would compute.

    Example:
        >>> import noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 9, 3))
        >>> noisyq_fast.quantize_model_(model, overrides={"2": {"activation_bits": 6}})
        Sequential(
          (0): QuantConv2d(3, 8, kernel_size=(3, 3), stride=(1, 1), W8/A8)
          (1): QuantConv2d(8, 8, kernel_size=(3, 3), stride=(1, 1), W4/A4)
          (2): QuantConv2d(8, 9, kernel_size=(3, 3), stride=(1, 1), W8/A6)
        )
    """
    layers = _layers_to_quantize(model)
    options = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "averaging_constant": averaging_constant,
        "delayed": delayed,
        "ste": ste,
    }
    of_groups = options | {"input_ranges": input_ranges}
    check_quantizer(**of_groups)
    quantizers = {
        name: dict(of_groups if type(layer) is GroupedLinear else options)
        for name, layer in layers.items()
    }
    if first_last_bits is not None:
        for name in (next(iter(layers)), next(reversed(layers))):
            quantizers[name] |= {"weight_bits": first_last_bits, "activation_bits": first_last_bits}
    for name, override in (overrides or {}).items():
        if name not in layers:
            raise ValueError(f"overrides: got {name!r}, takes one of {', '.join(layers)}")
        if override is None:
            del quantizers[name]
            continue
        unknown = [option for option in override if option not in quantizers[name]]
        if unknown:
            takes = ", ".join(quantizers[name])
            raise ValueError(f"overrides[{name!r}]: got {', '.join(unknown)}, takes {takes}")
        quantizers[name] |= override
    for quantizer in quantizers.values():
        check_quantizer(**quantizer)

    for name, quantizer in quantizers.items():
        layer = layers[name]
        # The same object with another class: everything that refers to the layer stays valid.
        layer.__class__ = QUANTIZED[type(layer)]
        layer.set_quantizer_(**quantizer)
    if quantizers:
        QuantizeWeightsTogether(model, [layers[name] for name in quantizers])
    return model


def _layers_to_quantize(model: nn.Module) -> dict[str, nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    modules = dict(model.named_modules())
    done = [name for name, module in modules.items() if type(module) in QUANTIZED.values()]
    if done:
        raise ValueError(f"model: got layers that are quantized already ({', '.join(done)})")
    layers = {name: module for name, module in modules.items() if type(module) in QUANTIZED}
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without Conv2d, Linear or GroupedLinear layers"
        )
    for name, module in modules.items():
        if name not in layers and isinstance(module, tuple(QUANTIZED)):
            warnings.warn(
                f"layer {name!r} stays float: {type(module).__name__} is a subclass whose forward "
                "may differ from that of its base class",
                stacklevel=3,
            )
    return layers
