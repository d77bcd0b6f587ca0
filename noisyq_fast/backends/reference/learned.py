"""The operators of learned quantizers, in plain PyTorch: the rules of `noisyq_fast.rules`."""

from collections.abc import Callable

import torch
from torch import Tensor

from noisyq_fast import rules
from noisyq_fast.backends.backend import Operators
from noisyq_fast.backends.reference import elementary
from noisyq_fast.backends.reference.levels import FLT_MIN
from noisyq_fast.rules import CHUNK, LANES, Rule

operators = Operators()


@operators.register
def fake_quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    levels = _levels(x, parameters, rule, axis)
    return torch.empty_like(x).copy_(levels.value(levels.code()))


@operators.register
def fake_quantize_learned_backward(
    grad: Tensor,
    x: Tensor,
    parameters: Tensor,
    rule: Rule,
    axis: int | None,
    gradient_scale: float,
) -> tuple[Tensor, Tensor]:
    by_x, *by_parameters = derivatives(x, parameters, rule, axis)
    grad = grad.float()
    dx = torch.empty_like(x).copy_(_product(grad, by_x))
    sums = [sum_of_groups(_product(grad, d), x, axis) for d in by_parameters]
    return dx, torch.stack(sums).reshape(parameters.shape) * gradient_scale


@operators.register
def quantize_learned(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> Tensor:
    code = _levels(x, parameters, rule, axis).code().nan_to_num(nan=0.0)
    return torch.empty_like(x, dtype=torch.int16).copy_(code)


def codes_and_values(
    x: Tensor, parameters: Tensor, rule: Rule, axis: int | None
) -> tuple[Tensor, Tensor]:
    """Both, in float32."""
    of_x = _levels(x, parameters, rule, axis)
    code = of_x.code()
    return code, of_x.value(code)


def derivatives(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> list[Tensor]:
    """dy/dx and dy/d each parameter, of each element."""
    return list(_levels(x, parameters, rule, axis).derivatives())


def sum_of_groups(terms: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """The sum of each group, in the order that `noisyq_fast.rules` states for the memory of
    ``torch.empty_like(like)``; ``[]`` or ``[channels]``."""
    terms = torch.empty_like(like, dtype=torch.float32).copy_(terms)
    order = sorted(range(terms.dim()), key=lambda d: -terms.stride()[d])
    if axis is not None:
        order = [axis, *(d for d in order if d != axis)]
    groups = 1 if axis is None else like.shape[axis]
    sums = terms.permute(order).reshape(groups, terms.numel() // max(groups, 1))
    while sums.shape[1] != 1:
        sums = _sums_of_chunks(sums)
    return sums.reshape([] if axis is None else [groups])


def _sums_of_chunks(values: Tensor) -> Tensor:
    """Sums of the chunks: ``[groups, values]`` to ``[groups, chunks]``, at least one chunk."""
    chunks = max(-(-values.shape[1] // CHUNK), 1)
    padded = values.new_zeros(values.shape[0], chunks * CHUNK)
    padded[:, : values.shape[1]] = values
    lanes = padded.new_zeros(values.shape[0], chunks, LANES)
    for row in padded.reshape(*lanes.shape[:2], LANES, LANES).unbind(2):
        lanes = lanes + row
    while lanes.shape[2] > 1:
        first, second = lanes.chunk(2, 2)
        lanes = first + second
    return lanes.squeeze(2)


def _product(grad: Tensor, derivative: Tensor) -> Tensor:
    """0 where the derivative is, even of a gradient that is not finite."""
    return torch.where(derivative == 0, 0.0, grad * derivative)


class _Levels:
    """A rule for values ``x``, float32, and parameters that broadcast with them."""

    prepare: Callable[..., None]
    """Stores values that the other methods derive from the parameters."""
    scale: Tensor

    def __init__(self, x: Tensor, parameters: list[Tensor], rule: Rule) -> None:
        self.x = x
        self.rule = rule
        self.n = x.new_full((), rule.high)  # a tensor: division by it is rounded on every device
        self.prepare(*parameters)

    def code(self) -> Tensor:
        raise NotImplementedError

    def value(self, code: Tensor) -> Tensor:
        return code * self.scale

    def derivatives(self) -> tuple[Tensor, ...]:
        """dy/dx and dy/d each parameter, of each element."""
        raise NotImplementedError


class _LSQ(_Levels):
    def prepare(self, step: Tensor) -> None:
        self.scale = _least(step)
        self.steps = self.x / self.scale

    def code(self) -> Tensor:
        return self.steps.clamp(self.rule.low, self.rule.high).round()

    def derivatives(self) -> tuple[Tensor, ...]:
        v, low, high = self.steps, float(self.rule.low), float(self.rule.high)
        below, above = v <= low, v >= high
        inside = torch.where(above, high, v.round() - v)
        return _one_inside(below | above), torch.where(below, low, inside)


class _Clip(_Levels):
    """PACT, SAT and AQD."""

    def prepare(self, clip: Tensor) -> None:
        self.clip = clip
        self.scale = _least(clip / self.n)
        self.steps = self.x / self.scale

    def code(self) -> Tensor:
        if self.rule.name != rules.AQD_ODD:
            return self.steps.clamp(0, self.rule.high).round()
        n = self.rule.high
        return ((self.steps.clamp(-n, n) + n) * 0.5).round() * 2.0 - n

    def derivatives(self) -> tuple[Tensor, ...]:
        name, x = self.rule.name, self.x
        is_odd = name == rules.AQD_ODD
        below = x < -self.clip if is_odd else x < 0
        above = x > self.clip if name in (rules.AQD, rules.AQD_ODD) else x >= self.clip
        inside = (self.code() - self.steps) / self.n
        if name == rules.PACT:
            inside = torch.zeros_like(inside)
        inside = torch.where(below, -1.0 if is_odd else 0.0, inside)
        return _one_inside(below | above), torch.where(above, 1.0, inside)


class _QIL(_Levels):
    def prepare(self, center: Tensor, width: Tensor, exponent: Tensor | None = None) -> None:
        self.width, self.exponent = width, exponent
        self.scale = 1.0 / self.n
        self.sign = torch.ones_like(self.x) if exponent is None else self.x.sign()
        self.distance = (self.x if exponent is None else self.x.abs()) - center
        self.whole = _least(2.0 * width)
        self.v = self.distance / self.whole + 0.5

    def power(self) -> Tensor:
        """clip(v, 0, 1)^g"""
        clipped = self.v.clamp(0, 1)
        if self.exponent is None:
            return clipped
        ends = (clipped <= 0) | (clipped >= 1) | (self.exponent == 1)
        return torch.where(ends, clipped, elementary.exp(self.exponent * self.log()))

    def log(self) -> Tensor:
        """ln v inside the interval."""
        return elementary.log(torch.where((self.v <= 0) | (self.v >= 1), 0.5, self.v))

    def code(self) -> Tensor:
        return (self.power() * self.n).round() * self.sign

    def derivatives(self) -> tuple[Tensor, ...]:
        slope = 1.0 / self.whole
        power = self.power()
        if self.exponent is not None:
            slope = self.exponent * (power / self.v) * slope
        by_center = -(self.sign * slope)
        by_width = by_center * (self.distance / self.width)
        found = [slope.expand_as(self.v), by_center, by_width]
        if self.exponent is not None:
            found.append(self.sign * power * self.log())
        outside = (self.v <= 0) | (self.v >= 1)
        return tuple(d.masked_fill(outside, 0.0) for d in found)


class _DSQ(_Levels):
    def prepare(self, low: Tensor, high: Tensor, alpha: Tensor) -> None:
        self.low, self.high, self.alpha = low, high, alpha
        self.scale = _least((high - low) / self.n)
        clipped = torch.minimum(torch.maximum(self.x, low), high)
        self.steps = (clipped - low) / self.scale
        self.cell = self.steps.floor().clamp(max=self.rule.high - 1)
        self.place = (self.steps - self.cell) - 0.5

    def code(self) -> Tensor:
        return self.cell + (self.place >= 0).float()

    def value(self, code: Tensor) -> Tensor:
        return code * self.scale + self.low

    def derivatives(self) -> tuple[Tensor, ...]:
        alpha, place = self.alpha, self.place
        k = elementary.log(2.0 / alpha - 1.0)
        z = 1.0 / (1.0 - alpha)
        t = elementary.tanh(k * place)
        bump = 1.0 - t * t
        slope = z * k * 0.5 * bump
        share, code = self.steps / self.n, self.code() / self.n
        by_low = (1.0 - code) + slope * (share - 1.0)
        by_high = code - slope * share
        turn = 2.0 / (alpha * (2.0 - alpha))
        by_alpha = self.scale * 0.5 * (z * z * t - z * bump * (place * turn))
        below, above = self.x < self.low, self.x > self.high
        outside = below | above
        return (
            slope.masked_fill(outside, 0.0),
            torch.where(above, 0.0, torch.where(below, 1.0, by_low)),
            torch.where(below, 0.0, torch.where(above, 1.0, by_high)),
            by_alpha.masked_fill(outside, 0.0),
        )


class _DoReFa(_Levels):
    def prepare(self, absmax: Tensor, factor: Tensor) -> None:
        self.factor = factor
        self.most = _least(elementary.tanh(absmax))
        self.tanh = elementary.tanh(self.x)
        self.t = self.tanh / self.most
        denominators = {
            rules.DOREFA_ORIGINAL: self.rule.high,
            rules.DOREFA_MODIFIED: -self.rule.low,
            rules.DOREFA_CENTERED: self.rule.high + 1,
        }
        self.scale = factor / self.x.new_full((), denominators[self.rule.name])

    def code(self) -> Tensor:
        name, low, high = self.rule.name, self.rule.low, self.rule.high
        w = ((self.t + 1.0) * 0.5).clamp(0, 1)
        if name == rules.DOREFA_ORIGINAL:
            return (w * high).round() * 2.0 - high
        n = high - low if name == rules.DOREFA_MODIFIED else high
        cell = (w * (n + 1)).floor().clamp(max=n)
        return cell + low if name == rules.DOREFA_MODIFIED else cell * 2.0 - high

    def derivatives(self) -> tuple[Tensor, ...]:
        by_x = self.factor * ((1.0 - self.tanh * self.tanh) / self.most)
        of_most = (1.0 - self.most * self.most) / self.most
        by_absmax = -(self.factor * (self.t * of_most))
        return by_x, by_absmax, torch.zeros_like(by_x)


def _levels(x: Tensor, parameters: Tensor, rule: Rule, axis: int | None) -> _Levels:
    along = [-1 if d == axis else 1 for d in range(x.dim())]
    each = [p if axis is None else p.reshape(along) for p in parameters.unbind()]
    kinds = {
        rules.LSQ: _LSQ,
        rules.QIL: _QIL,
        rules.QIL_ODD: _QIL,
        rules.DSQ: _DSQ,
        **dict.fromkeys((rules.PACT, rules.SAT, rules.AQD, rules.AQD_ODD), _Clip),
    }
    return kinds.get(rule.name, _DoReFa)(x.float(), each, rule)


def _least(scale: Tensor) -> Tensor:
    return scale.maximum(torch.full_like(scale, FLT_MIN))


def _one_inside(outside: Tensor) -> Tensor:
    return torch.where(outside, 0.0, 1.0)
