"""Quantization-aware training (Tallec et al. 2023, arXiv 2303.11803, section 3.1)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

import noisyq_fast
from experiments.checks import require, require_whole
from experiments.methods.method import Method
from noisyq_fast.grouped import PER_GROUP


@dataclass(frozen=True)
class Quant(Method):
    """Quantizes weights and activations in every layer; the first and the last keep 8 bits."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"weight_bits": 4, "activation_bits": 4}

    weight_bits: int | None = None
    """quant: bits of the weights, 2 to 8 (4); always 8 in the first and the last layer."""

    activation_bits: int | None = None
    """quant: bits of each layer's input, 2 to 8 (4); always 8 in the first and the last layer."""

    averaging_constant: float = 0.01
    """quant: weight of a batch in the moving average of each input's range."""

    def __post_init__(self) -> None:
        for name in self.DEFAULTS:
            require_whole(name, getattr(self, name), 2, 8)
        constant = self.averaging_constant
        require("averaging_constant", constant, 0 < constant <= 1, "a number above 0, up to 1")

    @property
    def label(self) -> str:
        return f"quant-w{self.weight_bits}a{self.activation_bits}"

    def evaluation_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.DEFAULTS}

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        return noisyq_fast.quantize_model_(
            model,
            weight_bits=self.weight_bits,
            activation_bits=self.activation_bits,
            averaging_constant=self.averaging_constant,
            example=example,
            input_ranges=getattr(model, "input_ranges", PER_GROUP),
        )
