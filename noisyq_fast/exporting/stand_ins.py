"""Stand-ins for quantizers while a network is traced: constants, with few nodes each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from noisyq_fast import rules
from noisyq_fast.backends.reference.learned import codes_and_values
from noisyq_fast.backends.reference.levels import FLT_MIN, Levels
from noisyq_fast.backends.reference.sums import along_channels
from noisyq_fast.exporting.operators import dequantize_linear, quantize_linear
from noisyq_fast.grid import FULL, ODD, SIGNED, UNSIGNED, Grid, most_bits
from noisyq_fast.integer.codes import Codes
from noisyq_fast.operators.granularity import TOKEN, by_group
from noisyq_fast.operators.learned import quantize_learned
from noisyq_fast.quantizers import (
    AQD,
    DSQ,
    AbsMax,
    EvenlySpaced,
    Fixed,
    LearnedQuantizer,
    MovingAbsMax,
    Quantizer,
)
from noisyq_fast.rules import Rule
from noisyq_fast.widths import ManyWidths

_FLT_MAX = torch.finfo(torch.float32).max
See = Callable[[Tensor, int], None]
"""Called with the codes of a stand-in, and their offset from the quantizer's codes."""


def active(quantizer: Quantizer | None) -> Quantizer | None:
    """The quantizer that computes (the active one of `ManyWidths`), if any."""
    while isinstance(quantizer, ManyWidths) and quantizer.enabled:
        quantizer = quantizer.active
    return quantizer if quantizer is not None and quantizer.enabled else None


def learned_codes(quantizer: LearnedQuantizer, x: Tensor) -> Tensor:
    """Also of one whose codes have no scale, or do not fit into a byte."""
    rule = quantizer.rule, *quantizer.code_ends
    return quantize_learned(x, quantizer.stacked().detach(), *rule, quantizer.axis)


# Inputs.


def of_input(quantizer: Any, see: See, unsigned: bool) -> nn.Module | None:
    """The stand-in of a quantizer; None for one of another package, whose forward is traced.

    Args:
        see: is called with the codes.
        unsigned: whether codes are uint8, with 128 added to signed ones.

    Raises:
        ValueError: a quantizer without a range.
    """
    not_seen = "has no range yet; calibrate or train first, or load a checkpoint that has it"
    own = type(quantizer).fake_quantize
    if own in (LearnedQuantizer.fake_quantize, AQD.fake_quantize):
        if not quantizer.initialized:
            raise ValueError(not_seen)
        grid = _grid_of_learned(quantizer)
        if grid is None:
            return _RuleInput(quantizer, see)
        scale = quantizer.code_scale()
        levels = Levels(scale, torch.zeros_like(scale), grid)
        return _GridInput(levels, quantizer.axis, see, unsigned)
    is_dynamic = own is AbsMax.fake_quantize and quantizer.group_size is None
    is_fixed = own is Fixed.fake_quantize and not by_group(quantizer.axis, quantizer.group_size)
    if is_dynamic:
        return _DynamicInput(quantizer.grid, quantizer.axis, see, unsigned)
    if own is MovingAbsMax.fake_quantize:
        if not bool(quantizer.range.isfinite().all()):
            raise ValueError(not_seen)
        levels = Levels.of_range(quantizer.range, quantizer.grid)
    elif is_fixed:
        zero = quantizer.zero_point
        zero = torch.zeros_like(quantizer.scale) if zero is None else zero.float()
        levels = Levels(quantizer.scale, zero, quantizer.grid)
    else:
        return None
    return _GridInput(levels, quantizer.axis, see, unsigned)


def _grid_of_learned(quantizer: LearnedQuantizer) -> Grid | None:
    """The grid with the same codes for the same scale; None if there is none."""
    if quantizer.rule not in (rules.LSQ, rules.PACT, rules.SAT, rules.AQD, rules.AQD_ODD):
        return None
    kinds = (ODD,) if quantizer.rule == rules.AQD_ODD else (SIGNED, FULL, UNSIGNED)
    grids = [Grid(quantizer.bits, kind) for kind in kinds if quantizer.bits <= most_bits(kind)]
    return next((g for g in grids if (g.code_min, g.code_max) == quantizer.code_ends), None)


class _GridInput(nn.Module):
    """The stand-in for a grid with fixed scales."""

    scale: Tensor
    zero: Tensor
    zero_point: Tensor | None

    def __init__(self, levels: Levels | None, axis: Any, see: See, unsigned: bool) -> None:
        super().__init__()
        self.axis, self.see = axis, see
        self.ends: tuple[Any, Any] | None = None
        self.register_buffer("zero_point", None)
        if levels is not None:
            self._set_grid(levels.grid, unsigned)
            self.register_buffer("scale", levels.scale.detach().clone())
            self.register_buffer("zero", levels.zero.detach().clone())
            if self.dtype == torch.uint8:
                self.zero_point = self._zero_point(levels)
            low, high = self._ends(levels)
            self.ends = low.tolist(), high.tolist()

    def _set_grid(self, grid: Grid, unsigned: bool) -> None:
        self.grid = grid
        self.offset = 128 if unsigned and not grid.is_unsigned else 0
        self.dtype = torch.uint8 if unsigned or grid.is_unsigned else torch.int8
        least, most = grid.code_min + self.offset, grid.code_max + self.offset
        info = torch.iinfo(self.dtype)
        self.saturates = (least, most) == (info.min, info.max)

    def forward(self, x: Tensor) -> Tensor:
        levels = self.levels(x.float())
        if self.is_elementwise():
            steps = self._steps(x.float(), levels)
            self.see(self._codes_of(steps, levels, x), self.offset)
            return (steps * self._shaped(levels.scale, x)).to(x.dtype)
        codes, zero_point = self._codes(x.float(), levels), self._zero_point(levels)
        values = dequantize_linear(codes, levels.scale, zero_point, self.axis)
        return values.to(x.dtype)

    def codes(self, x: Tensor) -> Codes:
        levels = self.levels(x.float())
        if self.is_elementwise():
            codes = self._codes_of(self._steps(x.float(), levels), levels, x)
            self.see(codes, self.offset)
        else:
            codes = self._codes(x.float(), levels)
        zero_point = codes.new_full([], self.offset)
        if self.grid.is_affine:
            of_levels = self._zero_point(levels)
            assert of_levels is not None
            zero_point = self.flat(of_levels)
        largest = max(-self.grid.code_min, self.grid.code_max)
        return Codes(codes, self.flat(levels.scale), zero_point, largest, x)

    def levels(self, x: Tensor) -> Levels:
        return Levels(self.scale, self.zero, self.grid)

    def _codes(self, x: Tensor, levels: Levels) -> Tensor:
        clipped, zero_point = self._clipped(x, levels), self._zero_point(levels)
        codes = quantize_linear(clipped, levels.scale, zero_point, self.axis)
        self.see(codes, self.offset)
        return codes

    def _codes_of(self, steps: Tensor, levels: Levels, x: Tensor) -> Tensor:
        codes = steps + self._shaped(levels.zero, x) if self.grid.is_affine else steps
        return (codes + float(self.offset)).to(self.dtype)

    def _steps(self, x: Tensor, levels: Levels) -> Tensor:
        return levels.clamped(x, None if self.axis is None else self.axis % x.dim())

    def _clipped(self, x: Tensor, levels: Levels) -> Tensor:
        """Clips ``x`` to the range of the grid if its codes do not fill the dtype. Rounding is
        monotone, so the codes are then in range."""
        if self.saturates:
            return x
        if levels.scale.dim() == 0 and self.ends is not None:
            return x.clamp(*self.ends)
        low, high = (self._shaped(end, x) for end in self._ends(levels))
        return x.maximum(low).minimum(high)

    def _ends(self, levels: Levels) -> tuple[Tensor, Tensor]:
        return levels.low * levels.scale, levels.high * levels.scale

    def is_elementwise(self) -> bool:
        """Whether ``QuantizeLinear`` cannot give these codes."""
        return self.grid.kind == ODD

    def _zero_point(self, levels: Levels) -> Tensor | None:
        if self.dtype == torch.int8 or self.zero_point is not None:
            return self.zero_point
        return (levels.zero + float(self.offset)).to(self.dtype)

    def _shaped(self, of_axis: Tensor, x: Tensor) -> Tensor:
        if self.axis is None:
            return of_axis
        axis = self.axis % x.dim()
        return of_axis.reshape([-1 if d == axis else 1 for d in range(x.dim())])

    def flat(self, value: Tensor) -> Tensor:
        return value


class _DynamicInput(_GridInput):
    """The stand-in for a grid with the dynamic range of the input."""

    def __init__(self, grid: Grid, axis: Any, see: See, unsigned: bool) -> None:
        super().__init__(None, axis, see, unsigned)
        self._set_grid(grid, unsigned)

    def levels(self, x: Tensor) -> Levels:
        if self.axis is None:
            axes = [*range(x.dim())]
        elif self.axis == TOKEN:
            axes = [x.dim() - 1]
        else:
            axes = [d for d in range(x.dim()) if d != self.axis % x.dim()]
        keeps = self.axis is not None
        if not self.grid.is_unsigned:
            return Levels.of_range(x.abs().amax(axes, keepdim=keeps), self.grid)
        high = x.amax(axes, keepdim=keeps).clamp(min=0)
        if not self.grid.is_affine:
            return Levels.of_range(high, self.grid)
        low = x.amin(axes, keepdim=keeps).clamp(max=0)
        scale = ((high - low) / float(self.grid.divisor)).clamp(min=FLT_MIN)
        return Levels(scale, (-low / scale).round(), self.grid)

    def is_elementwise(self) -> bool:
        return self.axis is not None or super().is_elementwise()

    def _steps(self, x: Tensor, levels: Levels) -> Tensor:
        return levels.clamped(x, None)  # scales have the axes of x

    def _shaped(self, of_axis: Tensor, x: Tensor) -> Tensor:
        return of_axis

    def flat(self, value: Tensor) -> Tensor:
        if self.axis is None or value.dim() == 0:
            return value
        return value.squeeze(-1) if self.axis == TOKEN else value.flatten()


class _RuleInput(nn.Module):
    """The stand-in for a learned quantizer without a grid, by its equations."""

    parameters_: Tensor
    scale: Tensor

    def __init__(self, quantizer: LearnedQuantizer, see: See) -> None:
        super().__init__()
        self.rule = Rule(quantizer.rule, *quantizer.code_ends)
        self.see = see
        self.register_buffer("parameters_", quantizer.stacked().detach().clone())
        self.gives_codes = quantizer.gives_codes
        if self.gives_codes:
            self.register_buffer("scale", quantizer.code_scale().detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        code, value = codes_and_values(x, self.parameters_, self.rule, None)
        self.see(code.to(torch.int16), 0)
        return value.to(x.dtype)

    def codes(self, x: Tensor) -> Codes:
        codes = codes_and_values(x, self.parameters_, self.rule, None)[0].to(torch.uint8)
        self.see(codes, 0)
        zero_point = torch.zeros_like(self.scale, dtype=torch.uint8)
        return Codes(codes, self.scale, zero_point, self.rule.high, x)

    def is_elementwise(self) -> bool:
        return True


def is_elementwise(made: Any) -> bool:
    """Whether the stand-in of an input does not end in ``DequantizeLinear``."""
    return isinstance(made, _GridInput | _RuleInput) and made.is_elementwise()


# Weights.


class Weight(nn.Module):
    """A quantized weight, as codes with its output channels first.

    Attributes:
        guarded: whether its values pass a ``Clip`` without effect. Without it, onnxruntime 1.32
            would quantize the other factor of a product, if that is not a ``DequantizeLinear``.
        bits: the bits of the type in the file, 4 or 8.
        largest: an upper bound of ``|code - zero_point|``.

    Raises:
        ValueError: a weight without codes that fit into a byte. The message says why.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    low: Tensor | None

    def __init__(self, quantizer: Quantizer, by_channel: Tensor, unsigned: bool) -> None:
        super().__init__()
        self.guarded = False
        codes, scale, zero_point, low = _weight_codes(quantizer, by_channel)
        least, most = code_ends(quantizer)
        self.largest = max(-least, most)
        self.bits = 4 if -8 <= least <= most <= (7 if least else 15) else 8
        self.offset = 1 << self.bits - 1 if unsigned and least < 0 else 0
        if self.offset:
            codes = (codes.to(torch.int16) + self.offset).to(torch.uint8)
        self.shape, self.dtype = list(codes.shape), by_channel.dtype
        group = quantizer.group_size
        # A group has consecutive elements of a row.
        self.block_size = None if group is None else group * codes[0, 0].numel()
        self.axis = None if scale.dim() == 0 else 1 if group else 0
        self.register_buffer("codes", codes.flatten(1) if group else codes.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero_point", zero_point)
        self.register_buffer("low", low)

    def forward(self) -> Tensor:
        y = dequantize_linear(self.codes, self.scale, self.zero_point, self.axis, self.block_size)
        y = y.reshape(self.shape) if self.block_size else y
        if self.guarded:
            y = y.clamp(-_FLT_MAX, _FLT_MAX)
        return (y if self.low is None else y + self.low).to(self.dtype)

    def in_product(self, in_shape: Tensor) -> Codes:
        """As `Codes` for integer products, in the shape of the layer's weight."""
        scale, zero_point = self.of_channels(), self.zero_point
        if zero_point is None:
            # Attention splits the zero points of a matrix; a convolution takes only one.
            shape = [len(self.codes)] if in_shape.dim() == 2 else []
            zero_point = torch.full(shape, self.offset, dtype=torch.uint8)
        return Codes(in_shape, scale, zero_point, self.largest, scale)

    def of_channels(self) -> Tensor:
        """The scale, one for each channel."""
        return self.scale.expand(len(self.codes))

    def equals(self, other: Weight) -> bool:
        pairs = zip(self._buffers.values(), other._buffers.values(), strict=True)
        return all(
            a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs
        )


class FloatWeight(nn.Module):
    """A quantized weight without codes."""

    values: Tensor
    guarded: bool = False

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.contiguous())

    def forward(self) -> Tensor:
        return self.values


def code_ends(quantizer: Quantizer | None) -> tuple[int, int]:
    """The smallest and the largest code."""
    one = active(quantizer)
    assert one is not None
    if isinstance(one, EvenlySpaced):
        return 0, one.largest
    ends = getattr(one, "code_ends", None)  # of those that are not just a grid
    return ends or (one.grid.code_min, one.grid.code_max)


def _weight_codes(
    quantizer: Quantizer, by_channel: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes, scale, zero point, and the offset that is added to the dequantized codes."""
    values = quantizer(by_channel).detach()
    if not bool(values.isfinite().all()):
        raise ValueError("got a weight with a NaN or an infinity")
    zero_point = low = None
    if quantizer.gives_codes:
        made = quantizer.codes(by_channel)
        codes, scale, zero_point = made.codes, made.scale, made.zero_point
    elif isinstance(quantizer, DSQ):
        codes = learned_codes(quantizer, by_channel).to(torch.uint8)
        scale, low = quantizer.code_step(), quantizer.low.detach().float()
    elif isinstance(quantizer, EvenlySpaced) and not quantizer.centered:
        codes, scale = quantizer.indices(by_channel), quantizer.step
        low = quantizer.offset.reshape([*scale.shape, *[1] * (codes.dim() - scale.dim())])
    else:
        raise ValueError(f"{quantizer} of its weight has no codes that fit into a byte")
    shape = [*scale.shape, *[1] * (codes.dim() - scale.dim())]
    steps, of_value = codes.float(), scale
    if quantizer.group_size:
        steps, shape = steps.reshape(*scale.shape, -1), [*scale.shape, 1]
    if zero_point is not None:
        steps = steps - zero_point.float().reshape(shape)
    of_codes = (steps * of_value.reshape(shape)).reshape(values.shape)
    of_codes = of_codes if low is None else of_codes + low
    if not torch.equal(of_codes.to(values.dtype), values):
        raise ValueError(f"{quantizer} of its weight gives other values than its codes")
    return codes, scale, zero_point, low


class Norm:
    """The evaluation-mode batch norm of a fused convolution: ``v * factor + term``."""

    def __init__(self, norm: Any, line: tuple[Tensor, Tensor] | None) -> None:
        self.norm, self.line = norm, line

    def of_sums(
        self, product: Tensor, sums: Tensor, scale: Tensor, bias: Tensor | None, bound: int
    ) -> Tensor:
        factor, term = self.line or self.norm._line(scale, bias, 1, None)[:2]
        return sums * along_channels(factor, sums) + along_channels(term, sums)
