"""Weights that are quantized once: the same bits, until something changes them."""

import copy
import pickle

import pytest
import torch
from torch import nn

import noisyq_fast
from noisyq_fast import LSQ, AbsMax, GroupedLinear, freeze_weights_, fuse_, quantize_model_

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.conv_norm = nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.heads = GroupedLinear(2, 8, 3)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.conv_norm(self.conv(x)) + x).relu().flatten(2).mT
        x = self.attention(x, x, x)[0].mean(1)
        return self.heads(x.unsqueeze(1).expand(-1, 2, -1))


def network(arithmetic="fused", **options):
    torch.manual_seed(0)
    integer = "float" if arithmetic == "float" else "integer"
    model = quantize_model_(Network(), example=X, arithmetic=integer, **options)
    if arithmetic == "fused":
        fuse_(model, X)
    with torch.no_grad():
        model(X)
    return model.eval()


def layers(model):
    return [m for m in model.modules() if isinstance(m, noisyq_fast.QuantLayer)]


def check_frozen(model, x=X):
    """Outputs are those of a copy that is not frozen."""
    thawed = copy.deepcopy(model).train().eval()
    with torch.no_grad():
        assert torch.equal(model(x), thawed(x))
        assert torch.equal(model(x), thawed(x))  # with what the first call has made


@pytest.mark.parametrize("options", [{}, {"weight": LSQ(4), "activation": LSQ(4)}], ids=str)
@pytest.mark.parametrize("arithmetic", ["float", "integer", "fused"])
@pytest.mark.filterwarnings("ignore:.*below 0")
def test_outputs_stay_and_weights_are_quantized_once(arithmetic, options, monkeypatch):
    model = freeze_weights_(network(arithmetic, **options))
    check_frozen(model)
    for layer in layers(model):
        monkeypatch.setattr(layer.weight_quantizer, "codes", None)
        monkeypatch.setattr(layer.weight_quantizer, "fake_quantize", None)
    with torch.inference_mode():
        model(X)
    with pytest.raises(TypeError, match="NoneType"):
        model(X)  # records gradients


@pytest.mark.parametrize("options", [{}, {"weight": LSQ(4)}], ids=["absmax", "lsq"])
@pytest.mark.parametrize("arithmetic", ["float", "fused"])
def test_what_changes_a_weight_is_seen(arithmetic, options):
    model = freeze_weights_(network(arithmetic, **options))
    other = network(arithmetic, **options)
    check_frozen(model)
    with torch.no_grad():
        model.conv.weight.mul_(-2)
        check_frozen(model)
        model.conv_norm.weight.add_(1)
        model.conv_norm.running_var.mul_(3)
        check_frozen(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    optimizer.step()
    check_frozen(model)
    model.load_state_dict(other.state_dict())
    check_frozen(model)
    model.conv.weight = nn.Parameter(torch.randn_like(model.conv.weight))
    check_frozen(model)
    model.conv.weight.data.mul_(2)
    freeze_weights_(model)
    check_frozen(model)
    with noisyq_fast.disabled(model):
        check_frozen(model)
    noisyq_fast.calibrate(model, [3 * X])
    check_frozen(model)
    noisyq_fast.calibrate(model, [3 * X], "absmax")
    check_frozen(model)
    model.bfloat16()
    check_frozen(model, X.bfloat16())


def test_widths_are_switched():
    model = freeze_weights_(network("integer", weight=noisyq_fast.ManyWidths(LSQ(4), [4, 2])))
    with torch.no_grad():
        wide = model(X)
        with noisyq_fast.set_bits(model, 2):
            assert not torch.equal(model(X), wide)
        assert torch.equal(model(X), wide)


def test_a_copy_makes_its_own():
    model = freeze_weights_(network())
    with torch.no_grad():
        model(X)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(layer.made_of_weights == {} for layer in layers(again))
        with torch.no_grad():
            again.conv.weight.neg_()
        check_frozen(again)
    assert "made" not in " ".join(model.state_dict())


def test_training_ends_it():
    model = freeze_weights_(network())
    with torch.no_grad():
        model(X)
    assert all(layer.made_of_weights for layer in layers(model))
    model.train()
    assert all(layer.made_of_weights is None for layer in layers(model))
    with pytest.raises(ValueError, match=r"got a model in training mode; call model\.eval"):
        freeze_weights_(model)
    with pytest.raises(ValueError, match="Linear without quantized layers"):
        freeze_weights_(nn.Linear(2, 2))


def test_a_float_model_has_none_of_it():
    model, other = freeze_weights_(network("integer")), Network()
    with torch.no_grad():
        model(X)
    noisyq_fast.dequantize_model_(model)
    assert vars(model.conv).keys() == vars(other.conv).keys()


def test_a_nan_is_not_lost():
    model = freeze_weights_(network())
    bad = X.clone()
    bad[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        model(X)
    check_frozen(model)
    with torch.no_grad():
        assert model(bad).isnan().all()
    check_frozen(model)


def test_compiled_and_exported():
    model = freeze_weights_(network("integer"))
    with torch.no_grad():
        expected = model(X)
        exported = torch.export.export(model, (X,)).module()
        torch.testing.assert_close(exported(X), expected)
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(X), expected)


def test_a_loaded_network_is_frozen(tmp_path):
    model = network()
    noisyq_fast.save_integers(model, tmp_path / "model")
    again = noisyq_fast.load_integers(Network(), tmp_path / "model")
    assert all(layer.made_of_weights == {} for layer in layers(again))
    with torch.no_grad():
        assert torch.equal(again(X), model(X))
    check_frozen(again)


@pytest.mark.parametrize("arithmetic", ["float", "fused"])
def test_replaced_tensors_count(arithmetic):
    model = freeze_weights_(network(arithmetic))
    check_frozen(model)
    model.conv.weight = nn.Parameter(model.conv.weight.detach() * -1.5)
    check_frozen(model)
    model.norm.running_mean = model.norm.running_mean + 1
    check_frozen(model)
    state = {name: value + 0.25 for name, value in model.state_dict().items() if "norm.w" in name}
    model.load_state_dict(state, strict=False, assign=True)
    check_frozen(model)


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_replaced_quantizers_count(arithmetic):
    model = freeze_weights_(network(arithmetic))
    check_frozen(model)
    for quantizer in (AbsMax(8, 0, "full"), AbsMax(8), AbsMax(8, group_size=4)):
        model.conv.weight_quantizer = quantizer
        check_frozen(model)
    model.conv.weight_quantizer.grid_kind = "full"
    check_frozen(model)


@pytest.mark.parametrize("arithmetic", ["float", "fused"])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_steps_of_fused_optimizers_count(optimizer, arithmetic):
    model = freeze_weights_(network(arithmetic))
    check_frozen(model)
    model(X).sum().backward()
    optimizer(model.parameters(), lr=0.1, fused=True).step()
    check_frozen(model)
