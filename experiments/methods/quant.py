"""Quantization-aware training (Tallec et al. 2023, arXiv 2303.11803)."""

from dataclasses import dataclass

from torch import nn

import noisyq_fast
from experiments.methods.baseline import Baseline


@dataclass(frozen=True)
class Quant(Baseline):
    """Quantizes weights and activations in every layer; the first and the last keep 8 bits."""

    weight_bits: int
    activation_bits: int

    @property
    def label(self) -> str:
        return f"quant-w{self.weight_bits}a{self.activation_bits}"

    def model(self, model: nn.Module) -> nn.Module:
        return noisyq_fast.quantize_model_(
            model, weight_bits=self.weight_bits, activation_bits=self.activation_bits
        )
