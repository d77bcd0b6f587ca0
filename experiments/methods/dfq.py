"""Data-free quantization (Nagel et al. 2019, arXiv 1906.04721)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

import noisyq_fast
from experiments.methods.post_training import PostTraining


@dataclass(frozen=True)
class DFQ(PostTraining):
    """Trains a float network, then makes its channels equal in size, quantizes it with one scale
    for the weights of a layer, and corrects biases by what batch norms tell.

    Images tell the range of the network's input, and of what no batch norm tells: the 256 that the
    other post-training methods see, without labels. The first and the last layer have 8 bits, as
    with quant. Scores are of the quantized network; those of the float one are in result.json, as
    float_.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"dfq_bits": 4}

    dfq_bits: int | None = None
    """Bits of weights and inputs, 2 to 8; always 8 in the first and the last layer."""

    dfq_correction: bool = True
    """Take the mean error of weights off the biases."""

    @property
    def label(self) -> str:
        return super().label + ("" if self.dfq_correction else "-uncorrected")

    def quantize(self, model: nn.Module, inputs: list[Tensor]) -> nn.Module:
        return noisyq_fast.dfq(model, inputs, correct=self.dfq_correction, **self.widths())
