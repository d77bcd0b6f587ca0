"""One network for several widths: per-width quantizers and batch norms, and the active width."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from noisyq_fast.integer.codes import Codes
from noisyq_fast.operators import checks
from noisyq_fast.quantizers.quantizer import Quantizer

FLOAT = 32
"""The width at which nothing is quantized."""


class ManyWidths(Quantizer):
    """One quantizer for each width; `set_bits` selects the width.

    Args:
        quantizers: maps each width to a quantizer, or to ``None`` for float. Or a single quantizer,
            which is copied for each of ``widths`` with that many bits; 32 is float.
        widths: the widths, if ``quantizers`` is a single quantizer.

    In the first and the last layer of a model all widths have the same bits (``first_last_bits``),
    but still a quantizer each.

    Example:
        >>> import noisyq_fast
        >>> quantizer = noisyq_fast.ManyWidths(noisyq_fast.PACT(4), widths=[5, 4, 32])
        >>> quantizer
        ManyWidths(5, 4, 32: 5 PACT)
        >>> with noisyq_fast.set_bits(quantizer, 4):
        ...     quantizer.width()
        '4 PACT'
    """

    KIND: ClassVar[int] = 9

    def __init__(
        self,
        quantizers: Mapping[int, Quantizer | None] | Quantizer,
        widths: Sequence[int] | None = None,
    ) -> None:
        if isinstance(quantizers, Quantizer):
            quantizers = {
                w: None if w == FLOAT else quantizers.like(bits=w) for w in _checked(widths or [])
            }
        elif widths is not None:
            raise ValueError(
                f"widths: got {list(widths)}, takes none with a mapping, whose keys are the widths"
            )
        _checked(list(quantizers))
        super().__init__()
        each: dict[str, Any] = {str(width): q for width, q in quantizers.items()}
        self.each: Any = nn.ModuleDict(each)  # of Quantizer | None
        self.set_width(next(iter(quantizers)))

    @property
    def widths(self) -> list[int]:
        return [int(width) for width in self.each]

    @property
    def active(self) -> Quantizer | None:
        """The quantizer of the current width; ``None`` is float."""
        return self.each[str(self.at)]

    def set_width(self, width: int) -> None:
        self.at = width
        self.bits = FLOAT if self.active is None else self.active.bits
        if self.active is not None:
            self.grid_kind, self.axis = self.active.grid_kind, self.active.axis
        self._left_to_look_at = 0  # the active quantizer checks for negatives itself

    def fake_quantize(self, x: Tensor) -> Tensor:
        return x if self.active is None else self.active(x)

    @property
    def gives_codes(self) -> bool:
        return self.active is not None and self.active.gives_codes

    @property
    def grid_of_codes(self) -> str:
        return self.grid_kind if self.active is None else self.active.grid_of_codes

    def codes(self, x: Tensor) -> Codes:
        if self.active is None:
            raise ValueError("codes: got the width 32, which is float; takes a quantized width")
        return self.active.codes(x)

    def for_weight(self, weight: Tensor) -> Quantizer:
        return self._mapped(lambda q: q.for_weight(weight))

    def for_input(self) -> Quantizer:
        return self._mapped(lambda q: q.for_input())

    def at_end(self, bits: int, place: str) -> Quantizer:
        return self.like()._mapped(lambda q: q.at_end(bits, place))

    def _mapped(self, change: Any) -> Quantizer:
        for width, quantizer in self.each.items():
            self.each[width] = None if quantizer is None else change(quantizer)
        self.set_width(self.at)
        return self

    def like(self, **changes: Any) -> Self:
        if changes:
            raise ValueError(
                f"{self}: got other {', '.join(changes)}, which each width sets for itself; takes "
                "an override with a quantizer of its own"
            )
        quantizer = copy.deepcopy(self)
        quantizer.reset()
        return quantizer

    def reset(self) -> None:
        for quantizer in self.each.values():
            if quantizer is not None:
                quantizer.reset()

    def _state(self) -> list[int]:
        return [*super()._state()[:2], max(self.widths), *self.widths, 0]

    def width(self) -> str:
        return "32" if self.active is None else self.active.width()

    @property
    def form(self) -> str:
        return "float" if self.active is None else self.active.form

    def scales(self, x: Tensor) -> int:
        return 0 if self.active is None else self.active.scales(x)

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.widths))}: {self.width()}"

    def __repr__(self) -> str:
        return f"ManyWidths({self.extra_repr()})"


class NormOfWidths(nn.Module):
    """Batch norms, one of which is active. If `fuse_` makes the active one take its statistics from
    exact sums, it does so for all of them."""

    def norms(self) -> list[nn.Module]:
        raise NotImplementedError

    @property
    def active(self) -> nn.Module:
        """The batch norm that computes."""
        raise NotImplementedError

    def tell_layer(self) -> None:
        """Makes the integer layer whose exact sums are normalized, if any, use the active one."""
        for layer in getattr(self.active, "follows", ()):
            layer.norm = (self.active,)


class BatchNormOfWidths(NormOfWidths):
    """A copy of a batch norm for each width. The original's state dict can be loaded too: it sets
    all copies."""

    def __init__(self, norm: _BatchNorm, widths: Sequence[int]) -> None:
        super().__init__()
        self.each = nn.ModuleDict({str(w): copy.deepcopy(norm) for w in _checked(widths)})
        self.set_width(widths[0])
        self.train(norm.training)

    @property
    def widths(self) -> list[int]:
        return [int(width) for width in self.each]

    def set_width(self, width: int) -> None:
        self.at = width
        self.tell_layer()

    def norms(self) -> list[nn.Module]:
        return list(self.each.values())

    @property
    def active(self) -> nn.Module:
        return self.each[str(self.at)]

    def forward(self, x: Tensor) -> Tensor:
        return self.active(x)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        (first, *_) = self.each.values()
        for name in [*first.state_dict()]:
            if prefix + name in state_dict:
                value = state_dict.pop(prefix + name)
                for width in self.each:  # a copy each: assign=True keeps the tensors themselves
                    state_dict.setdefault(f"{prefix}each.{width}.{name}", value.clone())
        super()._load_from_state_dict(state_dict, prefix, *others)


def split_norms_(model: nn.Module, widths: Sequence[int]) -> nn.Module:
    """Replaces every batch norm of a model by copies, one for each width. Call it before the
    optimizer is constructed.

    Args:
        model: any module. Changed in place.
        widths: such as ``[4, 2]``; 32 is float.

    Returns:
        ``model``; a `BatchNormOfWidths` if it is itself a batch norm.

    Raises:
        ValueError: widths that are not 2..8 or 32, repeated ones, or norms that are split already.

    Example:
        >>> import noisyq_fast
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> model = noisyq_fast.split_norms_(model, [4, 2])
        >>> with noisyq_fast.set_bits(model, 2):
        ...     model[1].at
        2
    """
    widths = _checked(widths)
    holder = nn.ModuleList([model])
    modules = list(holder.modules())
    if any(isinstance(module, BatchNormOfWidths) for module in modules):
        raise ValueError("model: got batch norms that were split already")
    split: dict[nn.Module | None, nn.Module] = {
        m: BatchNormOfWidths(m, widths) for m in modules if isinstance(m, _BatchNorm)
    }
    for parent in modules:
        for name, child in parent._modules.items():
            parent._modules[name] = split.get(child, child)
    return holder[0]


@contextmanager
def set_bits(model: nn.Module, bits: int) -> Iterator[None]:
    """A context in which the model computes at one of its widths.

    Afterwards, also after an error, each part has the width that it had before.

    Args:
        model: a module with `ManyWidths` quantizers, batch norms of `split_norms_`, or both.
        bits: one of its widths; 32 is float, if it has that width.

    Raises:
        TypeError: ``model`` is not a module, or ``bits`` not an int.
        ValueError: a model of one width, or without the width ``bits``.

    Example:
        >>> import torch, noisyq_fast
        >>> weight = noisyq_fast.ManyWidths(noisyq_fast.AbsMax(4), [4, 2])
        >>> layer = noisyq_fast.QuantLinear(3, 2, weight=weight)
        >>> with noisyq_fast.set_bits(layer, 2):
        ...     layer.weight_bits
        2
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, takes a torch.nn.Module")
    checks.integer("bits", bits)
    parts = [m for m in model.modules() if isinstance(m, ManyWidths | BatchNormOfWidths)]
    if not parts:
        raise ValueError(
            f"model: got {type(model).__name__} of one width, takes one with ManyWidths quantizers "
            "or with batch norms of split_norms_"
        )
    for part in parts:
        if bits not in part.widths:
            raise ValueError(f"bits: got {bits}, takes one of {', '.join(map(str, part.widths))}")
    before = [part.at for part in parts]
    try:
        for part in parts:
            part.set_width(bits)
        yield
    finally:
        for part, width in zip(parts, before, strict=True):
            part.set_width(width)


def single_width(model: nn.Module, bits: int) -> nn.Module:
    """A copy of a model with one of its widths only, without the quantizers and batch norms of the
    others, and with the same outputs at this width. For a file, or to count its size.

    Args:
        model: a module with `ManyWidths` quantizers, batch norms of `split_norms_`, or both.
        bits: one of its widths; 32 is float, if it has that width.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a model of one width, or without the width ``bits``.

    Example:
        >>> import noisyq_fast
        >>> weight = noisyq_fast.ManyWidths(noisyq_fast.AbsMax(4), [4, 2])
        >>> layer = noisyq_fast.QuantLinear(3, 2, weight=weight)
        >>> noisyq_fast.single_width(layer, 2).weight_quantizer
        AbsMax(bits=2, axis=0)
    """
    with set_bits(model, bits):
        copied = nn.ModuleList([copy.deepcopy(model)])
    for parent in list(copied.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, ManyWidths | BatchNormOfWidths):
                parent._modules[name] = child.each[str(bits)]
                if isinstance(child, ManyWidths) and child.active is not None:
                    child.active.name = child.name
    return copied[0]


def _checked(widths: Sequence[int]) -> Sequence[int]:
    if not widths:
        raise ValueError("widths: got none, takes one or more, such as [4, 3, 2]")
    for width in widths:
        if not isinstance(width, int) or (width != FLOAT and not 2 <= width <= 8):
            raise ValueError(f"widths: got {width!r}, takes 2..8, and 32 for float")
    if len(set(widths)) != len(widths):
        raise ValueError(f"widths: got {list(widths)}, takes each once")
    return widths
