"""Exported networks compute in onnxruntime what they compute here."""

import warnings

import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import noisyq_fast
from noisyq_fast import (
    AQD,
    DSQ,
    LSQ,
    PACT,
    QIL,
    SAT,
    AbsMax,
    Fixed,
    MovingAbsMax,
    QuantConv1d,
    QuantConv2d,
    QuantGroupedLinear,
    QuantLinear,
    QuantMultiheadAttention,
)
from noisyq_fast.exporting.stand_ins import code_ends
from noisyq_fast.grid import KINDS, ODD, most_bits

SIZE = 12


def grids():
    return [(kind, bits) for kind in KINDS for bits in range(2, most_bits(kind) + 1)]


def fixed(kind, bits, axis=None, size=0):
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
    found += [fixed(kind, bits, 0, 8) for kind, bits in grids() if bits in (4, 7)]
    for bits in (2, 4, 7):
        found += [LSQ(bits), LSQ(bits, axis=0), QIL(bits, exponent=True), DSQ(bits), AQD(bits)]
        found += [SAT(bits, rounding=rounding) for rounding in ("modified", "centered", "original")]
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


@pytest.fixture(scope="module")
def weights_of_every_kind(tmp_path_factory):
    torch.manual_seed(0)
    layers = [QuantLinear(SIZE, 8, False, weight=q, activation=None) for q in of_weights()]
    model = Beside(layers).eval()
    path = tmp_path_factory.mktemp("onnx") / "weights.onnx"
    return model, path, noisyq_fast.export_onnx(model, torch.eye(SIZE), path)


def test_every_quantizer_of_weights(weights_of_every_kind):
    model, path, made = weights_of_every_kind
    types = {i.name: i.data_type for i in onnx.load(path).graph.initializer}
    four, eight = ({getattr(onnx.TensorProto, t + n) for t in ("INT", "UINT")} for n in "48")
    # The identity gives out each weight, transposed.
    for i, own in enumerate(outputs(session(path), torch.eye(SIZE))):
        layer, name = model.layers[i], f"layers.{i}.weight"
        assert torch.equal(own, layer.quantized_weight().detach().T), layer.weight_quantizer
        low, high = code_ends(layer.weight_quantizer)
        is_small = -8 <= low <= high <= (7 if low else 15)
        assert made.weights[name] == (4 if is_small else 8)
        assert types.get(f"{name}.codes", 0) in (four if is_small else eight)


class Products(nn.Module):
    """Layers that multiply codes: linear ones, and others by name."""

    def __init__(self):
        super().__init__()
        kinds = ("signed", "full", "unsigned", "affine")
        pairs = [(AbsMax(8, grid=kind), MovingAbsMax(8, grid=kind)) for kind in kinds]
        pairs += [
            (AbsMax(4, grid="affine"), MovingAbsMax(4)),
            (AbsMax(4), MovingAbsMax(4, grid="affine")),
            (AbsMax(7, grid=ODD), MovingAbsMax(7, grid=ODD)),
            *((LSQ(4), LSQ(4)), (SAT(4), PACT(4)), (QIL(3), QIL(3)), (AQD(3), AQD(4))),
            *((AbsMax(3), AbsMax(7, "token", kind)) for kind in (*kinds, ODD)),
        ]
        how = {"arithmetic": "integer"}
        options = [{"weight": weight, "activation": x, **how} for weight, x in pairs]
        self.linear = nn.ModuleList(QuantLinear(SIZE, 5, **o) for o in options)
        images = [o for o in options if o["activation"].axis is None]
        self.conv = nn.ModuleList(
            QuantConv2d(SIZE, 6, 3, 2, padding=1, groups=1 + i % 2, **o)
            for i, o in enumerate(images)
        )
        self.grouped = QuantGroupedLinear(3, SIZE // 3, 5, **how)
        self.attention = QuantMultiheadAttention(SIZE, 2, batch_first=True, **how)
        self.sequences = QuantConv1d(SIZE, 4, 2, bias=False, **how)

    def forward(self, x):
        images = x[:, :, None, None] * torch.tensor([[0.5, 1.0], [2.0, 3.0]])
        found = [layer(x) for layer in self.linear] + [layer(images) for layer in self.conv]
        found += [self.grouped(x.unflatten(1, (3, -1))), self.sequences(images.flatten(2))]
        projected = self.attention._projected(*[x.unsqueeze(1)] * 3)
        return [*found, *projected]


@pytest.fixture(scope="module")
def products(tmp_path_factory):
    torch.manual_seed(0)
    model = Products()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*values below 0")
        model(near_ties(0, 64, 1.0))
    path = tmp_path_factory.mktemp("onnx") / "products.onnx"
    made = noisyq_fast.export_onnx(model.eval(), near_ties(1, 16, 1.0), path, "integer")
    return model, made, session(path)


def test_products_of_integers(products):
    model, made, _ = products
    layers = [name for name, m in model.named_modules() if isinstance(m, noisyq_fast.QuantLayer)]
    assert made.integers == [name for name in layers if name != "attention.out_proj"]
    assert made.codes
    assert (made.differing, made.difference) == (0, 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1e-3, 0.3, 1.0, 40.0]))
def test_sums_of_integers(products, seed, rows, scale):
    model, _, run = products
    x = near_ties(seed, rows, scale)
    with torch.no_grad():
        expected = model(x)
    for own, other in zip(expected, outputs(run, x), strict=True):
        assert torch.equal(own, other)
