from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.methods.swa import averaged_with, measure_anew_, swa_rate
from noisyq_fast import MovingAbsMax


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("swa.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def test_average(oracle):
    parameters = sorted(name.removeprefix("avg_") for name in oracle if name.startswith("avg_"))
    count = sum(name.startswith("snap") and name.endswith(f"_{parameters[0]}") for name in oracle)
    for parameter in parameters:
        average = torch.zeros_like(oracle[f"avg_{parameter}"])
        for number in range(count):
            average = averaged_with(average, oracle[f"snap{number}_{parameter}"], number)
        torch.testing.assert_close(average, oracle[f"avg_{parameter}"], rtol=0, atol=1e-12)


def with_averaged_weights(oracle):
    """The network of the oracle: linear, batch norm, ReLU, linear."""
    weights = [oracle[f"avg_p{number}"] for number in range(6)]
    (features, inputs), (outputs, _) = weights[0].shape, weights[4].shape
    model = nn.Sequential(
        nn.Linear(inputs, features),
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, outputs),
    ).double()
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights, strict=True):
            parameter.copy_(weight)
    return model


def test_statistics_of_batch_norm(oracle):
    model = with_averaged_weights(oracle)
    sizes = oracle["batch_sizes"].tolist()
    measure_anew_(model, zip(sizes, oracle["x"].split(sizes), strict=True))
    norm = model[1]
    for name in ("running_mean", "running_var"):
        expected = oracle[f"bn_{name}"]
        torch.testing.assert_close(getattr(norm, name), expected, rtol=0, atol=1e-12)
    assert norm.momentum == nn.BatchNorm1d(1).momentum


def test_ranges_of_activations_are_the_same_mean(oracle):
    sizes = oracle["batch_sizes"].tolist()
    quantizer = MovingAbsMax(bits=4, averaging_constant=0.01)
    quantizer.set_range(99.0)
    batches = oracle["x"].float().split(sizes)
    measure_anew_(nn.Sequential(quantizer), zip(sizes, batches, strict=True))
    largest = torch.stack([batch.abs().max() for batch in batches])
    expected = (largest * torch.tensor(sizes)).sum() / sum(sizes)
    torch.testing.assert_close(quantizer.range, expected)
    assert quantizer.averaging_constant == 0.01


def test_rate(oracle):
    rates = oracle["lr_schedule"]
    first, last = rates[0], rates[-1]
    # It falls by (first - last) / (0.4 start) an epoch.
    start = round(((first - last) / (0.4 * -rates.diff().min())).item())
    epochs = oracle["lr_epoch"].tolist()
    ours = [first * swa_rate(epoch, start, (last / first).item()) for epoch in epochs]
    torch.testing.assert_close(torch.stack(ours), rates, rtol=0, atol=1e-12)
