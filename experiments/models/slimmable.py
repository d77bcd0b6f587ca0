"""Networks that compute at several widths: with the first channels of each layer (Yu et al. 2018,
arXiv 1812.08928; Yu and Huang 2019, arXiv 1903.05134)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.resnet20 import BasicBlock
from noisyq_fast import Quantizer, QuantLayer, register_layer, usage
from noisyq_fast.first_last import by_execution
from noisyq_fast.running import in_evaluation


def divisible(count: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to a number of channels, or the next one where that is
    below 0.9 of it."""
    nearest = max(1, int(count + divisor / 2) // divisor * divisor)
    return nearest + divisor if nearest < 0.9 * count else nearest


@dataclass(frozen=True)
class Widths:
    """The widths of a network, as shares of its channels."""

    measured: tuple[float, ...]
    """Those with statistics of their own, from 1 down."""
    divisor: int
    """Channels come in multiples of it."""
    private: bool
    """Only these widths, each with batch norms of its own. Otherwise any width down to the least,
    and the scales and shifts of batch norms are shared."""

    def channels(self, count: int, width: float) -> int:
        """How many of a layer's channels there are."""
        return min(count, divisible(count * width, self.divisor))

    @property
    def places(self) -> int:
        """How many statistics a layer has: the last are of widths that are not measured, whose
        running ones nobody uses."""
        return len(self.measured) + (not self.private)

    def place(self, width: float) -> int:
        """Which statistics are those of a width."""
        if width in self.measured:
            return self.measured.index(width)
        least = self.measured[-1]
        if self.private or not least <= width <= 1:
            one_of = "one of " + ", ".join(f"{known:g}" for known in self.measured)
            takes = one_of if self.private else f"a number from {least:g} to 1"
            raise ValueError(f"width: got {width:g}, takes {takes}")
        return len(self.measured)


class _Slim(nn.Module):
    """A convolution or linear layer of which the first output channels are active, on as many
    input channels as come."""

    widths: Widths
    slims: bool
    """Whether its output has fewer channels at smaller widths: that of the network has not."""
    place: int
    active: int

    def set_width(self, width: float) -> None:
        self.place = self.widths.place(width)
        count = len(self.weight)
        self.active = self.widths.channels(count, width) if self.slims else count

    def used(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The parts of weight and bias that meet an input."""
        bias = None if self.bias is None else self.bias[: self.active]
        return self.weight[: self.active, : x.shape[1]], bias


class SlimConv2d(_Slim, nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.used(x))


class SlimLinear(_Slim, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.used(x))


class _QuantSlim(QuantLayer):
    """Each width has an activation range of its own; scales of weights are those of the part that
    is used."""

    def set_quantizers_(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        super().set_quantizers_(weight, activation)
        others = [] if activation is None else [activation] * (self.widths.places - 1)
        device = self.weight.device
        self.narrower = nn.ModuleList(quantizer.like().to(device) for quantizer in others)

    def quantized_input(self, x: Tensor) -> Tensor:
        if self.place == 0 or self.input_quantizer is None:
            return super().quantized_input(x)
        return self.narrower[self.place - 1](x)

    def statistics(self) -> list[nn.Module]:
        if self.input_quantizer is None:
            return []
        return [[self.input_quantizer, *self.narrower][self.place]]

    def forward(self, x: Tensor) -> Tensor:
        usage.called(self)
        x = self.quantized_input(x)
        weight, bias = self.used(x)
        return self.compute(x, self.quantized_weight(weight), bias)


class QuantSlimConv2d(_QuantSlim, SlimConv2d):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._conv_forward(x, weight, bias)


class QuantSlimLinear(_QuantSlim, SlimLinear):
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


register_layer(SlimConv2d, QuantSlimConv2d)
register_layer(SlimLinear, QuantSlimLinear)


class SlimNorm(nn.Module):
    """Batch norm with running statistics of its own for each width, and with a scale and shift of
    its own for each or the first part of shared ones."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, widths: Widths) -> None:
        super().__init__()
        self.widths = widths
        count = norm.num_features
        self.of_widths = nn.ModuleList(
            _first(norm, widths.channels(count, width), widths.private) for width in widths.measured
        )
        if not widths.private:
            self.of_widths.append(_first(norm, count, affine=False, track_running_stats=False))
        self.register_parameter("weight", None if widths.private else norm.weight)
        self.register_parameter("bias", None if widths.private else norm.bias)
        self.set_width(1)

    def set_width(self, width: float) -> None:
        self.width = width
        self.place = self.widths.place(width)

    def statistics(self) -> list[nn.Module]:
        return [self.of_widths[self.place]]

    def used(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of scale and shift that meet an input."""
        if self.weight is None:
            norm = self.of_widths[self.place]
            return norm.weight, norm.bias
        return self.weight[: x.shape[1]], self.bias[: x.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        norm = self.of_widths[self.place]
        if not (self.training or norm.track_running_stats):
            known = ", ".join(f"{width:g}" for width in self.widths.measured)
            raise RuntimeError(
                f"width: got {self.width:g} in evaluation mode, whose statistics were not "
                f"measured; takes one of {known}"
            )
        if self.weight is None:
            return norm(x)
        weight, bias = (part.view(-1, *[1] * (x.ndim - 2)) for part in self.used(x))
        return torch.addcmul(bias, norm(x), weight)


def _first(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, channels: int, affine: bool, **options: Any
) -> Any:
    """A copy of the first channels of a batch norm."""
    copy = type(norm)(channels, norm.eps, norm.momentum, affine, **options).to(norm.weight)
    whole = norm.state_dict()
    for name, part in copy.state_dict().items():
        part.copy_(whole[name][:channels] if part.ndim else whole[name])
    return copy


class SlimBasicBlock(BasicBlock):
    """Along the shortcut channel i stays channel i, so that the first ones are the same at every
    width; in ResNet-20 they go to the middle. At width 1 this is another order of channels."""

    def shortcut(self, x: Tensor) -> Tensor:
        if self.new_channels == 0:
            return x
        new = self.conv2.active - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, new))


_CLASSES = {nn.Conv2d: SlimConv2d, nn.Linear: SlimLinear, BasicBlock: SlimBasicBlock}


def make_slimmable_(
    model: nn.Module,
    widths: Sequence[float],
    example: Tensor,
    *,
    private: bool,
    divisor: int = 4,
) -> nn.Module:
    """Lets a network compute at several widths, in place; returns it, at width 1. Parameters of
    convolutions and linear layers stay the same objects.

    Args:
        model: of convolutions, linear layers and batch norms, such as `ResNet20`. The first sees
            the whole input and the last gives the whole output at every width.
        widths: those that have statistics of their own, 1 among them.
        example: an input batch.
        private, divisor: as in `Widths`.

    Raises:
        ValueError: a layer of another kind, or a network that does not run at the least width.
    """
    if not widths or max(widths) != 1 or min(widths) <= 0 or len(set(widths)) < len(widths):
        raise ValueError(
            f"widths: got {list(widths)}, takes different numbers above 0 up to 1, and 1 itself"
        )
    plan = Widths(tuple(sorted(widths, reverse=True)), divisor, private)
    layers = {
        name: module
        for name, module in model.named_modules()
        if next(module.children(), None) is None and next(module.parameters(), None) is not None
    }
    takes = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
    for name, layer in layers.items():
        tracks = getattr(layer, "track_running_stats", True)
        if type(layer) not in takes or getattr(layer, "groups", 1) != 1 or not tracks:
            raise ValueError(
                f"model: got {name}, {layer}; takes ungrouped convolutions of images, linear "
                "layers and batch norms with running statistics"
            )
    products = {n: layer for n, layer in layers.items() if isinstance(layer, takes[:2])}
    last = by_execution(model, products, example).last
    for name, layer in layers.items():
        if name in products:
            layer.widths, layer.slims = plan, name not in last
        else:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, SlimNorm(layer, plan))
    for module in model.modules():
        if type(module) in _CLASSES:
            module.__class__ = _CLASSES[type(module)]
    _check_runs(model, plan.measured[-1], example)
    set_width(model, 1)
    return model


def _check_runs(model: nn.Module, width: float, example: Tensor) -> None:
    set_width(model, width)
    try:
        with in_evaluation(model):
            model(example)
    except RuntimeError as error:
        raise ValueError(
            f"model: {type(model).__name__} does not run at width {width:g}: {error}"
        ) from error


def set_width(model: nn.Module, width: float) -> None:
    """Lets a network from `make_slimmable_` compute at a width, until it is set again. The width is
    an attribute of its layers: `nn.DataParallel` and threads share it.

    Raises:
        ValueError: a width that the network does not have, or a network of one width.
    """
    for module in slim_modules(model):
        module.set_width(width)


def slim_modules(model: nn.Module) -> list[_Slim | SlimNorm]:
    """The layers and batch norms whose channels depend on the width."""
    found = [module for module in model.modules() if isinstance(module, _Slim | SlimNorm)]
    if not found:
        raise ValueError(
            f"model: got {type(model).__name__}, which has one width; takes a network from "
            "make_slimmable_"
        )
    return found


def statistics(model: nn.Module) -> list[nn.Module]:
    """The batch norms and quantizers that are used at the width which is set."""
    found = slim_modules(model)
    return [m for module in found if hasattr(module, "statistics") for m in module.statistics()]


def parameters_used(model: nn.Module, example: Tensor) -> int:
    """How many parameters are used at the width which is set."""
    counts = []

    def count(module: nn.Module, args: tuple[Tensor]) -> None:
        counts.extend(part.numel() for part in module.used(args[0]) if part is not None)

    hooks = [module.register_forward_pre_hook(count) for module in slim_modules(model)]
    try:
        with in_evaluation(model):
            model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return sum(counts)
