"""Command lines that cannot be understood."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest

from experiments import report, run
from experiments.arguments import require_understood
from experiments.deepcache import __main__ as deepcache
from tests.experiments.run_folders import write_classification

OPTIONS = {
    "lr": float | None,
    "epochs": int,
    "kind": Annotated[Literal["one", "two"], "told"] | None,
    "data_dir": Path | None,
    "only": tuple[str, ...],
    "widths": tuple[float, ...] | None,
    "augment": bool,
}


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--lr 1e-3 --epochs 3 --kind one --data-dir x",
        "--lr=-1 --epochs=-3 --kind=two --data_dir=--x",
        "--lr -1e3 --widths 1 -2 nan -inf --augment",
        "--no-augment --only a=1 b=2 --lr inf",
        "--data-dir -",
    ],
)
def test_what_can_be_understood_passes(arguments):
    require_understood(arguments.split(), OPTIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lr fast", "--lr: got fast, takes a number"),
        ("--lr=", "--lr: got '', takes a number"),
        ("--lr", "--lr: got no value, takes a number"),
        ("--lr --epochs 3", "--lr: got no value, takes a number"),
        ("--lr 1,5", "--lr: got 1,5, takes a number"),
        ("--epochs 1.5", "--epochs: got 1.5, takes a whole number"),
        ("--epochs 1e3", "--epochs: got 1e3, takes a whole number"),
        ("--epochs nan", "--epochs: got nan, takes a whole number"),
        ("--epochs None", "--epochs: got None, takes a whole number"),
        ("--kind three", "--kind: got three, takes one of one, two"),
        ("--kind None", "--kind: got None, takes one of one, two"),
        ("--data-dir=", "--data-dir: got '', takes a path"),
        ("--data_dir=", "--data-dir: got '', takes a path"),
        ("--widths --lr 1", "--widths: got no value, takes a number"),
        ("--one", "--one: there is no such option; did you mean --kind one?"),
        ("--widths 1 x", "--widths: got x, takes a number"),
        ("--augment=yes", "--augment: got yes, takes no value; --no-augment switches it off"),
        ("--augment yes", "got yes, which belongs to no option; takes options, each with its"),
        ("--epoch 3", "--epoch: there is no such option; did you mean --epochs?"),
        ("--zzzzzzz", "--zzzzzzz: there is no such option; --help lists them"),
        ("--no-lr", "--no-lr: there is no such option"),
        ("-lr 3", "-lr: there is no such option; did you mean --lr?"),
        ("--lr 1 2", "got 2, which belongs to no option"),
        ("x", "got x, which belongs to no option"),
        ("-- --lr 1", "--: there is no such option"),
        (f"--lr {'9x' * 200}", f"--lr: got '{'9x' * 40}', takes a number"),
    ],
)
def test_what_cannot_be_understood_names_option_value_and_what_is_taken(arguments, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        require_understood(arguments.split(), OPTIONS)


def test_one_word_can_be_positional():
    require_understood(["x", "--lr", "1"], OPTIONS, positional="FILE")
    with pytest.raises(ValueError, match=r"got y, which .* takes options beside FILE, each"):
        require_understood(["x", "--lr", "1", "y"], OPTIONS, positional="FILE")
    with pytest.raises(ValueError, match=r"^FILE: got none, takes a grid$"):
        require_understood(["--lr", "1"], OPTIONS, positional="FILE", required="a grid")
    with pytest.raises(ValueError, match=r"^FILE: got '', takes a path$"):
        require_understood([""], OPTIONS, positional="FILE", required="a grid")


def test_help_is_given_whatever_else_is_wrong():
    require_understood(["--lr", "fast", "--help"], OPTIONS, positional="FILE", required="a grid")


@pytest.fixture
def shown(monkeypatch, tmp_path, capsys):
    """What a command says to a line: its status and the error."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()

    def call(line):
        name, *arguments = line.replace("''", " '' ").split()
        words = ["" if word == "''" else word for word in arguments]
        monkeypatch.setattr(sys, "argv", [name, *words])
        status = {"run": run, "report": report, "deepcache": deepcache}[name].main()
        return status, capsys.readouterr().err

    return call


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run --nois 0.1", "--nois: there is no such option; did you mean --noise?"),
        ("run --method magic", "--method: got magic, takes one of baseline, hash_knn"),
        ("run --lr fast", "--lr: got fast, takes a number"),
        ("run --noise ''", "--noise: got '', takes a number"),
        ("run --out ''", "--out: got '', takes a path"),
        ("run --quant", "--quant: there is no such option; did you mean --method quant?"),
        ("run --dataset cifar10 --data-dir file", "--data-dir: file: not a readable archive: "),
        ("run --weights nowhere", "--weights: nowhere: no such file or directory"),
        ("run --weights folder", "--weights: folder: expected a regular file, got a directory"),
        ("run --backend cuda", "--backend: got cuda: "),
        ("run --out file --epochs 1 --train-size 16", "--out: file/digits-"),
        ("run --out file/x --name y --epochs 1 --train-size 16", "--out: file/x/y: not a dir"),
        ("run --validation 0.00001", "--validation: got 1e-05, which holds out 0 of 1438 images"),
        ("report", "got no command, takes one of figures, table1, pack (see --help)"),
        ("report figure", "got figure, takes one of figures, table1, pack (see --help)"),
        ("report figures nowhere", "RUNS: got nowhere, nothing there, takes the directory of runs"),
        ("report pack file", "RUNS: got file, a file, takes the directory of runs"),
        ("report figures ''", "RUNS: got '', takes a path"),
        ("report figures --out", "--out: got no value, takes a path"),
        ("report figures folder other", "got other, which belongs to no option; takes options bes"),
        ("report table1 folder --ot x", "--ot: there is no such option; did you mean --out?"),
        ("report pack folder --out x --out y", "--out: got it twice, takes it once"),
        ("deepcache", "FOLDER: got none, takes the folder of a finished run on faces"),
        ("deepcache nowhere", "FOLDER: got nowhere, takes the folder of a finished run on faces"),
        ("deepcache file", "FOLDER: got file, takes the folder of a finished run on faces"),
        ("deepcache folder --block 0", "--block: got 0, takes a whole number from 1 to 1,000,000"),
        ("deepcache folder --radius -1", "--radius: got -1, takes a whole number from 0"),
        ("deepcache folder --count 1e3", "--count: got 1e3, takes a whole number"),
        ("deepcache folder --thresholds nan", "--thresholds: got nan, takes numbers or inf, one"),
        ("deepcache folder --thresholds", "--thresholds: got no value, takes a number"),
        ("deepcache folder --count 1 --count 2", "--count: got it twice, takes it once"),
        ("deepcache --thresholds 20 folder", "--thresholds: got folder, takes a number"),
    ],
)
def test_commands_refuse_in_one_line(shown, line, message):
    status, errors = shown(line)
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
    assert status == 2
    assert not any(jargon in errors for jargon in ("Errno", "<class", "use_backend", "Path("))


def test_a_report_that_cannot_be_written_names_its_option(shown, tmp_path):
    write_classification(tmp_path / "runs")
    for line, told in (
        ("report figures --out file", "--out: file: file exists"),
        ("report figures --out file/x", "--out: file/x: not a directory"),
        (
            "report pack --out folder",
            "--out: got folder, which is no regular file",
        ),
        ("report pack --out file/x", "--out: file: file exists"),
    ):
        status, errors = shown(line)
        assert (status, errors.count("\n")) == (2, 1)
        assert errors.startswith(f"error: {told}")
    status, errors = shown("report figures folder")
    assert (status, errors.count("no finished run")) == (1, 1)
