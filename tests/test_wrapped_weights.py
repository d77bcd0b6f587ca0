"""Weights that something makes before each forward: a layer quantizes what it then has."""

import copy
import functools
import threading
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from noisyq_fast import (
    GroupedLinear,
    QuantLayer,
    QuantLinear,
    dequantize_model_,
    fake_quantize,
    quantize,
    quantize_model_,
)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Wrapping(NamedTuple):
    add: object
    remove: object


def remove_parametrization(layer):
    parametrize.remove_parametrizations(layer, "weight")


WRAPPINGS = {
    "prune": Wrapping(
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.remove(layer, "weight"),
    ),
    "weight_norm": Wrapping(nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": Wrapping(nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "parametrized weight_norm": Wrapping(parametrizations.weight_norm, remove_parametrization),
    "parametrized spectral_norm": Wrapping(parametrizations.spectral_norm, remove_parametrization),
    "two parametrizations": Wrapping(
        lambda layer: [
            parametrize.register_parametrization(layer, "weight", Doubled()) for _ in range(2)
        ],
        remove_parametrization,
    ),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning"),
    pytest.mark.usefixtures("both_arithmetics"),
]


def make_model():
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def converted(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return quantize_model_(model, 3, 5, first_last_bits=None, **options)


def wrapped(wrapping, first):
    """A converted model whose layer 2 is wrapped, before or after the conversion."""
    model = make_model()
    if first:
        wrapping.add(model[2])
    converted(model)
    if not first:
        wrapping.add(model[2])
    return model


def quantized_linear(x, layer, weight):
    if layer.arithmetic == "float":
        return F.linear(fake_quantize(x, 5), fake_quantize(weight, 3, axis=0), layer.bias)
    (codes, scale), (weight_codes, weight_scale) = quantize(x, 5), quantize(weight, 3, axis=0)
    sums = codes.double() @ weight_codes.double().T
    return sums.float() * (scale * weight_scale) + layer.bias


def record_weights(layer):
    """The weights that its quantizer gets."""
    quantizer, weights = layer.weight_quantizer, []
    quantizer.register_forward_pre_hook(lambda _, args: weights.extend(args))
    codes = quantizer.codes
    quantizer.codes = lambda weight: (weights.append(weight), codes(weight))[1]
    return weights


def check_steps(model):
    """Layer 2 computes with its weight of the step, which learns, also after an evaluation."""
    layer, calls = model[2], []
    weights = record_weights(layer)
    layer.register_forward_hook(lambda _, args, y: calls.append((*args, y)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trained = {name: p for name, p in layer.named_parameters() if "weight" in name}
    seen = []
    for step in range(4):
        if step % 2:
            with torch.no_grad():
                model.eval()(torch.randn(4, 5))
        model.train()(torch.randn(4, 5)).square().sum().backward()
        (x, y), weight = calls[-1], weights[-1]
        assert torch.equal(y, quantized_linear(x, layer, weight))
        assert all(p.grad.abs().sum() > 0 for p in trained.values()), [*trained]
        seen.append(weight.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    assert not any(map(torch.equal, seen, seen[1:]))


@pytest.mark.parametrize("first", [True, False], ids=["then converted", "after conversion"])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_the_weight_of_the_step_is_quantized(name, first):
    check_steps(wrapped(WRAPPINGS[name], first))


@pytest.mark.parametrize("dequantized_first", [True, False])
@pytest.mark.parametrize("first", [True, False], ids=["then converted", "after conversion"])
@pytest.mark.parametrize("name", WRAPPINGS)
def test_wrapping_and_conversion_are_undone_in_any_order(name, first, dequantized_first):
    model = wrapped(WRAPPINGS[name], first)
    x = torch.randn(4, 5)
    model(x)
    weight = model.eval()[2].weight.detach().clone()
    undo = [lambda: dequantize_model_(model), lambda: WRAPPINGS[name].remove(model[2])]
    for part in undo if dequantized_first else undo[::-1]:
        part()
        if isinstance(model[2], QuantLayer):
            check_steps(copy.deepcopy(model))
        model(x)
    assert type(model[2]) is nn.Linear
    assert model.state_dict().keys() == make_model().state_dict().keys()
    assert torch.equal(model[2].weight, weight)
    make_model().load_state_dict(model.state_dict())


@pytest.mark.parametrize("name", WRAPPINGS)
def test_what_is_wrapped_stays_so_in_float(name):
    model = wrapped(WRAPPINGS[name], first=True)
    keys = [key for key in model.state_dict() if "_quantizer." not in key]
    dequantize_model_(model)
    assert [*model.state_dict()] == keys
    quantize_model_(model, 3, 5, first_last_bits=None)
    check_steps(model)


def test_other_layers_and_axes():
    for layer, shape in (
        (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
        (nn.Embedding(7, 4), None),
    ):
        parametrizations.weight_norm(layer, dim=1)
        converted(layer)
        y = layer(torch.randint(7, (9,)) if shape is None else torch.randn(shape))
        y.square().sum().backward()
        for parameter in layer.parametrizations.weight.parameters():
            assert parameter.grad.abs().sum() > 0


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return 3 * weight


def test_a_weight_is_made_once_in_each_forward():
    ids, x = torch.tensor([0, 2]), torch.randn(3, 2, 4)
    for layer, name, args in (
        (nn.Embedding(3, 4, max_norm=0.5), "weight", (ids,)),
        (nn.Conv1d(2, 4, 3), "weight", (x,)),
        (nn.ConvTranspose1d(2, 4, 3, groups=2), "weight", (x,)),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", (x, x, x)),
        (nn.MultiheadAttention(4, 2, kdim=4, vdim=4), "in_proj_weight", (x, x, x)),
        (GroupedLinear(2, 4, 3), "weight", (x,)),
    ):
        counted = Counted()
        parametrize.register_parametrization(layer, name, counted)
        quantize_model_(layer)
        before = counted.calls
        y = layer(*args)
        assert counted.calls == before + 1
        if isinstance(layer, nn.Embedding):
            assert (y.norm(dim=-1) < 0.51).all()


def test_a_parametrized_layer_can_be_copied():
    for first in (True, False):
        model = wrapped(WRAPPINGS["two parametrizations"], first)
        x = torch.randn(4, 5)
        assert torch.equal(copy.deepcopy(model)(x), model(x))


# A weight that is elsewhere between forwards.


def offload(layer):
    """Leaves the layer without memory for its parameters, except during its forward."""
    kept = {name: p.detach().clone() for name, p in layer.named_parameters(recurse=False)}

    def load(*_):
        for name, value in kept.items():
            setattr(layer, name, nn.Parameter(value))

    def free(*_):
        for name, value in kept.items():
            setattr(layer, name, nn.Parameter(value.to("meta")))

    layer.register_forward_pre_hook(load)
    layer.register_forward_hook(free)
    free()


@pytest.mark.parametrize("first", [True, False])
def test_offloaded_weights(first):
    model = make_model()
    expected = converted(copy.deepcopy(model))
    if not first:
        converted(model)
    for i in (0, 2, 4):
        offload(model[i])
    if first:
        converted(model)
    x = torch.randn(4, 5)
    for training in (True, False):
        y = model.train(training)(x)
        assert torch.equal(y, expected.train(training)(x))
    assert model[2].weight.is_meta
    assert model[2].input_quantizer.range == expected[2].input_quantizer.range


def test_a_forward_that_is_replaced_after_conversion():
    model = converted(make_model())
    expected = copy.deepcopy(model)
    layer = model[2]
    value, old = layer.weight.detach().clone(), layer.forward
    layer.weight = nn.Parameter(value.to("meta"))

    def forward(layer, *args):
        layer.weight = nn.Parameter(value)
        return old(*args)

    layer.forward = functools.partial(forward, layer)
    x = torch.randn(4, 5)
    assert torch.equal(model(x), expected(x))


def test_a_replaced_layer_and_a_replaced_weight():
    model = converted(make_model())
    x = torch.randn(4, 5)
    model(x)
    model[2] = nn.Linear(6, 6)
    model.to(torch.bfloat16).float()
    y = model(x)
    hidden = model[:2](x)
    assert torch.equal(model[2](hidden), F.linear(hidden, model[2].weight, model[2].bias))
    assert torch.equal(model[3:](model[2](hidden)), y)
    model[0].weight = nn.Parameter(torch.randn(6, 5))
    assert torch.equal(model[0](x), quantized_linear(x, model[0], model[0].weight))


class ChangesWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.add_(1)
        return self.layer(x)


def test_a_weight_that_is_changed_inside_the_forward():
    model = converted(ChangesWeight())
    x = torch.randn(3, 4)
    for _ in range(2):
        before = model.layer.weight.detach().clone()
        assert torch.equal(model(x), quantized_linear(x, model.layer, before + 1))


def test_evaluation_in_another_thread_takes_no_gradient():
    model = converted(make_model())
    x = torch.randn(4, 5)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            inside.set()
            assert go_on.wait(10)

    model[1].register_forward_hook(wait)

    @torch.no_grad()
    def evaluate():
        model(x)

    thread = threading.Thread(target=evaluate)
    thread.start()
    assert inside.wait(10)  # in the middle of its forward
    model(x).square().sum().backward()
    go_on.set()
    thread.join()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_forward_leaves_nothing_behind(error):
    model = converted(make_model())
    x = torch.randn(4, 5)

    def interrupt(*_):
        raise error

    hook = model[3].register_forward_hook(interrupt)
    with pytest.raises(error):
        model(x)
    hook.remove()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model[0], copied[0]):
            layer.weight.mul_(-3)
    y = copied(x)
    assert torch.equal(y, model(x))
    assert torch.equal(copied[0](x), quantized_linear(x, copied[0], copied[0].weight))
    y.sum().backward()
    assert copied[2].weight.grad.abs().sum() > 0


def test_layers_by_hand_are_wrapped_too():
    layer = parametrizations.weight_norm(QuantLinear(4, 3))
    layer(torch.randn(2, 4)).sum().backward()
    assert dequantize_model_(layer).weight.shape == (3, 4)
    remove_parametrization(layer)
    assert type(layer) is nn.Linear
