import math
from pathlib import Path

import pytest

from experiments import run
from experiments.config import RunConfig


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method", "magic", "--method: got magic, takes one of baseline, quant"),
        ("dataset", "mnist", "--dataset: got mnist, takes one of digits, cifar10"),
        ("noise_kind", "pink", "--noise-kind: got pink, takes one of symmetric"),
        ("schedule", "zigzag", "--schedule: got zigzag, takes one of steps, cosine, constant"),
        ("device", "tpu", "--device: got tpu, takes one of auto, cpu, cuda"),
        ("precision", "int8", "--precision: got int8, takes one of fp32, bf16"),
        ("backend", "tpu", "--backend: got tpu, takes one of auto, cpu"),
        ("noise", 1.5, "--noise: got 1.5, takes a share from 0 to 1"),
        ("noise", math.nan, "--noise: got nan"),
        ("validation", 1.0, "--validation: got 1.0, takes a share from 0 to less than 1"),
        ("train_size", 0, "--train-size: got 0, takes a whole number from 1"),
        ("epochs", -1, "--epochs: got -1, takes a whole number from 0"),
        ("epochs", 0, "--epochs: got 0 without --weights"),
        ("batch_size", -1, "--batch-size: got -1"),
        ("evaluate_every", 0, "--evaluate-every: got 0"),
        ("threads", 0, "--threads: got 0"),
        ("seed", -1, "--seed: got -1"),
        ("noise_seed", 2**63, "--noise-seed: got"),
        ("lr", 0.0, "--lr: got 0.0, takes a finite number above 0"),
        ("lr", math.inf, "--lr: got inf"),
    ],
)
def test_error_names_the_option_what_it_got_and_what_it_takes(option, value, message):
    with pytest.raises(ValueError, match="^" + message):
        RunConfig(**{option: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--noise-kind worst", "--noise-kind: got worst, which is for --dataset cifar10"),
        (
            "--dataset cifar10 --noise-kind worst --noise 0.2",
            "--noise: got 0.2 with human labels",
        ),
        ("--method early_stopping --validation 0", "--validation: got 0"),
        ("--patience 3 --validation 0", "--validation: got 0"),
        ("--cuda-graph --device cpu", "--cuda-graph: got --device cpu"),
        ("--dropout-where stages", "--dropout-where: takes effect with --method dropout"),
        ("--method quant --prune-steps 2", "--prune-steps: takes effect with --method prune"),
        ("--weight-bits 1", "--weight-bits: got 1, takes a whole number from 2 to 8"),
        ("--activation-bits 9", "--activation-bits: got 9"),
        ("--averaging-constant 0", "--averaging-constant: got 0"),
        ("--weight-decay -1", "--weight-decay: got -1"),
        ("--label-smoothing 2", "--label-smoothing: got 2"),
        ("--patience 0", "--patience: got 0, takes a whole number from 1"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match="^" + message):
        run.parse(arguments.split())


def test_defaults_are_filled_in_only_where_nothing_was_said():
    resolved = RunConfig().resolved(epochs=7, threads=3)
    assert (resolved.epochs, resolved.threads, resolved.noise, resolved.validation) == (
        7,
        3,
        0.4,
        0,
    )
    given = RunConfig(epochs=5, threads=1, noise=0.0, validation=0.25)
    assert given.resolved(epochs=7, threads=3) == given
    assert resolved.resolved(epochs=1, threads=1) == resolved


def test_human_labels_bring_their_noise():
    assert (
        RunConfig(dataset="cifar10", noise_kind="worst").resolved(epochs=1, threads=1).noise is None
    )


def test_early_stopping_holds_samples_out():
    assert RunConfig(method="early_stopping").resolved(epochs=1, threads=1).validation == 0.1


def test_a_given_option_turns_its_method_on_beside_another():
    config = run.parse(["--method", "quant", "--weight-decay", "0.5"])
    assert list(config.methods) == ["quant", "weight_decay"]
    assert config.label == "quant-w4a4+weight-decay0.5"
    assert run.parse([]).label == "baseline"


def test_identity_holds_what_changes_the_numbers():
    baseline, quant = RunConfig().identity(), RunConfig(method="quant").identity()
    assert set(quant) - set(baseline) == {"weight_bits", "activation_bits", "averaging_constant"}
    assert {"seed", "noise", "noise_seed", "threads", "lr", "epochs"} < set(baseline)
    assert not {"out", "backend", "data_dir", "download", "evaluate_every"} & set(quant)


def test_one_combination_has_one_identity():
    by_method = run.parse(["--method", "quant", "--dropout", "0.1", "--out", "here"])
    by_options = run.parse(["--method", "dropout", "--weight-bits", "4", "--out", "there"])
    assert by_method.identity() == by_options.identity()
    assert by_method.out == Path("here")
