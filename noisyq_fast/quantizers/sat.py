"""The weights of DoReFa-Net (Zhou et al. 2016, arXiv 1606.06160), with the scale of scale-adjusted
training (Jin et al. 2019, arXiv 1912.10207)."""

import math
from typing import ClassVar

import torch
from torch import Tensor

from noisyq_fast import rules
from noisyq_fast.backends.reference.levels import scale_of_codes
from noisyq_fast.grid import FULL, ODD
from noisyq_fast.integer.codes import Codes
from noisyq_fast.operators import checks, gradients
from noisyq_fast.operators.learned import fake_quantize_learned, quantize_learned
from noisyq_fast.quantizers.learned import quotient, source_of_codes
from noisyq_fast.quantizers.quantizer import Quantizer

ROUNDINGS = {
    "modified": rules.DOREFA_MODIFIED,
    "centered": rules.DOREFA_CENTERED,
    "original": rules.DOREFA_ORIGINAL,
}


class SAT(Quantizer):
    """For weights: rounds ``tanh(w) / max|tanh w|`` to levels Q from -1 to 1. It has no learned
    parameters.

    With ``rescale`` the output is ``Q / (sqrt(n_out) std(Q))``, where n_out is the number of output
    channels times kernel positions, and std the unbiased standard deviation over the whole weight,
    from exact integer sums; the factor has no gradient. A batch norm after the layer cancels the
    factor, except for its effect on step sizes. The factor is kept in evaluation; in the authors'
    code the last layer drops it there, which changes losses but no decision.

    Args:
        bits: width of the codes, 2..8.
        rounding: ``"modified"``, the default of the authors' code:
            ``2 min(floor(2^b u), 2^b - 1) / 2^b - 1`` with ``u = (t + 1) / 2`` and t the value to
            be rounded: has a level 0, and is biased towards -1 (normal weights by 0.1 at 4 bits and
            by 0.3 at 2);
            ``"centered"``, which the authors now recommend: half a step higher, unbiased, without
            a level 0;
            ``"original"``: ``2 rint((2^b - 1) u) / (2^b - 1) - 1``, as in DoReFa-Net. With the
            first two, the codes of b bits are the first b bits of the codes of b + 1.
        rescale: whether to multiply by the factor above; the authors do so in the last layer and,
            for small images, in convolutions too.

    Example:
        >>> import torch, noisyq_fast
        >>> noisyq_fast.SAT(bits=2, rescale=False)(torch.tensor([[0.9, 0.2], [-0.1, -0.9]]))
        tensor([[ 0.5000,  0.0000],
                [-0.5000, -1.0000]])
    """

    KIND: ClassVar[int] = 5

    def __init__(self, bits: int = 4, *, rounding: str = "modified", rescale: bool = True) -> None:
        if rounding not in ROUNDINGS:
            raise ValueError(f"rounding: got {rounding!r}, takes one of {', '.join(ROUNDINGS)}")
        checks.boolean("rescale", rescale)
        super().__init__(bits, None, FULL)
        self.rounding = rounding
        self.rescale = rescale

    @property
    def code_ends(self) -> tuple[int, int]:
        if self.rounding == "modified":
            return -(1 << self.bits - 1), (1 << self.bits - 1) - 1
        return 1 - (1 << self.bits), (1 << self.bits) - 1

    @property
    def denominator(self) -> int:
        """Q is the code divided by this."""
        return (1 << self.bits - (self.rounding == "modified")) - (self.rounding == "original")

    def for_input(self) -> Quantizer:
        raise ValueError(f"activation: got {self}, which is for weights; takes PACT({self.bits})")

    def fake_quantize(self, x: Tensor) -> Tensor:
        parameters = self._parameters_of(x)
        return fake_quantize_learned(x, parameters, ROUNDINGS[self.rounding], *self.code_ends)

    @property
    def gives_codes(self) -> bool:
        return self.code_ends[1] <= 127

    def codes(self, x: Tensor) -> Codes:
        low, high = self.code_ends
        if not self.gives_codes:
            raise ValueError(
                f"codes: got {self}, whose codes {low}..{high} do not fit into a byte; takes "
                "rounding='modified', or fewer bits"
            )
        with torch.no_grad():
            parameters = self._parameters_of(x)
            codes = quantize_learned(x, parameters, ROUNDINGS[self.rounding], low, high)
            scale = scale_of_codes(x, self._scale_of_codes(parameters), None)
        source = x
        if gradients.wanted():
            how = ROUNDINGS[self.rounding], low, high, None, 1.0
            source = source_of_codes(x, self._parameters_of(x), *how)
        return Codes(codes.to(torch.int8), scale, None, max(-low, high), source)

    @property
    def grid_of_codes(self) -> str:
        return FULL if self.rounding == "modified" else ODD

    def scale_of(self, weight: Tensor) -> Tensor:
        """The scale of the codes of a weight."""
        return self._scale_of_codes(self._parameters_of(weight.detach()))

    def _scale_of_codes(self, parameters: Tensor) -> Tensor:
        return quotient(parameters[1], float(self.denominator))

    def _parameters_of(self, x: Tensor) -> Tensor:
        """max|x|, with its gradient, and the factor of ``rescale``: float32 ``[2]``."""
        if x.numel() == 0:
            return x.new_ones(2, dtype=torch.float32)
        absmax = torch.maximum(x.amax(), -x.amin()).float()
        absmax = torch.where(absmax == 0, 1.0, absmax)  # all weights are 0
        factor = torch.ones_like(absmax)
        if self.rescale:
            factor = self._scale(x.detach(), torch.stack([absmax.detach(), factor]))
        return torch.stack([absmax, factor])

    def _scale(self, x: Tensor, parameters: Tensor) -> Tensor:
        """1 / (sqrt(n_out) std(Q)): from exact sums, in float64, then rounded to float32."""
        codes = quantize_learned(x, parameters, ROUNDINGS[self.rounding], *self.code_ends)
        n = codes.numel()
        total = codes.sum(dtype=torch.int64)
        squares = (codes.int() * codes.int()).sum(dtype=torch.int64)
        variance = (squares.double() * n - total.double().square()) / max(n * (n - 1), 1)
        outputs = n // max(x.shape[1] if x.dim() > 1 else 1, 1)
        deviation = variance.sqrt() * (math.sqrt(max(outputs, 1)) / self.denominator)
        deviation = torch.where(deviation == 0, 1.0, deviation)  # all weights have the same level
        return (1.0 / deviation).float()

    def _state(self) -> list[int]:
        variant = list(ROUNDINGS).index(self.rounding)
        return [*super()._state()[:3], variant, int(self.rescale)]

    def extra_repr(self) -> str:
        rescale = "" if self.rescale else ", rescale=False"
        return f"bits={self.bits}, rounding={self.rounding!r}{rescale}"

    @property
    def form(self) -> str:
        return f"SAT {self.rounding}"

    def width(self) -> str:
        return f"{self.bits} SAT"
