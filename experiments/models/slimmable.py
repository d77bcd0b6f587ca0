"""Networks that compute at several widths: with the first channels of each layer (Yu et al. 2018,
arXiv 1812.08928; Yu and Huang 2019, arXiv 1903.05134)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.resnet20 import BasicBlock
from noisyq_fast import QuantConv2d, Quantizer, QuantLayer, QuantLinear, register_layer
from noisyq_fast.conversion.first_last import by_execution
from noisyq_fast.integer.codes import Codes
from noisyq_fast.layers import usage
from noisyq_fast.running import in_evaluation
from noisyq_fast.widths import NormOfWidths


def divisible(count: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to a number of channels, or the next one where that is
    below 0.9 of it. As in the authors' code, 1 stands for the multiple 0."""
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

    def counts(self, count: int) -> set[int]:
        """All numbers of a layer's channels that there can be, or numbers that divide them."""
        known = {self.channels(count, width) for width in self.measured}
        return known if self.private else known | {min(count, self.divisor)}

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

    plan: Widths
    slims: bool
    """Whether its output has fewer channels at smaller widths: that of the network has not."""
    place: int
    active: int
    weight: Tensor
    bias: Any  # a tensor or None

    def set_width(self, width: float) -> None:
        self.place = self.plan.place(width)
        count = len(self.weight)
        self.active = self.plan.channels(count, width) if self.slims else count

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


class _QuantSlim(QuantLayer, _Slim):
    """Each width has an activation range of its own, but for what is learned where widths are not
    private: that is shared, like the scales and shifts of batch norms. Scales of weights are those
    of the part that is used, or the first ones of those that the quantizer keeps for each channel.
    """

    def set_quantizers_(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        super().set_quantizers_(weight, activation)
        own = self.input_quantizer
        learns = own is not None and any(True for _ in own.parameters())
        shared = learns and not self.plan.private
        others = [] if own is None or shared else [own] * (self.plan.places - 1)
        self.narrower = nn.ModuleList(quantizer.like() for quantizer in others)

    def check_granularity(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        super().check_granularity(weight, activation)
        size = None if weight is None else weight.group_size
        uneven = [n for n in self.plan.counts(self.weight.shape[1]) if size and n % size]
        if uneven:
            raise ValueError(
                f"weight_group_size: got {size}, which does not divide the {uneven[0]} input "
                "channels of a narrower width; takes a size that divides those of all widths"
            )

    def quantizers(self) -> dict[str, Quantizer]:
        narrower = enumerate(getattr(self, "narrower", ()))  # none yet while the layer is made
        return super().quantizers() | {f"narrower.{i}": quantizer for i, quantizer in narrower}

    @property
    def active_quantizer(self) -> Quantizer | None:
        """That of inputs at the width which is set."""
        if self.place == 0 or len(self.narrower) == 0:
            return self.input_quantizer
        return cast("Quantizer", self.narrower[self.place - 1])  # or what stands for it in a graph

    def statistics(self) -> list[nn.Module]:
        quantizer = self.active_quantizer
        return [] if quantizer is None else [quantizer]

    def keeps_channels(self) -> bool:
        """Whether the quantizer of the weight has numbers of its own for each output channel."""
        quantizer = self.weight_quantizer
        if quantizer is None or quantizer.axis != 0:
            return False
        return any(True for _ in itertools.chain(quantizer.parameters(), quantizer.buffers()))

    def forward(self, x: Tensor) -> Tensor:
        usage.called(self)
        if self.computes_in_integers():
            return self.compute_integers(x)
        x = self.quantized_input(x)
        weight, bias = self.used(x)
        if self.keeps_channels():
            weight = self.quantized_weight(self.weight[:, : x.shape[1]])[: self.active]
        else:
            weight = self.quantized_weight(weight)
        return self.compute(x, weight, bias)

    def quantized_input(self, x: Tensor) -> Tensor:
        quantizer = self.active_quantizer
        return x if quantizer is None else quantizer(x)

    def coded(self, x: Tensor) -> tuple[Codes, Codes, Tensor | None]:
        weight, bias = self.used(x)
        if self.keeps_channels():
            codes = _first_channels(self.weight_codes(self.weight[:, : x.shape[1]]), self.active)
        else:
            codes = self.weight_codes(weight)
        quantizer = self.active_quantizer
        assert quantizer is not None  # or it would compute in floats
        return quantizer.codes(x), codes, bias


def _first_channels(codes: Codes, count: int) -> Codes:
    names = ("codes", "scale", "zero_point", "source")
    parts = {name: getattr(codes, name) for name in names}
    first: dict[str, Any] = {k: x if x is None else x[:count] for k, x in parts.items()}
    return replace(codes, **first)


class QuantSlimConv2d(_QuantSlim, QuantConv2d, SlimConv2d):
    pass


class QuantSlimLinear(_QuantSlim, QuantLinear, SlimLinear):
    pass


register_layer(SlimConv2d, QuantSlimConv2d)
register_layer(SlimLinear, QuantSlimLinear)


class SlimNorm(NormOfWidths):
    """Batch norm with running statistics of its own for each width, and with a scale and shift of
    its own for each or the first part of shared ones."""

    def __init__(self, norm: nn.BatchNorm1d | nn.BatchNorm2d, widths: Widths) -> None:
        super().__init__()
        self.weight: nn.Parameter | None
        self.bias: nn.Parameter | None
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
        self.tell_layer()

    def norms(self) -> list[nn.Module]:
        return list(self.of_widths)

    @property
    def active(self) -> nn.Module:
        return self.of_widths[self.place]

    def statistics(self) -> list[nn.Module]:
        return [self.active]

    def forward(self, x: Tensor) -> Tensor:
        norm = self.active
        if not (self.training or norm.track_running_stats):
            known = ", ".join(f"{width:g}" for width in self.widths.measured)
            raise RuntimeError(
                f"width: got {self.width:g} in evaluation mode, whose statistics were not "
                f"measured; takes one of {known}"
            )
        if self.weight is None or self.bias is None:
            return norm(x)
        both = self.weight[: x.shape[1]], self.bias[: x.shape[1]]
        weight, bias = (part.view(-1, *[1] * (x.ndim - 2)) for part in both)
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


class FirstChannelsBlock(BasicBlock):
    """Along the shortcut channel i stays channel i, so that the first ones are the same at every
    width; in ResNet-20 they go to the middle. At width 1 this is another order of channels."""

    def shortcut(self, x: Tensor) -> Tensor:
        if self.new_channels == 0:
            return x
        new = self.output_channels - x.shape[1]
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, new))

    @property
    def output_channels(self) -> int:
        return self.conv2.out_channels


class SlimBasicBlock(FirstChannelsBlock):
    @property
    def output_channels(self) -> int:
        assert isinstance(self.conv2, _Slim)
        return self.conv2.active


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
            layer.plan, layer.slims = plan, name not in last
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
    return [
        m
        for module in found
        if isinstance(module, _QuantSlim | SlimNorm)
        for m in module.statistics()
    ]
