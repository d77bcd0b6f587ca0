"""Scales from the batch's own range in training, and from a moving average otherwise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from noisyq_fast.backends import select
from noisyq_fast.backends.reference.levels import average_, scale_of_codes
from noisyq_fast.backends.reference.sums import range_of_ends
from noisyq_fast.grid import AFFINE, SIGNED, UNSIGNED
from noisyq_fast.integer.codes import Codes
from noisyq_fast.integer.deferred import Deferred
from noisyq_fast.operators import checks
from noisyq_fast.operators.granularity import TOKEN
from noisyq_fast.operators.quantize import (
    fake_quantize,
    fake_quantize_ema,
    masked_on,
    quantize_ema_on_grid,
    quantize_fixed_range_on_grid,
)
from noisyq_fast.quantizers.quantizer import Quantizer, with_name_in_errors

DEFAULT_AVERAGING_CONSTANT = 0.01


class MovingAbsMax(Quantizer):
    """`fake_quantize_ema` as a module: the quantizer of activations in arXiv 2303.11803.

    In training (`nn.Module.train`) the scale comes from the batch's own absmax, which also moves
    the average. In evaluation, and in training while ``frozen``, it comes from the average, which
    then does not move. A forward that is run again inside a backward (activation checkpointing)
    gives the same values and does not move the average twice.

    Args:
        bits: width of the codes, 2..8.
        axis: one range for each index of this axis; ``None``: one range.
        ranges: the size of that axis. Only with an ``axis``.
        averaging_constant: weight of a batch in the moving average, 0..1.
        ste: in evaluation, ``"identity"`` passes the gradient everywhere; ``"clipped"`` zeroes it
            where a value is beyond the range. In training no value is, but see `fake_quantize` on
            full and affine grids.
        grid: ``"signed"``, ``"full"``, ``"unsigned"``, ``"affine"`` or ``"odd"``, as in `Grid`. The
            range is the absmax; on an unsigned grid max(x, 0), on an affine one the pair of
            min(x, 0) and max(x, 0).

    Attributes:
        running_absmax, observed: float32 buffers, ``[]`` or ``[ranges]``. The range is
            ``running_absmax / observed``; ``observed`` is 0 before the first batch and 1 after it.
            So an average of state dicts (as of an EMA of models), some of which have seen no data
            yet, has the average range of the others. On an affine grid ``running_absmax`` is
            replaced by ``running_range``, ``[2]`` or ``[2, ranges]``.

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
    gives_codes: ClassVar[bool] = True

    axis: int | None
    running_absmax: Tensor
    running_range: Tensor
    observed: Tensor
    # A class attribute, as in `Quantizer`: modules pickled by an earlier version lack it.
    range_of_ranks: Callable[[Tensor, int | None], Tensor | None] | None = None

    def __init__(
        self,
        bits: int = 4,
        axis: int | None = None,
        ranges: int | None = None,
        averaging_constant: float = DEFAULT_AVERAGING_CONSTANT,
        ste: str = "identity",
        device: torch.device | str | None = None,
        grid: str = SIGNED,
    ) -> None:
        if axis == TOKEN:
            raise ValueError(
                f"axis: got 'token', which keeps no range; use AbsMax({bits}, 'token')"
            )
        super().__init__(bits, axis, grid)
        checks.averaging_constant(averaging_constant)
        checks.ste(ste)
        if (axis is None) != (ranges is None):
            raise ValueError(f"ranges: got {ranges} with axis {axis}, takes both or none")
        self.averaging_constant = averaging_constant
        self.ste = ste
        shape = [] if ranges is None else [ranges]
        running = "running_range" if self.grid.is_affine else "running_absmax"
        shapes = {running: [2, *shape] if self.grid.is_affine else shape, "observed": shape}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device=device))

    @property
    def running(self) -> Tensor:
        """The buffer with the moving average, times ``observed``."""
        return self.running_range if self.grid_kind == AFFINE else self.running_absmax

    @property
    def range(self) -> Tensor:
        """The largest magnitude that is not clipped (on an affine grid the smallest and the largest
        value, stacked); NaN before the first training batch."""
        return self.running / self.observed

    def fake_quantize(self, x: Tensor) -> Tensor:
        if self.observed.is_meta and not x.is_meta:  # like the weight at the conversion
            self.to_empty(device=x.device)
        if self.frozen or not self.training:
            return fake_quantize_ema(
                x,
                self.running,
                self.bits,
                self.axis,
                training=False,
                ste=self.ste,
                observed=self.observed,
                grid=self.grid_kind,
            )
        # On a signed grid, the batch's own range clips nothing.
        ste = "identity" if self.grid_kind == SIGNED else self.ste
        options: dict[str, Any] = {"grid": self.grid_kind, "ste": ste}
        batch = self._range_over_ranks(x)
        if batch is not None:
            return fake_quantize_ema(x, batch, self.bits, self.axis, training=False, **options)
        if in_backward():
            return fake_quantize(x, self.bits, self.axis, **options)
        return fake_quantize_ema(
            x,
            self.running,
            self.bits,
            self.axis,
            self.averaging_constant,
            observed=self.observed,
            **options,
        )

    @with_name_in_errors
    def codes(self, x: Tensor) -> Codes:
        if not isinstance(x, Deferred):
            checks.padded(x)
        if self._left_to_look_at and self.training:
            self._look_for_negatives(x)
        if self.observed.is_meta and not x.is_meta:
            self.to_empty(device=x.device)
        if self.frozen or not self.training:
            range_ = checks.known_range(self.running, self.observed, self.grid.is_affine)
            made = self._codes_within(x, range_, self.ste)
            # A NaN in x has no code: the scale must carry it, as the batch's own range would.
            found = x.extremes_found() if isinstance(x, Deferred) else x
            if found is None:  # codes were computed from the sums, which propagates NaN
                return made
            return replace(made, scale=scale_of_codes(found, made.scale, self.axis))
        ste = "identity" if self.grid_kind == SIGNED else self.ste
        batch = self._observe(x)
        if batch is None:
            return self._codes_observed(x, ste)
        return self._codes_within(x, batch, ste)

    def _range_over_ranks(self, x: Tensor) -> Tensor | None:
        """The range of the batch over all ranks, which also moves the average; ``None`` if there
        are no others."""
        if self.range_of_ranks is None:
            return None
        with torch.no_grad():
            batch = self.range_of_ranks(x, self.axis)
            if batch is not None and not in_backward():
                constant, is_affine = self.averaging_constant, self.grid.is_affine
                average_(self.running, self.observed, batch, constant, is_affine)
        return batch

    def _observe(self, x: Tensor) -> Tensor | None:
        """The range of a batch if it is known without reading ``x``, or is reduced over ranks; also
        moves the average. Else None."""
        batch = self._range_over_ranks(x)
        if batch is not None:
            return batch
        ends = x.ends() if isinstance(x, Deferred) and self.axis is None else None
        if ends is None:
            return None
        if in_backward():
            return range_of_ends(ends, self.grid)
        observe = select("observe", ends.device.type)
        return observe(ends, self.running, self.observed, self.averaging_constant, self.grid)

    def _codes_observed(self, x: Tensor, ste: str) -> Codes:
        running, observed = self.running, self.observed
        if in_backward():  # the first forward has moved the average
            running, observed = running.clone(), observed.clone()
        source = x
        if isinstance(x, Deferred):
            source, x = x.source, x.written()
        codes, scale, zero_point, masked = quantize_ema_on_grid(
            *(_values(x), running, observed, self.bits, self.axis, self.averaging_constant),
            *(self.grid_kind, masked_on(self.grid_kind, ste)),
        )
        return self._codes(source, codes, scale, zero_point, masked)

    def _codes_within(self, x: Tensor, range_: Tensor, ste: str) -> Codes:
        masked = masked_on(self.grid_kind, ste)
        source = x
        if isinstance(x, Deferred):
            source = x.source
            if self.axis is None and x.masks_none(masked):
                found = x.codes_within(range_, self.grid)
                if found is not None:
                    return self._codes(source, *found)
            x = x.written()
        codes, scale, zero_point, masked = quantize_fixed_range_on_grid(
            *(_values(x), range_, self.bits, self.axis, self.grid_kind, masked)
        )
        return self._codes(source, codes, scale, zero_point, masked)

    @torch.no_grad()
    def set_range(self, *ends: Tensor | float) -> None:
        """Sets the range, as one batch with this range would: an absmax or, on an affine grid, the
        smallest and the largest value."""
        ends = tuple(torch.as_tensor(end) for end in ends)
        if len(ends) != (2 if self.grid_kind == AFFINE else 1):
            takes = "low and high" if self.grid_kind == AFFINE else "one"
            raise ValueError(
                f"set_range: got {len(ends)} values on the {self.grid_kind} grid, takes {takes}"
            )
        least: Any = ends[0] if self.grid_kind == AFFINE else 0
        if (ends[-1] < least).any():
            takes = "the least before the largest" if self.grid_kind == AFFINE else "0 or more"
            raise ValueError(f"set_range: got {', '.join(map(str, ends))}, takes {takes}")
        of_ends = self.running if self.grid_kind == AFFINE else [self.running]
        for running, end in zip(of_ends, ends, strict=True):
            running.copy_(end)
        self.observed.fill_(1)

    @torch.no_grad()
    def reset(self) -> None:
        self.running.zero_()
        self.observed.zero_()

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if self.grid.is_unsigned:
            low, high = low.clamp(max=0), high.clamp(min=0)
            if self.grid_kind == UNSIGNED:
                if (low < 0).any():
                    self.warn_of_negatives()
                low = torch.zeros_like(low)
            return low, high
        absmax = torch.maximum(-low, high)
        return -absmax, absmax

    def set_bounds(self, low: Tensor, high: Tensor) -> None:
        ends = (low, high) if self.grid.is_affine else (high,)
        self.set_range(*(end.reshape(self.observed.shape) for end in ends))

    def fake_quantize_within(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        range_ = torch.stack([low, high]) if self.grid.is_affine else high
        return fake_quantize_ema(x, range_, self.bits, axis=0, training=False, grid=self.grid_kind)

    def extra_repr(self) -> str:
        frozen = ", frozen" if self.frozen else ""
        return f"{super().extra_repr()}, averaging_constant={self.averaging_constant}{frozen}"


def _values(x: Tensor) -> Tensor:
    return x.values() if isinstance(x, Deferred) else x


def in_backward() -> bool:
    """Whether this code runs inside a backward: activation checkpointing repeats a forward there,
    which must not move averages a second time."""
    # Compiled graphs do their own recomputation.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
