"""What a network of the study costs to store and to run."""

import torch
from torch import nn

import noisyq_fast
from experiments.models import ResNet20

IMAGE = torch.zeros(1, 3, 32, 32)


def test_resnet20_on_cifar10():
    summary = noisyq_fast.summary(ResNet20(), IMAGE)
    first = 32 * 32 * 16 * 3 * 9
    stage1 = 6 * 32 * 32 * 16 * 16 * 9
    stage2 = 16 * 16 * 32 * 9 * (16 + 5 * 32)
    stage3 = 8 * 8 * 64 * 9 * (32 + 5 * 64)
    assert summary.macs == first + stage1 + stage2 + stage3 + 640
    assert summary.parameters == 269_722


def test_size_of_a_float_network_counts_batch_norm_statistics():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    assert noisyq_fast.summary(model, IMAGE).size_in_bits == 32 * ((54 + 2) + 4 * 2)


def test_size_of_a_quantized_network_counts_scales():
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2))
    noisyq_fast.quantize_model_(model, weight_bits=4, first_last_bits=None)
    bias_and_batch_norm, scales = 2 + 4 * 2, 2 + 1
    size = noisyq_fast.summary(model, IMAGE).size_in_bits
    assert size == 4 * 54 + 32 * (bias_and_batch_norm + scales)
