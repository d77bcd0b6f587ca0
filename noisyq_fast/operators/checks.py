"""Argument checks. Each error names the argument, what it got, and what it takes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noisyq_fast.grid import Grid, check_bits
from noisyq_fast.grid import grid as grid_of
from noisyq_fast.rules import Rule, check_rule

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STRAIGHT_THROUGH_ESTIMATORS = ("identity", "clipped")


# Types: the dispatcher checks them too, but its errors do not name the argument.


def tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")


def tensors(**values: object) -> None:
    for name, value in values.items():
        tensor(name, value)


def is_gradient_batch(x: Tensor) -> bool:
    """Whether it is a batch of gradients: of ``is_grads_batched=True``."""
    return torch._C._functorch.is_legacy_batchedtensor(x)


def padded(*values: object) -> None:
    if any(isinstance(value, Tensor) and value.is_nested for value in values):
        raise ValueError(
            "expected padded tensors, got a nested tensor; of a torch.nn.TransformerEncoder set "
            "use_nested_tensor = False"
        )


def integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), takes an int")


def integers(**values: object) -> None:
    for name, value in values.items():
        integer(name, value)


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), takes a bool")


def number(name: str, value: object) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name}: got {value!r} ({type(value).__name__}), takes a number")


def axis_type(axis: object) -> None:
    if axis is not None:
        integer("axis", axis)


def averaging_constant(value: object) -> None:
    if not isinstance(value, int | float):
        raise TypeError(f"averaging_constant: got {type(value).__name__}, takes a float")
    if not 0 <= value <= 1:
        raise ValueError(f"averaging_constant: got {value}, takes 0..1")


def ste(name: str) -> None:
    if name not in STRAIGHT_THROUGH_ESTIMATORS:
        raise ValueError(f"ste: got {name!r}, takes {_one_of(STRAIGHT_THROUGH_ESTIMATORS)}")


# Each function checks the arguments of one operator, and returns them as backends take them: qmax
# in place of bits, or a `Grid` in place of bits and kind, and an axis counted from the front.


def dynamic(x: Tensor, bits: int, axis: int | None) -> tuple[Tensor, int, int | None]:
    _dtype("x", x, FLOAT_DTYPES)
    return x, qmax(bits), front_axis(axis, x)


def many(
    tensors: list[Tensor], bits: list[int], axis: int | None
) -> tuple[list[Tensor], list[int], list[int | None]]:
    if not tensors:
        raise ValueError("tensors: got none, takes one or more")
    if len(bits) != len(tensors):
        raise ValueError(f"bits: got {len(bits)} for {len(tensors)} tensors, takes one for each")
    for i, x in enumerate(tensors):
        _dtype(f"tensors[{i}]", x, FLOAT_DTYPES)
        if x.device != tensors[0].device:
            device = tensors[0].device
            raise ValueError(f"tensors[{i}]: got a tensor on {x.device}, takes one on {device}")
    return tensors, [qmax(b) for b in bits], [front_axis(axis, x) for x in tensors]


def given_range(
    x: Tensor, running_absmax: Tensor, bits: int, axis: int | None
) -> tuple[Tensor, Tensor, int, int | None]:
    x, largest_code, axis = dynamic(x, bits, axis)
    _one_per_group("running_absmax", running_absmax, x, axis)
    _no_gradient("running_absmax", running_absmax)
    return x, running_absmax, largest_code, axis


def ema(
    x: Tensor,
    running_absmax: Tensor,
    observed: Tensor | None,
    bits: int,
    axis: int | None,
    constant: float,
) -> tuple[Tensor, Tensor, Tensor | None, int, int | None, float]:
    averaging_constant(constant)
    x, running_absmax, largest_code, axis = given_range(x, running_absmax, bits, axis)
    _own_memory("running_absmax", running_absmax, "x", x)
    if observed is not None:
        _one_per_range(observed, running_absmax)
        _own_memory("observed", observed, "x", x)
        _own_memory("observed", observed, "running_absmax", running_absmax)
    return x, running_absmax, observed, largest_code, axis, constant


def quantized_on_grid(
    x: Tensor, bits: int, axis: int | None, kind: str
) -> tuple[Tensor, Grid, int | None]:
    _dtype("x", x, FLOAT_DTYPES)
    return x, grid_of(bits, kind), front_axis(axis, x)


def dynamic_on_grid(
    x: Tensor, bits: int, axis: int | None, kind: str, masked: str
) -> tuple[Tensor, Grid, int | None, str]:
    return *quantized_on_grid(x, bits, axis, kind), masked


def given_range_on_grid(
    x: Tensor, running_absmax: Tensor, bits: int, axis: int | None, kind: str, masked: str
) -> tuple[Tensor, Tensor, Grid, int | None, str]:
    x, grid, axis, masked = dynamic_on_grid(x, bits, axis, kind, masked)
    _one_per_group("running_absmax", running_absmax, x, axis, ends=grid.is_affine)
    _no_gradient("running_absmax", running_absmax)
    return x, running_absmax, grid, axis, masked


def ema_on_grid(
    x: Tensor,
    running_absmax: Tensor,
    observed: Tensor | None,
    bits: int,
    axis: int | None,
    constant: float,
    kind: str,
    masked: str,
) -> tuple[Tensor, Tensor, Tensor | None, Grid, int | None, float, str]:
    averaging_constant(constant)
    x, running_absmax, grid, axis, masked = given_range_on_grid(
        x, running_absmax, bits, axis, kind, masked
    )
    _own_memory("running_absmax", running_absmax, "x", x)
    if observed is not None:
        _one_per_range(observed, running_absmax, ends=grid.is_affine)
        _own_memory("observed", observed, "x", x)
        _own_memory("observed", observed, "running_absmax", running_absmax)
    return x, running_absmax, observed, grid, axis, constant, masked


def known_range(running_absmax: Tensor, observed: Tensor, ends: bool = False) -> Tensor:
    """The moving average ``running / observed``."""
    _one_per_range(observed, running_absmax, ends)
    _no_gradient("running_absmax", running_absmax)
    if not torch.compiler.is_compiling():
        for name, value in (("running_absmax", running_absmax), ("observed", observed)):
            if not torch._C._functorch.is_functorch_wrapped_tensor(value):
                _not_freed(name, value)  # PyTorch's division would not raise.
    return running_absmax / observed


def grad_and_clipped(grad: Tensor, clipped: Tensor) -> tuple[Tensor, Tensor]:
    _dtype("grad", grad, FLOAT_DTYPES)
    _dtype("clipped", clipped, (torch.uint8,))
    _same_device("clipped", clipped, grad)
    expected = [packed_size(grad)]
    if list(clipped.shape) != expected:
        raise ValueError(f"clipped: got shape {list(clipped.shape)}, takes {expected}")
    if grad.stride() != torch.empty_like(grad).stride():
        raise ValueError("grad: got a tensor with gaps in its memory, takes a dense one")
    return grad, clipped


def packed_size(x: Tensor) -> int:
    """The number of bytes that hold one bit per element."""
    return (x.numel() + 7) // 8


def codes_and_scale(
    codes: Tensor, scale: Tensor, axis: int | None
) -> tuple[Tensor, Tensor, int | None]:
    _dtype("codes", codes, (torch.int8,))
    axis = front_axis(axis, codes)
    _one_per_group("scale", scale, codes, axis)
    return codes, scale, axis


def codes_on_grid(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> tuple[Tensor, Tensor, Tensor | None, int | None]:
    _dtype("codes", codes, (torch.int8, torch.uint8))
    axis = front_axis(axis, codes)
    _one_per_group("scale", scale, codes, axis)
    if zero_point is not None:
        if codes.dtype != torch.uint8:
            raise TypeError("zero_point: got one for int8 codes, takes one for uint8 codes only")
        _one_per_group("zero_point", zero_point, codes, axis, torch.uint8)
    return codes, scale, zero_point, axis


def learned_codes(
    x: Tensor, parameters: Tensor, name: str, low: int, high: int, axis: int | None
) -> tuple[Tensor, Tensor, Rule, int | None]:
    _dtype("x", x, FLOAT_DTYPES)
    _dtype("parameters", parameters, (torch.float32,))
    _same_device("parameters", parameters, x)
    check_rule(name, low, high)
    rule, axis = Rule(name, low, high), front_axis(axis, x)
    shape = [rule.parameters, *([] if axis is None else [x.shape[axis]])]
    if list(parameters.shape) != shape:
        raise ValueError(
            f"parameters: got shape {list(parameters.shape)}, takes {shape} of {name} for a tensor "
            f"of shape {list(x.shape)} with axis {axis}"
        )
    return x, parameters, rule, axis


def learned(
    x: Tensor, parameters: Tensor, name: str, low: int, high: int, axis: int | None, scale: float
) -> tuple[Tensor, Tensor, Rule, int | None]:
    # `gradient_scale` concerns only the backward.
    return learned_codes(x, parameters, name, low, high, axis)


def learned_backward(
    grad: Tensor,
    x: Tensor,
    parameters: Tensor,
    name: str,
    low: int,
    high: int,
    axis: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Rule, int | None, float]:
    _dtype("grad", grad, FLOAT_DTYPES)
    _same_device("grad", grad, x)
    if grad.shape != x.shape:
        raise ValueError(f"grad: got shape {list(grad.shape)}, takes that of x, {list(x.shape)}")
    return grad, *learned_codes(x, parameters, name, low, high, axis), scale


def range_seen(x: Tensor, running_absmax: Tensor, *_: object) -> None:
    """Checked only on the CPU: elsewhere the check would synchronize with the device."""
    if x.device.type == "cpu" and running_absmax.isnan().any():
        raise ValueError(
            "running_absmax: got NaN, which means that no batch was seen in training; takes a "
            "range that was recorded with training=True: call the model on a batch in training, "
            "after model.train() and with ranges that are not frozen, before an evaluation, set "
            "the ranges with noisyq_fast.calibrate(model, batches), or load a checkpoint that has "
            "them; to evaluate in float, use `with noisyq_fast.disabled(model):`"
        )


ADDER_DTYPES = (torch.float32, torch.float64)
Pair = tuple[int, int]


def adder(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor, Pair, Pair]:
    for name, value in (("x", x), ("weight", weight)):
        _dtype(name, value, ADDER_DTYPES)
        if value.dim() != 4:
            raise ValueError(f"{name}: got shape {list(value.shape)}, takes four sizes")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: got {weight.dtype}, takes {x.dtype}, that of x")
    _same_device("weight", weight, x)
    if x.shape[1] != weight.shape[1]:
        got = f"got {weight.shape[1]} input channels"
        raise ValueError(f"weight: {got}, takes {x.shape[1]}, those of x")
    if 0 in weight.shape:
        raise ValueError(f"weight: got shape {list(weight.shape)}, takes sizes from 1")
    stride, padding = (stride[0], stride[-1]), (padding[0], padding[-1])
    if min(stride) < 1 or min(padding) < 0:
        got = f"got stride {stride} and padding {padding}"
        raise ValueError(f"{got}, takes a stride from 1 and a padding from 0")
    if min(output_size(x, weight, stride, padding)) < 1:
        got = f"got {list(x.shape[2:])} with padding {padding}"
        raise ValueError(f"x: {got}, takes at least the kernel's {list(weight.shape[2:])}")
    return x, weight, stride, padding


def adder_gradient(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Pair, Pair]:
    x, weight, stride, padding = adder(x, weight, stride, padding)
    _dtype("grad", grad, (x.dtype,))
    expected = [len(x), len(weight), *output_size(x, weight, stride, padding)]
    if list(grad.shape) != expected:
        raise ValueError(f"grad: got shape {list(grad.shape)}, takes {expected}")
    _same_device("grad", grad, x)
    return grad, x, weight, stride, padding


def output_size(x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> list[int]:
    """The height and width of the output of a convolution."""
    sides = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return [(side + 2 * pad - kernel) // step + 1 for side, kernel, step, pad in sides]


# Single arguments.


def qmax(bits: int) -> int:
    if not 2 <= bits <= 8:
        check_bits(bits)
    return (1 << bits - 1) - 1


def front_axis(axis: int | None, x: Tensor) -> int | None:
    if axis is None:
        return None
    if not -x.dim() <= axis < x.dim():
        takes = f"{-x.dim()}..{x.dim() - 1} or None" if x.dim() else "None"
        raise ValueError(f"axis: got {axis} for a tensor of shape {list(x.shape)}, takes {takes}")
    return axis % x.dim()


def _dtype(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: got {x.dtype}, takes {_one_of(dtypes)}")
    strided(name, x)


def strided(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise ValueError(f"{name}: got a tensor of layout {x.layout}, takes torch.strided")


def _one_per_group(
    name: str,
    value: Tensor,
    x: Tensor,
    axis: int | None,
    dtype: torch.dtype = torch.float32,
    ends: bool = False,
) -> None:
    """``ends``: two values for each group, low and high."""
    _dtype(name, value, (dtype,))
    shape = (2,) * ends + (() if axis is None else (x.shape[axis],))
    if value.shape != shape:
        raise ValueError(
            f"{name}: got shape {list(value.shape)}, takes {list(shape)} for a tensor of shape "
            f"{list(x.shape)} with axis {axis}"
        )
    _same_device(name, value, x)


def _same_device(name: str, value: Tensor, x: Tensor) -> None:
    if value.device != x.device:
        raise ValueError(f"{name}: got a tensor on {value.device}, takes one on {x.device}")


def _one_per_range(observed: Tensor, running_absmax: Tensor, ends: bool = False) -> None:
    _dtype("observed", observed, (torch.float32,))
    shape = running_absmax.shape[1:] if ends else running_absmax.shape
    if observed.shape != shape:
        of = "an end of running_absmax" if ends else "running_absmax"
        raise ValueError(
            f"observed: got shape {list(observed.shape)}, takes that of {of}, {list(shape)}"
        )
    _same_device("observed", observed, running_absmax)
    _no_gradient("observed", observed)


def _no_gradient(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(
            f"{name}: got a tensor that requires grad, takes one that does not: ranges have no "
            "gradient"
        )


def _own_memory(name: str, value: Tensor, other: str, x: Tensor) -> None:
    """``value`` (at most 2-d) must not share memory: how much of ``x`` is read before ``value`` is
    written depends on the backend."""
    if value.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: got a tensor made in inference mode, which is for use there only; takes an "
            "ordinary one, such as its clone"
        )
    if any(n > 1 and stride == 0 for n, stride in zip(value.shape, value.stride(), strict=True)):
        raise ValueError(f"{name}: got an expanded tensor, takes one with memory for each range")
    if torch._C._is_alias_of(x, value):  # type: ignore[attr-defined]
        (start, end), (x_start, x_end) = _extent(value), _extent(x)
        if start < x_end and x_start < end:
            raise ValueError(f"{name}: got a tensor that overlaps {other} in memory, takes its own")


def _extent(x: Tensor) -> tuple[int, int]:
    """The first and the last byte of a tensor in its storage."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    start: Any = x.storage_offset()  # an int, or one that is traced
    return start * x.itemsize, (start + last + 1) * x.itemsize


def has_memory(name: str, value: Tensor | list[Tensor]) -> None:
    """Raises for a tensor whose storage was freed (``untyped_storage().resize_(0)``, as sharded
    training does between forwards): a kernel would take its address for "none"."""
    if isinstance(value, list):
        for i, x in enumerate(value):
            has_memory(f"{name}[{i}]", x)
    elif value.data_ptr() == 0:
        _not_freed(name, value)


def _not_freed(name: str, value: Tensor) -> None:
    if value.numel() > 0 and value.untyped_storage().nbytes() == 0:
        raise ValueError(
            f"{name}: got a tensor of shape {list(value.shape)} whose memory was freed, takes one "
            "with its values"
        )


def _one_of(values: tuple[object, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last
