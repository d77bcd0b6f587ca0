"""EasyQuant (Wu et al. 2020, arXiv 2006.16669)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

import noisyq_fast
from experiments.methods.post_training import PostTraining


@dataclass(frozen=True)
class EasyQuant(PostTraining):
    """Trains a float network, and then searches scales for weights and inputs with which its
    layers, one after the other, give outputs in the direction of the float ones.

    With 256 of the images that it was trained on, without their labels. The first and the last
    layer have 8 bits, as with quant, and inputs the same signed levels. Scores are of the quantized
    network; those of the float one are in result.json, as float_.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"easyquant_bits": 4}

    easyquant_bits: int | None = None
    """Bits of weights and inputs, 2 to 8; always 8 in the first and the last layer."""

    def quantize(self, model: nn.Module, inputs: list[Tensor]) -> nn.Module:
        return noisyq_fast.easyquant(model, inputs, **self.widths())
