import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from noisyq_fast.calibration.dfq import absorb_, equalize_, equalize_pair_, through
from noisyq_fast.calibration.folding import Normal
from noisyq_fast.calibration.tracing import Value
from noisyq_fast.calibration.typical import Typical, clipped_relu_mean, relu_mean


@pytest.fixture
def oracle():
    with np.load(Path(__file__).with_name("dfq.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def close(ours, theirs, tolerance=1e-12):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def network(oracle):
    """Two convolutions and, behind the mean over positions, a linear layer."""
    (a, b, *kernel), (c, _, *other), (d, _) = (oracle[f"w{i}"].shape for i in (1, 2, 3))
    layers = nn.Conv2d(b, a, kernel), nn.Conv2d(a, c, other), nn.Linear(c, d)
    first, second, third = layers
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *pool, third).double()
    with torch.no_grad():
        for i, layer in enumerate(layers, 1):
            layer.weight.copy_(oracle[f"w{i}"])
            layer.bias.copy_(oracle[f"b{i}"])
    return model, layers


def test_one_pair(oracle):
    model, (first, second, _) = network(oracle)
    close(equalize_pair_(first, second), oracle["pair_s"])
    close(first.weight.data, oracle["pair_w1"])
    close(first.bias.data, oracle["pair_b1"])
    close(second.weight.data, oracle["pair_w2"])
    close(model(oracle["x"]).detach(), oracle["y"])


def test_chain(oracle):
    model, layers = network(oracle)
    equalize_([(a, b, None) for a, b in itertools.pairwise(layers)])
    for i, layer in enumerate(layers, 1):
        close(layer.weight.data, oracle[f"chain_w{i}"], 1e-9)
        if f"chain_b{i}" in oracle:
            close(layer.bias.data, oracle[f"chain_b{i}"], 1e-9)
    close(model(oracle["x"]).detach(), oracle["y"])
    close(oracle["chain_y"], oracle["y"], 1e-9)


def normal(oracle):
    return Normal(oracle["absorb_beta"].clone(), oracle["absorb_gamma"].abs())


def test_absorption(oracle):
    _, (first, second, _) = network(oracle)
    known = normal(oracle)
    close(absorb_(first, second, known), oracle["absorb_c"])
    close(first.bias.data, oracle["absorb_b1"])
    close(second.bias.data, oracle["absorb_b2"])
    close(known.mean, oracle["absorb_beta"] - oracle["absorb_c"])


def test_means_and_ranges_behind_a_relu(oracle):
    known = normal(oracle)
    close(relu_mean(known.mean, known.std), oracle["relu_mean"])
    close(clipped_relu_mean(known.mean, known.std, 6), oracle["relu6_mean"])
    behind = Typical.of(known, Value(0, torch.Size([1, len(known.mean)]))).rectified()
    close(behind.low[0], oracle["act_range_lo"])
    close(behind.high[0], oracle["act_range_hi"])
    close(behind.mean[0], oracle["relu_mean"])


def test_correction(oracle):
    _, (_, second, _) = network(oracle)
    widths = [int(m[1]) for m in (re.match(r"corr(\d+)_step", name) for name in oracle) if m]
    assert widths
    for bits in widths:
        most = 2 ** (bits - 1) - 1
        scale = oracle["w2"].abs().max() / most
        close(scale, oracle[f"corr{bits}_step"])
        rounded = (oracle["w2"] / scale).round().clamp(-most, most) * scale
        close(rounded, oracle[f"corr{bits}_wq"])
        error = rounded - oracle["w2"]
        ones = torch.eye(error.shape[1], dtype=error.dtype)
        sums = torch.stack([through(second, error, channel) for channel in ones], 1)
        close(sums, oracle[f"corr{bits}_eps_sum"])
        close(-through(second, error, oracle["relu_mean"]), oracle[f"corr{bits}_delta_b2"])
