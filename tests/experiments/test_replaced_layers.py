"""Methods that replace the layers of a network: adder, hashed and lcnn."""

import numpy as np
import pytest
import torch
from test_training import trainer
from torch import nn

import noisyq_fast
from experiments import run
from experiments.methods.adder import Adder
from experiments.methods.hashed import Hashed
from experiments.methods.lcnn import LCNN
from experiments.models import MODELS, ActionUnitNetwork, PerAUHead, ResNet20, SmallEncoder
from experiments.models.hashed import (
    HashedConv2d,
    HashedLinear,
    HashedWeight,
    in_range,
    layer_seed,
    xxh32,
)
from experiments.models.layers import decayed
from experiments.models.lookup import LookupConv2d, Thresholded
from noisyq_fast import AdderConv2d

SMALL = {"train_size": 64, "batch_size": 32, "epochs": 4}
NAMES = ["adder", "hashed", "lcnn"]
EXAMPLE = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def replaced(method, model="resnet20"):
    torch.manual_seed(0)
    return method.with_defaults().network(MODELS[model](3, 10), EXAMPLE)


# All three.


@pytest.mark.parametrize("name", NAMES)
def test_a_run_learns(name):
    options = {"noise": 0.0, "augment": False, "lr": 2e-3, "evaluate_every": 6}
    ours = trainer(f"--method {name}", train_size=128, batch_size=16, epochs=6, **options)
    first, *_, last = (metrics.loss for metrics in ours.epochs())
    assert last < 0.6 * first


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", [Adder(), Hashed(), LCNN()], ids=NAMES)
def test_every_network_of_the_study_trains(model, method):
    network = replaced(method, model)
    logits = network(EXAMPLE.expand(2, -1, -1, -1))
    assert logits.shape == (2, 10)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("method", [Adder(), Hashed(), LCNN()], ids=NAMES)
def test_an_encoder_of_faces_trains(method):
    head = PerAUHead(SmallEncoder.features, aus=3, norm="per-au")
    network = ActionUnitNetwork(SmallEncoder(), head)
    before = [type(module) for module in head.modules()]
    network = method.with_defaults().network(network, torch.randn(1, 3, 64, 64))
    logits = network(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 3)
    if not isinstance(method, Hashed):
        assert [type(module) for module in head.modules()] == before
    inner = network.encoder.stage1[3]
    assert type(inner) is not nn.Conv2d or isinstance(method, Hashed)
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("method", [Adder(), Hashed(), LCNN()], ids=NAMES)
def test_what_stays_starts_as_without_the_method(method):
    torch.manual_seed(0)
    plain = ResNet20()
    ours = replaced(method)
    for name in ("bn.weight", "classifier.bias", "stage3.2.bn2.bias"):
        assert torch.equal(ours.state_dict()[name], plain.state_dict()[name])
    if not isinstance(method, Hashed):
        assert torch.equal(ours.conv.weight, plain.conv.weight)
        assert torch.equal(ours.classifier.weight, plain.classifier.weight)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_of_weights_is_refused(name):
    with pytest.raises(ValueError, match=r"--dropout-where: got weights .* takes classifier or"):
        trainer(f"--method {name} --dropout-where weights --dropout 0.1", **SMALL)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method adder --compression 8", "adder with hashed, of which a run has one kind of"),
        (
            "--method lcnn --compression 8",
            "hashed with lcnn, of which a run has one kind of",
        ),
        ("--method adder --prune 0.5", "got adder with prune, which knows the filters"),
        ("--method hashed --prune 0.5", "got hashed with prune, which removes filters"),
        ("--method lcnn --prune 0.5", "got lcnn with prune, which removes filters"),
        ("--method adder --defensive 0.1", "got adder with defensive, which bounds how much"),
        ("--method hashed --compression 0.5", "--compression: got 0.5, takes a number from 1"),
        ("--method hashed --hash-seed -1", "--hash-seed: got -1, takes a whole number from 0"),
        ("--method adder --adder-rate 0", "--adder-rate: got 0.0, takes a number above 0"),
        ("--method lcnn --lcnn-dictionary 0", "--lcnn-dictionary: got 0.0, takes a number above"),
        ("--method lcnn --lcnn-sparsity 1", "--lcnn-sparsity: got 1.0, takes a share from 0 to"),
        ("--method lcnn --lcnn-lambda -1", "--lcnn-lambda: got -1.0, takes a number from 0"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run.parse(arguments.split())


@pytest.mark.parametrize(
    ("method", "takes"),
    [
        (Adder(), "adder: Sequential has no convolution between"),
        (Hashed(), "hashed: Sequential has no convolution or linear layer"),
        (LCNN(), "lcnn: Sequential has no convolution between"),
    ],
)
def test_a_network_without_such_layers_is_refused(method, takes):
    with pytest.raises(ValueError, match=takes):
        method.with_defaults().network(nn.Sequential(nn.PReLU()))


@pytest.mark.parametrize("method", [Adder(), LCNN()], ids=["adder", "lcnn"])
def test_a_layer_that_cannot_be_replaced_is_named(method):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(4 * 28 * 28, 2)
    )
    with pytest.raises(ValueError, match=r"layer 1: .*(groups|got Conv2d)"):
        method.with_defaults().network(model, EXAMPLE)


# AdderNet.


def test_all_but_the_first_and_the_last_layer_add():
    model = replaced(Adder(), "resnet18_cifar")
    adding = [name for name, m in model.named_modules() if isinstance(m, AdderConv2d)]
    assert len(adding) == 19
    assert {"stage2.0.shortcut.0", "stage1.0.conv1"} <= set(adding)
    assert type(model.conv) is nn.Conv2d
    assert type(model.classifier) is nn.Linear


def test_an_adder_weight_is_normal_and_goes_further_in_a_step():
    model = replaced(Adder(adder_rate=50.0))
    layer = model.stage3[0].conv2
    assert layer.weight.std().item() == pytest.approx(1, rel=0.05)
    before = layer.weight.detach().clone()
    (trained,) = layer.parameters()
    assert any(trained is weight for weight in decayed(model))
    optimizer = torch.optim.Adam(decayed(model), lr=1e-3)
    model(EXAMPLE.expand(2, -1, -1, -1)).square().sum().backward()
    optimizer.step()
    assert (layer.weight - before).abs().max().item() == pytest.approx(0.05, rel=1e-3)


def test_the_macs_of_an_adder_network_are_those_of_the_other():
    plain = noisyq_fast.summary(ResNet20(), EXAMPLE)
    adder = noisyq_fast.summary(replaced(Adder()), EXAMPLE)
    assert (adder.macs, adder.parameters) == (plain.macs, plain.parameters)


# HashedNets.

# Of the library xxhash: xxh32(int.to_bytes(word, 4, "little"), seed).
XXH32 = {
    0: [148298089, 4089149075, 527729046, 3901342335, 67608159],
    7: [351342752, 1468301318, 3994228862, 926992320, 3549218398],
    2**32 - 1: [3000628221, 2258849529, 2983992134, 1063919434, 551811927],
}


@pytest.mark.parametrize("seed", XXH32)
def test_hash_is_xxhash(seed):
    words = np.array([0, 1, 2, 12345, 2**32 - 1], dtype=np.uint32)
    assert xxh32(words, seed).tolist() == XXH32[seed]


def test_hashes_fall_evenly_into_buckets():
    edges = np.array([0, 2**32 - 1], dtype=np.uint32)
    assert in_range(edges, 10).tolist() == [0, 9]
    counts = np.bincount(in_range(xxh32(np.arange(100_000, dtype=np.uint32), 5), 10))
    assert counts.min() > 9_600
    assert counts.max() < 10_400


def test_hashes_depend_on_name_and_seed_alone():
    torch.manual_seed(1)
    seed = layer_seed("stage1.0.conv1", 2)
    shared = HashedWeight((2, 4), 5, seed)
    assert seed == 3230502395
    assert shared.bucket.tolist() == [0, 3, 3, 1, 3, 2, 1, 4]
    assert shared.sign.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1]
    assert len({layer_seed(name, seed) for name in "ab" for seed in (0, 1)}) == 4


def test_signs_are_another_hash_than_buckets():
    (shared,) = HashedLinear(64, 64, compression=8).parametrizations.weight
    assert abs(shared.sign.float().mean()) < 0.05
    for bucket in range(5):  # a bucket has both
        assert shared.sign[shared.bucket == bucket].unique().numel() == 2


@pytest.mark.parametrize("layer", [HashedConv2d(4, 6, 3, bias=False), HashedLinear(64, 9)])
def test_a_hashed_layer_has_few_values(layer):
    values = layer.parametrizations.weight.original
    assert values.shape == (round(layer.weight.numel() / 8),)
    # Not all: some values have no weight.
    assert set(layer.weight.abs().unique().tolist()) <= set(values.abs().tolist())
    assert set(layer.state_dict()) == {"parametrizations.weight.original"} | (
        {"bias"} if layer.bias is not None else set()
    )


def test_a_hashed_network_has_its_share_of_the_parameters():
    plain, hashed = (noisyq_fast.summary(m, EXAMPLE) for m in (ResNet20(), replaced(Hashed())))
    assert hashed.macs == plain.macs
    norms = sum(row.parameters for row in plain.layers if row.kind == "BatchNorm2d") + 10
    assert hashed.parameters == norms + (plain.parameters - norms) // 8
    assert hashed.size_in_bits < plain.size_in_bits / 6


def test_decay_acts_on_the_values():
    model = replaced(Hashed())
    assert {id(p) for p in decayed(model)} == {
        id(m.parametrizations.weight.original)
        for m in model.modules()
        if isinstance(m, nn.Conv2d | nn.Linear)
    }


def test_another_hash_seed_is_another_network(tmp_path):
    names = {run.parse(["--method", "hashed", "--hash-seed", str(seed)]).label for seed in (0, 3)}
    assert names == {"hashed8", "hashed8-hash-seed3"}
    first, second = replaced(Hashed(hash_seed=0)), replaced(Hashed(hash_seed=3))
    assert not torch.equal(first.conv.weight, second.conv.weight)
    assert Hashed(hash_seed=3).evaluation_options() == {"hash_seed": 3}


# LCNN.


def test_a_dictionary_for_each_inner_convolution():
    model = replaced(LCNN(lcnn_dictionary=0.25))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, LookupConv2d)}
    assert len(layers) == 18
    layer = layers["stage2.0.conv1"]
    assert layer.dictionary.weight.shape == (4, 16, 1, 1)
    assert layer.entries.shape == (32, 4, 3, 3)
    assert layer.dictionary.padding == (1, 1)
    assert type(model.conv) is nn.Conv2d


def test_the_share_below_the_threshold_at_the_start():
    torch.manual_seed(0)
    layer = LookupConv2d(32, 64, 3, vectors=32, sparsity=0.2)
    layer(torch.randn(1, 32, 5, 5))
    assert 1 - layer.lookups() / layer.entries.numel() == pytest.approx(0.2, abs=0.02)


def test_what_has_gone_stays_whatever_the_momentum():
    thresholded = Thresholded((1,), threshold=0.01)
    p = nn.Parameter(torch.tensor([0.02]))
    optimizer = torch.optim.SGD([p], lr=0.01, momentum=0.9)
    seen = []
    for _ in range(5):
        optimizer.zero_grad()
        thresholded(p).sum().backward()
        optimizer.step()
        seen.append((round(p.item(), 4), p.grad.item(), thresholded(p).item()))
    # The momentum takes it to below -0.01, where it would count again.
    assert seen == [
        (0.01, 1.0, 0.0),
        (0.001, 0.0, 0.0),
        (-0.0071, 0.0, 0.0),
        (-0.0144, 0.0, 0.0),
        (-0.021, 0.0, 0.0),
    ]


def test_entries_go_in_training_only():
    layer = LookupConv2d(3, 4, 3, vectors=2, sparsity=0.5).eval()
    with torch.no_grad():
        layer.entries.zero_()
    layer.thresholded.kept.fill_(True)
    layer(torch.randn(1, 3, 5, 5))
    assert layer.lookups() == layer.entries.numel()
    layer.train()(torch.randn(1, 3, 5, 5))
    assert layer.lookups() == 0


# Inputs, outputs, and the rows before and after each replaced convolution on a picture of digits.
INNER = [
    *[(16, 16, 8, 8)] * 6,
    *[(16, 32, 8, 4), *[(32, 32, 4, 4)] * 5],
    *[(32, 64, 4, 2), *[(64, 64, 2, 2)] * 5],
]


def test_results_have_the_costs_of_each_kind_of_layer():
    results = {name: trainer(method=name, **SMALL).result() for name in ["baseline", *NAMES]}
    macs, parameters, additions = (
        {name: result[cost] for name, result in results.items()}
        for cost in ("macs", "parameters", "additions")
    )
    weights = sum(9 * i * o for i, o, _, _ in INNER)
    dictionaries = sum(i * i // 2 for i, *_ in INNER)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert parameters == {
        "baseline": 144 + weights + norms + 650,
        "adder": 144 + weights + norms + 650,
        "hashed": (144 + weights + 640) // 8 + norms + 10,
        "lcnn": 144 + weights // 2 + dictionaries + norms + 650,
    }
    products = sum(9 * i * o * after**2 for i, o, _, after in INNER)
    with_dictionaries = sum(i * i // 2 * (before + 2) ** 2 for i, _, before, _ in INNER)
    ends = 8 * 8 * 144 + 640
    dense = ends + products
    lcnn = ends + products // 2 + with_dictionaries
    assert macs == {"baseline": dense, "adder": dense, "hashed": dense, "lcnn": lcnn}
    assert additions == {"baseline": 0, "adder": products, "hashed": 0, "lcnn": 0}
    assert 0.98 < results["lcnn"]["lookups"] / (weights // 2) <= 1
    assert "lookups" not in results["hashed"]


def test_layers_have_their_names_in_a_summary():
    adder, hashed, lcnn = (
        [row.kind for row in noisyq_fast.summary(replaced(method), EXAMPLE).layers]
        for method in (Adder(), Hashed(), LCNN())
    )
    assert adder[2:4] == ["AdderConv2d (Scaled)", "BatchNorm2d"]
    assert hashed[2:4] == ["Conv2d (HashedWeight)", "BatchNorm2d"]
    assert lcnn[2:5] == ["Conv2d", "Conv2d (Thresholded)", "BatchNorm2d"]
    layer = HashedConv2d(3, 8, 3, compression=4)
    (row,) = noisyq_fast.summary(layer, EXAMPLE).layers
    assert (row.kind, row.parameters) == ("HashedConv2d (HashedWeight)", 54 + 8)
    assert row.macs == 30 * 30 * 8 * 27


def test_lookups_are_reported():
    ours = trainer("--method lcnn --lcnn-sparsity 0.5", **SMALL)
    list(ours.epochs())
    (line,) = ours.finish()
    result = ours.result()
    layers = [m for m in ours.model.modules() if isinstance(m, LookupConv2d)]
    kept = sum(layer.lookups() for layer in layers)
    entries = sum(layer.entries.numel() for layer in layers)
    assert 0.3 < kept / entries < 0.6
    assert result["lookups"] == kept
    assert f"{kept / entries:.1%} of {entries:,} entries; 18 dictionaries" in line


def test_without_a_penalty_the_loss_is_the_tasks():
    task_loss = nn.Identity()
    assert LCNN(lcnn_lambda=0.0).loss(task_loss, ResNet20(), None) is task_loss


@pytest.mark.parametrize("compression", [0.5, 0, -1, float("nan")])
def test_fewer_weights_than_values_are_refused(compression):
    with pytest.raises(ValueError, match=f"compression: got {compression}, takes a number from 1"):
        HashedLinear(4, 4, compression=compression)
