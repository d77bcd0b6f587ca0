import copy
from dataclasses import replace

import pytest
import torch
from test_training import ends_bit_identical, numbers, trainer
from torch import nn

import noisyq_fast
from experiments import run
from experiments.methods.quant import Quant
from experiments.models import ResNet18Cifar, ResNet20
from experiments.models.narrowing import narrowed
from experiments.models.resnet20 import BasicBlock
from experiments.models.slimmable import make_slimmable_, set_width
from noisyq_fast import AQD, DSQ, LSQ, PACT, QIL, SAT

SMALL = {"epochs": 4, "train_size": 64, "batch_size": 32}
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTHS = [0.25, 0.5, 0.75, 1.0]


def slimmable(private=True, model=None, **options):
    return make_slimmable_(model or ResNet20(), WIDTHS, IMAGE, private=private, **options)


class ScaledNorm(nn.Module):
    """A batch norm, and then a scale and shift: as those that all widths share are computed."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        return torch.addcmul(bias, self.norm(x), weight)


class Narrow(ResNet20):
    """A ResNet-20 with some channels in each stage and shortcuts that keep the first ones first."""

    class Block(BasicBlock):
        def shortcut(self, x):
            x = x[:, :, :: self.stride, :: self.stride]
            return nn.functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))

    def __init__(self, channels, private=True):
        super().__init__()
        first, second, third = channels
        self.conv = nn.Conv2d(3, first, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(first)
        self.stage1 = self._stage(first, first, stride=1)
        self.stage2 = self._stage(first, second, stride=2)
        self.stage3 = self._stage(second, third, stride=2)
        self.classifier = nn.Linear(third, 10)
        for module in list(self.modules()):
            if type(module) is BasicBlock:
                module.__class__ = self.Block
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm2d) and not private:
                    setattr(module, name, ScaledNorm(child.num_features))

    def take_(self, wide, place):
        """The first part of all that a slimmable network has for the width at a place."""
        there, taken = wide.state_dict(), {}
        for name, own in self.state_dict().items():
            parent, _, last = name.replace(".norm.", ".").rpartition(".")
            of_width = f"{parent}.of_widths.{place}.{last}"
            narrower = parent.replace("input_quantizer", f"narrower.{place - 1}") + f".{last}"
            found = next(n for n in (of_width, narrower, name) if n in there)
            taken[name] = there[found][tuple(map(slice, own.shape))]
        self.load_state_dict(taken)


CHANNELS = {0.5: (8, 16, 32), 0.25: (4, 8, 16)}
PLACES = {0.5: 2, 0.25: 3}
QUANTIZERS = {
    "plain": {},
    "affine": {"weight_grid": "affine", "activation_grid": "unsigned"},
    "lsq": {"weight": LSQ(4), "activation": LSQ(4)},
    "lsq of channels": {"weight": LSQ(4, axis=0), "activation": LSQ(4)},
    "pact": {"weight": SAT(4), "activation": PACT(4)},
    "qil": {"weight": QIL(2), "activation": QIL(2)},
    "dsq": {"weight": DSQ(4), "activation": DSQ(4)},
    "aqd": {"weight": AQD(4), "activation": AQD(4)},
}


def converted(model, quantizers, arithmetic="float"):
    noisyq_fast.quantize_model_(
        model, example=IMAGE, arithmetic=arithmetic, **QUANTIZERS[quantizers]
    )
    return noisyq_fast.fuse_(model, IMAGE) if arithmetic == "integer" else model


def train_(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    noisyq_fast.constrain_(model, optimizer)
    for width in (1, 0.5, 0.25):
        set_width(model.train(), width)
        model(IMAGE).square().mean().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize(
    ("quantizers", "arithmetic", "private"),
    [
        (None, "float", True),
        *((kind, "float", True) for kind in QUANTIZERS),
        *((kind, "integer", True) for kind in QUANTIZERS if kind != "dsq"),
        *((kind, "float", False) for kind in (None, "plain", "lsq", "aqd")),
        *((kind, "integer", False) for kind in ("plain", "lsq of channels")),
    ],
)
def test_a_width_is_to_the_bit_a_narrower_network_with_the_first_channels(
    quantizers, arithmetic, private
):
    torch.manual_seed(0)
    wide = slimmable(private)
    if quantizers:
        converted(wide, quantizers, arithmetic)
    train_(wide)
    for width, channels in CHANNELS.items():
        narrow = Narrow(channels, private)
        if quantizers:
            converted(narrow, quantizers, arithmetic)
        narrow.take_(wide, PLACES[width])
        set_width(wide, width)
        alone = narrowed(wide, width, IMAGE)
        assert sum(p.numel() for p in alone.parameters()) == sum(
            p.numel() for p in narrow.parameters()
        )
        for model in (wide, narrow, alone):
            model.eval()
        assert torch.equal(wide(IMAGE), narrow(IMAGE))
        assert torch.equal(alone(IMAGE), narrow(IMAGE))
        costs = noisyq_fast.summary(narrow, IMAGE[:1])
        assert noisyq_fast.summary(wide, IMAGE[:1]).macs == costs.macs
        assert noisyq_fast.summary(alone, IMAGE[:1]).size_in_bits == costs.size_in_bits
        kinds = [row.arithmetic for row in costs.layers]
        assert kinds == [row.arithmetic for row in noisyq_fast.summary(alone, IMAGE[:1]).layers]
        assert ("integer" in kinds) == (arithmetic == "integer")
        assert torch.equal(wide.train()(IMAGE), narrow.train()(IMAGE))


def test_learned_ranges_are_of_a_width_where_norms_are_and_shared_where_these_are():
    for private, count in ((True, 4), (False, 1)):
        model = converted(slimmable(private), "lsq")
        steps = [n for n, _ in model.named_parameters() if n.startswith("stage1.0.conv1.")]
        assert len([n for n in steps if "weight_quantizer" in n]) == 1
        assert len([n for n in steps if n.endswith("step")]) == 1 + count
    model = converted(slimmable(False), "plain")
    assert len(model.conv.narrower) == 4  # statistics are of a width in any case


def test_quantizers_of_every_width_have_a_name_and_are_counted():
    model = converted(slimmable(), "lsq")
    assert model.stage1[0].conv1.narrower[1].name == "stage1.0.conv1.narrower.1"
    rows = {row.name: row for row in noisyq_fast.summary(model, IMAGE[:1]).layers}
    assert rows["stage1.0.conv1"].parameters == 16 * 16 * 9 + 1 + 4


@pytest.mark.parametrize("quantizers", ["plain", "lsq"])
def test_a_quantized_network_of_several_widths_goes_back_to_float(quantizers):
    model = slimmable()
    set_width(model.eval(), 0.5)
    expected, state = model(IMAGE), model.state_dict()
    noisyq_fast.dequantize_model_(converted(model, quantizers))
    assert torch.equal(model(IMAGE), expected)
    assert model.state_dict().keys() == state.keys()


def test_a_quantized_network_of_several_widths_can_be_printed():
    text = str(noisyq_fast.quantize_model_(slimmable()))
    assert "W8/A8" in text
    assert "W4/A4" in text


def test_groups_that_do_not_divide_the_channels_of_a_width_are_refused():
    with pytest.raises(ValueError, match=r"weight_group_size: got 8, which does not divide the 12"):
        noisyq_fast.quantize_model_(
            slimmable(), weight_group_size=8, overrides={"conv": None}, example=IMAGE
        )


def test_a_width_that_was_not_measured_cannot_be_taken_alone():
    with pytest.raises(RuntimeError, match=r"got 0\.6 in evaluation mode"):
        narrowed(slimmable(False), 0.6, IMAGE)


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


@pytest.mark.parametrize(
    "method",
    [
        "--method slimmable --slim-widths 0.5 1 --aqd-bits 4",
        "--method us_slimmable --us-least-width 0.5 --us-evaluated 0.5 1 --weight-bits 4 "
        "--activation-bits 4 --arithmetic integer",
    ],
)
def test_resumed_ends_bit_identical(method):
    ends_bit_identical(method, 2, **SMALL)


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
