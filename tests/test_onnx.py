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
    EvenlySpaced,
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
    found += [AbsMax(most_bits(kind), None, kind) for kind in KINDS]
    found += [AbsMax(3, "token", kind) for kind in KINDS]
    found += [AbsMax(4, -1), AbsMax(5, -1, "affine")]
    found += [PACT(3, start=2.5), QIL(3), DSQ(3), AQD(3), AQD(3, signed=True), LSQ(3)]
    found += [LSQ(4, signed=True), LSQ(8, signed=True, symmetric=True), AQD(8, signed=True)]
    return found


def of_weights():
    found = [AbsMax(bits, 0, kind) for kind, bits in grids()]
    found += [AbsMax(3, None, kind) for kind in KINDS]
    found += [AbsMax(bits, grid=kind, group_size=4) for kind, bits in grids() if bits in (4, 7)]
    found += [fixed(kind, 4, 0, 8) for kind in KINDS]
    found += [EvenlySpaced(torch.rand(8) + 0.1, torch.randn(8), 4, axis=0)]
    for bits in (4, 7):
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
    assert made.codes == 16 * SIZE * len(model.layers)
    assert (made.differing, made.difference) == (0, 0)
    return model, session(path)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1e-3, 0.3, 1.0, 40.0, 1e30]))
def test_every_quantizer_of_inputs(inputs_of_every_kind, seed, rows, scale):
    model, run = inputs_of_every_kind
    x = near_ties(seed, rows, scale)
    with torch.no_grad():
        expected = model(x)
    for layer, own, other in zip(model.layers, expected, outputs(run, x), strict=True):
        assert torch.equal(own, other), layer.input_quantizer


def test_every_quantizer_of_weights(tmp_path):
    torch.manual_seed(0)
    layers = [QuantLinear(SIZE, 8, False, weight=q, activation=None) for q in of_weights()]
    model, path = Beside(layers).eval(), tmp_path / "weights.onnx"
    made = noisyq_fast.export_onnx(model, torch.eye(SIZE), path)
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
    layers = [name for name, m in model.named_modules() if isinstance(m, noisyq_fast.QuantLayer)]
    assert made.integers == [name for name in layers if name != "attention.out_proj"]
    assert made.codes
    assert (made.differing, made.difference) == (0, 0)
    return model, session(path)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 40), st.sampled_from([1e-3, 0.3, 1.0, 40.0]))
def test_every_product_of_integers(products, seed, rows, scale):
    model, run = products
    x = near_ties(seed, rows, scale)
    with torch.no_grad():
        expected = model(x)
    for own, other in zip(expected, outputs(run, x), strict=True):
        assert torch.equal(own, other)


def test_default_settings_of_onnxruntime(tmp_path):
    """With which it merges some nodes that are beside each other, not all of them rightly."""
    torch.manual_seed(0)
    weight = AbsMax(8, grid="affine")
    first = QuantLinear(12, 12, weight=weight, activation=AbsMax(8, "token", "affine"))
    heads = QuantGroupedLinear(3, 4, 5, input_ranges="shared")
    model = Beside([first, nn.Sequential(nn.Unflatten(2, (3, 4)), heads)])
    x = torch.randn(2, 3, 12)
    model(x)
    noisyq_fast.export_onnx(model.eval(), x, tmp_path / "model.onnx")
    for own, other in zip(model(x), outputs(session(tmp_path / "model.onnx"), x), strict=True):
        torch.testing.assert_close(other, own.detach(), atol=1e-5, rtol=0)


class Small(nn.Module):
    """A chain of convolutions with a shortcut, the mean, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        mean = (self.second(x) + x).relu().mean((2, 3))
        return self.head(mean), mean


def converted(model, x, **options):
    """Trained on a batch."""
    noisyq_fast.quantize_model_(model, example=x, **options)
    model(x)
    return model.eval()


def test_a_fused_network_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 9, 7)
    model = noisyq_fast.fuse_(converted(Small(), x, arithmetic="integer"), x)
    made = noisyq_fast.export_onnx(model, x, tmp_path / "model.onnx", "integer")
    assert made.integers == ["first.0", "second.0", "head"]
    assert (made.differing, made.difference, made.floats) == (0, 0, {})
    run = session(tmp_path / "model.onnx")
    for seed in range(20):
        x = torch.randn(1 + seed % 3, 3, 9, 7)
        with torch.no_grad():
            expected = model(x)
        for own, other in zip(expected, outputs(run, x), strict=True):
            assert torch.equal(own, other)


def test_the_model_stays_as_it_was(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(1, 3, 9, 7)
    model = converted(Small(), x.repeat(2, 1, 1, 1), weight=LSQ(4), first_last_bits=None).train()
    model.first[0].weight_quantizer.reset()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    made = noisyq_fast.export_onnx(model, x, tmp_path / "model.onnx")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert made.any_batch
    assert made.size == (tmp_path / "model.onnx").stat().st_size
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]
    assert {node.domain for node in onnx.load(made.path).graph.node} == {""}
    assert f"{made.differing} of {made.codes:,} codes differ" in str(made)


class Choosing(nn.Module):
    """Has a graph that depends on values, in its part ``chosen``."""

    def __init__(self):
        super().__init__()
        self.layer = QuantLinear(3, 3)
        self.chosen = Choice()

    def forward(self, x):
        return self.chosen(self.layer(x))


class Choice(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Unknown(nn.Module):
    def forward(self, x):
        return torch.linalg.qr(x)[0]


@pytest.mark.parametrize(
    ("make", "seen", "message"),
    [
        (lambda: nn.Sequential(QuantLinear(3, 3)), False, "layer '0': its input_quantizer has no"),
        (lambda: nn.Sequential(QuantLinear(3, 3, activation=LSQ(4))), False, "calibrate or train"),
        (
            lambda: nn.Sequential(QuantLinear(3, 3), Unknown()),
            True,
            r"layer '1' \(Unknown\): .*linalg_qr",
        ),
        (Choosing, True, r"layer 'chosen' \(Choice\): torch.export fails: .*data-dependent"),
        (lambda: nn.Linear(3, 3), False, "model: got Linear without quantized layers"),
        (
            lambda: nn.Sequential(noisyq_fast.QuantEmbedding(3, 3, max_norm=1.0)),
            False,
            "layer '0': got an embedding with max_norm",
        ),
    ],
)
def test_what_cannot_be_exported(make, seen, message, tmp_path):
    model = make()
    is_embedding = isinstance(model, nn.Sequential) and isinstance(model[0], nn.Embedding)
    x = torch.randint(3, (2, 3)) if is_embedding else torch.rand(2, 3)
    if seen:
        model(x)
    with pytest.raises(ValueError, match=message):
        noisyq_fast.export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_arguments(tmp_path):
    model = nn.Sequential(QuantLinear(3, 3))
    x = torch.rand(2, 3)
    with pytest.raises(TypeError, match="model: got str, takes a"):
        noisyq_fast.export_onnx("model", x, tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="form: got 'qint', takes 'qdq' or 'integer'"):
        noisyq_fast.export_onnx(model, x, tmp_path / "model.onnx", "qint")


def test_what_is_float_is_told(tmp_path):
    torch.manual_seed(0)
    layers = [nn.ConvTranspose2d(3, 4, 2), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Flatten(0)]
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 4, 4)
    grouped = {"weight_group_size": 2}
    converted(model, x, arithmetic="integer", overrides={"1": None, "2": grouped})
    made = noisyq_fast.export_onnx(model, x, tmp_path / "model.onnx", "integer")
    assert made.floats == {
        "0": "ONNX has no transposed convolution of integers",
        "1": "it was not converted",
        "2": "its weight has a scale for each group, which does not leave the sum",
    }
    assert sorted(made.weights) == ["0.weight", "2.weight"]


def test_a_batch_that_the_model_fixes_is_told(tmp_path):
    model = nn.Sequential(QuantLinear(3, 3), nn.Unflatten(0, (2, 2)))
    x = torch.rand(4, 3)
    model(x)
    made = noisyq_fast.export_onnx(model.eval(), x, tmp_path / "model.onnx")
    assert not made.any_batch
    assert "batches of the size of the example only" in str(made)


class Added(nn.Module):
    """A sample for each row of the first input, and one that is for all; returns a parameter."""

    def __init__(self):
        super().__init__()
        self.layer = QuantLinear(3, 3)

    def forward(self, x, shift):
        return self.layer(x) + shift, self.layer.bias


def test_an_input_for_all_samples(tmp_path):
    model, example = Added(), (torch.rand(4, 3), torch.rand(1, 3))
    model(*example)
    made = noisyq_fast.export_onnx(model, example, tmp_path / "model.onnx")
    assert made.differing == 0
    assert "size of the example only" in str(made)


@pytest.mark.parametrize("form", ["qdq", "integer"])
def test_autocast_changes_nothing(form, tmp_path):
    x = torch.rand(4, 3, 8, 8)
    model = converted(Small(), x)
    expected = noisyq_fast.export_onnx(model, x, tmp_path / "a.onnx", form)
    with torch.autocast("cpu", torch.bfloat16):
        made = noisyq_fast.export_onnx(model, x, tmp_path / "b.onnx", form)
    assert (made.size, made.differing) == (expected.size, expected.differing)


def test_places_without_a_file_and_models_without_values(tmp_path):
    model = nn.Sequential(QuantLinear(3, 3))
    x = torch.rand(2, 3)
    model(x)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        noisyq_fast.export_onnx(model, x, tmp_path / "none" / "model.onnx")
    with pytest.raises(IsADirectoryError, match="is a folder, takes the path of a file"):
        noisyq_fast.export_onnx(model, x, tmp_path)
    with pytest.raises(ValueError, match="model: got parameters on the device 'meta'"):
        noisyq_fast.export_onnx(model.to("meta"), x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_torch_export():
    x = torch.randn(2, 3, 9, 7)
    for model in (converted(Small(), x), converted(Small(), x, arithmetic="integer")):
        program = torch.export.export(model, (x,))
        with torch.no_grad():
            for own, other in zip(model(x), program.module()(x), strict=True):
                assert torch.equal(own, other)
