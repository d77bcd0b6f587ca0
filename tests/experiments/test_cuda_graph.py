"""Training on a GPU, with and without a recorded step."""

import pytest
import torch
from test_training import trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def same_kernels_each_time(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def losses(arguments, **options):
    options = {"device": torch.device("cuda"), "batch_size": 64, "epochs": 3} | options
    return [metrics.loss for metrics in trainer(arguments, **options).epochs()]


@pytest.mark.parametrize("method", ["baseline", "quant", "dropout", "prune", "weight_decay"])
def test_recorded_step_trains_as_the_plain_one(method):
    plain, recorded = (losses(f"--method {method}{graph}") for graph in ("", " --cuda-graph"))
    assert recorded == pytest.approx(plain, rel=1e-3)


def test_gpu_trains_as_the_cpu():
    on_cpu = losses("", device=torch.device("cpu"), epochs=1)
    assert losses("", epochs=1) == pytest.approx(on_cpu, rel=1e-2)
