"""Runs beside each other."""

import json

import pytest

from experiments import report


def write_run(folder, method, accuracies, **options):
    folder.mkdir()
    config = {"method": method, "noise": 0.4, "out": str(folder), **options}
    epochs = [
        {"epoch": i + 1, "loss": 2.0 - i, "train_accuracy_flipped": None, "test_accuracy": accuracy}
        for i, accuracy in enumerate(accuracies)
    ]
    result = {
        "test_accuracy": accuracies[-1],
        "train_accuracy_clean": 0.9,
        "train_accuracy_flipped": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_table_names_runs_by_the_options_in_which_they_differ(tmp_path):
    folders = [
        write_run(tmp_path / "a", "baseline", [0.5, 0.6], augment=True),
        write_run(tmp_path / "b", "quant", [0.5, 0.625], augment=True),
        write_run(tmp_path / "c", "quant", [0.5, 0.7], augment=False),
    ]
    lines = report.table([report.read(folder) for folder in folders]).splitlines()
    assert lines[2:] == [
        "| baseline, augment True | 60.00% | 90.00% | - |",
        "| quant, augment True | 62.50% | 90.00% | - |",
        "| quant, augment False | 70.00% | 90.00% | - |",
    ]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure(tmp_path, capsys, suffix):
    run = write_run(tmp_path / "a", "quant", [0.5, 0.6])
    figure = tmp_path / "figures" / f"curves.{suffix}"
    report.report((run,), figure)
    assert figure.stat().st_size > 1000
    assert "| quant | 60.00% |" in capsys.readouterr().out


def test_folders_that_are_no_finished_run_are_named(tmp_path):
    run = write_run(tmp_path / "a", "quant", [0.5])
    (run / "result.json").unlink()
    with pytest.raises(ValueError, match=r"not a finished run, .*result.json is missing"):
        report.read(run)
    (run / "result.json").write_text("{")
    with pytest.raises(ValueError, match="malformed"):
        report.read(run)
