"""LSQ against the formula of the paper, in float64."""

import math
import re

import pytest
import torch
from learned_values import Quantized, close, load
from torch.testing import assert_close

from noisyq_fast import LSQ

ORACLE = load("lsq")
CASES = [match[1] for key in ORACLE if (match := re.fullmatch(r"(.+)_ds_raw", key))]


def case(name):
    prefix = f"{name}_"
    return {k.removeprefix(prefix): v for k, v in ORACLE.items() if k.startswith(prefix)}


def quantizer(name):
    """As the case says by its codes and the shape of its step, with its step."""
    given = case(name)
    low, high = given["qn_qp"].tolist()
    bits = math.ceil(math.log2(high - low + 1))
    axis = 0 if given["s"].dim() else None
    made = LSQ(bits, axis, symmetric=low == -high)
    made = made.for_input() if low == 0 else made.for_weight(given["x"])
    assert made.code_ends == (low, high)
    made.begin([given["s"]])
    return made


@pytest.mark.parametrize("name", CASES)
def test_values_codes_and_gradients(name, learned_backend):
    given = case(name)
    low, high = given["qn_qp"].tolist()
    axis = 0 if given["s"].dim() else None
    done = Quantized(
        given["x"],
        given["gy"],
        [given["s"].flatten() if axis == 0 else given["s"]],
        ("lsq", low, high),
        axis,
    )
    assert torch.equal(done.codes.double(), (given["y"] / given["s"]).round())
    close(done.y.detach(), given["y"], 1e-6)
    close(done.x.grad, given["dx"])
    done.sum_is(0, given["ds_raw"])


@pytest.mark.filterwarnings("ignore:.*got values below 0")
@pytest.mark.parametrize("name", CASES)
def test_the_quantizer(name, learned_backend):
    """Its first step, and its gradient with each factor."""
    given = case(name)
    ours = quantizer(name)
    factors = {"none": 1.0, "all": given["g_all"]}
    factors["paper"] = given["g_per_group"] if given["qn_qp"][0] else given["g_features"]
    for gradient, factor in factors.items():
        ours.gradient = gradient
        ours.step.grad = None
        y = ours(given["x"].float())
        y.backward(given["gy"].float())
        close(y.detach(), given["y"], 1e-6)
        expected = given["ds_raw"].reshape(ours.step.shape) * factor
        assert_close(ours.step.grad.double(), expected, rtol=1e-4, atol=1e-4 * factor)
    ours.reset()
    ours(given["x"].float())
    close(ours.step.detach(), given["s_init"].reshape(ours.step.shape), 1e-6)


def test_midpoints_and_ends(learned_backend):
    """Clamped before rounding, and strictly: an end has no gradient by x."""
    v = ORACLE["tie_v_over_s"]
    low, high = ORACLE["tie_qn_qp"].tolist()
    for i, steps in enumerate(v):
        done = Quantized(steps.reshape(1), torch.ones(1), [torch.tensor(1.0)], ("lsq", low, high))
        assert done.codes.item() == ORACLE["tie_code_halfeven"][i]
        assert done.x.grad.item() == ORACLE["tie_dx_paper_strict"][i]
        assert done.parameters.grad.item() == pytest.approx(ORACLE["tie_ds_paper_strict"][i].item())
