"""Whole training steps on the CPU."""

import copy

import torch
from comparison import OURS, compare
from training_step import quantized_by_torch_ao, quantized_eagerly, step_of

from experiments.models import ResNet20
from noisyq_fast import quantize_model_


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
