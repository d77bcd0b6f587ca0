"""Two processes train by a procedure as one does with the whole batch."""

import pytest
import torch
from ranks import Ranks
from test_training import trainer
from torch import nn

from experiments.methods import METHODS
from experiments.tasks.classification import Classification

SMALL = {"epochs": 3, "train_size": 21, "batch_size": 8, "evaluate_every": 3}
# What train_longer gives a ghost batch and mixup a mixed one are other samples in each process.
OTHERWISE = {"mixup", "train_longer"}
# Those of networks that are quantized, that have no such layers, or whose steps are the usual ones.
APART = {"adabits", "quantizable", "hash_knn", "slimmable", "us_slimmable"}
AFTERWARDS = {"easyquant", "ocs", "bitsplit", "dfq"}
# In float, as other last digits would round some numbers to other levels; with what is kept of
# samples, which each process sees a part of.
PROCEDURES = {
    "co_teaching": "--loss elr --forget-rate 0.4",
    "sam": "--loss elr",
    "swa": "--swa-start 0.3",
    "snapshot": "--snapshots 2",
    "mutual_learning": "--loss gce --gce-threshold 0.1",
    "noisy_student": "--student-confidence 0",
    "qkd": "",
}


def test_all_procedures_are_compared():
    procedures = {name for name, method in METHODS.items() if method.REPLACES == "procedure"}
    assert PROCEDURES.keys() | OTHERWISE | APART | AFTERWARDS == procedures


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


def small_network(task):
    # Without biases in front of the norm, whose gradients would be rounding errors alone.
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 6 * 6, 10),
    )


def trained(arguments):
    """What was lost in each epoch, the passes, and all numbers that are kept."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Classification, "network", small_network)
        ours = trainer(arguments, **SMALL)
        losses = [metrics.loss for metrics in ours.epochs()]
    state = ours.state_dict()
    return losses, ours.passes, [state[name] for name in ("networks", "losses", "procedure")]


@pytest.mark.parametrize("method", PROCEDURES)
def test_processes_train_as_one(ranks, method):
    arguments = f"--method {method} {PROCEDURES[method]}"
    losses, passes, state = trained(arguments)
    for of_rank in ranks(trained, arguments):
        assert of_rank[0] == pytest.approx(losses, rel=1e-3)
        assert of_rank[1] == passes
        torch.testing.assert_close(of_rank[2], state, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("arguments", ["--method mixup", "--method train_longer --ghost-batch 3"])
def test_processes_stay_equal(ranks, arguments):
    (losses, passes, state), (others, *same) = ranks(trained, arguments + " --loss sce")
    assert others == pytest.approx(losses)
    assert same[0] == passes == trained(arguments)[1]
    torch.testing.assert_close(same[1], state, rtol=0, atol=0)
