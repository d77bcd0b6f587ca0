"""The common part of post-training methods: a float network with folded batch norms, its quantized
copy, and the inputs and weights of a layer as a linear problem."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from tqdm import tqdm

from noisyq_fast.calibration.folding import LINEAR, changeable, fold_batch_norms_
from noisyq_fast.calibration.input_ranges import calibrate
from noisyq_fast.calibration.tracing import Trace
from noisyq_fast.conversion.classes import why_not_quantized
from noisyq_fast.conversion.convert import quantize_model_
from noisyq_fast.layers.convolution import pads_of
from noisyq_fast.layers.layer import QuantLayer
from noisyq_fast.quantizers import Fixed, Quantizer
from noisyq_fast.running import arguments, copy_of, tensors_in

_OWN = ("weight", "weight_grid", "weight_group_size", "activation", "activation_granularity")
_TAKES = [
    name
    for name in inspect.signature(quantize_model_).parameters
    if name not in (*_OWN, "model", "example")
]


def in_float32(method: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Runs a method without gradients and without autocast, which would round its values."""

    @functools.wraps(method)
    def run(*args: Any, **kwargs: Any) -> nn.Module:
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return method(*args, **kwargs)

    return run


class PostTraining:
    """A float network and its quantized copy, both in evaluation mode.

    Args:
        model: a float network; it is not changed.
        inputs: inputs of the model, as for `calibrate`, without labels. All batches are kept.
        options: options of `quantize_model_`.
        weight: as for `quantize_model_`.
        change_: changes the float copy before it is quantized, such as equalisation.

    Attributes:
        batches: the inputs, as a list.
        float: a copy of the model with folded batch norms.
        normal: by layer name, mean and deviation of outputs whose batch norm was folded.
        trace: the trace of the model before batch norms were folded.
        quantized: a quantized copy of ``float``, with input ranges calibrated on it.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Iterable[Any],
        options: Mapping[str, Any],
        weight: Quantizer | None = None,
        change_: Callable[[PostTraining], None] | None = None,
    ) -> None:
        _check(options)
        if isinstance(inputs, Tensor | Mapping | str) or not isinstance(inputs, Iterable):
            raise TypeError(
                f"inputs: got {type(inputs).__name__}, takes an iterable of inputs, such as a list "
                "with one input of the model"
            )
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
        if any(isinstance(module, QuantLayer) for module in model.modules()):
            raise ValueError("model: got quantized layers, takes a float model")
        self.batches = list(inputs)
        if not self.batches:
            raise ValueError("inputs: got none, takes one or more")
        if any(x.numel() == 0 for batch in self.batches for x in tensors_in(batch)):
            raise ValueError("inputs: got a batch without samples, takes one or more in each")
        self.float = copy_of(model).eval()
        layers = {name: m for name, m in self.float.named_modules() if _is_step(m)}
        self.trace = Trace.of(self.float, layers, self.batches[0])
        self.normal = fold_batch_norms_(self.float, self.trace)
        if change_ is not None:
            change_(self)
        self.quantized = copy_of(self.float)
        given: dict[str, Any] = {} if weight is None else {"weight": weight}
        quantize_model_(self.quantized, **options, **given, example=self.batches[0])
        if any(m.keeps_range for m in self.quantized.modules() if isinstance(m, Quantizer)):
            calibrate(self.quantized, self.batches)

    def converted(self) -> dict[str, nn.Module]:
        """The float layers that are quantized in the copy, by name."""
        layers = dict(self.float.named_modules())
        modules = self.quantized.named_modules()
        return {name: layers[name] for name, m in modules if isinstance(m, QuantLayer)}

    def layers(self) -> list[LinearLayer]:
        """The linear layers and convolutions with a quantized weight, in the order of execution."""
        found = changeable(self.float, self.trace).keys() & self.converted().keys()
        names = dict.fromkeys(step.layer_name for step in self.trace.of_layers())
        layers = [LinearLayer(self, name) for name in names if name in found]
        return [layer for layer in layers if layer.quantized.weight_quantizer is not None]


def shown(layers: list[LinearLayer], what: str, progress: bool | None) -> Iterable[LinearLayer]:
    """The layers, with a progress bar on stderr; None shows it if that is a terminal."""
    off = None if progress is None else not progress
    return tqdm(layers, what, unit="layer", disable=off, file=sys.stderr)


class LinearLayer:
    """A layer as ``y = W x`` for each group of channels. A linear layer has one group, a
    convolution its ``groups``, and each output position of a convolution is a sample.

    Attributes:
        float, quantized: the layer in both networks.
        weight: ``[groups, outputs, inputs]``, float.
    """

    def __init__(self, both: PostTraining, name: str) -> None:
        self.both, self.name = both, name
        of_float, quantized = (m.get_submodule(name) for m in (both.float, both.quantized))
        assert isinstance(of_float, LINEAR)
        assert isinstance(quantized, QuantLayer)
        self.float, self.quantized = of_float, quantized
        self.groups = getattr(self.float, "groups", 1)
        self.weight = self.float.weight.detach().float().flatten(1).unflatten(0, (self.groups, -1))

    @property
    def weight_quantizer(self) -> Quantizer:
        """The weight quantizer of the quantized layer."""
        assert self.quantized.weight_quantizer is not None  # see `PostTraining.layers`
        return self.quantized.weight_quantizer

    def inputs(self, positions: int) -> tuple[Tensor, Tensor]:
        """The layer's input in the float and in the quantized network, before its own quantizer,
        each ``[groups, samples, inputs]``: all samples, or about ``positions`` at the same random
        positions."""
        of_float = self._seen(self.both.float, self.float, positions)
        return of_float, self._seen(self.both.quantized, self.quantized, positions)

    def _seen(self, model: nn.Module, layer: nn.Module, positions: int) -> Tensor:
        calls = self.both.trace.calls[self.name]
        each = -(-positions // (len(self.both.batches) * calls))
        generator = torch.Generator().manual_seed(0)
        found: list[Tensor] = []

        def see(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            found.append(samples(self.float, x, each, generator).float())
            if len(found) % calls == 0:
                raise _Seen

        hook = layer.register_forward_pre_hook(see, with_kwargs=True)
        try:
            for batch in self.both.batches:
                args, kwargs = arguments(batch)
                with torch.no_grad():
                    try:
                        model(*args, **kwargs)
                    except _Seen:
                        continue
        finally:
            hook.remove()
        return torch.cat(found, 1)

    def quantized_inputs(self, x: Tensor, factor: float = 1.0) -> Tensor:
        """Inputs quantized by the layer's quantizer, with its range times a factor."""
        quantizer = self.quantized.input_quantizer
        if quantizer is None:
            return x
        if not quantizer.keeps_range:
            return quantizer(x)
        low, high = self.range
        within = quantizer.fake_quantize_within(x.reshape(1, -1), factor * low, factor * high)
        return within.view_as(x)

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The ends of the input range, ``[1]``."""
        quantizer = self.quantized.input_quantizer
        assert quantizer is not None
        of_input: Any = quantizer.range
        ends = of_input.reshape(-1)
        if quantizer.grid.is_affine:
            return ends[:1], ends[1:]
        return (torch.zeros_like(ends) if quantizer.grid.is_unsigned else -ends), ends

    def set_weight_scale(self, scale: Tensor) -> None:
        """Sets a scale for each output channel, ``[groups, outputs]``, or one for all, ``[]``."""
        before = self.weight_quantizer
        of_all = scale.dim() == 0
        scale = scale.float()
        fixed = Fixed(scale if of_all else scale.flatten(), before.bits, None if of_all else 0)
        fixed.name = before.name
        self.quantized.weight_quantizer = fixed.eval()

    def set_weight(self, weight: Tensor) -> None:
        (own,) = self.quantized.weights()
        own.data.copy_(weight.reshape(own.shape))


class _Seen(Exception):
    """Ends a forward early."""


def _check(options: Mapping[str, Any]) -> None:
    if unknown := [name for name in options if name not in _TAKES]:
        raise TypeError(f"options: got {', '.join(unknown)}, takes {', '.join(_TAKES)}")
    overrides = options.get("overrides")
    for name, override in overrides.items() if isinstance(overrides, Mapping) else ():
        if isinstance(override, Mapping) and (own := [o for o in override if o in _OWN]):
            raise TypeError(
                f"overrides[{name!r}]: got {', '.join(own)}, which the method chooses itself"
            )


def _is_step(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm | nn.ReLU6) or why_not_quantized(module) is not None


def samples(layer: nn.Module, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The inputs of a linear layer or convolution, ``[groups, samples, inputs]``, for all output
    positions, or for ``count`` random ones."""
    if not isinstance(layer, _ConvNd):
        flat = x.detach().reshape(1, -1, x.shape[-1])
        return flat if flat.shape[1] <= count else flat[:, _chosen(flat.shape[1], count, generator)]
    windows = _windows(layer, x.detach())  # [batch, *positions, channels, *kernel]
    dimensions = len(layer.kernel_size)
    shape = windows.shape[: dimensions + 1]
    total = shape.numel()
    chosen = torch.arange(total) if total <= count else _chosen(total, count, generator)
    rows = windows[torch.unravel_index(chosen.to(x.device), shape)].flatten(1)
    return rows.unflatten(1, (layer.groups, -1)).transpose(0, 1)


def _windows(layer: _ConvNd, x: Tensor) -> Tensor:
    dimensions = len(layer.kernel_size)
    if x.dim() == dimensions + 1:
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, pads_of(layer), mode)
    for d, (size, step, apart) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
    ):
        x = x.unfold(d, (size - 1) * apart + 1, step)[..., ::apart]
    return x.movedim(1, dimensions + 1)


def _chosen(total: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(total, generator=generator)[:count]
