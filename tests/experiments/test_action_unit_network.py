import sys

import pytest
import torch
from torch import nn

from experiments.methods.quant import Quant
from experiments.models import (
    AU_NORMS,
    ActionUnitNetwork,
    InceptionV3Encoder,
    PerAUHead,
    SharedHead,
    SmallEncoder,
)
from noisyq_fast import fake_quantize, fake_quantize_ema, quantize_model_, summary

FEATURES, AUS, WIDTH = 10, 3, 64
HEADS = ["shared head", *AU_NORMS]


def head(kind: str, features: int = FEATURES) -> nn.Module:
    torch.manual_seed(0)
    if kind == "shared head":
        return SharedHead(features, AUS)
    head = PerAUHead(features, AUS, kind)
    for module in head.modules():  # or else the norms' affine does nothing
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return head


def network(kind: str, quantized: bool = False) -> ActionUnitNetwork:
    model = ActionUnitNetwork(SmallEncoder(), head(kind, SmallEncoder.features))
    return Quant(weight_bits=8, activation_bits=8).network(model) if quantized else model


def train(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What the model puts out, and the gradients of a loss of it by name."""
    x = x.clone().requires_grad_()
    y = model(x)
    names, parameters = zip(*model.named_parameters(), strict=True)
    along = torch.linspace(-1, 2, y.numel()).view_as(y)
    gradients = torch.autograd.grad(y.square().mul(along).sum(), [x, *parameters])
    return y.detach(), dict(zip(["x", *names], gradients, strict=True))


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# The encoder.


@pytest.mark.parametrize(("channels", "size"), [(3, (64, 64)), (1, (32, 32)), (3, (75, 33))])
def test_small_encoder_takes_any_picture(channels, size):
    assert SmallEncoder(channels)(torch.randn(2, channels, *size)).shape == (2, 128)


def test_small_encoder_is_eight_convolutions_and_a_maximum():
    encoder = SmallEncoder()
    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    sizes = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64), (64, 128), (128, 128)]
    assert [(m.in_channels, m.out_channels) for m in convolutions] == sizes
    # Nine weights a filter and channel, two numbers a channel for its norm.
    expected = sum(9 * inputs * outputs + 2 * outputs for inputs, outputs in sizes)
    assert parameters(encoder) == expected
    pixels = [32**2] * 2 + [16**2] * 2 + [8**2] * 2 + [4**2] * 2
    expected = sum(9 * i * o * n for (i, o), n in zip(sizes, pixels, strict=True))
    assert summary(encoder, torch.zeros(1, 3, 64, 64)).macs == expected
    seen = []
    encoder.stage4.register_forward_hook(lambda _module, _args, out: seen.append(out))
    y = encoder(torch.randn(2, 3, 64, 64))
    assert seen[0].shape == (2, 128, 4, 4)
    assert torch.equal(y, seen[0].flatten(2).max(2).values)


# The heads.


@pytest.mark.parametrize("kind", HEADS)
def test_a_logit_for_each_action_unit(kind):
    model = network(kind)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, AUS)
    assert [name for name, _ in model.named_children()] == ["encoder", "head"]


def test_shared_head_is_two_hidden_layers():
    model = head("shared head")
    kinds = [nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.Linear]
    assert [type(layer) for layer in model] == kinds
    # Two layers of 64 with bias and a norm each, and the logits.
    expected = FEATURES * 64 + 3 * 64 + 64 * 64 + 3 * 64 + 64 * AUS + AUS
    assert parameters(model) == expected


class OneByOne(nn.Module):
    """The per-AU head as a network for each AU, one after the other; or with shared norms."""

    def __init__(self, head: PerAUHead) -> None:
        super().__init__()
        first = head.hidden1
        self.inner = nn.ModuleList(nn.Linear(FEATURES, WIDTH) for _ in range(AUS))
        self.middle = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(AUS))
        self.outer = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in range(AUS))
        self.norms = nn.ModuleList(
            nn.ModuleList(nn.BatchNorm1d(WIDTH) for _ in range(1 if head.norm == "shared" else AUS))
            for _ in range(2)
        )
        with torch.no_grad():
            for t in range(AUS):
                self.inner[t].weight.copy_(first.weight.view(AUS, WIDTH, FEATURES)[t])
                self.inner[t].bias.copy_(first.bias.view(AUS, WIDTH)[t])
                for ours, block in ((self.middle, head.hidden2), (self.outer, head.logits)):
                    ours[t].weight.copy_(block.linear.weight[t])
                    ours[t].bias.copy_(block.linear.bias[t])
            for norms, block in zip(self.norms, (head.hidden2, head.logits), strict=True):
                for t, norm in enumerate(norms):
                    norm.weight.copy_(block.norm.weight.view(-1, WIDTH)[t])
                    norm.bias.copy_(block.norm.bias.view(-1, WIDTH)[t])

    def normalized(self, norms: nn.ModuleList, xs: list[torch.Tensor]) -> list[torch.Tensor]:
        if len(norms) == 1:
            return list(norms[0](torch.cat(xs)).split([len(x) for x in xs]))
        return [norm(x) for norm, x in zip(norms, xs, strict=True)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        xs = self.normalized(self.norms[0], [layer(x).relu() for layer in self.inner])
        xs = [layer(x) for layer, x in zip(self.middle, xs, strict=True)]
        xs = self.normalized(self.norms[1], xs)
        return torch.cat([layer(x) for layer, x in zip(self.outer, xs, strict=True)], 1)


@pytest.mark.parametrize("norm", AU_NORMS)
def test_per_au_head_equals_a_network_for_each_action_unit(norm):
    model = head(norm)
    alone = OneByOne(model)
    for factor in (1, 3):
        x = factor * torch.randn(8, FEATURES)
        (y, gradients), (expected, expected_gradients) = train(model, x), train(alone, x)
        assert_close(y, expected)
        assert_close(gradients["x"], expected_gradients["x"])
    assert_close(model.eval()(x), alone.eval()(x))


def test_folded_is_the_function_of_per_au_and_takes_its_weights():
    model, folded = head("per-au"), head("folded")
    folded.load_state_dict(model.state_dict())
    for factor in (1, 3):
        x = factor * torch.randn(8, FEATURES)
        (y, gradients), (expected, expected_gradients) = train(folded, x), train(model, x)
        assert_close(y, expected)
        for name, gradient in expected_gradients.items():
            assert_close(gradients[name], gradient)
    assert_close(folded.state_dict(), model.state_dict())
    x = torch.randn(8, FEATURES)
    assert_close(folded.eval()(x), model.eval()(x))


def test_folded_weights_are_what_is_quantized():
    model = quantize_model_(head("folded"), weight_bits=3, activation_bits=5)
    norm, linear, seen = model.hidden2.norm, model.hidden2.linear, []
    model.hidden2.register_forward_hook(lambda _module, args, y: seen.append((*args, y)))
    for training in (True, False):
        model.train(training)(torch.randn(16, FEATURES))
        x, y = seen.pop()
        if training:
            mean, var = x.mean(0), x.var(0, correction=0)
            assert torch.equal(linear.input_quantizer.range, x.abs().amax((0, 2)))
            assert_close(norm.running_mean.view(AUS, WIDTH), 0.1 * mean)
        else:
            mean = norm.running_mean.view(AUS, WIDTH)
            var = norm.running_var.view(AUS, WIDTH)
        for t in range(AUS):
            own = slice(t * WIDTH, (t + 1) * WIDTH)
            scale = norm.weight[own] / (var[t] + norm.eps).sqrt()
            weight = linear.weight[t] * scale
            bias = linear.bias[t] + linear.weight[t] @ (norm.bias[own] - scale * mean[t])
            known = linear.input_quantizer.range[t].clone()
            inputs = fake_quantize_ema(x[:, t], known, 5, training=False)
            assert_close(y[:, t], inputs @ fake_quantize(weight, 3, axis=0).T + bias)


@pytest.mark.parametrize("norm", AU_NORMS)
def test_a_loud_action_unit_leaves_the_others_alone(norm):
    """Statistics, ranges, weights and logits of the others stay to the bit, unless shared."""

    def seen(factor: float) -> dict[str, torch.Tensor]:
        model = head(norm)
        with torch.no_grad():
            for parameter in (model.hidden1.weight, model.hidden1.bias):
                parameter.view(AUS, WIDTH, -1)[1].mul_(factor)
            model.hidden2.linear.weight[1].mul_(factor)
        ranges = "shared" if norm == "shared" else "per-group"
        quantize_model_(model, input_ranges=ranges)
        torch.manual_seed(1)
        result = {"logits": model(torch.randn(8, FEATURES)).T}
        for name in ("hidden2", "logits"):
            block = model.get_submodule(name)
            result[f"{name} weights"] = block.linear.quantized_weight()
            if norm != "shared":
                result[f"{name} range"] = block.linear.input_quantizer.range
                result[f"{name} mean"] = block.norm.running_mean.view(AUS, WIDTH)
                result[f"{name} variance"] = block.norm.running_var.view(AUS, WIDTH)
        return result

    calm, loud = seen(1), seen(1000)
    for name, tensor in calm.items():
        same = torch.equal(loud[name][[0, 2]], tensor[[0, 2]])
        assert same == (norm != "shared" or name.endswith("weights")), name
    assert not torch.equal(loud["hidden2 weights"][1], calm["hidden2 weights"][1])


def test_norms_by_other_names_are_refused():
    with pytest.raises(ValueError, match="norm: got 'batch', takes one of per-au, shared, folded"):
        PerAUHead(FEATURES, AUS, "batch")


@pytest.mark.parametrize("kind", HEADS)
def test_training_takes_two_samples(kind):
    model = head(kind)
    if kind == "shared":  # which has a sample for each action unit
        model(torch.randn(1, FEATURES))
    else:
        with pytest.raises(ValueError, match="per channel"):
            model(torch.randn(1, FEATURES))


# Networks.


@pytest.mark.parametrize("kind", HEADS)
def test_quantized_networks_train_and_their_weights_can_be_saved(kind):
    model = network(kind, quantized=True)
    x, truth = torch.rand(16, 3, 32, 32), torch.rand(16, AUS).round()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), truth)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    other = network(kind, quantized=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(10 * x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "shape"), [("per-au", (AUS,)), ("folded", (AUS,)), ("shared", ())]
)
def test_the_method_quantizes_with_the_networks_ranges(kind, shape):
    layers = Quant().with_defaults().network(network(kind)).head
    assert layers.hidden1.input_quantizer.range.shape == ()
    assert layers.hidden2.linear.input_quantizer.range.shape == shape
    assert layers.logits.linear.input_quantizer.range.shape == shape
    assert [m.weight_bits for m in (layers.hidden1, layers.hidden2.linear)] == [4, 4]
    assert layers.logits.linear.weight_bits == 8


# InceptionV3, where torchvision can be imported.


@pytest.fixture
def torchvision_models():
    try:
        import torchvision.models
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    return torchvision.models


def test_inception_is_torchvisions_up_to_the_maximum(torchvision_models):
    encoder = InceptionV3Encoder(pretrained=False).eval()
    theirs = torchvision_models.inception_v3(init_weights=False, aux_logits=False).eval()
    missing, unexpected = theirs.load_state_dict(encoder.state_dict(), strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    theirs.avgpool = nn.AdaptiveMaxPool2d(1)
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 75, 75)
    y = encoder(x)
    assert y.shape == (2, encoder.features)
    assert torch.equal(y, theirs(x))


def test_pretrained_inception_has_imagenet_weights(torchvision_models, monkeypatch):
    torch.manual_seed(0)
    published = torchvision_models.inception_v3(init_weights=False).state_dict()
    asked = []

    def get_state_dict(weights, **options):
        asked.append((str(weights), options))
        return published

    kind = torchvision_models.Inception_V3_Weights
    monkeypatch.setattr(kind, "get_state_dict", get_state_dict)
    encoder = InceptionV3Encoder(pretrained=True)
    options = {"progress": True, "check_hash": True, "weights_only": True}
    assert asked == [("Inception_V3_Weights.IMAGENET1K_V1", options)]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, published[name])


def test_quantized_inception_trains_at_its_own_size(torchvision_models):
    model = ActionUnitNetwork(InceptionV3Encoder(pretrained=False), head("per-au", 2048))
    Quant().with_defaults().network(model)
    y = model(torch.randn(2, 3, 299, 299))
    assert y.shape == (2, AUS)
    y.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("error", [None, "ImportError", "RuntimeError"])
def test_without_torchvision_the_message_tells_what_to_install(error, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    if error is None:
        monkeypatch.setitem(sys.modules, "torchvision", None)
    else:  # as a torchvision that was built for another torch
        (tmp_path / "torchvision").mkdir()
        (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {error}('nms')")
        monkeypatch.syspath_prepend(tmp_path)
    message = "--encoder: got inception_v3, which needs torchvision; pip install 'noisyq_fast"
    with pytest.raises(ValueError, match=message):
        InceptionV3Encoder(pretrained=False)
