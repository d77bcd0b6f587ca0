"""All that a backend computes of one tensor, to compare with what another computes."""

import torch

from noisyq_fast.backends.reference import MASKED


def every_operator(backend, x, axis, qmax=7):
    """The results of every operator of a backend's module on the signed grid.

    From ranges smaller than the absmax; a moving average starts where some (the only one) are not
    there yet.
    """
    ranges = torch.full([] if axis is None else [x.shape[axis]], 0.7, device=x.device)
    running = ranges.clone()
    running.flatten()[::2] = float("nan")

    codes, scale = backend.quantize(x, qmax, axis)
    results = [codes, scale, backend.dequantize(codes, scale, axis)]
    results += backend.fake_quantize_many([x, -2 * x], [qmax, 127], [axis, None])
    results += [backend.fake_quantize_fixed_range(x, ranges, qmax, axis)]
    y, clipped = backend.fake_quantize_fixed_range_clipped(x, ranges, qmax, axis)
    results += [y, clipped, backend.zero_clipped(y, clipped)]
    for observed in (None, torch.full_like(running, 0.25)):
        average = running.clone()
        y = backend.fake_quantize_ema(x, average, observed, qmax, axis, 0.3)
        results += [y, average, *([] if observed is None else [observed])]
    return results


def every_operator_on_grid(backend, x, axis, grid):
    """The same of the operators on any grid, with every mask."""
    shape = [] if axis is None else [x.shape[axis]]
    ranges = torch.full(shape, 0.7, device=x.device)
    if grid.is_affine:
        ranges = torch.stack([-0.4 * ranges, ranges])
    running = ranges.clone()
    running.view(1 + grid.is_affine, -1)[:, ::2] = float("nan")
    weights = [None, *(torch.full(shape, weight, device=x.device) for weight in (0.25, 0.0))]

    codes, scale, zero_point = backend.quantize_on_grid(x, grid, axis)
    results = [codes, scale, zero_point]
    for zero in (None, zero_point) if grid.is_unsigned else (None,):
        results += [backend.dequantize_on_grid(codes, scale, zero, axis)]
    for masked, observed in zip(MASKED, weights, strict=True):
        results += backend.fake_quantize_on_grid(x, grid, axis, masked)
        results += backend.fake_quantize_fixed_range_on_grid(x, ranges, grid, axis, masked)
        average = running.clone()
        results += backend.fake_quantize_ema_on_grid(x, average, observed, grid, axis, 0.3, masked)
        results += [average, *([] if observed is None else [observed])]
    return results


def every_code_on_grid(backend, x, axis, grid):
    """The same of the operators that make codes by a range that is kept or given."""
    shape = [2] * grid.is_affine + ([] if axis is None else [x.shape[axis]])
    ranges = torch.full(shape, 0.7, device=x.device)
    if grid.is_affine:
        ranges[0] *= -0.4
    results = []
    for masked, weight in zip(MASKED, (None, 0.25, 0.0), strict=True):
        results += backend.quantize_fixed_range_on_grid(x, ranges, grid, axis, masked)
        average = ranges.clone()
        average.view(1 + grid.is_affine, -1)[:, ::2] = float("nan")
        shape = ranges.shape[1:] if grid.is_affine else ranges.shape
        observed = None if weight is None else torch.full(shape, weight, device=x.device)
        results += backend.quantize_ema_on_grid(x, average, observed, grid, axis, 0.3, masked)
        results += [average, *([] if observed is None else [observed])]
    return results
