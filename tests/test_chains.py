"""Chains of integer layers are equal to the bit whoever computes them, and equal to PyTorch."""

import copy

import pytest
import torch
import torch.nn.functional as F
from assert_same import assert_same
from fused_networks import (
    IMAGES,
    NETWORKS,
    X,
    check_equal,
    fused,
    integer,
    largest_difference,
    plain,
    read,
    step,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

import noisyq_fast
from noisyq_fast import QuantConv2d, QuantLayer, fuse_, quantize_model_
from noisyq_fast.integer.batch_norm import ExactBatchNorm
from noisyq_fast.integer.chain import mean_of_pixels

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is called several times")


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_are_equal_on_every_backend_and_number_of_threads(name, restore_threads):
    make, shape, exact = NETWORKS[name]
    model = fused(make(), shape)
    assert sum(isinstance(m, ExactBatchNorm) for m in model.modules()) == exact
    unfused = copy.deepcopy(model)
    for layer in unfused.modules():  # computes batch norms exactly, and each by itself
        if isinstance(layer, QuantLayer):
            layer.register_forward_hook(read)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    last = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    for _ in range(3):
        x = torch.randn(shape)
        unfused.load_state_dict(model.state_dict())
        other = copy.deepcopy(model)
        with noisyq_fast.use_backend("reference"):
            expected = step(other, x)
        torch.set_num_threads(2)
        check_equal(step(copy.deepcopy(model), x), expected)
        torch.set_num_threads(1)
        check_equal(step(copy.deepcopy(model), x.contiguous(memory_format=last)), expected)
        check_equal(step(unfused, x), expected)
        check_equal(step(model, x), expected)
        optimizer.step()


def test_float_implementations_differ_in_gradients_where_integers_do_not():
    x = torch.randn(8, 3, 8, 8)
    convolutions = [nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(4)]
    layers = [nn.Conv2d(3, 8, 3, bias=False), *convolutions]
    model = nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU())))
    options = {"weight_bits": 3, "activation_bits": 3, "first_last_bits": None}
    chains = fuse_(quantize_model_(copy.deepcopy(model), arithmetic="integer", **options), x)
    floats = [quantize_model_(copy.deepcopy(model), **options) for _ in range(2)]
    for layer in floats[1].modules():
        if isinstance(layer, QuantConv2d):  # the same sum in another order
            layer.compute = reversed_convolution.__get__(layer)
    first, second = (step(m, x) for m in floats)
    assert largest_difference(second[1], first[1]) > 0.1
    first = step(copy.deepcopy(chains), x)
    with noisyq_fast.use_backend("reference"):
        second = step(chains, x)
    assert largest_difference(second[1], first[1]) < 1e-5


def reversed_convolution(layer, x, weight, bias):
    return layer._conv_forward(x.flip(1), weight.flip(1), bias)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [("signed", 2), ("full", 4), ("unsigned", 8), ("affine", 2), ("affine", 8), ("odd", 4)],
)
def test_other_grids_and_widths(grid, bits):
    make, shape, _ = NETWORKS["projection, in place"]
    options = {"activation_grid": grid, "first_last_bits": None}
    overrides = {"0": {"activation_grid": "signed"}}
    model = fused(
        make(), shape, weight_bits=bits, activation_bits=bits, overrides=overrides, **options
    )
    x, other = torch.randn(shape), copy.deepcopy(model)
    expected = step(other, x)
    with noisyq_fast.use_backend("reference"):
        check_equal(step(model, x), expected)


def test_wide_sums_and_a_clipped_estimator():
    model = fused(Wide(), (2, 64, 6, 5), weight_bits=8, activation_bits=8, ste="clipped")
    x = torch.randn(2, 64, 6, 5)
    for training in (True, False):
        other = copy.deepcopy(model.train(training))
        with noisyq_fast.use_backend("reference"):
            expected = step(other, 3 * x)
        check_equal(step(model, 3 * x), expected)


class Wide(nn.Module):
    """Sums that int16 does not hold, and groups."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(64, 64, 3, padding=1, groups=2), nn.BatchNorm2d(64)
        self.last = nn.Conv2d(64, 4, 1)

    def forward(self, x):
        return self.last(F.relu(self.norm(self.conv(x)) + x))


def test_equal_to_the_chain_by_hand():
    """Step by step, with float64 products of codes that the quantizers give."""
    conv, norm, last = (
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
    )
    with torch.no_grad():
        norm.weight.copy_(torch.randn(8))
        norm.bias.copy_(torch.randn(8))
    model = fused(nn.Sequential(conv, norm, nn.ReLU(), last), first_last_bits=None)
    hand = copy.deepcopy(model)
    x = torch.randn(IMAGES)
    y = plain(model(x))

    def sums(layer, x):
        codes, weight = layer.input_quantizer.codes(x), layer.weight_codes()
        v = F.conv2d(codes.codes.double(), weight.codes.double(), padding=1)
        return v, (codes.scale * weight.scale)[:, None, None]

    with torch.no_grad():
        v, scale = sums(hand[0], x)
        mean = v.mean((0, 2, 3), keepdim=True)
        variance = ((v - mean) ** 2).mean((0, 2, 3), keepdim=True) * scale.double() ** 2
        inverse = (1 / (variance + norm.eps).sqrt()).float()
        weight, bias = (p[:, None, None].double() for p in (norm.weight, norm.bias))
        factor = (weight * inverse * scale).float()
        term = (bias - mean * scale * (weight * inverse)).float()
        h = (v.float() * factor + term).relu()
        v, scale = sums(hand[3], h)
        expected = v.float() * scale + last.bias[:, None, None]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
    assert_same(model[3].input_quantizer.range, hand[3].input_quantizer.range)
    n = v.numel() / 8
    mean, variance = (value.flatten() for value in (mean * hand_scale(hand, x), variance))
    assert_close = torch.testing.assert_close
    assert_close(model[1].running_mean, (0.1 * (mean + conv.bias)).float())
    assert_close(model[1].running_var, (0.9 + 0.1 * variance * n / (n - 1)).float())


def hand_scale(model, x):
    scale = model[0].input_quantizer.codes(x).scale * model[0].weight_codes().scale
    return scale[:, None, None].double()


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("track", [True, False])
def test_a_fused_batch_norm_is_that_of_pytorch(options, track):
    norm = nn.BatchNorm2d(8, track_running_stats=track, **options)
    conv = nn.Conv2d(3, 8, 3)
    model = integer(nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(8, 4, 3)), torch.randn(IMAGES))
    expected = copy.deepcopy(model)
    fuse_(model, torch.randn(IMAGES))
    for training in (True, True, False):
        x = torch.randn(IMAGES)
        parts = [plain(m[:2].train(training)(x)) for m in (model, expected)]
        torch.testing.assert_close(*parts, rtol=1e-4, atol=1e-5)
        for a, b in zip(model[1].buffers(), expected[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)
        gradients = []
        for part, m in zip(parts, (model, expected), strict=True):
            m.zero_grad()
            part.backward(torch.ones_like(part).cumsum(3))
            gradients.append([p.grad for p in (m[0].weight, *m[1].parameters())])
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_batch_norm_in_another_mode_than_the_layer():
    """As with a frozen batch norm in a model in training, and the other way around."""
    for part in (0, 1):
        model = integer(NETWORKS["vgg"][0](), torch.randn(IMAGES))
        model(torch.randn(IMAGES))
        expected = copy.deepcopy(model)
        fuse_(model, torch.randn(IMAGES))
        x = torch.randn(IMAGES)
        for m in (model, expected):
            m[part].eval()
        torch.testing.assert_close(plain(model[:2](x)), expected[:2](x), rtol=1e-4, atol=1e-5)
        for a, b in zip(model[1].buffers(), expected[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)
        with noisyq_fast.use_backend("reference"):
            reference = step(copy.deepcopy(model), x)
        check_equal(step(model, x), reference)


def test_a_batch_norm_of_other_channels_is_refused():
    model = fused(NETWORKS["vgg"][0]())
    norm = nn.BatchNorm2d(4)
    norm.__class__ = type(model[1])
    model[1] = norm
    with pytest.raises(
        ValueError, match="batch norm: got a layer of 8 channels before it, takes 4"
    ):
        model(torch.randn(IMAGES))


def test_one_value_for_each_channel_is_refused_in_training():
    model = fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)))
    with pytest.raises(ValueError, match="expected more than 1 value per channel in training"):
        model(torch.randn(1, 3, 3, 3))
    assert model.eval()(torch.randn(1, 3, 3, 3)).shape == (1, 4, 1, 1)


def test_the_mean_of_pixels_has_a_fixed_order():
    x = torch.randn(2, 3, 7, 5, requires_grad=True)
    mean = mean_of_pixels(x)
    torch.testing.assert_close(mean, x.mean((2, 3)))
    assert_same(mean_of_pixels(x.contiguous(memory_format=torch.channels_last)), mean)
    mean.backward(torch.ones(2, 3))
    assert_same(x.grad, torch.full_like(x, 1 / 35))
    y = fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))(torch.randn(IMAGES))
    expected = mean_of_pixels(y.values())
    for actual in (y.mean((2, 3)), torch.mean(y, dim=[-1, -2]), y.mean(axis=(3, 2))):
        assert_same(actual, expected)
    for size in (1, (1, 1)):
        assert_same(F.adaptive_avg_pool2d(y, size)[..., 0, 0], expected)
    assert_same(y.mean((2, 3), True), expected[..., None, None])
    assert_same(y.mean(1), y.values().mean(1))


def test_recomputed_sums():
    """Less is saved, gradients are equal, and no statistic moves twice."""
    model = integer(NETWORKS["projection, in place"][0](), X, first_last_bits=None)
    saved, results = [], []
    for make in (
        lambda m: m,
        lambda m: fuse_(m, X),
        lambda m: fuse_(m, X, recompute=True),
    ):
        part = make(copy.deepcopy(model))
        kept = {}

        def pack(x):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()  # noqa: B023
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            results.append(step(part, X))
        saved.append(sum(kept.values()))
    check_equal(results[2], results[1], 1e-6)
    unfused, chains, recomputed = saved
    assert chains < 0.8 * unfused
    assert recomputed < 0.9 * chains


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("end", [1, 2, 3, 5])
def test_activation_checkpointing_of_a_part(end, reentrant):
    model = fused(NETWORKS["vgg"][0](), first_last_bits=None)
    expected = step(copy.deepcopy(model), X)

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return model[end:](checkpoint(model[:end], x, use_reentrant=reentrant))

    parts = Parts()
    actual = step(parts, X)
    gradients, buffers = (
        {name.removeprefix("model."): value for name, value in values.items()}
        for values in actual[1:]
    )
    check_equal((actual[0], gradients, buffers), expected)
