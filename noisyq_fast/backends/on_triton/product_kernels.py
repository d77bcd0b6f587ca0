"""The Triton kernels of products of codes: exact sums in int32 and, if scales are given, values.

A linear product is a convolution of images of one pixel. Images and weights have their channels
last in memory. ``image`` is (rows, columns, channels); ``output`` is (pixels of all images, rows,
columns, channels of a group); ``window`` is (stride, padding and dilation, each along rows and
columns, and its columns, None for a single pixel); ``terms`` is the number of terms (of a sum, of a
pixel). ``TILE`` is (pixels, output channels, terms).
"""

import triton
import triton.language as tl

from noisyq_fast.backends.on_triton.arithmetic import from_float
from noisyq_fast.backends.on_triton.sum_kernels import BELOW_NARROW
from noisyq_fast.backends.on_triton.tiles import tiles_along


@triton.jit
def _pixels_of_tile(tile, output, window, TILE: tl.constexpr):
    """Pixels of the output, which of them exist, their image, and the origin of their windows."""
    pixels, rows, columns, _ = output
    pixel = tile * TILE[0] + tl.arange(0, TILE[0])
    top = pixel // columns % rows * window[0] - window[2]
    left = pixel % columns * window[1] - window[3]
    return pixel, pixel < pixels, pixel // columns // rows, top, left


@triton.jit
def _within(top, left, step, image, window):
    """A pixel of each window: its position in the image, and whether it exists."""
    y, x = top, left
    if window[6] is not None:
        y, x = top + step // window[6] * window[4], left + step % window[6] * window[5]
    return y * image[1] + x, (y >= 0) & (y < image[0]) & (x >= 0) & (x < image[1])


@triton.jit
def _zeros_of(zero, number, exists, OF_IMAGE: tl.constexpr):
    """The zero point, of all codes or of the image of each pixel, along two axes."""
    if zero is None:
        zeros = 0
    elif OF_IMAGE:
        zeros = tl.load(zero + number, exists, 0).to(tl.int32)[:, None]
    else:
        zeros = tl.load(zero).to(tl.int32)
    return zeros


@triton.jit
def _store(sums, scale, weight_scale, term, out, rows, number, channel, channels, exists, OF_IMAGE):
    """Stores the sums, or their values, each operation rounded once."""
    out += rows.to(tl.int64)[:, None] * channels + channel[None, :]
    row_exists, channel_exists = exists
    if scale is None:
        values = sums.to(out.dtype.element_ty)
    else:
        # Of the image of each pixel, or one.
        scales = tl.load(scale + number, row_exists, 1.0)[:, None] if OF_IMAGE else tl.load(scale)
        factors = scales * tl.load(weight_scale + channel, channel_exists, 1.0)[None, :]
        terms = 0.0
        if term is not None:
            terms = tl.load(term + channel, channel_exists, 0.0)[None, :]
        values = from_float(sums.to(tl.float32) * factors + terms, out.dtype.element_ty)
    tl.store(out, values, row_exists[:, None] & channel_exists[None, :])


@triton.jit
def _add_to_moments(found, sums, rows_exist, channel, exists, channels):
    """Moments of up to 2^15 rows of sums that fit into 16 bits; exact, so in any order."""
    sums = tl.where(rows_exist[:, None], sums, 0)
    square = sums * sums
    squares = tl.sum(square >> 16, 0).to(tl.int64) << 16
    squares += tl.sum(square & 0xFFFF, 0).to(tl.int64)
    high = BELOW_NARROW + tl.max(tl.where(rows_exist[:, None], sums, -BELOW_NARROW), 0)
    low = BELOW_NARROW - tl.min(tl.where(rows_exist[:, None], sums, BELOW_NARROW), 0)
    found += channel
    tl.atomic_add(found, tl.sum(sums, 0).to(tl.int64), exists, sem="relaxed")
    tl.atomic_add(found + channels, squares, exists, sem="relaxed")
    tl.atomic_max(found + 2 * channels, low.to(tl.int64), exists, sem="relaxed")
    tl.atomic_max(found + 3 * channels, high.to(tl.int64), exists, sem="relaxed")


@triton.jit
def multiply(
    codes,
    zero,
    weight,
    weight_zero,
    weight_sum,
    scale,
    weight_scale,
    term,
    out,
    found,
    output,
    image,
    window,
    terms,
    groups,
    TILE: tl.constexpr,
    OF_IMAGE: tl.constexpr,
):
    """Matrix products of signed bytes; 128 is subtracted from unsigned codes and their zero
    points::

        sum (c - z) (d - w) = sum c d - z sum (d - w) - w sum c

    ``weight`` has the codes d; ``weight_zero`` has w and ``weight_sum`` the sums of d - w, for each
    output channel; they are None if all w are 0, and if z is 0. One program per tile and group.
    ``found`` receives, for each channel, the sum of all sums v, the sum of v^2, and the largest -v
    and v, at least 0; it is 0 initially.
    """
    pixels_tile = tl.program_id(0) // tiles_along(output[3], TILE[1])
    rows, row_exists, number, top, left = _pixels_of_tile(pixels_tile, output, window, TILE)
    channel = tl.program_id(0) % tiles_along(output[3], TILE[1]) * TILE[1] + tl.arange(0, TILE[1])
    channel_exists = channel < output[3]
    channel += tl.program_id(1) * output[3]
    of_sum, of_pixel = terms

    IS_UNSIGNED: tl.constexpr = codes.dtype.element_ty == tl.uint8
    padding = 0
    if zero is not None and not OF_IMAGE:
        padding = tl.load(zero)
    codes += number.to(tl.int64)[:, None] * (image[0] * image[1] * image[2])
    codes += tl.program_id(1) * of_pixel
    weight += channel.to(tl.int64)[None, :] * of_sum
    ROWS: tl.constexpr = TILE[0]
    CHANNELS: tl.constexpr = TILE[1]
    sums = tl.zeros([ROWS, CHANNELS], tl.int32)
    of_codes = tl.zeros([ROWS], tl.int32)
    for first in range(0, of_sum, TILE[2]):
        k = first + tl.arange(0, TILE[2])
        step = (k // of_pixel)[None, :]
        place, exists = _within(top[:, None], left[:, None], step, image, window)
        offsets = place * image[2] + (k % of_pixel)[None, :]
        exists &= row_exists[:, None] & (k < of_sum)[None, :]
        c = tl.load(codes + offsets, exists, padding)
        if IS_UNSIGNED:
            c = (c ^ 128).to(tl.int8, bitcast=True)
        d = tl.load(weight + k[:, None], (k < of_sum)[:, None] & channel_exists[None, :], 0)
        sums = tl.dot(c, d, sums, out_dtype=tl.int32)
        if weight_zero is not None:
            of_codes += tl.sum(tl.where((k < of_sum)[None, :], c.to(tl.int32), 0), 1)
    if weight_zero is not None:
        w = tl.load(weight_zero + channel, channel_exists, 0)
        sums -= of_codes[:, None] * w[None, :]
    if weight_sum is not None:
        z = _zeros_of(zero, number, row_exists, OF_IMAGE) - 128
        sums -= z * tl.load(weight_sum + channel, channel_exists, 0)[None, :]
    channels = output[3] * groups
    if found is not None:
        _add_to_moments(found, sums, row_exists, channel, channel_exists, channels)
    exists = row_exists, channel_exists
    _store(sums, scale, weight_scale, term, out, rows, number, channel, channels, exists, OF_IMAGE)


@triton.jit
def multiply_few(
    codes,
    zero,
    weight,
    weight_zero,
    scale,
    weight_scale,
    term,
    out,
    output,
    image,
    window,
    terms,
    groups,
    TILE: tl.constexpr,
    OF_IMAGE: tl.constexpr,
):
    """For groups of few channels: the sum term by term."""
    channels = output[3] * groups
    pixels_tile = tl.program_id(0) // tiles_along(channels, TILE[1])
    rows, row_exists, number, top, left = _pixels_of_tile(pixels_tile, output, window, TILE)
    channel = tl.program_id(0) % tiles_along(channels, TILE[1]) * TILE[1] + tl.arange(0, TILE[1])
    channel_exists = channel < channels
    of_sum, of_pixel = terms

    z = _zeros_of(zero, number, row_exists, OF_IMAGE)
    w = 0
    if weight_zero is not None:
        w = tl.load(weight_zero + channel, channel_exists, 0).to(tl.int32)[None, :]
    codes += number.to(tl.int64)[:, None] * (image[0] * image[1] * image[2])
    codes += (channel // output[3] * of_pixel)[None, :]
    weight += channel.to(tl.int64)[None, :] * of_sum
    ROWS: tl.constexpr = TILE[0]
    CHANNELS: tl.constexpr = TILE[1]
    sums = tl.zeros([ROWS, CHANNELS], tl.int32)
    for k in range(of_sum):
        place, exists = _within(top, left, k // of_pixel, image, window)
        exists = (exists & row_exists)[:, None] & channel_exists[None, :]
        c = tl.load(codes + (place * image[2] + k % of_pixel)[:, None], exists, 0).to(tl.int32)
        d = tl.load(weight + k, channel_exists[None, :], 0).to(tl.int32)
        sums += tl.where(exists, c - z, 0) * (d - w)
    exists = row_exists, channel_exists
    _store(sums, scale, weight_scale, term, out, rows, number, channel, channels, exists, OF_IMAGE)
