from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.losses import CrossEntropy
from experiments.methods.lcnn import LCNN
from experiments.models.lookup import LookupConv2d


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("lcnn.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


@pytest.fixture
def layer(oracle):
    dictionary, p = oracle["dictionary"], oracle["p"]
    vectors, inputs = dictionary.shape[:2]
    outputs, _, *kernel = p.shape
    padding = [
        (out - side + size - 1) // 2
        for side, out, size in zip(
            oracle["x"].shape[2:], oracle["y"].shape[2:], kernel, strict=True
        )
    ]
    sparsity = oracle["threshold"].item() * p[0].numel() ** 0.5
    layer = LookupConv2d(
        inputs, outputs, kernel, 1, padding, bias=False, vectors=vectors, sparsity=sparsity
    ).double()
    layer.thresholded.kept.fill_(True)
    with torch.no_grad():
        layer.dictionary.weight.copy_(dictionary)
        layer.entries.copy_(p)
    return layer


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("penalized", [False, True])
def test_layer_and_gradients(oracle, layer, penalized):
    x = oracle["x"].clone().requires_grad_()
    y = layer(x)
    same(y.detach(), oracle["y"])
    kept = layer.thresholded.kept
    assert torch.equal(kept, oracle["p_kept"])
    assert layer.lookups() == int(oracle["p_kept"].sum())
    same(1 - kept.double().mean(), oracle["sparsity"])
    equivalent = torch.einsum(
        "odyx,di->oiyx", layer.combination.weight, layer.dictionary.weight[:, :, 0, 0]
    )
    same(equivalent.detach(), oracle["w_equivalent"])
    loss = (y * oracle["gy"]).sum()
    if penalized:
        loss = loss + penalty(layer, oracle["lambda_"].item())
    loss.backward()
    same(x.grad, oracle["dx"])
    same(layer.dictionary.weight.grad, oracle["d_dictionary"])
    same(layer.entries.grad, oracle["d_p_with_l1" if penalized else "d_p_without_l1"])


def penalty(layer, factor):
    """What the method adds to a loss."""
    loss = LCNN(lcnn_lambda=factor).loss(CrossEntropy(), nn.Sequential(layer), None)
    logits, labels = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([0, 1])
    return loss(logits, labels, labels) - CrossEntropy()(logits, labels, labels)
