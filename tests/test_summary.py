"""What of a network is quantized: who computes how much, who stores what, and why some is float."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from noisyq_fast import (
    AbsMax,
    GroupedLinear,
    calibrate,
    disabled,
    quantize_model_,
    register_layer,
    summary,
)
from noisyq_fast.quantizers import Quantizer

pytestmark = pytest.mark.usefixtures("both_arithmetics")

IMAGE = torch.randn(1, 3, 8, 8)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)
    )


def converted(model, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantize_model_(model, **{"first_last_bits": None} | options)


def rows(model, example):
    return {row.name: row for row in summary(model, example).layers}


def operators(model, example):
    return {op.name: (op.calls, op.macs) for op in summary(model, example).operators}


def test_a_small_network():
    model = converted(network(), weight_bits=3, activation_bits=5)
    found = summary(model, IMAGE)
    conv, norm, linear = found.layers
    assert [row.name for row in found.layers] == ["0", "1", "4"]
    assert (conv.kind, conv.weight_bits, conv.activation_bits) == ("QuantConv2d", 3, 5)
    assert (conv.weight_grid, conv.activation_grid) == ("signed channel", "signed tensor")
    assert (conv.calls, conv.macs, conv.quantized_macs) == (1, 36 * 8 * 27, 36 * 8 * 27)
    assert (conv.parameters, conv.quantized_parameters) == (224, 216)
    assert conv.size_in_bits == 3 * 216 + 32 * 8 + 32 * 8 + 32  # weight, scales, bias, range
    assert norm.size_in_bits == 32 * 4 * 8
    assert (norm.why_float, conv.why_float) == ("no quantized form", "")
    assert [(op.name, op.calls, op.macs) for op in found.operators] == [("relu", 1, 0)]
    assert found.macs == found.quantized_macs == conv.macs + linear.macs
    assert found.float_size_in_bits == 32 * (found.parameters + 2 * 8)
    assert found.parameters == sum(p.numel() for p in model.parameters())


def test_a_table_and_data():
    found = summary(converted(network()), IMAGE)
    text = str(found)
    lines = text.splitlines()
    assert lines[0].split()[:4] == ["layer", "kind", "weight", "input"]
    assert "4 signed channel" in lines[2]
    assert "quantized: 100.0% of 10,656 MACs, 98.9% of 3,130 parameters" in text
    assert (
        "float, no quantized form: 0.0% of the MACs, 0.5% of the parameters (BatchNorm2d x1)"
        in (text)
    )
    assert "biases and the like: 0.0% of the MACs, 0.6% of the parameters" in text
    assert not any(line != line.rstrip() for line in lines)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["macs"] == found.macs
    assert data["layers"][0]["why_float"] == ""


def test_a_float_network():
    found = summary(network(), IMAGE)
    assert found.quantized_macs == found.quantized_parameters == 0
    assert found.size_in_bits == found.float_size_in_bits
    assert {row.why_float for row in found.layers} == {"not converted", "no quantized form"}


class Twice(nn.Module):
    """Calls a layer twice; its first and its last layer share their weight."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(4, 6, bias=False)
        self.table = nn.Embedding(6, 4)
        self.shared = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.last.weight = self.table.weight

    def forward(self, indices, scale=1.0):
        return self.last(self.shared(self.shared(self.table(indices) * scale)))


@pytest.mark.parametrize(
    "example",
    [
        torch.tensor([[1, 2, 3]]),
        (torch.tensor([[1, 2, 3]]), 2.0),
        {"scale": torch.ones(4), "indices": torch.tensor([[1, 2, 3]])},
    ],
)
def test_order_calls_and_shared_weights(example):
    model = converted(Twice())
    found = summary(model, example)
    layers = {row.name: row for row in found.layers}
    assert list(layers) == ["table", "shared", "last", "unused"]
    assert [row.calls for row in layers.values()] == [1, 2, 1, 0]
    assert [row.macs for row in layers.values()] == [0, 96, 72, 0]
    assert layers["table"].activation_bits is None
    assert layers["table"].why_float == ""
    assert layers["unused"].why_float == "not called on the example"
    assert (layers["last"].parameters, layers["last"].size_in_bits) == (0, 32)  # its input's range
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.quantized_parameters == 24 + 16 + 16
    assert found.float_size_in_bits == 32 * found.parameters


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("convert", [True, False])
def test_products_of_attention_are_no_work_of_a_layer(need_weights, convert):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=need_weights)[0]

    model = converted(Model()) if convert else Model()
    layers = rows(model, torch.randn(5, 3, 8))
    assert layers["attention"].macs == 15 * 8 * 24
    assert layers["attention.out_proj"].macs == 15 * 8 * 8
    products = [macs for _, macs in operators(model, torch.randn(5, 3, 8)).values()]
    assert sum(products) == 2 * 3 * 25 * 8
    if convert:
        assert layers["attention"].quantized_macs == layers["attention"].macs
    else:
        out = layers["attention.out_proj"]
        assert out.why_float == "not converted; its weight is read by other code"


def test_float_transformer_layers_are_counted_without_their_fast_path():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    found = summary(model, torch.randn(3, 5, 8))
    assert found.macs == 15 * 8 * (24 + 8 + 16 + 16) + 2 * 3 * 25 * 8
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mkldnn.enabled


def test_a_weight_that_other_code_multiplies_is_float():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.read = nn.Linear(4, 6)
            self.last = nn.Linear(6, 2)
            self.scale = nn.Parameter(torch.randn(2, 3))

        def forward(self, x):
            return self.last(F.linear(self.first(x), self.read.weight.half().float())) @ self.scale

    class Direct(Model):
        def forward(self, x):
            return self.last(self.first(x) @ self.read.weight.t()) @ self.scale

    x = torch.randn(5, 4)
    layers = rows(converted(Direct()), x)
    assert list(layers) == ["", "first", "read", "last"]
    read = layers["read"]
    assert (read.calls, read.macs, read.quantized_macs) == (0, 5 * 24, 0)
    assert (read.weight_bits, read.quantized_parameters) == (None, 0)
    assert read.why_float == "its weight is read by other code"
    assert layers[""].macs == 5 * 6  # of the model's own parameter
    # A copy of a weight is still no activation.
    found = summary(converted(Model()), x)
    assert found.macs == 5 * (16 + 24 + 12 + 6)
    assert not any(op.macs for op in found.operators)


def test_a_model_without_memory():
    with torch.device("meta"):
        found = summary(converted(network()), torch.randn(1, 3, 8, 8))
    assert found.to_dict() == summary(converted(network()), IMAGE).to_dict()


@pytest.mark.parametrize(
    ("layer", "x", "macs"),
    [
        (nn.ConvTranspose2d(4, 6, 3, groups=2), torch.randn(2, 4, 5, 5), 2 * 25 * 4 * 3 * 9),
        (nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 5), 2 * 3 * 6 * 2 * 3),
        (nn.Conv2d(4, 6, 3), torch.randn(4, 5, 5), 9 * 6 * 4 * 9),
        (GroupedLinear(3, 4, 5), torch.randn(2, 3, 4), 2 * 3 * 20),
        (nn.Linear(4, 6), torch.randn(4), 24),
        (nn.Linear(4, 6, bias=False), torch.randn(4), 24),
        (nn.Linear(4, 6), torch.randn(3, 2, 4).transpose(0, 1), 6 * 24),
        (prune.l1_unstructured(nn.Linear(4, 6), "weight", 0.5), torch.randn(2, 4), 2 * 24),
        (parametrizations.weight_norm(nn.Linear(4, 6)), torch.randn(2, 4), 2 * 24),
    ],
)
@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_layers_of_all_kinds(layer, x, macs, convert, autocast):
    model = nn.Sequential(layer)
    if convert and not any("Quant" in type(m).__name__ for m in model.modules()):
        converted(model)
    with torch.autocast("cpu", enabled=autocast):
        found = summary(model, x)
    (row,) = found.layers
    assert (row.macs, found.macs) == (macs, macs)
    assert row.quantized_macs in ((macs,) if row.weight_bits else (0,))
    assert row.parameters == sum(p.numel() for p in model.parameters())
    if row.weight_bits:
        bias = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
        assert row.quantized_parameters == row.parameters - bias


@pytest.mark.parametrize(
    ("product", "shape", "macs"),
    [
        (lambda x, w: torch._grouped_mm(x, w, torch.tensor([3, 5, 5, 9]).int()), (9, 8), 9 * 128),
        (lambda x, w: torch._grouped_mm(x, w), (4, 16, 8), 4 * 16 * 128),
        (lambda x, w: torch._grouped_mm(x, w[0], torch.tensor([8, 16]).int()), (2, 3, 8), 3 * 128),
        (lambda x, w: torch._grouped_mm(x, w[0], torch.tensor([8]).int()), (8, 8), 8 * 128),
        (lambda x, w: torch.addbmm(w[0, :3], x, w), (4, 3, 8), 4 * 3 * 128),
        (lambda x, w: torch.addr(w[0], x, w[0, 0]), (8,), 128),
        (lambda x, w: torch.vdot(x, w[0, 0]), (16,), 16),
    ],
)
def test_rarer_products(product, shape, macs):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 8, 16, dtype=torch.bfloat16))

        def forward(self, x):
            return product(x, self.weight)

    found = summary(nn.Sequential(Layer()), torch.randn(shape, dtype=torch.bfloat16))
    assert (found.layers[0].macs, found.macs) == (macs, macs)


def test_a_bilinear_layer():
    x, y = torch.randn(2, 7, 3), torch.randn(2, 7, 4)
    assert summary(nn.Bilinear(3, 4, 5), (x, y)).macs == 14 * 60


def test_recurrent_layers():
    found = summary(nn.LSTM(4, 8, batch_first=True), torch.randn(2, 5, 4))
    assert found.macs == found.layers[0].macs == 10 * 32 * (4 + 8)
    assert found.layers[0].why_float == "no quantized form"


def test_reasons():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)), Scaled(4, 4))
    overrides = {"0": None, "1": {"weight": None}, "2": {"activation": None}}
    converted(model, overrides=overrides)
    model[3].weight_quantizer.enabled = False
    layers = rows(model, torch.randn(2, 4))
    assert [row.why_float for row in layers.values()] == [
        "kept float",
        "weight without a quantizer",
        "input without a quantizer",
        "weight quantizer disabled",
        "",
        "",
        "a subclass of Linear with a forward of its own: see register_layer",
    ]
    assert [row.quantized_macs for row in layers.values()] == [0, 0, 0, 0, 32, 32, 0]
    assert [row.quantized_parameters for row in layers.values()] == [0, 0, 16, 0, 16, 16, 0]
    with disabled(model):
        assert summary(model, torch.randn(2, 4)).quantized_macs == 0


def test_quantizers_of_ones_own():
    class Learned(Quantizer):
        def __init__(self):
            super().__init__(4)
            self.step = nn.Parameter(torch.ones(()))

        def fake_quantize(self, x):
            return x * self.step

    model = converted(nn.Sequential(nn.Linear(4, 4)), weight=Learned(), activation=AbsMax(4, None))
    found = summary(model, torch.randn(2, 4))
    assert found.layers[0].weight_grid == "Learned tensor"
    assert found.parameters == 16 + 4 + 1
    assert found.size_in_bits == 4 * 16 + 32 * (1 + 4 + 1)  # scale, bias, step; a dynamic input


def state(model):
    return (
        [(k, v.clone()) for k, v in model.state_dict().items()],
        [m.training for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        torch.get_rng_state(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("look", [summary, lambda model, x: calibrate(model, [x])])
@pytest.mark.parametrize("fails", [True, False])
def test_nothing_moves(look, fails):
    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand_like(x)

    model = converted(nn.Sequential(network(), Random(), nn.Dropout(0.5)))
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    model[0][1].eval()
    model[0][4].bias.requires_grad_(False)
    before = state(model)
    if fails:
        with pytest.raises(ValueError, match="the model does not run on"):
            look(model, torch.randn(1, 3, 9, 9))
    else:
        look(model, IMAGE)
    after = state(model)
    names = {"0.0", "0.4"} if look is not summary and not fails else set()
    for (name, a), (_, b) in zip(after[0], before[0], strict=True):
        if not any(name.startswith(f"{layer}.input_quantizer.running") for layer in names):
            assert torch.equal(a, b), name
    assert str(after[1:]) == str(before[1:])
    assert all(q.enabled for q in model.modules() if isinstance(q, Quantizer))


@pytest.mark.parametrize("look", [summary, lambda model, x: calibrate(model, [x])])
@pytest.mark.parametrize("training", [True, False])
def test_a_graph_may_wait_for_its_backward(look, training):
    def gradients(between):
        torch.manual_seed(0)
        model = converted(network())
        model(IMAGE)
        loss = model.train(training)(IMAGE).sum()
        between(model, IMAGE)
        loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    expected = gradients(lambda model, x: None)
    assert all(map(torch.equal, gradients(look), expected))


@pytest.mark.parametrize("look", [summary, lambda model, x: calibrate(model, [x])])
def test_only_devices_of_the_model_are_asked_for_their_random_state(look, monkeypatch):
    model = converted(network())
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("initialized"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        look(model, IMAGE)
        quantize_model_(network(), example=IMAGE)


def test_weights_that_are_made_anew_are_all_counted():
    model = nn.Sequential(*(parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(60)))
    sizes = {row.size_in_bits for row in summary(converted(model), torch.randn(2, 4)).layers}
    assert sizes == {4 * 16 + 32 * (4 + 4 + 1)}


class Shared(nn.Module):
    """A weight of few values."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, values):
        return values.repeat(self.shape.numel() // len(values)).view(self.shape)

    def right_inverse(self, weight):
        return weight.flatten()[:4].clone()


def test_a_weight_made_of_few_values_is_stored_as_these():
    layers = [nn.Linear(64, 8, bias=False) for _ in range(2)]
    parametrize.register_parametrization(layers[1], "weight", Shared(layers[1].weight.shape))
    x = torch.randn(1, 64)
    of_layer = [summary(layer, x) for layer in layers]
    assert [s.layers[0].kind for s in of_layer] == ["Linear", "Linear (Shared)"]
    assert [s.parameters for s in of_layer] == [512, 4]
    assert [s.size_in_bits for s in of_layer] == [32 * 512, 32 * 4]
    of_layer = [summary(converted(layer), x) for layer in layers]
    assert [s.layers[0].kind for s in of_layer] == ["QuantLinear", "QuantLinear (Shared)"]
    assert [s.quantized_parameters for s in of_layer] == [512, 4]
    scales = 8 + 1
    assert [s.size_in_bits for s in of_layer] == [4 * 512 + 32 * scales, 32 * (4 + scales)]
    assert [s.float_size_in_bits for s in of_layer] == [32 * 512, 32 * 4]


def test_spectral_norm_stays_as_it_is():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    summary(model, torch.randn(2, 4))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("convert", [True, False])
def test_an_embedding_with_a_largest_norm(convert):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 4, max_norm=0.1)
            self.inner = nn.Linear(4, 4)
            self.last = nn.Linear(4, 6, bias=False)
            self.last.weight = self.table.weight

        def forward(self, indices):
            return self.last(self.inner(self.table(indices)))

    model, indices = Tied(), torch.tensor([[1, 2]])
    before = model.table.weight.clone()
    if convert:
        converted(model, example=indices)
        calibrate(model, [indices])
    assert [row.macs for row in summary(model, indices).layers] == [0, 32, 48]
    assert torch.equal(model.table.weight, before)
    assert model.table.weight.requires_grad


def test_compiled_models_and_inference_mode():
    model = converted(network())
    expected = summary(model, IMAGE)
    compiled = torch.compile(model, backend="eager")
    compiled(torch.randn(2, 3, 8, 8))
    assert summary(compiled, IMAGE).quantized_macs == expected.quantized_macs
    calibrate(compiled, [IMAGE])
    assert model[0].input_quantizer.range == IMAGE.abs().max()
    with torch.inference_mode():
        assert summary(model, IMAGE.clone()) == expected


def test_as_many_as_pytorch_counts():
    model = network().eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(IMAGE)
    assert summary(model, IMAGE).macs == counter.get_total_flops() // 2


def test_a_registered_layer():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    from noisyq_fast import QuantLayer

    class QuantDoubled(QuantLayer, Doubled):
        def compute(self, x, weight, bias):
            return 2 * F.linear(x, weight, bias)

    register_layer(Doubled, QuantDoubled)
    (row,) = summary(converted(nn.Sequential(Doubled(4, 4))), torch.randn(2, 4)).layers
    assert (row.kind, row.quantized_macs) == ("QuantDoubled", 32)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model: got int, takes"):
        summary(3, IMAGE)
    with pytest.raises(ValueError, match=r"example: the model does not run on it: .*channels"):
        summary(network(), torch.randn(1, 4, 8, 8))
    with pytest.raises(ValueError, match="layer '0' has no weight yet: run the lazy model once"):
        summary(nn.Sequential(nn.LazyLinear(2)), torch.randn(1, 4))
