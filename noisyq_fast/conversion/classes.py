"""The quantized class for each float class of layers, and back."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from noisyq_fast.integer.batch_norm import ExactBatchNorm
from noisyq_fast.layers.adder import AdderConv2d, AdderLinear, QuantAdderConv2d, QuantAdderLinear
from noisyq_fast.layers.attention import QuantMultiheadAttention
from noisyq_fast.layers.convolution import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantSameConv2d,
)
from noisyq_fast.layers.grouped import GroupedLinear, QuantGroupedLinear
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.layers.linear import QuantEmbedding, QuantLinear, QuantTransposedLinear

_LAYERS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Linear: QuantLinear,
    NonDynamicallyQuantizableLinear: QuantLinear,
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Embedding: QuantEmbedding,
    nn.MultiheadAttention: QuantMultiheadAttention,
    GroupedLinear: QuantGroupedLinear,
    AdderConv2d: QuantAdderConv2d,
    AdderLinear: QuantAdderLinear,
}
_BY_NAME: dict[str, type[QuantLayer]] = {
    "transformers.pytorch_utils.Conv1D": QuantTransposedLinear,
    "timm.layers.linear.Linear": QuantLinear,  # with casts under TorchScript
    "timm.layers.conv2d_same.Conv2dSame": QuantSameConv2d,
}
"""Layers of packages that are not imported here."""


def register_layer(float_class: type[nn.Module], quant_class: type[QuantLayer]) -> None:
    """Makes `quantize_model_` convert layers of a class of your own.

    Args:
        float_class: the class of the layers in float models, such as a subclass of
            `torch.nn.Linear` with another forward. Subclasses with the same forward are converted
            too.
        quant_class: a subclass of `QuantLayer` and of ``float_class``, in this order, whose
            ``compute(x, weight, bias)`` does what the float layer's forward does with its input,
            its ``weight`` and its ``bias``.

    Raises:
        TypeError: the classes are not such classes.

    Example:
        >>> import torch, noisyq_fast
        >>> class ScaledLinear(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> class QuantScaledLinear(noisyq_fast.QuantLayer, ScaledLinear):
        ...     def compute(self, x, weight, bias):
        ...         return 2 * torch.nn.functional.linear(x, weight, bias)
        >>> noisyq_fast.register_layer(ScaledLinear, QuantScaledLinear)
        >>> noisyq_fast.quantize_model_(ScaledLinear(3, 2))
        QuantScaledLinear(in_features=3, out_features=2, bias=True, W8/A8)
    """
    if not (isinstance(float_class, type) and issubclass(float_class, nn.Module)):
        raise TypeError(f"float_class: expected a subclass of nn.Module, got {float_class!r}")
    bases = (QuantLayer, float_class)
    if not isinstance(quant_class, type) or not all(issubclass(quant_class, b) for b in bases):
        raise TypeError(
            f"quant_class: expected a subclass of QuantLayer and {float_class.__name__}, got "
            f"{quant_class!r}"
        )
    _LAYERS[float_class] = quant_class


def check_not_lazy(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        tensors = (module._parameters | module._buffers).values()
        if any(x is not None and nn.parameter.is_lazy(x) for x in tensors):
            raise ValueError(f"layer {name!r} has no weight yet: run the lazy model once before")


def why_not_quantized(module: nn.Module) -> str | None:
    """Why a layer of a supported class cannot be quantized; empty if it can; None for a module of
    another class."""
    kind = _kind(type(module))
    if kind is None:
        return None
    if "forward" in vars(module):
        return "its forward was replaced: quantize the model before that"
    if any(
        getattr(type(module), method, None) is not getattr(kind[0], method, None)
        for method in ("forward", "_conv_forward")
    ):
        return f"a subclass of {kind[0].__name__} with a forward of its own: see register_layer"
    return ""


def _kind(cls: type) -> tuple[type, type[QuantLayer]] | None:
    """The supported float class that a class is or derives from, and its quantized class."""
    for base in cls.__mro__:
        quant = _LAYERS.get(base) or _BY_NAME.get(f"{base.__module__}.{base.__qualname__}")
        if quant is not None:
            return base, quant
    return None


def float_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a module before its conversion and before `fuse_`; for a quantized layer that
    was constructed directly, its float base class."""
    if isinstance(layer, ExactBatchNorm):
        return layer.float_class
    if not isinstance(layer, QuantLayer):
        return type(layer)
    if "_float_class" in vars(layer):
        return layer._float_class
    return next(
        base
        for base in type(layer).__mro__
        if issubclass(base, nn.Module) and not issubclass(base, QuantLayer)
    )


def quant_class(float_class: type[nn.Module]) -> type[QuantLayer]:
    kind = _kind(float_class)
    assert kind is not None  # see `why_not_quantized`
    if float_class in _LAYERS:
        return kind[1]
    return _derived(kind[1], float_class)  # type: ignore[arg-type]


@functools.cache
def _derived(quant: type[QuantLayer], float_class: type[nn.Module]) -> type[QuantLayer]:
    """A quantized class for a subclass of a float layer, which also inherits from the subclass."""
    namespace = {
        "__reduce_ex__": lambda self, _: (
            _new,
            (quant, float_class),
            self.__getstate__(),
        )
    }
    return type(f"Quant{float_class.__name__}", (quant, float_class), namespace)


def _new(quant: type[QuantLayer], float_class: type[nn.Module]) -> QuantLayer:
    """An empty layer of a derived class, for pickle."""
    cls = _derived(quant, float_class)  # type: ignore[arg-type]
    return cls.__new__(cls)


def rebased(layer: nn.Module, base: type[nn.Module]) -> type[nn.Module]:
    """``base``, or, for a parametrized layer, a subclass with the layer's properties
    (`torch.nn.utils.parametrize` makes a class for each such layer)."""
    if not is_parametrized(layer):
        return base
    names = vars(type(layer)).items()
    namespace = {k: v for k, v in names if k not in ("__dict__", "__weakref__", "__module__")}
    return type(f"Parametrized{base.__name__}", (base,), namespace)
