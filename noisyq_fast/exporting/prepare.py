"""A copy of a network in which stand-ins take the place of quantizers and of quantized weights."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from noisyq_fast.conversion.classes import why_not_quantized
from noisyq_fast.exporting import stand_ins
from noisyq_fast.exporting.means import Means
from noisyq_fast.exporting.stand_ins import FloatWeight, Norm, Weight
from noisyq_fast.integer.codes import Codes
from noisyq_fast.integer.fusing import unfuse_
from noisyq_fast.layers.layer import FLOAT, INTEGER, QuantLayer
from noisyq_fast.layers.linear import QuantEmbedding
from noisyq_fast.quantizers import Quantizer
from noisyq_fast.running import copy_of, in_evaluation

QDQ = "qdq"
FORMS = QDQ, INTEGER
_LARGEST_SUM = 2**31 - 1


def copied(model: nn.Module) -> nn.Module:
    """On the CPU, in evaluation."""
    return copy_of(model).cpu().eval()


class Prepared:
    """A network that is ready to be traced.

    Args:
        model: from `copied`; changed in place.
        args, kwargs: with which it is called.
        form: as for `export_onnx`.

    Attributes:
        outputs: of the model as it was; in the integer form, with ``arithmetic="integer"``.
        means: those over pixels.
        codes: in the order of calls, the names of quantizers of inputs, and the codes they made.
        weights: by name, those that are codes.
        integers: names of layers that multiply codes.
        floats: by names of layers, what of them is in float and why.
        seen: when the model is called, the codes of its stand-ins as ``codes`` has those of
            quantizers, and what they are more than these.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], form: str) -> None:
        self.model, self.form = model, form
        self.layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
        self.codes: list[tuple[str, Tensor]] = []
        self.weights: dict[str, Weight] = {}
        self.integers: list[str] = []
        self.floats: dict[str, str] = {}
        self.seen: list[tuple[str, Tensor, int]] = []
        self._of_parameters: dict[int, Weight] = {}
        self._calls: Counter[str] = Counter()
        if form == INTEGER:
            for layer in self.layers.values():
                layer.arithmetic = INTEGER
        inputs = {name: self._inputs(name, layer) for name, layer in self.layers.items()}
        used = self._run(args, kwargs, inputs)
        if form == QDQ:
            unfuse_(model)
        for name, layer in self.layers.items():
            self._replace(name, layer, inputs[name], used[name])
        for name, module in model.named_modules():
            weight = module._parameters.get("weight")
            if name not in self.layers and weight is not None and weight.dim() > 1:
                self.floats[name] = why_not_quantized(module) or "it was not converted"

    def _inputs(self, name: str, layer: QuantLayer) -> dict[str, Any]:
        """The stand-ins of its quantizers, or why there is none. Those of other packages stay, and
        are traced; so does one that is off."""
        found: dict[str, Any] = {}
        for key, quantizer in _of_inputs(layer).items():
            one, see = stand_ins.active(quantizer), self._see(f"{name}.{key}".lstrip("."))
            made: Any
            try:
                made = one and stand_ins.of_input(one, see, self.form == INTEGER)
            except ValueError as error:
                made = ValueError(f"layer {name!r}: its {key} {error}")
            found[key] = made or quantizer
        return found

    def _see(self, name: str) -> stand_ins.See:
        return lambda codes, offset: self.seen.append((name, codes, offset))

    # What the model does before.

    def _run(
        self, args: tuple, kwargs: dict[str, Any], inputs: dict[str, dict[str, Any]]
    ) -> dict[str, list[Tensor]]:
        """The weights that each layer quantizes, in the order of calls."""
        used: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        for name, layer in self.layers.items():
            for method in ("quantized_weight", "weight_codes"):
                vars(layer)[method] = _recording(layer, getattr(layer, method), used[name])
            for key, quantizer in _of_inputs(layer).items():
                if inputs[name][key] is not quantizer:
                    place = f"{name}.{key}".lstrip(".")
                    self._record_codes(place, quantizer, inputs[name][key])
        self.means = Means()
        with in_evaluation(self.model), self.means:
            self.outputs = self.model(*args, **kwargs)
        for layer in self.layers.values():
            for method in ("quantized_weight", "weight_codes"):
                del vars(layer)[method]
        return used

    def _record_codes(self, name: str, quantizer: Quantizer, stand_in: Any) -> None:
        forward, codes = quantizer.forward, quantizer.codes
        one: Any = stand_ins.active(quantizer)

        def record_forward(x: Tensor) -> Tensor:
            if isinstance(stand_in, ValueError):
                raise stand_in
            made = codes(x).codes if one.gives_codes else stand_ins.learned_codes(one, x)
            self.codes.append((name, made))
            return forward(x)

        def record_codes(x: Tensor) -> Codes:
            if isinstance(stand_in, ValueError):
                raise stand_in
            made = codes(x)
            self.codes.append((name, made.codes))
            return made

        vars(quantizer).update(forward=record_forward, codes=record_codes)

    # What takes its place.

    def _replace(
        self, name: str, layer: QuantLayer, inputs: dict[str, Any], used: list[Tensor]
    ) -> None:
        is_embedding = isinstance(layer, QuantEmbedding)
        why = "" if self.form == QDQ else self._why_no_product(layer, inputs)
        weights = self._weights(name, layer, used, why is None)
        if name in self.floats:  # its weight
            why = self.floats[name]
        elif why and not is_embedding:
            self.floats[name] = why
        elif not (is_embedding or stand_ins.active(layer.input_quantizer)):
            self.floats[name] = "its input is not quantized"
        for key, made in inputs.items():
            if isinstance(made, nn.Module):
                layer.set_submodule(key, made)
        vars(layer)["arithmetic"] = FLOAT if why is not None else INTEGER
        if not weights:
            return
        layer.exported_weights = nn.ModuleList(weights)
        for weight in weights:
            weight.guarded = any(map(stand_ins.is_elementwise, inputs.values()))
        layer.weight_quantizer = None
        of_calls = functools.partial(self._of_call, name, weights)
        vars(layer)["quantized_weight"] = _values(layer, of_calls)
        if why is None:
            self.integers.append(name)
            vars(layer)["why_float"] = lambda: None
            vars(layer)["weight_codes"] = _codes(layer, of_calls)
            if layer.norm:
                vars(layer)["norm"] = (_norm(layer, weights[0]),)

    def _of_call(self, name: str, weights: Sequence[Any]) -> Any:
        """The weight of the next call of a layer."""
        self._calls[name] += 1
        return weights[(self._calls[name] - 1) % len(weights)]

    def start(self) -> None:
        """What is done before each call of the model."""
        self.seen.clear()
        self._calls.clear()

    def _why_no_product(self, layer: QuantLayer, inputs: dict[str, nn.Module | None]) -> str | None:
        """Why a layer does not multiply codes; None where it does."""
        if isinstance(layer, _ConvTransposeNd):
            return "ONNX has no transposed convolution of integers"
        if why := layer.why_float():
            return why
        if any(isinstance(made, Quantizer) for made in inputs.values()):
            return f"codes of a {type(layer.input_quantizer).__name__} are not known here"
        of_input, of_weight = (
            max(-low, high)
            for low, high in map(
                stand_ins.code_ends, (layer.input_quantizer, layer.weight_quantizer)
            )
        )
        terms = layer.by_channel(layer.weights()[0])[0].numel()
        if terms * of_input * of_weight > _LARGEST_SUM:
            return f"its sums of {terms} products may not fit into 32 bits"
        return None

    def _weights(
        self, name: str, layer: QuantLayer, used: list[Tensor], unsigned: bool
    ) -> Sequence[Weight | FloatWeight]:
        """Those of each call; why they are no codes goes to ``floats``."""
        quantizer = stand_ins.active(layer.weight_quantizer)
        if quantizer is None or not used:
            reason = "it is not called on the example, or other code reads its weight"
            self.floats[name] = "its weight is not quantized" if quantizer is None else reason
            return []
        if getattr(layer, "max_norm", None) is not None:
            raise ValueError(
                f"layer {name!r}: got an embedding with max_norm, which changes its weight as it "
                "is used; takes one without"
            )
        by_channel = [layer.by_channel(weight.detach()) for weight in used]
        with torch.no_grad():
            try:
                made = [Weight(quantizer, weight, unsigned) for weight in by_channel]
            except ValueError as error:
                self.floats[name] = str(error)
                return [FloatWeight(quantizer(weight)) for weight in by_channel]
        found = []
        for weight, new in zip(used, made, strict=True):
            # Several layers may have one weight, and a layer may be called several times.
            other = self._of_parameters.setdefault(id(weight), new)
            found.append(other if other.equals(new) else new)
            if not any(found[-1] is known for known in self.weights.values()):
                keys = [key for key, own in layer._parameters.items() if own is weight]
                key = f"{name}.{(keys or ['weight'])[0]}".lstrip(".")
                self.weights[_new(key, self.weights)] = found[-1]
        return found


def _of_inputs(layer: QuantLayer) -> dict[str, Quantizer]:
    return {k: q for k, q in layer.quantizers().items() if k != "weight_quantizer"}


def _new(key: str, names: dict[str, Any]) -> str:
    keys = itertools.chain([key], (f"{key}_{i}" for i in itertools.count(1)))
    return next(k for k in keys if k not in names)


def _recording(layer: QuantLayer, method: Callable, used: list[Tensor]) -> Callable:
    def record(weight: Tensor | None = None) -> Any:
        weight = layer.weights()[0] if weight is None else weight
        used.append(weight)
        return method(weight)

    return record


def _values(layer: QuantLayer, of_call: Callable[[], nn.Module]) -> Callable:
    """Stands for the method `quantized_weight`."""

    def values(weight: Tensor | None = None) -> Tensor:
        weight = layer.weights()[0] if weight is None else weight
        return layer.from_channels(of_call()(), weight)

    return values


def _codes(layer: QuantLayer, of_call: Callable[[], Weight]) -> Callable:
    """Stands for the method `weight_codes`."""

    def codes(weight: Tensor | None = None) -> Codes:
        weight, made = layer.weights()[0] if weight is None else weight, of_call()
        return made.in_product(layer.from_channels(made.codes, weight))

    return codes


def _norm(layer: QuantLayer, weight: Any) -> Norm:
    """The batch norm that follows, as constants where the scale of the input is one."""
    norm: Any = layer.norm[0]
    scale = getattr(layer.input_quantizer, "scale", None)
    if scale is None:
        return Norm(norm, None)
    with torch.no_grad():
        return Norm(norm, norm._line(scale * weight.of_channels(), layer.bias, 1, None)[:2])
