"""State dicts: what is saved, averaged, converted to other dtypes, and loaded again."""

import copy

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from noisyq_fast import (
    GroupedLinear,
    QuantEmbedding,
    QuantGroupedLinear,
    QuantLinear,
    QuantMultiheadAttention,
    dequantize_model_,
    quantize_model_,
)

pytestmark = pytest.mark.usefixtures("both_arithmetics")


def make_float():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def make_model(*bits):
    return quantize_model_(make_float(), *bits)


def trained(model=None, absmax=1.0):
    model = make_model() if model is None else model
    x = torch.randn(5, 4)
    model(x * absmax / x.abs().max())
    return model


def ranges(model):
    return [model[i].input_quantizer.range for i in (0, 2, 4)]


# Averages.


@pytest.mark.parametrize("unseen", [0, 2])
def test_an_exponential_average_has_the_average_of_the_ranges_seen(unseen):
    model, decay = make_model(), 0.9
    averaged = copy.deepcopy(model)
    weights, absmaxes = [], []
    for step in range(6):
        if step >= unseen:
            trained(model, 1.0 + step)
        with torch.no_grad():
            states = averaged.state_dict(), model.state_dict()
            for old, new in zip(*(state.values() for state in states), strict=True):
                old.copy_(decay * old + (1 - decay) * new)
        weights = [decay * w for w in weights]
        if step >= unseen:
            weights.append(1 - decay)
            absmaxes.append(model[0].input_quantizer.range.item())
    expected = sum(w * a for w, a in zip(weights, absmaxes, strict=True)) / sum(weights)
    assert ranges(averaged)[0].item() == pytest.approx(expected, rel=1e-5)
    x = torch.randn(5, 4)
    assert averaged.eval()(x).isfinite().all()
    make_model().load_state_dict(averaged.state_dict())


@pytest.mark.parametrize("use_buffers", [True, False])
def test_an_averaged_model(use_buffers):
    model = make_model()
    averaged = AveragedModel(model, use_buffers=use_buffers)
    seen = []
    for absmax in (1.0, 2.0, 4.0):
        trained(model, absmax)
        averaged.update_parameters(model)
        seen.append(ranges(model)[0].item())
    expected = sum(seen) / 3 if use_buffers else seen[-1]
    assert ranges(averaged.module)[0].item() == pytest.approx(expected, rel=1e-5)
    assert averaged.eval()(torch.randn(2, 4)).isfinite().all()


def test_an_average_of_saved_state_dicts():
    states = [trained(make_model(3, 6), absmax).state_dict() for absmax in (1.0, 3.0)]
    mean = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    model = make_model(3, 6)
    model.load_state_dict(mean)
    assert ranges(model)[0].item() == pytest.approx(2.0)
    mean = {key: value.clone() for key, value in states[0].items()}
    for key, value in mean.items():
        value.copy_(0.9 * value + (1 - 0.9) * states[1][key])
    model.load_state_dict(mean)


# Memory and dtypes.


@pytest.mark.parametrize(
    "make",
    [
        lambda **options: QuantLinear(4, 3, **options),
        lambda **options: QuantEmbedding(4, 3, **options),
        lambda **options: QuantGroupedLinear(2, 4, 3, **options),
        lambda **options: QuantMultiheadAttention(4, 2, **options),
    ],
)
def test_made_without_memory(make):
    layer = make(device="meta")
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.fill_(float("nan"))
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in layer.parameters())
    assert all((buffer == 0).all() for buffer in layer.buffers())


def test_ranges_are_unseen_in_new_memory():
    model = make_model().to("meta")
    model.to_empty(device="cpu")
    assert all(r.isnan() for r in ranges(model))
    with torch.device("meta"):
        model = make_model()
    assert model[0].input_quantizer.running_absmax.is_meta
    model.to_empty(device="cpu")
    assert all(r.isnan() for r in ranges(model))


@pytest.mark.parametrize(
    ("cls", "sizes"),
    [
        (QuantLinear, (4, 3)),
        (QuantEmbedding, (4, 3)),
        (QuantGroupedLinear, (2, 4, 3)),
        (QuantMultiheadAttention, (4, 2)),
    ],
)
def test_skip_init(cls, sizes):
    layer = nn.utils.skip_init(cls, *sizes, weight_bits=2)
    assert [p.shape for p in layer.parameters()] == [p.shape for p in cls(*sizes).parameters()]
    assert layer.weight_bits == 2
    assert all((buffer == 0).all() for buffer in layer.buffers())


def test_new_parameters_forget_the_range():
    layer = QuantLinear(4, 3)
    layer(torch.randn(2, 4))
    layer.reset_parameters()
    assert layer.input_quantizer.range.isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("convert", [lambda m, d: m.to(d), lambda m, d: m.to("cpu", d)])
def test_ranges_stay_float32(dtype, convert):
    model = trained()
    before = [r.clone() for r in ranges(model)]
    convert(model, dtype)
    assert all(map(torch.equal, ranges(model), before))
    assert model[2].weight.dtype == dtype
    assert model(torch.randn(2, 4, dtype=dtype)).dtype == dtype
    assert model[2].input_quantizer.running_absmax.dtype == torch.float32
    model.float()
    if dtype == torch.float16:
        model.half()
    assert all(b.dtype == torch.float32 for b in model.buffers())


@pytest.mark.parametrize("assign", [True, False])
def test_a_bfloat16_checkpoint_gives_float32_ranges(assign):
    state = trained().state_dict()
    state = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
    model = make_model()
    model.load_state_dict(state, assign=assign)
    assert all(b.dtype == torch.float32 for b in model.buffers())
    assert model[2].weight.dtype == (torch.bfloat16 if assign else torch.float32)
    trained(model.float())
    assert state["0.input_quantizer.running_absmax"].dtype == torch.bfloat16  # as it was


def test_assigned_states_into_a_model_without_memory():
    state = trained().state_dict()
    with torch.device("meta"):
        model = make_model()
    model.load_state_dict(state, assign=True)
    x = torch.randn(2, 4)
    expected = make_model()
    expected.load_state_dict(state)
    assert torch.equal(model.eval()(x), expected.eval()(x))


# Loading.


def test_safetensors_and_torch_files(tmp_path):
    model = trained()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    safetensors.torch.save_model(model, tmp_path / "too.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    x = torch.randn(2, 4)
    expected = model.eval()(x)
    for state in (
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        safetensors.torch.load_file(tmp_path / "too.safetensors"),
        torch.load(tmp_path / "model.pt", weights_only=True),
    ):
        other = make_model()
        other.load_state_dict(state)
        assert torch.equal(other.eval()(x), expected)


@pytest.mark.parametrize("strict", [True, False])
def test_other_bits_are_an_error_that_names_the_layer(strict):
    state = trained().state_dict()
    with pytest.raises(RuntimeError) as error:
        make_model(3, 4).load_state_dict(state, strict=strict)
    assert (
        "2.weight_quantizer: the checkpoint has 4 bits, the model 3; convert the model with the "
        "bits of the checkpoint"
    ) in str(error.value)
    assert "input_quantizer" not in str(error.value)
    assert "0.weight" not in str(error.value)  # 8 bits in both


def test_another_kind_of_quantizer_is_an_error():
    state = QuantLinear(4, 3, activation=None).state_dict()
    state["input_quantizer._extra_state"] = state["weight_quantizer._extra_state"]
    for name in ("running_absmax", "observed"):
        state[f"input_quantizer.{name}"] = torch.zeros(())
    with pytest.raises(RuntimeError, match="input_quantizer: the checkpoint has another kind of"):
        QuantLinear(4, 3).load_state_dict(state)


@pytest.mark.parametrize("value", [None, "4 bits", torch.zeros(0, dtype=torch.uint8)])
def test_a_damaged_extra_state_is_an_error_that_names_the_layer(value):
    state = trained().state_dict() | {"2.weight_quantizer._extra_state": value}
    with pytest.raises(RuntimeError, match=r"2\.weight_quantizer: the checkpoint has another kind"):
        make_model().load_state_dict(state)


def test_a_float_checkpoint_into_a_converted_model():
    float_model = make_float()
    model = trained()
    before = ranges(model)
    state = float_model.state_dict()
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    assert (
        "(the checkpoint has no such quantizer: if it is of a float model, load it before "
        "quantize_model_, or with strict=False"
    ) in str(error.value)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert unexpected == []
    assert {key.split(".")[1] for key in missing} == {"weight_quantizer", "input_quantizer"}
    assert missing[0] == "0.weight_quantizer._extra_state"
    assert str(missing[0]) == "0.weight_quantizer._extra_state"
    assert torch.equal(model[2].weight, float_model[2].weight)
    assert ranges(model) == before
    trained(model)


def test_a_checkpoint_without_input_quantizers_is_not_called_one_of_a_float_model():
    state = QuantLinear(4, 3, activation=None).state_dict()
    with pytest.raises(RuntimeError, match="the checkpoint has no such quantizer: if it is of a"):
        QuantLinear(4, 3).load_state_dict(state)


def test_from_a_quantized_checkpoint_to_a_float_model():
    state = trained().state_dict()
    model = make_model()
    model.load_state_dict(state)
    float_state = dequantize_model_(model).state_dict()
    float_model = make_float()
    float_model.load_state_dict(float_state)
    assert torch.equal(float_model[2].weight, state["2.weight"])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*0\.weight_quantizer"):
        float_model.load_state_dict(state)


@pytest.mark.parametrize("assign", [True, False])
def test_checkpoints_of_the_first_version(assign):
    model = trained()
    x = torch.randn(2, 4)
    new = model.state_dict()
    old = {key: value for key, value in new.items() if "_quantizer." not in key}
    for i in (0, 4):
        old[f"{i}.running_absmax"] = new[f"{i}.input_quantizer.running_absmax"].clone()
    old["2.running_absmax"] = torch.tensor(float("nan"))
    keys = [*old]
    loaded = make_model()
    loaded.load_state_dict(old, assign=assign)
    assert [*old] == keys
    first, unseen, last = ranges(loaded)
    assert (first, last) == (ranges(model)[0], ranges(model)[2])
    assert unseen.isnan()
    assert loaded[2].input_quantizer.running_absmax == 0
    loaded[2].input_quantizer.set_range(ranges(model)[1])
    assert torch.equal(loaded.eval()(x), model.eval()(x))
    layer = QuantLinear(4, 6)
    layer.load_state_dict({k[2:]: v for k, v in old.items() if k.startswith("0.")}, assign=assign)
    assert layer.input_quantizer.range == first


def test_grouped_checkpoints_of_the_first_version():
    model = quantize_model_(nn.Sequential(GroupedLinear(3, 4, 2)), first_last_bits=None)
    old = {key: value for key, value in model.state_dict().items() if "_quantizer." not in key}
    old["0.running_absmax"] = torch.tensor([1.0, float("nan"), 3.0])
    model.load_state_dict(old)
    assert model[0].input_quantizer.observed.tolist() == [1, 0, 1]
    assert model[0].input_quantizer.running_absmax.tolist() == [1, 0, 3]
    old["0.running_absmax"] = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.input_quantizer\.running_absmax"):
        model.load_state_dict(old)
