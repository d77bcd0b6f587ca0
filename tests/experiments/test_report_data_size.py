"""Accuracy over the number of training images, from runs with known answers."""

import math
import re

import pytest
from run_folders import edit, write_classification

from experiments import report
from experiments.reporting import data_size
from experiments.reporting.runs import find, studies

LINES = {"baseline": (0.1, 0.05), "quant-w4a4": (0.3, 0.02)}


def write(directory, size, label="baseline", accuracy=None, **options):
    """A run on so many images, whose accuracy lies on the label's line unless told otherwise."""
    a, b = LINES[label]
    accuracy = a + b * math.log(size) if accuracy is None else accuracy
    folder = write_classification(directory, label, accuracy, train_size=size, **options)
    # The data of a subset have a checksum of their own.
    edit(folder / "result.json", data_sha256=f"{size:064x}"[::-1])
    return folder


def lines(directory):
    """By title."""
    return dict(data_size.over_sizes(studies(find(directory).finished)))


def test_a_line_goes_through_the_runs_of_each_method_and_noise(tmp_path):
    for size in (50, 400, 3000):
        for label in LINES:
            write(tmp_path, size, label)
        write(tmp_path, size, noise=0.0, accuracy=0.5)
    flat, *others = lines(tmp_path)["digits"]
    assert (flat.label, flat.noise) == ("baseline", 0.0)
    assert (flat.a, flat.b) == pytest.approx((0.5, 0))
    for line in others:
        assert line.noise == 0.4
        assert (line.a, line.b) == pytest.approx(LINES[line.label])
        assert line.r_squared == pytest.approx(1)
    assert [line.label for line in others] == list(LINES)


def test_the_fit_is_that_of_least_squares(tmp_path):
    accuracies = {1: [0.1, 0.3], 10: [0.4, 0.2], 100: [0.7, 0.7]}
    for size, of_seeds in accuracies.items():
        for seed, accuracy in enumerate(of_seeds):
            write(tmp_path, size, accuracy=accuracy, seed=seed)
    (line,) = lines(tmp_path)["digits"]
    # Over log10 n, that is 0, 1, 2: means .2, .3, .7, a slope of .25 and an intercept of .15.
    assert line.a == pytest.approx(0.15)
    assert line.b == pytest.approx(0.25 / math.log(10))
    residuals = [0.05, 0.15, 0.0, 0.2, 0.05, 0.05]
    unexplained = sum(residual**2 for residual in residuals)
    assert line.r_squared == pytest.approx(1 - unexplained / 0.32)
    # The slope's standard error, and t(0.975, 4) = 2.7764.
    error = math.sqrt(unexplained / 4 / 4) / math.log(10)
    assert line.b_half_width == pytest.approx(2.7764 * error, rel=1e-4)


def test_a_line_needs_three_sizes(tmp_path):
    for size in (50, 400):
        for seed in (0, 1):
            write(tmp_path, size, seed=seed)
    assert lines(tmp_path) == {}
    write(tmp_path, 3000, "quant-w4a4")
    assert lines(tmp_path) == {}
    write(tmp_path, 3000)
    ((line,),) = lines(tmp_path).values()
    assert line.sizes == (50, 50, 400, 400, 3000)


def test_studies_that_differ_otherwise_too_have_lines_of_their_own(tmp_path):
    for size in (50, 400, 3000):
        write(tmp_path, size)
        write(tmp_path, size, augment=False, accuracy=0.5)
    write(tmp_path, 6000, batch_size=32)  # no line, and so nothing that titles would name
    found = lines(tmp_path)
    assert sorted(found) == ["digits, with augmentation", "digits, without augmentation"]
    assert found["digits, without augmentation"][0].b == pytest.approx(0)


def test_versions_of_the_data_are_not_mixed(tmp_path):
    for size in (50, 400, 3000):
        write(tmp_path, size)
    edit(write(tmp_path, 50, seed=1) / "result.json", data_sha256="f" * 64)
    assert lines(tmp_path) == {}


def test_report_has_a_table_and_a_figure(tmp_path, capsys):
    for size in (50, 400, 3000):
        write(tmp_path / "runs", size)
        write(tmp_path / "runs", size, "quant-w4a4")
        write(tmp_path / "runs", size, noise=0.0, accuracy=0.5)
    write_classification(tmp_path / "runs")  # on all images
    report.COMMANDS["figures"](tmp_path / "runs", tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Accuracy over the number of training images: digits\n" in text
    assert "| baseline | 0.4 | 50, 400, 3000 | 3 | 10.0 | +5.00 ± 0.00 | +3.47 | 1.000 |" in text
    assert "| quant-w4a4 | 0.4 | 50, 400, 3000 | 3 | 30.0 | +2.00 ± 0.00 | +1.39 | 1.000 |" in text
    assert re.search(r"\| baseline \| 0 \| 50, 400, 3000 \| 3 \| 50\.0 \| [+-]0\.00", text)
    assert (tmp_path / "out" / "data-size.png").stat().st_size > 5000
    assert not capsys.readouterr().err


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_figure_shows_every_run_and_the_line(tmp_path):
    for size in (50, 400, 3000):
        for label in LINES:
            write(tmp_path, size, label)
    figure = data_size.growth(lines(tmp_path)["digits"])
    assert legend_of(figure) == ["baseline (n = 3)", "quant-w4a4 (n = 3)"]
    (axis,) = figure.axes
    assert [len(points.get_offsets()) for points in axis.collections] == [3, 3]
    for drawn, (a, b) in zip(axis.lines[:2], LINES.values(), strict=True):
        assert drawn.get_xdata() == pytest.approx([50, 3000])
        expected = [100 * (a + b * math.log(size)) for size in (50, 3000)]
        assert drawn.get_ydata() == pytest.approx(expected)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["50", "400", "3000"]


def test_legend_names_what_is_in_any_panel(tmp_path):
    for size in (50, 400, 3000):
        write(tmp_path, size, noise=0.0)
        write(tmp_path, size, "quant-w4a4")
    figure = data_size.growth(lines(tmp_path)["digits"])
    assert len(figure.axes) == 2
    assert legend_of(figure) == ["baseline (n = 3)", "quant-w4a4 (n = 3)"]
