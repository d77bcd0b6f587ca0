"""Reports on hand-made runs on action units, with known answers."""

import json
import math
import re
import sys
from pathlib import Path

import polars as pl
import pytest
from matplotlib.collections import LineCollection, PathCollection
from run_folders import edit
from run_folders import write_action_units as write_run

from experiments import report, sweep
from experiments.config import RunConfig
from experiments.data.faces import AUS
from experiments.reporting.action_units import comparison, figure, tables
from experiments.reporting.action_units.published import PAPER, Published
from experiments.reporting.action_units.runs import SCORES, ActionUnitRun, ActionUnitStudy
from experiments.reporting.drawing import color
from experiments.reporting.runs import defaults, find, studies, titles
from experiments.storage.identity import RunIdentity
from experiments.sweeping.engines import Task


def write_seed(directory, label, of_folds, seed=0, **options):
    for fold, f1 in enumerate(of_folds, 1):
        write_run(directory, label, f1, seed, fold, **options)


def found(directory):
    return studies(find(directory, ActionUnitRun).finished, ActionUnitStudy)


def summed_up(directory):
    (study,) = found(directory)
    return study, comparison.summary(study)


def text_of(directory):
    (study,) = found(directory)
    return tables.study_section(*titles([study]), study, comparison.summary(study))


def row(summary, label):
    return summary.row(by_predicate=pl.col("label") == label, named=True)


@pytest.fixture
def three_seeds(tmp_path):
    """The baseline has 0.5, 0.6 and 0.4; quantization gains 3, 4 and 5 points."""
    write_seed(tmp_path, "baseline", (0.4, 0.5, 0.6), seed=0)
    write_seed(tmp_path, "baseline", (0.5, 0.6, 0.7), seed=1)
    write_seed(tmp_path, "baseline", (0.3, 0.4, 0.5), seed=2)
    write_seed(tmp_path, "quant-w4a4", (0.5, 0.5, 0.59), seed=0)
    write_seed(tmp_path, "quant-w4a4", (0.54, 0.64, 0.74), seed=1)
    write_seed(tmp_path, "quant-w4a4", (0.35, 0.45, 0.55), seed=2)
    return tmp_path


def test_means_are_over_folds_and_then_over_seeds(three_seeds):
    _, summary = summed_up(three_seeds)
    baseline = row(summary, "baseline")
    assert baseline["seeds"] == 3
    assert baseline["test_f1_mean"] == pytest.approx(0.5)
    assert baseline["test_f1_std"] == pytest.approx(0.1)
    assert baseline["test_f1_au1_mean"] == pytest.approx(0.4)
    assert baseline["test_f1_au2_mean"] == pytest.approx(0.6)
    # Two AUs 0.1 off their mean: sqrt((0.1^2 + 0.1^2) / 1).
    assert baseline["test_f1_over_aus"] == pytest.approx(math.sqrt(0.02))
    assert baseline["test_f1_truth_chosen_mean"] == pytest.approx(0.65)
    assert baseline["epoch_chosen_mean"] == 6


def test_gains_are_paired_by_seed_and_wins_by_fold(three_seeds):
    quant = row(summed_up(three_seeds)[1], "quant-w4a4")
    assert quant["pairs"] == 3
    for gain in ("test_f1_gain", "test_f1_truth_chosen_gain", "test_f1_au2_gain"):
        assert quant[gain] == pytest.approx(0.04)
        # Differences 3, 4, 5 points: a standard deviation of 1, and t(0.975, 2) = 4.3027.
        half_width = 4.3027 * 0.01 / math.sqrt(3)
        assert quant[f"{gain}_half_width"] == pytest.approx(half_width, rel=1e-4)
    # Of seed 0 only the first fold is above the baseline's.
    assert (quant["test_f1_won"], quant["fold_pairs"]) == (7, 9)


def test_summaries_of_the_same_runs_are_equal_to_the_last_bit(tmp_path):
    for seed in range(7):
        write_seed(tmp_path, "baseline", (0.3 + seed / 70, 0.4, 0.5), seed)
        write_seed(tmp_path, "quant-w4a4", (0.3 + seed / 30, 0.4, 0.5), seed)
    study, first = summed_up(tmp_path)
    assert all(comparison.summary(study).equals(first) for _ in range(20))


def test_tables_of_three_seeds(three_seeds):
    text = text_of(three_seeds)
    assert "## synthetic-au\n\n18 runs, seeds 0, 1, 2: dataset synthetic-au, " in text
    assert "Means over the folds 1, 2, 3, " in text
    annotators, at_chosen, truth, truth_at_chosen = text.split("| F1 against the ")[
        1:
    ]  # each up to the next one
    assert annotators.startswith(
        "annotators, at probability 0.5, % | AU 1 | AU 2 | average | ± over AUs |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| baseline | 40.0 | 60.0 | 50.00 ± 10.00 (n 3) | 14.1 |\n"
        "| quant-w4a4 | 44.0 | 64.0 | 54.00 ± 9.54 (n 3) | 14.1 |\n"
    )
    assert at_chosen.startswith("annotators, at chosen thresholds, %")
    assert "| baseline | 50.0 | 70.0 | 60.00 ± 10.00 (n 3) | 14.1 |" in at_chosen
    assert truth.startswith("truth, at probability 0.5, %")
    assert "| baseline | 45.0 | 65.0 | 55.00 ± 10.00 (n 3) | 14.1 |" in truth
    assert truth_at_chosen.startswith("truth, at chosen thresholds, %")
    assert "| baseline | 55.0 | 75.0 | 65.00 ± 10.00 (n 3) | 14.1 |" in truth_at_chosen
    gains = "| +4.00 ± 2.48 (n 3) | 7 of 9 " * 4
    assert f"| quant-w4a4 {gains}|\n" in text
    memorised = "25.00 ± 0.00 (n 3) | 95.00 ± 0.00 (n 3) | 10.00 ± 0.00 (n 3)"
    assert f"| baseline | {memorised} |" in text
    assert (
        "| baseline | 1 | 2.0 | 0.00 | 20.0 | 6.0 | 20.0 | 20.0 |" in text
    )  # parameters to epoch chosen
    assert "Missing" not in text
    assert "ublished" not in text  # these are not the AUs of BP4D


def test_one_seed_has_no_interval(tmp_path):
    write_seed(tmp_path, "baseline", (0.4, 0.5, 0.6))
    write_seed(tmp_path, "quant-w4a4", (0.5, 0.5, 0.59))
    quant = row(summed_up(tmp_path)[1], "quant-w4a4")
    assert (quant["pairs"], quant["test_f1_gain_half_width"], quant["test_f1_std"]) == (
        1,
        None,
        None,
    )
    text = text_of(tmp_path)
    assert "| quant-w4a4 | 43.0 | 63.0 | 53.00 | 14.1 |" in text
    assert "| quant-w4a4 | +3.00 | 1 of 3 | +3.00 | 1 of 3 |" in text


def test_seeds_that_lack_a_fold_do_not_count_and_are_named(three_seeds):
    write_run(three_seeds, "baseline", 0.7, seed=3, fold=1)
    write_seed(three_seeds, "quant-w4a4", (0.7, 0.7), seed=3)
    write_run(three_seeds, "dropout0.1", 0.7, seed=1, fold=2)
    study, summary = summed_up(three_seeds)
    assert summary["label"].to_list() == ["baseline", "quant-w4a4"]
    assert row(summary, "baseline")["test_f1_mean"] == pytest.approx(0.5)
    assert row(summary, "quant-w4a4")["fold_pairs"] == 9
    assert study.missing() == [
        "baseline, seed 3: fold 2, 3",
        "quant-w4a4, seed 3: fold 3",
        "dropout0.1, seed 0: fold 1, 2, 3",
        "dropout0.1, seed 1: fold 1, 3",
        "dropout0.1, seed 2: fold 1, 2, 3",
        "dropout0.1, seed 3: fold 1, 2, 3",
    ]
    text = text_of(three_seeds)
    assert "| dropout0.1 | - | - | - | - |" in text
    assert "to have every noise, seed and fold:\n\n- baseline, seed 3: fold 2, 3\n" in text


def test_a_study_without_any_whole_seed_still_tells_what_is_missing(tmp_path):
    write_run(tmp_path, "baseline", fold=1)
    write_run(tmp_path, "quant-w4a4", fold=2)
    report.COMMANDS["table1"](tmp_path)
    out = tmp_path / "report-table1"
    assert "- baseline, seed 0: fold 2\n- quant-w4a4, seed 0: fold 1" in (
        (out / "report.md").read_text()
    )
    assert not list(out.glob("*.png"))


def test_without_a_baseline_there_is_no_gain(tmp_path):
    write_run(tmp_path, "quant-w4a4")
    assert "| quant-w4a4 | - | - | - | - | - | - | - | - |" in text_of(tmp_path)


def test_unknown_truth_has_no_tables(tmp_path):
    for label, f1 in (("baseline", 0.5), ("quant-w4a4", 0.52)):
        for seed in (0, 1):
            write_run(tmp_path, label, f1, seed, noise=None, truth=False, dataset="bp4d")
    text = text_of(tmp_path)
    assert "| quant-w4a4 | 42.0 | 62.0 | 52.00 ± 0.00 (n 2) | 14.1 |" in text
    assert "| quant-w4a4 | +2.00 ± 0.00 (n 2) | 2 of 2 | +2.00 ± 0.00 (n 2) | 2 of 2 |" in text
    assert "truth" not in text
    assert "training labels, %" not in text
    assert "| baseline | 1 | 2.0 | 0.00 | 20.0 | 5.0 | 20.0 | 20.0 |" in text


def test_published_rows_stand_beside_our_own_on_the_same_aus(tmp_path):
    for label in ("baseline", "quant-w4a4", "quant-w2a2"):
        write_run(
            tmp_path,
            label,
            aus=AUS,
            noise=None,
            truth=False,
            dataset="bp4d",
            encoder="inception_v3",
        )
    text = text_of(tmp_path)
    assert (
        "| *baseline, published* | *49.6* | *45.8* | *55.1* | *74.8* | *75.5* | *83.7* | *87.1* | "
        "*62.7* | *47.0* | *56.4* | *44.8* | *41.2* | *60.3* | *16.1* |" in text
    )
    assert text.count(", published* |") == 2
    assert "| quant-w4a4 | +0.00 | 0 of 1 | +0.00 | 0 of 1 | +2.2 |" in text
    assert "| quant-w2a2 | +0.00 | 0 of 1 | +0.00 | 0 of 1 | - |" in text
    assert "levels cannot be compared" not in text


def test_other_data_than_the_published_are_told_apart(tmp_path):
    write_run(tmp_path, aus=AUS)
    assert "**Ours is small on synthetic-au: levels cannot be compared.**" in text_of(tmp_path)


def test_published_table_is_that_of_the_paper(tmp_path):
    write_run(tmp_path, aus=AUS)
    paper = Published.of(summed_up(tmp_path)[0])
    names = ("baseline", "quant", "dropout", "prune", "weight_decay", "label_smoothing")
    assert set(paper.f1) == {defaults()[name] for name in names}
    assert paper.f1["quant-w4a4"]["24"] == 53.4
    assert paper.gain("quant-w4a4", 24) == pytest.approx(12.2)
    assert paper.gain("label-smoothing0.1") == pytest.approx(-0.5)
    table = pl.read_csv(PAPER, comment_prefix="#")
    rounded = table.select(pl.mean_horizontal(map(str, AUS)) - pl.col("average")).to_series()
    assert rounded.abs().max() < 0.1


def test_norm_is_part_of_the_row_and_other_options_are_not_mixed(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, "quant-w4a4", weight_bits=4)
    write_run(tmp_path, "quant-w4a4", au_norm="shared", weight_bits=4)
    write_run(tmp_path, encoder="inception_v3", seed=0)
    first, second = found(tmp_path)
    assert first.labels == ["baseline", "quant-w4a4", "quant-w4a4, norm shared"]
    assert titles([first, second]) == [
        "synthetic-au, encoder small",
        "synthetic-au, encoder inception_v3",
    ]


def test_checksums_part_films_but_not_drawings_whose_labels_differ(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "drawn", seed=seed, sha256=f"{seed}" * 8)
        write_run(tmp_path / "filmed", seed=seed, sha256=f"{seed}" * 8, noise=None, dataset="bp4d")
    (study,) = found(tmp_path / "drawn")
    assert not study.drawn_differently()
    assert len(found(tmp_path / "filmed")) == 2
    write_run(tmp_path / "drawn", "quant-w4a4", seed=1, sha256="2" * 8)
    assert "had different data" in text_of(tmp_path / "drawn")


def test_every_noise_has_its_tables(tmp_path):
    for noise, gain in ((0.0, 0.01), (2.0, 0.07)):
        write_run(tmp_path, "baseline", 0.5 - noise / 10, noise=noise)
        write_run(tmp_path, "quant-w4a4", 0.5 - noise / 10 + gain, noise=noise)
    write_run(tmp_path, "dropout0.1", 0.5, noise=2.0)
    text = text_of(tmp_path)
    sections = text.split("### ")[1:]
    assert [section.split("\n")[0] for section in sections] == [
        "noise 0",
        "noise 2",
        "Over the noise",
    ]
    assert "| quant-w4a4 | 41.0 | 61.0 | 51.00 | 14.1 |" in sections[0]
    assert "| quant-w4a4 | 27.0 | 47.0 | 37.00 | 14.1 |" in sections[1]
    assert sections[2].count("| quant-w4a4 | +1.00 | +7.00 |") == len(SCORES)
    assert "- dropout0.1, noise 0, seed 0: fold 1" in sections[2]


def test_figure_shows_gains_and_what_was_published(tmp_path):
    for seed, gain in enumerate((0.03, 0.04, 0.05)):
        write_run(tmp_path, "baseline", 0.5, seed, aus=AUS)
        write_run(tmp_path, "quant-w4a4", 0.5 + gain, seed, aus=AUS)
        write_run(tmp_path, "quant-w4a4", 0.5 - gain, seed, aus=AUS, au_norm="shared")
    left, right = figure.gains(*summed_up(tmp_path)).axes
    assert [label.get_text() for label in left.get_yticklabels()] == [
        "quant-w4a4",
        "quant-w4a4, norm shared",
    ]
    quant, shared = left.containers
    assert quant.lines[0].get_xydata()[0] == pytest.approx((4, 0))
    assert shared.lines[0].get_xydata()[0] == pytest.approx((-4, 1))
    assert quant.lines[0].get_color() == shared.lines[0].get_color() == color("quant-w4a4")
    (interval,) = quant.lines[2][0].get_segments()
    assert interval[:, 0] == pytest.approx((4 - 2.484, 4 + 2.484), abs=1e-3)
    assert published_in(left).tolist() == [pytest.approx((2.2, 0))]
    bars = right.containers[0]
    assert [bar.get_height() for bar in bars] == pytest.approx([4] * 12)
    assert published_in(right)[-1].tolist() == pytest.approx((11, 12.2))
    assert right.get_ylim()[1] > 12.2


def published_in(axis):
    (line,) = [line for line in axis.lines if line.get_marker() == "D"]
    return line.get_xydata()


def test_no_panel_is_empty_where_quantization_was_not_run(tmp_path):
    for noise in (0.0, 1.0):
        write_run(tmp_path, "baseline", noise=noise)
        write_run(tmp_path, "dropout0.1", noise=noise)
    assert len(figure.gains(*summed_up(tmp_path)).axes) == 2
    write_run(tmp_path, "quant-w4a4", noise=1.0)
    panels = figure.gains(*summed_up(tmp_path)).axes
    assert [axis.get_visible() for axis in panels] == [True, False, True, True]


def test_an_interval_that_leaves_the_panel_of_aus_ends_in_arrows(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "baseline", 0.5, seed, aus=AUS)
        folder = write_run(tmp_path, "quant-w4a4", 0.5 + 0.01 * seed, seed, aus=AUS)
        by_au = json.loads((folder / "result.json").read_text())["test_f1_per_au"]
        edit(folder / "result.json", test_f1_per_au=by_au | {str(AUS[0]): 0.1 + 0.4 * seed})
    drawn = figure.gains(*summed_up(tmp_path))
    arrows = [c for c in drawn.axes[1].collections if isinstance(c, PathCollection)]
    assert len(arrows) == 2
    assert "arrows" in drawn.legends[0].get_title().get_text()


def test_two_seeds_have_no_bars(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "baseline", 0.5, seed)
        write_run(tmp_path, "quant-w4a4", 0.5 + 0.01 * seed, seed)
    drawn = figure.gains(*summed_up(tmp_path))
    assert "bars" not in drawn.legends[0].get_title().get_text()
    assert not any(axis.findobj(LineCollection) for axis in drawn.axes)
    assert "(n = 2)" in drawn.axes[0].get_title()


def test_figure_without_a_baseline_says_so(tmp_path, capsys):
    write_run(tmp_path, "quant-w4a4")
    report.COMMANDS["table1"](tmp_path, tmp_path / "out")
    assert re.search(r"- table1: .*baseline", (tmp_path / "out" / "report.md").read_text())


# The command.


def write_classification(directory):
    folder = directory / "digits"
    folder.mkdir()
    (folder / "config.json").write_text('{"dataset": "digits"}')
    return folder


def test_command_writes_tables_and_the_figure(three_seeds, capsys):
    write_run(three_seeds, "quant-w4a4", seed=3, encoder="inception_v3")
    (three_seeds / "killed").mkdir()
    (three_seeds / "killed" / "config.json").write_text('{"dataset": "bp4d"}')
    write_classification(three_seeds)
    report.COMMANDS["table1"](three_seeds, three_seeds / "out")
    out = three_seeds / "out"
    assert {path.name for path in out.iterdir()} == {
        "report.md",
        "runs.csv",
        "table1.csv",
        "table1-1.png",
        "table1-1.svg",
    }
    text = (out / "report.md").read_text()
    shown = capsys.readouterr().out
    assert "  test F1 against the annotators, %     noise 1\n" in shown
    assert (
        "\nnot drawn:\n  table1-2: no run has the noise, seed and folds of a baseline run\n"
        in shown
    )
    assert "\nunfinished, left out: killed\n" in shown
    assert "## Unfinished runs, left out\n\n- killed\n" in text
    assert text.endswith("\nOther runs, left out: 1; report.py figures is for them.\n")
    assert (out / "table1-1.png").stat().st_size > 5000

    runs = pl.read_csv(out / "runs.csv")
    assert len(runs) == 19
    first = runs.row(0, named=True)
    assert (first["label"], first["seed"], first["fold"]) == ("baseline", 0, 1)
    assert first["test_f1_au2"] == pytest.approx(0.5)
    assert first["study"] == "synthetic-au, encoder small"
    table1 = pl.read_csv(out / "table1.csv")
    assert len(table1) == 3
    assert table1["test_f1_gain"].to_list() == [0, pytest.approx(0.04), None]


def test_each_command_names_the_other_where_it_has_no_runs(tmp_path):
    folder = write_run(tmp_path)
    with pytest.raises(ValueError, match=r"classification.* 1.*report\.py table1"):
        report.COMMANDS["figures"](tmp_path)
    (folder / "config.json").write_text('{"dataset": "digits"}')
    with pytest.raises(ValueError, match=r"action units.* 1.*report\.py figures"):
        report.COMMANDS["table1"](tmp_path)
    with pytest.raises(ValueError, match=r"action units.*experiments/run\.py"):
        report.COMMANDS["table1"](tmp_path / "nothing")
    assert not (tmp_path / "report-table1").exists()


@pytest.mark.parametrize("arguments", [[], ["table2"]])
def test_command_line_names_both_commands(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    assert report.main() == 2
    assert "figures, table1" in capsys.readouterr().err


@pytest.mark.parametrize(("dataset", "command"), [("bp4d", "table1"), ("cifar10", "figures")])
def test_sweep_names_the_command_for_its_runs(dataset, command):
    identity = RunIdentity(RunConfig(dataset=dataset), {})
    task = Task(
        (), Path(), 1, threads=1, gpu=False, script=Path(), directory=Path(), identity=identity
    )
    assert sweep.report_of(task) == command
