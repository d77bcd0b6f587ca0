"""The base class of quantizers."""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from noisyq_fast.grid import (
    AFFINE,
    KINDS,
    LARGEST_STEPS,
    SIGNED,
    UNSIGNED,
    Grid,
    check_bits,
    check_kind,
)
from noisyq_fast.grid import grid as grid_of
from noisyq_fast.integer.codes import Codes
from noisyq_fast.operators import checks, dispatch
from noisyq_fast.operators.granularity import TOKEN, Axis, Groups, by_group, check_group_size

_STATE_FORMAT = 1
# A small integer n is stored as n * 4 + 2, so that it survives averages of state dicts, which may
# be rounded down.
_STATE_STEP = 4
# A byte then holds integers below 64. Larger ones (group sizes) are stored as digits.
_STATE_BASE = 64
_STATE_DIGITS = 3
_BATCHES_LOOKED_AT = 2


class _OfFloatModel(str):
    """The key of a missing extra state. In the error of a strict `load_state_dict` it formats as a
    hint; whether loading is strict is known only there."""

    def __format__(self, spec: str) -> str:
        return (
            f"{self!s} (the checkpoint has no such quantizer: if it is of a float model, load it "
            "before quantize_model_, or with strict=False, which leaves the quantizers as they "
            "are; else convert the model in the same way as the one of the checkpoint)"
        )


def _keep_off_fast_paths(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
    """Does nothing. `torch.nn.TransformerEncoderLayer` bypasses its layers with a fused float path
    unless a module in it has a hook."""


def with_name_in_errors(method: Callable) -> Callable:
    """Adds the quantizer's name in the model to the errors of a method."""

    @functools.wraps(method)
    def wrapped(self: Quantizer, x: Tensor) -> Any:
        try:
            return method(self, x)
        except (TypeError, ValueError) as error:
            if not self.name:
                raise
            raise type(error)(f"{self.name}: {error}") from error

    return wrapped


class Quantizer(nn.Module):
    """Fake-quantizes a tensor: rounds it to the values that have a code of ``bits`` bits.

    A subclass defines `fake_quantize`, and `reset` if it keeps a state. One that keeps a range sets
    ``keeps_range``, does not move the range while it is ``frozen``, and defines the methods that
    calibration calls: `bounds`, `set_bounds` and `fake_quantize_within`.

    Args:
        bits: width of the codes, 2..8.
        axis: one scale for each index of this axis; ``None``: one scale; ``"token"``: one for each
            index of all axes but the last.
        grid: ``"signed"``, ``"full"``, ``"unsigned"``, ``"affine"`` or ``"odd"``, as in `Grid`.
        group_size: the number of input channels that share a scale, as for `fake_quantize`.

    Attributes:
        grid: the `Grid`.
        enabled: ``False`` passes tensors on unchanged.
        frozen: whether the range is fixed in training too, and the scale comes from it.
        name: its name in the model, for error messages; `quantize_model_` sets it.
    """

    KIND: ClassVar[int] = 0
    """Identifies the subclass in a state dict; 0 for classes outside this package."""
    REMEDY: ClassVar[str] = (
        "use the signed or the affine grid here, such as with "
        "overrides={...: {'activation_grid': 'affine'}}"
    )
    """Advice in the warning about negative values, which an unsigned grid makes 0."""
    keeps_range: ClassVar[bool] = False
    """Whether it has a range that is calibrated, frozen and reset."""
    range: Tensor
    """Only where ``keeps_range``."""
    gives_codes: ClassVar[bool] = False
    """Whether `codes` is defined."""
    frozen: bool = False  # not in the state dict, like the training mode
    starts: int = 0
    """How often its parameters were initialized or reset."""

    grid_kind: str = SIGNED
    group_size: int | None = None
    _left_to_look_at: int = 0

    def __init__(
        self,
        bits: int = 4,
        axis: Axis = None,
        grid: str = SIGNED,
        group_size: int | None = None,
    ) -> None:
        super().__init__()
        check_kind(grid)
        check_bits(bits, grid)
        if axis != TOKEN:
            checks.axis_type(axis)
        check_group_size(group_size)
        self.bits = bits
        self.axis = axis
        self.grid_kind = grid
        self.group_size = group_size
        self._left_to_look_at = _BATCHES_LOOKED_AT if grid == UNSIGNED else 0
        self.enabled = True
        self.name = ""
        # Key -1: the keys that PyTorch assigns start again from 0 in a process that loads a pickled
        # model.
        self._forward_pre_hooks[-1] = _keep_off_fast_paths

    @property
    def grid(self) -> Grid:
        if torch.compiler.is_compiling():  # its graphs cannot hold a cached object
            return Grid(self.bits, self.grid_kind)
        return grid_of(self.bits, self.grid_kind)

    @with_name_in_errors
    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        checks.padded(x)
        if self._left_to_look_at and self.training:
            self._look_for_negatives(x)
        return self.fake_quantize(x)

    @property
    def grid_of_codes(self) -> str:
        """The kind of the grid that `codes` are on."""
        return self.grid_kind

    def codes(self, x: Tensor) -> Codes:
        """``x`` as `Codes`, for layers that compute in integers. The dequantized values have the
        same bits as `fake_quantize`. Only if ``gives_codes``."""
        raise NotImplementedError(f"{type(self).__name__} gives no codes")

    def _codes(
        self,
        x: Tensor,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None = None,
        masked: Tensor | None = None,
    ) -> Codes:
        if self.grid_kind != AFFINE:
            zero_point = None
        if masked is not None and masked.numel() == 0:
            masked = None
        largest = LARGEST_STEPS[self.bits, self.grid_kind]
        return Codes(codes, scale, zero_point, largest, x, masked)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` quantized, in its shape, dtype and memory format; differentiable."""
        raise NotImplementedError

    def _look_for_negatives(self, x: Tensor) -> None:
        """Warns of values that an unsigned grid makes 0. Only in the first training batches: the
        check reads ``x`` once more, and synchronizes with a GPU."""
        if torch.compiler.is_compiling() or not dispatch.is_plain(x):
            return
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._left_to_look_at -= 1
        if (x < 0).any():
            self.warn_of_negatives()

    def warn_of_negatives(self) -> None:
        """Warns, once, that the unsigned grid makes negative values 0."""
        self._left_to_look_at = 0
        warnings.warn(
            f"{self.name or type(self).__name__}: got values below 0, which the unsigned grid "
            f"makes 0, without a gradient; {self.REMEDY}",
            stacklevel=2,
        )

    def reset(self) -> None:
        """Forgets ranges and learned parameters."""

    def reset_parameters(self) -> None:
        """Called by PyTorch tools after they have allocated a module made on the device
        ``meta``."""
        self.reset()

    def like(self, **changes: Any) -> Self:
        """A reset copy with other attributes, such as ``bits``."""
        check_bits(changes.get("bits", self.bits), self.grid_kind)
        quantizer = copy.deepcopy(self)
        vars(quantizer).update({"frozen": False} | changes)
        quantizer._left_to_look_at = _BATCHES_LOOKED_AT if self.grid_kind == UNSIGNED else 0
        quantizer.reset()
        return quantizer

    # Called by a layer on its own copy.

    def for_weight(self, weight: Tensor) -> Quantizer:
        """This quantizer, or a replacement, for a weight with its output channels first."""
        return self

    def for_input(self) -> Quantizer:
        """This quantizer, or a replacement, for the input of a layer."""
        return self

    def at_end(self, bits: int, place: str) -> Quantizer:
        """Its replacement in the first and the last layers of a model, with other bits. ``place``
        is ``"weight"``, ``"input"`` or ``"model input"``, which may have values below 0."""
        return self.like(bits=bits)

    def extra_repr(self) -> str:
        axis = f"group_size={self.group_size}" if self.group_size else f"axis={self.axis!r}"
        grid = "" if self.grid_kind == SIGNED else f", grid={self.grid_kind!r}"
        return f"bits={self.bits}, {axis}{grid}"

    def width(self) -> str:
        """Bits, with grid and groups if not the default, such as "4 affine group 32"."""
        parts = [str(self.bits), *([] if self.grid_kind == SIGNED else [self.grid_kind])]
        if by_group(self.axis, self.group_size):
            parts.append(f"group {self.group_size}" if self.group_size else TOKEN)
        return " ".join(parts)

    # For `summary` and `calibrate`.

    @property
    def form(self) -> str:
        """The grid, and what has a scale of its own, such as "signed channel"."""
        grid = self.grid_kind if self.KIND else type(self).__name__
        if self.group_size:
            return f"{grid} group {self.group_size}"
        named: dict[Axis, str] = {None: "tensor", TOKEN: TOKEN}
        return f"{grid} {named.get(self.axis, 'channel')}"

    def scales(self, x: Tensor) -> int:
        """The number of scales for ``x``."""
        if by_group(self.axis, self.group_size):
            return math.prod(Groups(x.detach(), self.axis, self.group_size).shape)
        assert not isinstance(self.axis, str)
        return 1 if self.axis is None else x.shape[self.axis]

    def by_range(self, x: Tensor) -> Tensor:
        """The values of a tensor as ``[ranges, values]``."""
        assert not isinstance(self.axis, str)
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends, each float32 ``[ranges]``, of the smallest range that contains ``low`` and
        ``high``."""
        raise NotImplementedError

    def set_bounds(self, low: Tensor, high: Tensor) -> None:
        """Sets the range to ends from `bounds`, or to such ends times a factor below 1."""
        raise NotImplementedError

    def fake_quantize_within(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``x``, float32 ``[ranges, values]``, quantized with this range; changes no state."""
        raise NotImplementedError

    # The state. Buffers are statistics: they stay float32 when the model's weights become bfloat16.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        if any(old.is_meta and not getattr(self, name).is_meta for name, old in before.items()):
            self.reset()  # the new memory is uninitialized
        return self

    def get_extra_state(self) -> Tensor:
        """Format, kind, bits and grid, so that loading a checkpoint with others is an error. A
        tensor, because some tools allow nothing else in a state dict."""
        return _encoded(self._state())

    def state_on_signed_grid(self) -> Tensor:
        """The extra state of checkpoints from before there were other grids."""
        return _encoded([_STATE_FORMAT, self.KIND, self.bits])

    def _state(self) -> list[int]:
        state = [_STATE_FORMAT, self.KIND, self.bits]
        if self.grid_kind == SIGNED and not by_group(self.axis, self.group_size):
            return state
        size = self.group_size or 0
        digits = [size // _STATE_BASE**i % _STATE_BASE for i in range(_STATE_DIGITS)]
        return [*state, KINDS.index(self.grid_kind), int(self.axis == TOKEN), *digits]

    def set_extra_state(self, state: Any) -> None:
        """Sets nothing: `_load_from_state_dict` compares the states."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = f"{prefix}_extra_state"
        if key in state_dict and (difference := self._difference(state_dict[key])):
            error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {difference}")
        for name, buffer in self.named_buffers(recurse=False):
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.dtype != buffer.dtype:
                state_dict[prefix + name] = value.to(buffer.dtype)
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )
        if key in missing_keys and not any(isinstance(k, _OfFloatModel) for k in missing_keys):
            i = missing_keys.index(key)
            missing_keys[i] = _OfFloatModel(missing_keys[i])

    def _difference(self, saved: Any) -> str:
        """How a saved extra state differs from this quantizer's; empty if it does not."""
        own = self._state()
        there = saved
        if isinstance(saved, Tensor):
            there = [int(value // _STATE_STEP) for value in saved.flatten().tolist()]
        if there == own:
            return ""
        if isinstance(there, list) and there[:2] == own[:2] and len(there) > 2:
            if there[3:] == own[3:]:
                return (
                    f"the checkpoint has {there[2]} bits, the model {self.bits}; convert the model "
                    "with the bits of the checkpoint"
                )
            had, has = _described(there), _described(own)
            if had and has:
                return (
                    f"the checkpoint has {had}, the model {has}; convert the model with the bits "
                    "and the grid of the checkpoint"
                )
        return (
            f"the checkpoint has another kind of quantizer ({there}), the model a "
            f"{type(self).__name__} with {self.bits} bits ({own}); convert the model in "
            "the same way as the one of the checkpoint"
        )


def _encoded(state: list[int]) -> Tensor:
    values = [_STATE_STEP * value + _STATE_STEP // 2 for value in state]
    return torch.tensor(values, dtype=torch.uint8, device="cpu")


def _described(state: list[int]) -> str | None:
    """Bits, grid and groups in words; None for an unknown format."""
    _, _, bits, *rest = state
    kind, is_token, *digits = rest or [0, 0, *[0] * _STATE_DIGITS]
    if len(digits) != _STATE_DIGITS or kind >= len(KINDS):
        return None
    size = sum(digit * _STATE_BASE**i for i, digit in enumerate(digits))
    groups = f" for groups of {size}" if size else " for tokens" if is_token else ""
    return f"{bits} bits on the {KINDS[kind]} grid{groups}"
