import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from experiments import run
from experiments.config import RunConfig
from experiments.models import ResNet20
from experiments.storage.run_folder import RunFolder
from experiments.storage.run_names import run_name
from experiments.training.history import EpochMetrics


def ten_labels():
    true = np.arange(10)
    return {"true": true, "given": true.clip(max=6), "indices": np.array([2, 7, 8, 9])}


def files(folder):
    return {path.name for path in folder.iterdir() if path.name != ".lock"}


def test_name_is_readable_and_identifies_the_numbers():
    name = run_name(RunConfig(method="quant", noise=0.25, seed=7), {"data": "a"})
    assert name.startswith("digits-quant-w4a4-noise0.25-seed7-")
    assert len(name.rsplit("-", 1)[1]) == 8


def test_human_labels_are_named():
    faces = run.parse(["--dataset", "synthetic-au", "--fold", "2"]).resolved(gpu=False, threads=1)
    assert run_name(faces, {}).startswith("synthetic-au-baseline-noise1-fold2-seed0-")
    assert run_name(RunConfig(dataset="cifar10", noise_kind="worst"), {}).startswith(
        "cifar10-baseline-worst-seed0-"
    )


def test_name_changes_with_whatever_changes_the_numbers():
    def name(config, data="data"):
        return run_name(config, {"data": data})

    same = [RunConfig(), RunConfig(out=Path("elsewhere")), RunConfig(backend="reference")]
    different = [RunConfig(lr=0.01), RunConfig(noise_seed=1), RunConfig(augment=False)]
    assert len({name(config) for config in same}) == 1
    assert len({name(config) for config in [same[0], *different]}) == 4
    assert name(same[0]) != name(same[0], "other data")


def test_files_can_be_read_back(tmp_path):
    folder = RunFolder(tmp_path / "parent" / "run")
    labels = ten_labels()
    model = ResNet20().to(memory_format=torch.channels_last)
    folder.write_config({"out": Path("runs"), "noise": 0.5})
    folder.write_labels(labels)
    epochs = [EpochMetrics(n, 2.0, {"test_accuracy": None}, None, 0.1, 9.0) for n in (1, 2)]
    folder.write_metrics(epochs)
    folder.write_model(model, {"methods": "{}"})
    folder.write_result({"test_accuracy": 0.5, "train_accuracy_flipped": None})

    assert json.loads((folder.path / "config.json").read_text()) == {"out": "runs", "noise": 0.5}
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [epoch.flat() for epoch in epochs]
    with np.load(folder.path / "noisy_labels.npz") as arrays:
        assert arrays["indices"].tolist() == labels["indices"].tolist()
        assert arrays["true"].tolist() == labels["true"].tolist()
        assert arrays["given"].tolist() == labels["given"].tolist()
    restored = load_file(folder.path / "model.safetensors")
    assert restored.keys() == model.state_dict().keys()
    assert all(torch.equal(restored[name], value) for name, value in model.state_dict().items())
    result = json.loads((folder.path / "result.json").read_text())
    assert result == {"test_accuracy": 0.5, "train_accuracy_flipped": None}
    assert files(folder.path) == {
        "config.json",
        "metrics.jsonl",
        "model.safetensors",
        "noisy_labels.npz",
        "result.json",
    }


def test_clear_removes_what_an_older_run_left(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_result({})
    folder.write_metrics([])
    (tmp_path / "notes.txt").touch()
    folder.clear()
    assert files(tmp_path) == {"notes.txt"}


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(OSError, match="another process is at work on this run"):
        RunFolder(tmp_path)
    del folder
    RunFolder(tmp_path)


def test_the_lock_is_no_way_to_other_files(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".lock").symlink_to("precious")
    with pytest.raises(OSError, match=r"\.lock: expected .*, got a symbolic link"):
        RunFolder(tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"


def test_what_killed_processes_left_half_written_is_removed(tmp_path):
    for name in (".config.json.7", ".checkpoint.pt.99999", ".model.safetensors.12", ".notes.5"):
        (tmp_path / name).touch()
    folder = RunFolder(tmp_path)
    assert files(tmp_path) == {".notes.5"}
    (tmp_path / ".config.json.7").touch()
    with pytest.raises(OSError, match="another process"):
        RunFolder(tmp_path)
    assert (tmp_path / ".config.json.7").exists()  # whose turn it is may be writing it
    del folder


def test_numbers_that_are_not_finite_are_not_written(tmp_path):
    folder = RunFolder(tmp_path)
    nan = float("nan")
    for write, content in (
        (folder.write_config, {"lr": nan}),
        (folder.write_result, {"test_loss": [nan]}),
        (folder.write_metrics, [EpochMetrics(1, nan, {}, None, 0.1, 9.0)]),
    ):
        with pytest.raises(ValueError, match="not JSON compliant"):
            write(content)
    assert not files(tmp_path)


def test_equal_models_are_equal_files(tmp_path):
    model = ResNet20()
    metadata = dict.fromkeys("hgfedcba", "{}")
    written = set()
    for number in range(3):
        folder = RunFolder(tmp_path / str(number))
        folder.write_model(model, metadata)
        written.add((folder.path / "model.safetensors").read_bytes())
    assert len(written) == 1
    with safe_open(folder.path / "model.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("conv.weight"), model.conv.weight)


def test_failed_write_leaves_the_older_file_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_labels(ten_labels())
    before = (tmp_path / "noisy_labels.npz").read_bytes()

    class Broken:
        def __array__(self, *_, **__):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write_labels(ten_labels() | {"given": Broken()})
    assert (tmp_path / "noisy_labels.npz").read_bytes() == before
    assert files(tmp_path) == {"noisy_labels.npz"}
