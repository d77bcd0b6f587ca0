"""Methods whose quantizers learn, and networks of many widths, as runs."""

import copy

import pytest
import torch
from test_training import ends_bit_identical, numbers, trainer

from experiments import run
from experiments.methods.learned import ClippedLevels
from experiments.models import ResNet18Cifar, ResNet20
from experiments.models.residual import Residual
from experiments.storage.weights import Weights
from noisyq_fast import LearnedQuantizer
from noisyq_fast.optimizing import learned_parameters

SMALL = {"epochs": 4, "train_size": 64, "batch_size": 32}
METHODS = [
    "--method lsq --lsq-bits 3 --lsq-symmetric --lsq-gradient all",
    "--method pact --pact-rounding centered --pact-gradient pact",
    "--method qil --qil-bits 2 --qil-progressive",
    "--method dsq --dsq-alpha 0.4",
    "--method aqd --aqd-skips --aqd-standardize",
    "--method adabits --adabits-bits 2 --adabits-most 3 --adabits-tested 2",
    "--method quantizable --quantizable-bits 3 --quantizable-most 3 --loss gce",
    "--method qkd --qil-bits 4",
]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_ends_bit_identical(method):
    ends_bit_identical(method, 2, **SMALL)


@pytest.mark.parametrize("method", ["lsq", "qil"])
def test_learned_parameters_have_a_rate_of_their_own_and_no_decay(method):
    ours = trainer(f"--method {method} --weight-decay 0.1 --{method}-rate 0.2", **SMALL)
    (optimizer,) = ours.procedure.optimizers
    ours._set_rate(0.5)
    weights, others, learned = optimizer.param_groups
    assert learned["lr"] == pytest.approx(0.2 * weights["lr"])
    assert (weights["weight_decay"], learned["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in learned["params"]} == {id(p) for p in learned_parameters(ours.model)}
    assert others["lr"] == weights["lr"]


def test_steps_stay_positive_however_large_the_rate_is():
    ours = trainer("--method lsq --lsq-rate 100 --lr 0.1", **SMALL)
    list(ours.epochs())
    quantizers = [m for m in ours.model.modules() if isinstance(m, LearnedQuantizer)]
    assert all(q.step > 0 for q in quantizers)


def test_one_quantizer_a_run():
    with pytest.raises(ValueError, match="--method: got quant with lsq, of which a run has one"):
        run.parse(["--method", "lsq", "--weight-bits", "4"]).resolved(gpu=False, threads=1)
    with pytest.raises(ValueError, match="--method: got adabits with quant, which has one width"):
        run.parse(["--method", "adabits", "--weight-bits", "4"]).resolved(gpu=False, threads=1)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("--method lsq --lsq-bits 9", "--lsq-bits: got 9"),
        ("--method dsq --dsq-alpha 0.7", "--dsq-alpha: got 0.7"),
        ("--method adabits --adabits-bits 6", "--adabits-bits: got 6"),
        ("--method adabits --adabits-tested 2", "--adabits-tested: got 2"),
        ("--method lsq --lsq-rate 0", "--lsq-rate: got 0"),
        ("--method adabits --adabits-start 0", "--adabits-start: got 0"),
    ],
)
def test_bad_options(method, message):
    with pytest.raises(ValueError, match=message):
        run.parse(method.split())


def test_results_tell_every_width():
    ours = trainer("--method quantizable --quantizable-bits 3 --quantizable-most 4", **SMALL)
    list(ours.epochs())
    lines = ours.finish()
    result, widths = ours.result(), ours.result()["by_width"]
    assert [line.partition(":")[0] for line in lines] == ["width 32", "width 4", "width 3"]
    assert list(widths) == ["32", "4", "3"]
    assert widths["4"]["test_accuracy"] == result["test_accuracy"]
    assert {"train_accuracy_flipped", "test_loss"} <= widths["3"].keys()
    sizes = [of_one["size_in_bits"] for of_one in widths.values()]
    assert sizes[0] > 7 * sizes[1] > 7 * sizes[2]
    assert widths["4"]["parameters"] < result["parameters"]  # norms and ranges of one width
    assert (ours.passes.forward, ours.passes.backward) == (3 * 4, 3 * 4)


@pytest.mark.parametrize("model", [ResNet20, ResNet18Cifar])
def test_what_skip_connections_add_is_quantized(model):
    image = torch.randn(2, 3, 16, 16)
    network = model().train()
    plain = copy.deepcopy(network)
    expected = ClippedLevels(aqd_bits=3).network(plain)(image)
    network = ClippedLevels(aqd_bits=3, aqd_skips=True).network(network)
    levels = []
    for block in network.modules():
        if isinstance(block, Residual):
            block.skip.register_forward_hook(lambda skip, _, y: levels.append((skip, y)))
    y = network(image)
    assert not torch.equal(y, expected)
    assert len(levels) == 2 * sum(isinstance(m, Residual) for m in network.modules())
    for skip, y in levels:
        codes = 7 * y / skip.clip
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        assert set(codes.round().unique().tolist()) <= {-7, -5, -3, -1, 1, 3, 5, 7}
    y.sum().backward()
    assert all(skip.clip.grad is not None for skip, _ in levels)


def test_a_network_without_skip_connections_is_refused():
    with pytest.raises(ValueError, match="--aqd-skips: got Sequential, takes a network with"):
        ClippedLevels(aqd_bits=3, aqd_skips=True).network(
            torch.nn.Sequential(torch.nn.Linear(3, 2))
        )


def test_a_network_of_many_widths_rounds_as_it_is_told():
    for options, rounding, start in (
        ("quantizable", "original", 3),
        ("adabits", "modified", 8),
        ("adabits --adabits-rounding centered --adabits-start 4", "centered", 4),
    ):
        ours = trainer(f"--method {options}", **SMALL)
        layer = ours.model.stage1[0].conv1
        for weight, clipped in zip(
            layer.weight_quantizer.each.values(), layer.input_quantizer.each.values(), strict=True
        ):
            assert weight is None or weight.rounding == rounding
            assert clipped is None or clipped.start == start


@pytest.mark.parametrize("name", ["adabits", "quantizable"])
def test_runs_from_before_the_rounding_of_widths_keep_their_names(name):
    options = f"--method {name} --{name}-rounding modified --{name}-start 8"
    config = run.parse(options.split()).resolved(gpu=False, threads=1)
    assert config.label == {"adabits": "adabits5-3", "quantizable": "quantizable4-2"}[name]
    assert not {f"{name}_rounding", f"{name}_start"} & set(config.identity())
    other = run.parse([*options.split()[:-1], "3"]).resolved(gpu=False, threads=1)
    assert other.label == config.label + "-start3"
    assert other.identity() != config.identity()


def test_progressive_widths():
    ours = trainer("--method qil --qil-bits 3 --qil-progressive", **SMALL)
    widths = []
    for _ in ours.epochs():
        layers = [m for m in ours.model.modules() if isinstance(m, LearnedQuantizer)]
        widths.append({(q.bits if q.enabled else None) for q in layers})
    assert widths == [{None}, {5}, {4}, {3}]


@pytest.mark.parametrize("method", ["lsq", "adabits"])
def test_starts_from_a_float_network(method, tmp_path):
    """Whose weights it takes, and whose batch norms every width."""
    options = ["--train-size", "64", "--batch-size", "32", "--threads", "1", "--epochs", "1"]
    config = run.parse([*options, "--out", str(tmp_path)])
    done = run.prepare(config)
    run.execute(done, torch.device("cpu"))
    path = done.path / "model.safetensors"
    ours = trainer(f"--method {method}", **SMALL)
    Weights.read(path).load_into(ours)
    tensors = Weights.read(path).tensors
    assert torch.equal(ours.model.conv.weight.cpu(), tensors["conv.weight"])
    norm = ours.model.bn.each["4"] if method == "adabits" else ours.model.bn
    assert torch.equal(norm.running_mean, tensors["bn.running_mean"])
    assert numbers(ours)
