"""Files with integer weights: what comes back, how large they are, and what is refused."""

import contextlib
import json
import os
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import noisyq_fast
from noisyq_fast import (
    AQD,
    DSQ,
    LSQ,
    PACT,
    QIL,
    SAT,
    AbsMax,
    GroupedLinear,
    fuse_,
    load_integers,
    quantize_model_,
    save_integers,
)
from noisyq_fast.files.packing import pack_codes, packed_size, unpack_codes
from noisyq_fast.grid import KINDS, Grid, most_bits

X = torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """Layers of many kinds."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.up = nn.ConvTranspose2d(8, 4, 2, groups=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.heads = GroupedLinear(3, 4, 2)
        self.words = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        x = self.depthwise(self.norm(self.stem(x)).relu()).relu()
        x = self.up(x).flatten(2).mT
        x = self.attention(x, x, x)[0].mean(1)
        x = self.head(x) + self.words(torch.arange(len(x)) % 5)
        return self.heads(x.unsqueeze(1).expand(-1, 3, -1))


def network(seed=0):
    torch.manual_seed(seed)
    return Network()


def trained(**options):
    model = quantize_model_(network(), example=X, **options)
    with torch.no_grad():
        model(X)
    return model.eval()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# Codes.


@given(st.data())
def test_packed_codes_come_back(data):
    kind = data.draw(st.sampled_from(KINDS))
    grid = Grid(data.draw(st.integers(2, most_bits(kind))), kind)
    shape = torch.Size(data.draw(st.lists(st.integers(0, 7), max_size=3)))
    levels = torch.arange(grid.code_min, grid.code_max + 1, grid.code_step)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    codes = levels[torch.randint(len(levels), shape, generator=generator)].to(grid.code_dtype)
    packed = pack_codes(codes, grid)
    assert packed.shape == (packed_size(codes.numel(), grid.bits),)
    again = unpack_codes(packed, grid, shape)
    assert again.dtype == grid.code_dtype
    assert torch.equal(again, codes)


def test_parts_of_many_codes_are_packed_like_all(monkeypatch):
    codes = torch.arange(1000).remainder(7).sub(3).to(torch.int8)
    whole = pack_codes(codes, Grid(3))
    monkeypatch.setattr("noisyq_fast.files.packing._AT_ONCE", 64)
    assert torch.equal(pack_codes(codes, Grid(3)), whole)
    assert torch.equal(unpack_codes(whole, Grid(3), codes.shape), codes)


def test_two_codes_of_4_bits_to_a_byte():
    codes = torch.tensor([-7, 7, 0], dtype=torch.int8)
    assert pack_codes(codes, Grid(4)).tolist() == [0xE0, 0x07]
    with pytest.raises(ValueError, match=re.escape("got the code 8, takes -7..7")):
        unpack_codes(torch.tensor([0xFF], dtype=torch.uint8), Grid(4), torch.Size([2]))


# What comes back.


def all_but_the_stem(name, layer):
    return name != "stem"


OPTIONS = [
    {},
    {"weight_bits": 2, "activation_bits": 3, "first_last_bits": None},
    {"weight_bits": 3, "weight_grid": "affine", "activation_grid": "affine"},
    {"weight_grid": "full", "weight_bits": 6},
    {"weight_grid": "odd", "first_last_bits": 4},
    {"weight_group_size": 2, "overrides": {"depthwise": None}},
    {"weight": AbsMax(5, axis=None), "activation": None},
    {"weight": None},
    {"arithmetic": "integer"},
    {"input_ranges": "shared", "filter": all_but_the_stem},
    {
        "activation_granularity": "token",
        "overrides": {n: {"activation_granularity": "tensor"} for n in ("stem", "depthwise", "up")},
    },
]


LEARNED = {
    **{
        f"{q.__class__.__name__} {i}": {"weight": q}
        for i, q in enumerate(
            [
                *(LSQ(4), LSQ(3, axis=0, symmetric=True), QIL(4), QIL(2), DSQ(3)),
                *(AQD(4), AQD(2, axis=None), AQD(5, signed=False)),
                *(SAT(4), SAT(4, rounding="centered"), SAT(3, rounding="original", rescale=False)),
            ]
        )
    },
    **{
        f"input {q.__class__.__name__} {i}": {"activation": q}
        for i, q in enumerate(
            [
                *(LSQ(4), LSQ(3, signed=True), PACT(4, start=2.0), QIL(4), DSQ(4)),
                *(AQD(4), AQD(4, signed=True)),
            ]
        )
    },
}


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize("options", LEARNED.values(), ids=LEARNED)
@pytest.mark.filterwarnings("ignore:.*below 0")
def test_learned_quantizers_come_back(path, options, arithmetic):
    model = quantize_model_(network(), example=X, arithmetic=arithmetic, **options)
    with torch.no_grad():
        model(X)  # they begin
        for parameter in model.parameters():
            parameter.mul_(1.05)  # and learn
    model.eval()
    size = save_integers(model, path)
    again = load_integers(network(1), path)
    assert torch.equal(again(X), model(X))
    assert size < 2 * save_integers(trained(), path)
    save_integers(again, path)
    assert torch.equal(load_integers(network(2), path)(X), model(X))


class Residual(nn.Module):
    """Convolutions, batch norms and an addition."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.conv_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (self.conv_norm(self.conv(x)) + x).relu()
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_bits": 2, "activation_grid": "unsigned"},
        {"weight": LSQ(4), "activation": LSQ(4)},
        {"weight": AQD(3), "activation": AQD(3)},
        {"weight": SAT(4), "activation": PACT(4)},
        {"weight": QIL(4), "activation": QIL(4)},
    ],
    ids=str,
)
def test_chains_come_back(path, options):
    model = quantize_model_(Residual(), example=X, arithmetic="integer", **options)
    fuse_(model, X, recompute=True)
    with torch.no_grad():
        model(X)
        model(2 * X)
    model.eval()
    save_integers(model, path)
    again = load_integers(Residual(), path)
    assert torch.equal(again(X), model(X))
    assert again.conv.followed_by == model.conv.followed_by == "batch norm, addition, ReLU"
    # They train on as chains, too.
    assert torch.equal(again.train()(X), model.train()(X))
    content = content_of(path)
    content["fused"]["head"] = content["fused"].pop("conv")
    rewritten(path, content=json.dumps(content))
    refused(path, "head: a convolution in the file, QuantLinear here", Residual())


KINDS_OF_LAYERS = {
    "Linear": (lambda: nn.Linear(6, 4), (3, 6)),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3, padding="same", padding_mode="circular"), (2, 6, 9)),
    "Conv2d": (lambda: nn.Conv2d(6, 4, (2, 4), padding="same", groups=2), (2, 6, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 2, dilation=2), (2, 6, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(6, 4, 3, stride=2), (2, 6, 5)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(6, 4, 3, groups=2), (2, 6, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(6, 4, 2, bias=False), (2, 6, 3, 3, 3)),
    "GroupedLinear": (lambda: GroupedLinear(3, 6, 4), (5, 3, 6)),
    "AdderConv2d": (lambda: noisyq_fast.AdderConv2d(6, 4, 3), (2, 6, 5, 5)),
    "AdderLinear": (lambda: noisyq_fast.AdderLinear(6, 4), (3, 6)),
    "attention": (lambda: Attention(), (4, 7, 6)),
    "attention of other sizes": (lambda: Attention(kdim=3, vdim=2), (4, 7, 6)),
}


class Attention(nn.MultiheadAttention):
    """To keys and values made of the query, which may have sizes of their own."""

    def __init__(self, **sizes):
        super().__init__(6, 2, batch_first=True, **sizes)


class Alone(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x[..., : self.layer.kdim], 2 * x[..., : self.layer.vdim])[0]
        return self.layer(x)


@pytest.mark.parametrize("arithmetic", ["float", "integer"])
@pytest.mark.parametrize(
    "options", [{}, {"weight": AQD(4), "activation": AQD(4, signed=True)}], ids=["absmax", "aqd"]
)
@pytest.mark.parametrize(("make", "shape"), KINDS_OF_LAYERS.values(), ids=KINDS_OF_LAYERS)
def test_every_kind_of_layer(path, make, shape, options, arithmetic):
    x = torch.randn(shape)
    model = quantize_model_(Alone(make()), first_last_bits=None, arithmetic=arithmetic, **options)
    with torch.no_grad():
        model(x)
    save_integers(model.eval(), path)
    again = load_integers(Alone(make()), path)
    assert torch.equal(again(x), model(x))
    assert again.layer.weight_bits == model.layer.weight_bits


class Folded(nn.Module):
    """Computes with its layer's weight times a factor."""

    def __init__(self):
        super().__init__()
        self.linear = GroupedLinear(3, 6, 4)
        self.factor = nn.Parameter(torch.rand(6))

    def forward(self, x):
        return self.linear(x, parameters=(self.linear.weight * self.factor, self.linear.bias))


@pytest.mark.parametrize("weight", [AbsMax(4), LSQ(4), AQD(4), DSQ(4)], ids=str)
@pytest.mark.parametrize("arithmetic", ["float", "integer"])
def test_a_layer_that_is_given_its_parameters_keeps_its_weight(path, weight, arithmetic):
    x = torch.randn(5, 3, 6)
    model = quantize_model_(Folded(), example=x, weight=weight, arithmetic=arithmetic)
    model(x)
    save_integers(model.eval(), path)
    again = load_integers(Folded(), path)
    assert torch.equal(again(x), model(x))
    assert torch.equal(again.linear.weight, model.linear.weight)
    save_integers(load_integers(Folded(), path), path)  # before it is called
    assert torch.equal(load_integers(Folded(), path)(x), model(x))


def test_parameters_for_a_weight_that_was_read_as_codes(path):
    x = torch.randn(5, 3, 6)
    model = quantize_model_(Folded())
    model.linear(x)  # so that nothing says how the network calls it
    save_integers(model.eval(), path)
    again = load_integers(Folded(), path)
    with pytest.raises(ValueError, match=r"parameters: got some .* run the network on a batch"):
        again(x)
    noisyq_fast.dequantize_model_(again)(x)


def test_a_weight_that_is_read_directly_stays(path):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(6, 6)
            self.outer = nn.Linear(6, 4)

        def forward(self, x):
            return self.outer(x @ self.inner.weight)

    x = torch.randn(5, 6)
    model = quantize_model_(Reading(), first_last_bits=None)
    model(x)
    with pytest.warns(UserWarning, match="kept in float: inner has seen no input"):
        save_integers(model.eval(), path)
    assert torch.equal(load_integers(Reading(), path)(x), model(x))


def test_modules_with_versions_of_their_state(path):
    class Versioned(nn.Sequential):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *others):
            assert local_metadata["version"] == 3
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def make():
        return Versioned(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Versioned(nn.Conv2d(8, 2, 1)))

    x = torch.randn(2, 3, 5, 5)
    model = quantize_model_(make(), example=x)
    with torch.no_grad():
        model(x)
        save_integers(model.eval(), path)
        assert torch.equal(load_integers(make(), path)(x), model(x))


def test_files_of_version_1_are_read(path):
    model = trained()
    save_integers(model, path)
    content = content_of(path)
    del content["fused"]
    rewritten(path, version="1", content=json.dumps(content))
    assert torch.equal(load_integers(network(1), path)(X), model(X))


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:.*below 0")
def test_outputs_are_equal_to_the_bit(path, options):
    model = trained(**options)
    size = save_integers(model, path)
    assert size == path.stat().st_size
    float_model = network(1)
    again = load_integers(float_model, path)
    assert torch.equal(again(X), model(X))
    assert not again.training
    assert str(again).count("Quant") == str(model).count("Quant")
    assert not isinstance(float_model.head, noisyq_fast.QuantLayer)
    assert noisyq_fast.summary(again, X).size_in_bits == noisyq_fast.summary(model, X).size_in_bits
    # And once more.
    save_integers(again, path)
    assert torch.equal(load_integers(network(2), path)(X), model(X))


def test_bfloat16(path):
    model = trained(weight_bits=8).bfloat16()
    save_integers(model, path)
    x = X.bfloat16()
    assert torch.equal(load_integers(network(1).bfloat16(), path)(x), model(x))
    with pytest.raises(ValueError, match=re.escape("torch.bfloat16 of shape [8, 6, 3, 3] in the")):
        load_integers(network(1), path)


def test_size(path):
    layers = [nn.Linear(256, 256, bias=False) for _ in range(4)]
    model = quantize_model_(nn.Sequential(*layers), weight_bits=3, first_last_bits=None)
    noisyq_fast.calibrate(model, [torch.randn(8, 256)])
    weights = 4 * 256 * 256 * 3 / 8
    scales = 4 * 256 * 4
    assert weights + scales < save_integers(model, path) < weights + scales + 4096


@pytest.mark.parametrize("name", ["easyquant", "ocs", "bitsplit", "dfq"])
def test_networks_of_post_training_methods(path, name):
    def network():
        first = [nn.Conv2d(6, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6()]
        second = [nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 3)).eval()

    options = {"activation_ratio": 0.2} if name == "ocs" else {}
    model = getattr(noisyq_fast, name)(network(), [X], **options)
    save_integers(model, path)
    again = load_integers(network(), path)
    assert torch.equal(again(X), model(X))
    assert str(again) == str(model)
    if name == "ocs":
        rewritten(path, {"3.0.sources": torch.full_like(load_file(path)["3.0.sources"], 99)})
        refused(path, "3.0.sources: takes channels from 0 to 7", network())


def test_tied_weights_are_there_once(path):
    def network():
        model = nn.Sequential(
            nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 64, bias=False)
        )
        model[2].weight = model[0].weight
        return model

    x = torch.arange(10)
    model = quantize_model_(network(), first_last_bits=None)
    with torch.no_grad():
        model(x)
    save_integers(model.eval(), path)
    assert "2.weight.codes" not in load_file(path)
    again = load_integers(network(), path)
    assert torch.equal(again(x), model(x))
    assert again[2].weight is again[0].weight

    for use in ({"weight_bits": 4}, None):
        model = quantize_model_(network(), overrides={"2": use})
        with torch.no_grad():
            model(x)
        with pytest.warns(UserWarning, match="kept in float: 0 shares its weight"):
            save_integers(model.eval(), path)
        assert torch.equal(load_integers(network(), path)(x), model(x))


# What is not saved.


def test_what_is_not_saved(path):
    pruned = trained()
    prune.random_unstructured(pruned.head, "weight", 0.5)
    normed = trained()
    nn.utils.parametrizations.weight_norm(normed.head)
    infinite = trained()
    infinite.head.weight.data[0, 0] = torch.inf
    renormed = quantize_model_(nn.Sequential(nn.Embedding(5, 4, max_norm=1.0)))
    for model, message in (
        (network(), "model: got Network without quantized layers"),
        (pruned, "layer 'head': its weight is made by another module.*utils.prune.remove"),
        (normed, "layer 'head': .*utils.parametrize.remove_parametrizations"),
        (infinite, "layer 'head': got a weight with a NaN or an infinity"),
        (renormed, "layer '0': got an embedding with max_norm"),
    ):
        with pytest.raises(ValueError, match=message):
            save_integers(model, path)
    expected = normed.eval()(X[:2])
    nn.utils.parametrize.remove_parametrizations(normed.head, "weight")
    save_integers(normed, path)
    assert torch.equal(load_integers(network(), path)(X[:2]), expected)
    path.unlink()
    with noisyq_fast.disabled(model := trained()), pytest.raises(ValueError, match="are off"):
        save_integers(model, path)
    with pytest.raises(TypeError, match="model: got str"):
        save_integers("model", path)
    assert list(path.parent.iterdir()) == []


def test_places_without_a_file_and_models_without_values(path):
    model = trained()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        save_integers(model, path / "model")
    with pytest.raises(IsADirectoryError, match="is a folder, takes the path of a file"):
        save_integers(model, path.parent)
    save_integers(model, path)
    with pytest.raises(ValueError, match="model: got parameters on the device 'meta'"):
        load_integers(network().to("meta"), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="model: got parameters on the device 'meta'"):
        save_integers(model.to("meta"), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# Files of all sorts.


@pytest.fixture
def saved(path):
    save_integers(trained(), path)
    return path


def rewritten(path, tensors=None, **metadata):
    """The same file with other tensors or metadata."""
    blob = path.read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    save_file(load_file(path) | (tensors or {}), path, header["__metadata__"] | metadata)


def content_of(path):
    blob = path.read_bytes()
    header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
    return json.loads(header["__metadata__"]["content"])


def refused(path, message, model=None):
    with pytest.raises(ValueError, match=message) as error:
        load_integers(model or network(), path)
    assert str(path) in str(error.value)


def test_truncated_at_every_length(saved):
    blob = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, *range(200, len(blob), 997), len(blob) - 1]:
        saved.write_bytes(blob[:length])
        refused(saved, "not a safetensors file, or only a part of one .* copy it again")


def test_a_damaged_header_is_an_error_of_the_file_if_any(saved):
    blob = bytearray(saved.read_bytes())
    header = 8 + int.from_bytes(blob[:8], "little")
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(header, (150,), generator=generator).tolist():
        damaged = bytearray(blob)
        damaged[place] ^= 1 + int(torch.randint(255, (), generator=generator))
        saved.write_bytes(damaged)
        with contextlib.suppress(ValueError):  # never anything else
            load_integers(network(), saved)


def test_newer_and_other_files(saved):
    rewritten(saved, version="3")
    refused(saved, "has version 3 of the format, this noisyq_fast reads up to 2; install a newer")
    rewritten(saved, version="x")
    refused(saved, "is damaged .its metadata are not those of this version")
    rewritten(saved, version="1", content="[]")
    refused(saved, "is damaged")
    rewritten(saved, content="[" * 100_000)
    refused(saved, "is damaged")
    save_file({"w": torch.ones(2)}, saved)
    refused(saved, "was not written by save_integers; a state dict is loaded with load_state_dict")
    saved.write_text("hello")
    refused(saved, "not a safetensors file")
    saved.unlink()
    with pytest.raises(FileNotFoundError):
        load_integers(network(), saved)
    os.mkfifo(saved)
    refused(saved, "is not a regular file")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"head.weight.codes": torch.zeros(3, dtype=torch.uint8)},
            "got codes in .*, takes 8 bytes",
        ),
        ({"stem.weight.codes": torch.full((432,), 255, dtype=torch.uint8)}, "got the code 128"),
        ({"head.weight.scale": torch.zeros(4)}, "scale: got a value that is not positive"),
        ({"head.weight.scale": torch.full((4,), torch.nan)}, "scale: got a value that is not"),
        ({"head.weight.scale": torch.ones(2, 2)}, "scale: got shape"),
        ({"head.weight.scale": torch.ones(9)}, "head.weight_quantizer|expand|size|shape"),
        ({"head.bias": torch.zeros(5)}, "head.bias: .* in the file"),
        ({"other": torch.zeros(5)}, "other: in the file only"),
    ],
)
def test_tensors_that_do_not_fit(saved, tensors, message):
    rewritten(saved, tensors)
    refused(saved, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layers"]["head"]["weights"]["weight"].update(bits=99), "bits: got 99"),
        (lambda c: c["layers"]["head"]["weights"]["weight"].update(grid="x"), "grid: got 'x'"),
        (lambda c: c["layers"]["head"]["weights"]["weight"].update(shape=[4, 5]), "in the file"),
        (lambda c: c["layers"]["head"]["weights"]["weight"].update(group_size=10**9), "group_size"),
        (lambda c: c["layers"]["head"]["weights"]["weight"].pop("bits"), "KeyError: 'bits'"),
        (
            lambda c: c["layers"]["head"]["inputs"]["input_quantizer"].update(kind="os.system"),
            "Key",
        ),
        (lambda c: c["layers"]["heads"]["inputs"]["input_quantizer"].update(axis=10**9), ""),
        (lambda c: c["layers"].update(nowhere=c["layers"]["head"]), "nowhere"),
        (lambda c: c["modules"].update(head="Conv2d"), "head: Conv2d in the file, Linear in the"),
        (lambda c: c["modules"].pop("head"), "head: nothing in the file, Linear in the model"),
        (lambda c: c["layers"].pop("head"), "in the file only|in the model only"),
    ],
)
def test_metadata_that_do_not_fit(saved, change, message):
    content = content_of(saved)
    change(content)
    rewritten(saved, content=json.dumps(content))
    if message:
        refused(saved, message)
        return
    with contextlib.suppress(ValueError):  # told, or without effect in evaluation
        load_integers(network(), saved)(X)


def test_another_network(saved):
    class Other(Network):
        def __init__(self):
            super().__init__()
            self.norm = nn.Identity()

    class Larger(Network):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 5)

    refused(
        saved, "norm: BatchNorm2d in the file, Identity in the model|the model: Network", Other()
    )
    larger = Larger()
    larger.__class__ = Network
    refused(saved, r"head.weight: torch.float32 of shape \[4, 4\] in the file, .*\[5, 4\]", larger)
    refused(saved, "got layers that are quantized already|does not fit", trained())
    with pytest.raises(TypeError, match="model: got NoneType"):
        load_integers(None, saved)
