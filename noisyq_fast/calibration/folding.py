"""Folding of batch norms into the layers before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from noisyq_fast.calibration.tracing import Trace

LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Linear = nn.Linear | _ConvNd
"""The type of these layers. Their weights have the output channels first, and the input channels
of a group second."""


@dataclass(frozen=True)
class Normal:
    """Mean and standard deviation of each channel, ``[C]``, of the output of a batch norm."""

    mean: Tensor
    std: Tensor


def changeable(model: nn.Module, trace: Trace) -> dict[str, Linear]:
    """By name, the linear layers and convolutions whose weight is a parameter of their own, which
    nothing else reads and which they use as the classes of PyTorch do."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if _is_linear(module)
        and not is_parametrized(module)
        and name not in trace.read_by_others
        and owners.get(id(module._parameters.get("weight")), 0) == 1
    }


def _is_linear(module: nn.Module) -> bool:
    base = next((base for base in LINEAR if isinstance(module, base)), None)
    return base is not None and not any(
        getattr(type(module), method, None) is not getattr(base, method, None)
        for method in ("forward", "_conv_forward")
    )


@torch.no_grad()
def fold_batch_norms_(model: nn.Module, trace: Trace) -> dict[str, Normal]:
    """Folds a batch norm into the layer before it, if nothing else reads the layer's output, with
    the running statistics; the batch norm becomes a `torch.nn.Identity`.

    Returns:
        By layer name, mean and deviation of the folded layer's output.
    """
    layers, modules = changeable(model, trace), dict(model.named_modules())
    found: dict[str, Normal] = {}
    for step in trace.of_layers():
        layer = layers.get(step.layer_name)
        after = trace.only_reader(step.outputs[0])
        if layer is None or after is None or after.layer is None:
            continue
        norm = modules.get(after.layer)
        if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
            continue
        if after.layer not in trace.batch_norms:
            continue  # a subclass that does more
        if not trace.once(step.layer) or not trace.once(after.layer):
            continue
        if isinstance(layer, nn.Linear) and len(step.outputs[0].shape) != 2:
            continue  # the norm's channels are another axis
        found[step.layer_name] = _fold_(layer, norm)
        replace_module_(model, norm, nn.Identity())
    return found


def _fold_(layer: Linear, norm: _BatchNorm) -> Normal:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    mean, variance = norm.running_mean, norm.running_var
    gamma = torch.ones_like(mean) if norm.weight is None else norm.weight
    beta = torch.zeros_like(mean) if norm.bias is None else norm.bias
    factor = gamma * (variance + norm.eps).rsqrt()
    layer.weight.mul_(factor.view(-1, *[1] * (layer.weight.dim() - 1)).to(layer.weight.dtype))
    bias = with_bias_(layer)
    bias.copy_((bias - mean) * factor + beta)
    return Normal(beta.clone(), gamma.abs())


def with_bias_(layer: Any) -> Tensor:
    """The bias of a linear layer or convolution, quantized or not; one of zeros if it has none."""
    if layer.bias is None:
        zeros = layer.weight.new_zeros(len(layer.weight))
        layer.bias = nn.Parameter(zeros, requires_grad=layer.weight.requires_grad)
    return layer.bias.data


def replace_module_(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replaces a module by another, under all of its names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is old:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
    new.train(model.training)
