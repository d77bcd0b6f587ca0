"""A whole training step: ResNet-20 on a batch of 128 images, channels_last, Adam."""

import copy

import peers
import torch
import torch.nn.functional as F
from comparison import OURS, compare
from torch.ao.quantization import FusedMovingAvgObsFakeQuantize

from experiments.models import ResNet20
from noisyq_fast import quantize_model_


def step_of(model):
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    images = torch.randn(128, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (128,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def quantized_eagerly(model):
    return peers.quantize_with(
        model,
        activation=lambda: peers.DetachForm(None),
        convolution=lambda: peers.DetachForm((1, 2, 3)),
        linear=lambda: peers.DetachForm((1,)),
    )


def quantized_by_torch_ao(model):
    def weight():
        return peers.torch_ao(FusedMovingAvgObsFakeQuantize, per_channel=True)

    return peers.quantize_with(
        model,
        activation=lambda: peers.torch_ao(FusedMovingAvgObsFakeQuantize, per_channel=False),
        convolution=weight,
        linear=weight,
    )


def test_eager_step(benchmark):
    model = ResNet20()
    candidates = {
        "float": step_of(copy.deepcopy(model)),
        OURS: step_of(quantize_model_(copy.deepcopy(model))),
        "eager, detach": step_of(quantized_eagerly(copy.deepcopy(model))),
        "torch.ao fused": step_of(quantized_by_torch_ao(copy.deepcopy(model))),
    }
    compare(benchmark, "ResNet-20 training step, batch 128", candidates, rounds=20)


def test_compiled_step(benchmark):
    model = ResNet20()
    candidates = {
        "float": step_of(torch.compile(copy.deepcopy(model))),
        OURS: step_of(torch.compile(quantize_model_(copy.deepcopy(model)))),
        "eager, detach": step_of(torch.compile(quantized_eagerly(copy.deepcopy(model)))),
    }
    title = "ResNet-20 training step, batch 128, each under torch.compile"
    compare(benchmark, title, candidates, rounds=20)
