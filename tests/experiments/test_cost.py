import torch
from torch import nn

import noisyq_fast
from experiments import cost
from experiments.models import ResNet20

IMAGE = torch.zeros(1, 3, 32, 32)


def test_macs_of_resnet20_on_cifar10():
    first = 32 * 32 * 16 * 3 * 9
    stage1 = 6 * 32 * 32 * 16 * 16 * 9
    stage2 = 16 * 16 * 32 * 9 * (16 + 5 * 32)
    stage3 = 8 * 8 * 64 * 9 * (32 + 5 * 64)
    assert cost.macs(ResNet20(), IMAGE) == first + stage1 + stage2 + stage3 + 640


def test_parameters_of_resnet20():
    assert cost.parameters(ResNet20()) == 269_722


def test_size_of_a_float_network_counts_batch_norm_statistics():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    assert cost.size_in_bits(model) == 32 * ((18 + 2) + 4 * 2)


def test_size_of_a_quantized_network_counts_scales():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    noisyq_fast.quantize_model_(model, weight_bits=4, first_last_bits=None)
    bias_and_batch_norm, scales = 2 + 4 * 2, 2 + 1
    assert cost.size_in_bits(model) == 4 * 18 + 32 * (bias_and_batch_norm + scales)
