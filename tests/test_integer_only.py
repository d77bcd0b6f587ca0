"""Inference in integers alone: against NumPy, and beside the network with float scales."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from experiments.models import ResNet20
from noisyq_fast import (
    AQD,
    DSQ,
    LSQ,
    PACT,
    QIL,
    SAT,
    AbsMax,
    GroupedLinear,
    IntegerOnly,
    fuse_,
    quantize_model_,
)
from noisyq_fast.integer.fixed_point import LARGEST, FixedPoint

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    """A residual block between a first convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.norm2 = nn.BatchNorm2d(8, affine=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return self.head(F.relu(y + x).mean((2, 3)))


def trained(model=None, x=X, **options):
    torch.manual_seed(1)
    model = quantize_model_(model or Block(), example=x, **options)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d) and norm.affine:
                norm.weight.copy_(torch.linspace(-1, 2, len(norm.weight)))
                norm.bias.copy_(torch.linspace(1, -1, len(norm.bias)))
        for i in range(4):
            model(x * (1 + i / 4))
    return model.eval()


# Multipliers and shifts.


@given(st.data())
def test_factors_are_within_their_bound(data):
    factor = data.draw(st.floats(2.0**-30, 2.0**28)) * data.draw(st.sampled_from([-1, 1]))
    fixed = FixedPoint.of(torch.tensor([factor], dtype=torch.float64))
    (multiplier,), (shift,) = fixed.multiplier.tolist(), fixed.shift.tolist()
    assert 2**30 <= abs(multiplier) <= LARGEST
    assert 1 <= shift <= 62
    assert abs(multiplier / 2**shift - factor) <= 2.0**-31 * abs(factor) * (1 + 1e-9)


@given(st.data())
def test_products_are_those_of_integers_of_any_size(data):
    v = data.draw(st.lists(st.integers(-LARGEST, LARGEST), min_size=1, max_size=8))
    factor = data.draw(st.floats(-(2.0**20), 2.0**20))
    term = data.draw(st.floats(-(2.0**29), 2.0**29))
    fixed = FixedPoint.of(*(torch.tensor([x], dtype=torch.float64) for x in (factor, term)))
    m, n, b = (int(x) for x in (fixed.multiplier, fixed.shift, fixed.term))
    expected = [min(max((x * m + b + 2 ** (n - 1)) // 2**n, -LARGEST), LARGEST) for x in v]
    assert fixed(torch.tensor(v)).tolist() == expected
    for x, y in zip(v, expected, strict=True):
        exact = min(max(x * factor + term, -LARGEST), LARGEST)
        assert abs(y - exact) <= 0.5 + (abs(x) + 2) * 2.0 ** -(n + 1)  # rounding of M and of B


def test_factors_out_of_range():
    for factor, term in ((2.0**31, 0.0), (1.0, 2.0**62), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match=r"got .* factor or .*term"):
            FixedPoint.of(*(torch.tensor([x], dtype=torch.float64) for x in (factor, term)))
    zero = FixedPoint.of(torch.zeros(1, dtype=torch.float64))
    assert zero(torch.tensor([LARGEST])).tolist() == [0]


# The network.


def numpy_network(model, integers, x):
    """`Block` by loops over windows, int64."""

    def fixed(v, factor, term):
        """One channel after the other, in Python's integers."""
        made = FixedPoint.of(factor, term)
        out = np.empty_like(v)
        for c, (m, n, b) in enumerate(zip(made.multiplier, made.shift, made.term, strict=True)):
            m, n, b = int(m), int(n), int(b)
            flat = [(int(a) * m + b + (1 << n - 1)) >> n for a in v[:, c].ravel()]
            out[:, c] = np.array(flat, dtype=np.int64).reshape(v[:, c].shape)
        return np.clip(out, -LARGEST, LARGEST)

    def convolve(steps, layer):
        weight = layer.weight_codes(layer.weight.detach()).codes.numpy().astype(np.int64)
        n, _, h, w = steps.shape
        padded = np.pad(steps, ((0, 0), (0, 0), (1, 1), (1, 1)))
        y = np.zeros((n, len(weight), h, w), dtype=np.int64)
        each = len(weight) // layer.groups
        for o, kernel in enumerate(weight):
            first = o // each * kernel.shape[0]
            for i, j, k in np.ndindex(*kernel.shape):
                y[:, o] += kernel[i, j, k] * padded[:, first + i, j : j + h, k : k + w]
        return y

    def line(layer, norm, common):
        weight = layer.weight_codes(layer.weight.detach())
        s = weight.scale.double() * scale(layer)
        bias = 0 if layer.bias is None else layer.bias.detach().double()
        inverse = (norm.running_var.double() + norm.eps).rsqrt()
        f = inverse if norm.weight is None else inverse * norm.weight.detach().double()
        t = -norm.running_mean.double() * f
        t = t if norm.bias is None else t + norm.bias.detach().double()
        return s * f / common, (bias * f + t) / common

    def scale(layer):
        return layer.input_quantizer.codes(torch.zeros(1)).scale.double()

    def quantized(q, layer, s):
        grid = layer.input_quantizer.grid
        made = FixedPoint.of((s / scale(layer)).reshape(1))
        m, n = int(made.multiplier), int(made.shift)
        codes = [(int(a) * m + (1 << n - 1)) >> n for a in q.ravel()]
        return np.clip(np.array(codes).reshape(q.shape), grid.code_min, grid.code_max)

    common = min(scale(layer) for layer in (model.conv1, model.conv2)) / 2**8
    of_conv1, of_conv2 = scale(model.conv1) / 2**8, scale(model.conv2) / 2**8
    codes = {"stem": model.stem.input_quantizer.codes(x).codes.numpy().astype(np.int64)}
    q = fixed(convolve(codes["stem"], model.stem), *line(model.stem, model.norm, of_conv1))
    q = np.maximum(q, 0)
    codes["conv1"] = quantized(q, model.conv1, of_conv1)
    y = fixed(convolve(codes["conv1"], model.conv1), *line(model.conv1, model.norm1, of_conv2))
    codes["conv2"] = quantized(np.maximum(y, 0), model.conv2, of_conv2)
    y = fixed(convolve(codes["conv2"], model.conv2), *line(model.conv2, model.norm2, of_conv1))
    q = np.maximum(y + q, 0).sum((2, 3))
    codes["head"] = quantized(q, model.head, of_conv1 / 64)
    assert common <= of_conv1
    return codes


@pytest.mark.parametrize("grid", ["signed", "full", "unsigned"])
def test_codes_are_those_of_numpy(grid):
    model = trained(activation_grid=grid)
    integers = IntegerOnly(model, X[:2], guard_bits=8)
    expected = numpy_network(model, integers, X)
    actual = integers.codes(X)
    assert list(actual) == integers.layers == ["stem", "conv1", "conv2", "head"]
    for name, codes in actual.items():
        assert np.array_equal(codes.numpy(), expected[name]), name
    assert {codes.dtype for codes in actual.values()} == {torch.int64}


OPTIONS = [
    {},
    {"weight_bits": 2, "activation_bits": 3, "activation_grid": "unsigned"},
    {"weight_grid": "affine", "activation_grid": "affine"},
    {"weight": LSQ(4), "activation": LSQ(4)},
    {"weight": SAT(4), "activation": PACT(4)},
    {"weight": AQD(4), "activation": AQD(4), "first_last_bits": 7},
    {"weight": QIL(4), "activation": QIL(4)},
    {"activation": AQD(5, signed=True), "first_last_bits": 7},
]


@pytest.mark.parametrize("arithmetic", ["float", "integer", "fused"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_close_to_the_network_with_float_scales(options, arithmetic):
    model = trained(arithmetic="float" if arithmetic == "float" else "integer", **options)
    if arithmetic == "fused":
        fuse_(model, X)
    found = IntegerOnly(model, X[:1]).compare([X, 2 * X])
    assert found.differing["stem"] == 0
    assert max(found.differing.values()) < 0.001
    assert found.largest_difference < 0.01 * found.largest_output
    assert (found.outputs, found.agreeing) == (8, 8)
    assert "conv1" in str(found)


def test_resnet20():
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = trained(ResNet20(), x)
    before = copy.deepcopy(model.state_dict())
    integers = IntegerOnly(model, x[:2])
    found = integers.compare([x])
    assert len(integers.layers) == 20
    assert found.differing["stage1.0.conv1"] == found.differing["stage1.0.conv2"] == 0
    assert found.agreeing == 2
    coarse = IntegerOnly(model, x, guard_bits=4).compare([x])
    assert 0 < coarse.differing["stage1.0.conv1"] < 0.1
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True)
    )


def test_the_same_with_every_number_of_threads():
    model = trained()
    integers = IntegerOnly(model, X)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            outputs.append(integers(X))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(integers(X[1:2]), outputs[0][1:2])  # and alone


class Wrong(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.grouped = GroupedLinear(4, 36, 2)
        self.step = step

    def forward(self, x):
        return self.step(self, x)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda m, x: m.norm(m.conv(x)).sigmoid(), "function 'sigmoid': has no form in integers"),
        (lambda m, x: m.conv(x.relu()), "function 'relu': reads the input of the model"),
        (lambda m, x: m.norm(m.conv(x)) + 1, "function '(add|__add__)': has no form in integers"),
        (lambda m, x: m.grouped(m.conv(x).flatten(2)), "layer 'grouped': QuantGroupedLinear has"),
        (lambda m, x: m.conv(x).mean(1), "function 'mean': takes a mean over all pixels"),
        (lambda m, x: (m.conv(x), m.conv(x)), "model: got other outputs than one tensor"),
        (lambda m, x: F.pad(m.conv(x), (1, 1), value=2.0), "function 'pad': pads with 2.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:layer .conv. is called several")
def test_what_has_no_form_in_integers(step, message):
    model = quantize_model_(Wrong(step), first_last_bits=None)
    model(X)
    with pytest.raises(ValueError, match=message):
        IntegerOnly(model, X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": None}, "layer 'stem': its input is not quantized"),
        ({"weight": DSQ(4)}, "layer 'stem': DSQ of its weight gives no codes"),
        (
            {"activation": AbsMax(4, axis=None)},
            "layer 'stem': AbsMax of its input is not",
        ),
        ({"weight_group_size": 1}, "layer 'stem': its weight has a scale for each group"),
    ],
)
def test_what_quantizers_it_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        IntegerOnly(trained(**options), X)
    with pytest.raises(ValueError, match="Block without quantized layers"):
        IntegerOnly(Block(), X)
    with pytest.raises(ValueError, match=r"guard_bits: got 21, takes 0\.\.20"):
        IntegerOnly(trained(), X, guard_bits=21)
    with pytest.raises(ValueError, match="inputs: got none"):
        IntegerOnly(trained(), X).compare([])
