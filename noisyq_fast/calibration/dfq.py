"""Data-free quantization (Nagel et al. 2019, arXiv 1906.04721): equalised channel ranges, and
biases that correct the mean error of quantized weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from noisyq_fast.calibration.folding import (
    Linear,
    Normal,
    changeable,
    replace_module_,
    with_bias_,
)
from noisyq_fast.calibration.post_training import LinearLayer, PostTraining, in_float32, shown
from noisyq_fast.calibration.tracing import Step, Value
from noisyq_fast.calibration.typical import RELU, Typical, typical_inputs
from noisyq_fast.layers.layer import DEFAULT_BITS
from noisyq_fast.quantizers import AbsMax

_SWEEPS = 1000
# Functions f with f(c x) = c f(x) for a positive factor c of a channel.
_ELEMENTWISE = (*RELU, F.dropout, F.dropout2d, Tensor.contiguous)
_POOLS = {
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), 2),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d), 3),
}
"""With the number of axes, counted from the last, that they pool."""
_MEANS = (torch.mean, Tensor.mean)
_RESHAPES = (torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape)


@in_float32
def dfq(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    correct: bool = True,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Quantizes a float network without data, with one scale for all weights of a layer.

    1. Batch norms are folded into the layers before them, and ReLU6 become ReLU.
    2. *Equalisation*: for two layers in sequence, also with a ReLU between them, if nothing else
       reads the output of the first: the weights of channel ``i`` of the first are divided, and
       those of the second multiplied, by ``s_i = sqrt(r1_i / r2_i)``, with ``r`` the largest weight
       of the channel in each layer. The network computes the same, and both have the same range.
       Repeated over all pairs until nothing changes.
    3. *Absorption*: if a channel normally exceeds ``c = beta - 3 |gamma| > 0`` (from its batch
       norm), its bias is reduced by ``c``, and the bias of the second layer compensates, except for
       rare values and at borders padded with zeros.
    4. Input ranges are ``beta +- 6 |gamma|``, after a ReLU from 0. In an addition of branches,
    means
       and variances are added.
    5. *Correction*: the mean output error due to quantized weights, for the mean input that the
       batch norm gives, is subtracted from the bias.

    An input without a batch norm before it, such as the network's own, gets its range from
    ``inputs``, and no correction.

    Args:
        model: a float network; it is not changed.
        inputs: as for `calibrate`. One is enough: it shows how layers are connected, and the range
            of the network's own input.
        correct: whether to do step 5, which can reduce accuracy if channels have different ranges
            and cannot be equalised.
        progress: whether to show a progress bar; ``None``: if stderr is a terminal.
        **options: of `quantize_model_`, except those of grids and quantizers of weights.

    Returns:
        A quantized copy, in evaluation mode.

    Raises:
        TypeError, ValueError: as for `easyquant`.

    Example:
        >>> import torch, noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> noisyq_fast.dfq(model, [torch.randn(1, 8)], weight_bits=6, first_last_bits=None)[2]
        QuantLinear(in_features=8, out_features=2, bias=True, W6/A4)
    """
    weight = AbsMax(options.get("weight_bits", DEFAULT_BITS), axis=None)
    both = PostTraining(model, inputs, options, weight, change_=_equalize_and_absorb_)
    typical = typical_inputs(both.trace, both.normal)
    for layer in shown(both.layers(), "dfq", progress):
        if both.trace.once(layer.name) and (known := typical.get(layer.name)):
            _set_range(layer, known)
            if correct:
                _correct_(layer, known)
    return both.quantized


def _equalize_and_absorb_(both: PostTraining) -> None:
    for module in list(both.float.modules()):
        if isinstance(module, nn.ReLU6):
            replace_module_(both.float, module, nn.ReLU())
    layers, found = changeable(both.float, both.trace), pairs(both)
    equalize_([(layers[a], layers[b], both.normal.get(a)) for a, b in found])
    for first, second in found:
        if first in both.normal:
            absorb_(layers[first], layers[second], both.normal[first])


# Pairs of layers.


def pairs(both: PostTraining) -> list[tuple[str, str]]:
    """Names of two layers in sequence: only the second reads the output of the first, also after a
    ReLU."""
    layers = changeable(both.float, both.trace)
    found = []
    for step in both.trace.of_layers():
        name = step.layer_name
        second = _after(both, step) if name in layers else None
        if second is None or second not in layers or not both.trace.once(name):
            continue
        if both.trace.once(second) and _inputs_of(layers[second]) == len(layers[name].weight):
            found.append((name, second))
    return found


def _after(both: PostTraining, step: Step) -> str | None:
    """The only layer that reads the output channels of a layer, directly or through functions that
    keep channels and positive factors; None if there is none."""
    layers = both.trace.layers
    axis = _channel_axis(layers[step.layer_name], step.outputs[0])
    folded = step.layer in both.normal
    while (following := both.trace.only_reader(step.outputs[0])) is not None:
        layer = None if following.layer is None else layers[following.layer]
        if layer is None and not _keeps_channels(following, axis):
            return None
        if layer is not None and not (folded or isinstance(layer, nn.ReLU6)):
            reads = _channel_axis(layer, step.outputs[0])
            return following.layer if reads == axis else None
        step, folded = following, False
    return None


def _channel_axis(layer: nn.Module, value: Value) -> int:
    """The channel axis of an input or output of a layer."""
    return len(value.shape) - 1 - len(getattr(layer, "kernel_size", ()))


def _keeps_channels(step: Step, axis: int) -> bool:
    """Whether a function computes each channel from itself only, and keeps positive factors."""
    x, y = step.inputs[0], step.outputs[0]
    if step.function in _POOLS:
        return axis == len(x.shape) - 1 - _POOLS[step.function]
    if step.function in _MEANS:
        over: Any = step.kwargs.get("dim", step.args[1] if len(step.args) > 1 else None)
        over = [over] if isinstance(over, int) else over
        return bool(over) and all(d % len(x.shape) > axis for d in over)
    if step.function in _RESHAPES:
        return x.shape[: axis + 1] == y.shape[: axis + 1]
    return step.function in _ELEMENTWISE


def _inputs_of(layer: Linear) -> int:
    return layer.weight.shape[1] * getattr(layer, "groups", 1)


def _by_input(layer: Linear) -> Tensor:
    """A view of the weight as ``[groups, inputs, outputs, ...]``."""
    return layer.weight.data.unflatten(0, (getattr(layer, "groups", 1), -1)).transpose(1, 2)


def _along(values: Tensor, dimensions: int) -> Tensor:
    """Values of channels, with trailing dimensions of size 1."""
    return values.view(*values.shape, *[1] * (dimensions - values.dim()))


# Equalisation and absorption.

Pair = tuple[Linear, Linear, Normal | None]
"""Two layers, and mean and deviation of the first one's output if its batch norm was folded."""


def equalize_(found: list[Pair]) -> int:
    """Equalises pairs of layers in turn until nothing changes; returns the number of sweeps."""
    for sweep in range(1, _SWEEPS + 1):
        largest = 0.0
        for first, second, normal in found:
            factor = equalize_pair_(first, second, normal)
            largest = max(largest, float((factor - 1).abs().max()))
        if not found or largest <= 16 * torch.finfo(factor.dtype).eps:
            return sweep
    return _SWEEPS


def equalize_pair_(first: Linear, second: Linear, normal: Normal | None = None) -> Tensor:
    """Divides the output channels of a layer and multiplies the input channels of the next, so that
    both have the same largest weight; returns the divisors: 1 for channels without weights."""
    weight, reads = first.weight.data, _by_input(second)
    groups, inputs = reads.shape[:2]
    r1 = weight.flatten(1).abs().amax(1)
    r2 = reads.flatten(2).abs().amax(2).flatten()
    alive = (r1 > 0) & (r2 > 0)
    factor = torch.where(alive, (r1 / torch.where(alive, r2, 1.0)).sqrt(), 1.0)
    weight.div_(_along(factor, weight.dim()))
    reads.mul_(_along(factor.view(groups, inputs), reads.dim()))
    if first.bias is not None:
        first.bias.data.div_(factor)
    if normal is not None:
        normal.mean.div_(factor)
        normal.std.div_(factor)
    return factor


def absorb_(first: Linear, second: Linear, normal: Normal) -> Tensor:
    """Moves the part of a channel that is normally exceeded into the bias of the next layer;
    returns these amounts."""
    surplus = (normal.mean - 3 * normal.std).clamp(min=0)
    with_bias_(first).sub_(surplus)
    with_bias_(second).add_(through(second, second.weight.data, surplus))
    normal.mean.sub_(surplus)
    return surplus


def through(layer: nn.Module, weight: Tensor, channels: Tensor) -> Tensor:
    """The output of a layer with this weight for an input that is constant in each channel."""
    groups = getattr(layer, "groups", 1)
    taps = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    inputs = channels.view(groups, -1, 1)
    return (taps.unflatten(0, (groups, -1)) @ inputs).flatten()


# Ranges and correction.


def _set_range(layer: LinearLayer, known: Typical) -> None:
    quantizer = layer.quantized.input_quantizer
    if quantizer is not None and quantizer.keeps_range:
        quantizer.set_bounds(*quantizer.bounds(known.low.min().view(1), known.high.max().view(1)))


def _correct_(layer: LinearLayer, known: Typical) -> None:
    quantized = layer.quantized
    (weight,) = quantized.weights()
    error = quantized.quantized_weight() - weight
    with_bias_(quantized).sub_(through(quantized, error, known.mean))
