"""The scale of a batch is its own absmax in training, and a moving average of these otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from noisyq_fast import checks
from noisyq_fast.backends.reference import average_
from noisyq_fast.ops import fake_quantize, fake_quantize_ema
from noisyq_fast.quantizers.quantizer import Quantizer

DEFAULT_AVERAGING_CONSTANT = 0.01


class MovingAbsMax(Quantizer):
    """`fake_quantize_ema` as a module: the quantizer of activations in arXiv 2303.11803.

    In training (`nn.Module.train`) the scale comes from the batch's own absmax, which also moves
    the average. In evaluation, and in training while it is ``frozen``, it comes from the average,
    which stays. A forward that is run again inside a backward (activation checkpointing) gives the
    same values and does not move it twice.

    Args:
        bits: width of the codes, 2..8.
        axis: one range for each index of this axis; ``None``: one range.
        ranges: how many there are: the size of that axis. Only with an ``axis``.
        averaging_constant: weight of a batch in the moving average, 0..1.
        ste: in evaluation, ``"identity"`` passes the gradient everywhere; ``"clipped"`` zeroes it
            where a value is beyond the range.

    Attributes:
        running_absmax, observed: float32 buffers, ``[]`` or ``[ranges]``. The range is
            ``running_absmax / observed``: ``observed`` is 1 once a batch was seen and 0 before.
            Both are sums, so that an average of state dicts (of an EMA of models, say), some of
            which have seen nothing yet, has the average range of the others.

    Example:
        >>> import torch, noisyq_fast
        >>> quantizer = noisyq_fast.MovingAbsMax(bits=4)
        >>> x = torch.tensor([0.1, -0.7, 0.26])
        >>> quantizer(x)
        tensor([ 0.1000, -0.7000,  0.3000])
        >>> quantizer.range
        tensor(0.7000)
        >>> quantizer.eval()(2 * x)
        tensor([ 0.2000, -0.7000,  0.5000])
    """

    KIND: ClassVar[int] = 2
    keeps_range: ClassVar[bool] = True

    running_absmax: Tensor
    observed: Tensor

    def __init__(
        self,
        bits: int = 4,
        axis: int | None = None,
        ranges: int | None = None,
        averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
        ste: str = "identity",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(bits, axis)
        checks.averaging_constant(averaging_constant)
        checks.ste(ste)
        if (axis is None) != (ranges is None):
            raise ValueError(f"ranges: got {ranges} with axis {axis}, takes both or none")
        self.averaging_constant = averaging_constant
        self.ste = ste
        self.absmax_of_ranks: Callable[[Tensor, int | None], Tensor | None] | None = None
        shape = [] if ranges is None else [ranges]
        for name in ("running_absmax", "observed"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    @property
    def range(self) -> Tensor:
        """The largest magnitude that is not clipped; NaN where no batch was seen in training."""
        return self.running_absmax / self.observed

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.running_absmax.is_meta and not x.is_meta:  # like the weight at the conversion
            self.to_empty(device=x.device)
        if self.frozen or not self.training:
            return fake_quantize_ema(
                x,
                self.running_absmax,
                self.bits,
                self.axis,
                training=False,
                ste=self.ste,
                observed=self.observed,
            )
        again = in_backward()
        absmax = self.absmax_of_ranks and self.absmax_of_ranks(x, self.axis)
        if absmax is not None:
            if not again:
                average_(self.running_absmax, self.observed, absmax, self.averaging_constant)
            return fake_quantize_ema(x, absmax, self.bits, self.axis, training=False)
        if again:
            return fake_quantize(x, self.bits, self.axis)
        return fake_quantize_ema(
            x,
            self.running_absmax,
            self.bits,
            self.axis,
            self.averaging_constant,
            observed=self.observed,
        )

    @torch.no_grad()
    def set_range(self, absmax: Tensor | float) -> None:
        """Sets the range, as if a batch with this absmax had been the only one."""
        self.running_absmax.copy_(torch.as_tensor(absmax))
        self.observed.fill_(1)

    @torch.no_grad()
    def reset(self) -> None:
        self.running_absmax.zero_()
        self.observed.zero_()

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        absmax = torch.maximum(-low, high)
        return -absmax, absmax

    def set_bounds(self, low: Tensor, high: Tensor) -> None:
        self.set_range(high.reshape(self.running_absmax.shape))

    def fake_quantize_within(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return fake_quantize_ema(x, high, self.bits, axis=0, training=False)

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.frozen else ""
        return f"{super().extra_repr()}, averaging_constant={self.averaging_constant}{frozen}"


def in_backward() -> bool:
    """Whether this code runs inside a backward: a forward that is run again there, by activation
    checkpointing, has been counted before."""
    # A compiled graph has its own way of running parts again.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
