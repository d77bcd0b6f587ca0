"""Outlier channel splitting (Zhao et al. 2019, arXiv 1901.09504)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

import noisyq_fast
from experiments.checks import require
from experiments.methods.post_training import PostTraining


@dataclass(frozen=True)
class OCS(PostTraining):
    """Trains a float network, and then splits the input channels with the largest weights, and
    those with the largest values, into two of half the size.

    All weights of a layer that is split share a scale. Input ranges are the largest values in 256
    of the images that it was trained on, without their labels. The first layer is not split; it and
    the last have 8 bits, as with quant. The network grows: parameters and multiplications are
    reported. Scores are of the quantized network; those of the float one are in result.json, as
    float_.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"ocs_bits": 4}

    ocs_bits: int | None = None
    """Bits of weights and inputs, 2 to 8; always 8 in the first and the last layer."""

    ocs_ratio: float = 0.02
    """Share of the input channels of each layer that are split by their weights, 0 to 1, at least
    one channel unless it is 0."""

    ocs_activation_ratio: float = 0.0
    """The same by their values."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("ocs_ratio", "ocs_activation_ratio"):
            share = getattr(self, name)
            require(name, share, 0 <= share <= 1, "a share from 0 to 1")

    @property
    def label(self) -> str:
        values = f"-{self.ocs_activation_ratio:g}" if self.ocs_activation_ratio else ""
        return f"{super().label}-{self.ocs_ratio:g}{values}"

    def quantize(self, model: nn.Module, inputs: list[Tensor]) -> nn.Module:
        return noisyq_fast.ocs(
            model,
            inputs,
            ratio=self.ocs_ratio,
            activation_ratio=self.ocs_activation_ratio,
            **self.widths(),
        )
