import copy

import pytest
import torch
from torch import nn

import noisyq_fast
from experiments.methods.dropout import Dropout
from experiments.models import AU_NORMS, ActionUnitNetwork, PerAUHead, ResNet20, SmallEncoder
from noisyq_fast import GroupedLinear

WHERE = ["classifier", "stages", "weights"]
NETWORKS = ["resnet20", *AU_NORMS]


def network(name: str, quantized: bool) -> nn.Module:
    if name == "resnet20":
        model = ResNet20()
    else:
        model = ActionUnitNetwork(SmallEncoder(), PerAUHead(SmallEncoder.features, 3, name))
    return noisyq_fast.quantize_model_(model) if quantized else model


def ones_through(model: nn.Module, size: int) -> torch.Tensor:
    return model(torch.ones(1, size))


def identity(size: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    nn.init.eye_(model[0].weight)
    return model


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_training_zeroes_a_share_p_and_keeps_the_mean(p):
    torch.manual_seed(0)
    out = ones_through(Dropout(dropout=p).network(identity(4096)), 4096)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    assert (out == 0).float().mean().item() == pytest.approx(p, abs=0.03)
    assert out.mean().item() == pytest.approx(1, abs=0.06)


def test_every_forward_draws_anew_from_torchs_generator():
    model = Dropout(dropout=0.5).network(identity(64))
    torch.manual_seed(0)
    first, second = ones_through(model, 64), ones_through(model, 64)
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(ones_through(model, 64), first)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("quantized", [False, True])
def test_evaluation_is_as_without_dropout(name, where, quantized):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    plain = network(name, quantized)
    plain(x)
    model = Dropout(dropout=0.5, dropout_where=where).network(copy.deepcopy(plain))
    assert torch.equal(model.eval()(x), plain.eval()(x))
    assert not torch.equal(model.train()(x), copy.deepcopy(plain).train()(x))


@pytest.mark.parametrize("where", ["classifier", "weights"])
def test_the_slip_multiplies_by_p_where_1_minus_p_is_right(where):
    right = Dropout(dropout=0.2, dropout_where=where).network(identity(64))
    slip = Dropout(dropout=0.2, dropout_where=where, dropout_test_factor="drop")
    slip = slip.network(identity(64))
    outs = []
    for model in (right, slip):
        torch.manual_seed(0)
        outs.append(ones_through(model, 64))
    assert torch.equal(*outs)
    assert torch.equal(ones_through(right.eval(), 64), torch.ones(1, 64))
    torch.testing.assert_close(ones_through(slip.eval(), 64), torch.full((1, 64), 0.2 / 0.8))


def test_stages_zero_what_each_stage_puts_out_and_the_classifiers_input():
    torch.manual_seed(0)
    model = Dropout(dropout=0.5, dropout_where="stages").network(ResNet20())
    seen = []
    for module in (model.stage2[0].conv1, model.stage3[0].conv1, model.classifier):
        module.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model.stage3.register_forward_hook(lambda _module, _args, out: seen.append(out))
    x = torch.randn(8, 3, 16, 16)
    for training, shares in ((True, (0.5, 1)), (False, (0, 0.5))):
        seen.clear()
        model.train(training)(x)
        assert len(seen) == 4
        # A ReLU ends each stage, and leaves up to a half at 0; the mean over an image leaves none.
        *stages, classifier = [(out == 0).float().mean().item() for out in seen]
        assert all(shares[0] < share < shares[1] for share in stages)
        assert classifier == pytest.approx(0.5 if training else 0, abs=0.1)


def test_the_classifier_is_the_last_linear_layer():
    torch.manual_seed(0)
    first, last = identity(64)[0], identity(64)[0]
    model, seen = Dropout(dropout=0.5).network(nn.Sequential(first, last)), []
    first.register_forward_hook(lambda _module, args, _out: seen.append(args[0]))
    assert 0 < ones_through(model, 64).count_nonzero() < 64
    assert torch.equal(seen[0], torch.ones(1, 64))


def test_the_classifier_may_be_a_layer_for_each_action_unit():
    model = network("per-au", quantized=False)
    Dropout(dropout=0.25).network(model)
    seen = []
    for norm, linear in (block.children() for block in (model.head.hidden2, model.head.logits)):
        norm.register_forward_hook(lambda _module, _args, out: seen.append(out.view(16, 3, 64)))
        linear.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model(torch.randn(16, 3, 8, 8))
    normalized, hidden, last_normalized, dropped = seen
    assert torch.equal(hidden, normalized)
    expected = last_normalized.where(dropped != 0, 0) / 0.75
    torch.testing.assert_close(dropped, expected)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("quantized", [False, True])
def test_what_enters_a_layer_with_a_folded_norm_is_dropped(quantized):
    model = network("folded", quantized)
    Dropout(dropout=0.25).network(model)
    inputs, seen = {}, []
    model.head.logits.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    model.head.logits.linear.register_forward_pre_hook(
        lambda _module, args, options: inputs.update(x=args[0], **options), with_kwargs=True
    )
    model(torch.randn(16, 3, 8, 8))
    dropped, (weight, bias) = inputs["x"], inputs["parameters"]
    torch.testing.assert_close(dropped, seen[0].where(dropped != 0, 0) / 0.75)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    # The statistics are of what was not dropped.
    own = model.head.logits.linear
    scale = torch.rsqrt(seen[0].var(0, correction=0) + 1e-5)
    torch.testing.assert_close(weight, own.weight * scale.unsqueeze(1))
    shift = (own.weight.squeeze(1) * scale * seen[0].mean(0)).sum(1, keepdim=True)
    torch.testing.assert_close(bias, own.bias - shift)


def test_stages_may_be_those_of_an_encoder():
    model, shares = network("per-au", quantized=False), []
    for stage in model.encoder.children():
        for norm in (stage[1], stage[4]):  # so that ReLU leaves no zeros
            nn.init.constant_(norm.bias, 100)
    Dropout(dropout=0.25, dropout_where="stages").network(model)
    for module in model.encoder.children():
        module.register_forward_hook(
            lambda _module, _args, out: shares.append((out == 0).float().mean().item())
        )
    model(torch.randn(16, 3, 32, 32))
    assert shares == pytest.approx([0.25] * 4, abs=0.01)


@pytest.mark.parametrize("quantize_first", [True, False])
def test_weights_are_zeroed_before_they_are_quantized(quantize_first):
    torch.manual_seed(0)
    model, method = identity(256), Dropout(dropout=0.25, dropout_where="weights")
    nn.init.ones_(model[0].weight)
    if quantize_first:
        method.network(noisyq_fast.quantize_model_(model))
    else:
        noisyq_fast.quantize_model_(method.network(model))
    used = model(torch.eye(256))
    assert used.unique().tolist() == pytest.approx([0, 1 / 0.75], rel=1e-6)
    assert (used == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(model.eval()(torch.eye(256)), torch.ones(256, 256))


@pytest.mark.parametrize(("name", "count"), [("resnet20", 20), ("per-au", 11)])
def test_every_convolution_and_linear_layer_loses_weights(name, count):
    model = network(name, quantized=False)
    Dropout(dropout=0.5, dropout_where="weights").network(model)
    zeros = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | GroupedLinear):
            module.register_forward_hook(
                lambda layer, *_: zeros.append((layer.weight == 0).float().mean().item())
            )
    model(torch.randn(2, 3, 8, 8))
    assert zeros == pytest.approx([0.5] * count, abs=0.12)
    assert all(
        isinstance(p, nn.Parameter) and (p != 0).any() for p in model.parameters() if p.ndim > 1
    )


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_a_norm_is_folded_into_are_zeroed_before(quantized):
    model = network("folded", quantized)
    Dropout(dropout=0.25, dropout_where="weights").network(model)
    block, seen = model.head.hidden2, []
    block.linear.register_forward_pre_hook(
        lambda layer, _args, options: seen.append((layer.weight, *options["parameters"])),
        with_kwargs=True,
    )
    model(torch.randn(16, 3, 8, 8))
    weight, folded, bias = seen[0]
    assert (weight == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(folded == 0, weight == 0)
    kept = weight != 0
    torch.testing.assert_close(weight[kept], block.linear.weight[kept] / 0.75)
    assert not torch.equal(bias, block.linear.bias)
    assert isinstance(block.linear.weight, nn.Parameter)


@pytest.mark.parametrize("name", ["resnet20", "shared", "folded"])
@pytest.mark.parametrize("where", WHERE)
def test_names_and_parameters_stay_and_all_are_trained(name, where):
    model = network(name, quantized=False)
    before = dict(model.named_parameters())
    names = list(model.state_dict())
    Dropout(dropout=0.3, dropout_where=where).network(model)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert list(model.state_dict()) == names
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(parameter.grad.count_nonzero() for parameter in after.values())


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_copy_drops_by_itself(where, quantized):
    model = ResNet20()
    if quantized:
        noisyq_fast.quantize_model_(model)
    Dropout(dropout=0.5, dropout_where=where).network(model)
    twin = copy.deepcopy(model)
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    assert torch.equal(twin(x), expected)
    with torch.no_grad():
        twin.classifier.weight.zero_()
        twin.classifier.bias.zero_()
    assert twin(x).count_nonzero() == 0
    assert model(x).count_nonzero() > 0


def test_weights_come_back_when_the_forward_fails():
    model = Dropout(dropout=0.5, dropout_where="weights").network(ResNet20())
    weight = model.classifier.weight
    with pytest.raises(RuntimeError):
        model(torch.randn(1, 2, 8, 8))
    assert model.classifier.weight is weight


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "dropout0.1"),
        ({"dropout_where": "stages"}, "dropout0.1-stages"),
        ({"dropout_where": "weights", "dropout_test_factor": "drop"}, "dropout0.1-weights-times-p"),
    ],
)
def test_label_tells_what_differs(options, label):
    assert Dropout(**options).with_defaults().label == label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 1.0}, "--dropout: got 1.0, takes a number from 0 to below 1"),
        ({"dropout": float("nan")}, "--dropout: got nan"),
        ({"dropout_where": "input"}, "--dropout-where: got input, takes one of classifier, stages"),
        ({"dropout_test_factor": "p"}, "--dropout-test-factor: got p, takes one of keep, drop"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Dropout(**options)


def test_networks_without_the_place_are_refused():
    with pytest.raises(ValueError, match="Sequential has no stage1"):
        Dropout(dropout=0.1, dropout_where="stages").network(identity(2))
    with pytest.raises(ValueError, match="no linear layer"):
        Dropout(dropout=0.1).network(nn.Sequential(nn.Conv2d(3, 8, 3)))
