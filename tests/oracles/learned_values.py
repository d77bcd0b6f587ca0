"""Comparing the operators of quantizers that learn with reference values, which are float64."""

from pathlib import Path

import numpy as np
import torch
from torch.testing import assert_close

from noisyq_fast.backends.reference import learned
from noisyq_fast.operators.learned import fake_quantize_learned, quantize_learned
from noisyq_fast.rules import Rule


def load(name):
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def close(actual, expected, tolerance=1e-5):
    """Relative to the largest value: elements are float32, and some cancel."""
    size = expected.abs().max().item()
    assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance * max(size, 1e-30))


class Quantized:
    """What a rule makes of values, and its gradients, in float32."""

    def __init__(self, x, grad, parameters, rule, axis=None, scale=1.0):
        self.x = x.float().requires_grad_()
        self.parameters = torch.stack([p.float() for p in parameters]).requires_grad_()
        self.rule, self.axis, self.grad = rule, axis, grad
        self.y = fake_quantize_learned(self.x, self.parameters, *rule, axis, scale)
        self.y.backward(grad.float())
        self.codes = quantize_learned(self.x, self.parameters, *rule, axis)

    def sum_is(self, number, expected):
        """A gradient of a parameter: within 1e-5 of the sum of the sizes of its terms."""
        x, parameters = self.x.detach(), self.parameters.detach()
        terms = learned.derivatives(x, parameters, Rule(*self.rule), self.axis)
        sizes = learned.sum_of_groups((terms[1 + number] * self.grad).abs(), x, self.axis)
        error = (self.parameters.grad[number].double() - expected.reshape(sizes.shape)).abs()
        assert (error <= 1e-5 * sizes.double() + 1e-12).all(), (error, sizes)
