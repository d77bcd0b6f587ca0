from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.models.hashed import hash_weight_


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("hashednets.npz")) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def hashed(layer, index, sign, theta):
    """The layer with the oracle's hashes in place of its own."""
    hash_weight_(layer, compression=index.numel() / len(theta), seed=0)
    (shared,) = layer.parametrizations.weight
    shared.set(index, sign, len(theta))
    values = layer.parametrizations.weight.original
    values.data = theta.clone()
    return layer, values


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_linear(oracle):
    index = oracle["fc_index"]
    layer = nn.Linear(*reversed(index.shape), bias=False).double()
    layer, theta = hashed(layer, index, oracle["fc_sign"], oracle["theta"])
    same(layer.weight.detach(), oracle["fc_v"])
    x = oracle["fc_x"].clone().requires_grad_()
    y = layer(x)
    same(y.detach(), oracle["fc_y"])
    y.backward(oracle["fc_gy"])
    same(theta.grad, oracle["fc_dtheta"])
    same(x.grad, oracle["fc_dx"])


def test_convolution(oracle):
    index, x = oracle["conv_index"], oracle["conv_x"].clone().requires_grad_()
    outputs, inputs, *kernel = index.shape
    padding = fitting_padding(x, kernel, oracle["conv_y"])
    layer = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False).double()
    layer, theta = hashed(layer, index, oracle["conv_sign"], oracle["theta"])
    y = layer(x)
    same(y.detach(), oracle["conv_y"])
    y.backward(oracle["conv_gy"])
    same(theta.grad, oracle["conv_dtheta"])
    same(x.grad, oracle["conv_dx"])


def fitting_padding(x, kernel, y):
    """What the shapes say, at stride 1."""
    return [
        (out - side + size - 1) // 2
        for side, out, size in zip(x.shape[2:], y.shape[2:], kernel, strict=True)
    ]


def test_gradient_sums_by_value(oracle):
    """The oracle's gradient is that of a plain convolution, summed bucket by bucket."""
    index, sign = oracle["conv_index"].long(), oracle["conv_sign"]
    weight = (oracle["theta"][index] * sign).requires_grad_()
    padding = fitting_padding(oracle["conv_x"], weight.shape[2:], oracle["conv_y"])
    F.conv2d(oracle["conv_x"], weight, padding=padding).backward(oracle["conv_gy"])
    sums = torch.zeros_like(oracle["theta"])
    sums.index_add_(0, index.flatten(), (weight.grad * sign).flatten())
    same(sums, oracle["conv_dtheta"])
