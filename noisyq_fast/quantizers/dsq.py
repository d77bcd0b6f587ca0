"""Differentiable soft quantization (Gong et al. 2019, arXiv 1908.05033)."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from noisyq_fast import rules
from noisyq_fast.operators import checks
from noisyq_fast.quantizers.learned import LEAST, LearnedQuantizer, quotient

# At 0 the gradient of a cell is a spike; at 1/2 it is nearly that of straight-through rounding.
_ALPHA_ENDS = 1e-3, 0.5


class DSQ(LearnedQuantizer):
    """Rounds to ``2^b`` values from l to u; the gradient is that of a tanh in each cell: steeper
    than 1 where the value jumps from one to the next, flatter between, and 1 in the mean.

    l and u are initialized to the smallest and the largest value. Their gradients are exact
    derivatives of the outputs; whether the paper approximates them is unverified. The gradients of
    l, u and alpha are not scaled: use a smaller learning rate than for weights.

    Args:
        bits: width of the codes, 2..8.
        alpha: the initial shape of the cells, above 0 and up to 0.5, which is nearly
            straight-through rounding (limits of the paper unverified). Popular implementations that
            learn it start at 0.2.
        learn_alpha: whether alpha is learned; the implementation of the authors' group fixes it at
            0.4 and takes the range from an observer.

    Attributes:
        low, high, alpha: the parameters.

    Example:
        >>> import torch, noisyq_fast
        >>> noisyq_fast.DSQ(bits=2)(torch.tensor([-1.0, 0.4, 0.6, 2.0])).detach()
        tensor([-1.,  0.,  1.,  2.])
    """

    KIND: ClassVar[int] = 8

    low: nn.Parameter
    high: nn.Parameter
    alpha: nn.Parameter

    def __init__(self, bits: int = 4, *, alpha: float = 0.2, learn_alpha: bool = True) -> None:
        checks.number("alpha", alpha)
        checks.boolean("learn_alpha", learn_alpha)
        least, most = _ALPHA_ENDS
        if not least <= alpha <= most:
            raise ValueError(f"alpha: got {alpha}, takes {least} to {most}")
        self.first_alpha = alpha
        self.learn_alpha = learn_alpha
        super().__init__(bits, signed=True)

    @property
    def rule(self) -> str:
        return rules.DSQ

    @property
    def code_ends(self) -> tuple[int, int]:
        return 0, (1 << self.bits) - 1

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.within(-self.largest(-x), self.largest(x))

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        return low, high, torch.full_like(low, self.first_alpha)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return low, high

    @torch.no_grad()
    def begin(self, values: Sequence[Tensor]) -> None:
        low, high, _ = values
        if not low.is_meta and not bool((high - low).isfinite().all()):
            raise ValueError(
                f"range: got one from {float(low.min()):.3g} to {float(high.max()):.3g}, which is "
                "wider than the largest float32, 3.4e38; takes a narrower one"
            )
        super().begin(values)

    def constrain(self) -> None:
        """Enforces l < u, and alpha between 0.001 and 0.5."""
        self.high.data.copy_(torch.maximum(self.high, self.low + LEAST))
        self.alpha.data.clamp_(*_ALPHA_ENDS)

    def code_step(self) -> Tensor:
        """The distance between neighbouring values."""
        width = (self.high - self.low).detach().float()
        return quotient(width, float(self.code_ends[1])).clamp(min=torch.finfo(torch.float32).tiny)

    def _allocate(self, shape: list[int]) -> None:
        super()._allocate(shape)
        self.alpha.requires_grad_(self.learn_alpha)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, alpha={self.first_alpha}"
