"""GroupedLinear and QuantGroupedLinear: to the bit a layer for each group, computed together."""

import copy

import pytest
import torch
from assert_same import assert_same
from torch import nn

from noisyq_fast import (
    AbsMax,
    GroupedLinear,
    MovingAbsMax,
    QuantGroupedLinear,
    Quantizer,
    QuantLinear,
    fake_quantize,
    quantize_model_,
)

pytestmark = pytest.mark.usefixtures("both_arithmetics")

GROUPS, INPUTS, OUTPUTS = 3, 17, 5
SIZES = GROUPS, INPUTS, OUTPUTS
NAN, INF = float("nan"), float("inf")
QUANTIZERS = [{}, {"weight_bits": 2, "activation_bits": 7}]
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
            one = QuantLinear(
                INPUTS,
                OUTPUTS,
                bias=layer.bias is not None,
                weight_bits=layer.weight_bits,
                activation_bits=layer.activation_bits,
                averaging_constant=layer.input_quantizer.averaging_constant,
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


def range_of(layer):
    return layer.input_quantizer.range


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
        assert_same(range_of(layer), torch.stack([*map(range_of, alone)]))
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
        check_step(layer, alone, factor * inputs(*leading))


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
        assert_same(range_of(layer), range_of(other))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_value_stays_in_its_group(bad):
    layer = grouped()
    x = inputs(4)
    expected = layer(x).detach()
    layer = copy.deepcopy(layer)
    layer.input_quantizer.reset()
    x[2, 1, 3] = bad
    y = layer(x)
    assert y[:, 1].isnan().all()
    assert_same(y[:, [0, 2]], expected[:, [0, 2]])
    assert range_of(layer).isnan().tolist() == [False, True, False]
    y.sum().backward()
    assert layer.weight.grad.isfinite().all((1, 2)).tolist() == [True, False, True]


def test_shared_range():
    layer = grouped(input_ranges="shared")
    x = inputs(4)
    assert_same(layer.quantized_input(x), fake_quantize(x, 4))
    assert_same(range_of(layer), x.abs().max())
    by_group = QuantGroupedLinear(*SIZES)
    by_group.weight = layer.weight
    assert_same(layer.quantized_weight(), by_group.quantized_weight())


def test_quantizers_can_be_chosen_again():
    layer = grouped()
    layer.set_quantizers_(AbsMax(3), MovingAbsMax(5))
    assert (layer.weight_bits, layer.activation_bits) == (3, 5)
    assert range_of(layer).shape == (GROUPS,)
    layer.input_ranges = "shared"
    layer.set_quantizers_(None, MovingAbsMax(5))
    layer(inputs(2))
    assert range_of(layer).shape == ()
    assert layer.quantized_weight() is layer.weight


@pytest.mark.parametrize("input_ranges", ["per-group", "shared"])
def test_an_input_that_all_groups_share_is_a_linear_layer(input_ranges):
    layer = QuantGroupedLinear(*SIZES, input_ranges=input_ranges)
    linear = QuantLinear(INPUTS, GROUPS * OUTPUTS)
    parameters = {"weight": layer.weight.flatten(0, 1), "bias": layer.bias.flatten()}
    linear.load_state_dict(parameters, strict=False)
    x = torch.randn(4, INPUTS)
    expanded = x.unsqueeze(-2).expand(-1, GROUPS, -1)
    torch.testing.assert_close(layer(expanded), linear(x).unflatten(-1, (GROUPS, OUTPUTS)))
    assert_same(range_of(layer), range_of(linear).expand_as(range_of(layer)))
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
    kept = [m for m in model.modules() if not isinstance(m, Quantizer)]
    assert all(a is b for a, b in zip(modules, kept, strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [name for name in model.state_dict() if "_quantizer." not in name] == names
    assert [type(model[i]) for i in (0, 2, 4)] == [QuantLinear, *[QuantGroupedLinear] * 2]
    assert (model[2].weight_bits, model[2].activation_bits) == (3, 5)
    assert (model[4].weight_bits, model[4].activation_bits) == (6, 8)
    assert [range_of(model[i]).shape for i in (0, 2, 4)] == [(), (GROUPS,), (GROUPS,)]
    assert range_of(model[2]).isnan().all()
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model_(model)


def test_conversion_with_shared_ranges():
    overrides = {"4": {"input_ranges": "per-group"}}
    model = quantize_model_(make_model(), input_ranges="shared", overrides=overrides)
    model(torch.randn(2, 4))
    assert [range_of(model[i]).shape for i in (0, 2, 4)] == [(), (), (GROUPS,)]


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
    before = range_of(layer)
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert_same(range_of(layer), before)
    assert layer(inputs(4, dtype=dtype)).dtype == dtype


def test_autocast():
    layer = grouped()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(inputs(4))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_compiles_to_one_graph_with_the_same_numbers(training):
    model = quantize_model_(make_model(), ste="clipped")
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
    assert all((buffer == 0).all() for buffer in layer.buffers())  # nothing was observed


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
