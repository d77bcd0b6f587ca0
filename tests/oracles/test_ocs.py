import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from noisyq_fast import Fixed
from noisyq_fast.calibration.ocs import split_for, split_weight


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("ocs.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def cases(oracle):
    """The prefix of each, how many channels are split, and the bits."""
    channels = oracle["w"].shape[1]
    found = [re.match(r"r(\d+)_b(\d+)_codes", name) for name in oracle]
    found = [(m[0][:-5], math.ceil(int(m[1]) / 100 * channels), int(m[2])) for m in found if m]
    assert found
    return found


def test_plain_halves(oracle):
    channels = oracle["w"].shape[1]
    for case, count, _ in cases(oracle):
        halves, sources = split_weight(oracle["w"], count, 0)
        assert torch.equal(sources[channels:], oracle[f"{case}idx_halves"])
        for source in range(channels):  # of equal halves, either may be split again
            ours, theirs = (x[:, sources == source] for x in (halves, oracle[f"{case}halves"]))
            ours, theirs = (x.sort(1).values for x in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-15)


def test_splitting_that_keeps_the_codes(oracle):
    channels = oracle["w"].shape[1]
    for case, count, bits in cases(oracle):
        weight, sources, scale = split_for(oracle["w"], count, bits)
        torch.testing.assert_close(1 / scale, oracle[f"{case}inv_step"], rtol=1e-14, atol=0)
        torch.testing.assert_close(weight, oracle[f"{case}w_split"], rtol=0, atol=1e-14)
        assert torch.equal(sources[channels:], oracle[f"{case}idx"])
        codes = Fixed(scale.float(), bits, grid="full").codes(weight).codes
        assert torch.equal(codes, oracle[f"{case}codes"])
        seen = oracle["x"][:, sources]
        y = F.conv2d(seen, codes.double() * scale)
        torch.testing.assert_close(y, oracle[f"{case}y_q"], rtol=1e-12, atol=1e-12)
        y = F.conv2d(seen, weight)
        torch.testing.assert_close(y, oracle["y_float"], rtol=1e-12, atol=1e-12)
