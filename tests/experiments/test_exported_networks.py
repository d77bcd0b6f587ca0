"""Networks of other layers and of several widths, exported: as a graph of PyTorch, and to ONNX."""

import contextlib

import pytest
import torch
from torch import nn

import noisyq_fast
from experiments.methods import METHODS
from experiments.methods.quant import Quant
from experiments.models.slimmable import set_width
from noisyq_fast import AdderConv2d, AdderLinear

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LAYERS = ["adder", "hashed", "lcnn"]
CHANNELS = ["slimmable", "us_slimmable"]
BITS = ["adabits", "quantizable"]


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        sizes = [(3, 8), (8, 8), (8, 16)]
        self.layers = nn.Sequential(
            *(
                layer
                for inputs, outputs in sizes
                for layer in (
                    nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                    nn.BatchNorm2d(outputs, momentum=1.0),  # knows a batch at once
                    nn.ReLU(),
                )
            )
        )
        self.classifier = nn.Linear(16, 10)

    def forward(self, x):
        return self.classifier(self.layers(x).mean((2, 3)))


def evaluated(name, arithmetic=None):
    """A network of a method that has seen a batch, in evaluation at one of its widths."""
    torch.manual_seed(0)
    method = METHODS[name]().with_defaults()
    model = method.network(Small(), IMAGES)
    if arithmetic:
        model = Quant(4, 4, arithmetic=arithmetic).network(model, IMAGES)
    model.train()
    if name in CHANNELS:
        for width in (1, 0.75, 0.5, 0.25):
            set_width(model, width)
            model(IMAGES)
        set_width(model, 0.5)
    elif name in BITS:
        for width in method.trained:
            with noisyq_fast.set_bits(model, width):
                model(IMAGES)
    else:
        model(IMAGES)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "arithmetic"),
    [
        *((name, None) for name in [*LAYERS, *CHANNELS, *BITS, "hash_knn"]),
        *((name, "float") for name in [*LAYERS, *CHANNELS, "hash_knn"]),
        *((name, "integer") for name in [*CHANNELS, "hashed", "lcnn"]),
    ],
)
def test_the_graph_of_a_network_gives_its_outputs_to_the_bit(name, arithmetic):
    model = evaluated(name, arithmetic)
    expected = model(IMAGES)
    assert expected.std(0).min() > 0
    at_width = noisyq_fast.set_bits(model, 3) if name in BITS else contextlib.nullcontext()
    with at_width:
        exported = torch.export.export(model, (IMAGES,)).module()
        assert torch.equal(exported(IMAGES), model(IMAGES))


def run_onnx(model, x):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(output)


@pytest.mark.parametrize("name", [*LAYERS, *CHANNELS, "hash_knn"])
def test_a_float_network_runs_in_onnxruntime(name):
    model = evaluated(name)
    expected = model(IMAGES).detach()
    assert expected.std(0).min() > 1e-4
    torch.testing.assert_close(run_onnx(model, IMAGES), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(AdderConv2d(3, 4, (3, 2), (2, 1), (1, 0)), (2, 3, 7, 6)), (AdderLinear(5, 3), (2, 5))],
)
def test_layers_that_add_run_in_onnxruntime(layer, shape):
    x = torch.randn(shape)
    torch.testing.assert_close(run_onnx(layer.eval(), x), layer(x).detach())
