"""Which layers are first and last: found by running the model on an example, or by order."""

import logging
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from noisyq_fast import GroupedLinear, Quantizer, QuantLayer, dequantize_model_, quantize_model_

pytestmark = pytest.mark.usefixtures("both_arithmetics")


def ends(model, example, **options):
    """Names of the layers that get 8 bits."""
    quantize_model_(model, 3, 3, example=example, **options)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    assert {layer.weight_bits for layer in layers.values()} <= {3, 8}
    return {name for name, layer in layers.items() if layer.weight_bits == 8}


class Model(nn.Module):
    """Layers by name, and what they are used for."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.compute = forward

    def forward(self, *args, **kwargs):
        return self.compute(self, *args, **kwargs)


def linears(names, size=4):
    return {name: nn.Linear(size, size) for name in names.split()}


X = torch.randn(3, 4)


def test_layers_that_are_registered_in_another_order():
    model = Model(lambda m, x: m.last(m.middle(m.first(x).relu())), **linears("last middle first"))
    assert ends(model, X) == {"first", "last"}


def test_one_layer_is_both():
    assert ends(Model(lambda m, x: m.only(x), **linears("only")), X) == {"only"}


def test_several_heads():
    def forward(m, x):
        x = m.inner(m.stem(x))
        return m.classes(x), {"box": m.box2(m.box1(x).relu()), "mask": [m.mask(x)]}

    model = Model(forward, **linears("stem inner classes box1 box2 mask"))
    assert ends(model, X) == {"stem", "classes", "box2", "mask"}


def test_an_auxiliary_head_on_the_way():
    def forward(m, x):
        x = m.a(m.stem(x))
        aux = m.aux(x)
        return {"out": m.head(m.b(x)), "aux": aux}

    assert ends(Model(forward, **linears("stem a aux b head")), X) == {"stem", "aux", "head"}


def test_features_that_are_also_returned():
    """What comes before the head made an output too, but not last on its way to the other."""

    def forward(m, x):
        features = m.a(m.stem(x))
        return m.head(features), features

    assert ends(Model(forward, **linears("stem a head")), X) == {"stem", "a", "head"}


def test_queries_keys_and_values_are_all_first():
    def forward(m, x):
        attended = torch.softmax(m.q(x) @ m.k(x).T, -1) @ m.v(x)
        return m.head(m.out(attended))

    model = Model(forward, **linears("q k v out head"))
    assert ends(model, X) == {"q", "k", "v", "head"}


def test_residual_streams():
    def forward(m, x):
        x = m.stem(x)
        for name in "abc":
            x = x + getattr(m, name)(torch.relu(x))
        return m.head(torch.nn.functional.layer_norm(x, [4]))

    assert ends(Model(forward, **linears("stem a b c head")), X) == {"stem", "head"}


def test_a_residual_stream_without_a_head():
    def forward(m, x):
        x = m.stem(x)
        for name in "abc":
            x = x + getattr(m, name)(torch.relu(x))
        return x

    assert ends(Model(forward, **linears("stem a b c")), X) == {"stem", "c"}


def test_a_shortcut_from_the_input():
    """The input is added to what a layer made of it: only that layer saw it."""

    def forward(m, x):
        return m.head(m.b(x + m.a(x)))

    assert ends(Model(forward, **linears("a b head")), X) == {"a", "head"}


def test_concatenation_with_the_input():
    def forward(m, x):
        hidden = m.a(x).relu()
        return m.head(m.wide(torch.cat([hidden, x], -1)))

    model = Model(forward, **linears("a head"), wide=nn.Linear(8, 4))
    assert ends(model, X) == {"a", "wide", "head"}


def test_several_inputs_that_meet():
    def forward(m, image, text):
        return m.head(m.joint(torch.cat([m.image(image), m.text(text).mean(1)], -1)))

    model = Model(forward, **linears("image head"), text=nn.Embedding(9, 4), joint=nn.Linear(8, 4))
    assert ends(model, (X, torch.randint(9, (3, 5)))) == {"image", "text", "head"}


def test_layers_that_are_called_several_times():
    def forward(m, x):
        for _ in range(3):
            x = m.b(m.a(x).relu()) + x
        return x

    assert ends(Model(forward, **linears("a b")), X) == {"a", "b"}
    model = Model(lambda m, x: m.a(m.b(m.b(m.a(x)))), **linears("a b"))
    assert ends(model, X) == {"a"}
    model = Model(lambda m, x: m.b(m.b(m.a(x))), **linears("a b"))
    assert ends(model, X) == {"a", "b"}


def test_encoder_and_decoder():
    def forward(m, source, target):
        memory = m.encoder(m.source(source))
        return m.head(m.cross(m.target(target) + memory))

    model = Model(
        forward,
        **linears("encoder cross head"),
        source=nn.Embedding(9, 4),
        target=nn.Embedding(9, 4),
    )
    ids = torch.randint(9, (3, 5))
    for example in ((ids, ids), [ids, ids], {"source": ids, "target": ids}):
        assert ends(model, example) == {"source", "target", "head"}
        dequantize_model_(model)


def test_transformers():
    model = nn.Transformer(4, 2, 1, 1, 8, batch_first=True)
    x = torch.randn(2, 5, 4)
    found = ends(model, (x, x))
    assert found == {
        "encoder.layers.0.self_attn",
        "decoder.layers.0.self_attn",
        "decoder.layers.0.linear2",
    }
    attention = nn.MultiheadAttention(4, 2)
    assert ends(attention, {"query": x, "key": x, "value": x}) == {"", "out_proj"}
    assert attention.key_quantizer.bits == attention.value_quantizer.bits == 8


def test_positions_and_learned_queries_come_from_nothing():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(9, 4), nn.Embedding(5, 4)
            self.query = nn.Parameter(torch.randn(1, 4), requires_grad=False)
            self.inner, self.of_query, self.head = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, ids):
            x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
            return self.head(self.inner(x) * self.of_query(self.query))

    found = ends(Positions(), torch.randint(9, (2, 5)))
    assert found == {"tokens", "positions", "of_query", "head"}


@dataclass
class Output:
    logits: Any
    hidden_states: Any = None


@pytest.mark.parametrize(
    "wrap", [Output, lambda x: [{"a": (x,)}], lambda x: Output({"x": Output([x])})]
)
def test_outputs_in_any_container(wrap):
    model = Model(lambda m, x: wrap(m.head(m.inner(m.stem(x)))), **linears("stem inner head"))
    assert ends(model, X) == {"stem", "head"}


def test_a_loss_is_an_output():
    def forward(m, pixels, labels):
        return nn.functional.cross_entropy(m.head(m.inner(m.stem(pixels))), labels)

    model = Model(forward, **linears("stem inner head"))
    assert ends(model, {"pixels": X, "labels": torch.tensor([0, 1, 2])}) == {"stem", "head"}


def test_inputs_in_containers():
    model = Model(
        lambda m, batch: m.head(m.inner(m.stem(batch["x"][0]))), **linears("stem inner head")
    )
    assert ends(model, ({"x": [X]},)) == {"stem", "head"}


def test_frozen_models_and_no_grad():
    for frozen in (True, False):
        model = Model(lambda m, x: m.head(m.inner(m.stem(x))), **linears("stem inner head"))
        model.requires_grad_(not frozen)
        with torch.no_grad():
            assert ends(model, X) == {"stem", "head"}


def test_parts_without_gradients():
    def forward(m, x):
        with torch.no_grad():
            m.inner.weight.mul_(1)
            m.seen.copy_(m.inner(m.stem(2 * x)))
        x = m.stop(m.seen.detach())
        return m.head(x.detach().relu()).detach()

    model = Model(forward, **linears("stem inner stop head"))
    model.register_buffer("seen", torch.zeros(3, 4))
    assert ends(model, X) == {"stem", "head"}
    assert model.inner.weight.requires_grad
    assert model.seen.grad_fn is None
    assert torch.is_grad_enabled()
    model(X)  # in the graph, as before
    assert not model.seen.requires_grad


def test_layers_that_stay_float_still_are_first_or_last():
    forward = lambda m, x: m.head(m.inner(m.stem(x)))  # noqa: E731
    for example in (X, None):
        model = Model(forward, **linears("stem inner head"))
        assert ends(model, example, overrides={"head": None}) == {"stem"}
        model = Model(forward, **linears("stem inner head"))
        assert ends(model, example, filter=lambda name, _: name == "inner") == set()


def test_overrides_win():
    model = Model(lambda m, x: m.head(m.stem(x)), **linears("stem head"))
    quantize_model_(model, example=X, overrides={"head": {"weight_bits": 2}})
    assert (model.head.weight_bits, model.head.activation_bits) == (2, 8)


def test_the_example_leaves_no_trace():
    def forward(m, x):
        m.calls += 1
        return m.head(m.norm(m.drop(m.stem(x))))

    model = Model(forward, **linears("stem head"), norm=nn.BatchNorm1d(4), drop=nn.Dropout())
    model.calls = 0
    model.norm.eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ends(model, X)
    assert model.calls == 2  # in evaluation and in training
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert all(p.grad is None for p in model.parameters())
    layers = [m for m in model.modules() if not isinstance(m, Quantizer)]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in layers)
    assert model.stem.input_quantizer.range.isnan()
    assert model.stem.input_quantizer.enabled


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_example_leaves_the_model_float(error):
    def forward(m, x):
        m.stem(x)
        raise error("no")

    model = Model(forward, **linears("stem head"))
    before = {name: type(m) for name, m in model.named_modules()}
    expected = (ValueError, "example: the model does not run on it: no")
    if error is KeyboardInterrupt:
        expected = (error, "no")
    with pytest.raises(expected[0], match=expected[1]):
        quantize_model_(model, example=X)
    assert {name: type(m) for name, m in model.named_modules()} == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_a_wrong_example_says_so():
    for example in (torch.randn(3, 5), {"y": X}, (X, X), "abc", 3):
        with pytest.raises(ValueError, match="example: the model does not run on it"):
            quantize_model_(nn.Sequential(nn.Linear(4, 4)), example=example)


def test_a_model_without_outputs_of_layers_is_logged(caplog):
    model = Model(lambda m, x: m.b(m.a(x)).argmax(-1), **linears("a b"))
    with caplog.at_level(logging.WARNING, "noisyq_fast"):
        assert ends(model, X) == {"a"}
    assert "no layer counts as last" in caplog.text


def test_without_an_example_the_order_is_that_of_registration_and_logged(caplog):
    with caplog.at_level(logging.WARNING, "noisyq_fast"):
        model = Model(None, **linears("a b c"))
        assert ends(model, None) == {"a", "c"}
        (record,) = caplog.records
        assert "first and last layer by order of registration: 'a' and 'c'; pass example=" in (
            record.getMessage()
        )
        caplog.clear()
        ends(nn.Sequential(*linears("a b c").values()), None)
        ends(nn.Linear(3, 3), None)
        ends(Model(lambda m, x: m.b(m.a(x)), **linears("a b")), X)
        quantize_model_(Model(None, **linears("a b c")), first_last_bits=None)
        assert caplog.records == []


def test_parameters_and_masks_among_the_arguments_are_no_input():
    def forward(m, x):
        hidden = m.stem(x)
        weight = torch.ones(2, 2, 2) * m.scale
        hidden = m.grouped(hidden.view(-1, 2, 2), parameters=(weight, None)).flatten(1)
        mask = torch.zeros(len(x), len(x), dtype=torch.bool)
        return m.head(m.attention(hidden, hidden, hidden, attn_mask=mask)[0])

    model = Model(
        forward,
        **linears("stem head"),
        grouped=GroupedLinear(2, 2, 2, bias=False),
        attention=nn.MultiheadAttention(4, 2),
    )
    model.scale = nn.Parameter(torch.ones(()))
    assert ends(model, X) == {"stem", "head"}
