"""Whole training steps on a GPU: captured in a CUDA graph, and launched from Python."""

import copy

import pytest
import torch
from comparison import Comparison
from device import MARKS, by_backend, compare_on_device, our_name
from training_step import CLASSIFICATION, quantized_by_torch_ao, quantized_eagerly, step_of

from noisyq_fast import quantize_model_

DTYPES = {
    torch.float32: "float32 (convolutions in TF32)",
    torch.bfloat16: "bfloat16 autocast",
}

pytestmark = [*MARKS, pytest.mark.parametrize("dtype", DTYPES, ids=str)]


@pytest.fixture(autouse=True)
def fastest_convolutions(monkeypatch):
    """What quantization adds weighs most then."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)


def test_captured_step(benchmark, dtype):
    compare_steps(benchmark, dtype, capture=True)


def test_eager_step(benchmark, dtype):
    compare_steps(benchmark, dtype, capture=False)


def compare_steps(benchmark, dtype, capture):
    model = CLASSIFICATION.network()

    def step(change):
        return lambda: step_of(CLASSIFICATION, change(copy.deepcopy(model)), "cuda", dtype)

    candidates = {
        "float": step(lambda model: model),
        **by_backend(step(quantize_model_)),
        "eager, detach": step(quantized_eagerly),
    }
    if not capture:  # It waits for the device, so it cannot be captured.
        candidates["torch.ao fused"] = step(quantized_by_torch_ao)
    how = "captured" if capture else "eager"
    comparison = Comparison(
        f"{CLASSIFICATION.title}, channels_last, {DTYPES[dtype]}, {how}",
        ours=our_name(),
    )
    compare_on_device(benchmark, comparison, candidates, rounds=30, capture=capture)
