from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from noisyq_fast import AdderConv2d

ORACLE = Path(__file__).with_name("addernet.npz")
CASES = sorted(name.removesuffix("_y") for name in np.load(ORACLE).files if name.endswith("_y"))


@pytest.fixture(scope="module")
def oracle():
    with np.load(ORACLE) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(params=CASES)
def case(request, oracle):
    start = f"{request.param}_"
    return {k.removeprefix(start): v for k, v in oracle.items() if k.startswith(start)}


def same(actual, expected, dtype):
    tolerance = {"rtol": 0, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5}
    if dtype == torch.float32:
        tolerance["atol"] = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_operator(case, dtype, backend):
    x, weight = (case[name].to(dtype, copy=True).requires_grad_() for name in ("x", "w"))
    stride, padding = ([side, side] for side in case["stride_padding"].tolist())
    y = torch.ops.noisyq.adder_conv2d(x, weight, stride, padding)
    same(y.detach(), case["y"], dtype)
    y.backward(case["gy"].to(dtype))
    same(weight.grad, case["dw_raw"], dtype)
    same(x.grad, case["dx"], dtype)
    assert not torch.allclose(weight.grad.double(), case["dw_true_subgradient"])


def test_layer_normalises_the_gradient_of_its_weight(case):
    outputs, inputs, *kernel = case["w"].shape
    stride, padding = case["stride_padding"].tolist()
    layer = AdderConv2d(inputs, outputs, kernel, stride, padding, bias=False).double()
    layer.weight = nn.Parameter(case["w"].clone())
    x = case["x"].clone().requires_grad_()
    y = layer(x)
    same(y.detach(), case["y"], torch.float64)
    y.backward(case["gy"])
    same(layer.weight.grad, case["dw"], torch.float64)
    same(x.grad, case["dx"], torch.float64)
