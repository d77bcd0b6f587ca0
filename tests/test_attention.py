"""Attention and Transformers: the numbers of PyTorch's, and never its float fast paths."""

import copy
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from noisyq_fast import (
    QuantLinear,
    QuantMultiheadAttention,
    dequantize_model_,
    fake_quantize,
    quantize_model_,
)

pytestmark = pytest.mark.usefixtures("both_arithmetics")

E, HEADS, L, S, N = 8, 2, 5, 7, 3


def disabled(model):
    """With quantizers that pass everything on."""
    for module in model.modules():
        if hasattr(module, "enabled"):
            module.enabled = False
    return model


def converted_pair(**options):
    """In float64, where the order of sums makes no difference."""
    attention = nn.MultiheadAttention(E, HEADS, **options).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return attention, disabled(quantize_model_(copy.deepcopy(attention)))


def check_equal(attention, converted, *args, **kwargs):
    expected = attention(*args, **kwargs)
    actual = converted(*args, **kwargs)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    grads = []
    for module, (y, _) in ((attention, expected), (converted, actual)):
        module.zero_grad()
        y.nan_to_num().square().sum().backward()
        grads.append([p.grad for p in module.parameters()])
    torch.testing.assert_close(*grads, equal_nan=True)


def inputs(batched=True, batch_first=False, kdim=E, vdim=E):
    shapes = [(L, E), (S, kdim), (S, vdim)]
    if batched:
        shapes = [(N, *s) if batch_first else (s[0], N, s[1]) for s in shapes]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


OPTIONS = [
    {},
    {"batch_first": True},
    {"kdim": 6, "vdim": 4},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "vdim": 3, "bias": False},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_the_numbers_are_those_of_pytorch(options, batched):
    attention, converted = converted_pair(**options)
    sizes = {k: v for k, v in options.items() if k in ("batch_first", "kdim", "vdim")}
    for weights, average in ((True, True), (True, False), (False, True)):
        check_equal(
            attention,
            converted,
            *inputs(batched, **sizes),
            need_weights=weights,
            average_attn_weights=average,
        )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}], ids=str)
def test_masks(options, batched, need_weights):
    attention, converted = converted_pair(**options)
    hidden = torch.rand(N, S) < 0.4
    hidden[:, 0] = False  # a row of which nothing is left is NaN, or not, by version
    masked = torch.rand(N * HEADS, L, S) < 0.4
    masked[:, :, 0] = False
    if not batched:
        hidden, masked = hidden[0], masked[:HEADS]
    paddings = [None, hidden, -2.5 * hidden.double()]
    added = torch.randn(masked.shape, dtype=torch.float64)
    masks = [None, masked[0], masked, added[0], added]
    for padding, mask in itertools.product(paddings, masks):
        if None not in (padding, mask) and padding.dtype != mask.dtype:
            continue  # deprecated
        check_equal(
            attention,
            converted,
            *inputs(batched),
            key_padding_mask=padding,
            attn_mask=mask,
            need_weights=need_weights,
        )


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_causal_hint(padded, need_weights):
    attention, converted = converted_pair()
    x = torch.randn(L, N, E, dtype=torch.float64)
    mask = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = torch.where(torch.arange(L) > 3, -1e9, 0).expand(N, L).double() if padded else None
    arguments = {"attn_mask": mask, "key_padding_mask": padding, "need_weights": need_weights}
    check_equal(attention, converted, x, x, x, is_causal=True, **arguments)
    with pytest.raises(ValueError, match="is_causal: got True without attn_mask"):
        converted(x, x, x, is_causal=True)


def test_self_attention_and_shared_keys():
    attention, converted = converted_pair()
    query, key, _ = inputs()
    check_equal(attention, converted, query, query, query)
    check_equal(attention, converted, query, key, key)
    check_equal(attention, converted, query, key, query[:1].expand_as(key))


def test_dropout_is_applied_in_training_only():
    attention = quantize_model_(nn.MultiheadAttention(E, HEADS, dropout=0.9))
    x = torch.randn(L, N, E)
    _, weights = attention(x, x, x)
    assert (weights == 0).any()
    for need_weights in (True, False):
        y, again = (attention(x, x, x, need_weights=need_weights)[0] for _ in range(2))
        assert not torch.equal(y, again)
    attention.eval()
    assert torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


def test_projections_compute_with_quantized_weights_and_inputs():
    attention = QuantMultiheadAttention(E, HEADS, weight_bits=3, activation_bits=5, kdim=6, vdim=4)
    query, key, value = (x.float() for x in inputs(kdim=6, vdim=4))
    attention(query, key, value)
    q, k, v = attention._projected(query, key, value)
    names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    biases = attention.in_proj_bias.chunk(3)
    for y, x, name, bias in zip((q, k, v), (query, key, value), names, biases, strict=True):
        weight = fake_quantize(getattr(attention, name), 3, axis=0)
        assert torch.equal(y, F.linear(fake_quantize(x, 5), weight, bias))
    ranges = [
        quantizer.range
        for quantizer in (
            attention.input_quantizer,
            attention.key_quantizer,
            attention.value_quantizer,
        )
    ]
    assert ranges == [x.abs().max() for x in (query, key, value)]
    assert type(attention.out_proj) is QuantLinear
    assert attention.out_proj.weight_bits == 3
    assert attention.out_proj.input_quantizer.range > 0


def test_made_anew_and_by_hand_it_starts_like_pytorchs():
    for options in OPTIONS:
        torch.manual_seed(1)
        expected = nn.MultiheadAttention(E, HEADS, **options)
        torch.manual_seed(1)
        attention = QuantMultiheadAttention(E, HEADS, **options)
        for name, parameter in expected.named_parameters():
            assert torch.equal(parameter, attention.get_parameter(name)), name
        assert attention.load_state_dict(expected.state_dict(), strict=False).unexpected_keys == []
        for layer in (attention, attention.out_proj):
            assert (layer.weight_bits, layer.activation_bits) == (4, 4)


def test_conversion_and_back():
    attention = nn.MultiheadAttention(E, HEADS)
    before = copy.deepcopy(attention)
    modules, parameters = list(attention.modules()), list(attention.parameters())
    quantize_model_(attention)
    assert all(a is b for a, b in zip(parameters, attention.parameters(), strict=True))
    x = torch.randn(L, N, E)
    assert not torch.allclose(attention(x, x, x)[0], before(x, x, x)[0])
    for copied in (copy.deepcopy(attention), pickle.loads(pickle.dumps(attention))):
        assert torch.equal(copied.eval()(x, x, x)[0], attention.eval()(x, x, x)[0])
    dequantize_model_(attention)
    assert all(a is b for a, b in zip(modules, attention.modules(), strict=True))
    assert vars(attention).keys() == vars(before).keys()
    assert type(attention.out_proj) is type(before.out_proj)
    for grad in (True, False):  # the fast path is back
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(attention(x, x, x), before.eval()(x, x, x))


def test_nested_tensors_are_refused():
    attention = quantize_model_(nn.MultiheadAttention(E, HEADS, batch_first=True))
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)])
    with pytest.raises(ValueError, match="expected padded tensors, got a nested tensor"):
        attention(x, x, x)


# Transformers.


def encoder_layer(activation="relu", **options):
    return nn.TransformerEncoderLayer(
        E, HEADS, 16, dropout=0.0, activation=activation, batch_first=True, **options
    )


class Wrapped(nn.Module):
    """Models of several inputs, called with one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **masks):
        if isinstance(self.inner, nn.Transformer):
            return self.inner(x, x.flip(1), **masks)
        return self.inner(x, **masks)


MODELS = {
    "layer": encoder_layer,
    "layer, gelu, norm first": lambda: encoder_layer("gelu", norm_first=True),
    "layer, activation module": lambda: encoder_layer(nn.GELU()),
    "encoder": lambda: nn.TransformerEncoder(encoder_layer(), 2),
    "transformer": lambda: Wrapped(
        nn.Transformer(E, HEADS, 1, 1, 16, dropout=0.0, batch_first=True)
    ),
}


def masks(padded):
    if not padded:
        return {}
    padding = torch.arange(L).expand(N, L) >= torch.tensor([[5], [3], [2]])
    return {"src_key_padding_mask": padding}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("kept", [None, "self_attn", "linear1"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_fast_path_in_evaluation(name, padded, kept):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    before = copy.deepcopy(model)
    x = torch.randn(N, L, E)
    expected_float = model(x, **masks(padded))
    quantize_model_(
        model.train(),
        2,
        2,
        first_last_bits=None,
        filter=lambda layer_name, _: kept is None or kept not in layer_name,
    )
    model(x)
    model.eval()
    seen = ~masks(True)["src_key_padding_mask"] if padded else torch.ones(N, L, dtype=torch.bool)
    expected = model(x, **masks(padded))
    assert (expected - expected_float)[seen].abs().mean() > 0.05

    def check(y, expected):
        if kept == "self_attn":  # has a fast path of its own, in float, which rounds differently
            assert (y - expected).abs().mean() < 0.01
        else:
            torch.testing.assert_close(y, expected)

    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            check(model(x, **masks(padded))[seen], expected[seen])
    model.requires_grad_(False)
    check(model(x, **masks(padded))[seen], expected[seen])
    copied = pickle.loads(pickle.dumps(model))
    check(copied(x, **masks(padded))[seen], expected[seen])

    dequantize_model_(model)
    with torch.no_grad():
        y = model(x, **masks(padded))
        torch.testing.assert_close(y, before(x, **masks(padded)))
    for module, float_module in zip(model.modules(), before.modules(), strict=True):
        assert vars(module).keys() == vars(float_module).keys()
        for key in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert getattr(module, key, 0) == getattr(float_module, key, 0)


def test_decoders_and_masks_train():
    model = quantize_model_(nn.Transformer(E, HEADS, 1, 1, 16, batch_first=True))
    source, target = torch.randn(N, S, E), torch.randn(N, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            model(source, target, tgt_mask=causal, tgt_is_causal=True).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def part_converted(model):
    quantize_model_(model.layers[0].linear1, 2, 2)


def converted_by_hand(model):
    model.layers[0].linear1 = QuantLinear(E, 16, weight_bits=2, activation_bits=2)


@pytest.mark.parametrize("change", [part_converted, converted_by_hand])
def test_no_fast_path_around_a_quantized_layer(change):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(encoder_layer(), 2)
    change(model)
    x = torch.randn(N, L, E)
    model(x)
    expected = model.eval()(x)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_nested_tensors_around_a_quantized_layer_are_refused():
    model = nn.TransformerEncoder(encoder_layer(), 2)
    part_converted(model)
    model(torch.randn(N, L, E))
    with torch.no_grad(), pytest.raises(ValueError, match=r"input_quantizer: .* got a nested"):
        model.eval()(torch.randn(N, L, E), **masks(True))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_an_encoder_without_nested_tensors_has_none_after_dequantization():
    model = nn.TransformerEncoder(encoder_layer(norm_first=True), 2)
    dequantize_model_(quantize_model_(model))
    assert model.use_nested_tensor is False
    with torch.no_grad():
        model.eval()(torch.randn(N, L, E), **masks(True))
