import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments import data, run
from experiments.data import cifar10

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
    assert folder.name.startswith(f"digits-{label}-noise0.4-seed0-")
    assert {path.name for path in folder.iterdir()} == {
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
    assert result["best_test_accuracy"] == max(epoch["test_accuracy"] for epoch in metrics)
    assert 0 <= result["train_accuracy_flipped"] <= 1
    assert result["versions"]["torch"] == torch.__version__
    assert result["backend"] in ("cpu", "reference")

    with np.load(folder / "noisy_labels.npz") as labels:
        assert len(labels["indices"]) == round(0.4 * 256)
        changed = np.flatnonzero(labels["true"] != labels["given"])
        assert set(changed) <= set(labels["indices"])
    weights = load_file(folder / "model.safetensors")
    assert ("conv.running_absmax" in weights) == (method == "quant")

    lines = output.splitlines()
    assert lines[0].startswith("epoch 1/2")
    assert lines[-1].startswith(f"test accuracy {result['test_accuracy']:.2%} in ")
    assert lines[-1].endswith(str(Path("out") / folder.name))


def test_help_explains_every_option(tmp_path):
    process = start("--help", cwd=tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    for field in run.RunConfig.__dataclass_fields__:
        assert "--" + field.replace("_", "-") in output
    assert "re-drawn" in output


def test_interrupt_ends_with_one_line(tmp_path):
    process = start("--epochs", "1000", "--threads", "1", cwd=tmp_path)
    assert process.stdout.readline().startswith("epoch    1/1000")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "interrupted\n"
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
        (["--dataset", "cifar10", "--data-dir", "nowhere"], "no CIFAR-10 in nowhere: looked for"),
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
    assert errors.startswith("error: ")
    assert "file" in errors


def test_diverged_run_leaves_no_result(main, tmp_path):
    status, errors = main(*QUICK, "--lr", "1e30")
    assert status == 1
    assert errors.startswith("error: the loss is ")
    assert not list(tmp_path.glob("out/*/result.json"))


@pytest.mark.parametrize("arguments", [["--nois", "0.1"], ["--method", "magic"], ["--lr", "fast"]])
def test_wrong_command_line_is_refused(main, arguments):
    with pytest.raises(SystemExit) as exit_status:
        main(*arguments)
    assert exit_status.value.code == 2


def test_rerun_replaces_the_results_of_the_same_run(main, tmp_path):
    assert main(*QUICK)[0] == 0
    (result,) = tmp_path.glob("out/*/result.json")
    result.write_text("stale")
    assert main(*QUICK, "--backend", "reference")[0] == 0
    assert json.loads(result.read_text())["epochs"] == 2


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
    (folder,) = tmp_path.glob("out/cifar10-baseline-noise0.4-seed0-*")
    assert (folder / "result.json").exists()
