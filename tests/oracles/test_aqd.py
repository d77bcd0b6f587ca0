"""The quantizers of AQD against the authors' functions, in float64."""

import re

import pytest
import torch
from learned_values import Quantized, close, load

from noisyq_fast import AQD

ORACLE = load("aqd")
WIDTHS = [int(match[1]) for key in ORACLE if (match := re.fullmatch(r"fm(\d+)_y", key))]


@pytest.mark.parametrize("bits", WIDTHS)
def test_inputs(bits, learned_backend):
    clip, n = ORACLE["fm_clip"], 2**bits - 1
    done = Quantized(ORACLE["fm_x"], ORACLE["fm_gy"], [clip], ("aqd", 0, n))
    assert torch.equal(done.codes.double(), (ORACLE[f"fm{bits}_y"] * n / clip).round())
    close(done.y.detach(), ORACLE[f"fm{bits}_y"], 1e-6)
    close(done.x.grad, ORACLE[f"fm{bits}_dx"])
    done.sum_is(0, ORACLE[f"fm{bits}_dclip"])
    ours = AQD(bits).for_input()
    ours.begin([clip])
    assert torch.equal(ours(ORACLE["fm_x"].float()), done.y)


@pytest.mark.parametrize("bits", WIDTHS)
def test_weights(bits, learned_backend):
    clip, n = ORACLE["wt_clip"], 2**bits - 1
    rule = ("aqd_odd", -n, n)
    done = Quantized(ORACLE["wt_w"], ORACLE["wt_gy"], [clip.flatten()], rule, axis=0)
    assert torch.equal(done.codes.double(), (ORACLE[f"wt{bits}_y"] * n / clip).round())
    close(done.y.detach(), ORACLE[f"wt{bits}_y"], 1e-6)
    close(done.x.grad, ORACLE[f"wt{bits}_dw"])
    done.sum_is(0, ORACLE[f"wt{bits}_dclip"])
    ours = AQD(bits).for_weight(ORACLE["wt_w"])
    ours.begin([clip])
    assert torch.equal(ours(ORACLE["wt_w"].float()), done.y)
    made = ours.codes(ORACLE["wt_w"].float())
    codes, scale = made.codes, made.scale
    assert torch.equal(codes * scale.reshape(clip.shape), done.y)
