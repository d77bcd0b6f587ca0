"""All that a backend computes of one tensor, to compare with what another computes."""

import torch


def every_operator(backend, x, axis, qmax=7):
    """The results of every operator of a backend's module.

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
