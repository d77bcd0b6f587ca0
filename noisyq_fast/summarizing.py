"""Which parts of a network are quantized, which are float, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from noisyq_fast.conversion.classes import check_not_lazy, why_not_quantized
from noisyq_fast.counting import Work, count, parameters_of
from noisyq_fast.integer.batch_norm import ExactBatchNorm
from noisyq_fast.layers.adder import AdderConv2d, AdderLinear
from noisyq_fast.layers.layer import INTEGER, QuantLayer
from noisyq_fast.layers.linear import QuantEmbedding
from noisyq_fast.quantizers import Quantizer
from noisyq_fast.running import in_evaluation

_SCALE_BITS = 32
_ZERO_POINT_BITS = 8


@dataclass(frozen=True)
class LayerSummary:
    """One layer: a module with parameters or buffers of its own.

    Attributes:
        name: its name in the model; empty for the model itself.
        kind: its class; in brackets the parametrizations (`torch.nn.utils.parametrize`).
        weight_bits, activation_bits: bits of weights and inputs; ``None`` if float.
        weight_grid, activation_grid: the grid, and what has a scale of its own, such as
            ``"signed channel"``; empty if float.
        calls: the number of calls in a forward.
        macs: multiply-accumulates with its weights.
        quantized_macs: those of ``macs`` with quantized weights and quantized inputs.
        additions: those of ``macs`` without a multiplication (`AdderConv2d` and `AdderLinear`).
        parameters: the number of trained values. Values shared by layers count at the first.
        quantized_parameters: those of ``parameters`` that are quantized.
        size_in_bits: the storage for inference: quantized weights at their width, a float32 scale
            for each channel (or tensor, or group; plus 8 bits for a zero point), a float32 range
            for each input range, all else at its own width. A weight that is computed from smaller
            tensors counts with the size of these. Shared tensors count at the first layer.
        why_float: why it, or a part of it, is float; empty if it is quantized.
        arithmetic: ``"integer"`` if it multiplies codes, ``"exact"`` for a batch norm that takes
            its statistics from exact sums, else ``"float"``.
        chain: the operations after it in its chain, from `fuse_`; or, if ``arithmetic="integer"``
            was requested but cannot be used, the reason.
    """

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    weight_grid: str
    activation_grid: str
    calls: int
    macs: int
    quantized_macs: int
    parameters: int
    quantized_parameters: int
    size_in_bits: int
    why_float: str
    arithmetic: str = "float"
    chain: str = ""
    additions: int = 0


@dataclass(frozen=True)
class OperatorSummary:
    """An operator that computes in float outside of the layers, such as the products of attention,
    additions and poolings: its name in PyTorch, how often a forward calls it, and its
    multiply-accumulates."""

    name: str
    calls: int
    macs: int


@dataclass(frozen=True)
class Summary:
    """What `summary` returns; `print` shows it as a table.

    Attributes:
        layers: in the order of execution; those that are not called last.
        operators: operators outside of layers, in the order of execution.
        float_size_in_bits: the storage for inference without quantization.
        macs, quantized_macs, additions, parameters, quantized_parameters, size_in_bits: sums over
            the layers; ``macs`` includes the operators.
    """

    layers: tuple[LayerSummary, ...]
    operators: tuple[OperatorSummary, ...]
    float_size_in_bits: int

    @property
    def macs(self) -> int:
        return self._sum("macs") + sum(operator.macs for operator in self.operators)

    @property
    def quantized_macs(self) -> int:
        return self._sum("quantized_macs")

    @property
    def additions(self) -> int:
        return self._sum("additions")

    @property
    def parameters(self) -> int:
        return self._sum("parameters")

    @property
    def quantized_parameters(self) -> int:
        return self._sum("quantized_parameters")

    @property
    def size_in_bits(self) -> int:
        return self._sum("size_in_bits")

    def _sum(self, column: str) -> int:
        return sum(getattr(layer, column) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as dicts, lists, numbers and strings, for JSON or a data frame."""
        sums = (
            *("macs", "quantized_macs", "additions"),
            *("parameters", "quantized_parameters", "size_in_bits"),
        )
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in sums}

    def __str__(self) -> str:
        return _text(self)


def summary(model: nn.Module, example: Any) -> Summary:
    """Which parts of a model are quantized: its layers in the order of execution, with their
    widths, grids, calls, multiply-accumulates (MACs) and sizes; then the float parts, with the
    reason.

    The model runs once on the example, in float and in evaluation mode, and is left unchanged:
    ranges, statistics of batch norm, gradients, modes, hooks, and PyTorch's random state.

    Args:
        model: any module, converted or not.
        example: an input of the model (a tensor, a tuple of arguments or a dict of keyword
            arguments), with as many samples as MACs are to be counted for: usually one.

    Returns:
        A `Summary`: ``print`` shows a table; ``layers``, ``operators`` and ``to_dict()`` have the
        numbers.

    MACs are counted where PyTorch computes them, by the formulas of `torch.utils.flop_counter`.
    MACs belong to a layer if its weight is an operand, and are quantized if its weight and its
    input are. Those of an `AdderConv2d` or `AdderLinear` are additions of absolute differences.
    Products of two activations, as in attention, and additions, poolings and the like are listed as
    operators; they are float. For additions, poolings and the like only calls are counted.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model does not run on the example, or is lazy and has not run yet.

    Example:
        >>> import torch, noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 9))
        >>> model = noisyq_fast.quantize_model_(model, first_last_bits=None)
        >>> print(noisyq_fast.summary(model, torch.randn(1, 3, 8, 8)))
        layer  kind         weight            input            calls   MACs  params      size  float
        --------------------------------------------------------------------------------------------
        0      QuantConv2d  4 signed channel  4 signed tensor      1  75.0%     224     176 B
        3      QuantLinear  4 signed channel  4 signed tensor      1  25.0%   2,601  1.34 KiB
        relu   operator     float             float                1
        --------------------------------------------------------------------------------------------
        quantized: 100.0% of 10,368 MACs, 99.4% of 2,825 parameters; 1.512 KiB, as float 11.04 KiB
        float, biases and the like: 0.0% of the MACs, 0.6% of the parameters (of quantized layers)
        float, not in a layer: 0.0% of the MACs, 0.0% of the parameters (relu x1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    check_not_lazy(dict(model.named_modules()))
    layers = {name: m for name, m in model.named_modules() if _has_state(name, m)}
    work = count(model, layers, example)
    any_quantized = any(isinstance(layer, QuantLayer) for layer in layers.values())
    names = list(dict.fromkeys([*work.order, *layers]))
    stored = _Stored()
    with in_evaluation(model):  # some layers compute their weight at each access
        rows = [_row(name, layers[name], work, stored, any_quantized) for name in names]
    return Summary(
        layers=tuple(rows),
        operators=tuple(
            OperatorSummary(name, calls, work.operator_macs[name])
            for name, calls in work.operators.items()
        ),
        float_size_in_bits=stored.float_bits,
    )


def _has_state(name: str, module: nn.Module) -> bool:
    if isinstance(module, Quantizer) or "parametrizations" in name.split("."):
        return False
    return bool(isinstance(module, QuantLayer) or parameters_of(module) or _buffers(module))


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that inference needs: in the state dict, and floating-point."""
    temporary = module._non_persistent_buffers_set
    return {
        name: buffer
        for name, buffer in module.named_buffers(recurse=False)
        if name not in temporary and buffer.is_floating_point()
    }


class _Stored:
    """What was counted so far, so that shared tensors count once."""

    def __init__(self) -> None:
        self.widths: dict[int, tuple[Tensor, set[int | None]]] = {}
        """By id: a tensor, which is kept so that the id stays its own, and its widths in
        storage."""
        self.parameters: set[int] = set()
        self.float_bits = 0

    def count(self, parameters: Iterable[nn.Parameter]) -> int:
        """The number of elements of the parameters that were not counted before."""
        new = {id(p): p.numel() for p in parameters if id(p) not in self.parameters}
        self.parameters |= new.keys()
        return sum(new.values())

    def add(
        self,
        x: Tensor,
        bits: int | None = None,
        scale_bits: int = 0,
        made_of: Sequence[Tensor] = (),
    ) -> int:
        """The bits that a tensor adds to the storage: its own, or those of the tensors that it is
        computed from, whichever are fewer."""
        float_bits = sum(8 * part.element_size() * part.numel() for part in made_of or [x])
        if id(x) not in self.widths:
            self.widths[id(x)] = x, set()
            self.float_bits += float_bits
        _, widths = self.widths[id(x)]
        if bits in widths:
            return 0
        widths.add(bits)
        if bits is None:
            return float_bits
        return min(bits * x.numel(), float_bits) + scale_bits


def _row(
    name: str, layer: nn.Module, work: Work, stored: _Stored, any_quantized: bool
) -> LayerSummary:
    weight, activation = _active(layer, "weight"), _active(layer, "input")
    if work.macs_outside[name] and not work.calls[name]:
        weight = activation = None  # the layer itself does not compute
    own = parameters_of(layer)
    state = own | _buffers(layer)
    learned = [p for q in _quantizers(layer) for p in q.parameters()]
    arithmetic, chain = _arithmetic(layer)
    bits, quantized = 0, 0
    if weight is not None and isinstance(layer, QuantLayer):
        weights = layer.weights()
        each = _SCALE_BITS + (_ZERO_POINT_BITS if weight.grid.is_affine else 0)
        made = {key for key, x in state.items() if _makes_weight(key, x, weights)}
        # At most one weight is computed from other tensors.
        parts = [] if len(weights) > 1 else [state[key] for key in made]
        for w in weights:
            scale_bits = each * weight.scales(layer.by_channel(w))
            bits += stored.add(w, weight.bits, scale_bits, parts)
        quantized = stored.count(own[key] for key in made & own.keys())
        state = {key: x for key, x in state.items() if key not in made}
    of_range = [p for q in _quantizers(layer) if q.keeps_range for p in q.parameters()]
    others = [p for p in learned if not any(p is r for r in of_range)]
    bits += sum(map(stored.add, [*state.values(), *others]))
    for quantizer in _quantizers(layer):
        if quantizer.enabled and quantizer.keeps_range and quantizer is not weight:
            bits += _SCALE_BITS * quantizer.range.numel()
    fully = weight is not None and activation is not None
    return LayerSummary(
        name=name,
        kind=_kind(layer),
        weight_bits=None if weight is None else weight.bits,
        activation_bits=None if activation is None else activation.bits,
        weight_grid="" if weight is None else weight.form,
        activation_grid="" if activation is None else activation.form,
        calls=work.calls[name],
        macs=work.macs[name] + work.macs_outside[name],
        quantized_macs=work.macs[name] if fully else 0,
        parameters=quantized + stored.count([*own.values(), *learned]),
        quantized_parameters=quantized,
        size_in_bits=bits,
        why_float=_why_float(name, layer, work, any_quantized),
        arithmetic=arithmetic,
        chain=chain,
        additions=work.macs[name] if isinstance(layer, AdderConv2d | AdderLinear) else 0,
    )


def _kind(layer: nn.Module) -> str:
    name = type(layer).__name__
    if not is_parametrized(layer):
        return name
    parametrizations: Any = layer.parametrizations
    makers = [type(m).__name__.strip("_") for made in parametrizations.values() for m in made]
    return f"{name.removeprefix('Parametrized')} ({', '.join(makers)})"


def _arithmetic(layer: nn.Module) -> tuple[str, str]:
    if isinstance(layer, ExactBatchNorm) and layer.follows:
        return "exact", ""
    if not isinstance(layer, QuantLayer) or layer.arithmetic != INTEGER:
        return "float", ""
    why_float = layer.why_float()
    return ("integer", layer.followed_by) if why_float is None else ("float", why_float)


def _quantizers(layer: nn.Module) -> list[Quantizer]:
    return list(layer.quantizers().values()) if isinstance(layer, QuantLayer) else []


def _active(layer: nn.Module, kind: str) -> Quantizer | None:
    quantizer = getattr(layer, f"{kind}_quantizer", None) if _quantizers(layer) else None
    return quantizer if quantizer is not None and quantizer.enabled else None


def _makes_weight(name: str, x: Tensor, weights: Iterable[Tensor]) -> bool:
    """Whether ``x`` is the weight, or a tensor from which pruning, weight norm and the like compute
    it."""
    if any(x is w for w in weights):
        return True
    made = not any(isinstance(w, nn.Parameter) for w in weights)
    return made and name.removeprefix("parametrizations.").startswith("weight")


def _why_float(name: str, layer: nn.Module, work: Work, any_quantized: bool) -> str:
    reasons = []
    if isinstance(layer, QuantLayer):
        for kind in ("weight", "input"):
            quantizer = getattr(layer, f"{kind}_quantizer")
            if quantizer is None and not (kind == "input" and isinstance(layer, QuantEmbedding)):
                reasons.append(f"{kind} without a quantizer")
            elif quantizer is not None and not quantizer.enabled:
                reasons.append(f"{kind} quantizer disabled")
    else:
        why_not = why_not_quantized(layer)
        kept = "kept float" if any_quantized else "not converted"
        reasons.append("no quantized form" if why_not is None else why_not or kept)
    if work.macs_outside[name]:
        reasons.append("its weight is read by other code")
    elif not work.calls[name]:
        reasons.append("not called on the example")
    return "; ".join(reasons)


# The table.


def _text(summary: Summary) -> str:
    header = ["layer", "kind", "weight", "input", "calls", "MACs", "params", "size", "float"]
    any_exact = any(layer.arithmetic != "float" or layer.chain for layer in summary.layers)
    rows: list[tuple[str, ...]] = [
        (
            layer.name or "(model)",
            layer.kind,
            _width(layer.weight_bits, layer.weight_grid, layer),
            _width(layer.activation_bits, layer.activation_grid, layer),
            str(layer.calls),
            _cell(layer.macs, summary.macs),
            f"{layer.parameters:,}",
            _bytes(layer.size_in_bits),
            layer.why_float,
            _product(layer),
        )
        for layer in summary.layers
    ]
    rows += [
        (
            op.name,
            "operator",
            "float",
            "float",
            str(op.calls),
            _cell(op.macs, summary.macs),
            "",
            "",
            "",
            "",
        )
        for op in summary.operators
    ]
    if any_exact:
        header.append("arithmetic")
    rows = [row[: len(header)] for row in rows]
    right = {4, 5, 6, 7}
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule, *_sums(summary)])


def _product(layer: LayerSummary) -> str:
    return f"{layer.arithmetic}: {layer.chain}" if layer.chain else layer.arithmetic


def _sums(summary: Summary) -> list[str]:
    quantized = (
        f"quantized: {_share(summary.quantized_macs, summary.macs)} of {summary.macs:,} MACs, "
        f"{_share(summary.quantized_parameters, summary.parameters)} of {summary.parameters:,} "
        f"parameters; {_bytes(summary.size_in_bits)}, as float "
        f"{_bytes(summary.float_size_in_bits)}"
    )
    lines = [quantized]
    if any(layer.arithmetic == "integer" for layer in summary.layers):
        exact = sum(x.quantized_macs for x in summary.layers if x.arithmetic == "integer")
        norms = sum(layer.arithmetic == "exact" for layer in summary.layers)
        lines.append(
            f"exact, the same bits on every backend: {_share(exact, summary.macs)} of the MACs, "
            f"in integers; batch norm x{norms}"
        )
    if summary.additions:
        share = _share(summary.additions, summary.macs)
        lines.append(f"additions without a multiplication: {share} of the MACs")
    reasons: dict[str, list[LayerSummary]] = {}
    for layer in summary.layers:
        if layer.why_float:
            reasons.setdefault(layer.why_float, []).append(layer)
    for reason, layers in reasons.items():
        macs = sum(layer.macs - layer.quantized_macs for layer in layers)
        numbers = sum(layer.parameters - layer.quantized_parameters for layer in layers)
        lines.append(_line(reason, macs, numbers, _kinds(layer.kind for layer in layers), summary))
    biases = sum(x.parameters - x.quantized_parameters for x in summary.layers if not x.why_float)
    if biases:
        lines.append(_line("biases and the like", 0, biases, "of quantized layers", summary))
    if summary.operators:
        macs = sum(operator.macs for operator in summary.operators)
        names = ", ".join(f"{op.name} x{op.calls}" for op in summary.operators)
        lines.append(_line("not in a layer", macs, 0, names, summary))
    return lines


def _line(reason: str, macs: int, parameters: int, what: str, summary: Summary) -> str:
    return (
        f"float, {reason}: {_share(macs, summary.macs)} of the MACs, "
        f"{_share(parameters, summary.parameters)} of the parameters ({what})"
    )


def _kinds(kinds: Iterable[str]) -> str:
    return ", ".join(f"{kind} x{count}" for kind, count in Counter(kinds).items())


def _width(bits: int | None, grid: str, layer: LayerSummary) -> str:
    if bits is None:
        return "float" if layer.why_float else ""  # the input of an embedding: indices
    return f"{bits} {grid}"


def _cell(macs: int, all_macs: int) -> str:
    return _share(macs, all_macs) if macs else ""


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


def _bytes(bits: int) -> str:
    size = bits / 8
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
