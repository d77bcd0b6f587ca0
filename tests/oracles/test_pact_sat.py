"""PACT and SAT against the authors' code (of SAT), in float64."""

import re

import pytest
import torch
import torch.nn.functional as F
from learned_values import Quantized, close, load
from torch.testing import assert_close

from noisyq_fast import PACT, SAT

ORACLE = load("pact_sat")
WIDTHS = [int(match[1]) for key in ORACLE if (match := re.fullmatch(r"act(\d+)_x", key))]
WEIGHTS = [match.groups() for key in ORACLE if (match := re.fullmatch(r"w(\d+)_([a-z]+)_Q", key))]


@pytest.mark.parametrize("gradient", ["sat", "pact"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_inputs(bits, gradient, learned_backend):
    given = {k.removeprefix(f"act{bits}_"): v for k, v in ORACLE.items()}
    n = 2**bits - 1
    done = Quantized(given["x"], given["gy"], [given["alpha"]], (gradient, 0, n))
    assert torch.equal(done.codes.double(), (given["y"] * n / given["alpha"]).round())
    close(done.y.detach(), given["y"], 1e-6)
    close(done.x.grad, given["dx"])
    done.sum_is(0, given[f"dalpha_{gradient}"])
    ours = PACT(bits, start=given["alpha"].item(), gradient=gradient)
    y = ours(given["x"].float())
    assert torch.equal(y, done.y)
    y.backward(given["gy"].float())
    assert torch.equal(ours.clip.grad, done.parameters.grad[0])


@pytest.mark.parametrize(("bits", "rounding"), WEIGHTS)
def test_weights(bits, rounding, learned_backend):
    given = {k.removeprefix(f"w{bits}_{rounding}_"): v for k, v in ORACLE.items()}
    for rescale, y, dw in ((True, "weff", "dw"), (False, "Q", "dw_noscale")):
        weight = ORACLE["w"].float().requires_grad_()
        ours = SAT(int(bits), rounding=rounding, rescale=rescale)
        output = ours(weight)
        close(output.detach(), given[y], 1e-6)
        output.backward(ORACLE["w_g"].float())
        close(weight.grad, given[dw])
        if 2 ** int(bits) <= 128:
            made = ours.codes(weight)
            codes, scale = made.codes, made.scale
            assert torch.equal(codes * scale, output.detach())
            steps = (given["Q"] * ours.denominator).round()
            assert torch.equal(codes.double(), steps)


def test_a_linear_layer(learned_backend):
    """In training the authors scale the weight; in evaluation they divide the bias instead, which
    changes the logits by one factor. Here both are the same."""
    given = {k.removeprefix("lin_"): v.float() for k, v in ORACLE.items() if k.startswith("lin_")}
    x, w, b = (given[name].clone().requires_grad_() for name in "xwb")
    # The widths, which the file does not tell, are those that give its numbers.
    for bits in range(2, 9):
        inputs, weights = PACT(bits, start=given["alpha"].item()), SAT(bits)
        y = F.linear(inputs(x), weights(w), b)
        if torch.allclose(y.detach(), given["y_train"], rtol=1e-5, atol=1e-5):
            break
    else:
        raise AssertionError("no width gives the numbers of the file")
    y.backward(given["gy"])
    for gradient, name in ((x.grad, "dx"), (w.grad, "dw"), (b.grad, "db")):
        assert_close(gradient, given[name], rtol=1e-4, atol=1e-4 * given[name].abs().max().item())
    assert_close(inputs.clip.grad, given["dalpha"], rtol=1e-4, atol=1e-4)
    inputs.eval(), weights.eval()
    assert torch.equal(F.linear(inputs(x), weights(w), b), y)
    ratio = given["y_eval_authors"] / given["y_train"]
    assert_close(ratio, ratio.mean().expand_as(ratio), rtol=1e-4, atol=0)
