"""GroupedLinear and QuantGroupedLinear: to the bit a layer for each group, computed together."""

import copy

import pytest
import torch
from assert_same import assert_same
from torch import nn

from noisyq_fast import (
    GroupedLinear,
    QuantGroupedLinear,
    QuantLinear,
    fake_quantize,
    fake_quantize_ema,
    layers,
    quantize_model_,
)

GROUPS, INPUTS, OUTPUTS = 3, 17, 5
SIZES = GROUPS, INPUTS, OUTPUTS
NAN, INF = float("nan"), float("inf")
QUANTIZERS = [
    {},
    {"weight_bits": 2, "activation_bits": 7},
    {"delayed": True},
    {"delayed": True, "ste": "clipped"},
]
# Of very different size, so that a scale of the wrong group shows.
LOUDNESS = torch.tensor([1.0, 100.0, 0.01]).unsqueeze(1)


def inputs(*leading, dtype=torch.float32):
    return (torch.randn(*leading, GROUPS, INPUTS) * LOUDNESS).to(dtype)


def grouped(**quantizer):
    layer = QuantGroupedLinear(*SIZES, averaging_constant=0.3, **quantizer)
    with torch.no_grad():
        layer.weight.mul_(LOUDNESS.unsqueeze(2))
    return layer


def one_by_one(layer):
    """A layer for each group, with its part of the parameters and ranges of ``layer``."""
    alone = []
    for t in range(GROUPS):
        if isinstance(layer, QuantGroupedLinear):
            one = QuantLinear(INPUTS, OUTPUTS, bias=layer.bias is not None)
            one.set_quantizer_(
                layer.weight_bits,
                layer.activation_bits,
                layer.averaging_constant,
                layer.delayed,
                layer.ste,
            )
        else:
            one = nn.Linear(INPUTS, OUTPUTS, bias=layer.bias is not None)
        one.weight = nn.Parameter(layer.weight[t].detach().clone())
        if layer.bias is not None:
            one.bias = nn.Parameter(layer.bias[t].detach().clone())
        alone.append(one)
    return alone


def stacked(alone, name):
    return torch.stack([getattr(one, name) for one in alone])


def assert_close(actual, expected):
    """But for the order in which products are summed."""
    largest = expected.abs().max().item() if expected.numel() else 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * largest)


def check_step(layer, alone, x):
    """Outputs and gradients of one forward and backward are those of the layers one by one."""
    x.requires_grad_()
    y = layer(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    for t, one in enumerate(alone):
        part = x[..., t, :].detach().requires_grad_()
        expected = one(part)
        assert_close(y[..., t, :], expected)
        expected.backward(grad[..., t, :])
        assert_close(x.grad[..., t, :], part.grad)
        for name, parameter in layer.named_parameters():
            assert_close(parameter.grad[t], getattr(one, name).grad)
            getattr(one, name).grad = None
    layer.zero_grad()
    return x.grad


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(4,), (), (2, 3), (0,), (1,)])
def test_float_layer_equals_a_linear_for_each_group(leading, bias):
    layer = GroupedLinear(*SIZES, bias=bias)
    check_step(layer, one_by_one(layer), torch.randn(*leading, GROUPS, INPUTS))


@pytest.mark.parametrize("bias", [True, False])
def test_initialised_like_linear_layers_made_one_after_the_other(bias):
    torch.manual_seed(3)
    layer = GroupedLinear(*SIZES, bias=bias)
    torch.manual_seed(3)
    alone = [nn.Linear(INPUTS, OUTPUTS, bias=bias) for _ in range(GROUPS)]
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, stacked(alone, name))
    assert [*layer.state_dict()] == ["weight", "bias"][: 1 + bias]


@pytest.mark.parametrize(
    ("leading", "dtype"),
    [((4,), torch.float32), ((), torch.float16), ((2, 3), torch.bfloat16), ((1,), torch.float32)],
)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantized_to_the_bit_like_a_layer_for_each_group(backend, quantizer, leading, dtype):
    layer = grouped(**quantizer).to(dtype)
    alone = one_by_one(layer)
    assert_same(layer.quantized_weight(), torch.stack([one.quantized_weight() for one in alone]))
    for factor in (1, 3, 0.5):
        x = factor * inputs(*leading, dtype=dtype)
        parts = [one.quantized_input(x[..., t, :]) for t, one in enumerate(alone)]
        assert_same(layer.quantized_input(x), torch.stack(parts, -2))
        assert_same(layer.running_absmax, stacked(alone, "running_absmax"))
    for one in (layer, *alone):
        one.eval()
    parts = [one.quantized_input(10 * x[..., t, :]) for t, one in enumerate(alone)]
    assert_same(layer.quantized_input(10 * x), torch.stack(parts, -2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(4,), (), (2, 3), (0,)])
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_outputs_and_gradients_are_those_of_a_layer_for_each_group(quantizer, leading, bias):
    layer = grouped(bias=bias, **quantizer)
    alone = one_by_one(layer)
    for factor in (1, 3):
        grad = check_step(layer, alone, factor * inputs(*leading))
    if leading:
        clips = quantizer.get("ste") == "clipped" and grad.numel() > 0
        assert bool((grad == 0).any()) == clips


def test_the_straight_through_gradient_is_that_of_the_product():
    layer = QuantGroupedLinear(*SIZES)
    x = torch.randn(4, GROUPS, INPUTS, requires_grad=True)
    grad = torch.randn(4, GROUPS, OUTPUTS)
    layer(x).backward(grad)
    of_input = torch.einsum("btu,tui->bti", grad, layer.quantized_weight())
    of_weight = torch.einsum("btu,bti->tui", grad, layer.quantized_input(x))
    assert_close(x.grad, of_input)
    assert_close(layer.weight.grad, of_weight)
    assert_close(layer.bias.grad, grad.sum(0))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("quantized", [False, True])
def test_computes_with_other_parameters(quantized, bias):
    layer = grouped(bias=bias) if quantized else GroupedLinear(*SIZES, bias=bias)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = inputs(4)
    given = {name: parameter.detach().clone() for name, parameter in other.named_parameters()}
    given = given["weight"].requires_grad_(), given.get("bias")
    expected = other(x)
    actual = layer(x, parameters=given)
    assert_same(actual, expected)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    actual.backward(grad)
    assert_same(given[0].grad, other.weight.grad)
    assert layer.weight.grad is None
    if quantized:
        assert_same(layer.running_absmax, other.running_absmax)


def test_other_parameters_are_not_those_that_were_quantized_together():
    model = quantize_model_(make_model())
    layer, seen = model[2], []
    given = torch.randn_like(layer.weight), None
    layer.register_forward_hook(lambda *_: seen.append(layer.quantized_weight(given[0])))
    model(torch.randn(2, 4))
    assert_same(seen[0], fake_quantize(given[0].flatten(0, 1), 4, axis=0).view_as(layer.weight))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_value_stays_in_its_group(bad):
    layer = grouped()
    x = inputs(4)
    expected = layer(x).detach()
    layer = copy.deepcopy(layer)
    layer.running_absmax.fill_(NAN)
    x[2, 1, 3] = bad
    y = layer(x)
    assert y[:, 1].isnan().all()
    assert_same(y[:, [0, 2]], expected[:, [0, 2]])
    assert layer.running_absmax.isnan().tolist() == [False, True, False]
    y.sum().backward()
    assert layer.weight.grad.isfinite().all((1, 2)).tolist() == [True, False, True]


def test_shared_range():
    layer = grouped(input_ranges="shared")
    x = inputs(4)
    assert_same(layer.quantized_input(x), fake_quantize_ema(x, torch.tensor(NAN), 4))
    assert_same(layer.running_absmax, x.abs().max())
    assert_same(layer.quantized_weight(), grouped_like(layer).quantized_weight())


def grouped_like(layer):
    other = grouped()
    other.load_state_dict(layer.state_dict() | {"running_absmax": other.running_absmax})
    return other


def test_ranges_can_be_chosen_again():
    layer = grouped(input_ranges="shared")
    layer.set_quantizer_(4, 4, input_ranges="per-group")
    layer(inputs(2))
    assert layer.running_absmax.shape == (GROUPS,)
    layer.set_quantizer_(4, 4, input_ranges="shared")
    layer(inputs(2))
    assert layer.running_absmax.shape == ()


@pytest.mark.parametrize("input_ranges", ["per-group", "shared"])
def test_an_input_that_all_groups_share_is_a_linear_layer(input_ranges):
    layer = QuantGroupedLinear(*SIZES, input_ranges=input_ranges)
    linear = QuantLinear(INPUTS, GROUPS * OUTPUTS)
    linear.load_state_dict(
        {
            "weight": layer.weight.flatten(0, 1),
            "bias": layer.bias.flatten(),
            "running_absmax": linear.running_absmax,
        }
    )
    x = torch.randn(4, INPUTS)
    expanded = x.unsqueeze(-2).expand(-1, GROUPS, -1)
    torch.testing.assert_close(layer(expanded), linear(x).unflatten(-1, (GROUPS, OUTPUTS)))
    assert_same(layer.running_absmax, linear.running_absmax.expand_as(layer.running_absmax))
    assert_same(layer.quantized_weight().flatten(0, 1), linear.quantized_weight())


def make_model():
    return nn.Sequential(
        nn.Linear(4, GROUPS * INPUTS),
        nn.Unflatten(1, (GROUPS, INPUTS)),
        GroupedLinear(*SIZES),
        nn.ReLU(),
        GroupedLinear(GROUPS, OUTPUTS, 2, bias=False),
    )


def test_conversion_in_place():
    model = make_model()
    modules, parameters = list(model.modules()), list(model.parameters())
    names = [*model.state_dict()]
    quantize_model_(model, weight_bits=3, activation_bits=5, overrides={"4": {"weight_bits": 6}})
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [name for name in model.state_dict() if not name.endswith("absmax")] == names
    assert [type(model[i]) for i in (0, 2, 4)] == [QuantLinear, *[QuantGroupedLinear] * 2]
    assert (model[2].weight_bits, model[2].activation_bits) == (3, 5)
    assert (model[4].weight_bits, model[4].activation_bits) == (6, 8)
    assert [model[i].running_absmax.shape for i in (0, 2, 4)] == [(), (GROUPS,), (GROUPS,)]
    assert model[2].running_absmax.isnan().all()
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model_(model)


def test_conversion_with_shared_ranges():
    overrides = {"4": {"input_ranges": "per-group"}}
    model = quantize_model_(make_model(), input_ranges="shared", overrides=overrides)
    model(torch.randn(2, 4))
    assert [model[i].running_absmax.shape for i in (0, 2, 4)] == [(), (), (GROUPS,)]


def test_weights_are_quantized_with_all_others_in_one_call(monkeypatch):
    shapes = []
    many = layers.fake_quantize_many
    monkeypatch.setattr(
        layers,
        "fake_quantize_many",
        lambda tensors, *a, **k: (
            shapes.extend(list(x.shape) for x in tensors) or many(tensors, *a, **k)
        ),
    )
    model = quantize_model_(make_model())
    x = torch.randn(2, 4)
    y = model(x)
    assert shapes == [[51, 4], [GROUPS * OUTPUTS, INPUTS], [GROUPS * 2, OUTPUTS]]
    assert_same(y, nn.Sequential(*copy.deepcopy(model))(x))  # Each quantizes its own.
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_state_dict_round_trip_and_evaluation():
    model = quantize_model_(make_model())
    for _ in range(3):
        model(torch.randn(4, 4))
    other = quantize_model_(make_model())
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 4)
    assert_same(model.eval()(x), other.eval()(x))
    assert_same(copy.deepcopy(model)(x), model(x))
    with pytest.raises(ValueError, match="no batch was seen"):
        quantize_model_(make_model()).eval()(x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranges_stay_float32_without_rounding(dtype):
    layer = grouped()
    layer(inputs(4))
    before = layer.running_absmax.clone()
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert_same(layer.running_absmax, before)
    assert layer(inputs(4, dtype=dtype)).dtype == dtype


def test_autocast():
    layer = grouped()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs(4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph_with_the_same_numbers(training, delayed):
    model = quantize_model_(make_model(), delayed=delayed, ste="clipped")
    model(torch.randn(3, 4))
    eager = copy.deepcopy(model).train(training)
    compiled = torch.compile(model.train(training), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = torch.randn(3, 4)
        outputs = [m(x) for m in (eager, compiled)]
        assert_same(*outputs)
        for y in outputs:
            y.square().sum().backward()
    assert_same(dict(model.state_dict()), dict(eager.state_dict()))
    for a, b in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_the_groups_of_the_output_lie_one_after_the_other():
    y = GroupedLinear(*SIZES)(torch.randn(4, GROUPS, INPUTS))
    assert y.transpose(0, 1).is_contiguous()


def test_repr():
    assert repr(grouped(bias=False, input_ranges="shared")) == (
        "QuantGroupedLinear(groups=3, in_features=17, out_features=5, bias=False, W4/A4, "
        "input_ranges=shared)"
    )


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0, 2, 3), {}, ValueError, "groups: got 0, takes 1 or more"),
        ((1, -2, 3), {}, ValueError, "in_features: got -2, takes 1 or more"),
        ((1, 2, 3.0), {}, TypeError, "out_features: got 3.0 .float., takes an int"),
        (SIZES, {"input_ranges": "all"}, ValueError, "got 'all', takes per-group or shared"),
        (SIZES, {"weight_bits": 9}, ValueError, "weight_bits: got 9, takes 2..8"),
        (SIZES, {"ste": "no"}, ValueError, "ste: got 'no'"),
    ],
)
def test_bad_arguments(arguments, options, error, message):
    with pytest.raises(error, match=message):
        QuantGroupedLinear(*arguments, **options)


@pytest.mark.parametrize("make", [GroupedLinear, QuantGroupedLinear])
# Of these only the last two have another number of elements than the input should have.
@pytest.mark.parametrize(
    "shape", [(2, INPUTS, GROUPS), (GROUPS * INPUTS,), (2, GROUPS * INPUTS), (4, 5, 5), (INPUTS,)]
)
def test_bad_inputs(make, shape):
    layer = make(*SIZES)
    with pytest.raises(ValueError, match=rf"x: got shape \[{shape[0]}.*takes \[..., 3, 17\]"):
        layer(torch.ones(shape))
    with pytest.raises(TypeError, match="x: got list"):
        layer([1.0])
    assert all(buffer.isnan().all() for buffer in layer.buffers())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ranges": "all"}, "input_ranges: got 'all', takes per-group or shared"),
        ({"overrides": {"4": {"input_ranges": "all"}}}, "input_ranges: got 'all'"),
        (
            {"overrides": {"0": {"input_ranges": "shared"}}},
            r"overrides\['0'\]: got input_ranges, takes weight_bits",
        ),
    ],
)
def test_bad_conversions_leave_the_model_as_it_was(arguments, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        quantize_model_(model, **arguments)
    assert type(model[0]) is nn.Linear
    assert type(model[2]) is GroupedLinear


@pytest.mark.parametrize("layer", [GroupedLinear(2, 3, 4), QuantGroupedLinear(2, 3, 4)])
def test_parameters_of_another_shape_are_refused(layer):
    x, weight, bias = torch.randn(5, 2, 3), torch.randn(2, 4, 3), torch.randn(2, 4)
    for parameters, message in (
        ((weight[:, :1], bias), r"got a weight of shape \[2, 1, 3\], takes \[2, 4, 3\]"),
        ((weight, bias[0]), r"got a bias of shape \[4\], takes \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=f"parameters: {message}"):
            layer(x, parameters=parameters)
