"""Figures of reports: what they show of any number of runs, and why one is missing."""

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from run_folders import OPTIONS, edit, write_classification

from experiments import report
from experiments.reporting import comparison, drawing, figures
from experiments.reporting.runs import defaults, find, studies
from experiments.reporting.settings import settings

ROOT = Path(__file__).parents[2]
BASELINE, QUANT = "baseline", "quant-w4a4"


def write(folder, labels, noises=(0.0, 0.4), seeds=(0,), **options):
    """Runs of these labels, also of methods that this version does not have."""
    for label in labels:
        for noise in noises:
            for seed in seeds:
                accuracy = 0.5 + 0.01 * seed + (0.02 * (seed + 1) if label != BASELINE else 0)
                if label in OPTIONS:
                    write_classification(folder, label, accuracy, noise, seed, **options)
                else:
                    run = write_classification(
                        folder / label, BASELINE, accuracy, noise, seed, **options
                    )
                    edit(run / "config.json", method="old")
                    edit(run / "result.json", method="old", label=label)


def summed_up(folder):
    (study,) = studies(find(folder).finished)
    return study, comparison.summary(study)


def legend_of(figure, place=0):
    return [text.get_text() for text in figure.legends[place].get_texts()]


def look(line):
    return line.get_color(), line.get_marker(), line.get_linestyle()


def is_readable(figure):
    """Panels are large, and nothing but what is theirs is where they are."""
    figure.draw_without_rendering()
    panels = [axis.get_tightbbox() for axis in figure.axes if axis.get_visible()]
    boxes = panels + [legend.get_window_extent() for legend in figure.legends]
    page = figure.bbox.padded(1)
    apart = not any(
        a.x0 < b.x1 - 1 and b.x0 < a.x1 - 1 and a.y0 < b.y1 - 1 and b.y0 < a.y1 - 1
        for place, a in enumerate(boxes)
        for b in boxes[:place]
    )
    inside = all(page.contains(*box.min) and page.contains(*box.max) for box in boxes)
    return apart and inside and all(box.height > 1.2 * figure.dpi for box in panels)


# Styles.


def test_methods_of_the_paper_keep_their_colours():
    of_paper = {
        BASELINE: "0.4",
        QUANT: "#0072B2",
        "dropout0.1": "#E69F00",
        "prune0.75": "#009E73",
        "weight-decay0.01": "#D55E00",
        "label-smoothing0.1": "#CC79A7",
        "early-stopping10": "#56B4E9",
    }
    assert {label: style.color for label, style in drawing.styles(of_paper).items()} == of_paper
    assert {label: drawing.color(label) for label in of_paper} == of_paper


def test_a_method_looks_the_same_in_every_figure():
    labels = list(defaults().values())
    of_all = drawing.styles([*labels, f"{QUANT}+adder", "cutmix1"])
    assert all(drawing.styles([label]) == {label: of_all[label]} for label in labels)


@pytest.mark.parametrize(
    "others", [[], *([f"{with_}{n}" for n in range(30)] for with_ in ("new", f"{QUANT}+new"))]
)
def test_any_number_of_methods_look_different(others):
    labels = [*defaults().values(), *others, *(f"{QUANT}+{x}" for x in defaults().values())]
    found = drawing.styles(labels)
    assert set(found) == set(labels)
    assert len(set(found.values())) == len(labels)
    pairs = {(style.color, style.marker) for style in drawing.styles(defaults().values()).values()}
    assert len(pairs) == len(defaults())  # also where a line is a single point


def test_forty_methods_in_one_figure(tmp_path):
    labels = [*defaults().values(), f"{QUANT}+adder", f"{QUANT}+sam0.05", "cutmix1", "cutout1"]
    assert len(labels) > 40
    write(tmp_path, labels)
    figure = figures.accuracy_and_gain(*summed_up(tmp_path))
    accuracy, gain = figure.axes
    assert len(set(map(look, accuracy.lines))) == len(labels)
    assert len(set(map(look, gain.lines))) == len(labels)  # without the baseline, with the 0
    assert sorted(legend_of(figure)) == sorted(f"{label} (n = 1)" for label in labels)
    assert is_readable(figure)


def test_combinations_are_drawn_and_settings_are_in_figure_3(tmp_path):
    both = f"{QUANT}+weight-decay0.01"
    write(tmp_path, [BASELINE, QUANT, both, "quant-w2a2"], noises=(0.0, 0.4, 0.8))
    study, summary = summed_up(tmp_path)
    expected = [f"{label} (n = 1)" for label in (BASELINE, QUANT, both)]
    for draw in (figures.accuracy_and_gain, figures.memorisation):
        assert legend_of(draw(study, summary)) == expected
    (axis,) = settings(summary).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["quant-w2a2", QUANT]


def test_settings_alone_are_drawn(tmp_path):
    write(tmp_path, [BASELINE, "quant-w3a3", "quant-w8a8"])
    figure = figures.accuracy_and_gain(*summed_up(tmp_path))
    assert len(legend_of(figure)) == 3


# Bars.


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_bars_are_drawn_and_explained_from_three_seeds_on(seeds, tmp_path):
    write(tmp_path, [BASELINE, QUANT, "quant-w2a2"], (0.0, 0.4, 0.8), range(seeds))
    study, summary = summed_up(tmp_path)
    for figure in (
        figures.accuracy_and_gain(study, summary),
        figures.memorisation(study, summary),
        settings(summary),
    ):
        bars = [
            bar for axis in figure.axes for bar in axis.containers if bar.has_xerr or bar.has_yerr
        ]
        assert bool(bars) == (seeds > 2)
        assert ("95 % t interval" in figure.legends[0].get_title().get_text()) == (seeds > 2)
        assert all(f"(n = {seeds})" in text for text in legend_of(figure))


def test_bars_are_intervals(tmp_path):
    write(tmp_path, [BASELINE, QUANT], seeds=(0, 1, 2))
    accuracy, gain = figures.accuracy_and_gain(*summed_up(tmp_path)).axes
    # Standard deviations of one point (gains) and of one and three (accuracies); t(0.975, 2).
    half_widths = [
        (top - bottom) / 2
        for axis in (accuracy, gain)
        for bar in axis.containers
        for (_, bottom), (_, top) in bar.lines[2][0].get_segments()[:1]
    ]
    expected = [4.3027 * deviation / 3**0.5 for deviation in (1, 3, 2)]
    assert half_widths == pytest.approx(expected, rel=1e-4)


def test_numbers_of_seeds_that_differ_are_told(tmp_path):
    write(tmp_path, [BASELINE, QUANT], seeds=(0, 1))
    write(tmp_path, [QUANT], noises=(0.4,), seeds=(2,))
    figure = figures.accuracy_and_gain(*summed_up(tmp_path))
    assert legend_of(figure) == [f"{BASELINE} (n = 2)", f"{QUANT} (n = 2 to 3)"]


# Panels.


def test_curves_of_one_evaluation_have_no_panel(tmp_path):
    write(tmp_path, [BASELINE, QUANT])
    figure = figures.curves(summed_up(tmp_path)[0])
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "training loss, nats",
        "wrong training labels fitted, %",
    ]


def test_settings_are_in_the_order_of_their_numbers(tmp_path):
    labels = [f"quant-w{w}a{a}" for w, a in ((2, 2), (2, 10), (4, 2), (4, 4), (10, 2))]
    write(tmp_path, [BASELINE, *reversed(labels)])
    (axis,) = settings(summed_up(tmp_path)[1]).axes
    assert [label.get_text() for label in axis.get_yticklabels()] == labels
    bottom, top = axis.get_ylim()
    assert bottom > top


def test_a_setting_that_loses_much_does_not_squeeze_the_others(tmp_path):
    write(tmp_path, [BASELINE, QUANT], noises=(0.4,))
    write_classification(tmp_path, "quant-w2a2", 0.0, 0.4)
    figure = settings(summed_up(tmp_path)[1])
    (axis,) = figure.axes
    assert axis.get_xlim()[0] > -30
    assert "arrows" in figure.legends[0].get_title().get_text()


def test_noises_with_one_setting_are_left_out_of_figure_3(tmp_path):
    write(tmp_path, [BASELINE, QUANT], noises=(0.0, 0.4, 0.8))
    write(tmp_path, ["quant-w2a2"], noises=(0.4,))
    assert legend_of(settings(summed_up(tmp_path)[1])) == ["40 % noise (n = 1)"]


def test_every_study_is_in_gain_against_memorisation(tmp_path):
    drawn = []
    for number in range(13):
        folder = tmp_path / str(number)
        for label in (BASELINE, QUANT):
            for noise in (0.0, 0.4, 0.8):
                write_classification(folder, label, noise=noise)
        drawn.append((f"study {number}", *summed_up(folder)))
    figure = figures.gain_against_memorisation(drawn)
    assert legend_of(figure) == [f"{QUANT} (n = 1)"]
    titles = [text.split(":")[0] for text in legend_of(figure, 1)]
    assert titles == [f"study {number}" for number in range(13)]
    *lines, _ = figure.axes[0].lines
    assert len({(line.get_fillstyle(), line.get_markersize()) for line in lines}) == 13
    assert is_readable(figure)


def test_columns_of_points_are_no_gain_against_memorisation(tmp_path):
    drawn = []
    for number, noise in enumerate((0.4, 0.401, 0.8)):
        folder = tmp_path / str(number)
        for label in (BASELINE, QUANT):
            write_classification(folder, label, noise=noise)
        drawn.append((f"study {number}", *summed_up(folder)))
    assert isinstance(figures.gain_against_memorisation(drawn), str)


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_figure_says_what_it_is_of(seeds, tmp_path):
    labels = [BASELINE, QUANT, "quant-w2a2", "dropout0.1", "prune0.75"]
    write(tmp_path, labels, noises=(0.0, 0.4, 0.8), seeds=range(seeds), train_size=3000)
    study, summary = summed_up(tmp_path)
    drawn = [
        figures.curves(study),
        figures.accuracy_and_gain(study, summary),
        settings(summary),
        figures.memorisation(study, summary),
    ]
    for figure in drawn:
        figure.suptitle(f"title\n{figures.about(study)}")
    drawn.append(figures.gain_against_memorisation([("title", study, summary)]))
    for figure in drawn:
        texts = [text.get_text() for text in figure.findobj(lambda o: hasattr(o, "get_text"))]
        said = " ".join(texts)
        assert "3,000 images" in said
        assert "3 epochs" in said
        assert "n = " in said
        for axis in figure.axes:
            assert re.search(", (%|points|nats)", axis.get_xlabel() + axis.get_ylabel())
        assert is_readable(figure)


# What is missing, and why.


def reasons(folder):
    report.COMMANDS["figures"](folder, folder / "out")
    text = (folder / "out" / "report.md").read_text()
    drawn = {path.stem for path in (folder / "out").glob("*.png")}
    assert set(re.findall(r"!\[.*\]\((.*)\.png\)", text)) == drawn
    assert {path.stem for path in (folder / "out").glob("*.svg")} == drawn
    told = text.split("## Figures")[1]
    return drawn, dict(re.findall(r"^- ([\w -]+): (.*)$", told, re.MULTILINE))


def test_one_level_of_noise(tmp_path):
    write(tmp_path, [BASELINE, QUANT, "quant-w2a2"], noises=(0.4,))
    drawn, missing = reasons(tmp_path)
    assert drawn == {"figure1", "figure3"}
    assert set(missing) == {"figure2", "memorisation", "gain-against-memorisation"}
    assert "40 %" in missing["figure2"]


def test_wrong_labels_at_one_level(tmp_path):
    write(tmp_path, [BASELINE, QUANT])
    drawn, missing = reasons(tmp_path)
    assert drawn == {"figure1", "figure2"}
    assert re.search("noise|level", missing["memorisation"])


def test_labels_that_are_not_counted(tmp_path):
    write(tmp_path, [BASELINE, QUANT], (0.0, 0.4, 0.8))
    for path in tmp_path.glob("*/result.json"):
        edit(path, train_accuracy_clean=None)
    assert len(figures.memorisation(*summed_up(tmp_path)).axes) == 1
    for path in tmp_path.glob("*/result.json"):
        edit(path, train_accuracy_flipped=None)
    drawn, missing = reasons(tmp_path)
    assert drawn == {"figure1", "figure2"}
    assert {"memorisation", "gain-against-memorisation"} <= set(missing)


def test_no_baseline(tmp_path):
    write(tmp_path, [QUANT, "quant-w2a2"], noises=(0.0, 0.4, 0.8))
    drawn, missing = reasons(tmp_path)
    assert drawn == {"figure2", "memorisation"}
    assert set(missing) == {"figure1", "gains in figure2", "figure3", "gain-against-memorisation"}
    assert BASELINE in missing["gains in figure2"]
    assert len(figures.accuracy_and_gain(*summed_up(tmp_path)).axes) == 1


def test_baseline_alone(tmp_path):
    write(tmp_path, [BASELINE], noises=(0.0, 0.4, 0.8))
    drawn, missing = reasons(tmp_path)
    assert drawn == {"figure2", "memorisation"}
    assert "gains in figure2" in missing


# Files.


def test_the_same_runs_give_the_same_bytes(tmp_path):
    write(tmp_path, [BASELINE, QUANT, "quant-w2a2"], noises=(0.0, 0.4, 0.8), seeds=(0, 1, 2))
    for out in ("first", "second"):
        report.COMMANDS["figures"](tmp_path, tmp_path / out)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len([name for name in files if name.endswith(".svg")]) == 5
    for name in files:
        first, second = ((tmp_path / out / name).read_bytes() for out in ("first", "second"))
        assert first == second, name
        assert b"<dc:date>" not in first


def test_committed_figures_are_there_as_svg_too():
    pictures = list(ROOT.glob("results/*/report/*.png"))
    assert pictures
    for path in pictures:
        assert path.with_suffix(".svg").stat().st_size < 300_000
        assert f"]({path.name})" in path.with_name("report.md").read_text()


def test_long_titles_are_cut_in_figures():
    assert drawing.short("digits, without augmentation") == "digits, without augmentation"
    assert len(drawing.short("x" * 4000)) == 200


def test_figure_too_large_for_an_image_is_drawn_with_fewer_points(tmp_path):
    figure, _ = drawing.panels(1, rows=1, height=500)
    assert all(path.stat().st_size for path in drawing.save(figure, tmp_path / "high"))


def test_a_figure_is_either_drawn_or_missing(tmp_path):
    drawn = drawing.Drawn(tmp_path)
    drawn.add("one", Figure())
    drawn.add("two", "why")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.png", "one.svg"]
    assert drawn.missing == ["two: why"]
