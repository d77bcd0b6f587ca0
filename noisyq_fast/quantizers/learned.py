"""The base class of learned quantizers: parameters, their initialization, and their constraints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from noisyq_fast.backends.reference.composed import without_values
from noisyq_fast.backends.reference.learned import sum_of_groups
from noisyq_fast.backends.reference.levels import scale_of_codes
from noisyq_fast.grid import FULL, UNSIGNED, check_bits
from noisyq_fast.integer.codes import Codes
from noisyq_fast.integer.deferred import Deferred, deferrable
from noisyq_fast.operators import checks, gradients
from noisyq_fast.operators.granularity import TOKEN
from noisyq_fast.operators.learned import fake_quantize_learned, quantize_learned
from noisyq_fast.quantizers.quantizer import Quantizer, with_name_in_errors
from noisyq_fast.rules import PARAMETERS

WEIGHT, INPUT = "weight", "input"
LEAST = 2.0**-24


class LearnedQuantizer(Quantizer):
    """A quantizer whose range is learned with the weights, and initialized from the first tensor.

    The layer sets its role: a weight has values of both signs, the input of a layer none below 0,
    unless ``signed`` says otherwise. The first tensor is the weight in the first forward, or the
    first batch in training; `noisyq_fast.calibrate` initializes earlier. The state dict records
    whether the parameters are initialized.

    A subclass defines its ``rule``, its codes, the initial values of its parameters (`initial`) and
    their constraints (`constrain`). `noisyq_fast.parameter_groups` puts the parameters into an
    optimizer group of their own; `noisyq_fast.constrain_` calls `constrain` after each step.

    Args:
        bits: width of the codes, 2..8.
        axis: parameters for each index of this axis of a weight; ``None``: for the whole tensor.
        signed: whether values below 0 have codes; ``None``: for weights only.

    Attributes:
        initialized: whether the parameters are initialized.
        role: ``"weight"`` or ``"input"``.
    """

    keeps_range: ClassVar[bool] = True
    REMEDY: ClassVar[str] = (
        "use one with signed=True here, such as with "
        "overrides={...: {'activation': noisyq_fast.LSQ(4, signed=True)}}"
    )
    FOR: ClassVar[frozenset[str]] = frozenset({WEIGHT, INPUT})

    axis: int | None

    initialized: bool = False
    # In data-parallel training: the sum and the maximum of a tensor over the ranks.
    sum_of_ranks: Callable[[Tensor], Tensor] | None = None
    max_of_ranks: Callable[[Tensor], Tensor] | None = None

    def __init__(
        self, bits: int = 4, axis: int | None = None, *, signed: bool | None = None
    ) -> None:
        if axis == TOKEN:
            raise ValueError("axis: got 'token', which has no parameters to learn; takes None or 0")
        if signed is not None:
            checks.boolean("signed", signed)
        super().__init__(bits, axis, FULL)
        self.signed = signed
        self.role = INPUT if INPUT in self.FOR else WEIGHT
        self._set_grid()
        self._allocate([])

    # Defined by subclasses.

    @property
    def rule(self) -> str:
        """The name of a rule in `noisyq_fast.rules`."""
        raise NotImplementedError

    @property
    def code_ends(self) -> tuple[int, int]:
        """The smallest and the largest code."""
        if self.is_signed:
            return -(1 << self.bits - 1), (1 << self.bits - 1) - 1
        return 0, (1 << self.bits) - 1

    def initial(self, x: Tensor) -> tuple[Tensor, ...]:
        """The initial parameters: for each, one float32 value per group of ``x``."""
        raise NotImplementedError

    def constrain(self) -> None:
        """Moves the parameters back to valid values after a step: positive ones."""
        for parameter in self.learned():
            parameter.data.clamp_(min=LEAST)

    def gradient_scale(self, x: Tensor) -> float:
        """A factor of the gradients of the parameters."""
        return 1.0

    # Called by a layer.

    @property
    def is_signed(self) -> bool:
        return self.role == WEIGHT if self.signed is None else self.signed

    def for_weight(self, weight: Tensor) -> LearnedQuantizer:
        self._take_role(WEIGHT)
        self.axis = checks.front_axis(self.axis, weight)
        self._allocate([] if self.axis is None else [weight.shape[self.axis]])
        return self

    def for_input(self) -> LearnedQuantizer:
        self._take_role(INPUT)
        self.axis = None
        self._allocate([])
        return self

    def at_end(self, bits: int, place: str) -> Quantizer:
        return self.like(bits=bits, **({"signed": True} if place == "model input" else {}))

    def _take_role(self, role: str) -> None:
        if role not in self.FOR:
            raise ValueError(
                f"{role}: got {self}, which is for {' and '.join(self.FOR)}s; takes another "
                "quantizer, see noisyq_fast.quantizers"
            )
        self.role = role
        self._set_grid()

    def _set_grid(self) -> None:
        self.grid_kind = FULL if self.is_signed else UNSIGNED
        self._left_to_look_at = 2 if self.grid_kind == UNSIGNED else 0

    # The parameters.

    def learned(self) -> list[nn.Parameter]:
        """The parameters, in the order of the rule."""
        return [getattr(self, name) for name in PARAMETERS[self.rule]]

    def _allocate(self, shape: list[int]) -> None:
        device = next((p.device for p in self.parameters()), None)
        for name in [*self._parameters]:
            delattr(self, name)
        for name in PARAMETERS[self.rule]:
            value = torch.ones(shape, dtype=torch.float32, device=device)
            self.register_parameter(name, nn.Parameter(value))
        self.initialized = False

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Initializes the parameters from ``x``."""
        if next(self.parameters()).is_meta and not x.is_meta:
            self.to_empty(device=x.device)
        if self.axis is not None and next(self.parameters()).dim() == 0:
            raise ValueError(
                f"axis: got {self.axis} while its size is not known yet; call "
                "for_weight(weight) first, as layers do"
            )
        values = self.initial(x.detach())
        if not x.is_meta and not all(bool(value.isfinite().all()) for value in values):
            raise ValueError(
                "x: got a NaN or an infinity in the first tensor, or values whose sum overflows "
                "float32; takes smaller, finite values"
            )
        self.begin(values)

    @torch.no_grad()
    def begin(self, values: Sequence[Tensor]) -> None:
        """Sets the parameters."""
        for parameter, value in zip(self.learned(), values, strict=True):
            parameter.data.copy_(value.reshape(parameter.shape))
        self.constrain()
        self.starts += 1
        self.initialized = True

    @torch.no_grad()
    def reset(self) -> None:
        for parameter in self.parameters():
            parameter.data.fill_(1)
        self.initialized = False
        self.starts += 1

    @property
    def range(self) -> Tensor:
        """The parameters, stacked; NaN before they are initialized."""
        stacked = torch.stack([p.detach() for p in self.learned()])
        return stacked if self.initialized else torch.full_like(stacked, torch.nan)

    def stacked(self) -> Tensor:
        """The parameters as operators expect them: float32 ``[parameters, ...]``."""
        parameters = torch.stack([parameter.float() for parameter in self.learned()])
        return parameters.detach() if self.frozen else parameters

    def fake_quantize(self, x: Tensor) -> Tensor:
        self.prepare(x)
        return fake_quantize_learned(
            x, self.stacked(), self.rule, *self.code_ends, self.axis, self.gradient_scale(x)
        )

    def prepare(self, x: Tensor) -> None:
        """Initializes the parameters from the first tensor."""
        if self.initialized:
            return
        if self.role == INPUT and not self.training:
            raise ValueError(
                f"{type(self).__name__}: got an input in evaluation before its parameters were "
                "initialized; first call the model on a batch in training, "
                "set them with noisyq_fast.calibrate(model, batches), or load a checkpoint that "
                "has them; to evaluate in float, use `with noisyq_fast.disabled(model):`"
            )
        if x.numel() == 0 and self.sum_of_ranks is None:
            raise ValueError("x: got a first tensor without elements, takes one with some")
        _initialize(self, x)

    # Reductions by group.

    def mean_absolute(self, x: Tensor) -> Tensor:
        """mean |x| of each group, summed in the order of `noisyq_fast.rules`; over all ranks."""
        total = sum_of_groups(x.abs().float(), x, self.axis)
        count = torch.full_like(total, x.numel() / max(1, total.numel()))
        if self.sum_of_ranks is not None and self.role == INPUT:
            total, count = self.sum_of_ranks(torch.stack([total, count]))
        return total / count.clamp(min=1)

    def largest(self, x: Tensor) -> Tensor:
        """The largest value of each group; over all ranks."""
        values = x.reshape(1, -1) if self.axis is None else x.movedim(self.axis, 0).flatten(1)
        if values.shape[1] == 0:
            values = values.new_full((values.shape[0], 1), -torch.inf)
        found = values.float().amax(1)
        if self.max_of_ranks is not None and self.role == INPUT:
            found = self.max_of_ranks(found)
        return found.reshape([] if self.axis is None else [-1])

    # For calibration.

    def bounds(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not self.is_signed:
            return torch.zeros_like(low), high.clamp(min=LEAST)
        absmax = torch.maximum(-low, high).clamp(min=LEAST)
        return -absmax, absmax

    def set_bounds(self, low: Tensor, high: Tensor) -> None:
        self.begin(self.within(low, high))

    def within(self, low: Tensor, high: Tensor) -> tuple[Tensor, ...]:
        """The parameters for this range."""
        raise NotImplementedError

    def fake_quantize_within(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        parameters = torch.stack(self.within(low, high))
        return fake_quantize_learned(x, parameters, self.rule, *self.code_ends, 0)

    # The state.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedQuantizer:
        before = {name: p.data for name, p in self.named_parameters(recurse=False)}
        super()._apply(fn, recurse)
        for name, value in before.items():
            parameter = getattr(self, name)
            if parameter.dtype != value.dtype:  # they stay float32, as buffers do
                parameter.data = value.to(parameter.device)
            if value.is_meta and not parameter.is_meta:
                self.reset()
        return self

    def _state(self) -> list[int]:
        """What must match when loading: the rule with its codes, and the granularity."""
        variant = 2 * (self.axis is not None) + self.is_signed
        return [*super()._state()[:3], variant, self._variant()]

    def _variant(self) -> int:
        """Which variant of the rule, if there are several."""
        return 0

    def get_extra_state(self) -> Tensor:
        return _with_flag(super().get_extra_state(), self.initialized)

    def set_extra_state(self, state: Any) -> None:
        if isinstance(state, Tensor) and state.numel():
            self.initialized = bool(state[-1] >= 4)

    def _difference(self, saved: Any) -> str:
        return super()._difference(saved[:-1] if isinstance(saved, Tensor) else saved)

    def extra_repr(self) -> str:
        signed = "" if self.signed is None else f", signed={self.signed}"
        axis = "" if self.axis is None else f", axis={self.axis}"
        return f"bits={self.bits}{axis}{signed}{', frozen' if self.frozen else ''}"

    def width(self) -> str:
        return f"{self.bits} {type(self).__name__}"

    @property
    def form(self) -> str:
        return f"{type(self).__name__} {'tensor' if self.axis is None else 'channel'}"

    @property
    def gives_codes(self) -> bool:
        return type(self).code_scale is not LearnedQuantizer.code_scale and self._are_bytes()

    def _are_bytes(self) -> bool:
        low, high = self.code_ends
        return -128 <= low <= high <= (127 if low else 255)

    @with_name_in_errors
    def codes(self, x: Tensor) -> Codes:
        with torch.no_grad():
            self.prepare(x)
            values, ends = x, None
            if isinstance(x, Deferred):
                values = x.written()
                # Behind a ReLU they tell a NaN, and an infinity from it.
                ends = x.extremes_found() if x.chain.relu else None
            low, high = self._byte_ends()
            codes = quantize_learned(values, self.stacked(), self.rule, low, high, self.axis)
            found = values if ends is None or self.axis is not None else ends
            scale = scale_of_codes(found, self.code_scale(), self.axis)
        source = x
        if gradients.wanted():
            how = self.rule, low, high, self.axis, self.gradient_scale(x)
            source = source_of_codes(x, self.stacked(), *how)
        codes = codes.to(torch.int8 if low else torch.uint8)
        return Codes(codes, scale, None, max(-low, high), source)

    def _byte_ends(self) -> tuple[int, int]:
        low, high = self.code_ends
        if not self._are_bytes():
            raise ValueError(
                f"codes: got {self}, whose codes {low}..{high} do not fit into a byte; takes "
                "fewer bits"
            )
        return low, high

    def code_scale(self) -> Tensor:
        """The scale of the codes."""
        raise NotImplementedError(
            f"{type(self).__name__} has no scale for its codes: integer layers do not take it"
        )

    def like(self, **changes: Any) -> Self:
        check_bits(changes.get("bits", self.bits))
        quantizer = super().like(**changes)
        quantizer._set_grid()
        quantizer._allocate([*quantizer.learned()[0].shape])  # also sets requires_grad
        return quantizer


@torch.compiler.disable
def _initialize(quantizer: LearnedQuantizer, x: Tensor) -> None:
    quantizer.initialize(x)


def _with_flag(state: Tensor, flag: bool) -> Tensor:
    """The state with one more number, encoded as in `Quantizer.get_extra_state`."""
    return torch.cat([state, state.new_tensor([6 if flag else 2])])


def source_of_codes(
    x: Tensor, parameters: Tensor, rule: str, low: int, high: int, axis: int | None, scale: float
) -> Tensor:
    """What gradients of codes flow to, and through it to x and the parameters: the float values of
    `fake_quantize_learned`, which nothing reads, and so without them where nothing traces or
    transforms x."""
    how = rule, low, high, axis, scale
    if not deferrable(x):
        return fake_quantize_learned(x, parameters, *how)
    x = x.values() if isinstance(x, Deferred) else x
    return gradients.Learned.apply(lambda: without_values(x), x, parameters, *how)


def quotient(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor``, rounded once: division by a Python number is not, on some devices."""
    return x / torch.full_like(x, divisor)
