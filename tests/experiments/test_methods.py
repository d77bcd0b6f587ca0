import pytest
import torch

from experiments import methods
from experiments.config import RunConfig
from experiments.models import ResNet20


def test_quant_sets_the_widths_asked_for_and_8_bits_at_both_ends():
    method = methods.build(RunConfig(method="quant", weight_bits=3, activation_bits=5))
    assert method.label == "quant-w3a5"
    model = method.model(ResNet20())
    widths = [
        (layer.weight_bits, layer.activation_bits)
        for layer in model.modules()
        if hasattr(layer, "weight_bits")
    ]
    assert widths == [(8, 8)] + [(3, 5)] * 18 + [(8, 8)]


def test_baseline_is_cross_entropy_and_adam_on_the_unchanged_network():
    method, model = methods.build(RunConfig()), ResNet20()
    assert method.model(model) is model
    loss = method.loss(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    assert loss.item() == pytest.approx(0.6931, abs=1e-4)
    optimizer = method.optimizer(model.parameters(), lr=0.5)
    assert isinstance(optimizer, torch.optim.Adam)
    assert optimizer.defaults["lr"] == 0.5


def test_method_names_the_options_it_reads():
    assert methods.options(methods.Baseline) == []
    assert methods.options(methods.Quant) == ["weight_bits", "activation_bits"]
