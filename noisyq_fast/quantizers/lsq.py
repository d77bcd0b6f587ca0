"""Learned step size quantization (Esser et al. 2019, arXiv 1902.08153)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from noisyq_fast.operators import checks
from noisyq_fast.quantizers.learned import WEIGHT, LearnedQuantizer, quotient
from noisyq_fast.rules import LSQ as RULE

GRADIENTS = ("paper", "all", "none")


class LSQ(LearnedQuantizer):
    """Learns the step s between codes: ``y = s rint(clip(x / s, low, high))``.

    With b bits, codes are ``-2^(b-1)`` to ``2^(b-1) - 1`` for weights and 0 to ``2^b - 1`` for
    inputs. The step is initialized to ``2 mean|x| / sqrt(high)``. Its gradient is multiplied by
    ``1 / sqrt(N high)``, where N is the number of weights, or of the features of one sample.

    Args:
        bits: width of the codes, 2..8.
        axis: one step for each index of this axis of a weight; N is then the number of elements
            per index. ``None``: one step for the whole tensor, as in the paper.
        signed: as for `LearnedQuantizer`.
        symmetric: leave out the code ``-2^(b-1)``, as popular implementations do (at 2 bits, one
            of four codes).
        gradient: the factor of the gradient. ``"paper"``: as above; ``"all"``: N counts all
            elements of the batch, as in popular implementations, so that with 128 samples the step
            learns 11 times more slowly under SGD (Adam is invariant); ``"none"``: 1.

    Attributes:
        step: the parameter s.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.LSQ(bits=3)
        >>> quantizer(torch.tensor([0.1, 0.7, 0.26, 0.0])).detach()
        tensor([0.0000, 0.6010, 0.2003, 0.0000])
        >>> quantizer.step.data
        tensor(0.2003)
    """

    KIND: ClassVar[int] = 3

    step: nn.Parameter

    def __init__(
        self,
        bits: int = 4,
        axis: int | None = None,
        *,
        signed: bool | None = None,
        symmetric: bool = False,
        gradient: str = "paper",
    ) -> None:
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: got {gradient!r}, takes one of {', '.join(GRADIENTS)}")
        checks.boolean("symmetric", symmetric)
        self.symmetric = symmetric
        self.gradient = gradient
        super().__init__(bits, axis, signed=signed)

    @property
    def rule(self) -> str:
        return RULE

    @property
    def code_ends(self) -> tuple[int, int]:
        levels = 1 << self.bits
        if not self.is_signed:
            return 0, levels - 1
        high = levels // 2 - 1
        return (-high if self.symmetric else -high - 1), high

    def initial(self, x: Tensor) -> tuple[Tensor]:
        return (quotient(2 * self.mean_absolute(x), math.sqrt(self.code_ends[1])),)

    def gradient_scale(self, x: Tensor) -> float:
        if self.gradient == "none":
            return 1.0
        n = x.numel()
        if self.gradient == "paper":
            if self.role != WEIGHT:
                n = math.prod(x.shape[1:])  # of a sample
            elif self.axis is not None:
                n //= max(x.shape[self.axis], 1)
        return 1 / math.sqrt(max(n, 1) * self.code_ends[1])

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor]:
        return (quotient(high, float(self.code_ends[1])),)

    def code_scale(self) -> Tensor:
        return self.step.detach().float().clamp(min=torch.finfo(torch.float32).tiny)

    def _variant(self) -> int:
        return int(self.symmetric)

    def extra_repr(self) -> str:
        symmetric = ", symmetric" if self.symmetric else ""
        gradient = "" if self.gradient == "paper" else f", gradient={self.gradient!r}"
        return f"{super().extra_repr()}{symmetric}{gradient}"
