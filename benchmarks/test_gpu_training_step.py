"""Whole training steps on a GPU: captured in a CUDA graph, and launched from Python."""

import copy

import pytest
import torch
from comparison import Comparison
from device import MARKS, by_backend, compare_on_device
from training_step import (
    CLASSIFICATION,
    FORMS,
    FUSED,
    INTEGER,
    LSQ_STEPS,
    OURS,
    RECOMPUTE,
    RESNET18,
    step_of,
)

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
    compare_steps(benchmark, dtype, CLASSIFICATION, capture=True)


def test_larger_captured_step(benchmark, dtype):
    compare_steps(benchmark, dtype, RESNET18, capture=True)


def test_eager_step(benchmark, dtype):
    compare_steps(benchmark, dtype, CLASSIFICATION, capture=False)


def compare_steps(benchmark, dtype, work, capture):
    model, example = work.network(), work.example()

    def step(name):
        return lambda: step_of(work, FORMS[name](copy.deepcopy(model), example), "cuda", dtype)

    names = ["float", LSQ_STEPS, INTEGER, FUSED, RECOMPUTE, "eager, detach"]
    if not capture:  # It waits for the device, so it cannot be captured.
        names.append("torch.ao fused")
    candidates = by_backend(step(OURS)) | {name: step(name) for name in names}
    how = "captured" if capture else "eager"
    comparison = Comparison(
        f"{work.title}, channels_last, {DTYPES[dtype]}, {how}",
        ours="float",
    )
    compare_on_device(benchmark, comparison, candidates, rounds=30, capture=capture)
