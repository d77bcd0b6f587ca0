"""Input ranges from batches of inputs, without training."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from noisyq_fast.quantizers import LearnedQuantizer, Quantizer
from noisyq_fast.ranges import disabled, named_quantizers
from noisyq_fast.running import arguments, in_evaluation

METHODS = ("absmax", "percentile", "mse", "initial")
_BITS = 14
_BINS = 2**_BITS
_AT_ONCE = 2**22
"""Values that are counted in one pass; limits the temporary memory."""
_CANDIDATES = [2 ** (-k / 32) for k in range(257)]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    method: str = "initial",
    percentile: float = 99.9,
) -> nn.Module:
    """Sets the input ranges of a converted model from batches of inputs, such as those of a
    pre-trained float network before it is trained quantized, or evaluated without training.

    The model runs in evaluation mode with all quantizers off: every layer gets the input that it
    has in the float network, so the ranges depend neither on the widths nor on the order of the
    batches. Then, for each range, with ``m`` the largest ``|x|`` of all batches::

        absmax      range = m
        percentile  range = the smallest that at least `percentile` % of all |x| do not exceed
        mse         range = argmin over r of sum (x - fake_quantize(x, r))^2,
                    r = m * 2^(-k/32), k = 0, 1, ..., 256 (the larger of equals)
        initial     absmax; learned quantizers instead use their own initialization, from the
                    first batch

    For percentile and mse, values are counted in equal bins, at least 8192 from 0 to ``m``, so that
    memory stays the same however many batches there are (256 KiB for each range). The percentile
    is the outer edge of its bin, at most ``m``; the squared error is that of the bins' centers. The
    result does not depend on how the values are divided into batches.

    Nothing else changes: no weight, no statistic of batch norm, no mode, no gradient, no random
    state, and in case of an error no range. Frozen ranges are set too, and stay frozen.

    Args:
        model: a module with quantized layers, such as `quantize_model_` returns.
        batches: inputs of the model: each a tensor, a tuple of arguments or a dict of keyword
            arguments, on the model's device. Labels left out: ``(x for x, _ in loader)``. For a
            progress bar, wrap them: ``tqdm(loader)``. A few hundred samples are usual. Calibrate
            before `DistributedDataParallel`, which then gives all ranks the ranges of the first.
        method: ``"absmax"``, ``"percentile"``, ``"mse"`` or ``"initial"``. The first three differ
            less at more bits; at 4 bits and fewer, outliers make ``"absmax"`` coarse.
        percentile: for method ``"percentile"``, above 0, up to 100.

    Returns:
        ``model``.

    Raises:
        TypeError: wrong type of an argument.
        ValueError: a value out of range, a model without quantized layers, no batch, a batch on
            which the model does not run, or a NaN or an infinity in the input of a layer (the
            error names the first).

    Warns:
        UserWarning: a list of layers that the model has not called. Their ranges are unchanged.

    Example:
        >>> import torch, noisyq_fast
        >>> model = noisyq_fast.quantize_model_(torch.nn.Sequential(torch.nn.Linear(3, 2)))
        >>> batches = [torch.tensor([[0.1, -0.7, 0.2]]), torch.tensor([[0.3, 0.9, -0.1]])]
        >>> noisyq_fast.calibrate(model, batches)[0].input_quantizer.range
        tensor(0.9000)
    """
    quantizers = {n: q for n, q in named_quantizers(model).items() if q.keeps_range}
    if not quantizers:
        raise ValueError("model: got quantizers that keep no range, so there is none to calibrate")
    _check(batches, method, percentile)
    seen = {name: _Seen(counted=method in ("percentile", "mse")) for name in quantizers}
    begins: dict[str, Sequence[Tensor]] = {}
    not_finite: list[str] = []

    def see(name: str, quantizer: Quantizer, args: tuple[Tensor]) -> None:
        if method == "initial" and isinstance(quantizer, LearnedQuantizer) and name not in begins:
            begins[name] = quantizer.initial(args[0].detach())
        if not seen[name].add(quantizer.by_range(args[0].detach())):
            not_finite.append(name)

    hooks = [
        quantizer.register_forward_pre_hook(functools.partial(see, name))
        for name, quantizer in quantizers.items()
    ]
    count = 0
    try:
        for batch in batches:
            _run(model, batch, count)
            if not_finite:
                raise ValueError(f"{not_finite[0]}: got a NaN or an infinity in batch {count}")
            count += 1
    finally:
        for hook in hooks:
            hook.remove()
    if count == 0:
        raise ValueError(
            "batches: got none, takes one or more (a generator gives its batches only once)"
        )
    for name, quantizer in quantizers.items():
        if name in begins:
            learned: Any = quantizer
            learned.begin(begins[name])
        elif seen[name].low is not None:
            quantizer.set_bounds(*_bounds(quantizer, seen[name], method, percentile))
    _warn_of_uncalled({name for name in seen if seen[name].low is None}, set(seen))
    return model


def _check(batches: object, method: str, percentile: float) -> None:
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches: got {type(batches).__name__}, takes an iterable of inputs, such as a list "
            "with one input of the model"
        )
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, takes {', '.join(METHODS)}")
    if not isinstance(percentile, int | float) or isinstance(percentile, bool):
        raise TypeError(f"percentile: got {type(percentile).__name__}, takes a float")
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile: got {percentile}, takes more than 0 and up to 100")


def _run(model: nn.Module, batch: Any, number: int) -> None:
    args, kwargs = arguments(batch)
    try:
        with in_evaluation(model), disabled(model):
            model(*args, **kwargs)
    except Exception as error:
        labels = "; leave labels out: (x for x, _ in loader)" if len(args) > 1 else ""
        raise ValueError(
            f"batches: the model does not run on batch {number}: {error}{labels}"
        ) from error


def _warn_of_uncalled(uncalled: set[str], names: set[str]) -> None:
    """Warns of uncalled layers. Of attention one called quantizer is enough: those of key and value
    are not used if these are the query."""
    called = {name.rpartition(".")[0] for name in names - uncalled}
    if missed := sorted({name.rpartition(".")[0] for name in uncalled} - called):
        warnings.warn(
            f"layers that the model has not called, whose ranges stay as they were: "
            f"{', '.join(missed)}",
            stacklevel=3,
        )


class _Seen:
    """The smallest and the largest value of each range of a quantizer, and a histogram.

    There are `_BINS` bins on either side of 0, of the same width for all values of a range: a power
    of two, so that when it doubles, each bin is one half of a new one.

    Attributes:
        low, high: float32 ``[ranges]``, ``None`` before the first value.
        counts: int64 ``[ranges, 2 * _BINS]``; bin ``_BINS + k`` holds k <= x / width < k + 1, and
            bin ``_BINS - 1 - k`` their negatives.
        exponents: int64 ``[ranges]``; the bins end at 2 to the power of these.
    """

    def __init__(self, counted: bool) -> None:
        self.counted = counted
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def add(self, values: Tensor) -> bool:
        """Adds values ``[ranges, values]`` and returns True, unless some are not finite."""
        if values.numel() == 0:
            return True
        low, high = (x.float() for x in torch.aminmax(values, dim=1))
        if not bool((low.isfinite() & high.isfinite()).all()):
            return False
        if self.low is not None and self.high is not None:
            low, high = torch.minimum(low, self.low), torch.maximum(high, self.high)
        if self.counted:
            self._widen(_exponents(torch.maximum(-low, high)), first=self.low is None)
            for part in values.split(max(1, _AT_ONCE // len(values)), dim=1):
                self._count(part.float())
        self.low, self.high = low, high
        return True

    def _widen(self, exponents: Tensor, first: bool) -> None:
        if first:
            self.exponents = exponents
            self.counts = torch.zeros(
                len(exponents), 2 * _BINS, dtype=torch.int64, device=exponents.device
            )
            return
        doublings = (exponents - self.exponents).clamp(0, _BITS + 1)
        if bool(doublings.any()):
            bins = torch.arange(-_BINS, _BINS, device=exponents.device)
            index = (bins >> doublings.unsqueeze(1)) + _BINS
            self.counts = torch.zeros_like(self.counts).scatter_add_(1, index, self.counts)
        self.exponents = exponents

    def _count(self, values: Tensor) -> None:
        bins = (values / self._width()).to(torch.int32)  # towards 0
        bins -= (values < 0).to(torch.int32)
        ranges = torch.arange(len(values), dtype=torch.int32, device=values.device)
        bins += _BINS + 2 * _BINS * ranges.unsqueeze(1)
        counts = torch.bincount(bins.flatten(), minlength=self.counts.numel())
        self.counts += counts.view_as(self.counts)

    def bins(self, at: float) -> Tensor:
        """A point of each bin, float32 ``[ranges, bins]``: its inner edge for ``at=0``, its outer
        for 1."""
        positive = torch.arange(_BINS, device=self.counts.device) + at
        bins = torch.cat([-positive.flip(0), positive]).float()
        return bins * self._width()

    def _width(self) -> Tensor:
        """The width of the bins, ``[ranges, 1]``."""
        exponents = (self.exponents - _BITS).unsqueeze(1)
        return torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)


def _exponents(absmax: Tensor) -> Tensor:
    """Exponents of the smallest powers of two above; limited so that widths do not underflow."""
    return torch.frexp(absmax).exponent.to(torch.int64).clamp(min=-100)


def _bounds(
    quantizer: Quantizer, seen: _Seen, method: str, percentile: float
) -> tuple[Tensor, Tensor]:
    assert seen.low is not None
    assert seen.high is not None
    low, high = quantizer.bounds(seen.low, seen.high)
    if method in ("absmax", "initial"):
        return low, high
    if method == "percentile":
        factor = _percentile(seen, low, high, percentile)
    else:
        factor = _least_error(quantizer, seen, low, high)
    return factor * low, factor * high


def _percentile(seen: _Seen, low: Tensor, high: Tensor, percentile: float) -> Tensor:
    """The smallest factor of the range that still contains that share of the values."""
    edges = seen.bins(1)
    ends = torch.where(edges < 0, low.unsqueeze(1), high.unsqueeze(1))
    # An end at 0 stays 0: values beyond it are never contained.
    factors = torch.where(ends == 0, 0.0, edges / ends).clamp(max=1)
    factors, order = factors.sort(dim=1)
    held = seen.counts.gather(1, order).cumsum(1).double()
    enough = held >= held[:, -1:] * (percentile / 100) * (1 - 1e-12)  # 99.9 is not exact in binary
    return factors.gather(1, enough.int().argmax(1, keepdim=True)).squeeze(1)


def _least_error(quantizer: Quantizer, seen: _Seen, low: Tensor, high: Tensor) -> Tensor:
    used = seen.counts.any(0)
    centers, counts = seen.bins(0.5)[:, used], seen.counts[:, used].double()
    best = torch.ones_like(high)
    least = torch.full_like(high, torch.inf, dtype=torch.float64)
    for factor in _CANDIDATES:
        y = quantizer.fake_quantize_within(centers, factor * low, factor * high)
        error = (counts * (y - centers).double().square()).sum(1)
        best = torch.where(error < least, factor, best)
        least = torch.minimum(error, least)
    return best
