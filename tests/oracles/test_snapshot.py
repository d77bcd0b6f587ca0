from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.methods.snapshot import cyclic_cosine, log_mean_softmax


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("snapshot.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def test_rate(oracle):
    iterations, cycles = oracle["iterations"].item(), oracle["cycles"].item()
    length = -(-iterations // cycles)
    starts = range(0, length * cycles, length)
    factors = [cyclic_cosine(step, starts, length * cycles) for step in range(iterations)]
    rates = oracle["alpha0"] * torch.tensor(factors, dtype=torch.float64)
    torch.testing.assert_close(rates, oracle["lr"], rtol=0, atol=1e-14)


def test_mean_of_probabilities(oracle):
    logits = oracle["snapshot_logits"]
    for name, expected in oracle.items():
        if name.startswith("mean_softmax"):
            last = name.removeprefix("mean_softmax").removeprefix("_last")
            used = logits[-int(last) :] if last else logits
            torch.testing.assert_close(log_mean_softmax(used).exp(), expected, rtol=0, atol=1e-14)
