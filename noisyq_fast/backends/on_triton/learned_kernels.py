"""The rules of learned quantizers in Triton, with the functions of ``csrc/rules.h``, and their
kernels. Tiles of the forward are those of `tiles`.
"""

# ruff: noqa: SIM109, as Triton compiles no ``in``
import triton
import triton.language as tl

from noisyq_fast import rules
from noisyq_fast.backends.on_triton.arithmetic import (
    FLT_MIN,
    ROUNDER,
    from_float,
    rounded_of,
    to_float,
)
from noisyq_fast.backends.on_triton.tiles import (
    channels_of_program,
    elements_of_tile,
    tiles_of_program,
)

LSQ = tl.constexpr(rules.LSQ)
PACT = tl.constexpr(rules.PACT)
SAT = tl.constexpr(rules.SAT)
AQD = tl.constexpr(rules.AQD)
AQD_ODD = tl.constexpr(rules.AQD_ODD)
QIL = tl.constexpr(rules.QIL)
QIL_ODD = tl.constexpr(rules.QIL_ODD)
DSQ = tl.constexpr(rules.DSQ)
DOREFA_ORIGINAL = tl.constexpr(rules.DOREFA_ORIGINAL)
DOREFA_MODIFIED = tl.constexpr(rules.DOREFA_MODIFIED)
LANES = tl.constexpr(rules.LANES)
CHUNK = tl.constexpr(rules.CHUNK)
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440e-4)

# As csrc/elementary.h.


@triton.jit
def exp_parts(x):
    """e^x = power * (1 + rest), where power is a power of 2."""
    shifted = x * 1.44269504 + ROUNDER
    k = shifted - ROUNDER
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    series = (((r * 1.98412698e-4 + 1.38888889e-3) * r + 8.33333333e-3) * r + 4.16666667e-2) * r
    series = (series + 1.66666667e-1) * r + 0.5
    rest = r * r * series + r
    bits = (shifted.to(tl.int32, bitcast=True) << 23) + 0x3F800000
    return bits.to(tl.float32, bitcast=True), rest


@triton.jit
def exp_of(x):
    raised = tl.where(x < -87.0, -87.0, x)
    power, rest = exp_parts(tl.where(raised > 88.0, 88.0, raised))
    return power * rest + power


@triton.jit
def tanh_of(x):
    size = tl.abs(x)
    power, rest = exp_parts(2.0 * tl.where(size > 10.0, 10.0, size))
    expm1 = power * rest + (power - 1.0)
    t = tl.div_rn(expm1, expm1 + 2.0)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def log_of(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    s = tl.div_rn(f, f + 2.0)
    z = s * s
    series = z * (z * (z * (z * 0.22222222 + 0.28571429) + 0.4) + 0.66666667)
    e = exponent.to(tl.float32)
    ln = e * LN2_HIGH + (e * LN2_LOW + (s * series + 2.0 * s))
    return tl.where(x == x, ln, x)


# As csrc/rules.h. Parameters are ``p``, ``q`` and ``r``; a rule uses the first of these.


@triton.jit
def least(scale):
    return tl.where(scale < FLT_MIN, FLT_MIN, scale)


@triton.jit
def clamp_to(x, low, high):
    raised = tl.where(x < low, low, x)
    return tl.where(raised > high, high, raised)


@triton.jit
def floor_of(x):
    """Of less than 2^22."""
    rounded = rounded_of(x)
    return tl.where(rounded > x, rounded - 1.0, rounded)


@triton.jit
def scale_of(p, q, low, high, RULE: tl.constexpr):
    if RULE == LSQ:
        scale = least(p)
    elif (RULE == PACT) or (RULE == SAT) or (RULE == AQD) or (RULE == AQD_ODD):
        scale = least(tl.div_rn(p, tl.zeros_like(p) + high))
    elif (RULE == QIL) or (RULE == QIL_ODD):
        scale = tl.div_rn(tl.zeros_like(p) + 1.0, tl.zeros_like(p) + high)
    elif RULE == DSQ:
        scale = least(tl.div_rn(q - p, tl.zeros_like(p) + high))
    elif RULE == DOREFA_ORIGINAL:
        scale = tl.div_rn(q, tl.zeros_like(p) + high)
    elif RULE == DOREFA_MODIFIED:
        scale = tl.div_rn(q, tl.zeros_like(p) - low)
    else:
        scale = tl.div_rn(q, tl.zeros_like(p) + (high + 1.0))
    return scale


@triton.jit
def _clip_code(v, high, RULE: tl.constexpr):
    if RULE == AQD_ODD:
        code = rounded_of((clamp_to(v, -high, high) + high) * 0.5) * 2.0 - high
    else:
        code = rounded_of(clamp_to(v, 0.0, high))
    return code


@triton.jit
def _qil_place(x, p, q, RULE: tl.constexpr):
    """x - c, v, and the sign of x."""
    sign = tl.zeros_like(x) + 1.0
    if RULE == QIL_ODD:
        sign = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
        x = tl.abs(x)
    distance = x - p
    return distance, tl.div_rn(distance, least(2.0 * q)) + 0.5, sign


@triton.jit
def _qil_log(v):
    return log_of(tl.where((v <= 0.0) | (v >= 1.0), 0.5, v))


@triton.jit
def _qil_power(v, r, RULE: tl.constexpr):
    power = clamp_to(v, 0.0, 1.0)
    if RULE == QIL_ODD:
        ends = (power <= 0.0) | (power >= 1.0) | (r == 1.0)
        power = tl.where(ends, power, exp_of(r * _qil_log(v)))
    return power


@triton.jit
def _dsq_place(x, p, q, scale, high):
    """The distance from the low end in steps, as the cell and the position in it."""
    steps = tl.div_rn(clamp_to(x, p, q) - p, scale)
    cell = floor_of(steps)
    cell = tl.where(cell > high - 1.0, high - 1.0, cell)
    return steps, cell, (steps - cell) - 0.5


@triton.jit
def code_of(x, p, q, r, low, high, RULE: tl.constexpr):
    scale = scale_of(p, q, low, high, RULE)
    if RULE == LSQ:
        code = rounded_of(clamp_to(tl.div_rn(x, scale), low, high))
    elif (RULE == PACT) or (RULE == SAT) or (RULE == AQD) or (RULE == AQD_ODD):
        code = _clip_code(tl.div_rn(x, scale), high, RULE)
    elif (RULE == QIL) or (RULE == QIL_ODD):
        _, v, sign = _qil_place(x, p, q, RULE)
        code = rounded_of(_qil_power(v, r, RULE) * high) * sign
    elif RULE == DSQ:
        _, cell, place = _dsq_place(x, p, q, scale, high)
        code = cell + tl.where(place >= 0.0, 1.0, 0.0)
    else:
        w = clamp_to((tl.div_rn(tanh_of(x), least(tanh_of(p))) + 1.0) * 0.5, 0.0, 1.0)
        if RULE == DOREFA_ORIGINAL:
            code = rounded_of(w * high) * 2.0 - high
        elif RULE == DOREFA_MODIFIED:
            n = high - low
            cell = floor_of(w * (n + 1.0))
            code = tl.where(cell > n, n, cell) + low
        else:
            cell = floor_of(w * (high + 1.0))
            code = tl.where(cell > high, high, cell) * 2.0 - high
    return code


@triton.jit
def value_of(x, p, q, r, low, high, RULE: tl.constexpr):
    y = code_of(x, p, q, r, low, high, RULE) * scale_of(p, q, low, high, RULE)
    if RULE == DSQ:
        y += p
    return y


@triton.jit
def derivatives_of(x, p, q, r, low, high, RULE: tl.constexpr):
    """dy/dx, and dy/d each parameter, 0 for those that the rule does not have."""
    scale = scale_of(p, q, low, high, RULE)
    by_q = tl.zeros_like(x)
    by_r = tl.zeros_like(x)
    if RULE == LSQ:
        v = tl.div_rn(x, scale)
        below, above = v <= low, v >= high
        by_p = tl.where(below, low, tl.where(above, high, rounded_of(v) - v))
        by_x = tl.where(below | above, 0.0, 1.0)
    elif (RULE == PACT) or (RULE == SAT) or (RULE == AQD) or (RULE == AQD_ODD):
        v = tl.div_rn(x, scale)
        if RULE == PACT:
            inside = tl.zeros_like(x)
        else:
            inside = tl.div_rn(_clip_code(v, high, RULE) - v, tl.zeros_like(x) + high)
        if RULE == AQD_ODD:
            below, above = x < -p, x > p
            inside = tl.where(below, -1.0, inside)
        else:
            below, above = x < 0.0, x >= p
            if RULE == AQD:
                above = x > p
            inside = tl.where(below, 0.0, inside)
        by_p = tl.where(above, 1.0, inside)
        by_x = tl.where(below | above, 0.0, 1.0)
    elif (RULE == QIL) or (RULE == QIL_ODD):
        distance, v, sign = _qil_place(x, p, q, RULE)
        outside = (v <= 0.0) | (v >= 1.0)
        slope = tl.div_rn(tl.zeros_like(x) + 1.0, least(2.0 * q) + tl.zeros_like(x))
        if RULE == QIL_ODD:
            power = _qil_power(v, r, RULE)
            slope = r * tl.div_rn(power, v) * slope
            by_r = tl.where(outside, 0.0, sign * power * _qil_log(v))
        by_center = -(sign * slope)
        by_p = tl.where(outside, 0.0, by_center)
        by_q = tl.where(outside, 0.0, by_center * tl.div_rn(distance, q + tl.zeros_like(x)))
        by_x = tl.where(outside, 0.0, slope)
    elif RULE == DSQ:
        steps, cell, place = _dsq_place(x, p, q, scale, high)
        one = tl.zeros_like(r) + 1.0
        k = log_of(tl.div_rn(2.0 * one, r) - 1.0)
        z = tl.div_rn(one, 1.0 - r)
        t = tanh_of(k * place)
        bump = 1.0 - t * t
        slope = z * k * 0.5 * bump
        n = tl.zeros_like(x) + high
        share = tl.div_rn(steps, n)
        code = tl.div_rn(cell + tl.where(place >= 0.0, 1.0, 0.0), n)
        below, above = x < p, x > q
        by_p = tl.where(above, 0.0, tl.where(below, 1.0, (1.0 - code) + slope * (share - 1.0)))
        by_q = tl.where(below, 0.0, tl.where(above, 1.0, code - slope * share))
        turn = tl.div_rn(2.0 * one, r * (2.0 - r))
        by_alpha = scale * 0.5 * (z * z * t - z * bump * (place * turn))
        by_r = tl.where(below | above, 0.0, by_alpha)
        by_x = tl.where(below | above, 0.0, slope)
    else:
        t = tanh_of(x)
        most = least(tanh_of(p))
        of_most = tl.div_rn(1.0 - most * most, most)
        by_p = -(q * (tl.div_rn(t, most) * of_most))
        by_x = q * tl.div_rn(1.0 - t * t, most)
    return by_x, by_p, by_q, by_r


@triton.jit
def _chained(grad, derivative):
    return tl.where(derivative == 0.0, 0.0, grad * derivative)


@triton.jit
def _parameters(parameters, channel, exists, channels, COUNT: tl.constexpr):
    p = tl.load(parameters + channel, exists, 1.0)
    q, r = p, p
    if COUNT > 1:
        q = tl.load(parameters + channels + channel, exists, 1.0)
    if COUNT > 2:
        r = tl.load(parameters + 2 * channels + channel, exists, 1.0)
    return p, q, r


@triton.jit
def quantize_learned(
    x, parameters, y, low, high, RULE: tl.constexpr, COUNT: tl.constexpr, sizes, TILE: tl.constexpr
):
    """Writes values, or codes if ``y`` is int16."""
    channel, is_channel = channels_of_program(sizes, TILE)
    p, q, r = _parameters(parameters, channel, is_channel, sizes[1], COUNT)
    p, q, r = p[None, :, None], q[None, :, None], r[None, :, None]
    dtype: tl.constexpr = y.dtype.element_ty
    for tile in range(tl.program_id(1), tiles_of_program(sizes, TILE), tl.num_programs(1)):
        offsets, exists = elements_of_tile(tile, sizes, TILE)
        values = to_float(tl.load(x + offsets, exists, 0.0))
        if dtype == tl.int16:
            code = code_of(values, p, q, r, low, high, RULE)
            tl.store(y + offsets, tl.where(code == code, code, 0.0).to(tl.int16), exists)
        else:
            quantized = value_of(values, p, q, r, low, high, RULE)
            tl.store(y + offsets, from_float(quantized, dtype), exists)


@triton.jit
def _folded(lanes, CHUNKS: tl.constexpr):
    """Folds ``[CHUNKS, LANES]`` to ``[CHUNKS]``; a sum of two is the same in either order."""
    lanes = tl.sum(tl.reshape(lanes, [CHUNKS, 2, 32]), 1)
    lanes = tl.sum(tl.reshape(lanes, [CHUNKS, 2, 16]), 1)
    lanes = tl.sum(tl.reshape(lanes, [CHUNKS, 2, 8]), 1)
    lanes = tl.sum(tl.reshape(lanes, [CHUNKS, 2, 4]), 1)
    lanes = tl.sum(tl.reshape(lanes, [CHUNKS, 2, 2]), 1)
    return tl.sum(lanes, 1)


@triton.jit
def learned_backward(
    grad,
    x,
    parameters,
    dx,
    partial,
    low,
    high,
    channels,
    inner,
    size,
    chunks,
    RULE: tl.constexpr,
    COUNT: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """dx, and the sums of the chunks, ``[COUNT, channels, chunks]``; one program per ``CHUNKS``
    chunks of a channel of ``size`` elements. ``inner`` is None if channels are contiguous."""
    channel = tl.program_id(1).to(tl.int64)
    p, q, r = _parameters(parameters, channel, True, channels, COUNT)
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    first = chunk.to(tl.int64)[:, None] * CHUNK + tl.arange(0, LANES)[None, :]
    by_p = tl.zeros([CHUNKS, LANES], tl.float32)
    by_q = tl.zeros([CHUNKS, LANES], tl.float32)
    by_r = tl.zeros([CHUNKS, LANES], tl.float32)
    p, q, r = by_p + p, by_p + q, by_p + r
    # Rows that are there for some chunk: of the first.
    rows = tl.minimum(
        LANES, (size - tl.program_id(0).to(tl.int64) * CHUNKS * CHUNK + LANES - 1) // LANES
    )
    for row in range(rows.to(tl.int32)):
        i = first + row * LANES
        exists = i < size
        if inner is None:
            offsets = channel * size + i
        else:
            offsets = (i // inner * channels + channel) * inner + i % inner
        values = to_float(tl.load(x + offsets, exists, 0.0))
        grads = to_float(tl.load(grad + offsets, exists, 0.0))
        d, d_p, d_q, d_r = derivatives_of(values, p, q, r, low, high, RULE)
        tl.store(dx + offsets, from_float(_chained(grads, d), dx.dtype.element_ty), exists)
        by_p += tl.where(exists, _chained(grads, d_p), 0.0)
        if COUNT > 1:
            by_q += tl.where(exists, _chained(grads, d_q), 0.0)
        if COUNT > 2:
            by_r += tl.where(exists, _chained(grads, d_r), 0.0)
    out = partial + channel * chunks + chunk
    tl.store(out, _folded(by_p, CHUNKS), chunk < chunks)
    if COUNT > 1:
        tl.store(out + channels * chunks, _folded(by_q, CHUNKS), chunk < chunks)
    if COUNT > 2:
        tl.store(out + 2 * channels * chunks, _folded(by_r, CHUNKS), chunk < chunks)


@triton.jit
def sum_chunks(values, sums, count, chunks):
    """Sums the chunks of rows of ``count`` values, one program per chunk."""
    row = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0)
    lanes = tl.zeros([1, LANES], tl.float32)
    first = chunk * CHUNK + tl.arange(0, LANES)[None, :]
    for i in range(tl.minimum(LANES, (count - chunk * CHUNK + LANES - 1) // LANES)):
        at = first + i * LANES
        lanes += tl.load(values + row * count + at, at < count, 0.0)
    tl.store(sums + row * chunks + chunk + tl.arange(0, 1), _folded(lanes, 1))
