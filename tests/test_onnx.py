"""Exported networks compute in onnxruntime what they compute here."""

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import noisyq_fast
from noisyq_fast import AQD, DSQ, LSQ, PACT, QIL, SAT, AbsMax, Fixed, MovingAbsMax, QuantLinear
from noisyq_fast.grid import KINDS, ODD, most_bits

SIZE = 12


def grids():
    return [(kind, bits) for kind in KINDS for bits in range(2, most_bits(kind) + 1)]


def fixed(kind, bits, axis=None, size=SIZE):
    generator = torch.Generator().manual_seed(bits)
    shape = [] if axis is None else [size]
    scale = torch.rand(shape, generator=generator) + 0.05
    zero = torch.randint(2**bits, shape, generator=generator) if kind == "affine" else None
    return Fixed(scale, bits, axis, kind, zero_point=zero)


def of_inputs():
    """Quantizers for inputs, of every kind."""
    found = [MovingAbsMax(bits, grid=kind) for kind, bits in grids()]
    found += [fixed(kind, 5) for kind in KINDS]
    for axis in (None, "token", -1):
        found += [AbsMax(3 if axis else most_bits(kind), axis, kind) for kind in KINDS]
    for bits in (3, 8):
        found += [PACT(bits, start=2.5), QIL(bits), DSQ(bits), AQD(bits)]
        found += [LSQ(bits), LSQ(bits, signed=True), LSQ(bits, signed=True, symmetric=True)]
        found += [AQD(bits, signed=True)]
    return found


def of_weights():
    found = [AbsMax(bits, 0, kind) for kind, bits in grids()]
    found += [AbsMax(bits, None, kind) for kind, bits in grids() if bits in (3, 4, 7)]
    found += [AbsMax(bits, grid=kind, group_size=4) for kind, bits in grids() if bits in (4, 7)]
    found += [fixed(kind, bits, axis) for kind, bits in grids() if bits in (4, 7) for axis in (0,)]
    for bits in (2, 4, 7):
        found += [LSQ(bits), LSQ(bits, axis=0), QIL(bits, exponent=True), DSQ(bits), AQD(bits)]
        found += [SAT(bits, rounding=r, rescale=s) for r in ("modified",) for s in (False, True)]
        found += [SAT(bits, rounding=r) for r in ("centered", "original")]
    return found


class Beside(nn.Module):
    """Layers with the same input."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def identity(quantizer):
    """A layer that gives out its quantized input."""
    layer = QuantLinear(SIZE, SIZE, bias=False, weight=None, activation=quantizer)
    nn.init.eye_(layer.weight)
    return layer


def session(path):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def outputs(run, *tensors):
    feeds = dict(zip([i.name for i in run.get_inputs()], (x.numpy() for x in tensors), strict=True))
    return [torch.from_numpy(y) for y in run.run(None, feeds)]


def near_ties(seed, rows, scale):
    """Values of several sizes; many are half way between two codes, or next to that."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, SIZE, generator=generator) * scale
    ties = torch.randint(-300, 300, x.shape, generator=generator).float() * 0.5 * scale / 7
    moved = torch.nextafter(ties, torch.randn(x.shape, generator=generator) * torch.inf)
    which = torch.randint(3, x.shape, generator=generator)
    return torch.where(which == 0, x, torch.where(which == 1, ties, moved))


@pytest.fixture(scope="module")
def inputs_of_every_kind(tmp_path_factory):
    torch.manual_seed(0)
    model = Beside([identity(quantizer) for quantizer in of_inputs()])
    with pytest.warns(UserWarning, match="values below 0"):
        model(near_ties(0, 64, 1.0))
    model.eval()
    path = tmp_path_factory.mktemp("onnx") / "inputs.onnx"
    made = noisyq_fast.export_onnx(model, near_ties(1, 16, 1.0), path)
    return model, made, session(path)


def test_every_quantizer_of_inputs(inputs_of_every_kind):
    model, made, _ = inputs_of_every_kind
    assert made.codes == 16 * SIZE * len(model.layers)
    assert (made.differing, made.difference) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1e-3, 0.3, 1.0, 40.0, 1e30]))
def test_codes_of_inputs(inputs_of_every_kind, seed, rows, scale):
    model, _, run = inputs_of_every_kind
    x = near_ties(seed, rows, scale)
    with torch.no_grad():
        expected = model(x)
    for layer, own, other in zip(model.layers, expected, outputs(run, x), strict=True):
        assert torch.equal(own, other), layer.input_quantizer
