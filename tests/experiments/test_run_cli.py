import inspect
import json
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments import data, run
from experiments.config import GROUPS
from experiments.data import cifar10
from experiments.methods import METHODS
from experiments.storage.run_folder import RunFolder
from experiments.tasks import TASKS

SCRIPT = Path(run.__file__)
QUICK = ["--epochs", "2", "--train-size", "256", "--threads", "1", "--out", "out"]


def start(*arguments, cwd):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(("method", "label"), [("baseline", "baseline"), ("quant", "quant-w4a4")])
def test_run_writes_a_whole_folder(tmp_path, method, label):
    process = start("--method", method, *QUICK, cwd=tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors == ""

    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name.startswith(f"digits-{label}-noise0.4-images256-epochs2-seed0-")
    assert {path.name for path in folder.iterdir() if path.name != ".lock"} == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "noisy_labels.npz",
        "result.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert (config["method"], config["epochs"], config["threads"]) == (method, 2, 1)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in metrics] == [1, 2]

    result = json.loads((folder / "result.json").read_text())
    assert result["test_accuracy"] == metrics[-1]["test_accuracy"]
    assert result["wrong_labels"] == pytest.approx(0.36, abs=0.06)
    assert result["test_accuracy_at_best_validation"] is None
    assert 0 <= result["train_accuracy_flipped"] <= 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["backend"] in ("cpu", "reference")

    with np.load(folder / "noisy_labels.npz") as labels:
        assert len(labels["indices"]) == round(0.4 * 256)
        changed = np.flatnonzero(labels["true"] != labels["given"])
        assert set(changed) <= set(labels["indices"])
    weights = load_file(folder / "model.safetensors")
    assert ("conv.input_quantizer.running_absmax" in weights) == (method == "quant")

    lines = output.splitlines()
    assert any(line.startswith("epoch 1/2") for line in lines)
    assert lines[-1].startswith(f"test accuracy {result['test_accuracy']:.2%} after ")
    assert lines[-1].endswith(str(Path("out") / folder.name))


def test_help_explains_every_option(tmp_path):
    process = start("--help", cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    options = {field.name for field in fields(run.RunConfig)} - {"options", "of_tasks"}
    for owner in (*(task.OPTIONS for task in TASKS.values()), *METHODS.values()):
        options |= {field.name for field in fields(owner)}
    for option in options:
        assert "--" + option.replace("_", "-") in output
    assert "re-drawn" in output
    assert "default: None" not in output
    for group in (
        "data",
        "noise",
        "training",
        "machine",
        "quant",
        "weight-decay",
        "classification",
    ):
        assert f"─ {group} options ─" in output
    assert max(map(len, output.splitlines())) <= 80  # where there is no terminal


def test_help_says_what_an_option_that_is_not_given_stands_for():
    owners = [*GROUPS, *(task.OPTIONS for task in TASKS.values()), *METHODS.values()]
    for owner in owners:
        text = " ".join(inspect.getsource(owner).split())
        for field in fields(owner):
            if field.default is None and field.name not in getattr(owner, "DEFAULTS", {}):
                after = text.split(f" {field.name}: ", 1)[1].split('"""')[1]
                assert re.search("if (it is )?not given", after, re.IGNORECASE), field.name


def first_epoch(process):
    """The line of the first epoch, when it is over."""
    return next(line for line in process.stdout if line.startswith("epoch"))


def test_a_run_says_what_it_trains_on_what(tmp_path):
    arguments = "--train-size", "64", "--epochs", "1", "--method", "quant", "--noise", "0.2"
    output, _ = start(*arguments, cwd=tmp_path).communicate(timeout=60)
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    assert (
        f"64 images to train on ({result['wrong_labels']:.1%} of their labels are wrong)" in output
    )
    assert "quant (weight_bits 4, activation_bits 4" in output
    assert "ResNet20, 269,434 parameters" in output
    assert f"folder:   runs/{run.name}\n" in output
    assert max(len(line) for line in output.splitlines() if run.name not in line) <= 100
    assert f"evaluating the finished network on all {64 + 359} images\n" in output


def test_interrupt_ends_with_one_line(tmp_path):
    process = start("--epochs", "1000", "--threads", "1", cwd=tmp_path)
    assert first_epoch(process).startswith("epoch    1/1000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted; the same command goes on from the last checkpoint\n"
    assert not list(tmp_path.glob("runs/*/result.json"))


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """Runs the command line in this process; gives its status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        status = run.main()
        return status, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise", "1.5"], "--noise: got 1.5, takes a share from 0 to 1"),
        (["--train-size", "9999"], "--train-size: got 9999, takes 1 to 1438 for digits"),
        (
            ["--dataset", "cifar10", "--data-dir", "nowhere"],
            "--data-dir: no CIFAR-10 in nowhere: looked",
        ),
        (
            ["--method", "quant", "--method", "dropout"],
            "--method: got it twice, takes it once; methods are combined by their options, as in",
        ),
        (["--method=quant", "--method=quant"], "--method: got it twice"),
        (["--weight-bits", "4", "--weight_bits=8"], "--weight-bits: got it twice, takes it once"),
        (["--augment", "--no-augment"], "--augment: got it twice"),
        (["--restart", "--seed", "1", "--restart"], "--restart: got it twice"),
        (["--threads", "100000000"], "--threads: got 100000000, takes a whole number from 1 to"),
        (
            ["--dataset", "synthetic-au", "--frames-per-subject", "32" + "0" * 400],
            "--frames-per-subject: got 320",
        ),
    ],
)
def test_what_a_user_can_mend_is_told_in_one_line(main, arguments, message):
    status, errors = main(*arguments)
    assert status == 2
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_out_that_cannot_be_written_is_told_before_training(main, tmp_path):
    (tmp_path / "file").touch()
    status, errors = main("--out", "file")
    assert status == 2
    assert errors.startswith("error: --out: file/digits-")
    assert errors.endswith(": not a directory\n")


def test_diverged_run_leaves_no_result(main, tmp_path):
    status, errors = main(*QUICK, "--lr", "1e30")
    assert status == 1
    assert errors.startswith("error: the loss is ")
    assert not list(tmp_path.glob("out/*/result.json"))


def test_finished_run_is_told_and_restarted_only_on_request(main, tmp_path, capsys):
    assert main(*QUICK)[0] == 0
    (result,) = tmp_path.glob("out/*/result.json")
    marked = json.loads(result.read_text()) | {"test_accuracy": 0.125}
    result.write_text(json.dumps(marked))
    assert main(*QUICK, "--backend", "reference")[0] == 0
    assert json.loads(result.read_text()) == marked
    assert main(*QUICK, "--restart")[0] == 0
    assert json.loads(result.read_text())["test_accuracy"] != 0.125


def test_a_run_at_which_another_process_is_at_work_has_a_status_of_its_own(main, tmp_path):
    folder = RunFolder(run.prepare(run.parse(QUICK)).path)
    status, errors = main(*QUICK)
    assert status == run.BUSY
    assert errors == f"error: {folder.path}: another process is at work on this run\n"


def without_seconds(path):
    return [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_run_that_is_resumed_ends_bit_identical(tmp_path, seed):
    arguments = ["--epochs", "6", "--train-size", "512", "--threads", "1", "--method", "quant"]
    arguments += ["--validation", "0.1", "--dropout", "0.1"]
    process = start(*arguments, "--out", "killed", cwd=tmp_path)
    first_epoch(process)
    time.sleep(random.Random(seed).random())
    process.kill()
    process.communicate()
    _, errors = start(*arguments, "--out", "killed", cwd=tmp_path).communicate(timeout=120)
    assert errors == ""
    start(*arguments, "--out", "whole", cwd=tmp_path).communicate(timeout=120)
    killed, whole = (next((tmp_path / out).iterdir()) for out in ("killed", "whole"))
    metrics = without_seconds(whole / "metrics.jsonl")
    assert len(metrics) == 6
    assert without_seconds(killed / "metrics.jsonl") == metrics
    weights = load_file(whole / "model.safetensors")
    for name, value in load_file(killed / "model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_saved_model_is_evaluated_without_training(main, tmp_path):
    method = ["--method", "quant", "--prune", "0.5"]
    assert main(*QUICK, *method)[0] == 0
    (trained,) = tmp_path.glob("out/*")
    weights = trained / "model.safetensors"
    evaluate = ["--train-size", "256", "--threads", "1", "--epochs", "0", "--weights", weights]
    assert main(*evaluate, *method, "--out", "evaluated") == (0, "")
    (evaluated,) = tmp_path.glob("evaluated/*")
    before, after = (json.loads((f / "result.json").read_text()) for f in (trained, evaluated))
    for measured in ("test_accuracy", "test_loss", "train_accuracy_flipped", "macs"):
        assert after[measured] == before[measured]
    assert before["notes"] == [f"168 filters removed, {before['parameters']:,} parameters left"]

    status, errors = main(*evaluate, "--out", "other")
    assert status == 2
    assert errors.startswith(f"error: --weights: {weights} does not fit this run's network")
    (tmp_path / "broken").write_bytes(weights.read_bytes()[:-100])
    status, errors = main(*evaluate[:-1], tmp_path / "broken")
    assert status == 2
    assert "is not a model.safetensors" in errors


def test_tensorboard_logs_every_epoch_once(main, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(*QUICK, "--tensorboard") == (0, "")
    (folder,) = tmp_path.glob("out/*")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    logged = events.Scalars("test_accuracy")
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert [event.step for event in logged] == [1, 2]
    assert [event.value for event in logged] == pytest.approx([m["test_accuracy"] for m in metrics])


def test_processes_together_match_one(tmp_path):
    """The same global batches. Sums are taken in another order, and where a gradient is nearly 0
    Adam makes a full step of its sign, so that weights may differ by a learning rate."""
    arguments = [SCRIPT, "--epochs", "1", "--train-size", "300", "--batch-size", "64"]
    arguments += ["--threads", "1", "--validation", "0.1"]
    losses = {}
    for processes in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), *arguments, "--out", str(processes)]
        subprocess.run(command, cwd=tmp_path, check=True, timeout=120, capture_output=True)
        (folder,) = (tmp_path / str(processes)).iterdir()
        result = json.loads((folder / "result.json").read_text())
        assert result["processes"] == processes
        (metrics,) = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        losses[processes] = [metrics[key] for key in ("loss", "validation_loss", "test_loss")]
    assert losses[2] == pytest.approx(losses[1], rel=1e-2)


def test_runs_in_several_processes_have_another_name(monkeypatch):
    config = run.parse(["--train-size", "32"])
    paths = []
    for processes in ("1", "2", "3"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        paths.append(run.prepare(config).path)
    monkeypatch.delenv("WORLD_SIZE")
    assert run.prepare(config).path == paths[0]
    assert len(set(paths)) == 3


@pytest.mark.parametrize(
    ("rank", "processes", "told"),
    [("0", "2", ("found\n", 1)), ("1", "2", ("", 0)), ("1", "1", ("found\n", 1))],
)
def test_only_the_first_process_tells_of_the_data(
    monkeypatch, capsys, recwarn, rank, processes, told
):
    def parse():
        print("found")
        warnings.warn("odd", stacklevel=1)
        raise ValueError("the end")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(run, "parse", parse)
    assert run.main() == 2
    assert (capsys.readouterr().out, len(recwarn)) == told


@pytest.mark.filterwarnings("ignore:.*not the official release")
def test_cifar10_runs_through_the_same_loop(main, tmp_path, cifar10_folder, monkeypatch):
    def load(data_dir, download):
        dataset = cifar10.load(data_dir, download)
        return replace(
            dataset, test_images=dataset.test_images[:50], test_labels=dataset.test_labels[:50]
        )

    monkeypatch.setitem(data.DATASETS, "cifar10", load)
    status, errors = main(*QUICK, "--dataset", "cifar10", "--data-dir", cifar10_folder)
    assert status == 0, errors
    (folder,) = tmp_path.glob("out/cifar10-baseline-noise0.4-images256-epochs2-seed0-*")
    assert (folder / "result.json").exists()
