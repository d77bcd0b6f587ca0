import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import noisyq_fast
from experiments.methods.dropout import Dropout
from experiments.methods.prune import Prune, prunable, remove_filters
from experiments.models import (
    AU_NORMS,
    ActionUnitNetwork,
    PerAUHead,
    ResNet20,
    SharedHead,
    SmallEncoder,
)

EXAMPLE = torch.zeros(1, 3, 8, 8)
IN_BLOCKS = [f"stage{stage}.{block}.conv1" for stage in (1, 2, 3) for block in (0, 1, 2)]


def network(quantized: bool = False, dropout: str | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet20().to(memory_format=torch.channels_last)
    if quantized:
        noisyq_fast.quantize_model_(model)
    if dropout:
        Dropout(dropout=0.2, dropout_where=dropout).network(model)
    return model


def pruned(model: nn.Module, **options) -> dict:
    state = {}
    assert Prune(**options).begin_epoch(model, state, 5, 10, EXAMPLE)
    return state


def filters(model: nn.Module, names: list[str] = IN_BLOCKS) -> list[int]:
    return [model.get_submodule(name).out_channels for name in names]


def norms(layer: nn.Conv2d) -> torch.Tensor:
    return layer.weight.detach().abs().sum((1, 2, 3))


def macs(model: nn.Module) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(EXAMPLE)
    return counter.get_total_flops() // 2


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    ("share", "left"),
    [(0.25, [12, 24, 48]), (0.75, [4, 8, 16]), (0.9, [2, 3, 6]), (0.99, [1, 1, 1])],
)
def test_so_many_filters_of_each_block_go(share, left):
    model = network()
    others = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    others = [name for name in others if name not in IN_BLOCKS]
    untouched, macs_before = filters(model, others), macs(model)
    pruned(model, prune=share)
    assert filters(model) == [n for n in left for _ in range(3)]
    assert filters(model, others) == untouched
    for stage, n in zip((model.stage1, model.stage2, model.stage3), left, strict=True):
        for block in stage:
            assert block.conv1.weight.shape[0] == block.bn1.num_features == n
            assert len(block.bn1.running_mean) == n
            assert block.conv2.weight.shape[1] == block.conv2.in_channels == n
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 10)
    # All but the stem, the classifier and the rounding shrinks by the share.
    assert macs(model) / macs_before == pytest.approx(1 - share, abs=0.05)


@pytest.mark.parametrize("order", ["lowest", "highest"])
def test_what_is_left_has_the_other_norms(order):
    model = network()
    before = {name: norms(model.get_submodule(name)).sort().values for name in IN_BLOCKS}
    pruned(model, prune=0.25, prune_order=order)
    for name, expected in before.items():
        n = len(expected) // 4
        expected = expected[n:] if order == "lowest" else expected[:-n]
        assert torch.equal(norms(model.get_submodule(name)).sort().values, expected)


def test_global_scope_removes_the_share_of_all_by_norms_relative_to_the_layers_mean():
    model = network()
    with torch.no_grad():
        model.stage1[0].conv1.weight.mul_(100)
        model.stage2[0].conv1.weight[1:].mul_(1e-3)
    relative = {name: norms(model.get_submodule(name)) for name in IN_BLOCKS}
    relative = {name: value / value.mean() for name, value in relative.items()}
    # The last filter of a layer is not up for removal: the loud one, and the greatest elsewhere.
    candidates = torch.cat([value.sort().values[:-1] for value in relative.values()])
    threshold = candidates.sort().values[168 - 1]
    pruned(model, prune=0.5, prune_scope="global")
    expected = [max(1, (value > threshold).sum().item()) for value in relative.values()]
    assert filters(model) == expected
    assert sum(expected) == 336 // 2
    assert len(set(expected[:3])) > 1
    assert expected[3] == 1


@pytest.mark.parametrize("dropout", [None, "weights"])
@pytest.mark.parametrize("quantized", [False, True])
def test_computes_what_the_network_with_silent_filters_computed(quantized, dropout):
    model = network(quantized, dropout)
    for _ in range(2):
        model(torch.randn(8, 3, 8, 8))
    silent = copy.deepcopy(model)
    state = pruned(model, prune=0.5)
    for name, indices in state["removed"][0].items():
        norm = silent.get_submodule(name.replace("conv1", "bn1"))
        with torch.no_grad():
            norm.weight[indices] = 0
            norm.bias[indices] = 0
            # A weight scale is the absmax of what is left.
            silent.get_submodule(name.replace("conv1", "conv2")).weight[:, indices] = 0
    x = torch.randn(4, 3, 8, 8)
    # A rounded sum may fall on the other side of a quantizer's boundary.
    tolerance = 0.03 if quantized else 1e-4
    torch.testing.assert_close(model.eval()(x), silent.eval()(x), rtol=0, atol=tolerance)


ENCODER = [f"encoder.stage{stage}.{layer}" for stage in (1, 2, 3, 4) for layer in (0, 3)]


def action_units(kind: str, quantized: bool) -> nn.Module:
    torch.manual_seed(0)
    head = SharedHead(128, 3) if kind == "shared head" else PerAUHead(128, 3, kind)
    model = ActionUnitNetwork(SmallEncoder(), head)
    if quantized:
        noisyq_fast.quantize_model_(model, input_ranges=model.input_ranges)
    return model


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["shared head", *AU_NORMS])
@pytest.mark.parametrize("quantized", [False, True])
def test_all_filters_of_an_encoder_can_go(quantized, kind):
    model = action_units(kind, quantized)
    for _ in range(2):
        model(torch.randn(8, 3, 32, 32))
    head = shapes(model.head)
    silent = copy.deepcopy(model)
    (removed,) = pruned(model, prune=0.5)["removed"]
    assert list(removed) == ENCODER
    assert filters(model, ENCODER) == [8, 8, 16, 16, 32, 32, 64, 64]
    # Of the head only the first layer's inputs go.
    first = next(layer for layer in model.head.modules() if isinstance(layer, nn.Linear))
    assert first.weight.shape[1] == first.in_features == 64
    changed = [name for name, shape in shapes(model.head).items() if shape != head[name]]
    assert len(changed) == 1

    layers = [m for m in silent.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    following = dict(zip(ENCODER, layers[1:], strict=False))
    for name, indices in removed.items():
        stage, layer = name.rsplit(".", 1)
        norm = silent.get_submodule(stage)[int(layer) + 1]
        with torch.no_grad():
            norm.weight[indices] = 0
            norm.bias[indices] = 0
            following[name].weight[:, indices] = 0
    x = torch.randn(4, 3, 32, 32)
    tolerance = 0.03 if quantized else 1e-4
    expected = silent.eval()(x)
    torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=tolerance)
    model.train()(x).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["shared head", *AU_NORMS])
def test_a_fresh_network_for_action_units_takes_the_shape_and_the_weights(kind):
    model = action_units(kind, quantized=True)
    model(torch.randn(4, 3, 32, 32))
    state = pruned(model, prune=0.75, prune_scope="global")
    model(torch.randn(4, 3, 32, 32))
    fresh = action_units(kind, quantized=True)
    Prune().restore(fresh, state, EXAMPLE)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_surgery_changes_nothing_else(seen, training):
    model = network(quantized=True, dropout="stages")
    if seen:
        model(torch.randn(4, 3, 8, 8))
    model.train(training)
    model.stage1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    kinds = [type(module) for module in model.modules()]
    random = torch.get_rng_state()
    pruned(model, prune=0.5)
    assert [module.training for module in model.modules()] == modes
    assert [type(module) for module in model.modules()] == kinds
    assert torch.equal(torch.get_rng_state(), random)
    assert list(model.state_dict()) == list(before)
    same = {name: t for name, t in model.state_dict().items() if t.shape == before[name].shape}
    assert "conv.weight" in same
    assert "stage3.2.conv2.input_quantizer.running_absmax" in same
    assert "stage3.2.bn1.num_batches_tracked" in same
    for name, tensor in same.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    for parameter in model.parameters():
        assert parameter.requires_grad
        assert parameter.ndim < 4 or parameter.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dropout", [None, "classifier", "stages", "weights"])
@pytest.mark.parametrize("quantized", [False, True])
def test_trains_on_with_a_new_optimizer(quantized, dropout):
    model = network(quantized, dropout)
    x, labels = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    model(x)
    pruned(model, prune=0.75)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(15):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not any(map(torch.equal, before, model.parameters()))


def test_a_pruned_network_can_be_quantized():
    model = network()
    pruned(model, prune=0.75)
    noisyq_fast.quantize_model_(model)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    assert model.stage3[2].conv1.weight.grad.shape == (16, 64, 3, 3)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dropout", [None, "weights"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_fresh_network_takes_the_shape_and_the_weights(quantized, dropout, tmp_path):
    model, state = network(quantized, dropout), {}
    method = Prune(prune=0.7, prune_steps=3, prune_scope="global")
    for epoch in range(10):
        method.begin_epoch(model, state, epoch, 10, EXAMPLE)
        model.train()(torch.randn(4, 3, 8, 8)).square().mean().backward()
        torch.optim.SGD(model.parameters(), 0.1).step()
    torch.save({"state": state, "weights": model.state_dict()}, tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    fresh = network(quantized, dropout)
    Prune().restore(fresh, json.loads(json.dumps(method.shape(saved["state"]))), EXAMPLE)
    assert shapes(fresh) == shapes(model)
    assert sum(filters(model)) == 336 - round(0.7 * 336)
    fresh.load_state_dict(saved["weights"], strict=True)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    # The run goes on as if nothing had happened.
    assert not method.begin_epoch(fresh, saved["state"], 9, 10, EXAMPLE)


def test_restores_what_was_not_pruned_yet():
    fresh = network()
    Prune(prune=0.5).restore(fresh, {}, EXAMPLE)
    assert shapes(fresh) == shapes(network())


@pytest.mark.parametrize(
    ("options", "epochs", "expected"),
    [
        ({}, 10, {2: 4}),
        ({"prune_after": 0}, 10, {0: 4}),
        ({"prune_after": 0.99}, 10, {9: 4}),
        ({}, 1, {0: 4}),
        ({"prune_after": 0.5, "prune_steps": 3}, 24, {12: 12, 14: 8, 16: 4}),
        ({"prune_after": 0.5, "prune_steps": 3}, 3, {2: 4}),
    ],
)
def test_filters_go_before_these_epochs(options, epochs, expected):
    model, state, seen = network(), {}, {}
    for epoch in range(epochs):
        if Prune(prune=0.75, **options).begin_epoch(model, state, epoch, epochs, EXAMPLE):
            seen[epoch] = model.stage1[0].conv1.out_channels
    assert seen == expected


def test_later_steps_go_by_the_weights_of_their_time():
    model, state = network(), {}
    method = Prune(prune=0.5, prune_after=0.5, prune_steps=2)
    method.begin_epoch(model, state, 4, 8, EXAMPLE)
    assert model.stage1[0].conv1.out_channels == 12
    with torch.no_grad():
        model.stage1[0].conv1.weight[2:6].mul_(1e-3)
    method.begin_epoch(model, state, 5, 8, EXAMPLE)
    assert sorted(state["removed"][1]["stage1.0.conv1"]) == [2, 3, 4, 5]


def test_a_share_of_0_removes_nothing():
    model, state = network(), {}
    assert not Prune(prune=0.0).begin_epoch(model, state, 5, 10, EXAMPLE)
    assert shapes(model) == shapes(network())


def test_only_layers_that_stand_alone_can_lose_filters():
    assert list(prunable(network(), EXAMPLE)) == IN_BLOCKS
    chain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 5)
    )
    assert list(prunable(chain, EXAMPLE)) == ["0", "2"]
    # A layer for each group loses no inputs.
    groups = nn.Sequential(
        *chain[:4], nn.Unflatten(1, (8, 12)), noisyq_fast.GroupedLinear(8, 12, 1)
    )
    assert list(prunable(groups, EXAMPLE)) == ["0"]
    remove_filters(chain, {"0": [1], "2": [0, 5]}, EXAMPLE)
    assert (chain[2].in_channels, chain[2].out_channels, chain[4].in_features) == (7, 4, 64)
    assert chain(EXAMPLE).shape == (1, 5)
    # Its channels are the network's output.
    with pytest.raises(ValueError, match="no convolution whose filters can go"):
        prunable(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), EXAMPLE)


def test_tells_what_is_left():
    model = network()
    state = pruned(model, prune=0.75)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    line = Prune(prune=0.75).finish(model, state)
    assert line == f"252 filters removed, {parameters:,} parameters left"
    assert Prune().finish(network(), {}) == "0 filters removed, 269,722 parameters left"


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({}, "prune0.75"),
        ({"prune": 0.5, "prune_scope": "global"}, "prune0.5-global"),
        ({"prune_after": 0.3, "prune_steps": 4}, "prune0.75-after0.3-steps4"),
        ({"prune_order": "highest"}, "prune0.75-highest"),
    ],
)
def test_label_tells_what_differs(options, label):
    assert Prune(**options).with_defaults().label == label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": 1.0}, "--prune: got 1.0, takes a number from 0 to below 1"),
        ({"prune": -0.1}, "--prune: got -0.1"),
        ({"prune_after": 1.0}, "--prune-after: got 1.0"),
        ({"prune_steps": 0}, "--prune-steps: got 0, takes a whole number from 1"),
        ({"prune_scope": "net"}, "--prune-scope: got net, takes one of layer, global"),
        ({"prune_order": "random"}, "--prune-order: got random, takes one of lowest, highest"),
    ],
)
def test_values_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Prune(**options)
