"""Whole training steps on the CPU."""

import copy

import pytest
import torch
from comparison import OURS, compare
from training_step import (
    ACTION_UNITS,
    CLASSIFICATION,
    quantized_by_torch_ao,
    quantized_eagerly,
    step_of,
)

from noisyq_fast import quantize_model_

pytestmark = pytest.mark.parametrize(
    "work", [CLASSIFICATION, ACTION_UNITS], ids=["classification", "action_units"]
)


def test_eager_step(benchmark, work):
    model = work.network()
    candidates = {
        "float": step_of(work, copy.deepcopy(model)),
        OURS: step_of(work, quantize_model_(copy.deepcopy(model))),
        "eager, detach": step_of(work, quantized_eagerly(copy.deepcopy(model))),
        "torch.ao fused": step_of(work, quantized_by_torch_ao(copy.deepcopy(model))),
    }
    compare(benchmark, work.title, candidates, rounds=20)


def test_compiled_step(benchmark, work, compiled_afresh):
    model = work.network()
    candidates = {
        "float": step_of(work, torch.compile(copy.deepcopy(model))),
        OURS: step_of(work, torch.compile(quantize_model_(copy.deepcopy(model)))),
        "eager, detach": step_of(work, torch.compile(quantized_eagerly(copy.deepcopy(model)))),
    }
    compare(benchmark, f"{work.title}, each under torch.compile", candidates, rounds=20)
