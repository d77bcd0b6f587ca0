"""Runs that quantize their network after the training."""

import pytest
import torch
from test_training import ends_bit_identical, trainer

from experiments import run
from experiments.methods import METHODS
from experiments.methods.post_training import PostTraining
from noisyq_fast import QuantLayer

NAMES = [name for name, method in METHODS.items() if issubclass(method, PostTraining)]
SMALL = {"epochs": 1, "train_size": 64, "batch_size": 32}
every_method = pytest.mark.parametrize("name", NAMES)


def finished(arguments, state=None, **options):
    done = trainer(arguments, **SMALL | options)
    if state is not None:
        done.load_weights(state, {})
    list(done.epochs())
    done.finish()
    return done


@pytest.fixture(scope="module")
def baseline():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in each test
    yield finished("")
    torch.set_num_threads(threads)


@every_method
def test_both_networks_are_scored(name, baseline):
    done = finished(f"--method {name}")
    expected, result = baseline.result(), done.result()
    assert done.history[0].scores == baseline.history[0].scores
    for score in ("test_accuracy", "test_loss", "train_accuracy_flipped"):
        assert result[f"float_{score}"] == expected[score]
    assert result["test_loss"] != expected["test_loss"]
    assert result["size_in_bits"] < expected["size_in_bits"] / 4
    assert result["macs"] >= expected["macs"]
    assert result["backward_passes"] == 1
    assert result["forward_passes"] > 1.0
    widths = [m.widths() for m in done.procedure.judged.modules() if isinstance(m, QuantLayer)]
    assert widths == ["W8/A8", *["W4/A4"] * 18, "W8/A8"]
    inputs = done.task.inputs("test", torch.arange(9))
    with torch.inference_mode():
        assert torch.equal(done.procedure.predict(inputs), done.procedure.judged(inputs))


def test_a_trained_float_network_can_be_shared(baseline):
    """What the run leaves is that network."""
    name = "dfq"
    whole = finished(f"--method {name} --{name}-bits 3")
    state = whole.model.state_dict()
    assert all(torch.equal(v, baseline.model.state_dict()[k]) for k, v in state.items())
    shared = finished(f"--method {name} --{name}-bits 3 --weights unread", state, epochs=0)
    assert shared.result()["test_loss"] == whole.result()["test_loss"]
    assert whole.methods[name].evaluation_options() == {}  # as of the baseline


def test_labels_are_not_looked_at():
    one, other = (trainer("--method ocs", **SMALL) for _ in range(2))
    for each in (one, other):
        list(each.epochs())
    other.task.given = torch.zeros_like(other.task.given)
    for each in (one, other):
        each.procedure.deploy()
    ours, theirs = (each.procedure.quantized.state_dict() for each in (one, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resumed_ends_bit_identical_with_the_best_epoch():
    ends_bit_identical("--method dfq --patience 2 --dropout 0.1", 2, **SMALL | {"epochs": 3})


def test_widths_grids_and_shares():
    for arguments, message in (
        ("--method bitsplit --bitsplit-bits 2", "--bitsplit-bits: got 2, takes a whole number"),
        ("--method dfq --dfq-bits 9", "--dfq-bits: got 9, takes a whole number from 2 to 8"),
        ("--method ocs --ocs-ratio 1.5", "--ocs-ratio: got 1.5, takes a share from 0 to 1"),
        ("--method ocs --weight-bits 4", "--method: got ocs with quant, which trains a quantized"),
        ("--method ocs --swa-start 0.5", "--method: got swa with ocs, of which a run has one"),
        ("--ocs-activation-ratio 0.1", "takes effect with --method ocs or --ocs-bits only"),
    ):
        with pytest.raises(ValueError, match=message):
            run.parse(arguments.split())
    labels = [
        run.parse(arguments.split()).label
        for arguments in (
            "--ocs-bits 3 --ocs-activation-ratio 0.05",
            "--method dfq --no-dfq-correction",
        )
    ]
    assert labels == ["ocs-w3a3-0.02-0.05", "dfq-w4a4-uncorrected"]


def test_plain_runs_have_no_score_of_a_float_network(baseline):
    assert not any(name.startswith("float_") for name in baseline.result())
