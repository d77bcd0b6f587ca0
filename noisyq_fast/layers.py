"""Layers that compute with fake-quantized weights and inputs.

Weights have one scale per output channel, recomputed at every forward; inputs have one scale, the
batch's absmax in training and its moving average otherwise (arXiv 2303.11803, section 3.1).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from noisyq_fast import checks
from noisyq_fast.ops import fake_quantize, fake_quantize_ema, fake_quantize_many

DEFAULT_BITS = 4
DEFAULT_AVERAGING_CONSTANT = 0.01
PER_GROUP = "per-group"
INPUT_RANGES = (PER_GROUP, "shared")


def check_quantizer(
    weight_bits: int,
    activation_bits: int,
    averaging_constant: float,
    delayed: bool,
    ste: str,
    input_ranges: str = PER_GROUP,
) -> None:
    checks.integers(weight_bits=weight_bits, activation_bits=activation_bits)
    checks.width(weight_bits=weight_bits, activation_bits=activation_bits)
    checks.averaging_constant(averaging_constant)
    checks.boolean(delayed=delayed)
    checks.ste(ste)
    check_input_ranges(input_ranges)


def check_input_ranges(name: str) -> None:
    if name not in INPUT_RANGES:
        raise ValueError(f"input_ranges: got {name!r}, takes {' or '.join(INPUT_RANGES)}")


class QuantLayer(nn.Module):
    """What the layers share: the widths, and the range of the input.

    ``running_absmax`` is a float32 buffer, NaN until the first batch in training; `.half()` and
    the like leave it float32. It is one range, or one for each index of ``input_axis``.
    """

    weight: Tensor
    running_absmax: Tensor
    input_axis: int | None = None
    ready_weight: Tensor | None = None
    fake_quantize_input: Callable[..., Tensor] = staticmethod(fake_quantize_ema)

    def __init__(
        self,
        *args: Any,
        weight_bits: int = DEFAULT_BITS,
        activation_bits: int = DEFAULT_BITS,
        averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
        delayed: bool = False,
        ste: str = "identity",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)  # of the float layer
        self.set_quantizer_(weight_bits, activation_bits, averaging_constant, delayed, ste)

    def set_quantizer_(
        self,
        weight_bits: int = DEFAULT_BITS,
        activation_bits: int = DEFAULT_BITS,
        averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
        delayed: bool = False,
        ste: str = "identity",
    ) -> None:
        """Sets the widths, and a range of the input that has seen nothing yet."""
        check_quantizer(weight_bits, activation_bits, averaging_constant, delayed, ste)
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.averaging_constant = averaging_constant
        self.delayed = delayed
        self.ste = ste
        unseen = torch.full((), float("nan"), dtype=torch.float32, device=self.weight.device)
        self.register_buffer("running_absmax", unseen)

    def quantized_input(self, x: Tensor) -> Tensor:
        return self.fake_quantize_input(
            x,
            self.running_absmax,
            self.activation_bits,
            axis=self.input_axis,
            averaging_constant=self.averaging_constant,
            training=self.training,
            ste=self.ste,
            delayed=self.delayed,
        )

    def weight_by_channel(self) -> Tensor:
        """The weight, with one scale for each index of its first axis."""
        return self.weight

    def quantized_weight(self) -> Tensor:
        """The weight, from `QuantizeWeightsTogether` where that is at work."""
        if self.ready_weight is not None:
            return self.ready_weight
        return fake_quantize(self.weight_by_channel(), self.weight_bits, axis=0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, W{self.weight_bits}/A{self.activation_bits}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantLayer":
        range_before = self.running_absmax
        super()._apply(fn, recurse)
        if self.running_absmax.dtype != torch.float32:
            self.running_absmax = range_before.to(self.running_absmax.device)
        return self


class QuantConv2d(QuantLayer, nn.Conv2d):
    """`torch.nn.Conv2d` on fake-quantized weights and inputs.

    Args:
        *args, **kwargs: as for `torch.nn.Conv2d`.
        weight_bits: width of the weights, 2..8.
        activation_bits: width of the input, 2..8.
        averaging_constant: weight of a batch in the moving average of the input's absmax, 0..1.
        delayed, ste: as for `fake_quantize_ema`, for the input.

    Example:
        >>> import torch, noisyq_fast
        >>> conv = noisyq_fast.QuantConv2d(3, 16, kernel_size=3, weight_bits=4, activation_bits=8)
        >>> conv(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 6, 6])
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantLinear(QuantLayer, nn.Linear):
    """`torch.nn.Linear` on fake-quantized weights and inputs.

    Args:
        *args, **kwargs: as for `torch.nn.Linear`.
        weight_bits: width of the weights, 2..8.
        activation_bits: width of the input, 2..8.
        averaging_constant: weight of a batch in the moving average of the input's absmax, 0..1.
        delayed, ste: as for `fake_quantize_ema`, for the input.

    Example:
        >>> import torch, noisyq_fast
        >>> noisyq_fast.QuantLinear(64, 10, weight_bits=8, activation_bits=8)
        QuantLinear(in_features=64, out_features=10, bias=True, W8/A8)
    """

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.quantized_input(x), self.quantized_weight(), self.bias)


class QuantizeWeightsTogether:
    """Hooks of a model that quantize the weights of all its layers in one call, and so, on a GPU,
    in one launch, before each forward. A layer that is called by itself quantizes its own."""

    def __init__(self, model: nn.Module, layers: list[QuantLayer]) -> None:
        self.layers = layers
        model.register_forward_pre_hook(self.before)
        model.register_forward_hook(self.after, always_call=True)

    def before(self, *_: object) -> None:
        weights = fake_quantize_many(
            [layer.weight_by_channel() for layer in self.layers],
            [layer.weight_bits for layer in self.layers],
            axis=0,
        )
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.ready_weight = weight

    def after(self, *_: object) -> None:
        for layer in self.layers:
            layer.ready_weight = None
