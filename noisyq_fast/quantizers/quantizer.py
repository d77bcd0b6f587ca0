"""What all quantizers have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from noisyq_fast import checks

_STATE_FORMAT = 1
# Small whole numbers are kept as multiples and a half, so that they survive averages of state dicts
# that are rounded down to bytes.
_STATE_STEP = 4


class _OfFloatModel(str):
    """A key missing from a checkpoint that says what to do in the error that `load_state_dict`
    makes of it, if strict: only there it is known whether it is."""

    def __format__(self, spec: str) -> str:
        return (
            f"{self!s} (the checkpoint has no such quantizer: if it is of a float model, load it "
            "before quantize_model_, or with strict=False, which leaves the quantizers as they "
            "are; else convert the model as it was when the checkpoint was written)"
        )


def _keep_off_fast_paths(quantizer: nn.Module, args: tuple[Any, ...]) -> None:
    """Does nothing. `torch.nn.TransformerEncoderLayer` computes by itself, in float, without a call
    of its layers, unless a module in it has a hook."""


class Quantizer(nn.Module):
    """Fake-quantizes a tensor: rounds it to the values that ``bits`` bits can tell apart.

    A subclass defines `fake_quantize`, and `reset` if it keeps a state. One that keeps a range sets
    ``keeps_range``, holds the range still where it is ``frozen``, and defines what calibration asks
    for: `bounds`, `set_bounds` and `fake_quantize_within`.

    Args:
        bits: width of the codes, 2..8.
        axis: one scale for each index of this axis; ``None``: one scale.

    Attributes:
        enabled: ``False`` passes tensors on as they are.
        frozen: whether the range stays as it is in training too, and gives the scale there.
        name: where the quantizer is in a model, for error messages; `quantize_model_` sets it.
    """

    KIND: ClassVar[int] = 0
    """A number that tells the subclass in a state dict; 0 for those outside this package."""
    keeps_range: ClassVar[bool] = False
    """Whether it has a range that is calibrated, frozen and reset."""
    frozen: bool = False  # not in the state dict, like the training mode

    def __init__(self, bits: int = 4, axis: int | None = None) -> None:
        super().__init__()
        checks.integers(bits=bits)
        checks.width(bits=bits)
        checks.axis_type(axis)
        self.bits = bits
        self.axis = axis
        self.enabled = True
        self.name = ""
        # Under a number of its own: those that PyTorch gives, from 0, start anew in a process that
        # loads a pickled model.
        self._forward_pre_hooks[-1] = _keep_off_fast_paths

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        try:
            checks.padded(x)
            return self.fake_quantize(x)
        except (TypeError, ValueError) as error:
            if not self.name:
                raise
            raise type(error)(f"{self.name}: {error}") from error

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``x`` quantized, in its shape, dtype and memory format; differentiable."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forgets what the quantizer has seen or learned."""

    def reset_parameters(self) -> None:
        """What PyTorch calls after it has given memory to a module made on the device ``meta``."""
        self.reset()

    def like(self, **changes: Any) -> Quantizer:
        """A copy of its own that has seen nothing, with other attributes, such as ``bits``."""
        bits = {name: value for name, value in changes.items() if name == "bits"}
        checks.integers(**bits)
        checks.width(**bits)
        quantizer = copy.deepcopy(self)
        vars(quantizer).update({"frozen": False} | changes)
        quantizer.reset()
        return quantizer

    def extra_repr(self) -> str:
        return f"bits={self.bits}, axis={self.axis}"

    # What a summary tells, and what calibration asks for.

    @property
    def form(self) -> str:
        """Such as "signed channel": its grid, and what has a scale of its own."""
        grid = "signed" if self.KIND else type(self).__name__
        return f"{grid} {'tensor' if self.axis is None else 'channel'}"

    def scales(self, x: Tensor) -> int:
        """How many scales a tensor has."""
        return 1 if self.axis is None else x.shape[self.axis]

    def by_range(self, x: Tensor) -> Tensor:
        """The values of a tensor as ``[ranges, values]``."""
        return x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The ends, float32 ``[ranges]``, of the smallest range that holds ``low`` and ``high``."""
        raise NotImplementedError

    def set_bounds(self, low: Tensor, high: Tensor) -> None:
        """Sets the range to ends that are as from `bounds`, or these made smaller by a factor."""
        raise NotImplementedError

    def fake_quantize_within(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """``x``, float32 ``[ranges, values]``, quantized as with this range; nothing is kept."""
        raise NotImplementedError

    # The state. Buffers are statistics: they stay float32 when the model's weights become bfloat16.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            if getattr(self, name).dtype != value.dtype:
                setattr(self, name, value.to(getattr(self, name).device))
        if any(old.is_meta and not getattr(self, name).is_meta for name, old in before.items()):
            self.reset()  # the new memory holds anything
        return self

    def get_extra_state(self) -> Tensor:
        """Format, kind and bits, so that a checkpoint is not read at other bits. A tensor, because
        some tools take nothing else in a state dict."""
        state = [_STATE_STEP * value + _STATE_STEP // 2 for value in self._state()]
        return torch.tensor(state, dtype=torch.uint8, device="cpu")

    def _state(self) -> list[int]:
        return [_STATE_FORMAT, self.KIND, self.bits]

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set: `_load_from_state_dict` compares."""

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
        """What a saved extra state has that this quantizer has not; empty if it is the same."""
        own = self._state()
        there = saved
        if isinstance(saved, Tensor) and saved.numel() == len(own):
            there = [int(value // _STATE_STEP) for value in saved.flatten().tolist()]
        if there == own:
            return ""
        if isinstance(there, list) and there[:2] == own[:2]:
            return (
                f"the checkpoint has {there[2]} bits, the model {self.bits}; convert the model "
                "with the bits of the checkpoint"
            )
        return (
            f"the checkpoint has another kind of quantizer ({there}), the model a "
            f"{type(self).__name__} with {self.bits} bits ({own}); convert the model as it was "
            "when the checkpoint was written"
        )
