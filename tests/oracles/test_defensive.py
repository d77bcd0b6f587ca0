from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.losses import CrossEntropy
from experiments.methods.defensive import Defensive, penalty


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("defensive.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


@pytest.mark.parametrize("kind", ["conv", "fc"])
def test_penalty_and_gradient(oracle, kind):
    weight = oracle[f"{kind}_w"].clone().requires_grad_()
    matrix = weight.flatten(1)
    value = penalty(matrix.unsqueeze(0))
    side = "rows" if matrix.shape[0] <= matrix.shape[1] else "cols"
    expected = oracle[f"{kind}_{side}_penalty"]
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-10)
    value.backward()
    for side in ("rows", "cols"):  # which differ by a constant
        expected = oracle[f"{kind}_{side}_dw"]
        torch.testing.assert_close(weight.grad, expected, rtol=0, atol=1e-10)


def test_the_loss_has_half_of_it_for_every_layer(oracle):
    convolution, linear = oracle["conv_w"], oracle["fc_w"]
    outputs, inputs, *kernel = convolution.shape
    model = nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel), nn.BatchNorm2d(outputs), nn.Linear(*linear.T.shape)
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(convolution)
        model[2].weight.copy_(linear)
    beta = oracle["beta"].item()
    loss = Defensive(beta).loss(CrossEntropy(), model, None)
    logits, labels = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    added = loss(logits, labels, labels) - CrossEntropy()(logits, labels, labels)
    added.backward()
    for layer, name in ((model[0], "conv"), (model[2], "fc")):
        expected = beta / 2 * oracle[f"{name}_rows_dw"]
        torch.testing.assert_close(layer.weight.grad, expected, rtol=0, atol=1e-10)
    sides = [min(oracle[f"{n}_{s}_penalty"] for s in ("rows", "cols")) for n in ("conv", "fc")]
    torch.testing.assert_close(added.detach(), beta / 2 * sum(sides), rtol=0, atol=1e-10)
