"""fuse_: chains of integer layers, equal to the bit whoever computes and whoever reads them."""

import copy
import functools
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from assert_same import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import noisyq_fast
from experiments.models import ResNet20
from noisyq_fast import (
    QuantConv2d,
    QuantLayer,
    calibrate,
    dequantize_model_,
    disabled,
    freeze_ranges_,
    fuse_,
    quantize_model_,
)
from noisyq_fast.backends import select
from noisyq_fast.integer import chain as chains
from noisyq_fast.integer.batch_norm import ExactBatchNorm
from noisyq_fast.integer.chain import mean_of_pixels
from noisyq_fast.integer.deferred import Deferred

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is called several times")


class Shortcut(nn.Module):
    """Of arXiv 1512.03385, option A: every second pixel, and zeros for new channels."""

    def forward(self, x):
        channels = x.shape[1]
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, channels // 2, channels // 2))


class Block(nn.Module):
    """With ``relu``, in place or not, as a module, and the shortcut added in place or not."""

    def __init__(self, channels, outputs, stride=1, shortcut=None, inplace=False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace)
        self.inplace = inplace
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        identity = self.shortcut(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.inplace:
            out += identity
        else:
            out = out + identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [(8, 4, 1), (4, 4, 3), (4, 8, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, 1, k // 2) for i, o, k in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in sizes)

    def forward(self, x):
        out = x
        for conv, norm in zip(self.convs[:-1], self.norms[:-1], strict=True):
            out = torch.relu(norm(conv(out)))
        return torch.add(self.norms[-1](self.convs[-1](out)), x).relu_()


def projection(channels, outputs):
    return nn.Sequential(nn.Conv2d(channels, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))


def stem(*blocks):
    first = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*first, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(5))


IMAGES = (4, 3, 9, 7)
# Each with the shape of its input and how many of its batch norms become exact.
NETWORKS = {
    "option A": (lambda: stem(Block(8, 8), Block(8, 16, 2, Shortcut())), IMAGES, 5),
    "projection, in place": (
        lambda: stem(Block(8, 16, 2, projection(8, 16), inplace=True), Block(16, 16, inplace=True)),
        IMAGES,
        6,
    ),
    "bottleneck": (lambda: stem(Bottleneck()), IMAGES, 4),
    "vgg": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
            *(nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten()),
            nn.LazyLinear(5),
        ),
        IMAGES,
        3,
    ),
    "linear residual, ReLU6": (
        lambda: stem(
            nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(True)),
            Residual(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))),
            *(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        ),
        IMAGES,
        4,
    ),
    "1-D": (
        lambda: nn.Sequential(
            *(nn.Conv1d(3, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU()),
            Residual(nn.Sequential(nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)), nn.ReLU()),
            *(nn.Conv1d(8, 4, 3, groups=2), nn.Flatten(), nn.LazyLinear(5)),
        ),
        (4, 3, 9),
        2,
    ),
    "3-D": (
        lambda: nn.Sequential(
            *(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU()),
            *(nn.Conv3d(4, 4, 3), nn.BatchNorm3d(4), nn.Flatten(), nn.LazyLinear(5)),
        ),
        (2, 2, 4, 5, 4),
        2,
    ),
}


class Residual(nn.Module):
    def __init__(self, inner, last=None):
        super().__init__()
        self.inner, self.last = inner, last or nn.Identity()

    def forward(self, x):
        return self.last(self.inner(x) + x)


def integer(model, example, **options):
    """The model, converted."""
    model.eval()(example)  # lazy layers
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_model_(model, arithmetic="integer", **options)


def fused(model, shape=IMAGES, recompute=False, **options):
    example = torch.randn(shape)
    return fuse_(integer(model, example, **options), example, recompute=recompute)


def plain(y):
    """An ordinary tensor, of whatever a part of a model returns."""
    return y.values() if isinstance(y, Deferred) else y


def step(model, x):
    """Outputs, gradients and buffers of a step in training."""
    torch.manual_seed(1)
    model.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = plain(model(x))
    y.backward(torch.randn(y.shape))
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"input": x.grad}
    return y.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}


def largest_difference(actual, expected):
    """Of gradients, relative, but for those that are 0 but for rounding (of a bias before a batch
    norm)."""
    assert actual.keys() == expected.keys()
    assert all((actual[k] is None) == (expected[k] is None) for k in actual)
    norms = {name: g.norm() for name, g in expected.items() if g is not None}
    largest = max(norms.values())
    compared = [name for name, norm in norms.items() if norm > 1e-4 * largest]
    assert compared
    return max(((actual[k] - expected[k]).norm() / norms[k]).item() for k in compared)


def check_equal(actual, expected, tolerance=1e-5):
    assert_same(actual[0], expected[0])
    assert_same(actual[2], expected[2])
    assert largest_difference(actual[1], expected[1]) < tolerance


# The same bits, whoever computes.


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


def read(_, args, output):
    """A hook that reads: then nothing goes on in a chain but the batch norm."""
    output.abs().max()


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


# Whatever reads a tensor of a chain gets what it would get of the values.


class Between(nn.Module):
    """A chain with a function in it."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.function = nn.Conv2d(8, 4, 3, padding=1), function

    def forward(self, x):
        return self.last(self.function(self.norm(self.conv(x))))


@functools.cache
def between(**options):
    torch.manual_seed(0)
    model = fused(Between(same), **options)
    model(X)
    return model


def same(x):
    return x


def check_between(function, training=True, **options):
    """The same with the function of a tensor in a chain, and with that of an ordinary tensor."""
    model = between(**options)

    def on_values(y):
        assert isinstance(y, Deferred)
        return function(y.values() * 1)

    results = []
    for applied in (function, on_values):
        other = copy.deepcopy(model).train(training)
        other.function = applied
        results.append(step(other, X))
    check_equal(*results)


X = torch.randn(IMAGES, generator=torch.Generator().manual_seed(3))
ADDED = torch.randn(4, 8, 9, 7, generator=torch.Generator().manual_seed(4))


class Scaled(torch.autograd.Function):
    """Returns its input as it is, with another gradient."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, grad):
        return -2 * grad


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


@torch.jit.script
def scripted(x):
    return 2 * x


def changed(change):
    """A function that changes its input and returns it."""

    def function(y):
        change(y)
        return y

    return function


def without_gradients(change):
    def function(y):
        with torch.no_grad():
            change(y)
        return y

    return function


def read_first(function):
    def read_and_call(y):
        y.abs().max().item()
        return function(y)

    return read_and_call


def add_and_change(y):
    added = ADDED.clone()
    total = y + added
    added.mul_(5)
    return total


def add_and_rectify_changed_view(y):
    view = y[:, :4]
    F.relu_(y)
    return torch.cat([view, y[:, 4:]], 1)


def set_item(y):
    y[:, 0] = 3


FUNCTIONS = {
    "nothing": lambda y: y,
    "relu": F.relu,
    "relu in place": lambda y: F.relu(y, inplace=True),
    "relu in place, not assigned": changed(torch.relu_),
    "relu by name": lambda y: torch.relu(input=y),
    "relu of nn.functional by name": lambda y: F.relu(input=y, inplace=False),
    "relu twice": lambda y: y.relu().relu(),
    "relu read before": read_first(lambda y: F.relu(y, inplace=True)),
    "relu without gradients": without_gradients(torch.relu_),
    "leaky relu in place": lambda y: F.leaky_relu(y, 0.1, inplace=True),
    "gelu": F.gelu,
    "gelu read before": read_first(F.gelu),
    "gelu read before without gradients": lambda y: F.gelu(without_gradients(torch.amax)(y)),
    "relu read before without gradients": lambda y: F.relu(without_gradients(torch.amax)(y)),
    "multiplied in place": changed(lambda y: y.mul_(2)),
    "clamped in place": changed(lambda y: y.clamp_(-0.5, 0.5)),
    "changed by .data": changed(lambda y: y.data.mul_(2)),
    "changed by NumPy": changed(lambda y: np.multiply(a := y.detach().numpy(), 2, out=a)),
    "changed by a view": changed(lambda y: y.view(-1)[::2].mul_(3)),
    "changed by an item": changed(set_item),
    "changed without gradients": without_gradients(lambda y: y.mul_(2)),
    "added to without gradients": without_gradients(lambda y: y.add_(ADDED)),
    "a view before a relu in place": add_and_rectify_changed_view,
    "add": lambda y: y + ADDED,
    "add, reversed": lambda y: ADDED + y,
    "add and relu": lambda y: F.relu(y + ADDED),
    "add in place and relu": lambda y: F.relu_(y.add_(ADDED)),
    "add by name": lambda y: torch.add(input=y, other=ADDED),
    "add with alpha": lambda y: torch.add(y, ADDED, alpha=2),
    "add a number": lambda y: y + 1,
    "add a channel": lambda y: y + ADDED[:, :1],
    "add float64": lambda y: (y + ADDED.double()).float(),
    "add out": lambda y: y + torch.add(y.detach(), ADDED, out=torch.empty_like(ADDED)),
    "add what changes then": add_and_change,
    "add to itself": lambda y: y + y,
    "add to itself in place": changed(lambda y: y.add_(y)),
    "add what comes later": lambda y: F.relu(y) + y,
    "subtract": lambda y: y - ADDED,
    "mean by axis": lambda y: y - y.mean(axis=(2, 3), keepdim=True),
    "mean": lambda y: y - y.mean(),
    "pooled by name": lambda y: y * F.adaptive_avg_pool2d(input=y, output_size=1),
    "two readers": lambda y: F.relu(y) * torch.sigmoid(y),
    "detached": lambda y: y.detach() + y,
    "detached in place": lambda y: y.detach_(),
    "copied": lambda y: y + copy.deepcopy(y.detach()),
    "indexed": lambda y: y[torch.tensor([3, 1, 0, 2])],
    "transposed": lambda y: y.transpose(0, 2).transpose(0, 2),
    "split": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "dropout": lambda y: F.dropout(y, 0.5),
    "unpacked": lambda y: torch.stack([*y]),
    "an autograd Function that returns it": Scaled.apply,
    "an autograd Function that saves it": Squared.apply,
    "TorchScript": scripted,
    "checkpointed": lambda y: checkpoint(F.relu, y, use_reentrant=False),
    "checkpointed, reentrant": lambda y: checkpoint(F.relu, y, use_reentrant=True),
    "checkpointed as it is": lambda y: checkpoint(lambda y: y, y, use_reentrant=True),
    "a hook that changes the gradient": changed(lambda y: y.register_hook(lambda g: -3 * g)),
    "a hook before relu": lambda y: F.relu(changed(lambda y: y.register_hook(torch.neg))(y)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_within_a_chain(name):
    check_between(FUNCTIONS[name])


@pytest.mark.parametrize(
    "name", ["multiplied in place", "add", "relu in place", "changed by .data"]
)
def test_functions_within_a_chain_on_an_affine_grid(name):
    for training in (True, False):
        options = {"activation_grid": "affine", "first_last_bits": None}
        check_between(FUNCTIONS[name], training, **options)


def saved(y):
    file = io.BytesIO()
    torch.save(y.detach(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


READERS = {
    "repr": repr,
    "str": str,
    "format": lambda y: f"{y.sum():.3f}",
    "numpy": lambda y: y.detach().numpy().tolist(),
    "asarray": lambda y: np.asarray(y.detach()).tolist(),
    "tolist": lambda y: y.tolist(),
    "item": lambda y: y[0, 0, 0, 0].item(),
    "pickle": lambda y: pickle.loads(pickle.dumps(y.detach())),
    "save": saved,
    "deepcopy": lambda y: copy.deepcopy(y.detach()),
    "stride": lambda y: y.stride(),
    "is_contiguous": lambda y: y.is_contiguous(),
    "storage_offset": lambda y: y.storage_offset(),
    "nbytes": lambda y: (y.nbytes, y.element_size(), y.numel()),
    "shape": lambda y: (y.shape, y.size(), y.size(1), y.dim(), y.ndim, len(y)),
    "dtype": lambda y: (y.dtype, y.is_floating_point(), y.device, y.layout, y.type()),
    "T": lambda y: y[0, 0].T,
    "mT": lambda y: y.mT,
    "view": lambda y: y.contiguous().view(-1),
    "data": lambda y: y.data,
    "eq": lambda y: y == y,
    "bool": lambda y: bool((y == y).all()),
    "in": lambda y: torch.ones(()) * 7 in y,
    "max": lambda y: y.max(1),
    "unique": lambda y: torch.unique(y),
    "where": lambda y: torch.where(y > 0, y, 0),
    "einsum": lambda y: torch.einsum("nchw->nc", y),
    "isfinite": torch.isfinite,
    "clone": lambda y: y.clone(),
    "bfloat16": lambda y: y.bfloat16(),
    "double": lambda y: y.to(torch.float64),
    "zeros_like": torch.zeros_like,
    "new_zeros": lambda y: y.new_zeros(3),
    "result_type": lambda y: torch.result_type(y, 1),
    "is_tensor": lambda y: (torch.is_tensor(y), isinstance(y, torch.Tensor)),
    "is_parameter": lambda y: isinstance(y, nn.Parameter),
    "requires_grad": lambda y: (y.requires_grad, y.is_leaf, y.grad_fn is None),
    "dlpack": lambda y: torch.from_dlpack(y.detach()),
    "torchscript": scripted,
    "data_ptr": lambda y: torch.equal(y, y) and y.data_ptr() == y.detach().data_ptr() != 0,
    "untyped_storage": lambda y: y.untyped_storage().nbytes(),
    "getitem": lambda y: y[1:, ..., None, 2],
    "iteration": lambda y: [row for row in y],  # noqa: C416 (list() asks for a length too)
    "max pool": lambda y: F.max_pool2d(y, 2),
    "batch norm": lambda y: F.batch_norm(y, None, None, training=True),
    "stack": lambda y: torch.stack((y, y)),
    "cat": lambda y: torch.cat([y, y]),
    "out": lambda y: torch.mul(y.detach(), 2, out=torch.empty(0)),
    "fft": lambda y: torch.fft.rfft(y).abs(),
    "norm": lambda y: torch.linalg.vector_norm(y),
    "vmap": lambda y: torch.vmap(torch.sum)(y),
}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", READERS)
def test_readers_of_a_deferred_tensor(name, grad):
    model = chain_model()
    with torch.set_grad_enabled(grad):
        y, other = model[:3](X), model[:3](X)
    assert isinstance(y, Deferred)
    assert y.requires_grad == grad
    expected = READERS[name](other.values())
    assert_same_kind(READERS[name](y), expected)


@functools.cache
def chain_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    return fused(nn.Sequential(*layers))


def assert_same_kind(actual, expected):
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert not isinstance(actual, Deferred)
        assert actual.requires_grad == expected.requires_grad
        assert_same(actual, expected)
    elif isinstance(expected, list | tuple) and isinstance(expected[0], torch.Tensor):
        assert_same([*actual], [*expected])
    else:
        assert actual == expected


def test_values_are_written_where_they_are_read_only(monkeypatch):
    """Of ResNet-20: the first block's input, and behind the addition of each block."""
    written = []

    def selected(name, device_type):
        written.append(name)
        return select(name, device_type)

    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    model = quantize_model_(ResNet20(), arithmetic="integer").to(memory_format=torch.channels_last)
    fuse_(model, images)
    monkeypatch.setattr(chains, "select", selected)
    model(images)
    assert written.count("map_sums") == 10
    assert written.count("codes_of_sums") == 10


def test_identity_of_a_deferred_tensor():
    y = chain_model()[:2](X)
    known = {y: "y"}
    y.abs()
    F.relu_(y)
    assert known[y] == "y"
    assert hash(y) == id(y)


def test_features_without_gradients_may_require_them():
    model = chain_model()
    with torch.no_grad():
        y = model[:3](X)
    y.requires_grad_()
    assert y.requires_grad
    assert y.is_leaf
    model[3](y).sum().backward()
    assert y.grad.abs().sum() > 0


@pytest.mark.parametrize("steps", [2, 3])
def test_gradients_of_a_tensor_within_a_chain(steps):
    """As ordinary tensors have them."""
    model, part = copy.deepcopy(chain_model()), chain_model()[:steps]
    values = part(X).values().detach().requires_grad_()
    model[steps:](values).square().sum().backward()
    y = part(X)
    y.retain_grad()
    hooked = []
    y.register_hook(hooked.append)
    chain_model()[steps:](y).square().sum().backward()
    for gradient in (y.grad, *hooked):
        torch.testing.assert_close(gradient, values.grad)


def test_gradients_that_are_asked_for():
    y = chain_model()[:3](X)
    loss = chain_model()[3](y).square().sum()
    y.retain_grad()
    loss.backward(retain_graph=True)
    (asked,) = torch.autograd.grad(loss, [y])
    torch.testing.assert_close(asked, y.grad / 2)  # which both have added to, as PyTorch does


def test_a_hook_that_comes_too_late_is_refused():
    y = chain_model()[:2](X)
    y.relu()
    with pytest.raises(RuntimeError, match="a tensor that a chain of fuse_ has gone past"):
        y.register_hook(print)


def test_an_autograd_function_of_what_was_changed_is_refused():
    y = chain_model()[:2](X)
    torch.relu_(y)
    with pytest.raises(RuntimeError, match="give it what the operation returns"):
        Squared.apply(y).sum().backward()


def test_inference_mode():
    model = copy.deepcopy(chain_model())
    model(X)
    model.eval()
    with torch.no_grad():
        expected = plain(model(X))
    with torch.inference_mode():
        assert_same(plain(model(X)), expected)
        y = model[:1](X)
        y.max()
        assert_same(plain(model[1:](y)), expected)


# Hooks.


def replaced(_, args, output):
    return output * 2


def changed_in_place(_, args, output):
    output.mul_(2)


def changed_data(_, args, output):
    output.data.clamp_(-1, 0.5)


@pytest.mark.parametrize("hook", [read, replaced, changed_in_place, changed_data])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_forward_hooks(hook, part):
    """A batch norm behind one that changes something is not exact; it is that of PyTorch."""
    model = copy.deepcopy(chain_model())
    unfused = copy.deepcopy(model)
    for module in unfused:
        module.register_forward_hook(lambda _, args, output: plain(output) * 1)
    for m in (model, unfused):
        m[part].register_forward_hook(hook)
    actual, expected = step(model, X), step(unfused, X)
    if hook is read:
        check_equal(actual, step(copy.deepcopy(chain_model()), X))
        return
    torch.testing.assert_close(actual[0], expected[0])
    torch.testing.assert_close(actual[2], expected[2])
    assert largest_difference(actual[1], expected[1]) < 1e-4


def test_backward_hooks():
    model = copy.deepcopy(chain_model())
    seen = []
    for module in model:
        module.register_full_backward_hook(lambda module, *_: seen.append(module))
    actual, expected = step(model, X), step(copy.deepcopy(chain_model()), X)
    assert seen == [*model][::-1]
    torch.testing.assert_close(actual[0], expected[0])
    assert largest_difference(actual[1], expected[1]) < 1e-4


def test_hooks_of_tensors_that_a_block_returns():
    """As FullyShardedDataParallel has them: called before the backward of the block."""
    model = copy.deepcopy(chain_model())
    order = []

    def before_backward(_, args, output):
        output.register_hook(lambda grad: order.append("gradient"))

    for module in model[:3]:
        module.register_forward_hook(before_backward)
    plain(model(X)).sum().backward()
    assert order == ["gradient"] * 3


# What fuse_ finds, and what it leaves.


def exact_norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, ExactBatchNorm)]


def followed(model):
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    return {name: layer.followed_by for name, layer in layers.items()}


class TwoReaders(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))

    def forward(self, x):
        y = self.conv(x)
        return self.last(F.relu(self.norms[0](y) + self.norms[1](y)))


class OneNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 8, 3) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.last(sum(F.relu(self.norm(conv(x))) for conv in self.convs))


class Fickle(nn.Module):
    """Whose forward depends on its mode, on Python state and on shapes."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.aux, self.calls = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), 0

    def forward(self, x):
        self.calls += 1
        y = self.norm(self.conv(x))
        y = F.relu(y) if self.training or self.calls % 2 else F.gelu(y)
        y = y if x.shape[-1] > 8 else y * 2
        return self.last(y) + (self.aux(y) if self.training else 0)


@pytest.mark.parametrize("make", [TwoReaders, OneNorm])
def test_a_batch_norm_that_is_not_of_one_layer_stays(make):
    model = fused(make())
    assert exact_norms(model) == []
    assert all(found in ("", "ReLU, quantizer") for found in followed(model).values())
    with noisyq_fast.use_backend("reference"):
        expected = step(copy.deepcopy(model), X)
    check_equal(step(model, X), expected)


def test_what_follows_is_named():
    model = fused(stem(Block(8, 8)))
    assert followed(model) == {
        "0": "batch norm, ReLU, quantizer",
        "3.conv1": "batch norm, ReLU, quantizer",
        "3.conv2": "batch norm, addition, ReLU",
        "6": "",
    }


def test_a_convolution_without_batch_norm():
    model = fused(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)))
    assert followed(model) == {"0": "ReLU, quantizer", "2": ""}
    with noisyq_fast.use_backend("reference"):
        expected = step(copy.deepcopy(model), X)
    check_equal(step(model, X), expected)


def test_other_batch_norms_stay():
    class Own(nn.BatchNorm2d):
        pass

    class Synchronized(nn.SyncBatchNorm):
        """As in one process on a GPU."""

        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    for norm in (Synchronized(8), Own(8), nn.InstanceNorm2d(8)):
        model = fused(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3)))
        assert type(model[1]) is type(norm)
        assert followed(model) == {"0": "", "2": ""}
        assert step(model, X)[0].isfinite().all()


def test_a_forward_that_depends_on_its_mode_on_state_and_on_shapes():
    model = fused(Fickle())
    calls = model.calls
    for size, training in ((9, True), (9, False), (7, True), (12, False), (9, False)):
        x = torch.randn(2, 3, size, size)
        other = copy.deepcopy(model.train(training))
        with noisyq_fast.use_backend("reference"):
            expected = step(other, x)
        check_equal(step(model, x), expected)
    assert model.calls == calls + 5


def test_other_shapes_and_memory_formats():
    model = fused(NETWORKS["linear residual, ReLU6"][0]())
    for shape in ((1, 3, 9, 7), (3, 3, 4, 4), (2, 3, 16, 5)):
        x = torch.randn(shape)
        with noisyq_fast.use_backend("reference"):
            expected = step(copy.deepcopy(model), x)
        check_equal(step(model, x), expected)
    unbatched = integer(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), X)
    expected = copy.deepcopy(unbatched)
    fuse_(unbatched, X)
    assert_same(unbatched(X[0]), expected(X[0]))
    assert unbatched.eval()(torch.empty(0, 3, 9, 7)).shape == (0, 4, 5, 3)


class Subclass(torch.Tensor):
    """Such as an image of torchvision."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def test_other_kinds_of_inputs():
    model = chain_model()
    expected = model(X).detach()
    assert_same(model(X.as_subclass(Subclass)).detach(), expected)
    with FlopCounterMode(display=False):
        assert_same(model(X).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_computed_one_by_one(dtype):
    model = integer(NETWORKS["vgg"][0](), X).to(dtype)
    expected = copy.deepcopy(model)
    fuse_(model, X.to(dtype))
    y = model(X.to(dtype))
    assert y.dtype == dtype
    assert_same(y, expected(X.to(dtype)))
    y.float().sum().backward()


def test_autocast_changes_no_forward():
    model = fused(NETWORKS["projection, in place"][0](), first_last_bits=None)
    expected = step(copy.deepcopy(model), X)
    with torch.autocast("cpu", torch.bfloat16):
        actual = step(model, X)
    assert_same(actual[0], expected[0])
    assert_same(actual[2], expected[2])
    assert 1e-4 < largest_difference(actual[1], expected[1]) < 0.1


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


# The example, and undoing.


def test_the_example_moves_nothing():
    model = integer(nn.Sequential(*NETWORKS["vgg"][0](), nn.Dropout(0.5)), X)
    model(X)
    model[3].eval()
    model[0].weight.requires_grad_(False)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.random.get_rng_state()
    names, parameters = [*model.state_dict()], [*model.parameters()]
    fuse_(model, X)
    assert_same(dict(model.state_dict()), dict(state))
    assert_same(torch.random.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert [*model.state_dict()] == names
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert [p.requires_grad for p in parameters] == [False] + [True] * (len(parameters) - 1)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"input": x}])
def test_forms_of_an_example(form):
    model = integer(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)), X)
    assert exact_norms(fuse_(model, form(X))) == ["1"]


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (3, X, TypeError, "model: got int, takes a torch.nn.Module"),
        (nn.Conv2d(3, 3, 1), X, ValueError, "model: got Conv2d without convolutions that compute"),
        (QuantConv2d(3, 3, 1), X, ValueError, "without convolutions that compute in integers"),
        (
            QuantConv2d(3, 3, 1, arithmetic="integer"),
            X[:, :2],
            ValueError,
            "example: the model does not run on it in evaluation: ",
        ),
    ],
)
def test_bad_arguments(model, example, error, message):
    with pytest.raises(error, match=message):
        fuse_(model, example)
    if isinstance(model, QuantLayer):
        assert not model.defers


def test_twice_and_undone():
    model = integer(NETWORKS["vgg"][0](), X)
    unfused = copy.deepcopy(model)
    fuse_(model, X, recompute=True)
    first = step(copy.deepcopy(model), X)
    fuse_(model, X)
    assert not model[0].recomputes
    check_equal(step(copy.deepcopy(model), X), first)
    dequantize_model_(model)
    dequantize_model_(unfused)
    assert [type(m) for m in model.modules()] == [type(m) for m in unfused.modules()]
    assert type(model[1]) is nn.BatchNorm2d
    assert [vars(m).keys() for m in model] == [vars(m).keys() for m in unfused]
    assert_same(model(X), unfused(X))


def test_copies_and_pickles():
    model = fused(NETWORKS["projection, in place"][0]())
    expected = step(copy.deepcopy(model), X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert exact_norms(other) == exact_norms(model)
        check_equal(step(other, X), expected, 1e-7)
    # A copy is of its own: the batch norm belongs to the copied layer.
    assert copy.deepcopy(model)[1].follows[0] is not model[0]


def test_states_are_those_of_unfused_models():
    model = fused(NETWORKS["vgg"][0]())
    other = integer(NETWORKS["vgg"][0](), X)
    model(X)
    other.load_state_dict(model.state_dict())
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(X), other.eval()(X))


def test_frozen_and_disabled_and_calibrated():
    model = fused(NETWORKS["projection, in place"][0]())
    expected = copy.deepcopy(model)
    for layer in expected.modules():
        if isinstance(layer, QuantLayer):
            layer.defers = False
    calibrate(model, [X])
    with disabled(model), disabled(expected):
        torch.testing.assert_close(model.eval()(X), expected.eval()(X))
    freeze_ranges_(model.train())
    ranges = [b.clone() for n, b in model.named_buffers() if "quantizer" in n]
    with noisyq_fast.use_backend("reference"):
        reference = step(copy.deepcopy(model), 3 * X)
    check_equal(step(model, 3 * X), reference)
    assert_same([b for n, b in model.named_buffers() if "quantizer" in n], ranges)


# Graphs.


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("part", [slice(None), slice(1, 3)])
def test_compiled(part):
    """As a whole, and a part that gets and gives tensors of chains."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    model = fused(nn.Sequential(*layers), first_last_bits=None)
    expected = copy.deepcopy(model)
    modules = [*model]
    modules[part] = [torch.compile(nn.Sequential(*modules[part]), backend="aot_eager")]
    actual = step(nn.Sequential(*modules), X)
    expected = step(expected, X)
    assert_same(actual[0], expected[0])
    assert_same([*actual[2].values()], [*expected[2].values()])
    for a, b in zip(actual[1].values(), expected[1].values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_exported_and_functional():
    model = fused(NETWORKS["vgg"][0](), first_last_bits=None)
    model(X)
    model.eval()
    expected = model(X).detach()
    assert_same(torch.export.export(model, (X,)).module()(X).detach(), expected)

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (X,)).square().sum()

    gradients = torch.func.grad(loss)(dict(model.named_parameters()))
    model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)
