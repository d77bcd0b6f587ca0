import math

import pytest

from experiments.config import RunConfig


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method", "magic", "--method: got magic, takes one of baseline, quant"),
        ("dataset", "mnist", "--dataset: got mnist, takes one of digits, cifar10"),
        ("noise_kind", "pink", "--noise-kind: got pink, takes one of symmetric"),
        ("backend", "tpu", "--backend: got tpu, takes one of auto, cpu"),
        ("noise", 1.5, "--noise: got 1.5, takes a share from 0 to 1"),
        ("noise", math.nan, "--noise: got nan"),
        ("weight_bits", 1, "--weight-bits: got 1, takes a whole number from 2 to 8"),
        ("activation_bits", 9, "--activation-bits: got 9"),
        ("train_size", 0, "--train-size: got 0, takes a whole number from 1"),
        ("epochs", 0, "--epochs: got 0"),
        ("batch_size", -1, "--batch-size: got -1"),
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


def test_defaults_are_filled_in_only_where_nothing_was_said():
    assert RunConfig().resolved(epochs=7, threads=3) == RunConfig(epochs=7, threads=3)
    given = RunConfig(epochs=5, threads=1)
    assert given.resolved(epochs=7, threads=3) == given


def test_identity_holds_what_the_method_reads():
    baseline, quant = RunConfig().identity(), RunConfig(method="quant").identity()
    assert set(quant) - set(baseline) == {"weight_bits", "activation_bits"}
    assert {"seed", "noise", "noise_seed", "threads", "lr", "epochs"} < set(baseline)
    assert not {"out", "backend", "data_dir", "download"} & set(quant)
