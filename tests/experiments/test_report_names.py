"""Names of methods, options and folders mean nothing in a report, and there can be any number."""

import csv
import os
import re
import subprocess
import sys

import polars as pl
import pytest
from run_folders import edit, write_action_units, write_classification

from experiments import methods, report
from experiments.reporting import escaping
from experiments.reporting.drawing import color
from experiments.reporting.runs import method_of

HOSTILE = [
    "=HYPERLINK(1)",
    "+1",
    "-1",
    "@SUM(A1)",
    "a|b|c",
    "<script>alert(1)</script>",
    "<!-- ",
    "&lt;",
    "`code`",
    "[x](javascript:1)",
    "![x](http://elsewhere/x.png)",
    "https://elsewhere www.elsewhere",
    "# heading",
    "**bold** _slanted_ ~gone~",
    "$\\frac{$ $\\nothing$",
    "\\",
    '"quoted", "twice"',
    "e\u0301\U0001f600",
]


def rename(folder, label):
    """Makes a run of a method that this version does not have."""
    edit(folder / "config.json", method="old")
    edit(folder / "result.json", method="old", label=label)


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize(
    ("command", "write", "summary"),
    [
        (report.COMMANDS["figures"], write_classification, "summary.csv"),
        (report.COMMANDS["table1"], write_action_units, "table1.csv"),
    ],
)
def test_names_are_shown_as_they_are(command, write, summary, tmp_path, capsys):
    for seed in (0, 1):
        write(tmp_path / "runs", seed=seed)
        for number, name in enumerate(HOSTILE):
            rename(write(tmp_path / "runs" / str(number), seed=seed), name)
    command(tmp_path / "runs", tmp_path / "out")
    assert not capsys.readouterr().err

    with (tmp_path / "out" / summary).open(newline="") as file:
        labels = {row["label"] for row in csv.DictReader(file)}
    assert labels == {"baseline", *(f"'{n}" if n[0] in "=+-@" else n for n in HOSTILE)}

    text = (tmp_path / "out" / "report.md").read_text()
    text = re.sub(r"!\[[\w-]+\]\([\w-]+\.png\)", "", text)  # the report's own figures
    assert not re.search(r"<script|<!--|\]\(|`|\*\*bold|://|www\.|^# |\\|\$", text, re.MULTILINE)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_names_in_headings_and_lists_are_shown_as_they_are(tmp_path, capsys):
    write_classification(tmp_path)
    write_classification(tmp_path, schedule="<b>|[x](y)")
    bad = write_classification(tmp_path, seed=1).rename(tmp_path / "bad\n# <i>\x1b[2J")
    (bad / "result.json").write_text("{")
    unfinished = write_classification(tmp_path, seed=2).rename(tmp_path / "slow\r\n| <i> |")
    (unfinished / "result.json").unlink()
    report.COMMANDS["figures"](tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## digits, schedule &#60;b&#62;&#124;&#91;x&#93;(y)\n" in text
    assert "/bad&#92;n&#35; &#60;i&#62;&#92;x1b&#91;2J/result.json: malformed" in text
    assert "- slow&#92;r&#92;n&#124; &#60;i&#62; &#124;\n" in text
    (line,) = capsys.readouterr().err.splitlines()
    assert r"/bad\n# <i>\x1b[2J/result.json: malformed" in line


def test_folder_whose_name_is_not_utf8_is_reported(tmp_path):
    folder = write_classification(tmp_path)
    os.rename(bytes(folder), bytes(tmp_path) + b"/=a\xff,\nb")
    report.COMMANDS["figures"](tmp_path, tmp_path / "out")
    runs = pl.read_csv(tmp_path / "out" / "runs.csv")
    assert runs["folder"].to_list() == [r"'=a\udcff,\nb"]


def test_numbers_stay_numbers(tmp_path):
    folder = write_classification(tmp_path)
    edit(folder / "result.json", accuracy_gap=-0.25, loss_gap=-3.0)
    report.COMMANDS["figures"](tmp_path, tmp_path / "out")
    runs = pl.read_csv(tmp_path / "out" / "runs.csv")
    assert runs.row(0, named=True)["accuracy_gap"] == -0.25
    assert runs.row(0, named=True)["loss_gap"] == -3.0


@pytest.mark.parametrize(
    "text", ["quant-w4a4, norm shared", "dataset digits, train_size 3000", "é ± 1.5 (n 3)"]
)
def test_plain_names_stay_as_they_are(text):
    assert escaping.markdown(text) == escaping.csv(text) == escaping.one_line(text) == text


def test_terminal_that_lacks_a_character_is_no_error(tmp_path):
    write_classification(tmp_path)
    ended = subprocess.run(
        [sys.executable, report.__file__, "figures", tmp_path, "--out", tmp_path / "drôle"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert "dr\\xf4le" in ended.stdout
    assert "Mean ± standard" in (tmp_path / "drôle" / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("baseline", "baseline"),
        ("quant-w2a8", "quant"),
        ("quant-w4a4+weight-decay0.01, norm shared", "quant"),
        ("label-smoothing0.3", "label_smoothing"),
        ("quantile0.5", None),
        ("mixup0.2", "mixup"),
        ("cutmix0.2", None),
        ("", None),
    ],
)
def test_method_of_a_label(label, name):
    assert method_of(label) == name
    assert (color(label) == "black") == (name is None)


def test_longer_names_win_and_labels_may_differ_from_names(monkeypatch):
    class Late(methods.prune.Prune):
        label = "prune-late0.75"

    class Mixup(methods.dropout.Dropout):
        label = "mixed"

    monkeypatch.setitem(methods.METHODS, "prune_late", Late)
    monkeypatch.setitem(methods.METHODS, "mixup", Mixup)
    assert method_of("prune-late0.5") == "prune_late"
    assert method_of("prune0.5") == "prune"
    assert method_of("mixed") == "mixup"
