"""Networks whose integer layers `fuse_` joins to chains, and steps in training to compare."""

import functools
import warnings

import torch
import torch.nn.functional as F
from assert_same import assert_same
from torch import nn

from noisyq_fast import fuse_, quantize_model_
from noisyq_fast.integer.deferred import Deferred


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
X = torch.randn(IMAGES, generator=torch.Generator().manual_seed(3))
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


def read(_, args, output):
    """A hook that reads: then nothing goes on in a chain but the batch norm."""
    output.abs().max()


@functools.cache
def chain_model():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)]
    return fused(nn.Sequential(*layers))
