"""Quantizers by themselves: what they compute, record, tell and refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from noisyq_fast import (
    AbsMax,
    MovingAbsMax,
    Quantizer,
    QuantLayer,
    QuantLinear,
    fake_quantize,
    quantize,
    quantize_model_,
)

X = torch.randn(6, 4)


def test_absmax():
    for axis in (None, 0, -1):
        quantizer = AbsMax(3, axis)
        assert torch.equal(quantizer(X), fake_quantize(X, 3, axis))
        codes = quantizer.codes(X)
        made = codes.codes, codes.scale
        for actual, expected in zip(made, quantize(X, 3, axis), strict=True):
            assert torch.equal(actual, expected)
        assert torch.equal(quantizer.eval()(X), fake_quantize(X, 3, axis))
    assert list(quantizer.buffers()) == []


@pytest.mark.parametrize("axis", [None, 1])
def test_moving_absmax(axis):
    quantizer = MovingAbsMax(3, axis, None if axis is None else 4, averaging_constant=0.25)
    assert quantizer.range.isnan().all()
    expected = None
    for factor in (1, 3, 2):
        x = factor * torch.randn(6, 4)
        assert torch.equal(quantizer(x), fake_quantize(x, 3, axis))
        absmax = x.abs().amax(() if axis is None else 0)
        absmax = x.abs().max() if axis is None else absmax
        expected = absmax if expected is None else expected + 0.25 * (absmax - expected)
        torch.testing.assert_close(quantizer.range, expected)
    quantizer.eval()
    before = quantizer.range.clone()
    top = 3 * torch.ones(6, 4) * (before / 3)
    torch.testing.assert_close(quantizer(100 * top), top)
    assert torch.equal(quantizer.range, before)


def test_the_clipped_estimator():
    for ste, expected in (("identity", [1, 1]), ("clipped", [1, 0])):
        quantizer = MovingAbsMax(4, ste=ste).eval()
        quantizer.set_range(1.0)
        x = torch.tensor([0.5, 3.0], requires_grad=True)
        quantizer(x).sum().backward()
        assert x.grad.tolist() == expected


def test_disabled_reset_and_set():
    quantizer = MovingAbsMax(4)
    quantizer.enabled = False
    assert quantizer(X) is X
    assert quantizer.range.isnan()
    quantizer.enabled = True
    quantizer(X)
    quantizer.reset()
    assert quantizer.range.isnan()
    quantizer.set_range(torch.tensor(2.5))
    assert quantizer.range == 2.5
    quantizer = MovingAbsMax(4, axis=0, ranges=2)
    quantizer.set_range(torch.tensor([1.0, 2.0]))
    assert quantizer.range.tolist() == [1, 2]


def test_a_copy_of_its_own():
    quantizer = MovingAbsMax(4, averaging_constant=0.5, ste="clipped")
    quantizer(X)
    other = quantizer.like(bits=6)
    assert (other.bits, other.averaging_constant, other.ste) == (6, 0.5, "clipped")
    assert other.range.isnan()
    assert quantizer.bits == 4
    assert quantizer.range > 0
    with pytest.raises(ValueError, match=r"bits: got 9, takes 2..8"):
        quantizer.like(bits=9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AbsMax(9), ValueError, r"bits: got 9, takes 2..8"),
        (lambda: AbsMax(4.0), TypeError, "bits: got 4.0"),
        (lambda: AbsMax(4, "0"), TypeError, "axis: got '0'"),
        (lambda: MovingAbsMax(1), ValueError, r"bits: got 1, takes 2..8"),
        (lambda: MovingAbsMax(4, axis=1), ValueError, "ranges: got None with axis 1, takes both"),
        (lambda: MovingAbsMax(4, ranges=1), ValueError, "ranges: got 1 with axis None, takes both"),
        (lambda: MovingAbsMax(averaging_constant=2), ValueError, "averaging_constant: got 2"),
        (lambda: MovingAbsMax(ste="no"), ValueError, "ste: got 'no'"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Halved(Quantizer):
    """A quantizer of one's own, which learns."""

    def __init__(self):
        super().__init__(4)
        self.step = nn.Parameter(torch.ones(()))

    def fake_quantize(self, x):
        return x * self.step / 2

    def reset(self):
        self.step.data.fill_(1)


def test_a_quantizer_of_ones_own():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    quantize_model_(model, weight=Halved(), activation=Halved())
    assert len({id(m) for m in model.modules() if isinstance(m, Halved)}) == 6
    assert [layer.weight_bits for layer in model] == [8, 4, 8]
    assert len(list(model.parameters())) == 12
    y = model(X)
    expected = X
    for layer in model:
        expected = F.linear(expected / 2, layer.weight / 2, layer.bias)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert model[1].weight_quantizer.step.grad is not None
    other = quantize_model_(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    with pytest.raises(RuntimeError, match=r"1\.weight_quantizer: .*another kind of quantizer"):
        other.load_state_dict(model.state_dict())


def test_overrides_of_quantizers():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
    overrides = {
        "1": {"weight": AbsMax(5, axis=None)},
        "2": {"activation": None, "weight_bits": 2},
        "3": {"weight": AbsMax(3)},
    }
    quantize_model_(model, weight=AbsMax(6), overrides=overrides)
    widths = [(layer.weight_bits, layer.activation_bits) for layer in model]
    assert widths == [(8, 8), (5, 4), (2, None), (3, 8)]
    assert model[1].weight_quantizer.axis is None


# Activation checkpointing runs a forward twice.


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("sync", [True, False])
def test_activation_checkpointing_records_once(reentrant, sync):
    torch.manual_seed(0)
    model = quantize_model_(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    other = copy.deepcopy(model)
    if sync:  # as if there were other ranks, with the same batch
        for module in other.modules():
            if isinstance(module, MovingAbsMax):
                module.range_of_ranks = lambda x, axis: x.detach().abs().max()
    for factor in (1, 5):
        x = factor * torch.randn(6, 4)
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        plain = model(inputs[0])
        again = other[2](checkpoint(other[:2], inputs[1], use_reentrant=reentrant))
        assert torch.equal(plain, again)
        plain.square().sum().backward()
        again.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
        for a, b in zip(model.buffers(), other.buffers(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_attention(reentrant):
    attention = quantize_model_(nn.MultiheadAttention(4, 2))
    other = copy.deepcopy(attention)
    x = torch.randn(5, 2, 4)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    plain = attention(*3 * [inputs[0]])[0]
    again = checkpoint(other, *3 * [inputs[1]], use_reentrant=reentrant)[0]
    for y in (plain, again):
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(attention.buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b)


# Errors say where.


def test_errors_name_the_layer():
    model = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.MultiheadAttention(4, 2)
    )
    quantize_model_(model)
    with pytest.raises(TypeError, match=r"^1\.0\.input_quantizer: x: got torch.float64, takes"):
        model[1](X.double())
    with pytest.raises(TypeError, match=r"^2\.key_quantizer: x: got torch.float64"):
        model[2](X, X.double(), X)
    with pytest.raises(
        ValueError,
        match=r"^1\.0\.input_quantizer: .*no batch was seen.*: call the model on a batch in",
    ):
        model.eval()[1](X)
    model.train().double()
    with pytest.raises(TypeError, match=r"^0\.input_quantizer: x: got torch.float64"):
        model[:1](X.double())
    with pytest.raises(TypeError, match=r"^x: got torch.float64"):
        QuantLinear(4, 4)(X.double())
    layer = quantize_model_(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"^input_quantizer: x: got torch.float64"):
        layer(X.double())


def test_a_shape_that_does_not_fit_is_an_error_of_pytorch():
    model = quantize_model_(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(2, 5))


def test_names_and_modes_of_quantizers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[0].train()
    quantize_model_(model)
    assert model[0].input_quantizer.training
    assert not model[1].input_quantizer.training
    assert isinstance(model[0], QuantLayer)
    assert model[1].weight_quantizer.name == "1.weight_quantizer"
