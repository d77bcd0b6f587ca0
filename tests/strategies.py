"""Hypothesis strategies: quantizer arguments, with the values that break quantizers."""

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLT_MIN = np.finfo(np.float32).tiny

bits = st.integers(2, 8)
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**32 - 1)
shapes = st.lists(st.integers(0, 6) | st.just(17), max_size=4).map(tuple)


def normal(rng, shape, qmax):
    return rng.standard_normal(shape)


def rounding_midpoints(rng, shape, qmax):
    """Exactly between two codes, for an absmax that makes the scale a power of two."""
    x = rng.integers(-qmax, qmax, shape) + 0.5
    if x.size:
        x.flat[0] = qmax
    return x * 2.0 ** rng.integers(-20, 20)


def next_to_midpoints(rng, shape, qmax):
    """One float32 above or below a midpoint, for any scale."""
    scale = np.float32(rng.uniform(1e-3, 1e3))
    x = ((rng.integers(-qmax, qmax, shape) + 0.5) * scale).astype(np.float32)
    x = np.nextafter(x, rng.choice(np.float32([-np.inf, np.inf]), shape))
    if x.size:
        x.flat[0] = np.float32(qmax) * scale
    return x


def zeros(rng, shape, qmax):
    return rng.choice([0.0, -0.0], shape)


def subnormal(rng, shape, qmax):
    return rng.uniform(-1, 1, shape) * FLT_MIN


def near_smallest_scale(rng, shape, qmax):
    return rng.uniform(-1.5, 1.5, shape) * FLT_MIN * qmax


def huge(rng, shape, qmax):
    return rng.uniform(-1, 1, shape) * np.finfo(np.float32).max


def all_magnitudes(rng, shape, qmax):
    return rng.standard_normal(shape) * 2.0 ** rng.integers(-150, 127, shape)


def some_nan(rng, shape, qmax):
    return np.where(rng.random(shape) < 0.1, np.nan, rng.standard_normal(shape))


def some_infinite(rng, shape, qmax):
    return np.where(rng.random(shape) < 0.1, np.inf, 1) * rng.standard_normal(shape)


VALUES = [
    normal,
    rounding_midpoints,
    next_to_midpoints,
    zeros,
    subnormal,
    near_smallest_scale,
    huge,
    all_magnitudes,
    some_nan,
    some_infinite,
]


@st.composite
def tensors(draw, shapes=shapes, dtypes=dtypes, values=VALUES):
    """A tensor of drawn shape, dtype and values; axes permuted, sliced or expanded in memory."""
    shape = draw(shapes)
    make = draw(st.sampled_from(values))
    rng = np.random.default_rng(draw(seeds))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    memory = [shape[d] * steps[d] for d in order]
    x = make(rng, memory, 2 ** (draw(bits) - 1) - 1)
    with np.errstate(over="ignore"):
        x = torch.from_numpy(np.asarray(x, np.float32)).to(draw(dtypes))
    x = x.permute([order.index(d) for d in range(len(shape))])
    x = x[tuple(slice(None, None, step) for step in steps)]
    if shape and shape[0] > 0 and draw(st.booleans()):
        x = x[:1].expand(shape)
    assert x.shape == shape
    return x


@st.composite
def axes(draw, x):
    """No axis, or one of those of ``x``, counted from the front or from the back."""
    return draw(st.sampled_from([None, *range(-x.dim(), x.dim())]))
