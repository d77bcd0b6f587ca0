from dataclasses import asdict

import pytest
import torch

from experiments import data
from experiments.config import RunConfig
from experiments.data.noise import symmetric
from experiments.training import NonFiniteLoss, Trainer


def trainer(**options):
    options = {"epochs": 2, "train_size": 256, "threads": 1} | options
    config = RunConfig(**options)
    dataset = data.load("digits").with_train_size(config.train_size)
    labels = symmetric(dataset.train_labels, config.noise, 10, config.noise_seed)
    return Trainer(config, dataset, labels)


def numbers(trainer):
    """What must not depend on the time a run takes."""
    return [asdict(metrics) | {"seconds": None} for metrics in trainer.epochs()]


@pytest.mark.parametrize("method", ["baseline", "quant"])
def test_learns_the_digits_despite_wrong_labels(method):
    run = trainer(method=method, epochs=8, batch_size=32, lr=2e-3, train_size=None, noise=0.2)
    metrics = list(run.epochs())
    assert metrics[-1].test_accuracy > 0.85
    assert metrics[-1].test_loss < metrics[0].test_loss
    clean, flipped = run.train_accuracies()
    assert clean > 0.85
    assert flipped < 0.2


@pytest.mark.parametrize("method", ["baseline", "quant"])
def test_same_seed_gives_the_same_numbers(method):
    first, again = trainer(method=method), trainer(method=method)
    assert numbers(first) == numbers(again)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert numbers(trainer(method=method, seed=1)) != numbers(trainer(method=method))


def test_methods_start_from_the_same_weights():
    baseline, quant = trainer(), trainer(method="quant")
    for (name, expected), actual in zip(
        baseline.model.named_parameters(), quant.model.parameters(), strict=True
    ):
        assert torch.equal(actual, expected), name


def test_memorised_labels_are_counted_apart():
    run = trainer(augment=False, epochs=40, train_size=64, batch_size=16)
    last = list(run.epochs())[-1]
    assert last.train_accuracy_clean > 0.95
    assert last.train_accuracy_flipped > 0.95
    assert run.train_accuracies() == pytest.approx((1.0, 1.0), abs=0.05)


def test_accuracy_on_wrong_labels_is_none_without_any():
    run = trainer(noise=0.0, epochs=1)
    (metrics,) = run.epochs()
    assert metrics.train_accuracy_flipped is None
    assert metrics.train_accuracy_clean is not None
    assert run.train_accuracies()[1] is None


def test_statistics_move_in_training_steps_only():
    run = trainer(epochs=2, train_size=256, batch_size=128)
    list(run.epochs())
    run.train_accuracies()
    assert run.model.bn.num_batches_tracked == 4


def test_learning_rate_follows_the_schedule():
    run = trainer(epochs=5, train_size=32, lr=0.01)
    rates = [metrics.learning_rate for metrics in run.epochs()]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5])
    assert run.optimizer.param_groups[0]["lr"] == rates[-1]


def test_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(
        NonFiniteLoss, match=r"the loss is (nan|inf) in epoch 1, step \d+, at learning rate 1e\+30"
    ):
        list(trainer(lr=1e30).epochs())


def test_model_is_channels_last():
    weight = trainer().model.stage2[1].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
