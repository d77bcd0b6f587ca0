"""Quantizers that learn, in layers and models: where they begin, what they keep, how they train."""

import copy
import math

import pytest
import torch
from assert_same import assert_same
from torch import nn
from torch.utils.checkpoint import checkpoint

import noisyq_fast
from noisyq_fast import (
    AQD,
    DSQ,
    LSQ,
    PACT,
    QIL,
    SAT,
    AbsMax,
    LearnedQuantizer,
    MovingAbsMax,
    QuantConvTranspose2d,
    QuantLinear,
    calibrate,
    constrain_,
    disabled,
    freeze_ranges_,
    fuse_,
    parameter_groups,
    quantize_model_,
    reset_ranges_,
    summary,
    use_backend,
)
from noisyq_fast.backends import BACKENDS

pytestmark = pytest.mark.usefixtures("both_arithmetics")

X = torch.rand(4, 3, 8, 8)
PAIRS = {
    "lsq": (LSQ(4), LSQ(4)),
    "lsq2": (LSQ(2, axis=0), LSQ(2)),
    "pact": (SAT(4), PACT(4)),
    "pact centered": (
        SAT(3, rounding="centered", rescale=False),
        PACT(3, start=0.5, gradient="pact"),
    ),
    "pact original": (SAT(2, rounding="original"), PACT(2, start=3.0)),
    "aqd": (AQD(4), AQD(4)),
    "aqd standardized": (AQD(3, standardize=True), AQD(3)),
    "qil": (QIL(4), QIL(4)),
    "qil2": (QIL(2), QIL(2)),
    "dsq": (DSQ(4), DSQ(4)),
    "mixed": (AbsMax(4), LSQ(3)),
}


def model(pair):
    weight, activation = PAIRS[pair]
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)]
    layers += [nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)]
    return quantize_model_(nn.Sequential(*layers), weight=weight, activation=activation)


def learned(model):
    return [m for m in model.modules() if isinstance(m, LearnedQuantizer)]


def trained(model, steps=3, rate=0.01):
    optimizer = torch.optim.SGD(parameter_groups(model, rate), lr=0.05)
    constrain_(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    return model


# What stands where.


def test_ends_have_8_bits_and_take_values_below_0():
    net = model("lsq")
    widths = [(layer.weight_bits, layer.activation_bits) for layer in (net[0], net[3], net[7])]
    assert widths == [(8, 8), (4, 4), (8, 8)]
    signs = [layer.input_quantizer.is_signed for layer in (net[0], net[3], net[7])]
    assert signs == [True, False, False]
    ends = [net[3].weight_quantizer.code_ends, net[3].input_quantizer.code_ends]
    assert ends == [(-8, 7), (0, 15)]


def test_what_cannot_stand_at_the_ends_is_replaced():
    assert type(model("pact")[0].input_quantizer) is MovingAbsMax
    assert type(model("pact")[7].input_quantizer) is PACT
    for i in (0, 7):
        layer = model("qil")[i]
        assert (type(layer.weight_quantizer), type(layer.input_quantizer)) == (AbsMax, MovingAbsMax)
        assert (layer.weight_bits, layer.activation_bits) == (8, 8)


def test_quantizers_that_are_for_the_other_place_are_refused():
    with pytest.raises(ValueError, match=r"weight: got PACT\(bits=4\), which is for inputs"):
        QuantLinear(3, 2, weight=PACT(4))
    with pytest.raises(ValueError, match=r"activation: got SAT\(.*which is for weights"):
        QuantLinear(3, 2, activation=SAT(4))
    with pytest.raises(ValueError, match="axis: got 'token'"):
        LSQ(4, axis="token")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LSQ(9), "bits: got 9"),
        (lambda: LSQ(gradient="x"), "gradient: got 'x', takes one of paper"),
        (lambda: PACT(gradient="x"), "gradient: got 'x', takes one of sat"),
        (lambda: PACT(start=0), "start: got 0, takes"),
        (lambda: SAT(rounding="up"), "rounding: got 'up', takes one of modified"),
        (lambda: DSQ(alpha=0.6), "alpha: got 0.6, takes 0.001 to 0.5"),
        (lambda: PACT(start=math.inf), "start: got inf, takes"),
        (lambda: PACT(start="8"), "start: got '8' .str., takes a number"),
        (lambda: DSQ(alpha=None), "alpha: got None .NoneType., takes a number"),
        (lambda: DSQ(learn_alpha="no"), "learn_alpha: got 'no' .str., takes a bool"),
        (lambda: LSQ(symmetric="no"), "symmetric: got 'no' .str., takes a bool"),
        (lambda: SAT(rescale=0), "rescale: got 0 .int., takes a bool"),
        (lambda: QIL(exponent="no"), "exponent: got 'no' .str., takes a bool"),
        (lambda: QIL(4).set_bits(9), "bits: got 9"),
        (lambda: QuantLinear(5, 3, weight=LSQ(4, axis=2)), "axis: got 2 for a tensor of shape"),
        (lambda: LSQ(4, axis=0)(X), r"axis: got 0 .* call for_weight\(weight\) first"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


@pytest.mark.parametrize("axis", [0, 1, -1, -2, -3])
def test_every_axis_of_a_weight_has_the_gradient_of_its_channels(axis):
    w, grad = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    quantizer = LSQ(4, axis=axis).for_weight(w)
    quantizer(w).backward(grad)
    for i, (part, g) in enumerate(zip(w.unbind(axis), grad.unbind(axis), strict=True)):
        alone = LSQ(4).for_weight(part)
        alone.begin([quantizer.step.data[i]])
        alone(part).backward(g)
        assert_same(quantizer.step.grad[i], alone.step.grad)


@pytest.mark.parametrize("rounding", ["modified", "centered", "original"])
@pytest.mark.parametrize("value", [0.0, 0.3, -0.3])
@pytest.mark.parametrize("shape", [(4, 3), (1, 1), (0, 3)])
def test_sat_of_one_level_is_not_rescaled(rounding, value, shape):
    w = torch.full(shape, value, requires_grad=True)
    y = SAT(4, rounding=rounding)(w)
    y.sum().backward()
    assert_same(y, SAT(4, rounding=rounding, rescale=False)(w))
    assert (y.abs() <= 1).all()
    assert (w.grad.abs() < 2).all()


def test_another_one_like_it_learns_what_it_says():
    four = QIL(4).for_weight(torch.randn(3, 3))
    assert not four.exponent.requires_grad
    assert four.like(bits=2).exponent.requires_grad
    assert not DSQ(4).like(learn_alpha=False).alpha.requires_grad
    per_channel = LSQ(4, axis=0).for_weight(torch.randn(3, 3)).like(bits=2)
    assert per_channel.step.shape == (3,)


def test_negatives_of_an_unsigned_input_are_told():
    layer = QuantLinear(3, 2, activation=LSQ(4))
    with pytest.warns(UserWarning, match="got values below 0.*use one with signed=True"):
        layer(torch.randn(4, 3))


# Where they begin.


@pytest.mark.parametrize("pair", PAIRS)
def test_the_first_batch_in_training_sets_the_parameters(pair):
    net = model(pair)
    assert not any(q.initialized for q in learned(net))
    assert all(q.range.isnan().all() for q in learned(net))
    with pytest.raises(ValueError, match=r"0.input_quantizer: .*"):
        net.eval()(X)
    net.train()(X)
    assert all(q.initialized for q in learned(net))
    before = [q.range.clone() for q in learned(net)]
    net(3 * X)
    assert_same([q.range for q in learned(net)], before)
    reset_ranges_(net)
    assert not any(q.initialized for q in learned(net))


def test_calibration_comes_before_an_optimizer():
    net = model("lsq")
    calibrate(net, [X])
    assert all(q.initialized for q in learned(net))
    expected = 2 * X.abs().mean() / math.sqrt(127)
    torch.testing.assert_close(net[0].input_quantizer.step.data, expected)
    weight = net[3].weight.detach()
    expected = 2 * weight.abs().mean() / math.sqrt(7)
    torch.testing.assert_close(net[3].weight_quantizer.step.data, expected)
    calibrate(net, [X, 2 * X], method="absmax")
    torch.testing.assert_close(net[0].input_quantizer.step.data, 2 * X.max() / 127)
    calibrate(net, [X], method="mse")
    assert 0 < net[0].input_quantizer.step <= X.max() / 127


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_batch_that_is_not_finite_is_refused(value):
    layer = QuantLinear(3, 2, activation=LSQ(4))
    with pytest.raises(ValueError, match="x: got a NaN or an infinity in the first tensor"):
        layer(torch.tensor([[1.0, value, 0.0]]))
    assert not layer.input_quantizer.initialized


def test_values_too_large_for_a_scale_are_refused():
    x = torch.tensor([-3e38, 3e38])
    with pytest.raises(ValueError, match="or values whose sum overflows float32"):
        LSQ(4, signed=True)(x)
    for start in (lambda q: q(x), lambda q: q.set_bounds(*x)):
        quantizer = DSQ(4)
        with pytest.raises(ValueError, match="range: got one from -3e"):
            start(quantizer)
        assert not quantizer.initialized
    assert DSQ(4)(x / 2).isfinite().all()


def test_the_deviation_of_sat_comes_from_exact_sums():
    weight = torch.randn(8, 4, 3, 3)
    quantizer = SAT(4)
    made = quantizer.codes(weight)
    codes, scale = made.codes, made.scale
    levels = codes.double() / quantizer.denominator
    expected = 1 / (math.sqrt(8 * 9) * levels.std())
    torch.testing.assert_close(scale.double() * quantizer.denominator, expected, rtol=1e-6, atol=0)
    again = quantizer(weight.to(memory_format=torch.channels_last))
    assert_same(again, quantizer(weight))
    assert_same(quantizer.eval()(weight), quantizer(weight))  # the scale stays


def test_standardized_weights():
    weight = (3 + 2 * torch.randn(6, 4, 3, 3)).requires_grad_()
    quantizer, plain = (AQD(4, standardize=s).for_weight(weight) for s in (True, False))
    deviation = weight.detach().double().std() + 1e-5
    standardized = ((weight.detach() - weight.detach().double().mean()) / deviation).float()
    y = quantizer(weight)
    torch.testing.assert_close(y, plain(standardized.requires_grad_()))
    for values in (weight, standardized):
        made = quantizer if values is weight else plain
        made(values).backward(torch.ones_like(y))
    torch.testing.assert_close(weight.grad, (standardized.grad / deviation).float())
    torch.testing.assert_close(quantizer.clip.grad, plain.clip.grad)
    layout = torch.channels_last
    assert_same(quantizer.codes(weight).codes * quantizer.code_scale()[:, None, None, None], y)
    assert quantizer(weight.to(memory_format=layout)).is_contiguous(memory_format=layout)
    assert not model("aqd standardized")[0].weight_quantizer.standardize
    assert "standardize=True" in repr(model("aqd standardized")[3].weight_quantizer)


# What they learn.


@pytest.mark.parametrize("pair", PAIRS)
def test_they_learn(pair):
    net = model(pair)
    net(X)
    before = [q.range.clone() for q in learned(net)]
    trained(net, rate=1.0)  # less is lost where a range of 4 is rounded
    after = [q.range for q in learned(net)]
    assert all(bool((a != b).any()) for a, b in zip(before, after, strict=True))


def test_groups_of_an_optimizer():
    net = model("lsq")
    weights, others = parameter_groups(net, 1e-3, weight_decay=0.1)
    assert weights["weight_decay"] == 0.1
    assert (others["lr"], others["weight_decay"]) == (1e-3, 0.0)
    assert {id(p) for p in others["params"]} == {id(q.step) for q in learned(net)}
    assert len(weights["params"]) + len(others["params"]) == len(list(net.parameters()))
    assert len(parameter_groups(nn.Linear(3, 2), 1e-3)) == 1


@pytest.mark.parametrize("pair", ["lsq", "pact", "aqd", "qil2", "dsq"])
def test_they_stay_where_they_may_be_however_large_a_step_is(pair):
    net = model(pair)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    handle = constrain_(net, optimizer)
    net(X)
    for sign in (1, -1):
        for q in learned(net):
            for p in q.parameters():
                p.grad = torch.full_like(p, sign * 1e3)
        optimizer.step()
        for q in learned(net):
            if isinstance(q, DSQ):
                assert q.low < q.high
                assert 0 < q.alpha <= 0.5
            elif isinstance(q, QIL):
                assert 0 < q.distance <= q.center
            else:
                assert (q.range > 0).all()
        assert net(X).isfinite().all()
    handle.remove()


def test_a_frozen_step_has_no_gradient():
    net = model("lsq")
    net(X)
    freeze_ranges_(net)
    net(X).sum().backward()
    assert all(q.step.grad is None for q in learned(net))
    assert net[3].weight.grad is not None


def test_only_the_input_is_saved_for_backward():
    x = torch.rand(1000, requires_grad=True)
    quantizer = LSQ(4)
    quantizer(x)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        quantizer(x)
    large = [t for t in saved if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


@pytest.mark.parametrize("pair", ["lsq", "pact", "qil"])
def test_activation_checkpointing(pair):
    net = model(pair)
    net(X)
    other = copy.deepcopy(net)
    net(X).square().sum().backward()
    y = other[3:](checkpoint(other[:3], X.clone().requires_grad_(), use_reentrant=False))
    y.square().sum().backward()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert_same(a.grad, b.grad)


# What they keep.


@pytest.mark.parametrize("pair", PAIRS)
def test_the_state_dict_says_whether_they_are_there(pair):
    net = trained(model(pair))
    other = model(pair)
    other.load_state_dict(net.state_dict())
    assert_same(other.eval()(X), net.eval()(X))
    fresh = model(pair)
    fresh.load_state_dict(model(pair).state_dict())
    assert not any(q.initialized for q in learned(fresh))
    copied = copy.deepcopy(net)
    assert_same(copied(X), net(X))


def test_other_bits_and_other_codes_are_an_error():
    state = trained(model("lsq")).state_dict()
    others = [
        (LSQ(3), LSQ(4), "the checkpoint has 4 bits, the model 3"),
        (LSQ(4, symmetric=True), LSQ(4), "another kind of quantizer"),
        (LSQ(4), PACT(4), "another kind of quantizer"),
    ]
    for weight, activation, message in others:
        net = nn.Sequential(*(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3)))
        net.extend([nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)])
        quantize_model_(net, weight=weight, activation=activation)
        with pytest.raises(RuntimeError, match=message):
            net.load_state_dict(state, strict=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_stay_float32(dtype):
    net = trained(model("lsq"))
    before = [q.step.detach().clone() for q in learned(net)]
    net.to(dtype)
    assert_same([q.step.detach() for q in learned(net)], before)
    assert net(X.to(dtype)).dtype == dtype


def test_a_model_made_without_memory():
    with torch.device("meta"):
        net = model("lsq")
    net.to_empty(device="cpu")
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    reset_ranges_(net)
    net(X)
    assert all(q.initialized for q in learned(net))


def test_off_and_in_a_summary():
    net = model("lsq")
    with disabled(net):
        net(X)
    assert not any(q.initialized for q in learned(net))
    net(X)
    told = summary(net, X[:1]).layers
    conv = next(layer for layer in told if layer.name == "3")
    assert (conv.weight_grid, conv.activation_grid) == ("LSQ tensor", "LSQ tensor")
    assert conv.parameters == 8 * 8 * 9 + 8 + 2
    assert conv.size_in_bits == 4 * 8 * 8 * 9 + 32 * 8 + 2 * 32


@pytest.mark.parametrize("weight", [LSQ(4), AQD(4), SAT(4)])
def test_codes_are_what_the_values_are_made_of(weight):
    layer = QuantConvTranspose2d(6, 4, 3, groups=2, weight=weight, activation=LSQ(4))
    x = torch.rand(2, 6, 5, 5)
    layer(x)
    for quantizer, values in (
        (layer.weight_quantizer, layer.by_channel(layer.weight)),
        (layer.input_quantizer, x),
    ):
        made = quantizer.codes(values)
        codes, scale = made.codes, made.scale
        assert codes.dtype in (torch.int8, torch.uint8)
        if scale.dim():
            scale = scale.reshape(-1, *[1] * (values.dim() - 1))
        assert_same(codes * scale, quantizer(values).detach())


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_in_integers_are_those_of_float(pair):
    weight, activation = PAIRS[pair]
    x, grad = torch.rand(5, 16), torch.randn(5, 12)
    layers = [
        QuantLinear(16, 12, weight=weight, activation=activation, arithmetic=arithmetic)
        for arithmetic in ("float", "integer")
    ]
    layers[1].load_state_dict(layers[0].state_dict(), strict=False)
    for layer in layers:
        layer(x).backward(grad)
    for own, other in zip(*(layer.parameters() for layer in layers), strict=True):
        if own.requires_grad:
            torch.testing.assert_close(own.grad, other.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", [p for p in PAIRS if p not in ("dsq", "pact centered")])
def test_a_value_without_a_code_is_loud_in_integers(pair, training):
    weight, activation = PAIRS[pair]
    layer = QuantLinear(8, 3, weight=weight, activation=activation, arithmetic="integer")
    x = torch.rand(4, 8)
    assert layer(x).isfinite().all()
    layer.train(training)
    with torch.no_grad():
        assert layer(x.clone().index_fill_(1, torch.tensor(2), torch.nan)).isnan().all()
        assert layer(x).isfinite().all()
        layer.weight[1, 0] = torch.nan
        assert layer(x)[:, 1].isnan().all()


def test_codes_that_are_no_bytes_are_refused():
    layer = QuantLinear(3, 2, weight=AQD(8), activation=None)
    with pytest.raises(ValueError, match=r"codes -255\.\.255 do not fit into a byte"):
        layer.weight_quantizer.codes(layer.weight)
    with pytest.raises(NotImplementedError, match="DSQ has no scale for its codes"):
        DSQ(4).for_weight(layer.weight).codes(layer.weight)


def inner_layer(pair, training):
    """That has the quantizers of the pair, after a step, and an input."""
    net = trained(model(pair), steps=1)
    net.zero_grad()
    return net[3:5].train(training), net[:3](X).detach()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_compiled_to_one_graph(pair, training):
    layer, x = inner_layer(pair, training)
    eager = copy.deepcopy(layer)
    torch._dynamo.reset()  # it compiles a function a few times and no more
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs = [f(x) for f in (eager, compiled)]
    assert_same(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for a, b in zip(eager.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("pair", PAIRS)
def test_exported(pair, training):
    layer, x = inner_layer(pair, training)
    expected = copy.deepcopy(layer)(x)
    exported = torch.export.export(layer, (x,))
    parameters = [id(p) for q in learned(layer) for p in q.parameters()]
    names = {name for name, p in layer.named_parameters() if id(p) in parameters}
    assert names <= exported.state_dict.keys()
    assert_same(exported.module()(x).detach(), expected.detach())


def test_attention_and_grouped_layers_take_them():
    attention = quantize_model_(nn.MultiheadAttention(4, 2), weight=LSQ(4), activation=DSQ(4))
    x = torch.randn(5, 2, 4)
    attention(x, x + 1, x)[0].sum().backward()
    heads = noisyq_fast.QuantGroupedLinear(2, 3, 5, weight=AQD(4), activation=LSQ(4))
    heads(torch.rand(4, 2, 3)).sum().backward()
    assert heads.weight_quantizer.clip.shape == (10,)
    assert heads.weight_quantizer.clip.grad is not None


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1.0])
def test_values_that_are_not_finite_in_a_chain(value):
    """As in the network that is not fused, whose codes look for a NaN in all values."""
    outputs = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 16, 1)),
        )
        x = torch.randn(2, 16, 8, 8)
        quantizers = {"weight": LSQ(4), "activation": LSQ(4)}
        quantize_model_(model, arithmetic="integer", first_last_bits=None, **quantizers)
        model(x)
        model.eval()  # so that batch norm is a line in both
        if fused:
            fuse_(model, x)
        model[1].bias.data[3] = value
        outputs.append(model(x))
    assert outputs[0].isnan().any() == math.isnan(value)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("weight", [LSQ(4), SAT(4)], ids=["lsq", "sat"])
def test_codes_write_no_values_that_nothing_reads(weight, monkeypatch):
    torch.manual_seed(0)
    layer = quantize_model_(nn.Linear(8, 4), weight=weight, activation=LSQ(4), arithmetic="integer")
    x = torch.rand(3, 8, requires_grad=True)
    layer(x).sum().backward()
    expected = [x.grad, *(p.grad for p in layer.parameters())]
    x.grad = None
    layer.zero_grad()

    def refuse(*_):
        pytest.fail("computed float values")

    for backend in BACKENDS.values():
        if "fake_quantize_learned" in backend.functions:
            monkeypatch.setitem(backend.functions, "fake_quantize_learned", refuse)
    with use_backend("reference"):
        pass  # forgets what was selected
    layer(x).sum().backward()
    for one, other in zip([x.grad, *(p.grad for p in layer.parameters())], expected, strict=True):
        assert torch.equal(one, other)
