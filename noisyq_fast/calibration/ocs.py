"""Outlier channel splitting (Zhao et al. 2019, arXiv 1901.09504): each channel with the largest
values becomes two channels of half the size."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from noisyq_fast.calibration.folding import replace_module_
from noisyq_fast.calibration.input_ranges import calibrate
from noisyq_fast.calibration.post_training import LinearLayer, PostTraining, in_float32, shown
from noisyq_fast.conversion.first_last import by_execution
from noisyq_fast.grid import FULL, SIGNED
from noisyq_fast.quantizers import Quantizer
from noisyq_fast.running import arguments


@in_float32
def ocs(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    ratio: float = 0.02,
    activation_ratio: float = 0.0,
    progress: bool | None = None,
    **options: Any,
) -> nn.Module:
    """Quantizes a float network after splitting the input channels with the largest weights, or
    with the largest values, so that the common scale is finer. The network computes the same
    function.

    In a layer with ``I`` input channels, ``ceil(ratio I)`` times, the channel with the largest
    weight is duplicated, with weights ``(w - s / 2) / 2`` and ``(w + s / 2) / 2``, whose codes add
    up to the code of ``w`` (0 stays 0). ``s`` is the scale after splitting into equal halves, one
    for all weights of a layer. With an ``activation_ratio``, input channels are first split by
    their largest value into ``(x - s / 2) / 2`` and ``(x + s / 2) / 2`` with the same weights, or
    into equal halves on a grid without values below 0.

    Batch norms are folded into the layers before them. Linear layers and convolutions with one
    group are split, except those that read the model's input; other layers have the weights of
    `quantize_model_`. Input ranges are from `calibrate` on the float network. The network grows:
    `summary` shows by how much.

    Args:
        model: a float network; it is not changed.
        inputs: as for `calibrate`; all are kept in memory.
        ratio: share of the input channels to split by their weights, 0..1.
        activation_ratio: share of the input channels to split by their values, 0..1.
        progress: whether to show a progress bar; ``None``: if stderr is a terminal.
        **options: of `quantize_model_`, except those of grids and quantizers of weights.

    Returns:
        A quantized copy, in evaluation mode. A split layer becomes two modules in sequence: the
        first splits the channels, the second is the layer, such as ``conv.1``.

    Raises:
        TypeError, ValueError: as for `easyquant`, and for ratios out of range.

    Example:
        >>> import torch, noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> noisyq_fast.ocs(model, [torch.randn(50, 8)], ratio=0.2)[2]
        Sequential(
          (0): SplitChannels(8 -> 10)
          (1): QuantLinear(in_features=10, out_features=2, bias=True, W8/A8)
        )
    """
    for name, share in (("ratio", ratio), ("activation_ratio", activation_ratio)):
        if isinstance(share, bool) or not isinstance(share, int | float):
            raise TypeError(f"{name}: got {type(share).__name__}, takes a float")
        if not 0 <= share <= 1:
            raise ValueError(f"{name}: got {share}, takes 0..1")
    both = PostTraining(model, inputs, options)
    layers = both.layers()
    first = by_execution(both.float, both.converted(), both.batches[0]).first
    layers = [x for x in layers if x.groups == 1 and x.name not in first]
    largest = _largest_inputs(both, layers) if activation_ratio else {}
    for layer in shown(layers, "ocs", progress):
        _split_(layer, ratio, activation_ratio, largest.get(layer.name))
    calibrate(both.quantized, both.batches)
    return both.quantized


class SplitChannels(nn.Module):
    """Duplicates channels for the split layer after it.

    Args:
        sources: int64 ``[outputs]``, the input channel that each output channel copies.
        factor, shift: float32 ``[outputs]``: all values but 0 become ``x * factor + shift``;
            ``None``: they are copied.

    Attributes:
        dim: the dimension of the channels, negative.
    """

    dim: int = -1
    sources: Tensor
    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, sources: Tensor, factor: Tensor | None, shift: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("sources", sources)
        self.register_buffer("factor", factor)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        x = x.index_select(self.dim, self.sources)
        if self.factor is None or self.shift is None:
            return x
        shape = [-1] + [1] * (-1 - self.dim)
        split = x * self.factor.view(shape) + self.shift.view(shape)
        return torch.where(x == 0, x, split)

    def extra_repr(self) -> str:
        return f"{int(self.sources.max()) + 1} -> {len(self.sources)}"


def split_weight(weight: Tensor, count: int, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """Splits the input channel with the largest weight, ``count`` times.

    Args:
        weight: ``[outputs, inputs, ...]``.
        scale: the scale of the codes, or 0 for equal halves.

    Returns:
        The weight ``[outputs, inputs + count, ...]``, and the original input channel of each of its
        input channels.
    """
    sources = list(range(weight.shape[1]))
    for _ in range(count):
        largest = int(weight.abs().transpose(0, 1).flatten(1).amax(1).argmax())
        whole = weight[:, largest]
        low, high = (
            torch.where(whole == 0, whole, (whole + sign * scale / 2) / 2) for sign in (-1, 1)
        )
        weight = torch.cat([weight, high.unsqueeze(1)], 1)
        weight[:, largest] = low
        sources.append(sources[largest])
    return weight, torch.tensor(sources, device=weight.device)


def split_for(weight: Tensor, count: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The split weight, its sources, and the one scale of all weights."""
    halves, _ = split_weight(weight, count, 0)
    scale = halves.abs().max() / ((1 << bits - 1) - 1)
    scale = torch.where(scale > 0, scale, 1.0)
    return *split_weight(weight, count, scale), scale


def split_inputs(largest: Tensor, count: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Splits the input channel with the largest values, ``count`` times.

    Args:
        largest: ``[inputs]``, the largest magnitude of each channel.
        scale: the scale of the codes, or 0 for equal halves.

    Returns:
        ``sources``, ``factor`` and ``shift`` of `SplitChannels`.
    """
    largest = largest.clone()
    sources = list(range(len(largest)))
    factor, shift = torch.ones_like(largest), torch.zeros_like(largest)
    for _ in range(count):
        i = int(largest.argmax())
        largest[i] = (largest[i] + scale / 2) / 2
        factor[i] /= 2
        middle = shift[i] / 2
        shift[i] = middle - scale / 4
        sources.append(sources[i])
        largest = torch.cat([largest, largest[i : i + 1]])
        factor = torch.cat([factor, factor[i : i + 1]])
        shift = torch.cat([shift, (middle + scale / 4).view(1)])
    return torch.tensor(sources, device=largest.device), factor, shift


def _split_(layer: LinearLayer, ratio: float, by_values: float, largest: Tensor | None) -> None:
    """Splits the input channels of a layer of the quantized network by their values, if ``largest``
    is given, and then by its weights."""
    quantized, weight = layer.quantized, layer.float.weight.detach()
    channels = weight.shape[1]
    sources = torch.arange(channels, device=weight.device)
    factor: Tensor | None = None
    shift: Tensor | None = None
    if largest is not None:
        count = math.ceil(by_values * channels)
        of_codes = _input_scale(quantized.input_quantizer, largest, count)
        sources, factor, shift = split_inputs(largest, count, of_codes)
    count, bits = math.ceil(ratio * channels), layer.weight_quantizer.bits
    weight, of_weight, scale = split_for(weight[:, sources], count, bits)
    sources = sources[of_weight]
    layer.set_weight_scale(scale)
    if len(sources) == channels:
        return
    if factor is not None and shift is not None:
        factor, shift = factor[of_weight], shift[of_weight]
    split_inputs_(layer.both.quantized, quantized, SplitChannels(sources, factor, shift))
    (own,) = quantized.weights()
    own.data.copy_(weight)


def split_inputs_(model: nn.Module, layer: Any, split: SplitChannels) -> None:
    """Puts ``split`` before a layer of a model, and gives the layer a weight of zeros that fits."""
    count = len(split.sources)
    split.dim = -1 - len(getattr(layer, "kernel_size", ()))
    weight = layer.weight.new_zeros(len(layer.weight), count, *layer.weight.shape[2:])
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    setattr(layer, "in_features" if split.dim == -1 else "in_channels", count)
    replace_module_(model, layer, nn.Sequential(split, layer))


def _input_scale(quantizer: Quantizer | None, largest: Tensor, count: int) -> float:
    """The scale of inputs that are split into equal halves; 0 if the grid calls for equal
    halves."""
    if quantizer is None or quantizer.grid_kind not in (SIGNED, FULL):
        return 0.0
    sources, factor, _ = split_inputs(largest, count, 0.0)
    return float((largest[sources] * factor).max() / quantizer.grid.divisor)


def _largest_inputs(both: PostTraining, layers: list[LinearLayer]) -> dict[str, Tensor]:
    """By layer name, the largest magnitude of each input channel in the float network."""
    found: dict[str, Tensor] = {}

    def see(name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach().movedim(-1 - len(getattr(layer, "kernel_size", ())), 0)
        largest = x.flatten(1).abs().amax(1)
        found[name] = torch.maximum(found[name], largest) if name in found else largest

    hooks = [x.float.register_forward_pre_hook(functools.partial(see, x.name)) for x in layers]
    try:
        for batch in both.batches:
            args, kwargs = arguments(batch)
            both.float(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return found
