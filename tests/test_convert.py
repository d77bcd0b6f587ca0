"""quantize_model_: which layers change, and everything that must not."""

import copy
import warnings

import pytest
import torch
from torch import nn

from noisyq_fast import (
    AbsMax,
    QuantConv2d,
    Quantizer,
    QuantLinear,
    dequantize_model_,
    fake_quantize,
    quantize_model_,
)

pytestmark = pytest.mark.usefixtures("both_arithmetics")


def make_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False),
        nn.Conv2d(8, 8, 3, groups=4),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    )


def widths(model):
    return {
        name: (layer.weight_bits, layer.activation_bits)
        for name, layer in model.named_modules()
        if isinstance(layer, QuantConv2d | QuantLinear)
    }


def test_layers_get_their_widths():
    model = quantize_model_(make_model(), weight_bits=3, activation_bits=5)
    assert widths(model) == {"0": (8, 8), "3": (3, 5), "4": (3, 5), "6": (8, 8)}


def test_first_and_last_may_be_like_the_others():
    model = quantize_model_(make_model(), first_last_bits=None)
    assert set(widths(model).values()) == {(4, 4)}


def test_overrides():
    overrides = {"3": {"weight_bits": 2, "averaging_constant": 0.5}, "6": None}
    model = quantize_model_(make_model(), overrides=overrides)
    assert widths(model) == {"0": (8, 8), "3": (2, 4), "4": (4, 4)}
    assert model[3].input_quantizer.averaging_constant == 0.5
    assert model[4].input_quantizer.averaging_constant == 0.01
    assert type(model[6]) is nn.Linear


def test_identity_of_modules_and_parameters_is_kept():
    model = make_model()
    modules, parameters = list(model.modules()), list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = list(model.state_dict())
    quantize_model_(model)
    kept = [m for m in model.modules() if not isinstance(m, Quantizer)]
    assert all(a is b for a, b in zip(modules, kept, strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [n for n in model.state_dict() if "_quantizer." not in n] == names
    before = model[3].weight.clone()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[3].weight)


def test_hooks_and_tied_weights_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    quantize_model_(model)
    model(torch.randn(2, 4))
    assert calls == [1]
    assert model[1].weight is model[0].weight


def test_a_single_layer_converts_in_place():
    layer = nn.Linear(4, 4)
    assert quantize_model_(layer) is layer
    assert type(layer) is QuantLinear


def test_a_layer_computes_with_quantized_weights_and_inputs():
    layer = QuantConv2d(3, 8, 3, weight_bits=3, activation_bits=5)
    x = torch.randn(2, 3, 6, 6)
    expected = nn.functional.conv2d(
        fake_quantize(x, 5), fake_quantize(layer.weight, 3, axis=0), layer.bias
    )
    assert torch.equal(layer(x), expected)


def test_a_layer_by_itself_quantizes_its_own_weight():
    model = quantize_model_(make_model())
    x = torch.randn(2, 3, 8, 8)
    alone = model[0](x)
    with torch.no_grad():
        model[0].weight.mul_(2)
        model[0].bias.zero_()
    assert not torch.equal(model[0](x), alone)


def test_a_model_whose_layers_all_stay_float_still_runs():
    model = quantize_model_(nn.Sequential(nn.Linear(3, 3)), overrides={"0": None})
    assert model(torch.randn(2, 3)).shape == (2, 3)


def test_state_dict_round_trip_and_evaluation():
    model = quantize_model_(make_model())
    for _ in range(3):
        model(torch.randn(2, 3, 8, 8))
    other = quantize_model_(make_model())
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), other.eval()(x))
    ranges = {n: t.clone() for n, t in model.state_dict().items() if "absmax" in n}
    model(10 * x)
    assert all(torch.equal(model.state_dict()[n], t) for n, t in ranges.items())


def test_a_float_checkpoint_loads_but_for_the_ranges():
    float_model = make_model()
    model = quantize_model_(make_model())
    missing, unexpected = model.load_state_dict(float_model.state_dict(), strict=False)
    assert all("_quantizer." in name for name in missing)
    assert unexpected == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_ranges_stay_float32_without_rounding(dtype):
    model = quantize_model_(make_model())
    model(torch.randn(2, 3, 8, 8))
    before = model[3].input_quantizer.running_absmax.clone()
    model.to(dtype)
    assert model[3].weight.dtype == dtype
    assert model[3].input_quantizer.running_absmax.dtype == torch.float32
    assert torch.equal(model[3].input_quantizer.running_absmax, before)
    assert model(torch.randn(2, 3, 8, 8, dtype=dtype)).dtype == dtype


def test_copies_and_autocast_work():
    model = copy.deepcopy(quantize_model_(make_model()))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8))
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


class Custom(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


def test_subclasses_stay_float_with_a_warning():
    model = nn.Sequential(nn.Linear(4, 4), Custom(4, 4))
    with pytest.warns(UserWarning, match=r"stay float.*: 1 \(Custom: weight, a subclass"):
        quantize_model_(model)
    assert type(model[1]) is Custom


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weight_bits": 1}, ValueError, "weight_bits: got 1, takes 2..8"),
        ({"activation_bits": 4.0}, TypeError, "activation_bits: got 4.0"),
        ({"first_last_bits": 9}, ValueError, "first_last_bits: got 9"),
        ({"first_last_bits": "8"}, TypeError, "first_last_bits: got '8'"),
        ({"filter": 3}, TypeError, "filter: expected a function .*, got int"),
        ({"averaging_constant": 2}, ValueError, "averaging_constant: got 2"),
        ({"ste": "no"}, ValueError, "ste: got 'no'"),
        ({"input_ranges": "all"}, ValueError, "input_ranges: got 'all', takes per-group or shared"),
        ({"weight": AbsMax}, TypeError, "weight: expected a quantizer such as AbsMax.4., or None"),
        ({"activation": 4}, TypeError, "activation: expected a quantizer .*, got int"),
        ({"overrides": {"9": None}}, ValueError, "overrides: got '9', takes one of 0, 3, 4, 6"),
        ({"overrides": {"9": {}}}, ValueError, "overrides: got '9', takes one of 0, 3, 4, 6"),
        ({"overrides": {"2": None}}, ValueError, "overrides: got '2', takes one of 0, 3, 4, 6"),
        ({"overrides": {"1": {}}}, ValueError, "overrides: got '1', takes one of 0, 3, 4, 6"),
        ({"overrides": ["3"]}, TypeError, "overrides: expected a dict .*, got list"),
        ({"overrides": {3: None}}, TypeError, "expected the name of a layer, a str, got 3"),
        ({"overrides": {"3": 8}}, TypeError, r"overrides\['3'\]: expected a dict .*, got 8"),
        (
            {"overrides": {"3": {"weight_bits": 9}}},
            ValueError,
            r"overrides\['3'\]: weight_bits: got 9",
        ),
        (
            {"overrides": {"3": {"weight_bits": "2"}}},
            TypeError,
            r"overrides\['3'\]: weight_bits: got",
        ),
        (
            {"activation": AbsMax(4, None), "overrides": {"3": {"activation_bits": "2"}}},
            TypeError,
            r"overrides\['3'\]: bits: got '2'",
        ),
        ({"overrides": {"3": {"activation": 8}}}, TypeError, "activation: expected a quantizer"),
        (
            {"overrides": {"3": {1: 8}}},
            ValueError,
            r"overrides\['3'\]: got 1, takes weight",
        ),
        (
            {"overrides": {"3": {"input_ranges": "shared"}}},
            ValueError,
            r"overrides\['3'\]: got input_ranges, takes weight",
        ),
        (
            {"overrides": {"3": {"bits": 2}}},
            ValueError,
            r"overrides\['3'\]: got bits, takes weight",
        ),
    ],
)
def test_bad_arguments_leave_the_model_as_it_was(arguments, error, message):
    model = make_model()
    with pytest.raises(error, match=message):
        quantize_model_(model, **arguments)
    assert widths(model) == {}


def test_models_that_cannot_be_converted():
    with pytest.raises(TypeError, match="model: got int"):
        quantize_model_(3)
    with pytest.raises(ValueError, match="without layers that quantize_model_ can"):
        quantize_model_(nn.Sequential(nn.ReLU()))
    model = quantize_model_(make_model())
    with pytest.raises(ValueError, match="quantized already"):
        quantize_model_(model)


def test_long_lists_of_names_are_cut_short():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    with pytest.raises(ValueError, match=r"takes one of 0, 1, .*, 19 and 30 more"):
        quantize_model_(model, overrides={"x": None})


def test_a_lazy_layer_must_have_its_weight():
    for lazy in (nn.LazyBatchNorm1d(), nn.LazyLinear(3)):
        model = nn.Sequential(lazy, nn.Linear(3, 3))
        with pytest.raises(ValueError, match="layer '0' has no weight yet"):
            quantize_model_(model)
        assert type(model[1]) is nn.Linear
    model(torch.randn(2, 4))
    assert type(quantize_model_(model)[0]) is QuantLinear


def test_models_that_cannot_be_dequantized():
    with pytest.raises(TypeError, match="model: got int"):
        dequantize_model_(3)
    with pytest.raises(ValueError, match="model: got Sequential without quantized layers"):
        dequantize_model_(make_model())


def test_conversion_of_an_ordinary_model_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model_(make_model())
