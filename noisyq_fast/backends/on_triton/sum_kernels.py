"""The Triton kernels of passes over the sums of products.

Sums have their channels last in memory: tiles are those of `tiles`, of (rows, channels, 1);
kernels that write bits iterate in memory order. In reductions each program writes partial results,
one row per quantity, and a second kernel adds these in a fixed order.
"""

import triton
import triton.language as tl

from noisyq_fast.backends.on_triton.arithmetic import (
    AFFINE,
    UNSIGNED,
    ends_of,
    from_float,
    high_key,
    levels_of,
    low_key,
    quantized,
    rounded_of,
    to_float,
)
from noisyq_fast.backends.on_triton.grid_kernels import load_ends, move_average
from noisyq_fast.backends.on_triton.tiles import (
    channels_of_program,
    elements_of_tile,
    tiles_along,
    tiles_of_program,
)

INFINITY = tl.constexpr(float("inf"))
BELOW_NARROW = tl.constexpr(2**15)
"""Above every sum of 16 bits."""


@triton.jit
def _of_channels(x, channel, exists):
    return tl.load(x + channel, exists, 0.0)[None, :, None]


@triton.jit
def _row_of(partial, row, sizes):
    """A program's row; the rows of a quantity are adjacent."""
    row = row * tl.num_programs(1) + tl.program_id(1)
    return partial + tl.cast(row, tl.int64) * sizes[1]


@triton.jit
def moments_partially(sums, kept, wholes, ends, WIDE: tl.constexpr, sizes, TILE: tl.constexpr):
    """``wholes``: the sum of v and, in two parts, that of v^2; ``ends``: the largest -v and v.

    Sums of 16 bits are accumulated in 32, with the lower and upper 16 bits of squares apart: exact
    up to 2^15 tiles per program.
    """
    DTYPE: tl.constexpr = tl.int64 if WIDE else tl.int32
    BITS: tl.constexpr = 32 if WIDE else 16
    total = tl.zeros(TILE, DTYPE)
    upper = tl.zeros(TILE, DTYPE)
    lower = tl.zeros(TILE, DTYPE)
    low = tl.full(TILE, -INFINITY, tl.float32)
    high = tl.full(TILE, -INFINITY, tl.float32)
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        v = tl.load(sums + offsets, exists, 0)
        if kept is not None:
            tl.store(kept + offsets, v.to(tl.int16), exists)
        whole = v.to(DTYPE)
        square = whole * whole
        total += whole
        upper += square >> BITS
        lower += square & ((1 << BITS) - 1)
        v = v.to(tl.float32)
        low = tl.maximum(low, tl.where(exists, -v, -INFINITY))
        high = tl.maximum(high, tl.where(exists, v, -INFINITY))
    channel, exists = channels_of_program(sizes, TILE)
    total = tl.sum(tl.sum(total.to(tl.int64), 2), 0)
    upper = tl.sum(tl.sum(upper.to(tl.int64), 2), 0)
    lower = tl.sum(tl.sum(lower.to(tl.int64), 2), 0)
    if not WIDE:
        upper, lower = tl.zeros_like(upper), lower + (upper << BITS)
    tl.store(_row_of(wholes, 0, sizes) + channel, total, exists)
    tl.store(_row_of(wholes, 1, sizes) + channel, upper, exists)
    tl.store(_row_of(wholes, 2, sizes) + channel, lower, exists)
    tl.store(_row_of(ends, 0, sizes) + channel, tl.max(tl.max(low, 2), 0), exists)
    tl.store(_row_of(ends, 1, sizes) + channel, tl.max(tl.max(high, 2), 0), exists)


@triton.jit
def _channels_to_finish(channels, TILE: tl.constexpr):
    channel = tl.program_id(0) * TILE[1] + tl.arange(0, TILE[1])
    return channel, channel < channels


@triton.jit
def _sum_of_rows(partial, quantity, rows, channels, TILE: tl.constexpr):
    channel, exists = _channels_to_finish(channels, TILE)
    found = tl.zeros(TILE, partial.dtype.element_ty)
    for first in range(0, rows, TILE[0]):
        row = first + tl.arange(0, TILE[0])
        offsets = (quantity * rows + row).to(tl.int64)[:, None] * channels + channel[None, :]
        found += tl.load(partial + offsets, (row < rows)[:, None] & exists[None, :], 0)
    return tl.sum(found, 0)


@triton.jit
def _largest_of_rows(partial, quantity, rows, channels, TILE: tl.constexpr):
    channel, exists = _channels_to_finish(channels, TILE)
    found = tl.full(TILE, -INFINITY, tl.float32)
    for first in range(0, rows, TILE[0]):
        row = first + tl.arange(0, TILE[0])
        offsets = (quantity * rows + row).to(tl.int64)[:, None] * channels + channel[None, :]
        read = (row < rows)[:, None] & exists[None, :]
        found = tl.maximum(found, tl.load(partial + offsets, read, -INFINITY))
    return tl.max(found, 0)


@triton.jit
def moments(wholes, ends, total, squares, low, high, rows, channels, TILE: tl.constexpr):
    channel, exists = _channels_to_finish(channels, TILE)
    upper = _sum_of_rows(wholes, 1, rows, channels, TILE)
    lower = _sum_of_rows(wholes, 2, rows, channels, TILE)
    tl.store(total + channel, _sum_of_rows(wholes, 0, rows, channels, TILE), exists)
    tl.store(squares + 2 * channel, upper + (lower >> 32), exists)
    tl.store(squares + 2 * channel + 1, lower & 0xFFFFFFFF, exists)
    tl.store(low + channel, -_largest_of_rows(ends, 0, rows, channels, TILE), exists)
    tl.store(high + channel, _largest_of_rows(ends, 1, rows, channels, TILE), exists)


@triton.jit
def moments_of_products(found, total, squares, low, high, channels, TILE: tl.constexpr):
    """The same from the ``found`` of `product_kernels.multiply`."""
    channel = tl.program_id(0) * TILE + tl.arange(0, TILE)
    exists = channel < channels
    found += channel
    tl.store(total + channel, tl.load(found, exists, 0), exists)
    square = tl.load(found + channels, exists, 0)
    tl.store(squares + 2 * channel, square >> 32, exists)
    tl.store(squares + 2 * channel + 1, square & 0xFFFFFFFF, exists)
    least = BELOW_NARROW - tl.load(found + 2 * channels, exists, 0)
    tl.store(low + channel, least.to(tl.float32), exists)
    largest = tl.load(found + 3 * channels, exists, 0) - BELOW_NARROW
    tl.store(high + channel, largest.to(tl.float32), exists)


@triton.jit
def _difference(upper, lower, p, t):
    """``upper * 2^32 + lower - p * t``, which is not negative, as the upper and lower 64 bits."""
    product = (p * t).to(tl.uint64)
    above = tl.umulhi(p.to(tl.uint64), t.to(tl.uint64)).to(tl.int64)
    above -= tl.where(p < 0, t, 0) + tl.where(t < 0, p, 0)
    whole = ((upper << 32) | lower).to(tl.uint64)
    above = (upper >> 32) - above - (whole < product).to(tl.int64)
    return above, whole - product


@triton.jit
def _power_of_2(exponent):
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def _double_of(above, below):
    """``above * 2^64 + below`` in float64, rounded once: from the upper 63 bits and whether any
    lower bit is set. ``above`` is less than 2^53."""
    exponent = (above.to(tl.float64).to(tl.int64, bitcast=True) >> 52) - 1023
    shift = tl.where(above > 0, exponent + 2, 2)
    left, right = (64 - shift).to(tl.uint64), shift.to(tl.uint64)
    leading = (above.to(tl.uint64) << left) | (below >> right)
    leading |= (below << left != 0).to(tl.uint64)
    large = leading.to(tl.int64).to(tl.float64) * _power_of_2(shift)
    return tl.where(above > 0, large, below.to(tl.float64))


@triton.jit
def _move(average, batch, kept, momentum, exists):
    moved = tl.load(average, exists, 0.0) * kept + momentum * batch.to(tl.float32)
    tl.store(average, moved, exists)


@triton.jit
def normalization(
    total,
    squares,
    scale,
    weight,
    bias,
    factor,
    term,
    mean,
    inverse,
    batch_mean,
    variance,
    count,
    eps,
    running,
    TRACKS: tl.constexpr,
    channels,
    TILE: tl.constexpr,
):
    """``eps`` is passed as the bits of a float64. ``running``, if ``TRACKS``: the running mean and
    variance, the number of batches, the bias of the layer, the bits of n / (n - 1), and the weights
    of the old and the new statistics."""
    channel, exists = _channels_to_finish(channels, TILE)
    s1 = tl.load(total + channel, exists, 0)
    n = tl.zeros_like(s1) + count
    upper = tl.load(squares + 2 * channel, exists, 0)
    lower = tl.load(squares + 2 * channel + 1, exists, 0)
    of_v = s1.to(tl.float64) / n.to(tl.float64)
    p = ((of_v + 6755399441055744.0) - 6755399441055744.0).to(tl.int64)  # 1.5 * 2^52: rounds
    d = (s1 - n * p).to(tl.float64)
    above, below = _difference(upper, lower, p, 2 * s1 - n * p)
    n = n.to(tl.float64)
    centred = _double_of(above, below) - d * d / n
    of_v = p.to(tl.float64) + d / n

    s = tl.load(scale + channel, exists, 0.0).to(tl.float64)
    of_batch = of_v * s
    variances = centred / n * (s * s)
    eps = tl.cast(eps, tl.int64).to(tl.float64, bitcast=True)
    inverses = (1.0 / tl.sqrt(variances + eps)).to(tl.float32)
    slope = inverses.to(tl.float64)
    if weight is not None:
        slope = tl.load(weight + channel, exists, 0.0).to(tl.float64) * slope
    terms = -(of_batch * slope)
    if bias is not None:
        terms = tl.load(bias + channel, exists, 0.0).to(tl.float64) + terms
    tl.store(factor + channel, (slope * s).to(tl.float32), exists)
    tl.store(term + channel, terms.to(tl.float32), exists)
    tl.store(mean + channel, of_v.to(tl.float32), exists)
    tl.store(inverse + channel, inverses, exists)
    tl.store(batch_mean + channel, of_batch, exists)
    tl.store(variance + channel, variances, exists)
    if TRACKS:  # Triton 3.6 compares no tuple that holds a None with None.
        if tl.program_id(0) == 0:
            tl.store(running[2], tl.load(running[2]) + 1)
        if running[3] is not None:
            of_batch += tl.load(running[3] + channel, exists, 0.0).to(tl.float64)
        variances *= tl.cast(running[4], tl.int64).to(tl.float64, bitcast=True)
        _move(running[0] + channel, of_batch, running[5], running[6], exists)
        _move(running[1] + channel, variances, running[5], running[6], exists)


@triton.jit
def _with_keys_of(values, exists, low, high):
    """Updates the largest keys with the values that exist."""
    is_nan = (values != values) & exists
    values = tl.where(exists, values, 0.0)
    low = tl.maximum(low, tl.where(is_nan, 0x7FC00000, low_key(values)))
    high = tl.maximum(high, tl.where(is_nan, 0x7FC00000, high_key(values, AFFINE)))
    return low, high


@triton.jit
def ends_of_line(low, high, factor, term, range_, RELU: tl.constexpr, channels, TILE: tl.constexpr):
    low_keys = tl.zeros([TILE], tl.int32)
    high_keys = tl.zeros([TILE], tl.int32)
    for first in range(0, channels, TILE):
        channel = first + tl.arange(0, TILE)
        exists = channel < channels
        factors = tl.load(factor + channel, exists, 0.0)
        terms = tl.load(term + channel, exists, 0.0)
        one = tl.load(low + channel, exists, 0.0) * factors + terms
        other = tl.load(high + channel, exists, 0.0) * factors + terms
        if RELU:
            one, other = tl.where(one < 0.0, 0.0, one), tl.where(other < 0.0, 0.0, other)
        low_keys, high_keys = _with_keys_of(one, exists, low_keys, high_keys)
        low_keys, high_keys = _with_keys_of(other, exists, low_keys, high_keys)
    least, largest = ends_of(tl.max(low_keys, 0), tl.max(high_keys, 0), AFFINE)
    tl.store(range_, least)
    tl.store(range_ + 1, largest)


@triton.jit
def observe(
    ends, running, observed, batch, averaging_constant, KIND: tl.constexpr, TILE: tl.constexpr
):
    """The range per tensor; ``TILE`` is 1."""
    one = tl.arange(0, TILE)
    low, high = tl.load(ends + one), tl.load(ends + 1 + one)
    if KIND != AFFINE:
        if KIND != UNSIGNED:
            high = tl.maximum(-low, high, propagate_nan=tl.PropagateNan.ALL)
        tl.store(batch + one, high)
    move_average(running, observed, low, high, averaging_constant, one, one < 1, KIND, 1)


@triton.jit
def map_sums(
    sums,
    factor,
    term,
    residual,
    y,
    zeros,
    partial,
    RELU: tl.constexpr,
    channels,
    sizes,
    TILE: tl.constexpr,
):
    """In memory order, eight elements per byte of ``zeros``. ``partial``: the largest keys of the
    low and the high end."""
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    low = tl.zeros([GROUPS, 8], tl.int32)
    high = tl.zeros([GROUPS, 8], tl.int32)
    within = tl.arange(0, GROUPS)[:, None] * 8 + tl.arange(0, 8)[None, :]
    for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), tl.num_programs(1)):
        first = tl.cast(tile, tl.int64) * (GROUPS * 8)
        offsets = first + within
        exists = offsets < elements
        channel = ((first % channels).to(tl.int32) + within) % channels
        values = tl.load(sums + offsets, exists, 0).to(tl.float32)
        values = values * tl.load(factor + channel) + tl.load(term + channel)
        if residual is not None:
            values += tl.load(residual + offsets, exists, 0.0)
        if RELU:
            values = tl.where(values < 0.0, 0.0, values)
        tl.store(y + offsets, values, exists)
        if zeros is not None:
            bits = tl.where(values > 0.0, 0, 1) << tl.arange(0, 8)[None, :]
            bits = tl.sum(tl.where(exists, bits, 0), 1).to(tl.uint8)
            group = first // 8 + tl.arange(0, GROUPS)
            tl.store(zeros + group, bits, group * 8 < elements)
        if partial is not None:
            low, high = _with_keys_of(values, exists, low, high)
    if partial is not None:
        tl.store(partial + tl.program_id(1), tl.max(tl.max(low, 1), 0))
        tl.store(partial + tl.num_programs(1) + tl.program_id(1), tl.max(tl.max(high, 1), 0))


@triton.jit
def ends_of_map(partial, range_, rows, TILE: tl.constexpr):
    low = tl.zeros([TILE], tl.int32)
    high = tl.zeros([TILE], tl.int32)
    for first in range(0, rows, TILE):
        row = first + tl.arange(0, TILE)
        low = tl.maximum(low, tl.load(partial + row, row < rows, 0))
        high = tl.maximum(high, tl.load(partial + rows + row, row < rows, 0))
    low, high = ends_of(tl.max(low, 0), tl.max(high, 0), AFFINE)
    tl.store(range_, low)
    tl.store(range_ + 1, high)


@triton.jit
def codes_of_sums(
    sums,
    factor,
    term,
    range_,
    codes,
    scale,
    zero,
    qmax,
    KIND: tl.constexpr,
    RELU: tl.constexpr,
    sizes,
    TILE: tl.constexpr,
):
    low, high = load_ends(range_, tl.arange(0, 1), True, KIND, 1)
    scales, zeros = levels_of(low, high, qmax, KIND)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        # 0 times what is finite is 0.
        nothing = tl.zeros([256], tl.float32)
        for first in range(0, sizes[1], 256):
            c = first + tl.arange(0, 256)
            line = tl.load(factor + c, c < sizes[1], 0.0) + tl.load(term + c, c < sizes[1], 0.0)
            nothing += line * 0.0
        tl.store(scale + tl.arange(0, 1), scales + tl.sum(nothing, 0))
        tl.store(zero + tl.arange(0, 1), zeros.to(tl.int32).to(tl.uint8))
    scales, zeros = scales[None, :, None], zeros[None, :, None]
    channel, channel_exists = channels_of_program(sizes, TILE)
    factors = _of_channels(factor, channel, channel_exists)
    terms = _of_channels(term, channel, channel_exists)
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        y = tl.load(sums + offsets, exists, 0).to(tl.float32) * factors + terms
        if RELU:
            y = tl.where(y < 0.0, 0.0, y)
        rounded = rounded_of(tl.div_rn(y, scales))
        dtype: tl.constexpr = codes.dtype.element_ty
        tl.store(codes + offsets, quantized(rounded, scales, zeros, qmax, KIND, dtype), exists)


@triton.jit
def _behind(grad, v, offsets, exists, factors, terms, RELU: tl.constexpr):
    """The gradient before the ReLU: 0 where its output is 0."""
    g = to_float(tl.load(grad + offsets, exists, 0.0))
    if RELU:
        g = tl.where(v * factors + terms > 0.0, g, 0.0)
    return g


@triton.jit
def grads_of_norm_partially(
    sums, grad, factor, term, mean, partial, RELU: tl.constexpr, sizes, TILE: tl.constexpr
):
    """The sums of g and of g (v - mean)."""
    channel, channel_exists = channels_of_program(sizes, TILE)
    factors = _of_channels(factor, channel, channel_exists)
    terms = _of_channels(term, channel, channel_exists)
    means = _of_channels(mean, channel, channel_exists)
    total = tl.zeros(TILE, tl.float64)
    product = tl.zeros(TILE, tl.float64)
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        v = tl.load(sums + offsets, exists, 0).to(tl.float32)
        g = _behind(grad, v, offsets, exists, factors, terms, RELU).to(tl.float64)
        total += g
        product += g * tl.where(exists, v - means, 0.0).to(tl.float64)
    total, product = tl.sum(tl.sum(total, 2), 0), tl.sum(tl.sum(product, 2), 0)
    tl.store(_row_of(partial, 0, sizes) + channel, total, channel_exists)
    tl.store(_row_of(partial, 1, sizes) + channel, product, channel_exists)


@triton.jit
def grads_of_norm(
    partial,
    inverse,
    scale,
    weight,
    slope,
    shift,
    tilt,
    of_weight,
    of_bias,
    count,
    USES_BATCH: tl.constexpr,
    rows,
    channels,
    TILE: tl.constexpr,
):
    channel, exists = _channels_to_finish(channels, TILE)
    total = _sum_of_rows(partial, 0, rows, channels, TILE)
    product = _sum_of_rows(partial, 1, rows, channels, TILE)
    inverses = tl.load(inverse + channel, exists, 0.0).to(tl.float64)
    spread = inverses * tl.load(scale + channel, exists, 0.0).to(tl.float64)
    slopes = inverses
    if weight is not None:
        slopes = tl.load(weight + channel, exists, 0.0).to(tl.float64) * inverses
    shifts = tl.zeros_like(slopes)
    tilts = shifts
    if USES_BATCH:
        n = tl.zeros_like(slopes) + tl.cast(count, tl.int64).to(tl.float64)
        shifts = slopes * total / n
        tilts = slopes * spread * spread * product / n
    tl.store(slope + channel, slopes.to(tl.float32), exists)
    tl.store(shift + channel, shifts.to(tl.float32), exists)
    tl.store(tilt + channel, tilts.to(tl.float32), exists)
    tl.store(of_weight + channel, (spread * product).to(tl.float32), exists)
    tl.store(of_bias + channel, total.to(tl.float32), exists)


@triton.jit
def grads_of_sums(
    sums,
    grad,
    factor,
    term,
    mean,
    slope,
    shift,
    tilt,
    out,
    RELU: tl.constexpr,
    sizes,
    TILE: tl.constexpr,
):
    channel, channel_exists = channels_of_program(sizes, TILE)
    factors = _of_channels(factor, channel, channel_exists)
    terms = _of_channels(term, channel, channel_exists)
    means = _of_channels(mean, channel, channel_exists)
    slopes = _of_channels(slope, channel, channel_exists)
    shifts = _of_channels(shift, channel, channel_exists)
    tilts = _of_channels(tilt, channel, channel_exists)
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        v = tl.load(sums + offsets, exists, 0).to(tl.float32)
        g = _behind(grad, v, offsets, exists, factors, terms, RELU)
        values = slopes * g - shifts - (v - means) * tilts
        tl.store(out + offsets, from_float(values, out.dtype.element_ty), exists)
