import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from experiments.config import RunConfig
from experiments.data.noise import symmetric
from experiments.models import ResNet20
from experiments.output import RunFolder, run_name


def test_name_is_readable_and_identifies_the_numbers():
    name = run_name(RunConfig(method="quant", noise=0.25, seed=7), "quant-w4a4", "data")
    assert name.startswith("digits-quant-w4a4-noise0.25-seed7-")
    assert len(name.rsplit("-", 1)[1]) == 8


def test_name_changes_with_whatever_changes_the_numbers():
    same = [
        RunConfig(),
        RunConfig(out=Path("elsewhere")),
        RunConfig(backend="reference"),
        RunConfig(weight_bits=8),  # which the baseline does not read
    ]
    different = [RunConfig(lr=0.01), RunConfig(noise_seed=1), RunConfig(augment=False)]
    assert len({run_name(config, "baseline", "data") for config in same}) == 1
    assert len({run_name(config, "baseline", "data") for config in [same[0], *different]}) == 4
    assert run_name(same[0], "baseline", "data") != run_name(same[0], "baseline", "other data")


def test_files_can_be_read_back(tmp_path):
    folder = RunFolder(tmp_path / "parent" / "run")
    labels = symmetric(torch.arange(10), 0.5, 10, seed=0)
    model = ResNet20().to(memory_format=torch.channels_last)
    folder.write_config({"out": Path("runs"), "noise": 0.5})
    folder.write_labels(labels)
    folder.write_metrics([{"epoch": 1}, {"epoch": 2}])
    folder.write_model(model)
    folder.write_result({"test_accuracy": 0.5, "train_accuracy_flipped": None})

    assert json.loads((folder.path / "config.json").read_text()) == {"out": "runs", "noise": 0.5}
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"epoch": 1}, {"epoch": 2}]
    with np.load(folder.path / "noisy_labels.npz") as arrays:
        assert arrays["indices"].tolist() == labels.redrawn.tolist()
        assert arrays["true"].tolist() == labels.true.tolist()
        assert arrays["given"].tolist() == labels.given.tolist()
    restored = load_file(folder.path / "model.safetensors")
    assert restored.keys() == model.state_dict().keys()
    assert all(torch.equal(restored[name], value) for name, value in model.state_dict().items())
    result = json.loads((folder.path / "result.json").read_text())
    assert result == {"test_accuracy": 0.5, "train_accuracy_flipped": None}
    assert len(list(folder.path.iterdir())) == 5


def test_new_run_removes_what_an_older_one_left(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_result({})
    folder.write_metrics([])
    (tmp_path / "notes.txt").touch()
    RunFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_failed_write_leaves_the_older_file_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_labels(symmetric(torch.arange(10), 0.5, 10, seed=0))
    before = (tmp_path / "noisy_labels.npz").read_bytes()
    broken = symmetric(torch.arange(10), 0.5, 10, seed=0)
    object.__setattr__(broken, "given", None)
    with pytest.raises(AttributeError):
        folder.write_labels(broken)
    assert (tmp_path / "noisy_labels.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
