"""Bit-split and stitching (Wang et al., ICML 2020)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

import noisyq_fast
from experiments.methods.post_training import PostTraining


@dataclass(frozen=True)
class BitSplit(PostTraining):
    """Trains a float network, and then finds the codes of weights bit by bit, with the least error
    in what layers compute, each behind those that are quantized already.

    With 256 of the images that it was trained on, without their labels. The first and the last
    layer have 8 bits, as with quant, and inputs the same signed levels, where the paper's are 8
    bits above 0. Batch norms are folded; their statistics are not estimated anew. Scores are of the
    quantized network; those of the float one are in result.json, as float_.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"bitsplit_bits": 4}
    LEAST_BITS: ClassVar[int] = 3

    bitsplit_bits: int | None = None
    """Bits of weights and inputs, 3 to 8; always 8 in the first and the last layer."""

    def quantize(self, model: nn.Module, inputs: list[Tensor]) -> nn.Module:
        return noisyq_fast.bitsplit(model, inputs, **self.widths())
