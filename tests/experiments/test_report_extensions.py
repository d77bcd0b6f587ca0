"""What CONTRIBUTING.md says about a new method, loss, procedure, network and data set, from
training to the report."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import polars as pl

import experiments

ROOT = Path(experiments.__file__).parent
METHOD = '''
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.losses import Loss
from experiments.methods.method import Method


@dataclass(frozen=True)
class Halving(Method):
    """Halves the loss."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"halvings": (1, 2)}

    halvings: tuple[int, ...] | None = None
    """halving: how often (1, 2)."""

    @property
    def label(self):
        return "half" + "x".join(map(str, self.halvings))

    def loss(self, loss, model, task):
        return Half(loss)


class Half(Loss):
    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def samples(self, logits, labels, indices):
        return self.loss.samples(logits, labels, indices) / 2
'''
LOSS = '''
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional as F

from experiments.losses import Loss
from experiments.methods.method import Method


@dataclass(frozen=True)
class Squares(Method):
    """The squared error of the probabilities, with a memory of each sample."""

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"squares": 1.0}
    REPLACES: ClassVar[str] = "loss"

    squares: float | None = None
    """squares: its factor (1)."""

    @property
    def label(self):
        return f"squares{self.squares:g}"

    def loss(self, loss, model, task):
        return SquaresLoss(self.squares, task.count("trained"))


class SquaresLoss(Loss):
    def __init__(self, factor, count):
        super().__init__()
        self.factor = factor
        self.register_buffer("seen", torch.zeros(count))

    def samples(self, logits, labels, indices):
        self.seen[indices] += 1
        errors = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
        return self.factor * errors.square().sum(1)
'''
PROCEDURE = '''
from dataclasses import dataclass
from typing import ClassVar

from experiments.methods.method import Method
from experiments.training.procedure import Passes, Procedure


@dataclass(frozen=True)
class Twins(Method):
    """Trains two networks on the same batches."""

    REPLACES: ClassVar[str] = "procedure"
    label = "twins"

    def procedure(self, parts):
        return TwinsProcedure(parts)


class TwinsProcedure(Procedure):
    NETWORKS = 2
    PASSES = Passes(2, 2)

    def step(self, batch):
        logits = self.forwards[1](batch.inputs)
        loss = self.losses[1](logits, batch.labels, batch.indices)
        self.follow(loss * batch.share, 1)
        return super().step(batch)
'''
NETWORK = """
from torch import nn


class TinyNetwork(nn.Sequential):
    def __init__(self, in_channels, num_classes):
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, num_classes),
        )
"""
DATASET = """
import dataclasses

from experiments.data import digits


def load(data_dir=None, download=False):
    return dataclasses.replace(digits.load(), name="few-digits").with_train_size(64)
"""
GRID = """
variants = [
    { method = "baseline" },
    { method = "halving" },
    { method = "twins", loss = "squares", weight-bits = 4 },
]
[base]
dataset = "few-digits"
model = "tiny"
epochs = 1
threads = 1
"""
LABELS = ["baseline", "half1x2", "quant-w4a4+squares1+twins"]


def insert(path, before, line):
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, line + before))


def add(folder, module, content, name, imports, entries, key=None):
    """A file in a package, and what it defines named in front of `imports` and `entries`."""
    (folder / f"{module}.py").write_text(content)
    line = f"from experiments.{folder.name}.{module} import {name}\n"
    insert(folder / "__init__.py", imports, line)
    insert(folder / "__init__.py", entries, f'    "{key or module}": {name},\n')


def test_new_things_are_trained_swept_and_reported(tmp_path):
    shutil.copytree(ROOT, tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    methods, models, data = (tmp_path / "experiments" / n for n in ("methods", "models", "data"))
    for module, content, name in (
        ("halving", METHOD, "Halving"),
        ("squares", LOSS, "Squares"),
        ("twins", PROCEDURE, "Twins"),
    ):
        imports = "from experiments.methods.label_smoothing"
        add(methods, module, content, name, imports, '    "sam": SAM,\n')
    imports = "from experiments.models.resnet20"
    add(models, "tiny", NETWORK, "TinyNetwork", imports, '    "resnet20": ResNet20,\n')
    imports = "from experiments.data.dataset"
    entry = '    "cifar10": cifar10.load'
    add(data, "few_digits", DATASET, "load", imports, entry, "few-digits")
    (tmp_path / "grid.toml").write_text(GRID)

    def call(script, *options):
        ended = subprocess.run(
            [sys.executable, f"experiments/{script}.py", *options],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended

    options = "--dataset few-digits --model tiny --epochs 1 --threads 1"
    call("run", *options.split(), "--method", "twins", "--loss", "squares", "--weight-bits", "4")
    assert "finished before      1" in call("sweep", "grid.toml").stdout
    assert "left out" not in call("report", "figures", "runs", "--out", "out").stderr
    summary = pl.read_csv(tmp_path / "out" / "summary.csv")
    assert sorted(summary["label"]) == sorted(LABELS)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## few-digits\n" in text
    assert "model tiny" in text
    assert "| quant-w4a4+squares1+twins | 2 + 2 |" in text
    assert "- figure2: all runs have the same noise" in text
    for path in tmp_path.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        passes = 2 if "twins" in result["method"] else 1
        assert (result["forward_passes"], result["backward_passes"]) == (passes, passes)
