"""The quantizer once more, in NumPy's float32, written from the definition."""

import numpy as np

FLT_MIN = np.float32(1.17549435e-38)


def absmax(x, axis):
    others = tuple(d for d in range(x.ndim) if d != axis)
    return np.abs(x).max(axis=others, initial=0) if x.size == 0 else np.abs(x).max(axis=others)


def scale(absmax, bits):
    s = np.asarray(absmax, np.float32) / np.float32(2 ** (bits - 1) - 1)
    return np.where(s < FLT_MIN, FLT_MIN, s).astype(np.float32)


def codes(x, scale, bits, axis):
    """As floats; NaN where there is no code."""
    qmax = np.float32(2 ** (bits - 1) - 1)
    with np.errstate(all="ignore"):
        return np.asarray(np.clip(np.rint(x / along_axis(scale, x, axis)), -qmax, qmax))


def values(codes, scale, axis):
    with np.errstate(all="ignore"):
        return codes * along_axis(scale, codes, axis)


def along_axis(per_channel, x, axis):
    if axis is None:
        return per_channel
    return per_channel.reshape([-1 if d == axis else 1 for d in range(x.ndim)])


def on_grid(x, bits, kind, axis):
    """Codes (0 for NaN), scale, zero point and values of ``x`` on a grid of its own range."""
    steps = np.float32(2**bits - 1)
    low_code, high_code = {
        "signed": (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1),
        "full": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        "odd": (1 - 2**bits, 2**bits - 1),
    }.get(kind, (0, 2**bits - 1))
    others = tuple(d for d in range(x.ndim) if d != axis)
    low, high = x.min(axis=others, initial=0), x.max(axis=others, initial=0)
    largest = np.maximum(-low, high)
    high = np.where(np.isfinite(low), high, np.float32(np.nan))
    with np.errstate(all="ignore"):
        range_, divisor = {
            "signed": (largest, np.float32(high_code)),
            "full": (largest, steps / np.float32(2)),
            "odd": (largest, steps),
            "unsigned": (high, steps),
            "affine": (high - low, steps),
        }[kind]
        s = np.asarray(range_ / divisor, np.float32)
        s = np.where(s < FLT_MIN, FLT_MIN, s).astype(np.float32)
        z = np.rint(-low / s) if kind == "affine" else np.zeros_like(s)
        z = np.where(np.isnan(z), np.float32(0), z)
        shift = along_axis(z, x, axis)
        if kind == "odd":
            s = np.where(np.isinf(s), np.float32(np.nan), s)
            halves = (x / along_axis(s, x, axis) + steps) / np.float32(2)
            codes = np.clip(np.float32(2) * np.rint(halves) - steps, low_code, high_code)
        else:
            rounded = np.rint(x / along_axis(s, x, axis))
            codes = np.clip(rounded, low_code - shift, high_code - shift)
        values = codes * along_axis(s, x, axis)
    return np.nan_to_num(codes + shift, nan=0.0), s, z, values


def averaged(running, observed, absmax, averaging_constant):
    """The moving average running / observed after a batch, as a sum and a weight."""
    with np.errstate(all="ignore"):
        known = running / observed
        new = known + np.float32(averaging_constant) * (absmax - known)
    new = np.where(np.isnan(known), absmax, new)
    seen = np.isfinite(absmax)
    one = np.ones_like(observed)
    return tuple(
        np.where(seen, value, before).astype(np.float32)
        for value, before in ((new, running), (one, observed))
    )


def round_to_bfloat16(x):
    bits = x.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(x), x, rounded)


def round_to_float16(x):
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)
