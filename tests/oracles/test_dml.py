from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from experiments.methods.mutual_learning import differences


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("dml.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.mark.parametrize("prefix", ["", "pair_"])
def test_losses_and_gradients(oracle, prefix):
    count = len(oracle[f"{prefix}losses"])
    logits = [z.clone().requires_grad_() for z in oracle["logits"][:count]]
    losses = [
        F.cross_entropy(z, oracle["labels"]) + difference
        for z, difference in zip(logits, differences(logits), strict=True)
    ]
    found = torch.stack(losses)
    torch.testing.assert_close(found.detach(), oracle[f"{prefix}losses"], rtol=0, atol=1e-12)
    found.sum().backward()
    gradients = torch.stack([z.grad for z in logits])
    torch.testing.assert_close(gradients, oracle[f"{prefix}d_logits"], rtol=0, atol=1e-12)
