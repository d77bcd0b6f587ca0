import math

import pytest
import torch
from torch import nn

from experiments.training.evaluation import Evaluation, accuracy, predict


def test_predicts_in_order_and_in_float32():
    class Echo(nn.Module):
        def forward(self, x):
            return x.bfloat16()

    images = torch.arange(1200).float().reshape(600, 2)
    logits = predict(Echo(), torch.arange(600), lambda samples: images[samples] / 2)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, (images / 2).bfloat16().float())


def test_accuracy_of_nothing_is_none():
    assert accuracy(torch.tensor([], dtype=torch.bool)) is None
    assert accuracy(torch.tensor([True, False, False, False])) == 0.25


def test_loss_and_accuracy():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    evaluation = Evaluation.of(logits, torch.tensor([1, 0]))
    assert evaluation.accuracy == 0.5
    assert evaluation.loss == pytest.approx((math.log(2) + math.log(4 / 3)) / 2)


def test_calibration_error_is_the_distance_of_confidence_from_accuracy():
    # Ten predictions at confidence 0.9 of which half are right.
    logits = torch.tensor([[math.log(9), 0.0]]).repeat(10, 1)
    labels = torch.tensor([0, 1] * 5)
    assert Evaluation.of(logits, labels).calibration_error == pytest.approx(0.4, abs=1e-5)
