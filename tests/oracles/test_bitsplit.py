import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from noisyq_fast.calibration.bitsplit import (
    best_scale,
    fit_weights,
    joined,
    split,
    stitch,
    update_planes_,
)

WITH = {"rr": "x", "ec": "x_quantized"}


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("bitsplit.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def widths(oracle):
    found = [int(match[1]) for match in (re.match(r"b(\d+)_fwa_codes", n) for n in oracle) if match]
    assert found
    return found


def test_codes_closest_to_the_weights(oracle):
    for bits in widths(oracle):
        codes, scale = fit_weights(oracle["w"], bits)
        assert torch.equal(codes, oracle[f"b{bits}_fwa_codes"])
        torch.testing.assert_close(scale, oracle[f"b{bits}_fwa_alpha"], rtol=0, atol=1e-9)
        # In planes, whose scale is that of the first; the second step changes nothing.
        planes = split(codes, bits)
        assert torch.equal(planes, oracle[f"b{bits}_ofwa_ternary"])
        assert torch.equal(joined(planes), oracle[f"b{bits}_ofwa_codes"])
        unit = 2 ** (bits - 2)
        torch.testing.assert_close(scale * unit, oracle[f"b{bits}_ofwa_alpha"], rtol=0, atol=1e-9)


def test_one_round_over_all_planes(oracle):
    gram, target = oracle["x"].T @ oracle["x"], oracle["y"].T @ oracle["x"]
    for bits in widths(oracle):
        planes = oracle[f"b{bits}_ofwa_ternary"].clone()
        top = best_scale(joined(planes), gram, target, torch.ones(len(target)).double())
        update_planes_(planes, top, gram, target)
        assert torch.equal(planes, oracle[f"b{bits}_rr1_ternary"])
        assert torch.equal(joined(planes), oracle[f"b{bits}_rr1_codes"])
        torch.testing.assert_close(top, oracle[f"b{bits}_rr1_alpha"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", WITH)
def test_hundred_rounds(oracle, kind):
    x = oracle[WITH[kind]]
    for bits in widths(oracle):
        first = fit_weights(oracle["w"], bits)
        codes, scale = stitch(*first, x, oracle["y"], bits, epochs=100)
        unit = 2 ** (bits - 2)
        assert torch.equal(codes / unit, oracle[f"b{bits}_{kind}_codes"])
        torch.testing.assert_close(scale * unit, oracle[f"b{bits}_{kind}_alpha"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", WITH)
def test_no_round_makes_the_error_larger(oracle, kind):
    x, y = oracle[WITH[kind]], oracle["y"]
    for bits in widths(oracle):
        first = fit_weights(oracle["w"], bits)
        found = [first, *(stitch(*first, x, y, bits, epochs) for epochs in (0, 1, 2, 4, 100))]
        errors = [(y - x @ (c * s.unsqueeze(1)).T).square().sum(0) for c, s in found]
        for before, after in itertools.pairwise(errors):
            assert (after <= before * (1 + 1e-12)).all()
        assert errors[-1].sum() < errors[0].sum()
