"""Inference in integers alone, after AQD (Chen et al. 2020, arXiv 2007.06919): batch norms and
scales become a multiplier and a right shift, and additions use a common scale.

Between the codes of two layers there are int32 values q, which represent ``q S``. Values that are
added, or are parts of each other, have the same scale S: that of the finest quantizer that reads
one of them, or of the sums if no quantizer does, divided by ``2^guard_bits``. With the arithmetic
of `noisyq_fast.integer.fixed_point`::

    acc  = sum (c - z) (d - w)                               exact, from the codes of input and
    weight q    = acc f + t          f = factor s_x s_w / S         batch norm and bias, per channel
    q    = q + q', max(q, 0), ...                            saturating code = clamp(q S / s_x,
    code_min, code_max)              of the next layer

with one rounding, half up, in each of the two lines with a factor. The trained network rounds
floats, half to even, so some codes differ by one, and change codes of later layers;
`IntegerOnly.compare` counts all of them. With 16 guard bits there are few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from noisyq_fast.calibration.tracing import Step, Trace, Value
from noisyq_fast.grid import ODD
from noisyq_fast.integer.fixed_point import LARGEST, FixedPoint, saturated
from noisyq_fast.integer.fusing import unfuse_
from noisyq_fast.layers.convolution import QuantConv1d, QuantConv2d, QuantConv3d, pads_of
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.layers.linear import QuantLinear
from noisyq_fast.quantizers import AQD, LSQ, PACT, QIL, Fixed, MovingAbsMax, Quantizer
from noisyq_fast.running import copy_of

_QUANTIZERS = (MovingAbsMax, LSQ, PACT, QIL, AQD, Fixed)
_LAYERS = (QuantLinear, QuantConv1d, QuantConv2d, QuantConv3d)


class IntegerOnly(nn.Module):
    """A trained network whose layers, batch norms, additions and ReLUs compute in integers.

    It is traced from a run of the network on an example; inputs of other batch sizes work too. The
    quantizer of the first layer converts the input to integers; the outputs are integers times
    their scale, float32. It is a specification in plain PyTorch: exact on every device and with
    every number of threads, and slow.

    Args:
        model: a trained, quantized network of linear layers and convolutions whose input has one
            scale, from `MovingAbsMax`, `LSQ`, `PACT`, `QIL`, `AQD` or `Fixed`; batch norms;
            additions, ReLUs, poolings, slices and zero paddings. It is not changed.
        example: an input of the model.
        guard_bits: how many bits below the step of a code are kept between layers, 0..20. Values
            beyond ``2^(31 - guard_bits)`` steps of the finest quantizer saturate.

    Attributes:
        layers: the names of the layers, in the order of execution.

    Raises:
        ValueError: a part of the model that cannot be computed in integers; the message names it.

    Example:
        >>> import noisyq_fast, torch
        >>> from torch import nn
        >>> layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)
        >>> model, x = nn.Sequential(*layers), torch.randn(4, 3, 8, 8)
        >>> model = noisyq_fast.quantize_model_(model, example=x)
        >>> _ = noisyq_fast.calibrate(model, [x]).eval()
        >>> integers = noisyq_fast.IntegerOnly(model, x)
        >>> bool((integers(x) - model(x)).abs().max() < 0.05 * model(x).abs().max())
        True
    """

    def __init__(self, model: nn.Module, example: Any, guard_bits: int = 16) -> None:
        super().__init__()
        if not isinstance(guard_bits, int) or not 0 <= guard_bits <= 20:
            raise ValueError(f"guard_bits: got {guard_bits!r}, takes 0..20")
        # In a tuple, so that the network with float scales is not registered as a submodule.
        model = copy_of(model).eval()
        unfuse_(model)
        self._model = (model,)
        program = _Program(model, example, guard_bits)
        self.layers: list[str] = [name for name, _ in program.codes]
        self._operations, self._codes = program.operations, program.codes
        self._input, self._output = program.input, program.output
        self._output_scale = program.scales[program.output]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return (self._run(x)[self._output].double() * self._output_scale).float()

    def codes(self, x: Tensor) -> dict[str, Tensor]:
        """By layer name, the codes of its input minus their zero point, int64."""
        values = self._run(x)
        return {name: values[key] for name, key in self._codes}

    def _run(self, x: Tensor) -> dict[Any, Tensor]:
        values: dict[Any, Tensor] = {self._input: x}
        for operation in self._operations:
            values[operation.output] = operation.compute(*(values[v] for v in operation.inputs))
        return values

    @torch.no_grad()
    def compare(self, inputs: Iterable[Any]) -> Comparison:
        """Compares with the network that it was made from, on batches of inputs."""
        found = Comparison(dict.fromkeys(self.layers, 0.0))
        elements = dict.fromkeys(self.layers, 0)
        model = self._model[0]
        layers = {name: model.get_submodule(name) for name in self.layers}
        of_floats: dict[str, Tensor] = {}

        def see(name: str) -> Callable:
            def hook(layer: QuantLayer, args: tuple[Tensor]) -> None:
                of_floats[name] = _steps(_quantizer_of(layer), args[0])

            return hook

        hooks = [layer.register_forward_pre_hook(see(name)) for name, layer in layers.items()]
        try:
            for x in inputs:
                expected, actual = model(x), self(x)
                for name, codes in self.codes(x).items():
                    found.differing[name] += int((codes != of_floats[name]).sum())
                    elements[name] += codes.numel()
                found.add(actual, expected)
        finally:
            for hook in hooks:
                hook.remove()
        if not found.outputs:
            raise ValueError("inputs: got none, takes one batch or more")
        for name, count in elements.items():
            found.differing[name] /= max(1, count)
        return found


@dataclass
class Comparison:
    """The integer network compared with the network with float scales.

    Attributes:
        differing: by layer name, the share of its input's codes that differ, 0..1.
        largest_difference: the largest absolute difference of an output.
        largest_output: the largest magnitude of an output of the network with float scales.
        outputs: the number of rows of outputs.
        agreeing: the number of rows with the same argmax.
    """

    differing: dict[str, float] = field(default_factory=dict)
    largest_difference: float = 0.0
    largest_output: float = 0.0
    outputs: int = 0
    agreeing: int = 0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        difference = float((actual - expected).abs().max())
        self.largest_difference = max(self.largest_difference, difference)
        self.largest_output = max(self.largest_output, float(expected.abs().max()))
        same = actual.argmax(-1) == expected.argmax(-1)
        self.outputs += same.numel()
        self.agreeing += int(same.sum())

    def __str__(self) -> str:
        lines = [f"{'layer':32} differing codes"]
        lines += [f"{name:32} {share:.4%}" for name, share in self.differing.items()]
        lines.append(
            f"outputs: differ by up to {self.largest_difference:.3g} (the largest is "
            f"{self.largest_output:.3g}); the same is largest in {self.agreeing} of {self.outputs}"
        )
        return "\n".join(lines)


# What is computed.


@dataclass(frozen=True)
class _Operation:
    output: Any
    inputs: tuple[Any, ...]
    compute: Callable[..., Tensor]


@dataclass(frozen=True)
class _Product:
    """Exact sums of a layer: float64 is exact for sums of integers below 2^53."""

    layer: Any  # a convolution or a linear layer
    weight: Tensor

    def __call__(self, steps: Tensor) -> Tensor:
        x, layer = steps.double(), self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, self.weight).round().long()
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(layer.kernel_size) - 1]
        pads = pads_of(layer)
        x = F.pad(x, pads, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
        how = (layer.stride, 0, layer.dilation, layer.groups)
        return convolve(x, self.weight, None, *how).round().long()


@dataclass(frozen=True)
class _Quantize:
    """Computes the codes, minus the zero point, from ``q``."""

    factor: FixedPoint
    low: int
    high: int
    is_odd: bool

    def __call__(self, q: Tensor) -> Tensor:
        steps = self.factor(q)
        if self.is_odd:  # (q f + n) / 2, rounded
            return (2 * steps - self.high).clamp(self.low, self.high)
        return steps.clamp(self.low, self.high)


def _steps(quantizer: Quantizer, x: Tensor) -> Tensor:
    made = quantizer.codes(x)
    steps = made.codes.long()
    return steps if made.zero_point is None else steps - made.zero_point.long()


def _add(first: Tensor, second: Tensor) -> Tensor:
    return saturated(first + second)


def _sum_of_pixels(q: Tensor) -> Tensor:
    return saturated(q.sum((-2, -1)))


def _max_pool(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return F.max_pool2d(q.double(), *args, **kwargs).long()  # exact


# Functions whose output has the scale of their input.
_SAME_SCALE: dict[Callable, Callable[..., Tensor]] = {
    **dict.fromkeys(
        (F.relu, torch.relu, Tensor.relu, torch.relu_, Tensor.relu_),
        lambda q, inplace=False: q.clamp(min=0),
    ),
    **dict.fromkeys((F.dropout, F.dropout2d), lambda q, *_, **__: q),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool),
    Tensor.__getitem__: lambda q, index: q[index],
    Tensor.contiguous: lambda q, **_: q,
    Tensor.flatten: torch.flatten,
    torch.flatten: torch.flatten,
    F.pad: lambda q, pad, mode="constant", value=None: F.pad(q, pad, mode),
}
_ADDITIONS = {
    *(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__),
    *(Tensor.add_, Tensor.__iadd__),
}
_MEANS = {torch.mean, Tensor.mean, F.adaptive_avg_pool2d}


class _Program:
    """Converts a traced model to a list of operations on integers.

    Attributes:
        scales: S of each integer value.
        codes: pairs of a layer's name and the key of its input's codes.
    """

    def __init__(self, model: nn.Module, example: Any, guard_bits: int) -> None:
        self.modules = dict(model.named_modules())
        self.guard = 2.0**guard_bits
        traced = {n: m for n, m in self.modules.items() if isinstance(m, QuantLayer | _BatchNorm)}
        if not any(isinstance(module, QuantLayer) for module in traced.values()):
            raise ValueError(
                f"model: got {type(model).__name__} without quantized layers, takes what "
                "quantize_model_ returns"
            )
        self.trace = Trace.of(model, traced, example)
        self.operations: list[_Operation] = []
        self.codes: list[tuple[str, Any]] = []
        self.scales: dict[Value, float] = {}
        self.sums: dict[Value, tuple[Tensor, Tensor]] = {}
        """Scale and bias, by channel, of exact sums that have no S yet."""
        self._set_sides()
        for step in self.trace.steps:
            self._add(step)
        returned = [v for v, readers in self.trace.readers.items() if None in readers]
        if len(returned) != 1 or returned[0] not in self.scales | self.sums:
            raise ValueError("model: got other outputs than one tensor of its layers")
        (self.output,) = returned

    def _set_sides(self) -> None:
        """Finds the values that share a scale, and the finest quantizer that reads them."""
        made = self.trace.maker
        inputs = {v for step in self.trace.steps for v in step.inputs if v not in made}
        if len(inputs) != 1:
            raise ValueError(f"model: got {len(inputs)} inputs or constants, takes one tensor")
        (self.input,) = inputs
        self.parent: dict[Value, Value] = {}
        for step in self.trace.steps:
            if step.function in _ADDITIONS or step.function in _SAME_SCALE:
                for value in step.inputs:
                    self.parent[self._root(value)] = self._root(step.outputs[0])
        self.finest: dict[Value, float] = {}
        for step in self.trace.of_layers():
            layer = self.modules[step.layer]
            if isinstance(layer, QuantLayer):
                _check(step.layer_name, layer)
                root = self._root(step.inputs[0])
                step_of_codes = _step_and_offset(_quantizer_of(layer), _known(layer)[0])[0]
                self.finest[root] = min(float(step_of_codes), self.finest.get(root, math.inf))

    def _root(self, value: Value) -> Value:
        while value in self.parent and self.parent[value] != value:
            value = self.parent[value]
        return value

    def _add(self, step: Step) -> None:
        output = step.outputs[0]
        module = self.modules.get(step.layer) if step.layer is not None else None
        if isinstance(module, QuantLayer):
            self._add_layer(step, module)
        elif isinstance(module, _BatchNorm):
            if step.layer not in self.trace.batch_norms:
                does = f"a {type(module).__name__} does more than normalize"
                raise ValueError(f"{_named(step)}: {does}; takes batch norms and functions apart")
            self._add_norm(step, module)
        elif step.function in _ADDITIONS and len(step.inputs) == 2 and not step.kwargs:
            if any(value not in self.scales for value in step.inputs):
                raise ValueError(f"{_named(step)}: adds the input of the model")
            self._emit(output, step.inputs, _add, self.scales[step.inputs[0]])
        elif step.function in _SAME_SCALE and len(step.inputs) == 1:
            self._add_function(step)
        elif step.function in _MEANS:
            self._add_mean(step)
        else:
            takes = "additions of two tensors, ReLU, max_pool2d, means over pixels, slices, flatten"
            raise ValueError(f"{_named(step)}: has no form in integers, takes {takes}")

    def _emit(
        self, output: Any, inputs: Iterable[Any], compute: Callable, scale: float | None = None
    ) -> None:
        self.operations.append(_Operation(output, tuple(inputs), compute))
        if scale is not None:
            self.scales[output] = scale

    def _add_layer(self, step: Step, layer: QuantLayer) -> None:
        (value,) = step.inputs
        codes = ("codes", step.layer)
        scale, low, high = _known(layer)
        if value == self.input:
            quantizer = _quantizer_of(layer)
            self._emit(codes, [value], lambda x: _steps(quantizer, x))
        else:
            self._emit(codes, [value], self._quantizer(step, layer, scale, low, high))
        self.codes.append((step.layer_name, codes))
        made = layer.weight_codes(layer.weights()[0].detach())
        weight = made.codes.double()
        if made.zero_point is not None:
            weight = weight - made.zero_point.double().view([-1, *[1] * (weight.dim() - 1)])
        if weight[0].numel() * max(-low, high) * made.largest > LARGEST:
            raise ValueError(f"layer {step.layer!r}: its sums do not fit into 32 bits")
        output = step.outputs[0]
        own: Any = layer.bias
        bias = torch.zeros_like(made.scale) if own is None else own.detach()
        self.sums[output] = made.scale.double() * scale.double(), bias.double()
        after = self.trace.only_reader(output)
        norm = None if after is None or after.layer is None else self.modules[after.layer]
        joins = isinstance(norm, _BatchNorm) and (
            isinstance(layer, _ConvNd) or len(output.shape) == 2
        )
        key = output if joins else ("sums", step.layer)
        self._emit(key, [codes], _Product(layer, weight))
        if not joins:
            axis = -1 if isinstance(layer, nn.Linear) else 1
            self._rescale(step, output, key, *self.sums.pop(output), axis)

    def _quantizer(
        self, step: Step, layer: QuantLayer, scale: Tensor, low: int, high: int
    ) -> _Quantize:
        quantizer = _quantizer_of(layer)
        step_of_codes, offset = _step_and_offset(quantizer, scale)
        factor, term = self.scales[step.inputs[0]] / step_of_codes, offset
        is_odd = quantizer.grid_of_codes == ODD
        if is_odd:
            factor, term = factor / 2, (term + high) / 2
        return _Quantize(_fixed(step, factor, term), low, high, is_odd)

    def _add_norm(self, step: Step, norm: _BatchNorm) -> None:
        if norm.running_mean is None or norm.running_var is None:
            raise ValueError(
                f"layer {step.layer!r}: has the statistics of a batch, no running ones"
            )
        (value,) = step.inputs
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        factor = (variance + norm.eps).rsqrt()
        factor = factor if norm.weight is None else factor * norm.weight.detach().double()
        term = -mean * factor
        term = term if norm.bias is None else term + norm.bias.detach().double()
        if value in self.sums:
            scale, bias = self.sums[value]
            scale, term = scale * factor, bias * factor + term
        elif value in self.scales:
            scale = self.scales[value] * factor
        else:
            raise ValueError(f"layer {step.layer!r}: reads the input of the model")
        self._rescale(step, step.outputs[0], value, scale, term, 1)

    def _rescale(
        self, step: Step, output: Value, source: Any, scale: Tensor, term: Tensor, axis: int
    ) -> None:
        """Adds the operation ``q = (v scale + term) / S``."""
        root = self._root(output)
        if root not in self.finest:  # no quantizer reads it
            self.finest[root] = (float(scale.abs().max()) or 1.0) * self.guard
        common = self.finest[root] / self.guard
        fixed = _fixed(step, scale / common, term / common)
        self._emit(output, [source], lambda v: fixed.along(axis, v.dim())(v), common)

    def _add_function(self, step: Step) -> None:
        value = step.inputs[0]
        if value not in self.scales:
            raise ValueError(f"{_named(step)}: reads the input of the model before its first layer")
        assert step.function is not None
        follow, (args, kwargs) = _SAME_SCALE[step.function], (step.args[1:], dict(step.kwargs))
        if step.function is F.pad:
            value_of_pad = kwargs.get("value") or (args[2] if len(args) > 2 else 0)
            if value_of_pad:
                raise ValueError(f"{_named(step)}: pads with {value_of_pad}, takes 0")
        self._emit(
            step.outputs[0], [value], lambda q: follow(q, *args, **kwargs), self.scales[value]
        )

    def _add_mean(self, step: Step) -> None:
        (value,) = step.inputs
        shape, output = value.shape, step.outputs[0]
        if len(shape) != 4 or math.prod(output.shape) != math.prod(shape[:2]):
            raise ValueError(f"{_named(step)}: takes a mean over all pixels")
        if value not in self.scales:
            raise ValueError(f"{_named(step)}: reads the input of the model before its first layer")
        tail = [1] * (len(output.shape) - 2)
        pixels = shape[2] * shape[3]
        self._emit(
            *(output, [value], lambda q: _sum_of_pixels(q).reshape(*q.shape[:2], *tail)),
            self.scales[value] / pixels,
        )


def _check(name: str, layer: QuantLayer) -> None:
    quantizer = layer.input_quantizer
    why = layer.why_float()
    if not isinstance(layer, _LAYERS):
        why = f"{type(layer).__name__} has no form in integers alone"
    elif why is None and (quantizer is None or quantizer.axis is not None):
        why = "its input has several scales"
    elif why is None and type(quantizer) not in _QUANTIZERS:
        takes = ", ".join(kind.__name__ for kind in _QUANTIZERS)
        why = f"{type(quantizer).__name__} of its input is not among {takes}"
    if why is not None:
        raise ValueError(f"layer {name!r}: {why}")


def _quantizer_of(layer: QuantLayer) -> Quantizer:
    """The quantizer of the input; `_check` has made sure that there is one."""
    assert layer.input_quantizer is not None
    return layer.input_quantizer


def _known(layer: QuantLayer) -> tuple[Tensor, int, int]:
    """The scale of the input, and its smallest and largest code minus the zero point."""
    quantizer = _quantizer_of(layer)
    made = quantizer.codes(layer.weights()[0].new_zeros(1))
    least, most = _ends(quantizer)
    zero = 0 if made.zero_point is None else int(made.zero_point)
    return made.scale, least - zero, most - zero


def _step_and_offset(quantizer: Quantizer, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``step`` and ``offset``, float64: codes minus the zero point are ``x / step + offset``,
    rounded and clamped."""
    step, offset = scale.double(), torch.zeros_like(scale, dtype=torch.float64)
    if isinstance(quantizer, QIL):  # n (1/2 + (x - c) / 2 d)
        center, distance = (p.detach().double() for p in (quantizer.center, quantizer.distance))
        step = 2 * distance * step
        offset = quantizer.code_ends[1] / 2 - center / step
    return step, offset


def _ends(quantizer: Quantizer) -> tuple[int, int]:
    ends = getattr(quantizer, "code_ends", None)  # learned quantizers have it
    return ends or (quantizer.grid.code_min, quantizer.grid.code_max)


def _fixed(step: Step, factor: Tensor, term: Tensor) -> FixedPoint:
    try:
        return FixedPoint.of(factor, term)
    except ValueError as error:
        raise ValueError(f"{_named(step)}: {error}") from error


def _named(step: Step) -> str:
    if step.layer is not None:
        return f"layer {step.layer!r}"
    return f"function {getattr(step.function, '__name__', step.function)!r}"
