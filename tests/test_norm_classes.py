"""fuse_ with subclasses of batch norms: each keeps its own forward, and is exact within it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from assert_same import assert_same
from torch import nn

import noisyq_fast
from noisyq_fast import (
    LSQ,
    AbsMax,
    IntegerOnly,
    ManyWidths,
    MovingAbsMax,
    dequantize_model_,
    freeze_weights_,
    fuse_,
    load_integers,
    quantize_model_,
    save_integers,
    split_norms_,
)
from noisyq_fast.calibration.post_training import PostTraining
from noisyq_fast.integer.batch_norm import ExactBatchNorm
from noisyq_fast.integer.fusing import unfuse_
from noisyq_fast.running import tensors_in

X = torch.randn(4, 3, 6, 5)


class Same(nn.BatchNorm2d):
    """Without a forward of its own."""


class Called(nn.BatchNorm2d):
    """The forward of the base class, and an activation."""

    def forward(self, x):
        return F.relu(super().forward(x))


class Written(nn.BatchNorm2d):
    """Calls the function as PyTorch does; then a dropout and an activation in place."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        keeps = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            factor,
            self.eps,
        )
        return self.act(self.drop(x))


class Smooth(Written):
    """With another activation, which a chain does not have."""

    def __init__(self, channels, **options):
        super().__init__(channels, **options)
        self.act = nn.SiLU(inplace=True)


class Synchronized(nn.SyncBatchNorm):
    """In one process a batch norm, on the CPU too."""

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)


CLASSES = [Same, Called, Written, Smooth]
ACTIVATIONS = {Same: nn.ReLU, Called: nn.Identity, Written: nn.Identity, Smooth: nn.Identity}


def network(norm, **options):
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), norm(8, **options), ACTIVATIONS.get(norm, nn.ReLU)()),
        *(nn.Conv2d(8, 8, 3, bias=False), norm(8, **options), ACTIVATIONS.get(norm, nn.ReLU)()),
        *(nn.Conv2d(8, 4, 1), nn.Flatten(), nn.LazyLinear(5)),
    )


def quantized(model, **options):
    model(X)
    model = fuse_(quantize_model_(model, arithmetic="integer", example=X), X, **options)
    model(X)  # sets the ranges
    return model


def pytorchs(norm, **options):
    """The same network of PyTorch's batch norms and functions."""
    model = network(nn.BatchNorm2d, **options)
    if norm is Smooth:
        model[2], model[5] = nn.SiLU(), nn.SiLU()
    return model


def step(model, x=X):
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters()}, model.state_dict()


def check_equal(actual, expected):
    assert_same(actual[0], expected[0])
    for a, b in zip(actual[1:], expected[1:], strict=True):
        assert a.keys() == b.keys()
        assert_same([*a.values()], [*b.values()])


def exact_norms(model):
    return [name for name, m in model.named_modules() if isinstance(m, ExactBatchNorm)]


@pytest.mark.parametrize(("norm", "recompute"), [*((n, False) for n in CLASSES), (Written, True)])
def test_equal_to_those_of_pytorch(norm, recompute):
    model = quantized(network(norm), recompute=recompute)
    expected = quantized(pytorchs(norm), recompute=recompute)
    assert exact_norms(model) == ["1", "4"]
    assert model[3].followed_by.startswith("batch norm")
    for _ in range(2):
        check_equal(step(model), step(expected))
    assert_same(model.eval()(X), expected.eval()(X))


@pytest.mark.parametrize(
    "options",
    [{"momentum": None}, {"momentum": 0.0}, {"affine": False}, {"track_running_stats": False}],
)
@pytest.mark.parametrize("norm", [Called, Written])
def test_options_of_batch_norms(norm, options):
    model, expected = quantized(network(norm, **options)), quantized(pytorchs(norm, **options))
    assert exact_norms(model) == ["1", "4"]
    for _ in range(3):
        check_equal(step(model), step(expected))
    assert_same(model.eval()(X), expected.eval()(X))
    for norms in (model, expected):
        norms[1].train()
        norms[4].track_running_stats = False
    check_equal(step(model.train()), step(expected.train()))


class FrozenBatchNorm2d(nn.Module):
    """A stand-in for the class of torchvision."""

    __module__ = "torchvision.ops.misc"

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def test_frozen_batch_norms_of_torchvision():
    model, expected = quantized(network(FrozenBatchNorm2d)), quantized(network(nn.BatchNorm2d))
    assert exact_norms(model) == ["1", "4"]
    for i in (1, 4):
        state = {name: torch.rand(8) + 0.5 for name in model[i].state_dict()}
        model[i].load_state_dict(state)
        expected[i].load_state_dict(state, strict=False)
        expected[i].requires_grad_(False)
    for training in (True, False):
        for each in (model, expected):
            each.train(training)
            if training:
                noisyq_fast.reset_ranges_(each)
        expected[1].eval()
        expected[4].eval()
        actual, (y, gradients, _) = step(model), step(expected)
        assert_same(actual[0], y)
        assert_same([*actual[1].values()], [g for g in gradients.values() if g is not None])
    exported = torch.export.export(model, (X,)).module()
    assert_same(exported(X).detach(), model(X).detach())
    assert exact_norms(copy.deepcopy(model)) == ["1", "4"]
    dequantize_model_(model)
    assert type(model[1]) is FrozenBatchNorm2d


class Doubled(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


class WithInput(nn.BatchNorm2d):
    def forward(self, x):
        return x + super().forward(x)


class Halves(nn.BatchNorm2d):
    def forward(self, x):
        return torch.cat([super(Halves, self).forward(half) for half in x.split(2)])


class OtherWeight(nn.BatchNorm2d):
    def forward(self, x):
        others = self.running_mean, self.running_var, 1 + self.weight, self.bias
        return F.batch_norm(x, *others, self.training, self.momentum, self.eps)


class OtherEps(nn.BatchNorm2d):
    def forward(self, x):
        others = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *others, self.training, self.momentum)


class OtherMomentum(Written):
    def forward(self, x):
        others = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *others, self.training, eps=self.eps)


class Frozen(nn.BatchNorm2d):
    def forward(self, x):
        others = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *others, eps=self.eps)


OTHERS = {
    **{norm: {} for norm in (Doubled, WithInput, Halves, OtherWeight, Frozen)},
    OtherEps: {"eps": 0.1},
    OtherMomentum: {"momentum": 0.2},
    Synchronized: {},
}


@pytest.mark.parametrize("norm", OTHERS)
def test_other_forwards_stay(norm):
    model = quantized(network(norm, **OTHERS[norm]))
    assert exact_norms(model) == []
    assert type(model[1]) is norm
    unfused = copy.deepcopy(model)
    unfuse_(unfused)
    check_equal(step(model), step(unfused))


def test_a_parametrized_batch_norm_stays():
    norm = nn.utils.parametrizations.weight_norm(nn.BatchNorm2d(8), dim=None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 4, 1))
    assert exact_norms(quantized(model)) == []


@pytest.mark.parametrize("norm", CLASSES)
def test_names_copies_and_files(norm, tmp_path):
    model = network(norm)
    model(X)
    names, classes = [*model.state_dict()], [type(module) for module in model]
    model = quantized(model)
    assert [n for n in model.state_dict() if "quantizer" not in n] == names
    expected = step(copy.deepcopy(model))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert exact_norms(other) == ["1", "4"]
        check_equal(step(other), expected)
    model.eval()
    save_integers(model, tmp_path / "model")
    loaded = network(norm)
    loaded(X)
    loaded = load_integers(loaded, tmp_path / "model")
    assert exact_norms(loaded) == ["1", "4"]
    assert_same(loaded(X), model(X))
    assert_same(freeze_weights_(model)(X), loaded(X))
    dequantize_model_(model)
    assert [type(module) for module in model] == classes


@pytest.mark.parametrize("norm", [Called, Written])
def test_hooks_see_values(norm):
    model, seen = quantized(network(norm)), []
    expected = step(copy.deepcopy(model))
    model[1].register_forward_hook(lambda module, args, y: seen.extend([args[0] + 0, y + 0]))
    assert_same(step(model)[0], expected[0])
    plain = norm(8)
    plain.load_state_dict(model[1].state_dict())
    torch.testing.assert_close(plain(seen[0]), seen[1])


@pytest.mark.parametrize("norm", [Same, Written])
def test_batch_norms_of_widths(norm):
    model = split_norms_(network(norm), [4, 2])
    model(X)
    weight, activation = (ManyWidths(q(4), [4, 2]) for q in (AbsMax, MovingAbsMax))
    options = {"weight": weight, "activation": activation, "arithmetic": "integer"}
    model = fuse_(quantize_model_(model, example=X, **options), X)
    assert len(exact_norms(model)) == 4
    with noisyq_fast.set_bits(model, 2):
        assert step(model)[0].isfinite().all()


@pytest.mark.parametrize("norm", [Called, Written])
def test_graphs(norm):
    model = quantized(network(norm))
    evaluated = copy.deepcopy(model).eval()
    expected = evaluated(X).detach()
    exported = torch.export.export(evaluated, (X,)).module()
    assert_same(exported(X).detach(), expected)

    compiled = copy.deepcopy(model)
    y = torch.compile(compiled, backend="aot_eager", fullgraph=True)(X)
    parts = [*copy.deepcopy(model)]
    parts[1:3] = [torch.compile(nn.Sequential(*parts[1:3]), backend="aot_eager")]
    of_parts = nn.Sequential(*parts)(X)
    expected = model(X).detach()
    assert_same([y.detach(), of_parts.detach()], [expected, expected])
    assert_same([*compiled.state_dict().values()], [*model.state_dict().values()])


class Twice(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(super().forward(x))


class Scaled(nn.BatchNorm2d):
    factor = None

    def forward(self, x):
        return super().forward(x if self.factor is None else x * self.factor)


def test_what_normalizes_twice_is_not_exact():
    model = quantized(network(Twice)).eval()
    assert not isinstance(model[1], ExactBatchNorm)
    exported = torch.export.export(model, (X,)).module()
    assert_same(exported(X).detach(), model(X).detach())


def test_another_input_in_a_graph_is_refused():
    model = quantized(network(Scaled)).eval()
    assert isinstance(model[1], ExactBatchNorm)
    exported = torch.export.export(model, (X,)).module()
    assert_same(exported(X).detach(), model(X).detach())
    model[1].factor = 0.5
    model(X)
    with pytest.raises(ValueError, match="its input"):
        torch.export.export(model, (X,), strict=False)


def test_another_call_in_a_graph_is_refused():
    model = quantized(network(Written)).eval()
    model[1].eps = 0.5
    expected = model(X)
    exported = torch.export.export(model, (X,)).module()
    assert_same(exported(X).detach(), expected.detach())

    class Switch(Written):
        frozen = False

        def forward(self, x):
            if not self.frozen:
                return super().forward(x)
            return F.batch_norm(x, self.running_mean, self.running_var, eps=self.eps)

    model = quantized(network(Switch)).eval()
    assert exact_norms(model) == ["1", "4"]
    model[1].frozen = True
    unfused = copy.deepcopy(model)
    unfuse_(unfused)
    torch.testing.assert_close(model(X), unfused(X))
    with pytest.raises(ValueError, match="Switch: got a call of batch_norm with other arguments"):
        torch.export.export(model, (X,), strict=False)


class Reads(nn.Module):
    """Whose convolution may be read by a batch norm and by something else."""

    def __init__(self, read):
        super().__init__()
        self.conv, self.norm, self.read = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), read
        self.other, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return self.read(self, self.conv(x))

    def after(self, y):
        return self.last(F.relu(y))


READS = {
    "addition": lambda self, y: self.after(y + self.norm(y)),
    "addition, other side": lambda self, y: self.after(self.norm(y) + y),
    "addition in place": lambda self, y: self.after(y.add_(self.norm(y))),
    "quantizer": lambda self, y: self.after(self.other(y) + self.norm(y)),
    "ReLU": lambda self, y: self.after(self.other(F.relu(y)) + self.norm(y)),
    "mean": lambda self, y: self.after(y.mean((2, 3), keepdim=True) + self.norm(y)),
    "output": lambda self, y: (self.after(self.norm(y)), {"features": y}),
    "output in evaluation": lambda self, y: self.after(self.norm(y)) if self.training else y,
    "batch norm": lambda self, y: self.after(self.norm(y) + self.norm(y)),
}


@pytest.mark.filterwarnings("ignore:quantized layers")
@pytest.mark.parametrize("activation", [MovingAbsMax(4), LSQ(4, signed=True)])
@pytest.mark.parametrize("read", READS)
def test_sums_with_another_reader_in_graphs(read, activation):
    options = {"arithmetic": "integer", "first_last_bits": None, "activation": activation}
    model = fuse_(quantize_model_(Reads(READS[read]), **options), X)
    assert exact_norms(model) == []
    model(X)
    expected = tensors_in(model.eval()(X))
    exported = torch.export.export(model, (X,)).module()
    assert_same([y.detach() for y in tensors_in(exported(X))], [y.detach() for y in expected])


class Auxiliary(nn.Module):
    """With a head that is there in training only."""

    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
            for _ in range(2)
        )

    def forward(self, x):
        return sum(head(x) for head in self.heads[: 2 if self.training else 1])


def test_a_head_that_is_there_in_training_only():
    model = quantized(Auxiliary())
    assert exact_norms(model) == ["heads.0.1", "heads.1.1"]
    compiled = copy.deepcopy(model)
    y = torch.compile(compiled, backend="aot_eager")(X)
    assert_same(y.detach(), model(X).detach())


@pytest.mark.parametrize("norm", [Same, Called, Written, Smooth, Doubled, OtherWeight])
def test_post_training_keeps_what_a_subclass_does(norm):
    model = network(norm)
    model(X)
    model.eval()
    folded = PostTraining(model, [X], {}).float
    is_plain = norm is Same
    assert isinstance(folded[1], nn.Identity) == is_plain
    torch.testing.assert_close(folded(X), model(X))


def test_integers_alone_of_subclasses():
    model = quantized(network(Same)).eval()
    integers = IntegerOnly(model, X)
    torch.testing.assert_close(integers(X), model(X), atol=0.05, rtol=0)
    for norm in (Called, Written, OtherEps):
        model = quantized(network(norm, eps=0.1)).eval()
        with pytest.raises(ValueError, match=f"layer '1': a {norm.__name__} does more than"):
            IntegerOnly(model, X)
