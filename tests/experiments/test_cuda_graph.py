"""Training on a GPU, with and without a recorded step."""

from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_training import EXCHANGED, trainer
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.methods import METHODS
from experiments.training.cuda_graph import GraphedStep
from experiments.training.procedure import Batch

RECORDED = [
    *("baseline", "quant", "quant --arithmetic integer", "dropout", "prune", "weight_decay"),
    *("lsq", "pact", "qil", "dsq", "aqd", "elr"),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def same_kernels_each_time(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def losses(arguments, **options):
    options = {"device": torch.device("cuda"), "batch_size": 64, "epochs": 3} | options
    return [metrics.loss for metrics in trainer(arguments, **options).epochs()]


@needs_gpu
@pytest.mark.parametrize(
    "arguments",
    [*(f"--method {name}" for name in RECORDED), *(a for a in EXCHANGED if "us_slim" not in a)],
)
def test_recorded_step_trains_as_the_plain_one(arguments):
    plain, recorded = (losses(f"{arguments}{graph}") for graph in ("", " --cuda-graph"))
    assert recorded == pytest.approx(plain, rel=1e-3)


@needs_gpu
def test_gpu_trains_as_the_cpu():
    on_cpu = losses("", device=torch.device("cpu"), epochs=1)
    assert losses("", epochs=1) == pytest.approx(on_cpu, rel=1e-2)


class AsksTheHost(TorchDispatchMode):
    """Refuses what waits for a number of the device, which a recording forbids."""

    REFUSED = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in self.REFUSED, function
        if function is torch.ops.aten.index_put_.default:
            assert args[2].dim(), "x[indices] = number: the number is on the CPU"
        if function is torch.ops.aten.segment_reduce.default:
            assert kwargs.get("unsafe"), "lengths are checked"
        return function(*args, **kwargs or {})


def one_hot(labels, classes):
    """torch's asks for the largest label, but not on a GPU."""
    return (labels.unsqueeze(1) == torch.arange(classes)).long()


def quantized(name):
    """The method, with 4-bit weights where it can have them."""
    method = METHODS[name]
    alone = "quant" in method.NOT_WITH or (method.REPLACES == "quantizer" and name != "quant")
    return f"--method {name}" if alone else f"--method {name} --weight-bits 4"


@pytest.mark.parametrize("arguments", [*map(quantized, METHODS), *EXCHANGED])
def test_a_step_of_any_method_can_be_recorded(arguments, monkeypatch):
    monkeypatch.setattr(F, "one_hot", one_hot)
    ours = trainer(arguments, train_size=32, batch_size=16, epochs=4)
    procedure = ours.procedure
    procedure.begin_epoch(0)
    _, samples, batch = next(ours.parts.batches(0))
    pair = ours.task.pair(*batch)
    procedure.networks.train()
    procedure.step(Batch(samples, *pair, share=1.0))  # the optimizer makes its state
    with AsksTheHost():
        procedure.step(Batch(samples, *pair, share=1.0))


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


def test_a_step_is_warmed_up_beside_recorded_once_and_replayed(monkeypatch):
    log, place = [], ["main"]

    @contextmanager
    def within(where):
        place.append(where)
        yield
        place.pop()

    def stream(name):
        return SimpleNamespace(name=name, wait_stream=lambda _: log.append(f"{name} waits"))

    def step(x, factor):
        log.append(f"step in {place[-1]}")
        return x * factor

    graph = SimpleNamespace(replay=partial(log.append, "replay"))
    monkeypatch.setattr(torch.cuda, "Stream", partial(stream, "side"))
    monkeypatch.setattr(torch.cuda, "current_stream", partial(stream, "main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda side: within(side.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: within("graph"))
    recorded = GraphedStep(step)
    for size in (2, 2, 1, 2, 2, 2):
        assert recorded(torch.full((size,), 3.0), factor=2).tolist() == [6.0] * size
    warm_up = ["side waits", "step in side", "main waits"]
    assert log == [*warm_up * 2, "step in main", *warm_up, "step in graph", "replay", "replay"]
