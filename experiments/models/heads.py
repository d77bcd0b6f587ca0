"""What tells action units (AUs) from the features of a face: one layer of logits on top of two
hidden ones, as in the "vanilla" networks of arXiv 2303.11803, section 4.2."""

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.normalized_linear import FoldedNormLinear, NormalizedLinear
from noisyq_fast import GroupedLinear

AU_NORMS = ("per-au", "shared", "folded")
_WIDTH = 64


class SharedHead(nn.Sequential):
    """Hidden layers that all AUs share: from `[B, features]` to logits `[B, aus]`."""

    def __init__(self, features: int, aus: int) -> None:
        super().__init__(
            nn.Linear(features, _WIDTH),
            nn.ReLU(),
            nn.BatchNorm1d(_WIDTH),
            nn.Linear(_WIDTH, _WIDTH),
            nn.ReLU(),
            nn.BatchNorm1d(_WIDTH),
            nn.Linear(_WIDTH, aus),
        )


class PerAUHead(nn.Module):
    """Hidden layers of its own for each AU, only the first with a ReLU: from `[B, features]` to
    logits `[B, aus]`.

    Args:
        features: size of the input.
        aus: how many AUs.
        norm: of the hidden layers. "per-au": batch norm with statistics and affine of its own for
            every AU and unit; "shared": one for every unit, over the samples of all AUs; "folded":
            the function of "per-au", but folded into the weights of the layer after, which are then
            quantized with it.

    Raises:
        ValueError: a `norm` of another name.
    """

    def __init__(self, features: int, aus: int, norm: str) -> None:
        super().__init__()
        if norm not in AU_NORMS:
            raise ValueError(f"norm: got {norm!r}, takes one of {', '.join(AU_NORMS)}")
        self.aus = aus
        self.norm = norm
        # A layer for each AU, in the form that is fast where all have the same input.
        self.hidden1 = nn.Linear(features, aus * _WIDTH)
        self.hidden2 = self._normalized(_WIDTH)
        self.logits = self._normalized(1)

    def _normalized(self, outputs: int) -> NormalizedLinear:
        module = FoldedNormLinear if self.norm == "folded" else NormalizedLinear
        norm = nn.BatchNorm1d(_WIDTH if self.norm == "shared" else self.aus * _WIDTH)
        return module(norm, GroupedLinear(self.aus, _WIDTH, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.hidden1(x)).unflatten(1, (self.aus, _WIDTH))
        return self.logits(self.hidden2(x)).squeeze(-1)
