"""The moments of sums that are kept as int16, which an evaluation asks for only later."""

import pytest
import torch

from noisyq_fast.backends import native_cpu, reference
from noisyq_fast.backends.kernel_arguments import core

BOUND = 2**15 - 1


@pytest.mark.skipif(core is None, reason="the native library was not compiled")
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (4, 16, 32, 32), (3, 8)], ids=str)
def test_moments_of_narrow_sums_are_those_of_the_floats(shape):
    sums = torch.randint(-BOUND, BOUND + 1, shape)
    kept, *expected = reference.sums.moments(sums.float(), BOUND)
    narrow, *found = native_cpu.sums.moments(sums.to(torch.int16), BOUND)
    assert narrow.dtype == torch.int16
    assert torch.equal(narrow, kept)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
