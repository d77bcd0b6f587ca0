"""Training on a GPU, with and without a recorded step."""

import pytest
import torch
from test_training import trainer

from experiments.training.cuda_graph import GraphedStep

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def same_kernels_each_time(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def losses(arguments, **options):
    options = {"device": torch.device("cuda"), "batch_size": 64, "epochs": 3} | options
    return [metrics.loss for metrics in trainer(arguments, **options).epochs()]


@needs_gpu
@pytest.mark.parametrize("method", ["baseline", "quant", "dropout", "prune", "weight_decay"])
def test_recorded_step_trains_as_the_plain_one(method):
    plain, recorded = (losses(f"--method {method}{graph}") for graph in ("", " --cuda-graph"))
    assert recorded == pytest.approx(plain, rel=1e-3)


@needs_gpu
def test_gpu_trains_as_the_cpu():
    on_cpu = losses("", device=torch.device("cpu"), epochs=1)
    assert losses("", epochs=1) == pytest.approx(on_cpu, rel=1e-2)


def accumulator(parameter):
    """The node that accumulates its gradients: a new one, unless a graph holds the last."""
    return parameter.view_as(parameter).grad_fn.next_functions[0][0]


def test_recorded_step_inherits_no_stream_from_a_forward_before():
    parameter = torch.nn.Parameter(torch.ones(2))
    cycle = [parameter * 2]
    cycle.append(cycle)
    accumulator(parameter).metadata["made"] = "before"
    del cycle
    assert accumulator(parameter).metadata
    GraphedStep(lambda: None)
    assert not accumulator(parameter).metadata
