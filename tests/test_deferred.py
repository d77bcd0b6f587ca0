"""Whatever reads a tensor of a chain gets what it would get of its values."""

import copy
import functools
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from assert_same import assert_same
from fused_networks import X, chain_model, check_equal, fused, plain, step
from torch import nn
from torch.utils.checkpoint import checkpoint

from experiments.models import ResNet20
from noisyq_fast import fuse_, quantize_model_
from noisyq_fast.backends import select
from noisyq_fast.integer import chain as chains
from noisyq_fast.integer.deferred import Deferred

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is called several times")


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


def test_another_default_device():
    def outputs():
        model = copy.deepcopy(chain_model())
        y = plain(model(X))
        y.square().sum().backward()
        return y.detach(), [p.grad for p in model.parameters()], plain(model.eval()(X)).detach()

    expected = outputs()
    with torch.device("meta"):
        found = outputs()
    assert_same(found, expected)
