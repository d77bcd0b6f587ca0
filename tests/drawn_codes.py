"""Codes to draw, for tests of what is computed of them."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from noisyq_fast.backends import BACKENDS

needs_cpu = pytest.mark.skipif(
    BACKENDS["cpu"].unavailable() is not None, reason=str(BACKENDS["cpu"].unavailable())
)


EXTREMES = {torch.int8: [-128, 127, -127, 0, 1], torch.uint8: [0, 255, 254, 128, 1]}


def codes_of(rng, shape, dtype, kind):
    low, high = (-128, 128) if dtype == torch.int8 else (0, 256)
    if kind == "any":
        values = rng.integers(low, high, shape)
    elif kind == "few bits":
        values = rng.integers(-7, 8, shape) if dtype == torch.int8 else rng.integers(0, 16, shape)
    else:
        values = rng.choice(EXTREMES[dtype], shape)
    return torch.from_numpy(np.asarray(values)).to(dtype)


def zero_point_of(rng, shape, dtype, kind):
    if dtype == torch.int8 or kind == "none":
        return None
    values = {"low": np.zeros(shape), "high": np.full(shape, 255)}.get(
        kind, rng.integers(0, 256, shape)
    )
    return torch.from_numpy(np.asarray(values)).to(torch.uint8)


code_dtypes = st.sampled_from([torch.int8, torch.uint8])
code_kinds = st.sampled_from(["any", "few bits", "extremes"])
zero_kinds = st.sampled_from(["none", "any", "low", "high"])


def in_memory(draw, x):
    """The same values in another layout."""
    layouts = ["contiguous", "sliced", "permuted", "expanded"] + ["channels_last"] * (x.dim() == 4)
    layout = draw(st.sampled_from(layouts))
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return torch.stack([x, x], -1)[..., 1]
    if layout == "permuted":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "expanded" and len(x):
        return x[:1].expand(x.shape)
    return x
