"""The quantizers of AQD (Chen et al. 2020, arXiv 2007.06919)."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from noisyq_fast import rules
from noisyq_fast.backends.reference.learned import sum_of_groups
from noisyq_fast.grid import ODD, UNSIGNED
from noisyq_fast.integer.codes import Codes
from noisyq_fast.operators import checks
from noisyq_fast.quantizers.learned import WEIGHT, LearnedQuantizer, quotient
from noisyq_fast.quantizers.quantizer import Quantizer


class AQD(LearnedQuantizer):
    """Learns a clipping level a. Inputs are rounded to ``n = 2^b - 1`` steps from 0 to a; weights
    to ``2^b`` levels from -a to a, with an a for each output channel: ``y = a (2 r / n - 1)`` with
    ``r = rint(n (clip(w / a, -1, 1) + 1) / 2)``. 0 is no level, so pruned weights do not stay 0.
    Inputs with values below 0 (``signed=True``) are rounded like weights.

    a is initialized to the largest ``|x|``; the authors' code uses its running mean over the first
    steps. A convolution pads after the quantizer, with exact zeros.

    Args:
        bits: width of the codes, 2..8.
        axis: one clipping level for each index of this axis of a weight; ``None``: one.
        signed: as for `LearnedQuantizer`.
        standardize: whether weights are replaced by ``(w - mean) / (std + 1e-5)`` before clipping,
            an option of the authors' code. Mean and deviation are over the whole weight
            (unverified) and have no gradient. The outputs are not scaled back, so a batch norm has
            to follow; the first and the last layers of a model do not standardize.

    Attributes:
        clip: the parameter a.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.AQD(bits=2, axis=None, signed=True)
        >>> quantizer(torch.tensor([3.0, 0.4, -1.7])).detach()
        tensor([ 3.,  1., -1.])
    """

    KIND: ClassVar[int] = 6

    clip: nn.Parameter

    def __init__(
        self,
        bits: int = 4,
        axis: int | None = 0,
        *,
        signed: bool | None = None,
        standardize: bool = False,
    ) -> None:
        checks.boolean("standardize", standardize)
        self.standardize = standardize
        super().__init__(bits, axis, signed=signed)

    @property
    def rule(self) -> str:
        return rules.AQD_ODD if self.is_signed else rules.AQD

    @property
    def code_ends(self) -> tuple[int, int]:
        n = (1 << self.bits) - 1
        return -n if self.is_signed else 0, n

    def fake_quantize(self, x: Tensor) -> Tensor:
        return super().fake_quantize(self._standardized(x))

    def codes(self, x: Tensor) -> Codes:
        return super().codes(self._standardized(x))

    def _standardized(self, x: Tensor) -> Tensor:
        """Mean and deviation are from sums in the order of `noisyq_fast.rules`: equal on all
        backends."""
        if not self.standardize or self.role != WEIGHT or x.numel() == 0:
            return x
        with torch.no_grad():
            n = float(x.numel())
            mean = quotient(sum_of_groups(x.float(), x, None), n)
            squares = (x.float() - mean).square()
            variance = quotient(sum_of_groups(squares, x, None), max(n - 1, 1))
            spread = variance.sqrt() + 1e-5
        return ((x.float() - mean) / spread).to(x.dtype)

    def initial(self, x: Tensor) -> tuple[Tensor]:
        return (self.largest(x.abs()),)

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor]:
        return (high,)

    @property
    def grid_of_codes(self) -> str:
        return ODD if self.is_signed else UNSIGNED

    def scale_of(self, weight: Tensor) -> Tensor:
        """The scale of the codes of a weight."""
        self.prepare(weight)
        return self.code_scale()

    def code_scale(self) -> Tensor:
        clip = self.clip.detach().float()
        return quotient(clip, float(self.code_ends[1])).clamp(min=torch.finfo(torch.float32).tiny)

    def at_end(self, bits: int, place: str) -> Quantizer:
        quantizer: Any = super().at_end(bits, place)
        quantizer.standardize = False
        return quantizer

    def _variant(self) -> int:
        return int(self.standardize)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", standardize=True" if self.standardize else "")
