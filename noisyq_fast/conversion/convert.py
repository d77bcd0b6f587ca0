"""Turning a model's layers into quantized ones, and back, in place."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from noisyq_fast.conversion.classes import (
    check_not_lazy,
    float_class,
    quant_class,
    rebased,
    why_not_quantized,
)
from noisyq_fast.conversion.first_last import FirstLast, by_execution, by_registration
from noisyq_fast.grid import ODD, SIGNED, UNSIGNED, check_bits
from noisyq_fast.integer.fusing import unfuse_
from noisyq_fast.layers import usage
from noisyq_fast.layers.grouped import (
    PER_GROUP,
    GroupedLinear,
    check_input_ranges,
)
from noisyq_fast.layers.layer import (
    DEFAULT_BITS,
    FLOAT,
    PER_TENSOR,
    QuantLayer,
    check_arithmetic,
    input_quantizer,
    weight_quantizer,
)
from noisyq_fast.quantizers import Quantizer
from noisyq_fast.quantizers.moving_absmax import DEFAULT_AVERAGING_CONSTANT

_log = logging.getLogger("noisyq_fast")

_GRID_OPTIONS: dict[str, dict[str, Any]] = {
    "weight": {"weight_grid": SIGNED, "weight_group_size": None},
    "activation": {"activation_grid": SIGNED, "activation_granularity": PER_TENSOR},
}
"""Options, with their defaults, that a quantizer given as ``weight`` or ``activation`` sets
itself."""
_OF_LAYERS = ("input_ranges", "arithmetic")
"""Options of layers, not of quantizers."""
_NOTES = ("was_given_parameters", "has_stored_weight", "made_of_weights")
"""Attributes in which a quantized layer notes its calls and its weight."""
_OPTIONS = (
    *("weight_bits", "activation_bits", "averaging_constant", "ste", "weight", "activation"),
    *_GRID_OPTIONS["weight"],
    *_GRID_OPTIONS["activation"],
    "arithmetic",
)


def quantize_model_(
    model: nn.Module,
    weight_bits: int = DEFAULT_BITS,
    activation_bits: int = DEFAULT_BITS,
    first_last_bits: int | None = 8,
    averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
    ste: str = "identity",
    overrides: Mapping[str, Mapping[str, Any] | None] | None = None,
    input_ranges: str = PER_GROUP,
    *,
    weight: Quantizer | EllipsisType | None = ...,
    activation: Quantizer | EllipsisType | None = ...,
    weight_grid: str = SIGNED,
    weight_group_size: int | None = None,
    activation_grid: str = SIGNED,
    activation_granularity: str = PER_TENSOR,
    arithmetic: str = FLOAT,
    example: Any = None,
    filter: Callable[[str, nn.Module], bool] | None = None,
) -> nn.Module:
    """Quantizes the layers of a model in place, for training with any ordinary loop.

    These are `Linear`, `Conv1d` to `Conv3d`, `ConvTranspose1d` to `ConvTranspose3d`, `Embedding`
    (its weight), `MultiheadAttention`, `GroupedLinear`, the `Conv1D` of Hugging Face, subclasses of
    these with the same forward, and layers added with `register_layer`.

    Modules and parameters stay the same objects, so optimizers, hooks, tied weights and the names
    of parameters remain valid. Each layer gains two modules, ``weight_quantizer`` and
    ``input_quantizer``. Tools that compute or fetch a weight before the forward (pruning, weight
    norm, sharding, offloading) may be applied before or after.

    Args:
        model: any module; a single layer too. Changed in place.
        weight_bits: width of the weights, 2..8.
        activation_bits: width of the layers' inputs, 2..8.
        first_last_bits: width of weights and inputs of the first and the last layers; ``None``
            treats them like the others.
        averaging_constant: weight of a batch in the moving average of an input's absmax, 0..1.
        ste: as for `MovingAbsMax`.
        overrides: by layer name, a dict of the options that differ (``weight_bits``,
            ``activation_bits``, ``averaging_constant``, ``ste``, ``weight``, ``activation``, the
            four of grids and granularity, ``arithmetic``, and for a `GroupedLinear`
            ``input_ranges``); ``None`` keeps a layer in float.
        input_ranges: as for `QuantGroupedLinear`, for the `GroupedLinear` layers.
        weight: a quantizer to copy for every weight, instead of ``AbsMax(weight_bits, ...)``;
            ``None`` leaves weights in float.
        activation: the same for inputs, instead of ``MovingAbsMax(activation_bits, ...)``.
        weight_grid, activation_grid: ``"signed"`` (the paper's), ``"full"``, ``"unsigned"``,
            ``"affine"`` or ``"odd"``, as in `Grid`. After a ReLU ``"unsigned"`` has twice the
            levels of ``"signed"``. It does not suit the input of the model: unless
            ``first_last_bits`` is ``None``, the first layers have a signed grid instead, if
            ``overrides`` do not name one. Likewise ``"odd"``, which has no 0, is not used in the
            first and last layers.
        weight_group_size: the number of consecutive input channels of a weight, with all kernel
            positions, that share a scale, instead of one scale for each output channel.
        activation_granularity: ``"tensor"``, or ``"token"``: one scale for each index of all axes
            but the last, computed at every call, in evaluation too; not for convolutions.
        arithmetic: ``"float"``, or ``"integer"``: layers multiply codes, exactly, as in
            `QuantLayer`; `fuse_` then forms chains of them.
        example: an input of the model (a tensor, a tuple of arguments or a dict of keyword
            arguments). The model is run on it, in evaluation and in training, to find its first and
            last layers: all that read the input, and all that compute the outputs. Without one they
            are the first and the last in the order of ``model.named_modules()``, and the log
            (`logging`) names them unless the model is a `Sequential`.
        filter: called with the name and the module of each layer; ``False`` keeps it in float.

    Returns:
        ``model``.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: a value out of range, a model without layers to quantize or with layers that
            are quantized already, an override that names no layer or no option, a
            ``weight_group_size`` that leaves a remainder, ``"token"`` for a convolution, or an
            example on which the model does not run. The model is then unchanged.

    Warns:
        UserWarning: lists all weights that stay float, except those that ``overrides`` and
            ``filter`` name. In the second training forward: quantized layers that the model has not
            called. Whenever it happens: a layer that is called several times in one forward. In
            the first two training batches: a quantizer with an unsigned grid that gets values below
            0 (the check synchronizes with a GPU, so later batches are not checked).

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
    options: dict[str, Any] = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "averaging_constant": averaging_constant,
        "ste": ste,
        "weight": weight,
        "activation": activation,
        "weight_grid": weight_grid,
        "weight_group_size": weight_group_size,
        "activation_grid": activation_grid,
        "activation_granularity": activation_granularity,
    }
    _quantizers(**options)
    if first_last_bits is not None:
        for chosen in (weight, activation):
            kind = chosen.grid_kind if isinstance(chosen, Quantizer) else SIGNED
            check_bits(first_last_bits, kind, "first_last_bits")
    if filter is not None and not callable(filter):
        raise TypeError(
            "filter: expected a function of a layer's name and the layer, or None, got "
            f"{type(filter).__name__}"
        )
    check_input_ranges(input_ranges)
    check_arithmetic(arithmetic)
    convertible, refused = _convertible(model)
    overrides = _checked(overrides, model, convertible)
    kept = {name for name, override in overrides.items() if override is None}
    if filter is not None:
        kept |= {name for name, layer in convertible.items() if not filter(name, layer)}
    layers = {name: layer for name, layer in convertible.items() if name not in kept}
    for name in [name for name in layers if _is_read_by_float_attention(name, model, layers)]:
        del layers[name]
        if name.rpartition(".")[0] in kept:
            kept.add(name)

    def quantizers_of(
        name: str, bits: int | None, **others: Any
    ) -> tuple[Quantizer | None, Quantizer | None]:
        """For a layer; ``bits`` and ``others`` apply unless its override sets them."""
        chosen = _with_bits(bits, {k: v for k, v in options.items() if k not in others}) | others
        override = {k: v for k, v in (overrides.get(name) or {}).items() if k not in _OF_LAYERS}
        for kind in _GRID_OPTIONS.keys() & override.keys():
            chosen |= _GRID_OPTIONS[kind]
        try:
            for option, kind in (("weight_bits", "weight"), ("activation_bits", "activation")):
                if option in override:
                    chosen[kind] = _with_bits(override[option], {kind: chosen[kind]})[kind]
            return _quantizers(**chosen | override)
        except (TypeError, ValueError) as error:  # the other options were checked before
            raise type(error)(f"overrides[{name!r}]: {error}") from error

    grids = {"weight_grid": weight_grid, "activation_grid": activation_grid}
    of_ends: dict[str, Any] = {option: SIGNED for option, grid in grids.items() if grid == ODD}
    of_input: dict[str, Any] = {"activation_grid": SIGNED} if activation_grid == UNSIGNED else {}
    if first_last_bits is not None:
        given = {"weight": weight, "activation": activation}
        of_ends |= _at_ends(first_last_bits, given, {"weight": "weight", "activation": "input"})
        of_input |= _at_ends(first_last_bits, given, {"activation": "model input"})
    inner = {name: quantizers_of(name, None) for name in layers}
    last = {name: quantizers_of(name, first_last_bits, **of_ends) for name in layers}
    of_first = of_ends | of_input
    first = {name: quantizers_of(name, first_last_bits, **of_first) for name in layers}
    called = layers
    try:
        for name, layer in layers.items():
            if isinstance(layer, GroupedLinear):
                layer.input_ranges = (overrides.get(name) or {}).get("input_ranges", input_ranges)
            _convert(name, layer, *inner[name])
            layer.arithmetic = (overrides.get(name) or {}).get("arithmetic", arithmetic)
        _refuse_nested_tensors(model)
        if layers and (example is not None or first_last_bits is not None):
            found = _first_and_last(model, convertible, example)
    except BaseException:
        dequantize_model_(model)
        raise
    if layers and (example is not None or first_last_bits is not None):
        if first_last_bits is not None:
            for name in (found.first | found.last) & layers.keys():
                ends, layer = first if name in found.first else last, layers[name]
                assert isinstance(layer, QuantLayer)
                _set_quantizers(name, layer, *ends[name])
        if missed := [name for name in layers if name not in found.called]:
            warnings.warn(
                f"quantized layers that the model does not call on the example: "
                f"{', '.join(missed)}. Their weights may be read directly, which computes in float",
                stacklevel=2,
            )
            called = {name: layer for name, layer in layers.items() if name in found.called}
    _warn_of_floats(model, layers, kept, refused)
    usage.watch(model, called)
    return model


def dequantize_model_(model: nn.Module) -> nn.Module:
    """Undoes `quantize_model_`: the layers are float again, with the weights as trained.

    Modules and parameters stay the same objects. To turn a quantized checkpoint into a float model,
    load it into a converted model, and undo the conversion.

    Args:
        model: a module with quantized layers. Changed in place.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model without quantized layers.

    Example:
        >>> import noisyq_fast
        >>> from torch import nn
        >>> model = noisyq_fast.quantize_model_(nn.Sequential(nn.Linear(3, 2)))
        >>> noisyq_fast.dequantize_model_(model)
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    _check_module(model)
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without quantized layers, takes what "
            "quantize_model_ returns"
        )
    unfuse_(model)
    for layer in layers:
        was = float_class(layer)
        # Those of several widths are in a list.
        own = dict.fromkeys(name.partition(".")[0] for name in layer.quantizers())
        for name in [*vars(layer)]:
            if name.endswith("_quantizer") or name in ("_float_class", *_OF_LAYERS, *_NOTES):
                own[name] = None
        for name in own:
            delattr(layer, name)
        layer.__class__ = rebased(layer, was)  # type: ignore[assignment]
    _allow_nested_tensors(model)
    return model


# Which layers there are.


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")


def _convertible(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that can be quantized, by name, and why others of their kind cannot."""
    _check_module(model)
    modules = dict(model.named_modules())
    done = [name for name, module in modules.items() if isinstance(module, QuantLayer)]
    if done:
        raise ValueError(f"model: got layers that are quantized already ({', '.join(done)})")
    check_not_lazy(modules)
    layers, refused = {}, {}
    for name, module in modules.items():
        why_not = why_not_quantized(module)
        if why_not:
            refused[name] = why_not
        elif why_not is not None:
            layers[name] = module
    if not layers:
        raise ValueError(
            f"model: got {type(model).__name__} without layers that quantize_model_ can convert, "
            "such as Conv2d, Linear or GroupedLinear"
        )
    return layers, refused


def _is_read_by_float_attention(
    name: str, model: nn.Module, layers: Mapping[str, nn.Module]
) -> bool:
    """Whether the layer is never called, because the attention that it belongs to stays float."""
    parent, _, child = name.rpartition(".")
    if child != "out_proj" or parent in layers:
        return False
    return type(model.get_submodule(parent)).forward is nn.MultiheadAttention.forward


def _checked(
    overrides: object, model: nn.Module, layers: Mapping[str, nn.Module]
) -> dict[str, Mapping[str, Any] | None]:
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise TypeError(
            "overrides: expected a dict from names of layers to options, such as "
            f"{{'head': {{'weight_bits': 8}}, 'stem': None}}, got {type(overrides).__name__}"
        )
    modules = dict(model.named_modules())
    for name, override in overrides.items():
        if not isinstance(name, str):
            raise TypeError(f"overrides: expected the name of a layer, a str, got {name!r}")
        if override is None and _has_own_parameters(modules.get(name)):
            continue
        if name not in layers:
            shown = [*layers][:20]
            more = f" and {len(layers) - len(shown)} more" if len(layers) > len(shown) else ""
            raise ValueError(f"overrides: got {name!r}, takes one of {', '.join(shown)}{more}")
        if not isinstance(override, Mapping):
            raise TypeError(
                f"overrides[{name!r}]: expected a dict of options, such as {{'weight_bits': 8}}, "
                f"or None to keep the layer float, got {override!r}"
            )
        grouped = isinstance(layers[name], GroupedLinear)
        takes = (*_OPTIONS, "input_ranges") if grouped else _OPTIONS
        unknown = [option for option in override if option not in takes]
        if unknown:
            got = ", ".join(map(str, unknown))
            raise ValueError(f"overrides[{name!r}]: got {got}, takes {', '.join(takes)}")
        if "input_ranges" in override:
            check_input_ranges(override["input_ranges"])
        check_arithmetic(override.get("arithmetic", FLOAT))
    return dict(overrides)


def _has_own_parameters(module: nn.Module | None) -> bool:
    return module is not None and next(module.parameters(recurse=False), None) is not None


def _first_and_last(model: nn.Module, layers: Mapping[str, nn.Module], example: Any) -> FirstLast:
    if example is None:
        found = by_registration(layers)
        if not isinstance(model, nn.Sequential | nn.MultiheadAttention) and len(layers) > 1:
            (first,), (last,) = found.first, found.last
            _log.warning(
                "quantize_model_: first and last layer by order of registration: %r and %r; pass "
                "example=, an input of the model, to find them by execution",
                first,
                last,
            )
        return found
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    try:
        for quantizer in quantizers:
            quantizer.enabled = False
        found = by_execution(model, layers, example)
    finally:
        for quantizer in quantizers:
            quantizer.enabled = True
    if not found.last:
        _log.warning(
            "quantize_model_: no layer counts as last: none computed a floating-point "
            "output of the model on the example"
        )
    return found


# The quantizers.


def _quantizers(
    weight_bits: int,
    activation_bits: int,
    averaging_constant: float,
    ste: str,
    weight: Quantizer | EllipsisType | None,
    activation: Quantizer | EllipsisType | None,
    weight_grid: str,
    weight_group_size: int | None,
    activation_grid: str,
    activation_granularity: str,
) -> tuple[Quantizer | None, Quantizer | None]:
    """The quantizers of the weight and of the input."""
    return (
        weight_quantizer(weight_bits, weight, weight_grid, weight_group_size),
        input_quantizer(
            activation_bits,
            averaging_constant,
            ste,
            activation,
            activation_grid,
            activation_granularity,
        ),
    )


def _with_bits(bits: int | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options with other bits, in quantizers too; None changes nothing."""
    if bits is None:
        return dict(options)
    changed = {
        name: value.like(bits=bits) if isinstance(value, Quantizer) else value
        for name, value in options.items()
    }
    return changed | {name: bits for name in options if name.endswith("_bits")}


def _at_ends(
    bits: int, given: Mapping[str, Any], places: Mapping[str, str]
) -> dict[str, Quantizer]:
    """The replacements of given quantizers in the first and the last layers."""
    return {
        option: given[option].at_end(bits, place)
        for option, place in places.items()
        if isinstance(given[option], Quantizer)
    }


# The classes of layers.


def _convert(
    name: str, layer: nn.Module, weight: Quantizer | None, activation: Quantizer | None
) -> None:
    # The same object with another class: everything that refers to the layer stays valid.
    cls = type(layer)
    was = cls.__bases__[0] if is_parametrized(layer) else cls
    vars(layer)["_float_class"] = was
    layer.__class__ = rebased(layer, quant_class(was))
    assert isinstance(layer, QuantLayer)
    _set_quantizers(name, layer, weight, activation)


def _set_quantizers(
    name: str, layer: QuantLayer, weight: Quantizer | None, activation: Quantizer | None
) -> None:
    try:
        layer.set_quantizers_(weight, activation)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    for kind, quantizer in layer.quantizers().items():
        quantizer.name = f"{name}.{kind}" if name else kind


# With padding, `torch.nn.TransformerEncoder` passes nested tensors to the fast path of its layers;
# quantized layers have no such path.


def _refuse_nested_tensors(model: nn.Module) -> None:
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder) or "_float_nested" in vars(module):
            continue
        if any(isinstance(layer, QuantLayer) for layer in module.modules()):
            vars(module)["_float_nested"] = module.use_nested_tensor
            module.use_nested_tensor = False


def _allow_nested_tensors(model: nn.Module) -> None:
    for module in model.modules():
        if "_float_nested" in vars(module):
            module.use_nested_tensor = module._float_nested
            del module._float_nested


def _warn_of_floats(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    kept: set[str],
    refused: Mapping[str, str],
) -> None:
    """Warns of weights that stay float unintentionally: not of those in ``kept``."""
    quantized = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    lines, count = [], 0
    for name, module in model.named_modules():
        weights = {
            key: p
            for key, p in module.named_parameters(recurse=False)
            if id(p) not in quantized and sum(size > 1 for size in p.shape) > 1
        }
        layer = f".{name}".partition(".parametrizations")[0][1:]
        if not weights or layer in kept or layer in layers:
            continue
        count += sum(p.numel() for p in weights.values())
        why = f", {refused[name]}" if name in refused else ""
        lines.append(f"{name or 'the model'} ({type(module).__name__}: {', '.join(weights)}{why})")
    if lines:
        share = count / sum(p.numel() for p in model.parameters())
        warnings.warn(
            f"weights that stay float, {share:.1%} of the parameters: {'; '.join(lines)}",
            stacklevel=3,
        )
