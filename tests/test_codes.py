"""Codes that are made by hand have the values, the average and the mask of fake quantization."""

import numpy as np
import pytest
import torch
from assert_same import assert_same
from drawn_codes import in_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from noisyq_fast.backends.reference.masks import MASKED
from noisyq_fast.grid import KINDS, Grid

operators = torch.ops.noisyq


@pytest.mark.parametrize("kind", KINDS)
def test_quantizing_by_hand(exact_backend, kind):
    """The quantizing operators with a moving or a fixed range give the values, the average and
    the mask of the fake-quantizing operators."""
    grid = Grid(4, kind)

    @settings(max_examples=20)
    @given(st.data(), st.sampled_from([None, 0, 1, -1]), st.sampled_from(MASKED))
    def check(data, axis, masked):
        shape = data.draw(st.sampled_from([(3, 5), (2, 3, 4), (2, 8, 3, 3), (0, 3)]))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        x = torch.from_numpy(rng.standard_normal(shape)).to(
            data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
        )
        x = in_memory(data.draw, x)
        if x.numel() and data.draw(st.booleans()):
            x = x.clone()
            x[(0,) * x.dim()] = data.draw(st.sampled_from([float("nan"), float("inf")]))
        channels = [] if axis is None else [x.shape[axis]]
        running = torch.full([2, *channels] if grid.is_affine else channels, 0.5)
        if grid.is_affine:
            running[0] = -0.25
        observed = torch.full(channels, 0.5) if data.draw(st.booleans()) else None

        def averages():
            return [None if a is None else a.clone() for a in (running, observed)]

        def values(codes, scale, zero_point):
            zero_point = zero_point if grid.is_affine else None
            return operators.dequantize_on_grid(codes, scale, zero_point, axis).to(x.dtype)

        for_hand, for_codes = averages(), averages()
        options = (4, axis, 0.25, kind, masked)
        y, mask = operators.fake_quantize_ema_on_grid(x, *for_hand, *options)
        *codes, mask_ = operators.quantize_ema_on_grid(x, *for_codes, *options)
        assert codes[0].dtype == grid.code_dtype
        assert codes[0].stride() == torch.empty_like(x).stride()
        assert_same(values(*codes), y)
        assert_same(mask_, mask)
        for a, b in zip(for_codes, for_hand, strict=True):
            assert (a is None) or torch.equal(a, b)

        y, mask = operators.fake_quantize_fixed_range_on_grid(x, running, 4, axis, kind, masked)
        *codes, mask_ = operators.quantize_fixed_range_on_grid(x, running, 4, axis, kind, masked)
        made = values(*codes)
        coded = ~x.isnan()  # for a NaN there is no code: `MovingAbsMax.codes` makes its scale NaN
        assert_same(made[coded], y[coded])
        assert_same(mask_, mask)

    check()
