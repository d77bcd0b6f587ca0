"""DSQ against its formulas, in float64, finite differences, and the mean slope of a cell."""

import re

import pytest
import torch
from learned_values import Quantized, close, load

from noisyq_fast.backends.reference import learned
from noisyq_fast.rules import Rule

ORACLE = load("dsq")
CASES = [match.groups() for key in ORACLE if (match := re.fullmatch(r"b(\d+)_a(\d)_y", key))]


@pytest.mark.parametrize(("bits", "tenths"), CASES)
def test_values_and_gradients(bits, tenths, learned_backend):
    given = {k.removeprefix(f"b{bits}_a{tenths}_"): v for k, v in ORACLE.items()}
    n = 2 ** int(bits) - 1
    low, high = ORACLE["l"], ORACLE["u"]
    parameters = [low, high, torch.tensor(int(tenths) / 10)]
    done = Quantized(ORACLE["x"], ORACLE["gy"], parameters, ("dsq", 0, n))
    assert torch.equal(done.codes.double(), ((given["y"] - low) * n / (high - low)).round())
    close(done.y.detach(), given["y"], 1e-6)
    close(done.x.grad, given["dx"])
    for number, name in enumerate(("dl", "du", "dalpha")):
        done.sum_is(number, given[name])


def soft(x, low, high, alpha, n):
    """What the forward would be without the sign of phi."""
    step = (high - low) / n
    cell = ((x - low) / step).floor().clamp(max=n - 1)
    place = (x - low) / step - cell - 0.5
    k = torch.log(2 / alpha - 1)
    return low + step * (cell + (torch.tanh(k * place) / (1 - alpha) + 1) / 2)


@pytest.mark.parametrize("alpha", [0.2, 0.4])
def test_slope_and_gradient_of_alpha_are_those_of_the_soft_form(alpha):
    n, step = 3, 1e-6
    x = torch.linspace(-0.9, 0.9, 50, dtype=torch.float64)
    at = [torch.tensor(value, dtype=torch.float64) for value in (-1.0, 1.0, alpha)]
    place = (x - at[0]) / (2 / n)
    x = x[(place - place.round()).abs() > 0.02]  # not across the border of a cell
    parameters = torch.stack(at).float()
    found = learned.derivatives(x.float(), parameters, Rule("dsq", 0, n), None)
    for number, index in ((0, 0), (3, 3)):
        low, high = [x, *at], [x, *at]
        low[index], high[index] = low[index] - step, high[index] + step
        expected = (soft(*high, n) - soft(*low, n)) / (2 * step)
        torch.testing.assert_close(found[number].double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("alpha", "middle", "edge"), [(0.2, 1.373, 0.494), (0.4, 1.155, 0.739), (0.05, None, None)]
)
def test_the_mean_slope_of_a_cell_is_1(alpha, middle, edge):
    n = 15
    count = 20001
    x = (torch.arange(count, dtype=torch.float64) + 0.5) / count * 2 / n - 1
    parameters = torch.tensor([-1.0, 1.0, alpha])
    slope = learned.derivatives(x.float(), parameters, Rule("dsq", 0, n), None)[0]
    assert slope.double().mean().item() == pytest.approx(1, abs=1e-4)
    if middle is not None:
        assert slope[count // 2].item() == pytest.approx(middle, abs=1e-3)
        assert slope[0].item() == pytest.approx(edge, abs=1e-3)
