"""Converted models under torch.func, torch.compile and torch.export."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap

from noisyq_fast import quantize_model_

pytestmark = pytest.mark.usefixtures("both_arithmetics")

X = torch.randn(3, 4)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.conv = nn.Conv1d(5, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 4, 2, groups=2)
        self.head = nn.Linear(5, 3)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.up(self.conv(x).relu()))


IDS = torch.randint(7, (2, 5))


def make_mlp():
    return quantize_model_(
        nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 2))
    )


def make_net():
    return quantize_model_(Net())


def loss_of(model):
    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    return loss


def expected_gradients(model, x):
    model.zero_grad()
    model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), [(make_mlp, X), (make_net, IDS)])
def test_gradients_by_torch_func(make, x, training):
    model = make()
    model(x)
    model.train(training)
    other = copy.deepcopy(model)
    gradients, value = grad_and_value(loss_of(model))(dict(model.named_parameters()), x)
    expected = expected_gradients(other, x)
    assert value > 0
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])
    for a, b in zip(model.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


def test_other_buffers_by_functional_call():
    model = make_mlp()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    functional_call(model, (dict(model.named_parameters()), buffers), (X,))
    assert buffers["0.input_quantizer.running_absmax"] == X.abs().max()
    assert model[0].input_quantizer.range.isnan()


@pytest.mark.parametrize(("make", "x"), [(make_mlp, X), (make_net, IDS)])
def test_vmap_in_evaluation(make, x):
    model = make()
    model(x)
    model.eval()
    many = torch.stack([x, x.flip(0), x.flip(1)])
    torch.testing.assert_close(vmap(model)(many), torch.stack([model(x) for x in many]))
    gradients = vmap(grad(loss_of(model)), (None, 0))(dict(model.named_parameters()), many)
    for i, part in enumerate(many):
        for name, expected in expected_gradients(model, part).items():
            torch.testing.assert_close(gradients[name][i], expected)


def test_an_ensemble_by_vmap():
    models = [make_mlp() for _ in range(3)]
    for model in models:
        model(X)
        model.eval()
    parameters, buffers = torch.func.stack_module_state(models)
    base = copy.deepcopy(models[0]).to("meta")

    def call(parameters, buffers):
        return functional_call(base, (parameters, buffers), (X,))

    y = vmap(call)(parameters, buffers)
    torch.testing.assert_close(y, torch.stack([model(X) for model in models]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), [(make_mlp, X), (make_net, IDS)])
def test_compiled_in_one_graph(make, x, training):
    model = make()
    model(x)
    eager = copy.deepcopy(model).train(training)
    compiled = torch.compile(model.train(training), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), eager(x))
    gradients = expected_gradients(eager, x)
    model.zero_grad()
    compiled(x).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])
    for a, b in zip(model.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("make", "x"), [(make_mlp, X), (make_net, IDS)])
def test_exported(make, x, training):
    model = make()
    model(x)
    model.train(training)
    program = torch.export.export(model, (x,))
    expected = copy.deepcopy(model)(x)
    torch.testing.assert_close(program.module()(x), expected)
    assert "noisyq" in str(program.graph)
