"""The operators under torch.vmap, with the same bits as a loop over the samples.

An operator has one scale per channel, so samples become channels: each rule moves the batch axis to
the front, merges it with the channels of a sample, and splits the result again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from noisyq_fast.backends.reference.masks import packed, unpacked
from noisyq_fast.grid import AFFINE
from noisyq_fast.operators import checks

_operators = torch.ops.noisyq

Dims = tuple[Any, ...]


def fake_quantize(info: Any, dims: Dims, x: Tensor, bits: int, axis: int | None) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    return groups.restored(_operators.fake_quantize(groups.x, bits, 0)), 0


def fake_quantize_many(
    info: Any, dims: Dims, tensors: list[Tensor], bits: list[int], axis: int | None
) -> tuple:
    # A tensor that all samples share is a batch of one.
    dims = dims[0]
    groups = [
        _Groups(x, dim, axis, 1 if dim is None else info.batch_size)
        for x, dim in zip(tensors, dims, strict=True)
    ]
    outputs = _operators.fake_quantize_many([group.x for group in groups], bits, 0)
    restored = [group.restored(y) for group, y in zip(groups, outputs, strict=True)]
    return (
        [y[0] if dim is None else y for y, dim in zip(restored, dims, strict=True)],
        [None if dim is None else 0 for dim in dims],
    )


def fake_quantize_ema(*_: object) -> tuple:
    raise RuntimeError(
        "fake_quantize_ema: got a batch of torch.vmap with training=True, which would move one "
        "running_absmax by every sample. Call model.eval() first (training=False takes the range "
        "as it is), or quantize with fake_quantize, which has no range."
    )


def fake_quantize_fixed_range(
    info: Any, dims: Dims, x: Tensor, running_absmax: Tensor, bits: int, axis: int | None
) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    ranges = _for_each_sample(running_absmax, dims[1], info.batch_size).flatten()
    return groups.restored(_operators.fake_quantize_fixed_range(groups.x, ranges, bits, 0)), 0


def fake_quantize_fixed_range_clipped(
    info: Any, dims: Dims, x: Tensor, running_absmax: Tensor, bits: int, axis: int | None
) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    ranges = _for_each_sample(running_absmax, dims[1], info.batch_size).flatten()
    y, clipped = _operators.fake_quantize_fixed_range_clipped(
        groups.x.contiguous(), ranges, bits, 0
    )
    return _with_masks(groups, y, clipped), (0, 0)


def zero_clipped(info: Any, dims: Dims, grad: Tensor, clipped: Tensor) -> tuple:
    grad = _for_each_sample(grad, dims[0], info.batch_size)
    clipped = _for_each_sample(clipped, dims[1], info.batch_size)
    # The bits of a mask are in the memory order of a sample.
    order = sorted(range(1, grad.dim()), key=lambda d: -grad.stride()[d])
    grad = grad.permute(0, *order)
    masked = _operators.zero_clipped(_whole_bytes(grad).contiguous(), clipped.flatten())
    size = grad[:1].numel()
    masked = masked[:, :size].reshape(grad.shape)
    return masked.permute(0, *(1 + order.index(d) for d in range(1, grad.dim()))), 0


def fake_quantize_on_grid(
    info: Any, dims: Dims, x: Tensor, bits: int, axis: int | None, grid: str, masked: str
) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    outputs = _operators.fake_quantize_on_grid(groups.x.contiguous(), bits, 0, grid, masked)
    return _with_masks(groups, *outputs), (0, 0)


def fake_quantize_ema_on_grid(*_: object) -> tuple:
    return fake_quantize_ema()


def fake_quantize_fixed_range_on_grid(
    info: Any,
    dims: Dims,
    x: Tensor,
    running_absmax: Tensor,
    bits: int,
    axis: int | None,
    grid: str,
    masked: str,
) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    ranges = _ranges(running_absmax, dims[1], info.batch_size, grid)
    outputs = _operators.fake_quantize_fixed_range_on_grid(
        groups.x.contiguous(), ranges, bits, 0, grid, masked
    )
    return _with_masks(groups, *outputs), (0, 0)


def quantize_on_grid(
    info: Any, dims: Dims, x: Tensor, bits: int, axis: int | None, grid: str
) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    codes, *others = _operators.quantize_on_grid(groups.x, bits, 0, grid)
    of_groups = [value.reshape(groups.scale_shape) for value in others]
    return (groups.restored(codes), *of_groups), (0, 0, 0)


def dequantize_on_grid(
    info: Any,
    dims: Dims,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    axis: int | None,
) -> tuple:
    groups = _Groups(codes, dims[0], axis, info.batch_size)
    scales, zero_points = (
        None if value is None else _for_each_sample(value, dim, info.batch_size).flatten()
        for value, dim in ((scale, dims[1]), (zero_point, dims[2]))
    )
    return groups.restored(_operators.dequantize_on_grid(groups.x, scales, zero_points, 0)), 0


def quantize(info: Any, dims: Dims, x: Tensor, bits: int, axis: int | None) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    codes, scale = _operators.quantize(groups.x, bits, 0)
    return (groups.restored(codes), scale.reshape(groups.scale_shape)), (0, 0)


def dequantize(info: Any, dims: Dims, codes: Tensor, scale: Tensor, axis: int | None) -> tuple:
    groups = _Groups(codes, dims[0], axis, info.batch_size)
    scales = _for_each_sample(scale, dims[1], info.batch_size).flatten()
    return groups.restored(_operators.dequantize(groups.x, scales, 0)), 0


def quantize_ema_on_grid(*_: object) -> tuple:
    return fake_quantize_ema()


def quantize_fixed_range_on_grid(
    info: Any,
    dims: Dims,
    x: Tensor,
    running_absmax: Tensor,
    bits: int,
    axis: int | None,
    grid: str,
    masked: str,
) -> tuple:
    groups = _Groups(x, dims[0], axis, info.batch_size)
    ranges = _ranges(running_absmax, dims[1], info.batch_size, grid)
    codes, scale, zero_point, mask = _operators.quantize_fixed_range_on_grid(
        groups.x.contiguous(), ranges, bits, 0, grid, masked
    )
    of_groups = [value.reshape(groups.scale_shape) for value in (scale, zero_point)]
    codes, mask = _with_masks(groups, codes, mask)
    return (codes, *of_groups, mask), (0, 0, 0, 0)


def fake_quantize_learned(
    info: Any, dims: Dims, x: Tensor, parameters: Tensor, *others: Any
) -> tuple:
    *rule, axis, gradient_scale = others
    groups = _Groups(x, dims[0], axis, info.batch_size)
    parameters = _parameters_of_groups(parameters, dims[1], info.batch_size)
    operator = _operators.fake_quantize_learned
    return groups.restored(operator(groups.x, parameters, *rule, 0, gradient_scale)), 0


def fake_quantize_learned_backward(
    info: Any, dims: Dims, grad: Tensor, x: Tensor, parameters: Tensor, *others: Any
) -> tuple:
    *rule, axis, gradient_scale = others
    # Sums are in the memory order of a sample.
    x = _for_each_sample(x, dims[1], info.batch_size)
    order = [0, *sorted(range(1, x.dim()), key=lambda d: -x.stride()[d])]
    back = [order.index(d) for d in range(x.dim())]
    front = checks.front_axis(axis, torch.empty(x.shape[1:], device="meta"))
    axis = None if front is None else order.index(front + 1) - 1
    grad = _for_each_sample(grad, dims[0], info.batch_size).permute(order)
    groups, grads = (
        _Groups(values, 0, axis, info.batch_size) for values in (x.permute(order), grad)
    )
    of_groups = _parameters_of_groups(parameters, dims[2], info.batch_size)
    dx, sums = _operators.fake_quantize_learned_backward(
        grads.x.contiguous(), groups.x.contiguous(), of_groups, *rule, 0, gradient_scale
    )
    sums = sums.unflatten(1, groups.scale_shape).movedim(0, 1)
    return (groups.restored(dx).permute(back), sums), (0, 0)


def quantize_learned(info: Any, dims: Dims, x: Tensor, parameters: Tensor, *others: Any) -> tuple:
    *rule, axis = others
    groups = _Groups(x, dims[0], axis, info.batch_size)
    parameters = _parameters_of_groups(parameters, dims[1], info.batch_size)
    return groups.restored(_operators.quantize_learned(groups.x, parameters, *rule, 0)), 0


def _parameters_of_groups(parameters: Tensor, dim: int | None, batch: int) -> Tensor:
    """``[parameters, samples * groups of each]``"""
    return _for_each_sample(parameters, dim, batch).movedim(1, 0).flatten(1)


class _Groups:
    """A batch as ``x``, with one group per sample, or per channel of each sample, along the first
    axis."""

    def __init__(self, x: Tensor, dim: int | None, axis: int | None, batch: int) -> None:
        x = _for_each_sample(x, dim, batch)
        self.axis = checks.front_axis(axis, torch.empty(x.shape[1:], device="meta"))
        self.scale_shape = x.shape[:1]
        if self.axis is not None:
            x = x.movedim(self.axis + 1, 1)
            self.scale_shape = x.shape[:2]
            x = x.flatten(0, 1)
        self.x = x

    def restored(self, y: Tensor) -> Tensor:
        """Undoes the grouping: samples along the first axis."""
        if self.axis is None:
            return y
        return y.unflatten(0, self.scale_shape).movedim(1, self.axis + 1)


def _with_masks(groups: _Groups, y: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The samples, and the bits of each."""
    is_masked = unpacked(mask)[: y.numel()].reshape(y.shape) if mask.numel() else None
    y = groups.restored(y)
    if is_masked is None:
        return y, mask.expand(y.shape[0], 0)
    # Each sample's mask starts at a byte, and its memory order is that of the mask.
    return y.contiguous(), packed(_whole_bytes(groups.restored(is_masked)))


def _for_each_sample(x: Tensor, dim: int | None, batch: int) -> Tensor:
    return x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)


def _ranges(x: Tensor, dim: int | None, batch: int, grid: str) -> Tensor:
    ranges = _for_each_sample(x, dim, batch)
    return ranges.movedim(1, 0).flatten(1) if grid == AFFINE else ranges.flatten()


def _whole_bytes(x: Tensor) -> Tensor:
    """One row per sample, padded to a multiple of 8."""
    size = x[:1].numel()
    return F.pad(x.reshape(x.shape[0], size), (0, -size % 8))


def _one_by_one(name: str) -> Callable:
    """The rule of an operator that is called once per sample."""

    def rule(info: Any, dims: Dims, *arguments: Any) -> tuple:
        operator = getattr(_operators, name)
        samples = [
            operator(
                *(
                    a.select(dim, i) if isinstance(dim, int) else a
                    for a, dim in zip(arguments, dims, strict=True)
                )
            )
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        outputs = tuple(map(torch.stack, zip(*samples, strict=True)))
        return outputs, (0,) * len(outputs)

    return rule


RULES: dict[str, Callable] = {
    rule.__name__: rule
    for rule in (
        fake_quantize,
        fake_quantize_many,
        fake_quantize_ema,
        fake_quantize_fixed_range,
        fake_quantize_fixed_range_clipped,
        zero_clipped,
        quantize,
        dequantize,
        fake_quantize_on_grid,
        fake_quantize_ema_on_grid,
        fake_quantize_fixed_range_on_grid,
        quantize_on_grid,
        quantize_ema_on_grid,
        quantize_fixed_range_on_grid,
        dequantize_on_grid,
        fake_quantize_learned,
        fake_quantize_learned_backward,
        quantize_learned,
    )
} | {
    name: _one_by_one(name)
    for name in (
        *("convolve_codes", "multiply_codes", "integer_convolution", "integer_linear"),
        *("statistics_of_sums", "norm_of_sums", "grads_of_norm_of_sums"),
        "adder_conv2d",
        "adder_conv2d_input_gradient",
        "adder_conv2d_weight_gradient",
    )
}
