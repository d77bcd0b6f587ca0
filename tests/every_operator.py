"""All that a backend computes, to compare with what another computes: of one tensor, or of values
drawn here on the CPU, the same for every device."""

from types import SimpleNamespace

import torch
from strategies import DTYPES

from noisyq_fast import Grid, rules
from noisyq_fast.backends import reference
from noisyq_fast.backends.reference.masks import MASKED
from noisyq_fast.backends.reference.sums import GradOfSums, Running

RULES = {
    "lsq": ([0.17], -8, 7),
    "pact": ([1.3], 0, 15),
    "sat": ([1.3], 0, 3),
    "aqd": ([1.3], 0, 15),
    "aqd_odd": ([1.3], -15, 15),
    "qil": ([0.6, 0.55], 0, 15),
    "qil_odd": ([0.6, 0.55, 0.7], -7, 7),
    "dsq": ([-0.93, 1.07, 0.2], 0, 15),
    "dorefa_original": ([3.0, 0.5], -15, 15),
    "dorefa_modified": ([3.0, 0.5], -8, 7),
    "dorefa_centered": ([3.0, 0.5], -15, 15),
}
"""Parameters and ends of the codes of each rule."""


def operators(backend):
    """Those of a backend as attributes; what it leaves out the reference computes."""
    return SimpleNamespace(**reference.backend.functions | backend.functions)


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
    results += [backend.fake_quantize(x, qmax, axis)]
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


def every_learned_operator(backend, x, axis, names=tuple(RULES)):
    """The same of the operators of quantizers that learn, by these rules."""
    grad = x.flip(0) if x.dim() else x
    results = []
    for name in names:
        parameters, low, high = RULES[name]
        rule = rules.Rule(name, low, high)
        values = torch.tensor(parameters, device=x.device)
        if axis is not None:
            values = values[:, None] * torch.linspace(0.8, 1.2, x.shape[axis]).to(x.device)
        results += [backend.fake_quantize_learned(x, values, rule, axis)]
        results += [backend.quantize_learned(x, values, rule, axis)]
        arguments = x, values, rule, axis, 0.3
        results += backend.fake_quantize_learned_backward(grad, *arguments)
    return results


def _codes(dtype, *shape):
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    codes = codes if dtype == torch.uint8 else (codes.short() - 128).to(torch.int8)
    return codes.to(memory_format=torch.channels_last) if len(shape) == 4 else codes


def every_product(backend, device):
    """Of codes, and with their scales."""
    x, weight = _codes(torch.uint8, 2, 3, 5, 4), _codes(torch.int8, 4, 3, 3, 3)
    rows, matrix = _codes(torch.uint8, 6, 8), _codes(torch.int8, 5, 8)
    zero, scale, bias = torch.tensor(7, dtype=torch.uint8), torch.tensor(0.5), torch.randn(5)
    x, weight, rows, matrix, zero, scale, bias = (
        value.to(device) for value in (x, weight, rows, matrix, zero, scale, bias)
    )
    scales = bias.abs()
    how = [2, 1], [1, 1], [1, 1]
    products = backend.convolve_codes(x, zero, weight, None, *how, False, [0, 0], 1)
    kept, measured = backend.convolve_sums(x, zero, weight, None, *how, 1, 2**20, True)
    of_x, of_weight = (x, scale, zero, None), (weight, scales[:4], None, None)
    of_rows, of_matrix = (rows, scale, zero, None), (matrix, scales, None, None)
    return [
        *(backend.float_steps(x, z, d) for z in (None, zero) for d in DTYPES),
        backend.float_steps(rows, torch.arange(6, dtype=torch.uint8, device=device), torch.float32),
        products,
        kept,
        *measured,
        backend.multiply_codes(rows, zero, matrix, None),
        backend.integer_convolution(
            x.float(), weight.float(), bias[:4], *of_x, *of_weight, *how, False, [0, 0], 1
        ),
        backend.integer_linear(rows.half(), matrix.float(), bias, *of_rows, *of_matrix),
    ]


def every_gradient_of_a_product(backend, device):
    """Of whole numbers, whose sums are exact, and so the same in any order."""
    x, weight = _codes(torch.uint8, 2, 16, 5, 4), _codes(torch.int8, 16, 16, 3, 3).float()
    sums = torch.randint(-300, 301, (2, 16, 3, 4), dtype=torch.int16)
    grad = torch.randint(-8, 9, sums.shape).float()
    sums, grad = (value.to(memory_format=torch.channels_last) for value in (sums, grad))
    zero, scale, one = torch.tensor(7, dtype=torch.uint8), torch.tensor(0.5), torch.ones(16)
    x, weight, sums, grad, zero, scale, one = (
        value.to(device) for value in (x, weight, sums, grad, zero, scale, one)
    )
    how = [2, 1], [1, 1], [1, 1], False, [0, 0], 1
    of_sums = GradOfSums(grad, sums, one, -one, True, 3 * one, one, -2 * one, one)
    results = []
    for given in (grad, of_sums):
        results += backend.grads_of_convolution(
            given, x, scale, zero, weight, torch.float32, True, True, *how
        )
    return results


def every_pass_over_sums(backend, device):
    """Over sums of products. Of the gradients all sums are exact, and so the same in any order."""
    sums = torch.randint(-300, 301, (2, 4, 3, 5)).to(memory_format=torch.channels_last).float()
    grad = torch.randint(-8, 9, sums.shape).to(memory_format=torch.channels_last).float()
    scale, weight, bias, residual = torch.rand(4) + 0.5, *torch.randn(2, 4), torch.randn(sums.shape)
    residual = residual.to(memory_format=torch.channels_last)
    range_, mean = torch.tensor([-20.0, 40.0]), torch.tensor([0.25, -3.0, 8.5, 0.0])
    sums, grad, scale, weight, bias, residual, range_, mean = (
        value.to(device) for value in (sums, grad, scale, weight, bias, residual, range_, mean)
    )
    kept, total, squares, *ends = backend.moments(sums, 300)
    count = sums.numel() // 4
    results = [kept, total, squares, *ends]
    for of_layer in (None, bias):
        running = mean.clone(), scale.clone(), torch.tensor(3, device=device)
        factor, term, *of_batch = backend.normalization(
            *(total, squares, count, scale, weight, bias, 1e-5),
            Running(*running, of_layer, 0.1),
        )
        results += [factor, term, *of_batch, *running]
    for factors in (factor, -factor, factor * float("nan")):
        results += [backend.ends_of_line(*ends, factors, term, relu) for relu in (False, True)]
    for kind in ("signed", "full", "unsigned", "affine"):
        grid, observed = Grid(4, kind), torch.full_like(range_[0], 0.25)
        running = torch.full_like(range_ if grid.is_affine else observed, 2.0)
        for batch in (range_, range_ * float("nan"), range_ * float("inf")):
            results += [backend.observe(batch, running, observed, 0.3, grid)]
            results += [running.clone(), observed.clone()]
    results += backend.map_sums(kept, factor, term, residual, True, True, True)
    results += backend.codes_of_sums(kept, factor, term, True, range_, Grid(4, "affine"))
    line, of_weight, of_bias = backend.grads_of_norm(
        grad, kept, factor, term, True, mean, scale, scale, weight, True
    )
    results += [*line, of_weight, of_bias]
    results += [backend.grads_of_sums(grad, kept, factor, term, True, mean, *line)]
    results += backend.statistics_of_sums(sums, scale, weight, bias, 1e-5, 300)
    results += [
        backend.norm_of_sums(sums, weight, bias, kept, scale, factor, term, mean, scale, True)
    ]
    results += backend.grads_of_norm_of_sums(
        grad, weight, kept, scale, factor, term, mean, scale, True
    )
    return results


def every_adder(backend, device):
    x, weight, grad = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3), torch.randn(2, 4, 3, 5)
    x, grad = (value.to(memory_format=torch.channels_last) for value in (x, grad))
    x, weight, grad = (value.to(device) for value in (x, weight, grad))
    how = (2, 1), (1, 1)
    return [
        backend.adder_conv2d(x, weight, *how),
        backend.adder_conv2d_input_gradient(grad, x, weight, *how),
        backend.adder_conv2d_weight_gradient(grad, x, weight, *how),
    ]


def _of_drawn(every, *others):
    return lambda backend, device: every(backend, torch.randn(3, 40).to(device), 0, *others)


EVERY = {
    "signed": _of_drawn(every_operator),
    "on a grid": _of_drawn(every_operator_on_grid, Grid(4, "affine")),
    "codes on a grid": _of_drawn(every_code_on_grid, Grid(4, "affine")),
    "learned": _of_drawn(every_learned_operator),
    "products": every_product,
    "sums": every_pass_over_sums,
    "gradients of products": every_gradient_of_a_product,
    "adders": every_adder,
}
"""Functions of operators as attributes, and of a device: together they call every operator."""
