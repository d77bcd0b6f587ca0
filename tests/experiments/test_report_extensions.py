"""What CONTRIBUTING.md says about a new method and a new data set, from training to the report."""

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
DATASET = """
import dataclasses

from experiments.data import digits


def load(data_dir=None, download=False):
    return dataclasses.replace(digits.load(), name="few-digits").with_train_size(64)
"""
RUNS = """
import sys
from experiments import report, run
for method in ("baseline", "halving"):
    options = f"--dataset few-digits --method {method} --epochs 1 --threads 1 --out runs"
    sys.argv[1:] = options.split()
    assert run.main() == 0
report.COMMANDS["figures"](report.Path("runs"), report.Path("out"))
"""


def insert(path, before, line):
    text = path.read_text()
    assert text.count(before) == 1
    path.write_text(text.replace(before, line + before))


def test_new_method_and_new_data_set_are_trained_and_reported(tmp_path):
    shutil.copytree(ROOT, tmp_path / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
    method, data = (tmp_path / "experiments" / name for name in ("methods", "data"))
    (method / "halving.py").write_text(METHOD)
    insert(
        method / "__init__.py",
        "from experiments.methods.label_smoothing",
        "from experiments.methods.halving import Halving\n",
    )
    insert(method / "__init__.py", '    "quant": Quant,\n', '    "halving": Halving,\n')
    (data / "few_digits.py").write_text(DATASET)
    insert(
        data / "__init__.py",
        "from experiments.data.dataset",
        "from experiments.data import few_digits\n",
    )
    insert(
        data / "__init__.py", '    "cifar10": cifar10.load', '    "few-digits": few_digits.load,\n'
    )

    ended = subprocess.run(
        [sys.executable, "-c", RUNS],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT.parent)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "left out" not in ended.stderr
    summary = pl.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["label"].to_list() == ["baseline", "half1x2"]
    assert "## few-digits\n" in (tmp_path / "out" / "report.md").read_text()
    assert (tmp_path / "out" / "gain-against-memorisation.png").exists()
