"""Every kind of layer: the float layer's numbers on quantized weights and inputs."""

import copy
import inspect
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import noisyq_fast
from noisyq_fast import (
    AbsMax,
    GroupedLinear,
    MovingAbsMax,
    QuantConvTranspose2d,
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
    dequantize_model_,
    fake_quantize,
    fuse_,
    quantize_model_,
    register_layer,
)
from noisyq_fast.integer.fusing import unfuse_

# Each layer and the shape of its input.
LAYERS = {
    "Linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "Linear without bias": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 7)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, 2, padding=1, padding_mode="circular"), (2, 4, 7, 7)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False, dilation=2), (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 7)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, padding=1), (2, 4, 5, 5)),
    "ConvTranspose2d, groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, output_padding=1, stride=2),
        (2, 4, 5, 5),
    ),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 4, 2, groups=4), (2, 4, 3, 3, 3)),
    "GroupedLinear": (lambda: GroupedLinear(3, 6, 5), (2, 3, 6)),
}


def of_channels(layer, weight):
    """The weight quantized for each output channel, one after the other."""
    quantized = weight.detach().clone()
    if isinstance(layer, GroupedLinear):
        return torch.stack([fake_quantize(w, 3, axis=0) for w in quantized])
    if "Transpose" not in type(layer).__name__:
        return torch.stack([fake_quantize(w, 3) for w in quantized])
    inputs = layer.in_channels // layer.groups
    for group in range(layer.groups):
        for channel in range(quantized.shape[1]):
            part = quantized[group * inputs : (group + 1) * inputs, channel]
            part.copy_(fake_quantize(part, 3))
    return quantized


def of_input(layer, x):
    return fake_quantize(x, 5, -2 if isinstance(layer, GroupedLinear) else None)


@pytest.mark.parametrize("name", LAYERS)
def test_computes_as_the_float_layer_on_quantized_values(name):
    make, shape = LAYERS[name]
    layer = make()
    reference = copy.deepcopy(layer)
    with torch.no_grad():
        reference.weight.copy_(of_channels(layer, layer.weight))
    quantize_model_(layer, 3, 5, first_last_bits=None)
    x = torch.randn(shape)
    inputs = [x.requires_grad_(), of_input(layer, x.detach()).requires_grad_()]
    outputs = layer(inputs[0]), reference(inputs[1])
    torch.testing.assert_close(*outputs)
    grad = torch.randn_like(outputs[0])
    for y in outputs:
        y.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(layer.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    layer.eval()
    torch.testing.assert_close(layer(inputs[0]), outputs[0])
    assert not torch.equal(layer(100 * x), 100 * outputs[0])


@pytest.mark.parametrize("name", LAYERS)
def test_conversion_and_back(name):
    make, shape = LAYERS[name]
    layer = make()
    before = copy.deepcopy(layer)
    x = torch.randn(shape)
    parameters, attributes = list(layer.parameters()), vars(layer).keys()
    quantize_model_(layer)
    layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copied.eval()(x), layer.eval()(x))
    assert "W8/A8" in repr(layer)
    assert "\n" not in repr(layer)
    assert dequantize_model_(layer) is layer
    assert type(layer) is type(before)
    assert vars(layer).keys() == attributes
    assert layer.state_dict().keys() == before.state_dict().keys()
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))
    assert torch.equal(layer(x), before(x))
    quantize_model_(layer)


@pytest.mark.parametrize("name", LAYERS)
def test_made_by_hand_like_the_float_layer(name):
    make, shape = LAYERS[name]
    float_layer = make()
    cls = getattr(noisyq_fast, f"Quant{type(float_layer).__name__}")
    torch.manual_seed(0)
    if isinstance(float_layer, nn.Linear | GroupedLinear):
        sizes = (3, 6, 5) if isinstance(float_layer, GroupedLinear) else (6, 5)
    else:
        sizes = (float_layer.in_channels, float_layer.out_channels, float_layer.kernel_size)
    layer = cls(*sizes, weight_bits=2, activation_bits=7, device="cpu", dtype=torch.float32)
    torch.manual_seed(0)
    other = type(float_layer)(*sizes)
    assert torch.equal(layer.weight, other.weight)
    assert (layer.weight_bits, layer.activation_bits) == (2, 7)
    layer(torch.randn(shape))
    dequantize_model_(layer)
    assert type(layer) is type(float_layer)


def test_output_size_of_transposed_convolutions():
    layer = quantize_model_(nn.ConvTranspose2d(4, 6, 3, stride=2))
    x = torch.randn(2, 4, 5, 5)
    for size in ([11, 11], [12, 12], [2, 6, 12, 11]):
        assert list(layer(x, output_size=size).shape[2:]) == size[-2:]
    layer = QuantConvTranspose2d(4, 6, 3, stride=2)
    assert layer(x, [12, 12]).shape == (2, 6, 12, 12)


# Embeddings.


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"scale_grad_by_freq": True}], ids=str)
def test_embedding(options):
    layer = nn.Embedding(7, 4, **options)
    reference = copy.deepcopy(layer)
    quantize_model_(layer, 3, first_last_bits=None)
    assert (layer.weight_bits, layer.activation_bits) == (3, None)
    x = torch.tensor([[1, 2], [2, 6], [1, 1]])
    y = layer(x)
    assert torch.equal(y, fake_quantize(reference.weight, 3, axis=0)[x])
    grad = torch.randn_like(y)
    y.backward(grad)
    reference(x).backward(grad)
    assert torch.equal(layer.weight.grad, reference.weight.grad)
    assert torch.equal(layer.eval()(x), y)


def test_embedding_with_a_largest_norm():
    layer = nn.Embedding(7, 4, max_norm=0.5)
    reference = copy.deepcopy(layer)
    quantize_model_(layer, 8)
    x = torch.tensor([1, 3])
    y = layer(x)
    reference(x)
    assert torch.equal(layer.weight, reference.weight)
    assert layer.weight[0].norm() > 0.5
    assert torch.equal(y, fake_quantize(reference.weight, 8, axis=0)[x])
    y.sum().backward()


def test_sparse_embedding():
    layer = nn.Embedding(7, 4, sparse=True)
    quantize_model_(layer)
    x = torch.tensor([1, 3, 3])
    optimizer = torch.optim.SparseAdam(layer.parameters(), lr=0.1)
    before = layer.weight.detach().clone()
    layer(x).sum().backward()
    assert layer.weight.grad.is_sparse
    assert layer.weight.grad.to_dense()[:, 0].tolist() == [0, 1, 0, 2, 0, 0, 0]
    optimizer.step()
    changed = (layer.weight != before).any(1)
    assert changed.tolist() == [False, True, False, True, False, False, False]


def test_embedding_by_hand():
    weight = torch.randn(3, 4)
    assert torch.equal(QuantEmbedding.from_pretrained(weight).weight, weight)
    tied = QuantLinear(4, 3, bias=False)
    tied.weight = QuantEmbedding(3, 4).weight
    tied(torch.randn(2, 4)).sum().backward()


# Layers of other packages, subclasses, and layers of one's own.


def make_conv1d():
    """A stand-in for the layer of Hugging Face transformers."""

    def __init__(self, nf, nx):
        nn.Module.__init__(self)
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf))
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.size()[:-1], self.nf)

    namespace = {
        "__init__": __init__,
        "forward": forward,
        "__module__": "transformers.pytorch_utils",
        "__qualname__": "Conv1D",
    }
    return type("Conv1D", (nn.Module,), namespace)


def test_the_linear_layer_of_gpt2():
    layer = make_conv1d()(5, 6)
    float_class = type(layer)
    quantize_model_(layer, 3, 5, first_last_bits=None)
    x = torch.randn(2, 3, 6)
    weight = fake_quantize(layer.weight, 3, axis=1)
    torch.testing.assert_close(layer(x), fake_quantize(x, 5) @ weight + layer.bias)
    layer(x).sum().backward()
    assert layer.weight.grad.shape == (6, 5)
    assert isinstance(layer, float_class)
    dequantize_model_(layer)
    assert type(layer) is float_class


def named(base, name, forward):
    """A stand-in for a class of a package."""
    module, _, name = name.rpartition(".")
    return type(name, (base,), {"forward": forward, "__module__": module, "__qualname__": name})


def same_padded(x, kernel, stride, dilation):
    """As TensorFlow pads, with the larger half at the end."""
    pads = []
    for size, k, s, d in zip(x.shape[-2:], kernel, stride, dilation, strict=True):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads = [total // 2, math.ceil(total / 2), *pads]
    return F.pad(x, pads)


def forward_of_same(self, x):
    x = same_padded(x, self.kernel_size, self.stride, self.dilation)
    return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("activation_grid", ["signed", "affine", "odd"])
@pytest.mark.parametrize(
    ("size", "kernel", "options"),
    [
        ((7, 8), 3, {"stride": 2}),
        ((8, 8), (2, 3), {"bias": False}),
        ((5, 9), 3, {"stride": 3, "dilation": 2, "groups": 2}),
        ((6, 6), 1, {"stride": 2}),
    ],
)
def test_the_padded_convolution_of_timm(size, kernel, options, arithmetic, activation_grid):
    layer = named(nn.Conv2d, "timm.layers.conv2d_same.Conv2dSame", forward_of_same)
    layer = layer(4, 6, kernel, **options)
    x = torch.randn(2, 4, *size)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(fake_quantize(layer.weight, 4, axis=0))
    expected = other(fake_quantize(x, 4, grid=activation_grid))
    widths = {"activation_grid": activation_grid, "first_last_bits": None}
    model = quantize_model_(nn.Sequential(layer), **widths, arithmetic=arithmetic)
    torch.testing.assert_close(model(x), expected)
    expected.sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, other.weight.grad, rtol=1e-4, atol=1e-4)
    assert (model[0].why_float() is None) == (activation_grid != "odd")
    if model[0].computes_in_integers():
        fused = fuse_(nn.Sequential(*model, nn.BatchNorm2d(6)), x)
        unfused = copy.deepcopy(fused)
        unfuse_(unfused)
        torch.testing.assert_close(fused(x), unfused(x), rtol=1e-4, atol=1e-4)
    dequantize_model_(model)
    assert type(model[0]).__qualname__ == "Conv2dSame"


def test_the_linear_layer_of_timm():
    def forward(self, input):
        return F.linear(input, self.weight, self.bias)

    layer = named(nn.Linear, "timm.layers.linear.Linear", forward)(6, 5)
    expected = quantize_model_(copy.deepcopy(nn.Sequential(layer)), example=torch.randn(2, 6))
    plain = nn.Linear(6, 5)
    plain.load_state_dict(layer.state_dict())
    plain = quantize_model_(nn.Sequential(plain))
    x = torch.randn(2, 6)
    assert torch.equal(expected(x), plain(x))
    assert isinstance(expected[0], QuantLinear)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        *((make, torch.randn(shape)) for make, shape in LAYERS.values()),
        (lambda: nn.Embedding(4, 3), torch.arange(4)),
        (lambda: make_conv1d()(5, 6), torch.randn(2, 6)),
    ],
    ids=[*LAYERS, "Embedding", "Conv1D"],
)
def test_the_input_by_its_name_in_the_float_layer(make, x):
    layer = make()
    name = next(iter(inspect.signature(layer.forward).parameters))
    expected = quantize_model_(copy.deepcopy(layer))(x)
    assert torch.equal(quantize_model_(layer)(**{name: x}), expected)


class Named(nn.Linear):
    """A subclass with the forward of its base class."""

    def __init__(self, name):
        super().__init__(4, 4)
        self.name = name

    def greet(self):
        return f"{super().extra_repr()} {self.name}"


class Shifted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class QuantShifted(QuantLayer, Shifted):
    def compute(self, x, weight, bias):
        return F.linear(x, weight, bias) + 1


class Standardized(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


def test_a_subclass_stays_what_it_is():
    layer = quantize_model_(Named("bob"), 3, 5, first_last_bits=None)
    assert isinstance(layer, Named)
    assert isinstance(layer, QuantLinear)
    assert "bob" in layer.greet()
    x = torch.randn(2, 4)
    expected = F.linear(fake_quantize(x, 5), fake_quantize(layer.weight, 3, axis=0), layer.bias)
    assert torch.equal(layer(x), expected)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert type(copied) is type(layer)
        assert copied.greet() == layer.greet()
        assert torch.equal(copied.eval()(x), layer.eval()(x))
        assert type(dequantize_model_(copied)) is Named
    assert type(quantize_model_(Named("eve"))) is type(layer)


@pytest.fixture
def registered():
    before = dict(noisyq_fast.conversion.classes._LAYERS)
    register_layer(Shifted, QuantShifted)
    yield
    noisyq_fast.conversion.classes._LAYERS.clear()
    noisyq_fast.conversion.classes._LAYERS.update(before)


@pytest.mark.usefixtures("registered")
def test_a_layer_of_ones_own():
    class Further(Shifted):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Shifted(4, 4), Further(4, 4))
    quantize_model_(model, 3, 5, first_last_bits=None)
    assert type(model[1]) is QuantShifted
    assert isinstance(model[2], QuantShifted)
    x = torch.randn(2, 4)
    for layer in model[1:]:
        weight = fake_quantize(layer.weight, 3, axis=0)
        assert torch.equal(layer(x), F.linear(fake_quantize(x, 5), weight, layer.bias) + 1)
    dequantize_model_(model)
    assert [type(layer) for layer in model] == [nn.Linear, Shifted, Further]


def test_what_cannot_be_registered():
    for float_class in (3, int, Shifted(2, 2)):
        with pytest.raises(TypeError, match=r"float_class: expected a subclass of nn\.Module"):
            register_layer(float_class, QuantShifted)
    for quant_class in (Shifted, QuantLinear, nn.Linear, QuantShifted(2, 2)):
        with pytest.raises(TypeError, match="quant_class: expected a subclass of QuantLayer and"):
            register_layer(Shifted, quant_class)


class Many(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.lstm = nn.LSTM(4, 4)
        self.gru = nn.GRU(4, 4)
        self.bilinear = nn.Bilinear(4, 4, 4)
        self.experts = nn.Parameter(torch.randn(3, 4, 4))
        self.shifted = Shifted(4, 4)
        self.standardized = Standardized(4, 4, 1)
        self.replaced = nn.Linear(4, 4)
        self.replaced.forward = lambda x: x
        self.asked = nn.Linear(4, 4)
        self.filtered = nn.Linear(4, 4)
        self.norm = nn.LayerNorm([4])
        self.temperature = nn.Parameter(torch.ones(1))


def test_one_warning_lists_all_weights_that_stay_float():
    model = Many()
    with pytest.warns(UserWarning, match="weights that stay float, ") as caught:
        quantize_model_(
            model,
            overrides={"asked": None},
            filter=lambda name, layer: name != "filtered" and isinstance(layer, nn.Linear),
        )
    (warning,) = caught
    message = str(warning.message)
    assert warning.filename == __file__
    for part in (
        "the model (Many: experts)",
        "lstm (LSTM: weight_ih_l0, weight_hh_l0)",
        "gru (GRU: weight_ih_l0, weight_hh_l0)",
        "bilinear (Bilinear: weight)",
        "shifted (Shifted: weight, a subclass of Linear with a forward of its own: see",
        "standardized (Standardized: weight, a subclass of Conv2d with a forward of its own",
        "replaced (Linear: weight, its forward was replaced: quantize the model before that)",
    ):
        assert part in message
    for name in ("asked", "filtered", "norm", "temperature", " linear"):
        assert name not in message
    assert isinstance(model.linear, QuantLinear)
    assert type(model.replaced) is nn.Linear


def test_weights_that_one_keeps_float_on_purpose_are_not_listed():
    names = ("lstm", "gru", "bilinear", "shifted", "standardized", "replaced", "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model_(Many(), overrides=dict.fromkeys(names))


def test_an_attention_whose_forward_was_replaced_is_listed_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 2))
    model[1].forward = model[1].forward
    with pytest.warns(UserWarning, match=r"1 \(Multi.*in_proj_weight.*; 1.out_proj \(.*: weight"):
        quantize_model_(model)


def test_quantizers_of_ones_choice():
    weight, activation = AbsMax(6, axis=None), MovingAbsMax(7, averaging_constant=0.5)
    layer = QuantLinear(4, 3, weight=weight, activation=activation)
    assert layer.weight_quantizer is not weight
    assert (layer.weight_quantizer.axis, layer.input_quantizer.averaging_constant) == (None, 0.5)
    x = torch.randn(2, 4)
    expected = F.linear(fake_quantize(x, 7), fake_quantize(layer.weight, 6), layer.bias)
    assert torch.equal(layer(x), expected)
    layer = QuantLinear(4, 3, weight=None, activation=None)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert "WF/AF" in repr(layer)
    for options in ({"weight": AbsMax}, {"activation": 4}, {"weight": "absmax"}):
        with pytest.raises(TypeError, match=r"expected a quantizer .*, or None, got"):
            QuantLinear(4, 3, **options)


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_flops_are_counted_like_those_of_the_float_model(grad):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.randn(1, 2, 4, 4)

    def flops():
        with grad(), FlopCounterMode(display=False) as counter:
            model(x)
        return counter.get_total_flops()

    expected = flops()
    quantize_model_(model).train()(x)
    model.eval()
    assert flops() == expected > 0
