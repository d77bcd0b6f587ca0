"""QIL against its formulas, in float64, and its gradients against finite differences."""

import re

import pytest
import torch
from learned_values import Quantized, close, load

from noisyq_fast.backends.reference import learned
from noisyq_fast.rules import Rule

ORACLE = load("qil")
WEIGHTS = [match.groups() for key in ORACLE if (match := re.fullmatch(r"w(\d+)_g(\d+)_y", key))]
INPUTS = [match[1] for key in ORACLE if (match := re.fullmatch(r"a(\d+)_y", key))]


@pytest.mark.parametrize(("bits", "tenths"), WEIGHTS)
def test_weights(bits, tenths, learned_backend):
    given = {k.removeprefix(f"w{bits}_g{tenths}_"): v for k, v in ORACLE.items()}
    exponent, q = torch.tensor(int(tenths) / 10), given["q"].item()
    parameters = [ORACLE["w_c"], ORACLE["w_d"], exponent]
    done = Quantized(ORACLE["w"], ORACLE["w_gy"], parameters, ("qil_odd", -q, q))
    assert torch.equal(done.codes.double(), (given["y"] * q).round())
    close(done.y.detach(), given["y"], 1e-6)
    close(done.x.grad, given["dw"])
    for number, name in enumerate(("dc", "dd", "dgamma")):
        done.sum_is(number, given[name])


@pytest.mark.parametrize("bits", INPUTS)
def test_inputs(bits, learned_backend):
    given = {k.removeprefix(f"a{bits}_"): v for k, v in ORACLE.items()}
    n = given["q"].item()
    done = Quantized(ORACLE["a"], ORACLE["a_gy"], [ORACLE["a_c"], ORACLE["a_d"]], ("qil", 0, n))
    assert torch.equal(done.codes.double(), (given["y"] * n).round())
    close(done.y.detach(), given["y"], 1e-6)
    close(done.x.grad, given["dx"])
    for number, name in enumerate(("dc", "dd")):
        done.sum_is(number, given[name])


def smooth(w, c, d, g):
    """What is rounded."""
    v = 0.5 + (w.abs() - c) / (2 * d)
    inside = v.clamp(1e-300, 1) ** g * w.sign()
    return torch.where(v <= 0, 0.0, torch.where(v >= 1, w.sign(), inside))


def test_derivatives_are_those_of_what_is_rounded():
    w = torch.linspace(-0.8, 0.8, 33, dtype=torch.float64)
    at = [torch.tensor(value, dtype=torch.float64) for value in (0.3, 0.26, 0.7)]
    v = 0.5 + (w.abs() - at[0]) / (2 * at[1])
    w = w[(v > 0.02) & (v < 0.98)]
    parameters = torch.stack(at).float()
    found = learned.derivatives(w.float(), parameters, Rule("qil_odd", -7, 7), None)
    step = 1e-6
    for number, derivative in enumerate(found):
        low, high = [w, *at], [w, *at]
        low[number], high[number] = low[number] - step, high[number] + step
        expected = (smooth(*high) - smooth(*low)) / (2 * step)
        torch.testing.assert_close(derivative.double(), expected, rtol=1e-4, atol=1e-5)
