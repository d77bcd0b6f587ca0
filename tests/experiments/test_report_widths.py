"""Reports on networks that compute at several widths, with known answers."""

import json

import polars as pl
import pytest
from run_folders import edit
from run_folders import write_classification as write_run

from experiments import report
from experiments.reporting import widths
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.runs import find, studies

COSTS = {"parameters": 1000, "size_in_bits": 8000, "macs": 2_000_000}


def at_width(accuracy, flipped=0.25, **costs):
    found = {"test_accuracy": accuracy, "train_accuracy_flipped": flipped}
    return found | {"train_accuracy_clean": 0.75, "wrong_labels": 0.36} | costs


def write_widths(directory, label, accuracies, noise=0.4, **options):
    folder = write_run(directory, label, noise=noise, **options)
    by_width = {name: at_width(accuracy, **COSTS) for name, accuracy in accuracies.items()}
    edit(folder / "result.json", by_width=by_width)
    return folder


@pytest.fixture
def tree(tmp_path):
    for seed, more in ((0, 0.0), (1, 0.02)):
        write_run(tmp_path, "baseline", 0.5, seed=seed)
        slim = {"1": 0.52 + more, "0.5": 0.60 + more}
        write_widths(tmp_path, "slimmable", slim, seed=seed)
    write_widths(tmp_path, "us-slimmable", {"1": 0.4, "0.25": 0.3}, seed=0)
    write_widths(
        tmp_path, "quantizable4-2-original-start3", {"32": 0.61, "4": 0.62, "2": 0.63}, seed=0
    )
    return tmp_path


def test_every_width_is_a_column_and_every_method_a_row(tree):
    report.write(report.REPORTS[0], tree, tree / "out")
    text = (tree / "out" / "report.md").read_text()
    channels, bits = text.split("### At each number of bits")
    channels = channels.split("### At each share of the channels")[1]
    assert "| test accuracy, % | noise | width 0.25 | width 0.5 | width 1 |" in channels
    assert "| slimmable | 0.4 | - | 61.00 ± 1.41 (n 2) | 53.00 ± 1.41 (n 2) |" in channels
    assert "| us-slimmable | 0.4 | 30.00 | - | 40.00 |" in channels
    # Differences of 2 and 4 points: a standard deviation of 1.414, and t(0.975, 1) = 12.706.
    assert "| slimmable | 0.4 | - | +11.0 ± 12.7 (n 2) | +3.0 ± 12.7 (n 2) |" in channels
    assert "| slimmable | kB | - | 1.0 | 1.0 |" in channels
    assert "| wrong training labels fitted, % | noise | 2 bits | 4 bits | float |" in bits
    assert "| quantizable4-2-original-start3 | 0.4 | 63.00 | 62.00 | 61.00 |" in bits
    assert "| quantizable4-2-original-start3 | 0.4 | 25.00 | 25.00 | 25.00 |" in bits
    assert "slimmable" not in bits
    table = pl.read_csv(tree / "out" / "widths.csv")
    assert len(table) == 2 + 2 + 3
    row = table.filter(label="slimmable", width=0.5).row(0, named=True)
    assert (row["seeds"], row["pairs"], row["study"]) == (2, 2, "digits")
    assert row["gain"] == pytest.approx(0.11)


def test_without_a_network_of_several_widths_there_is_no_table(tmp_path):
    write_run(tmp_path)
    report.write(report.REPORTS[0], tmp_path, tmp_path / "out")
    assert "###" not in (tmp_path / "out" / "report.md").read_text()
    assert not (tmp_path / "out" / "widths.csv").exists()


def test_without_a_baseline_there_is_no_gain(tmp_path):
    write_widths(tmp_path, "slimmable", {"1": 0.5})
    (study,) = studies(find(tmp_path).finished)
    assert widths.summary(study)["gain"].to_list() == [None]
    assert "| slimmable | 0.4 | - |" in "\n".join(widths.sections(study))


def test_results_of_earlier_versions_are_read(tmp_path):
    """In which bits had another name and no costs, and channels no size; and no passes."""
    bits = write_run(tmp_path, "adabits5-3")
    result = json.loads((bits / "result.json").read_text())
    gone = dict.fromkeys(("additions", "lookups", "forward_passes", "backward_passes"), ...)
    edit(bits / "result.json", **gone, modes={"5": at_width(0.5), "4": at_width(0.4)})
    slim = write_run(tmp_path, "slimmable")
    edit(slim / "result.json", by_width={"0.5": at_width(0.3, parameters=7, macs=8)})
    read = FinishedRun.read(bits)
    assert list(read.by_width) == [5, 4]
    assert read.by_width[4]["test_accuracy"] == 0.4
    assert read.by_width[4]["macs"] is None
    assert read.measured["forward_passes"] == result["epochs_trained"]
    assert (read.measured["additions"], read.measured["lookups"]) == (None, None)
    (of_half,) = FinishedRun.read(slim).by_width.values()
    assert (of_half["parameters"], of_half["size_in_bits"], of_half["macs"]) == (7, None, 8)


@pytest.mark.parametrize(
    ("by_width", "message"),
    [
        ({"1.5": at_width(0.5)}, r"by_width: got the width '1\.5', takes a share of the channels"),
        ({"nan": at_width(0.5)}, "by_width: got the width 'nan'"),
        ({"wide": at_width(0.5)}, "by_width: got the width 'wide'"),
        ({"0.5": at_width(2)}, "by_width, 0.5: got 2 as test_accuracy, takes a number from 0 to 1"),
        ({"0.5": {}}, "by_width, 0.5: lacks test_accuracy"),
        ({"0.5": 3}, "by_width: got 3 as 0.5, takes an object"),
        ([], r"got \[\] as by_width, takes an object"),
    ],
)
def test_damaged_widths_are_named(tmp_path, by_width, message):
    folder = write_run(tmp_path, "slimmable")
    edit(folder / "result.json", by_width=by_width)
    with pytest.raises(ValueError, match=message):
        FinishedRun.read(folder)


def test_additions_and_lookups_are_columns_where_any_network_has_them(tmp_path):
    write_run(tmp_path)
    lcnn, adder = write_run(tmp_path, "lcnn0.5"), write_run(tmp_path, "adder")
    report.write(report.REPORTS[0], tmp_path, tmp_path / "out")
    assert "lookups" not in (tmp_path / "out" / "report.md").read_text()
    edit(lcnn / "result.json", lookups=1234)
    edit(adder / "result.json", macs=2_000_000, additions=1_900_000)
    report.write(report.REPORTS[0], tmp_path, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    header = "| cost | parameters | kB | million MACs | of them additions | lookups |"
    assert f"{header} epochs trained |" in text
    assert "| adder | 1 | 0.0 | 2.00 | 1.90 | - | 3 |" in text
    assert "| lcnn0.5 | 1 | 0.0 | 0.00 | 0.00 | 1,234 | 3 |" in text
