import dataclasses
import math
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments import methods, run
from experiments.losses import CrossEntropy, Loss
from experiments.methods.early_stopping import EarlyStopping
from experiments.methods.label_smoothing import LabelSmoothing
from experiments.methods.quant import Quant
from experiments.methods.weight_decay import WeightDecay
from experiments.models import ResNet20
from experiments.models.layers import decayed
from noisyq_fast import GroupedLinear

LOGITS = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)
INDICES = torch.arange(6)


def test_every_method_is_on_with_its_defaults_under_its_name():
    labels = {name: run.parse(["--method", name]).label for name in methods.METHODS}
    assert labels == {
        "hash_knn": "hash-knn48",
        "slimmable": "slimmable",
        "us_slimmable": "us-slimmable",
        "quant": "quant-w4a4",
        "lsq": "lsq4",
        "pact": "pact4",
        "qil": "qil4",
        "dsq": "dsq4",
        "aqd": "aqd4",
        "dropout": "dropout0.1",
        "prune": "prune0.75",
        "weight_decay": "weight-decay0.01",
        "label_smoothing": "label-smoothing0.1",
        "early_stopping": "early-stopping10",
        "gce": "gce0.7",
        "sce": "sce0.1-1",
        "elr": "elr3-0.7",
        "mixup": "mixup1",
        "co_teaching": "co-teaching",
        "sam": "sam0.05",
        "swa": "swa0.84",
        "snapshot": "snapshot5",
        "train_longer": "train-longer128",
        "mutual_learning": "mutual-learning",
        "defensive": "defensive0.0003",
        "noisy_student": "noisy-student3",
        "qkd": "qkd",
        "adder": "adder",
        "hashed": "hashed8",
        "lcnn": "lcnn0.5",
        "easyquant": "easyquant-w4a4",
        "ocs": "ocs-w4a4-0.02",
        "bitsplit": "bitsplit-w4a4",
        "dfq": "dfq-w4a4",
        "adabits": "adabits5-3",
        "quantizable": "quantizable4-2-original-start3",
    }


def test_quant_sets_the_widths_asked_for_and_8_bits_at_both_ends():
    (quant,) = run.parse(
        ["--method", "quant", "--weight-bits", "3", "--activation-bits", "5"]
    ).methods.values()
    model = quant.network(ResNet20())
    widths = [
        (layer.weight_bits, layer.activation_bits)
        for layer in model.modules()
        if hasattr(layer, "weight_bits")
    ]
    assert widths == [(8, 8)] + [(3, 5)] * 18 + [(8, 8)]


GRIDS = ["--activation-grid", "unsigned", "--activation-bits", "3", "--weight-grid", "full"]


def test_quant_sets_the_grids_asked_for():
    (quant,) = run.parse(["--method", "quant", *GRIDS]).methods.values()
    model = quant.network(ResNet20())
    layers = [layer for layer in model.modules() if hasattr(layer, "weight_bits")]
    widths = [layer.widths() for layer in layers]
    assert widths == ["W8 full/A8"] + ["W4 full/A3 unsigned"] * 18 + ["W8 full/A8 unsigned"]
    options = {"weight_bits": 4, "activation_bits": 3}
    grids = {"weight_grid": "full", "activation_grid": "unsigned"}
    assert quant.evaluation_options() == options | grids


def test_the_grids_of_before_are_in_no_name_and_in_no_file_of_weights():
    config = run.parse(["--method", "quant"])
    given = run.parse(["--method", "quant", "--activation-grid", "signed"])
    assert config.identity() == given.identity()
    assert not any("grid" in name for name in config.identity())
    assert config.methods["quant"].evaluation_options() == {"weight_bits": 4, "activation_bits": 4}
    other = run.parse(["--method", "quant", *GRIDS])
    assert other.flat()["activation_grid"] == "unsigned"
    assert other.label == "quant-w4a3-unsigned-full-weights"
    assert run.parse(["--method", "quant", *GRIDS[:4]]).label == "quant-w4a3-unsigned"


def test_an_unknown_grid_is_refused():
    with pytest.raises(ValueError, match="--weight-grid: got even, takes one of signed, full"):
        Quant(weight_grid="even")


def test_an_odd_grid_has_fewer_bits():
    assert Quant(7, 4, weight_grid="odd").label == "quant-w7a4-odd-weights"
    with pytest.raises(ValueError, match="--activation-bits: got 8, takes 2 to 7 on the odd grid"):
        Quant(activation_bits=8, activation_grid="odd")


FLOATS = [
    (method, field.name, "tuple" in str(field.type))
    for method in methods.METHODS.values()
    for field in dataclasses.fields(method)
    if "float" in str(field.type) and "Literal" not in str(field.type)
]


@pytest.mark.parametrize(("method", "option", "takes_several"), FLOATS)
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_numbers_that_no_file_can_hold_are_refused(method, option, takes_several, value):
    name = option.replace("_", "-")
    with pytest.raises(ValueError, match=rf"--{name}: got (1 )?-?(inf|nan), takes "):
        method(**{option: (1.0, value) if takes_several else value})


def test_help_says_what_every_method_does_and_where_it_departs_from_its_paper(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name, method in methods.METHODS.items():
        first = " ".join(method.__doc__.split())[:30]
        place = f"{name.replace('_', '-')} options" if fields(method) else f"--method {name}:"
        assert first in said.partition(place)[2]
    assert "Other than in the paper, the optimizer is Adam" in said


@pytest.mark.parametrize("share", [0.0, 0.1, 0.7, 1.0])
def test_label_smoothing_is_its_formula(share):
    targets = (1 - share) * F.one_hot(LABELS, 10) + share / 10
    expected = -(targets * LOGITS.log_softmax(1)).sum(1).mean()
    loss = LabelSmoothing(share).loss(CrossEntropy(), nn.Identity(), None)
    torch.testing.assert_close(loss(LOGITS, LABELS, INDICES), expected)
    torch.testing.assert_close(loss.samples(LOGITS, LABELS, INDICES).mean(), expected)


def test_answers_by_yes_or_no_are_smoothed_one_by_one():
    class Squares(Loss):
        def samples(self, logits, labels, indices):
            return (logits - labels).square().nansum(1)

    labels = torch.tensor([[0.0, 1.0, torch.nan]])
    smoothed = LabelSmoothing(0.2).loss(Squares(), nn.Identity(), None)
    assert smoothed(torch.zeros(1, 3), labels, INDICES[:1]) == pytest.approx(0.1**2 + 0.9**2)


def test_weight_decay_spares_biases_and_norms():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    assert [id(p) for p in decayed(model)] == [id(model[0].weight), id(model[2].weight)]


def test_weight_decay_in_the_loss_is_its_formula():
    model = nn.Linear(3, 2)
    loss = WeightDecay(0.5, "loss").loss(CrossEntropy(), model, None)
    penalty = 0.5 * model.weight.square().sum()
    torch.testing.assert_close(
        loss(LOGITS, LABELS, INDICES), F.cross_entropy(LOGITS, LABELS) + penalty
    )
    assert WeightDecay(0.5, "loss").optimizer_options() == {}


def test_decoupled_weight_decay_leaves_the_loss():
    method = WeightDecay(0.5)
    loss = CrossEntropy()
    assert method.loss(loss, nn.Identity(), None) is loss
    assert method.optimizer_options() == {"weight_decay": 0.5}


class Metrics:
    def __init__(self, epoch, validation_score):
        self.epoch = epoch
        self.validation_score = validation_score


def epochs(method, model, accuracies):
    """Ends an epoch for each accuracy, at which the weights are its number."""
    state = {}
    for epoch, accuracy in enumerate(accuracies, 1):
        nn.init.constant_(model.weight, epoch)
        if method.end_epoch(model, state, Metrics(epoch, accuracy)):
            break
    return epoch, method.finish(model, state)


@pytest.mark.parametrize(
    ("accuracies", "stopped", "restored"),
    [
        ([0.1, 0.2, 0.3, 0.4], 4, 4),
        ([0.1, 0.5, 0.4, 0.3, 0.9], 4, 2),
        ([0.1, 0.5, 0.4, 0.6, 0.6, 0.6, 0.9], 6, 4),  # an equal one is no better one
    ],
)
def test_early_stopping_goes_back_to_the_best_epoch(accuracies, stopped, restored):
    model = nn.Linear(2, 2)
    epoch, line = epochs(EarlyStopping(patience=2), model, accuracies)
    assert epoch == stopped
    assert model.weight.unique().tolist() == [restored]
    best = max(accuracies[:epoch])
    assert line == f"weights of epoch {restored} restored, validation score {best:.2%}"


def test_early_stopping_forgets_weights_that_no_longer_fit():
    method, model, state = EarlyStopping(patience=1), nn.Linear(2, 2), {}
    method.end_epoch(model, state, Metrics(1, 0.9))
    model.weight = nn.Parameter(torch.ones(1, 2))
    assert not method.end_epoch(model, state, Metrics(2, 0.5))
    method.finish(model, state)
    assert state["epoch"] == 2


def test_weight_decay_spares_biases_of_many_heads():
    heads = GroupedLinear(3, 4, 2)
    assert [id(parameter) for parameter in decayed(heads)] == [id(heads.weight)]
