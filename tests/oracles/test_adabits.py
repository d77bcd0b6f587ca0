"""The gradients of a step of AdaBits against the authors' code, in float64."""

import torch
import torch.nn.functional as F
from learned_values import load
from torch import nn
from torch.testing import assert_close

from noisyq_fast import PACT, SAT, ManyWidths, QuantConv2d, QuantLinear, set_bits, split_norms_

ORACLE = load("adabits")
WIDTHS = ORACLE["bits"].tolist()


def inputs(starts):
    pairs = zip(WIDTHS, starts.tolist(), strict=True)
    return ManyWidths({width: PACT(width, start=start) for width, start in pairs})


def network():
    """A convolution that a batch norm follows, without the scale of SAT, and a linear layer with
    it. Clipping levels and batch norms belong to a width, weights to all."""
    conv, fc = (
        layer(
            *reversed(weight.shape[:2]),
            *weight.shape[2:3],
            **options,
            weight=ManyWidths(SAT(4, rescale=rescale), WIDTHS),
            activation=inputs(ORACLE[f"alpha_{name}"]),
        )
        for name, layer, weight, rescale, options in (
            ("conv", QuantConv2d, ORACLE["conv_w"], False, {"padding": 1, "bias": False}),
            ("fc", QuantLinear, ORACLE["fc_w"], True, {}),
        )
    )
    model = nn.Sequential(
        conv,
        nn.BatchNorm2d(len(ORACLE["conv_w"])),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        fc,
    )
    with torch.no_grad():
        conv.weight.copy_(ORACLE["conv_w"])
        fc.weight.copy_(ORACLE["fc_w"])
        fc.bias.copy_(ORACLE["fc_b"])
    return split_norms_(model, WIDTHS)


def close(actual, expected):
    size = expected.abs().max().item()
    assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4 * size)


def test_losses_logits_gradients_and_statistics():
    model = network()
    for i, width in enumerate(WIDTHS):
        with set_bits(model, width):
            logits = model(ORACLE["x"].float())
            loss = F.cross_entropy(logits, ORACLE["labels"])
            loss.backward()
        close(logits.detach(), ORACLE["logits"][i])
        close(loss.detach(), ORACLE["losses"][i])
    conv, norm, fc = model[0], model[1], model[5]
    close(conv.weight.grad, ORACLE["d_conv_w"])
    close(fc.weight.grad, ORACLE["d_fc_w"])
    close(fc.bias.grad, ORACLE["d_fc_b"])
    for i, width in enumerate(map(str, WIDTHS)):
        close(conv.input_quantizer.each[width].clip.grad, ORACLE["d_alpha_conv"][i])
        close(fc.input_quantizer.each[width].clip.grad, ORACLE["d_alpha_fc"][i])
        close(norm.each[width].weight.grad, ORACLE["d_bn_weight"][i])
        close(norm.each[width].bias.grad, ORACLE["d_bn_bias"][i])
        close(norm.each[width].running_mean, ORACLE["bn_running_mean"][i])
        close(norm.each[width].running_var, ORACLE["bn_running_var"][i])
