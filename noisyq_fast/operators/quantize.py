"""The operators: schema, argument checks, shapes and gradient of each.

For ``bits`` in 2..8, with one group per tensor, one per index of ``axis``, or the groups of
`Groups`::

    qmax   = 2^(bits-1) - 1
    lambda = max |x|                            over the group
    s      = lambda / qmax                      at least the smallest normal float32
    code   = clamp(rint(x / s), -qmax, qmax)    half to even
    y      = code * s

(arXiv 2303.11803, section 3.1.) Everything is computed in float32 with IEEE arithmetic; float16 and
bfloat16 results are rounded once. A NaN or an infinity makes the whole output of its group NaN. The
scale of a group without elements is the smallest normal float32. This is the *signed* grid; for the
others see `noisyq_fast.grid`. They have operators of their own, ``*_on_grid``, which a backend may
leave out.

The operators are ``torch.ops.noisyq.*``, so that ``torch.compile`` keeps one graph; a backend
(`noisyq_fast.backends`) does the arithmetic. The public functions also check types: the errors of
the dispatcher do not name the argument.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import (
    handle_torch_function,
    has_torch_function,
    has_torch_function_unary,
    has_torch_function_variadic,
)

from noisyq_fast.backends.reference.masks import CLIPPED, NEGATIVE, NOTHING
from noisyq_fast.grid import AFFINE, SIGNED, UNSIGNED, Grid, check_kind
from noisyq_fast.operators import checks, gradients
from noisyq_fast.operators.declare import declare
from noisyq_fast.operators.granularity import TOKEN, Axis, Groups, by_group


def _like(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


def _like_with_mask(x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    size = 0 if others[-1] == NOTHING else checks.packed_size(x)
    return torch.empty_like(x), x.new_empty(size, dtype=torch.uint8)


def _for_each_group(x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    return x.new_empty([] if axis is None else [x.shape[axis]], dtype=dtype)


def _quantized(x: Tensor, grid: Grid, axis: int | None, masked: str) -> tuple[Tensor, ...]:
    return (
        torch.empty_like(x, dtype=grid.code_dtype),
        _for_each_group(x, axis, torch.float32),
        _for_each_group(x, axis, torch.uint8),
        _like_with_mask(x, masked)[1],
    )


_fake_quantize = declare(
    "fake_quantize(Tensor x, int bits, int? axis) -> Tensor",
    prepare=checks.dynamic,
    shape=_like,
    gradient=gradients.StraightThrough,
)
_fake_quantize_many = declare(
    "fake_quantize_many(Tensor[] tensors, int[] bits, int? axis) -> Tensor[]",
    prepare=checks.many,
    shape=lambda tensors, *_: [torch.empty_like(x) for x in tensors],
    gradient=gradients.StraightThroughEach,
)
_fake_quantize_ema = declare(
    "fake_quantize_ema(Tensor x, Tensor(a!) running_absmax, Tensor(b!)? observed, int bits, "
    "int? axis, float averaging_constant) -> Tensor",
    prepare=checks.ema,
    shape=_like,
    gradient=gradients.StraightThrough,
)
_fake_quantize_fixed_range = declare(
    "fake_quantize_fixed_range(Tensor x, Tensor running_absmax, int bits, int? axis) -> Tensor",
    prepare=checks.given_range,
    check_values=checks.range_seen,
    shape=_like,
    gradient=gradients.StraightThrough,
)
_fake_quantize_fixed_range_clipped = declare(
    "fake_quantize_fixed_range_clipped(Tensor x, Tensor running_absmax, int bits, int? axis) "
    "-> (Tensor, Tensor)",
    prepare=checks.given_range,
    check_values=checks.range_seen,
    shape=lambda x, *_: (
        torch.empty_like(x),
        x.new_empty(checks.packed_size(x), dtype=torch.uint8),
    ),
    gradient=gradients.ClippedStraightThrough,
)
zero_clipped = declare(
    "zero_clipped(Tensor grad, Tensor clipped) -> Tensor",
    prepare=checks.grad_and_clipped,
    shape=lambda grad, _: torch.empty_like(grad),
    gradient=gradients.ZeroClipped,
)
_quantize = declare(
    "quantize(Tensor x, int bits, int? axis) -> (Tensor, Tensor)",
    prepare=checks.dynamic,
    shape=lambda x, qmax, axis: (
        torch.empty_like(x, dtype=torch.int8),
        _for_each_group(x, axis, torch.float32),
    ),
    gradient=None,
)
_dequantize = declare(
    "dequantize(Tensor codes, Tensor scale, int? axis) -> Tensor",
    prepare=checks.codes_and_scale,
    shape=lambda codes, *_: torch.empty_like(codes, dtype=torch.float32),
    gradient=gradients.Dequantize,
)
_fake_quantize_on_grid = declare(
    "fake_quantize_on_grid(Tensor x, int bits, int? axis, str grid, str masked) "
    "-> (Tensor, Tensor)",
    prepare=checks.dynamic_on_grid,
    shape=_like_with_mask,
    gradient=gradients.ClippedStraightThrough,
)
_fake_quantize_ema_on_grid = declare(
    "fake_quantize_ema_on_grid(Tensor x, Tensor(a!) running_absmax, Tensor(b!)? observed, "
    "int bits, int? axis, float averaging_constant, str grid, str masked) -> (Tensor, Tensor)",
    prepare=checks.ema_on_grid,
    shape=_like_with_mask,
    gradient=gradients.ClippedStraightThrough,
)
_fake_quantize_fixed_range_on_grid = declare(
    "fake_quantize_fixed_range_on_grid(Tensor x, Tensor running_absmax, int bits, int? axis, "
    "str grid, str masked) -> (Tensor, Tensor)",
    prepare=checks.given_range_on_grid,
    check_values=checks.range_seen,
    shape=_like_with_mask,
    gradient=gradients.ClippedStraightThrough,
)
_quantize_on_grid = declare(
    "quantize_on_grid(Tensor x, int bits, int? axis, str grid) -> (Tensor, Tensor, Tensor)",
    prepare=checks.quantized_on_grid,
    shape=lambda x, grid, axis: (
        torch.empty_like(x, dtype=grid.code_dtype),
        _for_each_group(x, axis, torch.float32),
        _for_each_group(x, axis, torch.uint8),
    ),
    gradient=None,
)
quantize_ema_on_grid = declare(
    "quantize_ema_on_grid(Tensor x, Tensor(a!) running_absmax, Tensor(b!)? observed, int bits, "
    "int? axis, float averaging_constant, str grid, str masked) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    prepare=checks.ema_on_grid,
    shape=lambda x, _, __, grid, axis, ___, masked: _quantized(x, grid, axis, masked),
    gradient=None,
)
quantize_fixed_range_on_grid = declare(
    "quantize_fixed_range_on_grid(Tensor x, Tensor running_absmax, int bits, int? axis, str grid, "
    "str masked) -> (Tensor, Tensor, Tensor, Tensor)",
    prepare=checks.given_range_on_grid,
    check_values=checks.range_seen,
    shape=lambda x, _, grid, axis, masked: _quantized(x, grid, axis, masked),
    gradient=None,
)
dequantize_on_grid = declare(
    "dequantize_on_grid(Tensor codes, Tensor scale, Tensor? zero_point, int? axis) -> Tensor",
    prepare=checks.codes_on_grid,
    shape=lambda codes, *_: torch.empty_like(codes, dtype=torch.float32),
    gradient=gradients.DequantizeOnGrid,
)


def masked_on(grid: str, ste: str) -> str:
    """Which elements have the gradient 0; NOTHING if no gradient is recorded."""
    if not gradients.wanted():
        return NOTHING
    if ste == "clipped":
        return CLIPPED
    return NEGATIVE if grid == UNSIGNED else NOTHING


def fake_quantize(
    x: Tensor,
    bits: int,
    axis: Axis = None,
    *,
    grid: str = SIGNED,
    group_size: int | None = None,
    ste: str = "identity",
) -> Tensor:
    """Quantizes and dequantizes ``x``, with scales from ``x`` itself (dynamic quantization).

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and strides.
        bits: width of the codes, 2..8.
        axis: the per-channel axis, one scale for each of its indices; ``None``: one scale;
            ``"token"``: one for each index of all axes but the last.
        grid: ``"signed"``, ``"full"``, ``"unsigned"``, ``"affine"`` or ``"odd"``, as in `Grid`.
        group_size: the number of consecutive indices of axis 1 (input channels) that share a scale,
            with all later axes, for each index of axis 0. Must divide the size of axis 1.
        ste: ``"identity"`` passes the gradient everywhere; ``"clipped"`` zeroes it where a code was
            clamped: on full grids the upper half step, on affine ones up to half a step.

    Returns:
        A tensor with the shape, dtype and memory format of ``x``.

    On the signed grid the gradient is the identity (the straight-through estimator): the scale is
    the absmax, so nothing clips, and nothing is computed or saved for the backward. On an unsigned
    grid values below 0 become 0 and have no gradient, whatever ``ste``. For that one bit per
    element is saved; on the CPU, where the check is free, only if there are such values.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: an argument out of range, an ``x`` that is not strided, or a ``group_size`` that
            does not divide the size of axis 1.

    Example:
        >>> import torch, noisyq_fast
        >>> weight = torch.tensor([[0.1, -0.7, 0.26], [10.0, 5.2, -70.0]])
        >>> noisyq_fast.fake_quantize(weight, bits=4, axis=0)
        tensor([[  0.1000,  -0.7000,   0.3000],
                [ 10.0000,  10.0000, -70.0000]])
        >>> noisyq_fast.fake_quantize(torch.tensor([0.0, 0.7, 2.0, 3.0]), bits=2, grid="unsigned")
        tensor([0., 1., 2., 3.])
        >>> noisyq_fast.fake_quantize(torch.tensor([-1.0, 0.7, 2.0]), bits=2, grid="affine")
        tensor([-1.,  1.,  2.])
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            fake_quantize, (x,), x, bits, axis, grid=grid, group_size=group_size, ste=ste
        )
    checks.tensor("x", x)
    checks.integer("bits", bits)
    if by_group(axis, group_size):
        groups = Groups(x, axis, group_size)
        return groups.restored(fake_quantize(groups.x, bits, 0, grid=grid, ste=ste))
    checks.axis_type(axis)
    checks.ste(ste)
    if grid == SIGNED:
        return _fake_quantize(x, bits, axis)
    check_kind(grid)
    return _fake_quantize_on_grid(x, bits, axis, grid, masked_on(grid, ste))[0]


def fake_quantize_many(
    tensors: Sequence[Tensor],
    bits: int | Sequence[int],
    axis: Axis = None,
    *,
    grid: str = SIGNED,
    group_size: int | None = None,
) -> list[Tensor]:
    """`fake_quantize` of many tensors (all weights of a model) in one call.

    Args:
        tensors: one or more tensors as for `fake_quantize`, on one device.
        bits: width of the codes, 2..8; one int, or one for each tensor.
        axis, grid, group_size: as for `fake_quantize`, for each tensor.

    Returns:
        A list of tensors like ``tensors``. Gradients are those of `fake_quantize`.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: a value out of range, no tensor, tensors on several devices, or another number
            of ``bits`` than of tensors.

    Example:
        >>> import torch, noisyq_fast
        >>> weights = [torch.tensor([[0.1, -0.7, 0.26]]), torch.tensor([[10.0], [5.2]])]
        >>> noisyq_fast.fake_quantize_many(weights, bits=[4, 8], axis=0)
        [tensor([[ 0.1000, -0.7000,  0.3000]]), tensor([[10.0000],
                [ 5.2000]])]
    """
    tensors = list(tensors)
    if has_torch_function(tensors):
        return handle_torch_function(
            fake_quantize_many, tensors, tensors, bits, axis, grid=grid, group_size=group_size
        )
    bits = [bits] * len(tensors) if isinstance(bits, int) else list(bits)
    for i, x in enumerate(tensors):
        checks.tensor(f"tensors[{i}]", x)
    for i, b in enumerate(bits):
        checks.integer(f"bits[{i}]", b)
    if grid == SIGNED and not by_group(axis, group_size):
        checks.axis_type(axis)
        return _fake_quantize_many(tensors, bits, axis)
    checks.many(tensors, bits, None)
    return [
        fake_quantize(x, b, axis, grid=grid, group_size=group_size)
        for x, b in zip(tensors, bits, strict=True)
    ]


def fake_quantize_ema(
    x: Tensor,
    running_absmax: Tensor,
    bits: int,
    axis: int | None = None,
    averaging_constant: float = 0.01,
    training: bool = True,
    ste: str = "identity",
    observed: Tensor | None = None,
    *,
    grid: str = SIGNED,
) -> Tensor:
    """Quantizes and dequantizes activations, and keeps a moving average of their range.

    In training the scale comes from the batch's own absmax, and the same call updates, in place,
    ``running_absmax += averaging_constant * (absmax - running_absmax)``. Otherwise the scale comes
    from ``running_absmax``, which does not change.

    With ``observed`` the moving average is ``running_absmax / observed``: a weighted sum and its
    weight. Both can be averaged over models, even if some have seen no data yet, where a NaN would
    make the mean NaN. An update stores the average itself and a weight of 1.

    Args:
        x: float32, bfloat16 or float16 tensor of any shape and strides.
        running_absmax: float32; 0-d, or ``[x.shape[axis]]``. NaN means "no data yet": the first
            batch sets it. A batch whose absmax is not finite, or without elements, leaves it (and
            ``observed``) unchanged. On an unsigned grid the average of max(x, 0); on an affine one
            two averages, ``[2]`` or ``[2, x.shape[axis]]``: of min(x, 0) and of max(x, 0).
        bits: width of the codes, 2..8.
        axis: the per-channel axis, one range for each of its indices; ``None``: one range.
        averaging_constant: weight of the batch in the average, 0..1.
        training: whether to use and record the batch's absmax.
        ste: ``"identity"`` passes the gradient everywhere; ``"clipped"`` zeroes it where a value
            was clipped, and saves one bit per element. With the batch's own absmax nothing clips,
            and both are the same (on the signed grid; for others see `fake_quantize`).
        observed: float32, in the shape and on the device of ``running_absmax`` (on an affine grid,
            of one of its ends): its weight, 0 before the first batch (then the sum is 0 too, and
            their quotient NaN). ``None``: 1.
        grid: as for `fake_quantize`.

    Returns:
        A tensor with the shape, dtype and memory format of ``x``. Outside training, values
        beyond a range are clipped to it, infinities too; a NaN in ``x`` stays NaN; and the output
        for a range that is NaN is NaN (on a GPU, where an error would need a synchronization).

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: an argument out of range, shapes or devices that do not fit, a
            ``running_absmax`` or ``observed`` that requires grad or shares its memory, or, on the
            CPU, a range that is NaN outside training.

    Example:
        >>> import torch, noisyq_fast
        >>> running = torch.tensor(float("nan"))
        >>> x = torch.tensor([0.1, -0.7, 0.26])
        >>> noisyq_fast.fake_quantize_ema(x, running, bits=4)
        tensor([ 0.1000, -0.7000,  0.3000])
        >>> running
        tensor(0.7000)
        >>> noisyq_fast.fake_quantize_ema(2 * x, running, bits=4, training=False)
        tensor([ 0.2000, -0.7000,  0.5000])
    """
    if has_torch_function_variadic(x, running_absmax, observed):
        return handle_torch_function(
            fake_quantize_ema,
            (x, running_absmax, observed),
            x,
            running_absmax,
            bits,
            axis,
            averaging_constant,
            training,
            ste,
            observed,
            grid=grid,
        )
    checks.tensor("x", x)
    checks.tensor("running_absmax", running_absmax)
    checks.integer("bits", bits)
    if axis == TOKEN:
        raise ValueError("axis: got 'token', which keeps no range: use fake_quantize")
    checks.axis_type(axis)
    checks.averaging_constant(averaging_constant)
    checks.boolean("training", training)
    checks.ste(ste)
    if observed is not None:
        checks.tensor("observed", observed)
    if grid != SIGNED:
        check_kind(grid)
        masked = masked_on(grid, ste)
        if training:
            return _fake_quantize_ema_on_grid(
                x, running_absmax, observed, bits, axis, averaging_constant, grid, masked
            )[0]
        if observed is not None:
            running_absmax = checks.known_range(running_absmax, observed, ends=grid == AFFINE)
        return _fake_quantize_fixed_range_on_grid(x, running_absmax, bits, axis, grid, masked)[0]
    if training:
        return _fake_quantize_ema(x, running_absmax, observed, bits, axis, averaging_constant)
    if observed is not None:
        running_absmax = checks.known_range(running_absmax, observed)
    if ste == "identity":
        return _fake_quantize_fixed_range(x, running_absmax, bits, axis)
    return _fake_quantize_fixed_range_clipped(x, running_absmax, bits, axis)[0]


def quantize(
    x: Tensor, bits: int, axis: Axis = None, *, grid: str = SIGNED, group_size: int | None = None
) -> tuple[Tensor, ...]:
    """Quantizes ``x`` to integer codes and their scale (dynamic). Not differentiable.

    Args:
        x, bits, axis, grid, group_size: as for `fake_quantize`.

    Returns:
        ``codes``, with the shape and memory format of ``x``, int8, or uint8 on unsigned and affine
        grids; ``scale``, float32, 0-d or ``[x.shape[axis]]`` (for tokens ``x.shape[:-1]``, for
        groups ``[x.shape[0], x.shape[1] / group_size]``); and, on an affine grid, ``zero_point``,
        uint8, in the shape of ``scale``. A group that holds a NaN or an infinity has codes 0 and a
        scale that is not finite.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: ``bits`` or ``axis`` out of range, or an ``x`` that is not strided.

    Example:
        >>> import torch, noisyq_fast
        >>> noisyq_fast.quantize(torch.tensor([0.1, -0.7, 0.26]), bits=4)
        (tensor([ 1, -7,  3], dtype=torch.int8), tensor(0.1000))
        >>> noisyq_fast.quantize(torch.tensor([-1.0, 0.7, 2.0]), bits=2, grid="affine")
        (tensor([0, 2, 3], dtype=torch.uint8), tensor(1.), tensor(1, dtype=torch.uint8))
    """
    if has_torch_function_unary(x):
        return handle_torch_function(
            quantize, (x,), x, bits, axis, grid=grid, group_size=group_size
        )
    checks.tensor("x", x)
    checks.integer("bits", bits)
    if by_group(axis, group_size):
        groups = Groups(x, axis, group_size)
        codes, *others = quantize(groups.x, bits, 0, grid=grid)
        return groups.restored(codes), *(value.reshape(groups.shape) for value in others)
    checks.axis_type(axis)
    if grid == SIGNED:
        return _quantize(x, bits, axis)
    check_kind(grid)
    codes, scale, zero_point = _quantize_on_grid(x, bits, axis, grid)
    return (codes, scale, zero_point) if grid == AFFINE else (codes, scale)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    axis: Axis = None,
    *,
    zero_point: Tensor | None = None,
    group_size: int | None = None,
) -> Tensor:
    """``(codes - zero_point) * scale``, in float32: the values of `fake_quantize`.

    Args:
        codes: int8 or uint8 tensor of any shape and strides.
        scale: float32, in the shape that `quantize` returns. Differentiable.
        axis, group_size: as for `quantize`.
        zero_point: uint8, in the shape of ``scale``, for codes of an affine grid; ``None``: 0.

    Returns:
        A float32 tensor with the shape and memory format of ``codes``.

    Raises:
        TypeError: wrong type or dtype of an argument.
        ValueError: an ``axis`` out of range, shapes or devices that do not fit.

    Example:
        >>> import torch, noisyq_fast
        >>> codes, scale = noisyq_fast.quantize(torch.tensor([0.1, -0.7, 0.26]), bits=4)
        >>> noisyq_fast.dequantize(codes, scale)
        tensor([ 0.1000, -0.7000,  0.3000])
    """
    if has_torch_function_variadic(codes, scale, zero_point):
        return handle_torch_function(
            dequantize,
            (codes, scale, zero_point),
            codes,
            scale,
            axis,
            zero_point=zero_point,
            group_size=group_size,
        )
    checks.tensor("codes", codes)
    checks.tensor("scale", scale)
    if zero_point is not None:
        checks.tensor("zero_point", zero_point)
    if by_group(axis, group_size):
        groups = Groups(codes, axis, group_size)
        flat: list[Any] = [groups.flat("scale", scale), groups.flat("zero_point", zero_point)]
        return groups.restored(dequantize(groups.x, flat[0], 0, zero_point=flat[1]))
    checks.axis_type(axis)
    if zero_point is None and codes.dtype != torch.uint8:
        return _dequantize(codes, scale, axis)
    return dequantize_on_grid(codes, scale, zero_point, axis)
