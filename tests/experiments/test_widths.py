import copy
from dataclasses import replace

import pytest
import torch
from test_training import numbers, trainer
from torch import nn

import noisyq_fast
from experiments import run
from experiments.methods.quant import Quant
from experiments.models import ResNet18Cifar, ResNet20
from experiments.models.resnet20 import BasicBlock
from experiments.models.slimmable import make_slimmable_, parameters_used, set_width

SMALL = {"epochs": 4, "train_size": 64, "batch_size": 32}
IMAGE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WIDTHS = [0.25, 0.5, 0.75, 1.0]


def slimmable(private=True, model=None, **options):
    return make_slimmable_(model or ResNet20(), WIDTHS, IMAGE, private=private, **options)


class Narrow(ResNet20):
    """A ResNet-20 with some channels in each stage and shortcuts that keep the first ones first."""

    class Block(BasicBlock):
        def shortcut(self, x):
            x = x[:, :, :: self.stride, :: self.stride]
            return nn.functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))

    def __init__(self, channels):
        super().__init__()
        first, second, third = channels
        self.conv = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(first)
        self.stage1 = self._stage(first, first, stride=1)
        self.stage2 = self._stage(first, second, stride=2)
        self.stage3 = self._stage(second, third, stride=2)
        self.classifier = nn.Linear(third, 10)
        for module in self.modules():
            if type(module) is BasicBlock:
                module.__class__ = self.Block


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("width", "channels"), [(1, (16, 32, 64)), (0.5, (8, 16, 32)), (0.25, (4, 8, 16))]
)
def test_a_width_is_a_narrower_network_with_the_first_channels(width, channels, quantized):
    wide, narrow = slimmable(), Narrow(channels)
    set_width(wide, width)
    assert parameters_used(wide, IMAGE) == sum(p.numel() for p in narrow.parameters())
    macs = noisyq_fast.summary(narrow, IMAGE[:1]).macs
    assert noisyq_fast.summary(wide, IMAGE[:1]).macs == macs
    if quantized:
        for model in (wide, narrow):
            Quant(4, 4).network(model, IMAGE)
        set_width(wide, width)
    for name, layer in narrow.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight = wide.get_submodule(name).weight.detach()
            layer.weight.data = weight[: len(layer.weight), : layer.weight.shape[1]].clone()
    narrow.classifier.bias.data = wide.classifier.bias.data
    for _ in range(2):
        torch.testing.assert_close(wide.train()(IMAGE), narrow.train()(IMAGE))
    torch.testing.assert_close(wide.eval()(IMAGE), narrow.eval()(IMAGE))


def test_width_1_of_a_network_without_padded_shortcuts_is_that_network_to_the_bit():
    torch.manual_seed(0)
    plain = ResNet18Cifar().train()
    wide = slimmable(model=copy.deepcopy(plain)).train()
    assert torch.equal(wide(IMAGE), plain(IMAGE))
    assert torch.equal(wide.eval()(IMAGE), plain.eval()(IMAGE))


@pytest.mark.parametrize("private", [True, False])
def test_statistics_of_a_width_do_not_move_with_another(private):
    model = slimmable(private)
    Quant(4, 4).network(model, IMAGE)
    set_width(model.train(), 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(IMAGE)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    changed = [norm for norm in norms if getattr(norm, "num_batches_tracked", None) == 1]
    assert len(changed) == 19
    assert all("of_widths.2." in name or "narrower.1." in name for name in moved)
    assert any("narrower.1." in name for name in moved)


def test_a_width_that_was_not_measured_trains_and_is_refused_in_evaluation():
    model = slimmable(private=False)
    set_width(model.train(), 0.6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(IMAGE).sum().backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"got 0\.6 in evaluation mode, .* takes one of 1, 0.75"):
        model.eval()(IMAGE)


def test_widths_that_a_network_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"width: got 0\.6, takes one of 1, 0\.75, 0\.5, 0\.25"):
        set_width(slimmable(), 0.6)
    with pytest.raises(ValueError, match=r"width: got 0\.1, takes a number from 0\.25 to 1"):
        set_width(slimmable(private=False), 0.1)
    with pytest.raises(ValueError, match="model: got ResNet20, which has one width"):
        set_width(ResNet20(), 0.5)


def test_networks_that_cannot_be_slimmed_are_refused():
    grouped = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.Flatten(), nn.LazyLinear(2))
    grouped(IMAGE)
    with pytest.raises(ValueError, match=r"model: got 0, Conv2d\(3, 6, .* takes ungrouped"):
        slimmable(model=grouped)
    flat = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"Sequential does not run at width 0\.25: "):
        make_slimmable_(flat, WIDTHS, torch.zeros(1, 4), private=True)
    with pytest.raises(ValueError, match=r"widths: got \[0.5\], takes different numbers"):
        make_slimmable_(ResNet20(), [0.5], IMAGE, private=True)


def test_the_only_width_trains_as_the_network_itself():
    """Of ResNet-20 the order of the channels differs, and with it the last digits."""
    options = SMALL | {"epochs": 1, "train_size": 32}
    ours = trainer("--model resnet18_cifar --method slimmable --slim-widths 1", **options)
    plain = trainer("--model resnet18_cifar", **options)
    assert numbers(ours) == numbers(plain)


def test_every_width_is_evaluated_and_the_run_is_judged_at_width_1():
    ours = trainer("--method us_slimmable --us-least-width 0.5 --us-evaluated 0.75 1", **SMALL)
    list(ours.epochs())
    lines = ours.finish()
    result = ours.result()
    assert [line.partition(":")[0] for line in lines] == ["width 1", "width 0.75"]
    by_width = result["by_width"]
    assert list(by_width) == ["1", "0.75"]
    assert by_width["1"]["test_accuracy"] == result["test_accuracy"]
    assert by_width["1"]["macs"] == result["macs"]
    assert by_width["0.75"]["macs"] < 0.6 * result["macs"]
    assert by_width["0.75"]["parameters"] < 0.6 * by_width["1"]["parameters"]
    assert (result["forward_passes"], result["backward_passes"]) == (16, 16)
    # Measured over two batches; the narrowest was not asked for, and keeps those of training.
    norms = ours.model.bn.of_widths
    assert [norm.num_batches_tracked for norm in norms[:3]] == [2, 2, 8]


def test_measured_statistics_are_the_mean_over_batches():
    ours = trainer("--method us_slimmable", **SMALL | {"epochs": 1})
    list(ours.epochs())
    ours.finish()
    set_width(ours.model.train(), 0.5)
    means = []
    convolved = ours.model.conv
    for _, _, batch in ours.parts.batches(epoch=0):
        with torch.no_grad():
            means.append(convolved(ours.task.pair(*batch)[0]).mean((0, 2, 3)))
    expected = torch.stack(means).mean(0)
    torch.testing.assert_close(ours.model.bn.of_widths[2].running_mean, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method slimmable --slim-widths 0.5", "--slim-widths: got 0.5, takes different numbers"),
        ("--method slimmable --slim-widths 0 1", "--slim-widths: got 0 1, takes different numbers"),
        ("--method slimmable --loss elr", "got slimmable with elr, which remembers"),
        ("--method slimmable --prune 0.5", "got slimmable with prune, which removes channels"),
        ("--method us_slimmable --patience 2", "got us_slimmable with early_stopping, which"),
        ("--method us_slimmable --us-least-width 0.5", "--us-evaluated: got 0.25, takes widths"),
        ("--method slimmable --sam-rho 0.1", "of which a run has one procedure"),
        ("--method slimmable --us-least-width 0.25", "of which a run has one procedure"),
        ("--method slimmable --dataset synthetic-au", "takes labels that are classes"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run.parse(arguments.split())


@pytest.mark.parametrize("option", ["cuda_graph", "compile"])
def test_recorded_steps_are_refused_where_widths_differ_from_step_to_step(option):
    ours = trainer("--method us_slimmable", **SMALL)
    parts = replace(ours.parts, config=replace(ours.config, device="cuda", **{option: True}))
    with pytest.raises(ValueError, match=f"--{option.replace('_', '-')}: got it with us_slimmable"):
        ours.methods["us_slimmable"].procedure(parts)
