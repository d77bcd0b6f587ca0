"""All that a backend computes of one tensor, to compare with what another computes."""

import torch


def every_operator(backend, x, axis, qmax=7):
    """The results of every operator of a backend's module.

    From ranges smaller than the absmax, and where some (the only one) are not there yet.
    """
    ranges = torch.full([] if axis is None else [x.shape[axis]], 0.7, device=x.device)
    some_unseen = ranges.clone()
    some_unseen.flatten()[::2] = float("nan")

    codes, scale = backend.quantize(x, qmax, axis)
    results = [codes, scale, backend.dequantize(codes, scale, axis)]
    results += backend.fake_quantize_many([x, -2 * x], [qmax, 127], [axis, None])
    results += [backend.fake_quantize_range(x, ranges, qmax, axis)]
    results += backend.fake_quantize_clipped(x, ranges, qmax, axis)
    running = some_unseen.clone()
    results += [backend.fake_quantize_ema(x, running, qmax, axis, 0.3), running]
    for start, save_clipped in ((ranges, True), (some_unseen, True), (some_unseen, False)):
        running = start.clone()
        y, clipped = backend.fake_quantize_delayed(x, running, qmax, axis, 0.3, save_clipped)
        results += [y, clipped, running]
        if save_clipped:
            results += [backend.zero_clipped(y, clipped)]
    return results
