"""Distributions of activations, without data: derived from batch norms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from noisyq_fast.calibration.folding import Normal
from noisyq_fast.calibration.tracing import Step, Trace, Value

RELU = (F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_)
_ADD = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__)
_SAME = (
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.pad),
    *(torch.mean, Tensor.mean, torch.cat, Tensor.__getitem__, Tensor.contiguous, Tensor.clone),
    *(torch.flatten, Tensor.flatten, torch.reshape, Tensor.reshape, Tensor.view),
    *(torch.permute, Tensor.permute, torch.transpose, Tensor.transpose),
    *(torch.squeeze, Tensor.squeeze, torch.unsqueeze, Tensor.unsqueeze),
)
"""Functions that are applied to mean, deviation and ends in the same way as to the values."""
_DEVIATIONS = 6


@dataclass(frozen=True)
class Typical:
    """Mean, standard deviation and the ends of the range of an activation: each a tensor in its
    shape."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, normal: Normal, like: Value) -> Typical:
        shape = [1] * len(like.shape)
        shape[1] = -1
        mean, std = (t.view(shape).expand(like.shape) for t in (normal.mean, normal.std))
        return cls(mean, std, mean - _DEVIATIONS * std, mean + _DEVIATIONS * std)

    def rectified(self, most: float = math.inf) -> Typical:
        """After a ReLU, or one that is clipped at ``most``."""
        if bool((self.low >= 0).all()) and bool((self.high <= most).all()):
            return self
        mean, square = relu_mean(self.mean, self.std), relu_square(self.mean, self.std)
        if most < math.inf:
            mean = clipped_relu_mean(self.mean, self.std, most)
        std = (square - mean.square()).clamp(min=0).sqrt()
        return Typical(mean, std, self.low.clamp(0, most), self.high.clamp(0, most))

    def __add__(self, other: Typical) -> Typical:
        mean, std = self.mean + other.mean, (self.std.square() + other.std.square()).sqrt()
        low = (mean - _DEVIATIONS * std).maximum(self.low + other.low)
        return Typical(mean, std, low, (mean + _DEVIATIONS * std).minimum(self.high + other.high))

    def by_channel(self, layer: nn.Module) -> Typical:
        """Reduced to one value for each input channel of a layer."""
        channel = -1 - len(getattr(layer, "kernel_size", ()))
        flat = [t.movedim(channel, 0).flatten(1) for t in vars(self).values()]
        return Typical(flat[0].mean(1), flat[1].mean(1), flat[2].amin(1), flat[3].amax(1))


def typical_inputs(trace: Trace, normal: dict[str, Normal]) -> dict[str, Typical]:
    """The distribution of each input channel of layers, by layer name.

    Args:
        trace: the trace of the model.
        normal: for layers with a folded batch norm, by name, mean and deviation of their output.
    """
    known: dict[Value, Typical] = {}
    found: dict[str, Typical] = {}
    for step in trace.steps:
        layer = None if step.layer is None else trace.layers[step.layer]
        given = known.get(step.inputs[0]) if step.inputs else None
        if given and layer is not None and hasattr(layer, "weight"):
            found.setdefault(step.layer_name, given.by_channel(layer))
        made = _made(step, layer, trace, normal, known)
        if made is not None:
            known[step.outputs[0]] = made
    return found


def _made(
    step: Step,
    layer: nn.Module | None,
    trace: Trace,
    normal: dict[str, Normal],
    known: dict[Value, Typical],
) -> Typical | None:
    """The distribution of the output of a step; None if it is unknown."""
    if len(step.outputs) != 1 or not step.inputs:
        return None
    (output,), inputs = step.outputs, step.inputs
    if isinstance(layer, _BatchNorm) and step.layer in trace.batch_norms:
        before = trace.maker.get(inputs[0])
        folded = normal.get(before.layer) if before and before.layer else None
        if folded is None and layer.affine:
            folded = Normal(layer.bias.detach(), layer.weight.detach().abs())
        return Typical.of(folded, output) if folded else None
    if not all(value in known for value in inputs):
        return None
    if step.function in RELU:
        return known[inputs[0]].rectified()
    if isinstance(layer, nn.ReLU6):
        return known[inputs[0]].rectified()  # `dfq` has replaced it by a ReLU
    if step.function is F.relu6:
        return known[inputs[0]].rectified(6)
    if step.function in _ADD and len(inputs) == 2:
        return known[inputs[0]] + known[inputs[1]]
    return _same(step, known) if step.function in _SAME else None


def _same(step: Step, known: dict[Value, Typical]) -> Typical:
    function = step.function
    assert function is not None

    def done(part: str) -> Any:
        def value(x: Any) -> Any:
            return getattr(known[x], part) if isinstance(x, Value) else x

        args, kwargs = pytree.tree_map(value, (step.args, step.kwargs))
        return function(*args, **kwargs)

    return Typical(*map(done, ("mean", "std", "low", "high")))


# Moments of a ReLU of a normal variable; with a deviation of 0 this is a constant.


def relu_mean(mean: Tensor, std: Tensor) -> Tensor:
    density, below = _density_and_probability(mean, std)
    return torch.where(std > 0, std * density + mean * below, mean.clamp(min=0))


def relu_square(mean: Tensor, std: Tensor) -> Tensor:
    density, below = _density_and_probability(mean, std)
    square = (mean.square() + std.square()) * below + mean * std * density
    return torch.where(std > 0, square, mean.clamp(min=0).square())


def clipped_relu_mean(mean: Tensor, std: Tensor, most: float) -> Tensor:
    """The mean of ``min(relu(x), most)``, which is ``relu(x) - relu(x - most)``."""
    return relu_mean(mean, std) - relu_mean(mean - most, std)


def _density_and_probability(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    z = mean / torch.where(std > 0, std, 1.0)
    return (-z.square() / 2).exp() / math.sqrt(2 * math.pi), torch.special.ndtr(z)
