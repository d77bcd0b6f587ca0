"""fuse_: what it finds and leaves in a model, how the model is used then, and undoing it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from assert_same import assert_same
from fused_networks import (
    NETWORKS,
    Block,
    X,
    chain_model,
    check_equal,
    fused,
    integer,
    largest_difference,
    plain,
    read,
    stem,
    step,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import noisyq_fast
from noisyq_fast import (
    QuantConv2d,
    QuantLayer,
    calibrate,
    dequantize_model_,
    disabled,
    freeze_ranges_,
    fuse_,
)
from noisyq_fast.integer.batch_norm import ExactBatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:layer .* is called several times")


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
    class Synchronized(nn.SyncBatchNorm):
        """As in one process on a GPU."""

        def forward(self, x):
            return F.batch_norm(x, None, None, training=True)

    for norm in (Synchronized(8), nn.InstanceNorm2d(8)):
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
