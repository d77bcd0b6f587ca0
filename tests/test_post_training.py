"""Post-training methods: what they share, what they keep, and what they refuse."""

import copy
import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import noisyq_fast
from experiments.models.resnet20 import ResNet20
from noisyq_fast import AbsMax, Fixed, QuantLayer, disabled
from noisyq_fast.calibration.dfq import equalize_, pairs
from noisyq_fast.calibration.folding import changeable
from noisyq_fast.calibration.post_training import PostTraining, samples
from noisyq_fast.calibration.typical import typical_inputs

METHODS = {name: getattr(noisyq_fast, name) for name in ("easyquant", "ocs", "bitsplit", "dfq")}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU6(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels),  # depthwise
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, 1),
        )
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm(self.first(x)))


def network():
    return copy.deepcopy(_network())


@functools.cache
def _network():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU()]
    model = nn.Sequential(*stem, Residual(8), *head, nn.Linear(12, 5))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.weight.data[0] *= -1  # a norm may turn a channel around
            module.momentum = 1.0
    with torch.no_grad():
        model(torch.randn(256, 3, 12, 12))
    return model.eval()


def batches(count=2, size=8):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 3, 12, 12, generator=generator) for _ in range(count)]


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}


# All methods.


@every_method
@pytest.mark.parametrize("bits", [8, 5])
def test_a_quantized_copy_in_evaluation_mode(method, bits):
    model, x = network(), batches()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    quantized = method(model.train(), x, weight_bits=bits, activation_bits=bits)
    assert model.training
    model.eval()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not any(isinstance(m, QuantLayer) for m in model.modules())
    assert not any(m.training for m in quantized.modules())
    assert all(p.requires_grad for p in quantized.parameters())
    found = layers(quantized)
    assert [m.widths() for m in found.values()] == ["W8/A8", *[f"W{bits}/A{bits}"] * 4, "W8/A8"]
    error = (quantized(x[0]) - model(x[0])).norm() / model(x[0]).norm()
    assert error < (0.2 if bits == 8 else 1)
    again = method(model, x, weight_bits=bits, activation_bits=bits)
    assert torch.equal(again(x[0]), quantized(x[0]))
    quantized.train()(x[0]).sum().backward()  # it can be trained on
    assert all(m.weight.grad is not None for m in found.values())


@every_method
def test_state_dict_goes_into_a_copy_and_no_other_bits(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    x = [torch.randn(8, 4)]
    quantized = method(model, x)
    again = method(model, [torch.randn(8, 4)])
    again.load_state_dict(quantized.state_dict())
    assert torch.equal(again(x[0]), quantized(x[0]))
    with pytest.raises(RuntimeError, match="bits"):
        method(model, x, weight_bits=6).load_state_dict(quantized.state_dict())


@every_method
@pytest.mark.parametrize(
    ("model", "inputs", "options", "message"),
    [
        (network(), batches()[0], {}, "inputs: got Tensor, takes an iterable"),
        (network(), [], {}, "inputs: got none, takes one or more"),
        (network(), batches(size=0), {}, "inputs: got a batch without samples"),
        (network().to("meta"), batches(), {}, "model: got parameters on the device 'meta'"),
        (network(), [torch.randn(2, 4)], {}, "inputs: the model does not run on them"),
        ("net", batches(), {}, "model: got str, takes a torch.nn.Module"),
        (noisyq_fast.QuantLinear(3, 2), [torch.ones(1, 3)], {}, "model: got quantized layers"),
        (network(), batches(), {"weight_grid": "full"}, "options: got weight_grid, takes"),
        (network(), batches(), {"bits": 3}, "options: got bits, takes weight_bits"),
        (
            network(),
            batches(),
            {"overrides": {"0": {"weight_grid": "odd"}}},
            "overrides\\['0'\\]: got weight_grid, which the method chooses itself",
        ),
        (network(), batches(), {"weight_bits": 9}, "weight_bits|bits: got 9"),
    ],
)
def test_refused(method, model, inputs, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        method(model, inputs, **options)


@every_method
def test_what_a_forward_leaves_in_a_model_does_no_harm(method):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    prune.random_unstructured(model[2], "weight", 0.5)
    x = torch.randn(8, 6)
    model(x)
    assert method(model, [x])(x).shape == (8, 2)


@every_method
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(method, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2)).to(dtype)
    x = [torch.randn(64, 6, dtype=dtype)]
    quantized = method(model, x, weight_bits=6, activation_bits=8)
    assert quantized(x[0]).dtype == dtype
    error = (quantized(x[0]) - model(x[0])).norm() / model(x[0]).norm()
    assert error < 0.5


@every_method
def test_autocast_changes_nothing(method):
    expected = method(network(), batches(), weight_bits=5)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = method(network(), batches(), weight_bits=5)
    for name, value in expected.state_dict().items():
        assert torch.equal(quantized.state_dict()[name], value)


@every_method
def test_layers_of_other_kinds_are_quantized_too(method):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.up = nn.ConvTranspose1d(8, 4, 2)
            self.head = nn.Linear(4, 3)

        def forward(self, tokens, scale):
            x = self.embedding(tokens) * scale
            x = self.attention(x, x, x)[0]
            return self.head(self.up(x.mT).relu().mT)

    torch.manual_seed(0)
    model = Mixed().eval()
    inputs = [{"tokens": torch.arange(7).view(1, 7), "scale": 2.0}]
    quantized = method(model, inputs, weight_bits=8, activation_bits=8)
    head = "head.1" if method is noisyq_fast.ocs else "head"
    assert list(layers(quantized)) == ["embedding", "attention", "attention.out_proj", "up", head]
    y = model(**inputs[0])
    assert (quantized(**inputs[0]) - y).norm() / y.norm() < 0.1


@every_method
def test_layers_that_are_called_twice_share_what_is_found(method):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.again(self.again(self.first(x).relu()).relu()).relu())

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(64, 4)
    y = model(x)
    quantized = method(model, [x], weight_bits=8, activation_bits=8)
    assert (quantized(x) - y).norm() / y.norm() < 0.1


def test_a_bar_on_stderr_where_it_is_wanted(capsys):
    for progress in (True, False, None):
        noisyq_fast.ocs(network(), batches(1), progress=progress)
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("ocs: 100%" in captured.err) == (progress is True)


# What they share.


def test_folding_keeps_what_the_network_computes():
    for model, x in ((network(), batches()[0]), (ResNet20().eval(), torch.randn(4, 3, 32, 32))):
        both = PostTraining(model, [x], {})
        torch.testing.assert_close(both.float(x), model(x), rtol=1e-5, atol=1e-5)
        norms = [m for m in both.float.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms == []
        assert len(both.normal) == sum("norm" in type(m).__name__.lower() for m in model.modules())


def test_a_norm_whose_input_has_another_reader_stays():
    class Read(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            x = self.conv(x)
            return self.norm(x) + x

    class Returned(Read):
        def forward(self, x):
            x = self.conv(x)
            return self.norm(x), x

    class Shared(Read):
        def forward(self, x):
            return self.norm(self.conv(x)) + self.conv(x + 1)

    x = torch.randn(2, 3, 4, 4)
    for kind in (Read, Returned, Shared):
        both = PostTraining(kind().eval(), [x], {})
        assert isinstance(both.float.norm, nn.BatchNorm2d)
        assert both.normal == {}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv1d(6, 4, 3, padding=2),
        nn.Conv2d(6, 4, (3, 2), stride=(2, 1), padding=(1, 0)),
        nn.Conv2d(6, 4, 3, padding="same", dilation=2),
        nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect", groups=2),
        nn.Conv3d(6, 6, 2, groups=6),
    ],
    ids=str,
)
def test_samples_are_what_the_layer_multiplies_with_its_weight(layer):
    shape = [2, 6, *[7] * len(layer.kernel_size)] if hasattr(layer, "kernel_size") else [2, 5, 6]
    x = torch.randn(shape)
    rows = samples(layer, x, 10**9, torch.Generator())
    groups = getattr(layer, "groups", 1)
    product = rows @ layer.weight.flatten(1).unflatten(0, (groups, -1)).mT
    y = layer(x) - (layer.bias if len(shape) == 3 and shape[2] == 6 else 0)
    if hasattr(layer, "kernel_size"):
        y = layer(x) - layer.bias.view(-1, *[1] * len(layer.kernel_size))
        y = y.movedim(1, -1)
    expected = y.flatten(0, -2).unflatten(1, (groups, -1)).transpose(0, 1)
    torch.testing.assert_close(product, expected)
    few = samples(layer, x, 7, torch.Generator().manual_seed(0))
    assert few.shape == (groups, 7, rows.shape[2])
    assert ((few.unsqueeze(2) == rows.unsqueeze(1)).all(-1).any(-1)).all()


# EasyQuant, bit-split.


@pytest.mark.parametrize("bits", [4, 3])
def test_fitted_scales_are_better_than_those_of_the_largest_value(bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU())
    model, x = model.append(nn.Linear(16, 8)), torch.randn(256, 12)
    options = {"weight_bits": bits, "activation_bits": bits, "first_last_bits": None}
    plain = noisyq_fast.quantize_model_(copy.deepcopy(model), **options)
    noisyq_fast.calibrate(plain, [x])
    y = model(x)

    def cosine(quantized):
        return F.cosine_similarity(quantized.eval()(x).flatten(), y.flatten(), 0)

    found = [cosine(METHODS[name](model, [x], **options)) for name in ("easyquant", "bitsplit")]
    assert cosine(plain) < min(found)


@pytest.mark.filterwarnings("error")
def test_bitsplit_puts_weights_on_their_grid():
    quantized = noisyq_fast.bitsplit(network(), batches(), activation_grid="unsigned")
    for layer in layers(quantized).values():
        assert torch.equal(layer.quantized_weight(), layer.weight)


def test_bitsplit_takes_3_bits_and_more():
    for options, message in (
        ({"weight_bits": 2}, "weight_bits: got 2 for layer '3.first.0', takes 3..8"),
        ({"activation_grid": "affine"}, "activation_grid: got 'affine' for layer '0', takes"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            noisyq_fast.bitsplit(network(), batches(), **options)


def test_a_filter_and_an_input_of_zeros():
    model = network()
    with torch.no_grad():
        model[3].first[6].weight[2] = 0
        model[3].first[3].weight.zero_()
    x = batches()
    for method in METHODS.values():
        assert method(model, x)(x[0]).isfinite().all()


# Splitting.


@pytest.mark.parametrize("grid", ["signed", "unsigned"])
@pytest.mark.parametrize("ratios", [(0.25, 0), (0, 0.25), (0.3, 1), (1, 0.1)])
def test_splitting_keeps_what_the_network_computes(ratios, grid):
    model, x = network(), batches()
    quantized = noisyq_fast.ocs(
        model, x, ratio=ratios[0], activation_ratio=ratios[1], activation_grid=grid
    )
    with disabled(quantized):
        torch.testing.assert_close(quantized(x[1]), model(x[1]), rtol=1e-5, atol=1e-5)
    sizes = [noisyq_fast.summary(m, x[0][:1]).parameters for m in (quantized, model)]
    assert sizes[0] > sizes[1]
    assert "SplitChannels(8 -> " in str(quantized)


def test_codes_of_halves_sum_to_those_of_the_whole():
    from noisyq_fast.calibration.ocs import split_weight

    weight = torch.randn(64, 3, 3, 3, dtype=torch.float64)
    scale = weight.abs().max() / 7
    halves, sources = split_weight(weight, 3, scale)

    def codes(w):
        return (w / scale).round()

    summed = torch.zeros_like(weight).index_add_(1, sources, codes(halves))
    once = [c for c in range(3) if (sources == c).sum() == 2]
    assert once
    assert torch.equal(summed[:, once], codes(weight)[:, once])


def test_splitting_makes_the_scale_of_weights_and_inputs_finer():
    model, x = network(), batches()
    before = layers(noisyq_fast.ocs(model, x, ratio=0))
    after = layers(noisyq_fast.ocs(model, x, ratio=0.3, activation_ratio=0.3))
    for (name, a), b in zip(before.items(), after.values(), strict=True):
        if isinstance(b.weight_quantizer, Fixed):
            assert b.weight_quantizer.scale < a.weight_quantizer.scale, name
            assert b.input_quantizer.range < a.input_quantizer.range, name
    assert sum(isinstance(m.weight_quantizer, Fixed) for m in after.values()) == 4


@pytest.mark.parametrize("name", ["ratio", "activation_ratio"])
def test_ratios_are_shares(name):
    for value, error in ((-0.1, ValueError), (1.5, ValueError), ("a", TypeError)):
        with pytest.raises(error, match=f"^{name}: got"):
            noisyq_fast.ocs(network(), batches(), **{name: value})


# Data-free quantization.


def test_pairs_are_layers_whose_output_one_other_reads():
    blocks = [f"stage{s}.{b}" for s in (1, 2, 3) for b in (0, 1, 2)]
    both = PostTraining(ResNet20().eval(), [torch.randn(1, 3, 32, 32)], {})
    assert pairs(both) == [(f"{block}.conv1", f"{block}.conv2") for block in blocks]
    assert pairs(PostTraining(network(), batches(), {})) == [
        ("3.first.0", "3.first.3"),
        ("3.first.3", "3.first.6"),
        ("6", "9"),
    ]


class Of(nn.Module):
    """A function of two layers and an input."""

    def __init__(self, function, *layers):
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x):
        return self.function(*self.layers, x)


def conv(ins=3, outs=8):
    return nn.Conv2d(ins, outs, 3, padding=1)


@pytest.mark.parametrize(
    ("function", "layers", "shape", "is_pair"),
    [
        (lambda a, b, x: b(a(x).mean(1)), (conv(), nn.Conv1d(8, 4, 1)), (2, 3, 8, 8), False),
        (lambda a, b, x: b(a(x).mean(0)), (conv(), nn.Conv1d(8, 4, 1)), (8, 3, 8, 8), False),
        (lambda a, b, x: b(a(x).relu()), (conv(), nn.Linear(8, 4)), (2, 3, 8, 8), False),
        (lambda a, b, x: b(a(x)), (nn.Linear(5, 8), nn.Conv1d(8, 4, 1)), (2, 8, 5), False),
        (
            lambda a, b, x: b(F.avg_pool1d(a(x), 3, 1, 1)),
            (nn.Linear(5, 8), nn.Linear(8, 4)),
            (2, 6, 5),
            False,
        ),
        (
            lambda a, b, x: b(a(x).view(8, 8)),
            (nn.Conv1d(3, 8, 1), nn.Linear(8, 4)),
            (1, 3, 8),
            False,
        ),
        (lambda a, b, x: b(a(x)) + a.weight.sum(), (conv(), conv(8, 4)), (2, 3, 8, 8), False),
        (lambda a, b, x: b(a(x)) + a.bias.sum(), (conv(), conv(8, 4)), (2, 3, 8, 8), False),
        (lambda a, b, x: b(a(x).relu()), (conv(), conv(8, 4)), (3, 8, 8), True),
        (lambda a, b, x: b(a(x).mean((2, 3))), (conv(), nn.Linear(8, 4)), (2, 3, 8, 8), True),
        (lambda a, b, x: b(a(x).relu()), (nn.Linear(5, 8), nn.Linear(8, 4)), (2, 7, 5), True),
    ],
)
def test_pairs_are_of_the_same_channels(function, layers, shape, is_pair):
    torch.manual_seed(0)
    model, x = Of(function, *copy.deepcopy(layers)), torch.randn(shape)

    def change_(both):
        assert bool(pairs(both)) == is_pair
        found = changeable(both.float, both.trace)
        equalize_([(found[a], found[b], None) for a, b in pairs(both)])

    both = PostTraining(model, [x], {}, change_=change_)
    torch.testing.assert_close(both.float(x), model(x), rtol=1e-5, atol=1e-5)


class Standardized(nn.Conv2d):
    """Whose output does not depend on the scale of its weight."""

    def forward(self, x):
        return self._conv_forward(x, self.weight / self.weight.norm(), self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_use_their_weight_in_another_way_are_not_changed():
    convolutions = Standardized(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    layers = nn.Flatten(), Doubled(8 * 16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    model, x = nn.Sequential(*convolutions, *layers), torch.randn(16, 3, 8, 8)
    model(x)
    model.eval()

    def change_(both):
        found = changeable(both.float, both.trace)
        assert [*found] == ["3", "8"]
        equalize_([(found[a], found[b], both.normal.get(a)) for a, b in pairs(both)])

    with pytest.warns(UserWarning, match="a subclass of Conv2d with a forward of its own"):
        both = PostTraining(model, [x], {}, change_=change_)
    torch.testing.assert_close(both.float(x), model(x))


def test_equalisation_keeps_what_the_network_computes():
    model, x = network(), batches()
    model[3].first[2] = nn.ReLU()
    with torch.no_grad():
        model[3].first[3].weight[1] = 0  # a dead channel

    def change_(both):
        found = changeable(both.float, both.trace)
        equalize_([(found[a], found[b], both.normal.get(a)) for a, b in pairs(both)])

    both = PostTraining(model, x, {}, change_=change_)
    torch.testing.assert_close(both.float(x[0]), model(x[0]), rtol=1e-5, atol=1e-5)
    first, second = both.float[3].first[0], both.float[3].first[3]
    largest = [layer.weight.flatten(1).abs().amax(1) for layer in (first, second)]
    alive = torch.arange(8) != 1
    torch.testing.assert_close(largest[0][alive], largest[1][alive])


def test_all_weights_of_a_layer_have_one_scale():
    for layer in layers(noisyq_fast.dfq(network(), batches(1), weight_bits=6)).values():
        assert isinstance(layer.weight_quantizer, AbsMax)
        assert layer.weight_quantizer.axis is None


def test_ranges_do_not_depend_on_the_inputs_but_for_that_of_the_network():
    found = [
        {name: m.input_quantizer.range for name, m in layers(noisyq_fast.dfq(network(), x)).items()}
        for x in (batches(), [2 * part for part in batches()])
    ]
    differing = [name for name in found[0] if found[0][name] != found[1][name]]
    assert differing == ["0"]


def test_what_batch_norms_tell_of_inputs():
    torch.manual_seed(0)
    model = network()
    x = torch.randn(512, 3, 12, 12)
    both = PostTraining(model, [x[:2]], {})
    known = typical_inputs(both.trace, both.normal)
    assert known.keys() == {"3.first.0", "3.first.3", "3.first.6", "6", "9"}
    seen = {}
    for name in known:
        both.float.get_submodule(name).register_forward_pre_hook(
            lambda layer, args, name=name: seen.update({name: args[0]})
        )
    both.float(x)
    for name, typical in known.items():
        values = seen[name].transpose(0, 1).flatten(1)
        error = (typical.mean - values.mean(1)).abs().mean() / values.mean(1).abs().mean()
        assert error < 0.3, name
        assert (typical.high >= values.quantile(0.999, 1)).float().mean() > 0.8, name


def test_correction_takes_off_the_mean_error():
    model, x = network(), batches(1, 512)
    y = model(x[0]).mean(0)
    errors = [
        (noisyq_fast.dfq(model, x, weight_bits=4, activation_bits=8, correct=c)(x[0]).mean(0) - y)
        .abs()
        .sum()
        for c in (True, False)
    ]
    assert errors[0] < errors[1]
