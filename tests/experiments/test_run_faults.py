"""Whatever ends a run, at whatever point: the next start gives what an uninterrupted one gives."""

import dataclasses
import errno
import functools
import json
import os
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import data, run
from experiments.data import digits
from experiments.methods import METHODS
from experiments.tasks import classification
from experiments.tasks.classification import Classification
from experiments.training import checkpoints
from experiments.training.checkpoints import Checkpoints
from experiments.training.loop import NonFiniteLoss, Trainer

OPTIONS = "--epochs 3 --train-size 8 --batch-size 4 --threads 1 --method quant --validation 0.25"
OPTIONS += " --patience 2"
CALLS = (
    *((os, name) for name in ("replace", "unlink", "open", "fsync")),
    *((Path, name) for name in ("write_bytes", "write_text")),
)


def small_network(task):
    return torch.nn.Sequential(
        OrderedDict(
            conv=torch.nn.Conv2d(1, 4, 3),
            bn=torch.nn.BatchNorm2d(4),
            flatten=torch.nn.Flatten(),
            classifier=torch.nn.Linear(4 * 6 * 6, 10),
        )
    )


@pytest.fixture(scope="module", autouse=True)
def small_runs():
    """A run takes no time."""
    few = digits.load()
    few = dataclasses.replace(few, test_images=few.test_images[:8], test_labels=few.test_labels[:8])
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(data.DATASETS, "digits", lambda data_dir, download: few)
        patched.setattr(Classification, "network", small_network)
        classification._read.cache_clear()
        yield
    classification._read.cache_clear()


def prepared(out, options=OPTIONS):
    return run.prepare(dataclasses.replace(parsed(options), out=out))


@functools.cache
def parsed(options):
    return run.parse(options.split())


def executed(out, options=OPTIONS):
    asked = prepared(out, options)
    run.execute(asked, torch.device("cpu"))
    return outcome(asked.path)


def failed(kind, out, options=OPTIONS):
    """What the error says; it lets go of the folder, which it would keep locked."""
    try:
        executed(out, options)
    except kind as error:
        return str(error.with_traceback(None))
    raise AssertionError("the run ended as if nothing had happened")


def outcome(path):
    """All that a finished run leaves, but for the time it took."""
    metrics = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((path / "result.json").read_text())
    for times in (*metrics, result):
        del times["seconds"]
    assert {file.name for file in path.iterdir()} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "noisy_labels.npz",
        "result.json",
    }
    return metrics, result, (path / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a run that nothing interrupted, and what it left."""
    out = tmp_path_factory.mktemp("finished")
    return out, executed(out)


@pytest.fixture
def whole(finished):
    return finished[1]


class Killed(BaseException):
    """As of SIGKILL: nothing is done after it."""


class Fault:
    """Lets `calls` calls to the file system pass, and none after; a write that fails has written
    the first half."""

    def __init__(self, patched, calls, error):
        self.left = calls
        self.error = error
        for owner, name in CALLS:
            patched.setattr(owner, name, self.wrapped(getattr(owner, name)))

    def wrapped(self, call):
        def wrapper(*args, **kwargs):
            self.left -= 1
            if self.left >= 0:
                return call(*args, **kwargs)
            if call.__name__.startswith("write") and self.left == -1:
                call(args[0], args[1][: len(args[1]) // 2])
            raise self.error

        return wrapper


def test_a_fault_at_any_call_loses_nothing(whole, tmp_path, monkeypatch):
    """Killed at every other call, without space at the others."""
    counting = 10**6
    with monkeypatch.context() as patched:
        fault = Fault(patched, counting, Killed())
        executed(tmp_path / "counted")
        calls = counting - fault.left
    assert calls > 80
    for call in range(calls):
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        out, error = tmp_path / str(call), full if call % 2 else Killed()
        with monkeypatch.context() as patched:
            Fault(patched, call, error)
            failed(type(error), out)
        assert executed(out) == whole, call


def stopped_after(epochs, out, monkeypatch, options=OPTIONS):
    """A run that was killed once the checkpoint of some epochs was there."""
    asked = prepared(out, options)
    save, done = Checkpoints.save, []

    def killed(self, state):
        save(self, state)
        done.append(state)
        if len(done) == epochs:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", killed)
        failed(Killed, out, options)
    return asked


# With options by which the four epochs have all phases, and what is kept between epochs is used.
PROCEDURES = {
    "mixup": "--prune 0.5",
    "co_teaching": "--loss elr --forget-rate 0.4 --dropout 0.2",
    "sam": "--loss gce --gce-threshold 0.1",
    "swa": "--swa-start 0.3 --patience 2",
    "snapshot": "--snapshots 3 --snapshots-used 2",
    "train_longer": "--ghost-batch 4 --loss elr",
    "mutual_learning": "--prune 0.5 --prune-steps 2",
    "noisy_student": "--loss elr --dropout 0.2",
    "qkd": "--loss gce --gce-threshold 0.1 --dropout 0.2",
    "hash_knn": "--hash-bits 8",
    "slimmable": "--slim-widths 1 0.5",
    "us_slimmable": "--us-widths 3 --us-evaluated 1 0.5",
}
# These quantize by themselves, afterwards or at several widths.
QUANTIZED = {
    "adabits": "",
    "quantizable": "",
    "easyquant": "",
    "ocs": "",
    "bitsplit": "",
    "dfq": "",
}


def test_all_procedures_are_killed():
    procedures = {n for n, m in METHODS.items() if m.REPLACES == "procedure"}
    assert PROCEDURES.keys() | QUANTIZED.keys() == procedures


class KilledAt:
    """Counts the batches and evaluations of a run, and ends it in front of some of them."""

    def __init__(self, patched, points=()):
        self.count = 0
        for name in ("_step", "_logits"):
            patched.setattr(Trainer, name, self.wrapped(getattr(Trainer, name), points))

    def wrapped(self, call, points):
        @functools.wraps(call)
        def wrapper(*args, **kwargs):
            self.count += 1
            if self.count in points:
                raise Killed
            return call(*args, **kwargs)

        return wrapper


@pytest.mark.parametrize(
    ("method", "bits"),
    [
        *((method, bits) for method in PROCEDURES for bits in ("", "--weight-bits 4")),
        *((method, "") for method in QUANTIZED),
    ],
)
def test_a_procedure_killed_at_random_points_ends_bit_identical(
    method, bits, tmp_path, monkeypatch
):
    options = f"--method {method} {(PROCEDURES | QUANTIZED)[method]} {bits}"
    options += " --epochs 4 --train-size 16 --batch-size 8 --threads 1"
    with monkeypatch.context() as patched:
        counted = KilledAt(patched)
        whole = executed(tmp_path / "whole", options)
    chance, half = random.Random(options), counted.count // 2
    # In the second half, what was kept in the first one counts.
    points = chance.randint(1, half), chance.randint(half + 1, counted.count)
    with monkeypatch.context() as patched:
        KilledAt(patched, points)
        for _ in points:
            failed(Killed, tmp_path / "killed", options)
    assert executed(tmp_path / "killed", options) == whole, points


def test_metrics_are_those_of_the_checkpoint(whole, tmp_path, monkeypatch):
    """The last epoch's were not written, or are torn, or of another run."""
    for number, metrics in enumerate((None, '{"epoch": 1, "lo', '{"epoch": 1}\n' * 9)):
        out = tmp_path / str(number)
        asked = stopped_after(3, out, monkeypatch)
        if metrics is not None:
            (asked.path / "metrics.jsonl").write_text(metrics)
        assert executed(out) == whole


def test_tensorboard_shows_every_epoch_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = f"{OPTIONS} --tensorboard"
    asked = stopped_after(2, tmp_path, monkeypatch, options)
    run.execute(asked, torch.device("cpu"))
    events = EventAccumulator(str(asked.path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("test_loss")] == [1, 2, 3]


def test_a_run_without_epochs_has_metrics_too(finished, tmp_path):
    (weights,) = finished[0].glob("*/model.safetensors")
    options = OPTIONS.replace("--epochs 3", f"--epochs 0 --weights {weights}")
    assert executed(tmp_path / "evaluated", options)[0] == []
    asked = prepared(tmp_path / "evaluated", options)
    assert "finished already" in run.execute(asked, torch.device("cpu"))


def test_checkpoints_beside_a_result_are_removed(finished):
    out, whole = finished
    asked = prepared(out)
    (asked.path / "checkpoint.pt").touch()
    assert "finished already" in run.execute(asked, torch.device("cpu"))
    assert outcome(asked.path) == whole


@pytest.mark.parametrize("other", ["--seed 1", "--noise 0.3", "--lr 0.002", "--epochs 4"])
def test_the_checkpoint_of_another_run_is_refused(tmp_path, monkeypatch, other):
    theirs = stopped_after(2, tmp_path, monkeypatch, f"{OPTIONS} {other}")
    ours = prepared(tmp_path)
    ours.path.mkdir()
    checkpoint = ours.path / "checkpoint.pt"
    checkpoint.write_bytes((theirs.path / "checkpoint.pt").read_bytes())
    told = (
        f"{checkpoint}: is of the run {theirs.path.name}, this one is {ours.path.name}; --restart"
    )
    assert failed(ValueError, tmp_path).startswith(told)
    assert checkpoint.exists()


def without(key):
    return lambda state: state.pop(key)


def deeper(*keys, value):
    def edit(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return edit


NAN = torch.tensor(float("nan"))
PARTS = ("networks", "optimizers", "losses", "procedure", "methods", "history", "passes", "stopped")


@pytest.mark.parametrize(
    "edit",
    [
        *map(without, PARTS),
        deeper("passes", value=[1.0]),
        deeper("passes", value=[NAN, 1.0]),
        deeper("more", value=1),
        *(deeper(key, value=[1]) for key in PARTS),
        deeper("networks", 0, "conv.weight", value=torch.ones(2, 2)),
        deeper("networks", 0, "conv.weight", value="text"),
        deeper("networks", 0, "other.weight", value=torch.ones(2)),
        deeper("networks", 0, "classifier.bias", value=NAN.expand(10)),
        deeper("networks", 0, "bn.running_var", value=torch.full((4,), torch.inf)),
        deeper("networks", 0, "conv.input_quantizer.running_absmax", value=torch.tensor(torch.inf)),
        deeper("optimizers", 0, 0, value={}),
        deeper("optimizers", 0, 999, value={}),
        deeper("optimizers", 0, 0, "exp_avg", value=torch.ones(3)),
        deeper("optimizers", 0, 0, "exp_avg", value=1.0),
        deeper("optimizers", 0, 0, "step", value="text"),
        deeper("optimizers", 0, 0, "step", value=NAN),
        deeper("methods", 0, value={"quant": {}}),
        deeper("methods", 0, "early_stopping", value={}),
        deeper("methods", 0, "early_stopping", "score", value="high"),
        deeper("methods", 0, "early_stopping", "score", value=float("nan")),
        deeper("methods", 0, "early_stopping", "score", value=2.0),
        deeper("methods", 0, "early_stopping", "epoch", value=10**9),
        deeper("methods", 0, "early_stopping", "epoch", value=True),
        deeper("methods", 0, "early_stopping", "weights", "conv.weight", value=torch.ones(2)),
        deeper("methods", 0, "early_stopping", "weights", "classifier.bias", value=NAN.expand(10)),
        deeper("history", 0, "epoch", value=2),
        deeper("history", 0, "loss", value="low"),
        deeper("history", 0, "loss", value=float("nan")),
        deeper("history", 0, "seconds", value=None),
        deeper("history", 0, "seconds", value=-1.0),
        deeper("history", 0, "loss", value=True),
        deeper("history", 0, "loss", value=10**400),
        deeper("history", 0, "epoch", value=1.0),
        deeper("history", 0, "scores", "test_accuracy", value=57.0),
        deeper("history", 0, "scores", value={}),
        deeper("history", 0, "scores", "test_loss", value=torch.inf),
        deeper("history", 0, "validation_score", value=None),
        deeper("history", 0, "more", value=1),
        lambda state: state["history"].extend([state["history"][0]] * 3),
        deeper("stopped", value="no"),
    ],
)
def test_a_checkpoint_with_other_content_is_refused(stopped, tmp_path, edit):
    asked = prepared(stopped)
    checkpoints = Checkpoints(asked.path, asked.identity.name)
    before = checkpoints.last.read_bytes()
    state = checkpoints.load()
    edit(state)
    checkpoints.save(state)
    told = failed(ValueError, stopped)
    assert told.startswith(f"{checkpoints.last}: does not fit this run (")
    assert told.endswith("--restart starts anew without it")
    assert "\n" not in told
    checkpoints.last.write_bytes(before)


@pytest.mark.parametrize("lay_out", [lambda x: x[..., :1].expand_as(x), lambda x: x.mT.clone().mT])
def test_moments_lie_in_memory_as_their_parameter(stopped, lay_out):
    """The optimizer reads and writes them as one block, beyond the end of what takes less."""
    asked = prepared(stopped)
    state = Checkpoints(asked.path, asked.identity.name).load()
    for moments in state["optimizers"][0].values():
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = lay_out(moments[key]) if moments[key].dim() > 1 else moments[key]
    device = torch.device("cpu")
    trainer = Trainer(asked.config, run.tasks.make(asked.config, asked.data, device), device)
    trainer.load_state_dict(state)
    for parameter, moments in trainer.procedure.optimizers[0].state.items():
        assert moments["exp_avg"].stride() == parameter.stride()
        assert moments["exp_avg_sq"].stride() == parameter.stride()
        assert not moments["exp_avg"].requires_grad


def test_a_checkpoint_of_the_older_format_goes_on_to_the_same_bits(finished, tmp_path, monkeypatch):
    _, whole = finished
    asked = stopped_after(2, tmp_path, monkeypatch)
    state = Checkpoints(asked.path, asked.identity.name).load()
    older = {
        "model": state["networks"][0],
        "optimizer": state["optimizers"][0],
        "methods": state["methods"][0],
        "history": state["history"],
        "stopped": state["stopped"],
    }
    monkeypatch.setattr(checkpoints, "_FORMAT", 3)
    Checkpoints(asked.path, asked.identity.name).save(older)
    monkeypatch.undo()
    run.execute(prepared(tmp_path), torch.device("cpu"))
    assert outcome(asked.path) == whole


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as monkeypatch:
        stopped_after(1, out, monkeypatch)
    return out


# Numbers that are not finite.


def poison(monkeypatch, step, where):
    """Makes the training end a step with such numbers; its loss, from before, is finite."""
    original, steps = Trainer._step, []

    def poisoned(trainer, *args, **kwargs):
        result = original(trainer, *args, **kwargs)
        steps.append(result)
        if len(steps) == step:
            where(trainer).fill_(float("nan"))
        return result

    monkeypatch.setattr(Trainer, "_step", poisoned)


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (lambda trainer: trainer.model.conv.weight.data, "conv.weight"),
        (lambda trainer: trainer.model.bn.running_var, "bn.running_var"),
        (
            lambda trainer: trainer.procedure.optimizers[0].state[trainer.model.conv.weight][
                "exp_avg_sq"
            ],
            "the optimizer's exp_avg_sq of conv.weight",
        ),
    ],
)
@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_network_that_is_not_finite_is_never_saved(
    whole, tmp_path, monkeypatch, epoch, where, name
):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        poison(patched, 2 * epoch, where)
        told = failed(NonFiniteLoss, out)
    saved = f"epoch {epoch - 1}" if epoch > 1 else "none yet"
    assert told.startswith(f"{name} has numbers that are not finite in epoch {epoch}, ")
    assert told.endswith(f"; last checkpoint: {saved}")
    assert not list(out.glob("*/result.json"))
    assert executed(out) == whole


def test_a_score_that_is_not_finite_is_never_saved(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    scores = Classification.epoch_scores
    with monkeypatch.context() as patched:
        patched.setattr(
            Classification,
            "epoch_scores",
            lambda *args: scores(*args) | {"test_loss": float("inf")},
        )
        assert failed(NonFiniteLoss, out).startswith("test_loss is inf in epoch 1, ")
    assert executed(out) == whole


def test_a_result_that_is_not_finite_is_not_written(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = Classification.result
    with monkeypatch.context() as patched:
        patched.setattr(
            Classification,
            "result",
            lambda *args: result(*args) | {"of_au": {"1": float("nan")}},
        )
        assert failed(NonFiniteLoss, out) == "of_au 1 is nan at the end of the training"
    assert executed(out) == whole


@pytest.mark.filterwarnings("ignore:--weights")
@pytest.mark.parametrize("epochs", [0, 3])
def test_weights_that_are_not_finite_are_refused(finished, tmp_path, epochs):
    (path,) = finished[0].glob("*/model.safetensors")
    weights = load_file(path)
    weights["classifier.bias"][3] = float("nan")
    save_file(weights, tmp_path / "weights")
    options = OPTIONS.replace("--epochs 3", f"--epochs {epochs} --weights {tmp_path / 'weights'}")
    with pytest.raises(NonFiniteLoss, match=r"^classifier\.bias has .* in --weights .*/weights"):
        executed(tmp_path / "out", options)


def test_a_layer_that_saw_nothing_is_saved(tmp_path, monkeypatch):
    """It has no range until it is used in training."""

    class Partly(torch.nn.Module):
        def __init__(self, task):
            super().__init__()
            self.used = small_network(task)
            self.unused = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    monkeypatch.setattr(Classification, "network", lambda task: Partly(task))
    options = OPTIONS.replace("--epochs 3", "--epochs 1")
    executed(tmp_path, options)
    (path,) = tmp_path.glob("*/model.safetensors")
    assert load_file(path)["unused.input_quantizer.observed"] == 0
