"""The Triton kernels for delayed scales, of a tensor with a single range.

They walk over memory in groups of 8 elements: the bits that tell which of them were clipped are one
byte (`packing`). Arguments and tiles are otherwise as in `triton_kernels`.
"""

import triton
import triton.language as tl

from noisyq_fast.backends.triton_arithmetic import (
    averaged,
    is_clipped,
    magnitude,
    quantized,
    scale_of,
    to_float,
)
from noisyq_fast.backends.triton_kernels import tiles_along


@triton.jit
def _elements(tile, elements, GROUPS: tl.constexpr):
    """The groups of a tile, the offsets of their elements, and which of those exist."""
    groups = tl.cast(tile, tl.int64) * GROUPS + tl.arange(0, GROUPS)
    offsets = groups[:, None] * 8 + tl.arange(0, 8)[None, :]
    return groups, offsets, offsets < elements


@triton.jit
def _quantize_elements(x, y, clipped, groups, offsets, exists, scale, qmax, elements):
    quotient = tl.div_rn(to_float(x), scale)
    tl.store(y + offsets, quantized(quotient, scale, qmax, y.dtype.element_ty), exists)
    if clipped is not None:
        bits = is_clipped(quotient, qmax).to(tl.int32) << tl.arange(0, 8)[None, :]
        tl.store(clipped + groups, tl.sum(bits, 1).to(tl.uint8), groups * 8 < elements)


@triton.jit
def quantize_delayed(
    x, y, clipped, partial, running, averaging_constant, qmax, sizes, TILE: tl.constexpr
):
    """Quantizes with the range before the batch, where there is one, and reduces the batch's absmax
    in the same pass. ``partial`` receives the largest magnitude of each program and that range."""
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    before = tl.load(running)
    scale = scale_of(before, qmax)
    largest = tl.zeros([GROUPS], tl.int32)
    for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), tl.num_programs(1)):
        groups, offsets, exists = _elements(tile, elements, GROUPS)
        values = tl.load(x + offsets, exists, 0.0)
        largest = tl.maximum(largest, tl.max(magnitude(values), 1))
        if before == before:
            _quantize_elements(values, y, clipped, groups, offsets, exists, scale, qmax, elements)
    tl.store(partial + tl.program_id(1), tl.max(largest, 0))
    if tl.program_id(1) == 0:
        tl.store(partial + tl.num_programs(1), before.to(tl.int32, bitcast=True))


@triton.jit
def finish_delayed(
    x, y, clipped, partial, running, averaging_constant, qmax, sizes, TILE: tl.constexpr
):
    """The second launch, on the same grid: records the absmax, and quantizes the first batch."""
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    programs = tl.num_programs(1)
    largest = tl.zeros([1024], tl.int32)
    for first in range(0, programs, 1024):
        row = first + tl.arange(0, 1024)
        largest = tl.maximum(largest, tl.load(partial + row, row < programs, 0))
    absmax = tl.max(largest, 0).to(tl.float32, bitcast=True)
    # Not from ``running``, which may be updated already.
    before = tl.load(partial + programs).to(tl.float32, bitcast=True)
    if tl.program_id(1) == 0:
        tl.store(running, averaged(before, absmax, averaging_constant))
    if before != before:
        scale = scale_of(absmax, qmax)
        for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), programs):
            groups, offsets, exists = _elements(tile, elements, GROUPS)
            values = tl.load(x + offsets, exists, 0.0)
            _quantize_elements(values, y, clipped, groups, offsets, exists, scale, qmax, elements)


@triton.jit
def zero_clipped(grad, out, clipped, sizes, TILE: tl.constexpr):
    GROUPS: tl.constexpr = (TILE[2] + 7) // 8
    elements = sizes[2]
    for tile in range(tl.program_id(1), tiles_along(elements, GROUPS * 8), tl.num_programs(1)):
        groups, offsets, exists = _elements(tile, elements, GROUPS)
        bits = tl.load(clipped + groups, groups * 8 < elements, 0).to(tl.int32)
        is_zero = ((bits[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
        values = tl.load(grad + offsets, exists, 0.0)
        tl.store(out + offsets, tl.where(is_zero, 0.0, values), exists)
