"""Layers that compute with fake-quantized weights and inputs.

Weights have one scale per output channel, recomputed at every forward; inputs have one scale, the
batch's absmax in training and its moving average otherwise (arXiv 2303.11803, section 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from noisyq_fast.grid import SIGNED, check_bits, check_kind
from noisyq_fast.integer.codes import Codes
from noisyq_fast.integer.deferred import deferrable
from noisyq_fast.layers import usage
from noisyq_fast.layers.made import Made, can_be_watched
from noisyq_fast.operators import gradients
from noisyq_fast.operators.granularity import TOKEN, Axis, Groups, check_group_size
from noisyq_fast.quantizers import AbsMax, MovingAbsMax, Quantizer
from noisyq_fast.quantizers.moving_absmax import DEFAULT_AVERAGING_CONSTANT

DEFAULT_BITS = 4
FLOAT = "float"
INTEGER = "integer"
ARITHMETICS = FLOAT, INTEGER
PER_TENSOR = "tensor"


class QuantLayer(nn.Module):
    """The base class of quantized layers. A subclass has its float layer as the second base class
    and defines `compute`.

    Args:
        *args, **kwargs: as for the float layer.
        weight_bits: width of the weights, 2..8.
        activation_bits: width of the input, 2..8.
        averaging_constant: weight of a batch in the moving average of the input's absmax, 0..1.
        ste: as for `MovingAbsMax`.
        arithmetic: ``"float"`` multiplies fake-quantized floats; ``"integer"`` multiplies codes,
            exactly, and applies the scales to the sums (`noisyq_fast.integer.products`): the same
            bits on every backend and with every number of threads. If that is not possible, the
            layer computes in float, and `why_float` says why.
        weight: a quantizer to copy for the weight, instead of ``AbsMax(weight_bits, ...)``;
            ``None`` leaves the weight in float.
        activation: the same for the input, instead of ``MovingAbsMax(activation_bits, ...)``.
        weight_grid, activation_grid: ``"signed"``, ``"full"``, ``"unsigned"``, ``"affine"`` or
            ``"odd"``, as in `Grid`.
        weight_group_size: the number of consecutive input channels that share a scale, instead of
            one scale for each output channel; must divide the number of input channels.
        activation_granularity: ``"tensor"``: one range for the input. ``"token"``: one scale for
            each index of all axes but the last, computed at every call, in evaluation too; not for
            convolutions.
        device, dtype: of the parameters.

    Attributes:
        weight_quantizer, input_quantizer: a `Quantizer` or ``None``.
    """

    weight: Tensor
    bias: Any  # Tensor | None, as the float layer declares it
    _float_class: type[nn.Module]
    weight_quantizer: Quantizer | None
    input_quantizer: Quantizer | None
    arithmetic: str = FLOAT
    can_defer: bool = False
    """Whether `fuse_` can make it return a `Deferred`."""
    integer_axes: tuple[Axis, ...] = (None, TOKEN)
    """The axes of input scales with which it can compute in integers."""
    made_of_weights: dict[tuple[str, str], Made] | None = None
    """The cache of `freeze_weights_`: codes and values of the weights; ``None``: not frozen."""
    # `fuse_` sets these.
    defers: bool = False
    recomputes: bool = False  # computes its sums again in the backward
    norm: tuple[nn.Module, ...] = ()  # the batch norm after it; in a tuple: no submodule
    followed_by: str = ""

    def __init__(
        self,
        *args: Any,
        weight_bits: int = DEFAULT_BITS,
        activation_bits: int = DEFAULT_BITS,
        averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
        ste: str = "identity",
        weight: Quantizer | EllipsisType | None = ...,
        activation: Quantizer | EllipsisType | None = ...,
        weight_grid: str = SIGNED,
        weight_group_size: int | None = None,
        activation_grid: str = SIGNED,
        activation_granularity: str = PER_TENSOR,
        arithmetic: str = FLOAT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        check_arithmetic(arithmetic)
        super().__init__(*args, device=device, dtype=dtype, **kwargs)  # of the float layer
        self.arithmetic = arithmetic
        self.set_quantizers_(
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

    def set_quantizers_(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        """Gives the layer reset copies of quantizers."""
        self.check_granularity(weight, activation)
        device = next(self.parameters()).device
        if weight is not None:
            first = self.by_channel(self.weights()[0].detach())
            weight = weight.like().for_weight(first).to(device)
        if activation is not None:
            activation = activation.like().for_input().to(device)
        self.weight_quantizer, self.input_quantizer = weight, activation
        for quantizer in self.quantizers().values():
            quantizer.train(self.training)

    def check_granularity(self, weight: Quantizer | None, activation: Quantizer | None) -> None:
        if weight is not None and weight.axis == TOKEN:
            raise ValueError(
                f"weight: got {weight}; takes one scale, one for each output channel (axis=0) or a "
                "group_size: tokens are of activations"
            )
        if weight is not None and weight.group_size is not None:
            for w in self.weights():
                Groups(self.by_channel(w.detach()), weight.axis, weight.group_size)
        of_tokens = activation is not None and activation.axis == TOKEN
        if of_tokens and isinstance(self, _ConvNd):
            raise ValueError(
                f"activation: got one scale for each token for a {type(self).__name__}, whose "
                "input has its channels before its positions; takes one scale, "
                "activation_granularity='tensor'"
            )

    def quantizers(self) -> dict[str, Quantizer]:
        """The layer's quantizers by name."""
        return {k: m for k, m in self._modules.items() if isinstance(m, Quantizer)}

    def weights(self) -> list[Tensor]:
        """The weights that the weight quantizer quantizes."""
        return [self.weight]

    @property
    def weight_bits(self) -> int | None:
        return None if self.weight_quantizer is None else self.weight_quantizer.bits

    @property
    def activation_bits(self) -> int | None:
        return None if self.input_quantizer is None else self.input_quantizer.bits

    # The forward.

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # named as by PyTorch
        usage.called(self)
        if self.computes_in_integers():
            return self.compute_integers(input, *args, **kwargs)
        x, weight = self.quantized_input(input), self.quantized_weight()
        return self.compute(x, weight, self.bias, *args, **kwargs)

    def compute_integers(self, x: Tensor, *args: Any) -> Tensor:
        """The forward on codes: see `noisyq_fast.integer.products`."""
        raise NotImplementedError

    def why_float(self) -> str | None:
        """Why a layer with ``arithmetic="integer"`` computes in float; ``None`` if it does not."""
        if type(self).compute_integers is QuantLayer.compute_integers:
            return "has no product of codes"
        weight, input = self.weight_quantizer, self.input_quantizer
        for name, quantizer in (("weight", weight), ("input", input)):
            if quantizer is None or not quantizer.enabled:
                return f"its {name} is not quantized"
            if not quantizer.gives_codes:
                return f"{type(quantizer).__name__} of its {name} gives no codes"
            if quantizer.group_size is not None:
                return f"its {name} has a scale for each group, which does not leave the sum"
        assert weight is not None
        assert input is not None  # or the loop has returned
        if weight.axis not in (None, 0):
            return "its weight has scales that do not leave the sum"
        if input.axis not in self.integer_axes:
            return f"its input has scales for axis {input.axis!r}"
        return None

    def normalizes(self, output: Tensor) -> bool:
        """Whether the layer also computes the batch norm after it, because its sums cannot be
        deferred: its output is traced or transformed."""
        if any(isinstance(norm, nn.SyncBatchNorm) for norm in self.norm):
            return False  # a graph cannot reduce over ranks
        return self.defers and self.computes_in_integers() and not deferrable(output)

    def computes_in_integers(self) -> bool:
        return self.arithmetic == INTEGER and self.why_float() is None

    def weight_codes(self, weight: Tensor | None = None) -> Codes:
        """The layer's current weight, or another of its shape, as codes of that shape."""
        weight = self.weight if weight is None else weight
        return self._made_once("codes", self._weight_codes, weight)

    def _weight_codes(self, weight: Tensor) -> Codes:
        if not gradients.wanted():
            weight = weight.detach()
        by_channel = self.by_channel(weight)
        quantizer = self.weight_quantizer
        assert quantizer is not None  # see `why_float`
        made = quantizer.codes(by_channel)
        if by_channel is weight and made.scale.dim() > 0:
            return made
        scale, zero_point = (
            x.expand(len(by_channel)).contiguous() if x is not None and x.dim() == 0 else x
            for x in (made.scale, made.zero_point)
        )
        assert scale is not None
        source = weight if made.source is by_channel else self.from_channels(made.source, weight)
        codes = self.from_channels(made.codes, weight)
        return replace(made, codes=codes, scale=scale, zero_point=zero_point, source=source)

    def input_codes(self, x: Tensor) -> Codes:
        """The layer's input as codes."""
        quantizer = self.input_quantizer
        assert quantizer is not None  # see `why_float`
        return quantizer.codes(x)

    def coded(self, x: Tensor) -> tuple[Codes, Codes, Tensor | None]:
        """The input as codes, the weight as codes, and the bias."""
        return self.input_codes(x), self.weight_codes(), self.bias

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        """The arithmetic of the float layer; ``args`` are the further arguments of its forward."""
        raise NotImplementedError

    def quantized_input(self, x: Tensor) -> Tensor:
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def quantized_weight(self, weight: Tensor | None = None) -> Tensor:
        """The layer's current weight, or another of its shape, fake-quantized."""
        weight = self.weight if weight is None else weight
        if self.weight_quantizer is None:
            return weight
        return self._made_once("values", self._quantized_weight, weight)

    def _quantized_weight(self, weight: Tensor) -> Tensor:
        if not gradients.wanted():
            # Tools such as PyTorch's FLOP counter hook module inputs that require grad.
            weight = weight.detach()
        quantizer = self.weight_quantizer
        assert quantizer is not None  # see `quantized_weight`
        by_channel = quantizer(self.by_channel(weight))
        return self.from_channels(by_channel, weight)

    def _made_once(self, what: str, make: Callable[[Tensor], Any], weight: Tensor) -> Any:
        """``make(weight)``, or the cached result for a frozen weight."""
        if self.made_of_weights is None or torch.compiler.is_compiling():
            return make(weight)
        if gradients.wanted():
            self._forget_what_was_made()  # fused optimizers do not change the version of a tensor
            return make(weight)
        name = next((name for name, p in self._parameters.items() if p is weight), None)
        quantizer = self.weight_quantizer
        if name is None or type(weight) is not nn.Parameter:
            return make(weight)
        assert quantizer is not None  # nothing else makes anything of a weight
        if quantizer._modules:  # composed of several quantizers, whose state is not watched
            return make(weight)
        of = weight, *quantizer._parameters.values(), *quantizer._buffers.values()
        if not can_be_watched(of):
            return make(weight)
        options = quantizer, quantizer.grid, quantizer.enabled, quantizer.starts
        made = self.made_of_weights.get((name, what))
        if made is None or not made.is_of(of, options):
            made = self.made_of_weights[name, what] = Made(make(weight), of, options)
        return made.value

    def by_channel(self, weight: Tensor) -> Tensor:
        """The weight with the output channels first."""
        return weight

    def from_channels(self, by_channel: Tensor, weight: Tensor) -> Tensor:
        """Undoes `by_channel`, for a quantized weight laid out like ``weight``."""
        return by_channel

    # The state.

    def train(self, mode: bool = True) -> QuantLayer:
        if mode:
            vars(self).pop("made_of_weights", None)
        return super().train(mode)

    def _forget_what_was_made(self) -> None:
        if self.made_of_weights is not None:
            self.made_of_weights = {}

    def _apply(self, *args: Any, **kwargs: Any) -> QuantLayer:
        self._forget_what_was_made()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = vars(self).copy()
        if state.get("made_of_weights") is not None:
            state["made_of_weights"] = {}
        return state

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]  # of the float layer
        for quantizer in self.quantizers().values():  # none yet during the float layer's __init__
            quantizer.reset()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.widths()}"

    def widths(self) -> str:
        """Such as W4/A4 or W4 group 32/A8 affine token; F is float."""
        both = self.weight_quantizer, self.input_quantizer
        weight, activation = ("F" if q is None else q.width() for q in both)
        return f"W{weight}/A{activation}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"  # one line, without submodules

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        self._rename_old_range(state_dict, prefix)
        self._forget_what_was_made()
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _rename_old_range(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Version 0.1 kept the range in the layer, NaN before the first batch, and no bits."""
        value = state_dict.pop(f"{prefix}running_absmax", None)
        if value is None:
            return
        seen = ~value.isnan()
        new = f"{prefix}input_quantizer."
        state_dict[f"{new}running_absmax"] = torch.where(seen, value.float(), 0.0)
        state_dict[f"{new}observed"] = seen.float()
        for name, quantizer in self.quantizers().items():
            state_dict[f"{prefix}{name}._extra_state"] = quantizer.state_on_signed_grid()


def check_arithmetic(name: object) -> None:
    if name not in ARITHMETICS:
        raise ValueError(f"arithmetic: got {name!r}, takes {' or '.join(map(repr, ARITHMETICS))}")


def weight_quantizer(
    bits: int,
    chosen: Quantizer | EllipsisType | None = ...,
    grid: str = SIGNED,
    group_size: int | None = None,
) -> Quantizer | None:
    """The quantizer of weights for the options of a layer."""
    check_kind(grid, "weight_grid")
    check_bits(bits, grid, "weight_bits")
    check_group_size(group_size, "weight_group_size")
    if chosen is ...:
        return AbsMax(bits, grid=grid, group_size=group_size)
    return _quantizer("weight", chosen, weight_grid=grid, weight_group_size=group_size)


def input_quantizer(
    bits: int,
    averaging_constant: float,
    ste: str,
    chosen: Quantizer | EllipsisType | None = ...,
    grid: str = SIGNED,
    granularity: str = PER_TENSOR,
) -> Quantizer | None:
    """The quantizer for inputs that the options of a layer stand for."""
    check_kind(grid, "activation_grid")
    check_bits(bits, grid, "activation_bits")
    if granularity not in (PER_TENSOR, TOKEN):
        takes = f"takes {PER_TENSOR!r} or {TOKEN!r}"
        raise ValueError(f"activation_granularity: got {granularity!r}, {takes}")
    default = MovingAbsMax(bits, averaging_constant=averaging_constant, ste=ste, grid=grid)
    if chosen is not ...:
        options = {"activation_grid": grid, "activation_granularity": granularity}
        return _quantizer("activation", chosen, **options)
    return AbsMax(bits, TOKEN, grid) if granularity == TOKEN else default


def _quantizer(name: str, value: object, **options: object) -> Quantizer | None:
    """``value``, beside which ``options`` must be as they are by default."""
    for option, given in options.items():
        if isinstance(value, Quantizer) and given not in (SIGNED, PER_TENSOR, None):
            raise ValueError(
                f"{option}: got {given!r} beside {name}={value}, which has a grid and a "
                "granularity of its own; takes one of the two"
            )
    if value is not None and not isinstance(value, Quantizer):
        got = value.__name__ if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected a quantizer such as AbsMax(4), or None, got {got}")
    return value
