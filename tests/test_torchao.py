"""Beside torchao's quantization-aware training with ``Int8DynActInt4Weight``: inputs on an affine
8-bit grid for each token, weights on the full 4-bit grid for groups of 32.

The definitions differ in two ways. torchao multiplies by the reciprocal of the scale, where this
package divides by it: a value within a few ulp of a midpoint may be rounded to its other neighbour
(on a full grid the largest magnitude of a group, of 7.5 steps, always is at one). And its scale is
at least the machine epsilon, here the smallest normal float32. (Its int8 codes are lower by 128,
which no value shows.)
"""

import pytest
import torch
from torch import nn

from noisyq_fast import AbsMax, fake_quantize, quantize, quantize_model_

pytest.importorskip("torchao", reason="torchao is not installed")
from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer

OURS = {
    "input": {"bits": 8, "axis": "token", "grid": "affine"},
    "weight": {"bits": 4, "group_size": 32, "grid": "full"},
}


def theirs(kind):
    if kind == "input":
        config = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    else:
        config = IntxFakeQuantizeConfig(torch.int4, group_size=32, is_symmetric=True)
    return IntxFakeQuantizer(config)


def steps(x, kind):
    """x / s."""
    _, scale, *_ = quantize(x, **OURS[kind])
    size = x.shape[-1] if kind == "input" else 32
    return (x.unflatten(-1, (-1, size)) / scale.reshape(*x.shape[:-1], -1, 1)).flatten(-2), scale


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("make", [torch.randn, lambda *s: torch.randn(*s).relu(), torch.rand])
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 1e6])
def test_the_same_but_at_midpoints(kind, make, magnitude):
    x = magnitude * make(64, 256)
    leaves = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = fake_quantize(leaves[0], ste="clipped", **OURS[kind])
    expected = theirs(kind)(leaves[1])
    for output in (y, expected):
        output.sum().backward()
    rounded, scale = steps(x, kind)
    off_midpoint = (rounded - rounded.floor() - 0.5).abs()
    at_midpoint = off_midpoint <= 4 * torch.finfo(torch.float32).eps * rounded.abs()
    assert at_midpoint.float().mean() < 0.05
    tolerance = {"rtol": 1e-6, "atol": 0}
    torch.testing.assert_close(y[~at_midpoint], expected[~at_midpoint], **tolerance)
    torch.testing.assert_close(y, expected, rtol=0, atol=1.01 * scale.max().item())
    grads = [leaf.grad[~at_midpoint] for leaf in leaves]
    torch.testing.assert_close(*grads, **tolerance)


def test_a_layer():
    layer = nn.Linear(64, 32)
    quantized = quantize_model_(
        nn.Sequential(nn.Linear(64, 32)),
        first_last_bits=None,
        weight=AbsMax(4, grid="full", group_size=32),
        activation=AbsMax(8, "token", "affine"),
    )
    quantized[0].load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(5, 7, 64)
    expected = nn.functional.linear(theirs("input")(x), theirs("weight")(layer.weight), layer.bias)
    assert (quantized(x) - expected).norm() < 0.01 * expected.norm()
