"""Layers with arithmetic="integer": the numbers of float layers, from exact products of codes."""

import copy
import pickle
import warnings

import pytest
import torch
from assert_same import assert_same
from test_layers import LAYERS
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import noisyq_fast
from noisyq_fast import (
    AQD,
    AbsMax,
    GroupedLinear,
    MovingAbsMax,
    QuantConv2d,
    QuantConvTranspose2d,
    QuantGroupedLinear,
    QuantLayer,
    QuantLinear,
    QuantMultiheadAttention,
    dequantize_model_,
    disabled,
    freeze_ranges_,
    quantize_model_,
)
from noisyq_fast.grid import KINDS

MORE = LAYERS | {
    "Conv2d, same": (
        lambda: nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2)),
        (2, 4, 7, 5),
    ),
    "Conv2d, reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
        (2, 4, 5, 6),
    ),
    "Conv2d, replicate": (
        lambda: nn.Conv2d(4, 6, 3, padding=(0, 1), padding_mode="replicate"),
        (2, 4, 5, 6),
    ),
    "Conv2d, depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, bias=False), (2, 4, 5, 6)),
    "Conv2d, unbatched": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 5, 6)),
    "ConvTranspose1d, unbatched": (lambda: nn.ConvTranspose1d(4, 6, 3), (4, 5)),
    "Linear, one row": (lambda: nn.Linear(6, 5), (6,)),
    "Linear, none": (lambda: nn.Linear(6, 5), (0, 6)),
}


def pair(make, **options):
    """The layer in float and in integers."""
    layer = quantize_model_(make(), 4, 5, first_last_bits=None, **options)
    other = copy.deepcopy(layer)
    for m in other.modules():
        if isinstance(m, QuantLayer):
            m.arithmetic = "integer"
    return layer, other


def step(layer, x):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y = y[0] if isinstance(y, tuple) else y
    torch.manual_seed(5)
    y.backward(torch.randn_like(y))
    return y.detach(), {n: p.grad for n, p in layer.named_parameters()} | {"x": x.grad}


def check_close(actual, expected):
    """But for the order of sums."""
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-5)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, rtol=1e-4, atol=1e-5)


def check_layers(layer, other, x):
    for training in (True, False) if x.numel() else (True,):
        for each in (layer, other):
            each.train(training)
        x = x if training else 3 * x
        expected, actual = step(layer, x), step(other, x)
        check_close(actual, expected)
        with noisyq_fast.use_backend("reference"):
            reference = step(copy.deepcopy(other), x)
        assert_same(actual[0], reference[0])
        check_close(actual, reference)
    assert_same([*layer.buffers()], [*other.buffers()])


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("grid", KINDS)
def test_layers_on_all_grids(name, grid):
    make, shape = MORE[name]
    torch.manual_seed(1)
    options = {"weight_grid": grid, "activation_grid": grid}
    layer, other = pair(make, **options)
    assert other.why_float() is None or grid in ("unsigned", "affine", "odd")
    with warnings.catch_warnings(action="ignore"):  # of values below 0 on an unsigned grid
        check_layers(layer, other, torch.randn(shape))


def test_an_input_without_a_code_for_0_is_not_padded_before_it_is_quantized():
    make, shape = MORE["Conv2d, same"]
    layer, other = pair(make, activation=AQD(4, signed=True))
    x = torch.randn(shape)
    assert other.why_float() == "the zeros around its input have no code on the odd grid"
    assert_same(other(x), layer(x))


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("ste", ["identity", "clipped"])
def test_mixed_grids_and_estimators(name, ste):
    make, shape = MORE[name]
    layer, other = pair(make, activation_grid="affine", ste=ste)
    check_layers(layer, other, torch.randn(shape) + 0.5)


QUANTIZERS = [
    (lambda **o: QuantConv2d(4, 4, 3, **o), (4, 4, 6, 6), "activation"),
    (lambda **o: QuantConv2d(4, 4, 3, **o), (4, 4, 6, 6), "weight"),
    (lambda **o: QuantConvTranspose2d(4, 4, 3, **o), (4, 4, 6, 6), "weight"),
    (lambda **o: QuantLinear(4, 4, **o), (4, 4), "activation"),
    (lambda **o: QuantLinear(4, 4, **o), (4, 4, 4), "activation"),
    (lambda **o: QuantLinear(4, 4, **o), (4, 4), "weight"),
    (lambda **o: QuantGroupedLinear(4, 4, 4, **o), (4, 4, 4), "activation"),
    (lambda **o: QuantGroupedLinear(4, 4, 4, **o), (4, 4, 4), "weight"),
    (lambda **o: QuantMultiheadAttention(4, 2, **o), (4, 4, 4), "weight"),
]


@pytest.mark.parametrize("quantizer", [AbsMax(4, None), AbsMax(4, 0), AbsMax(4, 1), AbsMax(4, -1)])
@pytest.mark.parametrize(("make", "shape", "which"), QUANTIZERS)
def test_scales_of_any_axis(make, shape, which, quantizer):
    """Those that do not leave the sum are computed in float."""
    layer = make(**{which: quantizer})
    other = copy.deepcopy(layer)
    for m in other.modules():
        if isinstance(m, QuantLayer):
            m.arithmetic = "integer"
    x = torch.randn(shape)
    args = (x,) * (3 if isinstance(layer, QuantMultiheadAttention) else 1)
    expected, actual = layer(*args), other(*args)
    if isinstance(expected, tuple):
        expected, actual = expected[0], actual[0]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_tokens_groups_and_moving_weights():
    for options, is_integer in (
        ({"activation_granularity": "token"}, True),
        ({"activation_granularity": "token", "activation_grid": "affine"}, True),
        ({"weight_group_size": 2}, False),
        ({"weight": MovingAbsMax(4)}, True),
        ({"weight": None}, False),
        ({"activation": None}, False),
    ):
        layer, other = pair(lambda: nn.Linear(6, 5), **options)
        assert other.computes_in_integers() == is_integer, options
        check_layers(layer, other, torch.randn(2, 3, 6))


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("grid", ["signed", "affine"])
def test_attention(same, grid):
    options = {} if same else {"kdim": 6, "vdim": 4, "add_bias_kv": True}
    layer, other = pair(lambda: nn.MultiheadAttention(8, 2, **options), activation_grid=grid)
    q = torch.randn(3, 2, 8, requires_grad=True)
    args = (q, q, q) if same else (q, torch.randn(5, 2, 6), torch.randn(5, 2, 4))
    outputs = layer(*args), other(*args)
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    gradients = []
    for each, y in zip((layer, other), outputs, strict=True):
        y[0].square().sum().backward()
        gradients.append({n: p.grad for n, p in each.named_parameters()} | {"q": q.grad})
        q.grad = None
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_overrides_and_layers_by_hand():
    model = quantize_model_(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        arithmetic="integer",
        overrides={"1": {"arithmetic": "float"}},
    )
    assert [layer.arithmetic for layer in model] == ["integer", "float"]
    assert [layer.computes_in_integers() for layer in model] == [True, False]
    layer = QuantLinear(4, 3, arithmetic="integer")
    assert layer.computes_in_integers()
    assert not QuantLinear(4, 3).computes_in_integers()
    attention = QuantMultiheadAttention(4, 2, arithmetic="integer")
    assert attention.out_proj.arithmetic == "integer"
    for make in (
        lambda: QuantLinear(4, 3, arithmetic="int"),
        lambda: quantize_model_(nn.Linear(4, 3), arithmetic="int"),
        lambda: quantize_model_(nn.Linear(4, 3), overrides={"": {"arithmetic": "int"}}),
    ):
        with pytest.raises(ValueError, match="arithmetic: got 'int', takes 'float' or 'integer'"):
            make()


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "ConvTranspose2d", "GroupedLinear"])
def test_states_copies_and_back(name):
    make, shape = LAYERS[name]
    x = torch.randn(shape)
    before = make()
    layer = quantize_model_(copy.deepcopy(before), arithmetic="integer")
    attributes = vars(before).keys()
    layer(x)
    expected = layer.eval()(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.arithmetic == "integer"
        assert_same(other(x), expected)
    float_layer = quantize_model_(make())
    float_layer.load_state_dict(layer.state_dict())  # states are of both
    torch.testing.assert_close(float_layer.eval()(x), expected)
    with disabled(layer):
        torch.testing.assert_close(layer(x), before(x))
    freeze_ranges_(layer.train())
    assert_same(layer(x), expected)
    dequantize_model_(layer)
    assert vars(layer).keys() == attributes
    assert_same(layer(x), before(x))


@pytest.mark.parametrize("name", ["Linear", "Conv2d", "ConvTranspose2d", "GroupedLinear"])
def test_lower_precision(name):
    make, shape = LAYERS[name]
    layer = quantize_model_(make(), arithmetic="integer")
    x = torch.randn(shape)
    expected, gradients = step(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        y, lower = step(layer, x)
    assert_same(y, expected)  # the forward stays
    for key, gradient in gradients.items():
        assert lower[key].dtype == torch.float32
        assert (lower[key] - gradient).norm() < 0.02 * gradient.norm()
    layer.to(torch.bfloat16)
    y, lower = step(layer, x.bfloat16())
    assert y.dtype == lower["x"].dtype == lower["weight"].dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_outputs_may_be_changed_in_place():
    for make, shape in LAYERS.values():
        y = quantize_model_(make(), arithmetic="integer")(torch.randn(shape, requires_grad=True))
        nn.functional.hardswish(y, inplace=True).sum().backward()


def test_a_second_derivative_is_refused():
    """The codes that are saved do not tell it."""
    layer = QuantLinear(4, 3, arithmetic="integer")
    x = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, "prune", "tied", "checkpoint"])
def test_wrapped_weights(wrap):
    layer, other = pair(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))
    for model in (layer, other):
        if wrap == "prune":
            prune.l1_unstructured(model[2], "weight", 0.5)
        elif wrap == "tied":
            model[2].weight = model[0].weight
        elif wrap != "checkpoint":
            wrap(model[2])
    if wrap == "checkpoint":
        for reentrant in (True, False):
            again = copy.deepcopy(other)
            again.forward = lambda x, m=again, r=reentrant: checkpoint(
                lambda x: nn.Sequential.forward(m, x), x, use_reentrant=r
            )
            x = torch.randn(3, 6)
            expected = step(copy.deepcopy(other), x)
            actual = step(again, x)
            assert_same(actual[0], expected[0])
            check_close(actual, expected)
            assert again[2].input_quantizer.observed == 1
    x = torch.randn(3, 6)
    for _ in range(2):
        check_close(step(other, x), step(layer, x))


def test_first_and_last_layers_are_integer_too():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(2, 3, 5, 5)
    quantize_model_(model, arithmetic="integer", example=x, activation_grid="unsigned")
    assert all(m.computes_in_integers() for m in model if isinstance(m, QuantLayer))
    assert [model[i].activation_bits for i in (0, 3)] == [8, 8]
    y = model(x)
    with noisyq_fast.use_backend("reference"):
        assert_same(model(x), y)


def test_embeddings_stay_float():
    layer = quantize_model_(nn.Embedding(5, 4), arithmetic="integer")
    assert not layer.computes_in_integers()
    assert "no product of codes" in layer.why_float()
    assert layer(torch.tensor([1, 2])).shape == (2, 4)


def test_grouped_linear_with_other_parameters():
    layer = quantize_model_(GroupedLinear(3, 6, 5), arithmetic="integer")
    x, weight, bias = torch.randn(2, 3, 6), torch.randn(3, 5, 6), torch.randn(3, 5)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(weight)
        other.bias.copy_(bias)
    assert_same(layer(x, parameters=(weight, bias)), other(x))


def make_chains():
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2)]
    layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(100, 5)), torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fuses", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict.fromkeys(("weight_grid", "activation_grid"), "affine"),
        {"activation": MovingAbsMax(4, ste="clipped")},
    ],
    ids=["signed", "affine", "clipped"],
)
def test_forward_mode_agrees_with_reverse_mode(options, fuses, training):
    model, x = make_chains()
    quantize_model_(model, arithmetic="integer", example=x, **options)(x)
    if fuses:
        noisyq_fast.fuse_(model, x)
    model.train(training)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    buffers = {name: b.clone() for name, b in model.named_buffers()}

    def call(parameters, x):
        states = parameters, {name: b.clone() for name, b in buffers.items()}
        return torch.func.functional_call(model, states, (x,))

    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}, torch.randn_like(x)
    y, of_y = torch.func.jvp(call, (parameters, x), tangents)
    cotangent = torch.randn_like(y)
    _, backward = torch.func.vjp(call, parameters, x)
    of_parameters, of_x = backward(cotangent)
    reverse = (of_x * tangents[1]).sum()
    reverse += sum((g * tangents[0][name]).sum() for name, g in of_parameters.items())
    torch.testing.assert_close((of_y * cotangent).sum(), reverse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": (2, 0)},
        {"padding": 1, "stride": 2},
        {"padding": "same", "dilation": (2, 1)},
        {"padding": "valid"},
        {"dilation": 2, "padding": (2, 2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("first", ["changed", "converted"])
def test_attributes_of_convolutions_that_a_model_changes(changes, first):
    images = torch.randn(2, 3, 9, 8)
    outputs = []
    for arithmetic in ("float", "integer"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, (3, 2), padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3))
        if first == "converted":
            quantize_model_(model, arithmetic=arithmetic)
        for name, value in changes.items():
            setattr(model[0], name, value)
        if first == "changed":
            quantize_model_(model, arithmetic=arithmetic)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("changes", [{"stride": 2}, {"padding": 1}, {"dilation": [2, 1]}], ids=str)
def test_attributes_of_transposed_convolutions_that_a_model_changes(changes):
    images = torch.randn(2, 3, 5, 4)
    outputs = []
    for arithmetic in ("float", "integer"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
        quantize_model_(model, arithmetic=arithmetic)
        for name, value in changes.items():
            setattr(model[0], name, value)
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)
