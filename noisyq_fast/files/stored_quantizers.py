"""Quantizers in files: their class and arguments; and weights as packed codes, with the quantizer
that restores their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.files.packing import pack_codes, unpack_codes
from noisyq_fast.grid import UNSIGNED, Grid
from noisyq_fast.quantizers import (
    AQD,
    DSQ,
    LSQ,
    PACT,
    QIL,
    SAT,
    AbsMax,
    EvenlySpaced,
    Fixed,
    LearnedQuantizer,
    MovingAbsMax,
    Quantizer,
)

_ARGUMENTS: dict[type[Quantizer], dict[str, str]] = {
    MovingAbsMax: {"grid": "grid_kind"}
    | {name: name for name in ("bits", "axis", "averaging_constant", "ste")},
    AbsMax: {"grid": "grid_kind"} | {name: name for name in ("bits", "axis", "group_size")},
    LSQ: {name: name for name in ("bits", "axis", "signed", "symmetric", "gradient")},
    PACT: {name: name for name in ("bits", "start", "gradient")},
    SAT: {name: name for name in ("bits", "rounding", "rescale")},
    QIL: {"bits": "bits", "exponent": "learns_exponent"},
    DSQ: {"bits": "bits", "alpha": "first_alpha", "learn_alpha": "learn_alpha"},
    AQD: {name: name for name in ("bits", "axis", "signed")},
}
"""The quantizers of inputs that a file can name: their arguments, and the attributes with these."""
_KINDS = {kind.__name__: kind for kind in _ARGUMENTS}


def describe(quantizer: Quantizer, of: str) -> dict[str, Any]:
    """The arguments of `make` for a quantizer. Its buffers and parameters are stored unchanged."""
    kind = type(quantizer)
    if kind not in _ARGUMENTS:
        raise ValueError(f"got {quantizer} for its {of}, takes one of {', '.join(_KINDS)}")
    about: dict[str, Any] = {"kind": kind.__name__}
    about |= {name: getattr(quantizer, where) for name, where in _ARGUMENTS[kind].items()}
    if isinstance(quantizer, LearnedQuantizer):
        about["initialized"] = quantizer.initialized
    return about


def make(about: Mapping[str, Any], ranges: int | None = None) -> Quantizer:
    """A new quantizer with this number of ranges along its axis."""
    kind = _KINDS[about["kind"]]
    options = {name: about[name] for name in _ARGUMENTS[kind]}
    if kind is MovingAbsMax and about["axis"] is not None:
        options["ranges"] = ranges
    return kind(**options)


# Weights.


def store(
    quantizer: Quantizer, weight: Tensor, values: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Stores a weight, output channels first, and its quantized values as a description and
    tensors, which `restore` takes."""
    quantizer = given_values(quantizer, weight)
    if not torch.equal(quantizer(values), values):
        raise ValueError(
            f"got {quantizer} for its weight, whose values are too close to each other for "
            f"{values.dtype}; takes fewer bits, or a larger range"
        )
    about = {name: getattr(quantizer, name) for name in ("bits", "axis")}
    if isinstance(quantizer, EvenlySpaced):
        codes = pack_codes(quantizer.indices(values), Grid(quantizer.bits, UNSIGNED))
        about["centered"] = quantizer.centered
        return about, {"codes": codes, "step": quantizer.step, "offset": quantizer.offset}
    about |= {"grid": quantizer.grid_kind, "group_size": quantizer.group_size}
    codes = pack_codes(quantizer.codes(values).codes, quantizer.grid)
    tensors = {"codes": codes, "scale": quantizer.scale}
    if quantizer.zero_point is not None:
        tensors["zero_point"] = quantizer.zero_point
    return about, tensors


def restore(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Fixed | EvenlySpaced:
    """The quantizer of a stored weight."""
    if "centered" in about:
        options = {name: about[name] for name in ("bits", "axis", "centered")}
        return EvenlySpaced(tensors["step"], tensors["offset"], **options)
    options = {name: about[name] for name in ("bits", "axis", "grid", "group_size")}
    return Fixed(tensors["scale"], zero_point=tensors.get("zero_point"), **options)


def stored_values(quantizer: Fixed | EvenlySpaced, packed: Tensor, shape: torch.Size) -> Tensor:
    """The dequantized values of the codes, float32."""
    if isinstance(quantizer, EvenlySpaced):
        return quantizer.values_of(unpack_codes(packed, Grid(quantizer.bits, UNSIGNED), shape))
    return quantizer.values_of(unpack_codes(packed, quantizer.grid, shape))


@torch.no_grad()
def given_values(quantizer: Quantizer, weight: Tensor) -> Fixed | EvenlySpaced:
    """A quantizer with fixed values: those to which another quantizer rounds a weight."""
    bits, axis = quantizer.bits, quantizer.axis
    if isinstance(quantizer, EvenlySpaced):
        return quantizer
    if isinstance(quantizer, DSQ):
        quantizer.prepare(weight)
        return EvenlySpaced(quantizer.code_step(), quantizer.low, bits)
    if isinstance(quantizer, AQD | SAT) and not quantizer.gives_codes:  # -255, -253 .. 255
        assert not isinstance(axis, str)  # neither has tokens
        step = 2 * quantizer.scale_of(weight)
        return EvenlySpaced(step, bits=bits, axis=axis, centered=True)
    if not quantizer.gives_codes:
        raise ValueError(f"got {quantizer} for its weight, takes a quantizer that gives codes")
    codes = quantizer.codes(weight)
    options: dict[str, Any] = {"grid": quantizer.grid_of_codes, "group_size": quantizer.group_size}
    return Fixed(codes.scale, bits, axis, zero_point=codes.zero_point, **options)
