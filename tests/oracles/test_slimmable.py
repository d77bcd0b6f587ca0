from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.losses import imitation
from experiments.methods.slimmable import add_gradients
from experiments.models.slimmable import divisible, make_slimmable_


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("slimmable.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def close(value, expected):
    torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-10)


def test_channels_are_made_divisible(oracle):
    tables = [name for name in oracle if name.startswith("make_divisible_") and name[-1] != "n"]
    assert tables
    for name in tables:
        counts, divisor = oracle["make_divisible_in"].tolist(), int(name.rpartition("_")[2])
        assert [divisible(count, divisor) for count in counts] == oracle[name].tolist()


class Network(nn.Module):
    """That of the oracle: convolution, batch norm, ReLU, mean, linear."""

    def __init__(self, conv, fc, bias):
        super().__init__()
        channels, inputs, size, _ = conv.shape
        self.conv = nn.Conv2d(inputs, channels, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, len(fc))
        self.double()
        with torch.no_grad():
            for parameter, value in zip(
                (self.conv.weight, self.fc.weight, self.fc.bias), (conv, fc, bias), strict=True
            ):
                parameter.copy_(value)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def trained(model, oracle, widths, distils):
    """Logits of each width, in the order of `widths`; gradients add up."""
    seen = []

    def forward():
        seen.append(model(oracle["x"]))
        return seen[-1]

    def loss(logits, widest):
        if widest is not None and distils:
            return imitation(logits, widest)
        return F.cross_entropy(logits, oracle["labels"])

    add_gradients(model, widths, forward, loss)
    return torch.stack(seen)


def divisor_of(channels):
    return int(np.gcd.reduce(channels.numpy()))


def test_step_at_every_width_with_private_norms(oracle):
    widths, divisor = oracle["widths"].tolist(), divisor_of(oracle["channels"])
    model = Network(oracle["conv_w"], oracle["fc_w"], oracle["fc_b"])
    make_slimmable_(model, widths, oracle["x"], private=True, divisor=divisor).train()
    plan = model.conv.plan
    count = len(oracle["conv_w"])
    assert [plan.channels(count, width) for width in widths] == oracle["channels"].tolist()

    logits = trained(model, oracle, sorted(widths, reverse=True), distils=False)
    ascending = sorted(range(len(widths)), key=widths.__getitem__)
    close(logits.flip(0), oracle["s_logits"][ascending])
    close(model.conv.weight.grad, oracle["s_d_conv_w"])
    close(model.fc.weight.grad, oracle["s_d_fc_w"])
    close(model.fc.bias.grad, oracle["s_d_fc_b"])
    for width in widths:
        norm, name = model.bn.of_widths[plan.place(width)], round(100 * width)
        close(norm.running_mean, oracle[f"s_bn_mean_{name}"])
        close(norm.running_var, oracle[f"s_bn_var_{name}"])
        close(norm.weight.grad, oracle[f"s_bn_dweight_{name}"])


def test_sandwich_with_distillation_and_shared_norms(oracle):
    widths = oracle["us_widths"].tolist()
    model = Network(oracle["us_conv_w"], oracle["us_fc_w"], oracle["fc_b"])
    with torch.no_grad():
        model.bn.weight.copy_(oracle["us_bn_weight"])
        model.bn.bias.copy_(oracle["us_bn_bias"])
    divisor = divisor_of(oracle["us_channels"])
    least = [min(widths), 1.0]
    make_slimmable_(model, least, oracle["x"], private=False, divisor=divisor).train()
    count = len(oracle["us_conv_w"])
    counts = [model.conv.plan.channels(count, width) for width in widths]
    assert counts == oracle["us_channels"].tolist()

    close(trained(model, oracle, widths, distils=True), oracle["us_logits"])
    for name, parameter in (
        ("conv_w", model.conv.weight),
        ("fc_w", model.fc.weight),
        ("fc_b", model.fc.bias),
        ("bn_weight", model.bn.weight),
        ("bn_bias", model.bn.bias),
    ):
        close(parameter.grad, oracle[f"us_d_{name}"])
