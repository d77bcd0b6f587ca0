"""Ranges from batches: what each method finds, on what it looks, and what it refuses."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisyq_fast import (
    AbsMax,
    GroupedLinear,
    MovingAbsMax,
    calibrate,
    disabled,
    fake_quantize_ema,
    freeze_ranges_,
    quantize_model_,
)
from noisyq_fast.calibration.input_ranges import _BINS, METHODS

pytestmark = pytest.mark.usefixtures("both_arithmetics")


def layer(bits=4, **options):
    model = nn.Sequential(nn.Linear(4, 3))
    return quantize_model_(model, activation_bits=bits, first_last_bits=None, **options)


def range_of(x, method="absmax", bits=4, parts=1, **options):
    """What the values of ``x`` give as a range, in several batches."""
    batches = x.reshape(-1, 4).chunk(parts)
    return calibrate(layer(bits), batches, method, **options)[0].input_quantizer.range


def heavy_tailed(count=4000):
    return torch.randn(count) ** 3


def test_absmax():
    x = heavy_tailed()
    assert range_of(x, parts=7) == x.abs().max()
    assert range_of(-x.abs()) == x.abs().max()
    assert range_of(x.bfloat16().float()) == x.bfloat16().abs().max()


@pytest.mark.parametrize("percentile", [50, 90, 99.9, 100])
def test_percentile_is_within_a_bin_above(percentile):
    x = heavy_tailed()
    found = range_of(x, "percentile", percentile=percentile)
    magnitudes = x.abs().sort().values
    exact = magnitudes[-(-len(x) * percentile // 100).__int__() - 1 if percentile < 100 else -1]
    width = 2 * magnitudes[-1] / _BINS
    assert exact <= found <= exact + width
    assert found <= magnitudes[-1]
    held = (magnitudes <= found).double().mean()
    assert held >= percentile / 100 - 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_is_as_good_as_the_best_candidate(bits):
    x = heavy_tailed()

    def error(absmax):
        y = fake_quantize_ema(x, absmax, bits, training=False)
        return (y - x).double().square().sum()

    candidates = [x.abs().max() * 2 ** (-k / 32) for k in range(257)]
    found = range_of(x, "mse", bits)
    torch.testing.assert_close(found, min(candidates, key=lambda c: (found - c).abs()))
    assert error(found) <= 1.001 * min(map(error, candidates))


def test_narrower_codes_clip_more():
    found = [range_of(heavy_tailed(), "mse", bits) for bits in (2, 4, 8)]
    assert found == sorted(found)
    assert found[0] < found[2]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_values_in_any_batches_give_the_same_range(method):
    x = heavy_tailed() * torch.logspace(-6, 4, 4000)  # the largest come last
    expected = range_of(x, method)
    assert range_of(x, method, parts=9) == expected
    assert range_of(x.flip(0), method, parts=5) == expected
    assert range_of(x[torch.randperm(len(x))], method, parts=3) == expected


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_any_size_of_values(method, scale):
    x = torch.rand(400).clamp(0.1) * scale
    expected = range_of(x, method, bits=8) / scale
    assert 0.1 <= expected <= 1
    assert range_of(torch.zeros(8), method) == 0


def test_what_is_equal_is_not_clipped():
    assert range_of(torch.full((40,), 0.3), "mse") == 0.3
    assert range_of(torch.full((40,), 0.3), "percentile", percentile=1) == torch.tensor(0.3)


@pytest.mark.parametrize("method", METHODS)
def test_a_range_for_each_group(method):
    model = quantize_model_(nn.Sequential(GroupedLinear(3, 4, 2)), first_last_bits=None)
    x = heavy_tailed(3 * 4 * 50).view(50, 3, 4) * torch.tensor([1.0, 0.01, 100.0]).view(3, 1)
    found = calibrate(model, x.split(20), method)[0].input_quantizer.range
    for i in range(3):
        torch.testing.assert_close(found[i], range_of(x[:, i].reshape(-1), method))


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3)
    )


def test_layers_see_the_inputs_of_the_float_network_in_evaluation():
    batches = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    float_model = network().eval()
    hidden = [float_model[:4](x) for x in batches]
    for bits in (2, 8):
        model = quantize_model_(network(), activation_bits=bits, weight_bits=bits)
        assert calibrate(model, iter(batches)) is model
        assert model[0].input_quantizer.range == max(x.abs().max() for x in batches)
        assert model[4].input_quantizer.range == max(h.abs().max() for h in hidden)
        assert model.training
        assert model[1].num_batches_tracked == 0
        model.eval()(batches[0])


def test_training_goes_on_from_a_calibrated_range():
    model = calibrate(layer(averaging_constant=0.5), [torch.full((1, 4), 2.0)])
    model(torch.full((1, 4), 4.0))
    assert model[0].input_quantizer.range == 3
    other = layer()
    other.load_state_dict(model.state_dict())
    assert other[0].input_quantizer.range == 3


def test_frozen_ranges_are_set_and_stay_frozen():
    model = freeze_ranges_(calibrate(layer(), [torch.ones(1, 4)]))
    calibrate(model, [torch.full((1, 4), 2.0)])
    model(torch.full((1, 4), 4.0))
    assert model[0].input_quantizer.range == 2


def test_inputs_of_all_kinds():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x, scale=1.0):
            return self.linear(x * scale)

    model = quantize_model_(Sum())
    x = torch.ones(2, 4)
    for batch, expected in ((x, 1), ((x, 2.0), 2), ({"scale": 3.0, "x": x}, 3), ([x, 4.0], 4)):
        assert calibrate(model, [batch]).linear.input_quantizer.range == expected
    calibrate(model, [x[:0], x])
    assert model.linear.input_quantizer.range == 1
    assert calibrate(model, [x.bfloat16()] if model.bfloat16() else []).linear.weight.dtype == (
        torch.bfloat16
    )


def test_inside_disabled_and_with_quantizers_that_are_off():
    model = layer()
    model[0].input_quantizer.enabled = False
    with disabled(model):
        calibrate(model, [torch.ones(1, 4)])
    assert model[0].input_quantizer.range == 1
    assert not model[0].input_quantizer.enabled


def test_layers_that_are_not_called_are_named():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.linear = nn.Linear(4, 4), nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x):
            x = F.linear(self.linear(x), self.read.weight)
            return self.attention(x, x, x)[0]

    model = quantize_model_(Model())
    with pytest.warns(UserWarning, match="not called, whose ranges stay as they were: read$"):
        calibrate(model, [torch.randn(3, 4)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(quantize_model_(nn.MultiheadAttention(4, 2)), [(torch.randn(3, 4),) * 3])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_layer_with_a_nan_is_named_and_no_range_set(value):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with torch.no_grad():
        model[0].bias[1] = value
    quantize_model_(model)
    before = copy.deepcopy(model.state_dict())
    for method in METHODS:
        with pytest.raises(ValueError, match=r"^1\.input_quantizer: got a NaN or .* in batch 1$"):
            calibrate(model, [torch.ones(0, 4), torch.ones(1, 4)], method)
    assert str(model.state_dict()) == str(before)
    assert not any(m._forward_pre_hooks.keys() - {-1} for m in model.modules())


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "message"),
    [
        (nn.Linear(4, 4), [torch.ones(1, 4)], {}, ValueError, "without quantized layers"),
        (3, [torch.ones(1, 4)], {}, TypeError, "model: got int"),
        (None, [], {}, ValueError, "batches: got none, takes one or more"),
        (None, torch.ones(1, 4), {}, TypeError, "batches: got Tensor, takes an iterable"),
        (None, {"x": 1}, {}, TypeError, "batches: got dict, takes an iterable"),
        (None, 3, {}, TypeError, "batches: got int, takes an iterable"),
        (None, [torch.ones(1, 5)], {}, ValueError, "does not run on batch 0: .*shapes"),
        (None, [(torch.ones(1, 4), torch.ones(1))], {}, ValueError, "batch 0: .*leave labels out"),
        (None, [torch.ones(1, 4)], {"method": "max"}, ValueError, "got 'max', takes absmax, perc"),
        (None, [torch.ones(1, 4)], {"percentile": 0}, ValueError, "percentile: got 0, takes more"),
        (None, [torch.ones(1, 4)], {"percentile": 101}, ValueError, "percentile: got 101"),
        (None, [torch.ones(1, 4)], {"percentile": "9"}, TypeError, "percentile: got str"),
    ],
)
def test_bad_arguments(model, batches, options, error, message):
    with pytest.raises(error, match=message):
        calibrate(layer() if model is None else model, batches, **options)


def test_a_generator_that_is_used_up():
    batches = (torch.ones(1, 4) for _ in range(2))
    calibrate(layer(), batches)
    with pytest.raises(ValueError, match="a generator gives its batches only once"):
        calibrate(layer(), batches)


def test_a_model_whose_quantizers_keep_no_range():
    model = layer(activation=AbsMax(4, axis=None))
    with pytest.raises(ValueError, match="keep no range"):
        calibrate(model, [torch.ones(1, 4)])


def test_evaluation_before_calibration_names_the_layer_and_what_to_do():
    model = layer().eval()
    with pytest.raises(ValueError, match=r"^0\.input_quantizer: .*calibrate\(.*disabled\(model\)"):
        model(torch.ones(1, 4))
    calibrate(model, [torch.ones(1, 4)])(torch.ones(1, 4))


def test_memory_stays_the_same(monkeypatch):
    monkeypatch.setattr("noisyq_fast.calibration.input_ranges._AT_ONCE", 8)
    x = heavy_tailed(400)
    assert range_of(x, "mse") == range_of(x, "mse", parts=3)
    monkeypatch.undo()
    assert range_of(x, "mse") == range_of(x, "mse", parts=3)


def test_quantizers_used_by_themselves():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizer = MovingAbsMax(4)

        def forward(self, x):
            return self.quantizer(x)

    assert calibrate(Model(), [torch.full((2,), 3.0)]).quantizer.range == 3
