"""Reports on a hand-made tree of runs, with known answers."""

import dataclasses
import math

import polars as pl
import pytest
from run_folders import edit
from run_folders import write_classification as write_run

from experiments import report
from experiments.reporting import comparison, figures, tables
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.runs import defaults, find, studies, titles

GAIN = "gain-against-memorisation"


def only_study(directory):
    (study,) = studies(find(directory).finished)
    return study


def row(table, label, noise):
    return table.filter(label=label, noise=noise).row(0, named=True)


def test_means_deviations_and_paired_gains(tmp_path):
    for seed, (baseline, quant) in enumerate([(0.50, 0.53), (0.60, 0.64), (0.40, 0.45)]):
        write_run(tmp_path, "baseline", baseline, seed=seed)
        write_run(tmp_path, "quant-w4a4", quant, seed=seed)
    summary = comparison.summary(only_study(tmp_path))
    baseline, quant = row(summary, "baseline", 0.4), row(summary, "quant-w4a4", 0.4)
    assert baseline["seeds"] == quant["pairs"] == 3
    assert baseline["test_accuracy_mean"] == pytest.approx(0.5)
    assert baseline["test_accuracy_std"] == pytest.approx(0.1)
    assert baseline["gain"] == baseline["gain_half_width"] == 0
    assert quant["gain"] == pytest.approx(0.04)
    # Differences 3, 4, 5 points: a standard deviation of 1, and t(0.975, 2) = 4.3027.
    assert quant["gain_half_width"] == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)


def test_only_the_same_seeds_are_paired(tmp_path):
    write_run(tmp_path, "baseline", 0.5, seed=0)
    write_run(tmp_path, "baseline", 0.9, seed=1)
    write_run(tmp_path, "quant-w4a4", 0.6, seed=0)
    write_run(tmp_path, "quant-w4a4", 0.0, seed=2)
    quant = row(comparison.summary(only_study(tmp_path)), "quant-w4a4", 0.4)
    assert (quant["seeds"], quant["pairs"]) == (2, 1)
    assert quant["gain"] == pytest.approx(0.1)
    assert quant["gain_half_width"] is None


def test_runs_of_different_setup_are_never_mixed(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1, threads=2, out="elsewhere")  # a circumstance
    write_run(tmp_path, seed=0, augment=False)
    found = studies(find(tmp_path).finished)
    assert [len(study.runs) for study in found] == [2, 1]
    assert titles(found) == ["digits, with augmentation", "digits, without augmentation"]


def test_a_methods_own_options_do_not_part_studies(tmp_path):
    write_run(tmp_path)
    write_run(tmp_path, "quant-w4a4", weight_bits=4, activation_bits=4)
    assert only_study(tmp_path).labels == ["baseline", "quant-w4a4"]


def test_missing_runs_are_named(tmp_path):
    write_run(tmp_path, seed=0)
    write_run(tmp_path, seed=1)
    write_run(tmp_path, noise=0.8, seed=1)
    write_run(tmp_path, "quant-w4a4", seed=0)
    assert only_study(tmp_path).missing() == [
        "baseline, seed 0: noise 0.8",
        "quant-w4a4, seed 0: noise 0.8",
        "quant-w4a4, seed 1: noise 0.4, 0.8",
    ]


def test_human_labels_stand_at_the_noise_they_have(tmp_path):
    folder = write_run(tmp_path, noise=None)
    edit(folder / "result.json", wrong_labels=0.4021)
    assert FinishedRun.read(folder).noise == 0.4021


def test_what_training_took_stands_beside_every_accuracy(tmp_path):
    folder = write_run(tmp_path)
    edit(folder / "result.json", test_accuracy_at_best_validation=0.625)
    study = only_study(tmp_path)
    text = tables.study_section("title", study, comparison.summary(study))
    headers = [line for line in text.splitlines() if line.startswith("| test accuracy")]
    assert len(headers) == 2
    assert all(f"| {tables.BUDGET} |" in header for header in headers)
    assert "| baseline | 3 + 3 | 62.50 |" in text


def test_table_of_accuracy_and_gain(tmp_path):
    for seed, accuracy in enumerate([0.5, 0.6]):
        write_run(tmp_path, "baseline", accuracy, seed=seed)
    write_run(tmp_path, "quant-w4a4", 0.75, seed=1)
    write_run(tmp_path, "baseline", 0.875, noise=0.0)
    study = only_study(tmp_path)
    text = tables.study_section("title", study, comparison.summary(study))
    assert "| baseline | 3 + 3 | 87.50 | 55.00 ± 7.07 (n 2) |" in text
    assert "| quant-w4a4 | 3 + 3 | - | 75.00 |" in text
    assert "| quant-w4a4 | 3 + 3 | - | +15.0 |" in text
    assert "| baseline | - | 90.00 ± 0.00 (n 2) |" in text  # nothing is wrong without noise
    assert "- quant-w4a4, seed 0: noise 0, 0.4" in text


@pytest.fixture
def whole_tree(tmp_path):
    for noise in (0.0, 0.4, 0.8):
        for seed in (0, 1):
            for label in defaults().values():
                write_run(tmp_path, label, 0.9 - noise / 2, noise, seed)
    for label in ("quant-w2a2", "dropout0.5", "prune0.25"):
        write_run(tmp_path, label, 0.4)
    return tmp_path


def test_command_writes_tables_and_figures(whole_tree, monkeypatch, capsys):
    unfinished = whole_tree / "killed"
    unfinished.mkdir()
    (unfinished / "config.json").write_text("{}")
    report.COMMANDS["figures"](whole_tree)
    out = whole_tree / "report"
    assert {path.name for path in out.iterdir()} == {
        "report.md",
        "runs.csv",
        "summary.csv",
        *(
            f"{name}.{suffix}"
            for name in ("figure1", "figure2", "figure3", "memorisation", GAIN)
            for suffix in ("png", "svg")
        ),
    }
    assert len(pl.read_csv(out / "runs.csv")) == 3 * 2 * len(defaults()) + 3
    text = (out / "report.md").read_text()
    shown = capsys.readouterr().out
    assert shown.startswith("digits: 225 runs, 2 seeds\n  test accuracy, %   ")
    assert "\nunfinished, left out: killed\n" in shown
    assert len(shown.splitlines()) < 30 < len(text.splitlines())
    assert "no gain" not in shown
    assert "not drawn" not in shown
    assert "## Unfinished runs, left out\n\n- killed" in text
    assert all(path.stat().st_size > 5000 for path in out.glob("*.png"))


def test_figure_2_draws_every_method_and_the_published_curves(whole_tree):
    on_digits = only_study(whole_tree)
    theirs = {"dataset": "cifar10", "noise_kind": "symmetric"}
    study = dataclasses.replace(on_digits, setup=on_digits.setup | theirs)
    figure = figures.accuracy_and_gain(study, comparison.summary(study))
    accuracy, gain = figure.axes
    assert len(accuracy.lines) == len(defaults())
    published = [line for line in gain.lines if line.get_linestyle() == "--"]
    assert len(published) == 5
    assert len(gain.lines) == len(defaults()) - 1 + len(published) + 1  # the last one is 0
    assert max(published[0].get_ydata()) == 19.7  # quantization at 80 %
    figure = figures.accuracy_and_gain(on_digits, comparison.summary(on_digits))
    assert not [line for axis in figure.axes for line in axis.lines if line.get_linestyle() == "--"]


def test_published_curves_are_those_of_the_paper():
    paper = pl.read_csv(figures.PAPER, comment_prefix="#")
    assert paper["noise_percent"].to_list() == list(range(0, 101, 10))
    assert paper.row(4) == (40, 76.8, 5.6, 5.2, 2.4, 1.2, 0.8)


def test_figures_that_runs_are_not_enough_for_are_left_out(tmp_path):
    write_run(tmp_path)
    report.COMMANDS["figures"](tmp_path, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.png"))


def test_directory_without_runs_is_told(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}.*classification"):
        report.COMMANDS["figures"](tmp_path)


def test_a_training_loss_can_be_negative(tmp_path):
    """As that of elr is, which rewards agreement without a lower limit of 0."""
    metrics = write_run(tmp_path) / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"loss": 1.0', '"loss": -1.0', 1))
    (run,) = find(tmp_path).finished
    assert run.epochs[0]["loss"] == -1.0
