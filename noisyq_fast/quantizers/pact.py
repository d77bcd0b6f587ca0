"""Parameterized clipping activation (Choi et al. 2018, arXiv 1805.06085)."""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from noisyq_fast.operators import checks
from noisyq_fast.quantizers.learned import INPUT, LearnedQuantizer, quotient
from noisyq_fast.quantizers.moving_absmax import MovingAbsMax
from noisyq_fast.quantizers.quantizer import Quantizer
from noisyq_fast.rules import PACT as PLAIN
from noisyq_fast.rules import SAT

GRADIENTS = ("sat", "pact")


class PACT(LearnedQuantizer):
    """Learns where inputs are clipped: ``y = s rint(clip(x / s, 0, n))``, ``s = a / n``,
    ``n = 2^b - 1``. For inputs without values below 0; the input of a model is quantized by
    `MovingAbsMax` instead.

    Args:
        bits: width of the codes, 2..8.
        start: the initial clipping level a, independent of the inputs. Jin et al. 2019 (arXiv
            1912.10207, *SAT*) use 8 in convolutions and 10 before the last layer.
        gradient: dy/da of inputs below a: ``"sat"`` ``code / n - x / a`` (Jin et al.), ``"pact"``
            0. Above a it is 1 in both. The paper adds an L2 penalty on a, which starts too large;
            reproductions use the weight decay of the weights. ``"sat"`` needs none.

    Attributes:
        clip: the parameter a.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.PACT(bits=2, start=3.0)
        >>> quantizer(torch.tensor([0.4, 1.7, 2.2, 9.0])).detach()
        tensor([0., 2., 2., 3.])
    """

    KIND: ClassVar[int] = 4
    REMEDY: ClassVar[str] = (
        "use LSQ(4, signed=True) here, with overrides={...: {'activation': ...}}"
    )
    FOR: ClassVar[frozenset[str]] = frozenset({INPUT})

    clip: nn.Parameter

    def __init__(self, bits: int = 4, *, start: float = 8.0, gradient: str = "sat") -> None:
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient: got {gradient!r}, takes one of {', '.join(GRADIENTS)}")
        checks.number("start", start)
        if not 0 < start < math.inf:
            raise ValueError(f"start: got {start}, takes a number above 0")
        self.start = start
        self.gradient = gradient
        super().__init__(bits)

    @property
    def rule(self) -> str:
        return SAT if self.gradient == "sat" else PLAIN

    def initial(self, x: Tensor) -> tuple[Tensor]:
        return (torch.full([], self.start, device=x.device),)

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor]:
        return (high,)

    def at_end(self, bits: int, place: str) -> Quantizer:
        return MovingAbsMax(bits) if place == "model input" else self.like(bits=bits)

    def code_scale(self) -> Tensor:
        clip = self.clip.detach().float()
        return quotient(clip, float(self.code_ends[1])).clamp(min=torch.finfo(torch.float32).tiny)

    def extra_repr(self) -> str:
        gradient = "" if self.gradient == "sat" else f", gradient={self.gradient!r}"
        return f"{super().extra_repr()}{gradient}"
