from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from experiments.methods.train_longer import ghosts, rate_factor
from experiments.training.procedure import Batch


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("ghost_bn.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def test_batch_norm_sees_a_ghost_batch_at_a_time(oracle):
    x = oracle["x"].requires_grad_()
    norm = nn.BatchNorm2d(x.shape[1]).double()
    with torch.no_grad():
        norm.weight.copy_(oracle["weight"])
        norm.bias.copy_(oracle["bias"])
    indices = torch.arange(len(x))
    parts = ghosts(Batch(indices, x, indices, share=1.0), oracle["chunk"].item())
    assert sum(part.share for part in parts) == pytest.approx(1)
    y = torch.cat([norm(part.inputs) for part in parts])
    y.backward(oracle["gy"])
    found = {
        "y": y.detach(),
        "dx": x.grad,
        "dweight": norm.weight.grad,
        "dbias": norm.bias.grad,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
    }
    for name, value in found.items():
        torch.testing.assert_close(value, oracle[name], rtol=0, atol=1e-11, msg=name)


def test_rate(oracle):
    sizes = oracle["lr_scaling_in_batch"].tolist()
    small = sizes[oracle["lr_scaling"].tolist().index(1.0)]
    factors = torch.tensor([rate_factor(size, small) for size in sizes], dtype=torch.float64)
    torch.testing.assert_close(factors, oracle["lr_scaling"], rtol=0, atol=1e-11)
