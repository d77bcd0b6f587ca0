"""How test accuracy grows with the number `n` of training images: `a + b log n`, as Sun et al. 2017
(arXiv 1707.02968) find it to."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import linregress

from experiments.reporting import escaping
from experiments.reporting.comparison import quantile
from experiments.reporting.drawing import (
    PERCENT,
    Drawn,
    Style,
    handle,
    legend,
    panels,
    percent,
    short,
    styles,
)
from experiments.reporting.runs import Study, titles
from experiments.reporting.tables import cell, markdown
from experiments.terminal import amount

_SIZE = "train_size"
_FEWEST = 3  # sizes: a line goes through any two points


@dataclass(frozen=True)
class Line:
    """The least squares fit to the runs of one label and noise, each of which counts alike."""

    label: str
    noise: float | None
    sizes: Sequence[int]
    """Of each run."""
    accuracies: Sequence[float]
    a: float
    b: float
    b_half_width: float
    """Half of its 95 % confidence interval."""
    r_squared: float

    @classmethod
    def through(
        cls, label: str, noise: float | None, sizes: Sequence[int], accuracies: Sequence[float]
    ) -> "Line":
        fit = linregress(np.log(sizes), accuracies)
        half_width = fit.stderr * quantile(len(sizes) - 2)
        b, a = float(fit.slope), float(fit.intercept)
        return cls(label, noise, sizes, accuracies, a, b, float(half_width), float(fit.rvalue**2))


def over_sizes(studies: Iterable[Study]) -> list[tuple[str, list[Line]]]:
    """Of the studies that differ only in the number of training images, taken together, the title
    and a line for each label and noise with enough sizes.

    Studies on all images are left out: their files do not tell how many those are.
    """
    return [(title, lines) for title, _, lines in _with_studies(studies)]


def _with_studies(studies: Iterable[Study]) -> list[tuple[str, Study, list[Line]]]:
    """The same, with the runs of all sizes in one study."""
    groups = defaultdict(list)
    for study in studies:
        if study.setup.get(_SIZE) is not None:
            # The checksum is that of the subset.
            same = {k: v for k, v in study.setup.items() if k not in (_SIZE, "data")}
            groups[repr(sorted(same.items()))].append((same, study))
    found = []
    for members in groups.values():
        sizes = {study.setup[_SIZE] for _, study in members}
        if len(sizes) == len(members):  # else there are several versions of the data
            together = Study(members[0][0], [run for _, study in members for run in study.runs])
            if lines := _lines(together):
                found.append((together, lines))
    names = titles([study for study, _ in found])
    return [(name, *both) for name, both in zip(names, found, strict=True)]


def _lines(study: Study) -> list[Line]:
    points = defaultdict(list)
    for run in study.runs:
        points[run.noise, run.label].append((run.setup[_SIZE], run.measured["test_accuracy"]))
    return [
        Line.through(label, noise, *zip(*sorted(points[noise, label]), strict=True))
        for noise in study.noises
        for label in study.labels
        if len({size for size, _ in points[noise, label]}) >= _FEWEST
    ]


def sections(studies: Iterable[Study]) -> list[str]:
    """A table for each title."""
    return [
        "\n\n".join(
            [
                f"## Accuracy over the number of training images: {escaping.markdown(title)}",
                "Test accuracy = a + b log n, the least squares fit to all runs (log is the "
                "natural one); b with half a 95 % confidence interval.",
                _table(lines),
            ]
        )
        for title, lines in over_sizes(studies)
    ]


def _table(lines: Sequence[Line]) -> str:
    header = ["", "noise", "n", "runs", "a, %", "b, points", "points a doubling of n", "R²"]
    return markdown(
        header,
        [
            [
                line.label,
                f"{line.noise:g}",
                ", ".join(map(str, sorted(set(line.sizes)))),
                str(len(line.sizes)),
                cell(line.a, ".1f", PERCENT),
                cell(line.b, "+.2f", PERCENT, line.b_half_width),
                cell(line.b * np.log(2), "+.2f", PERCENT),
                cell(line.r_squared, ".3f"),
            ]
            for line in lines
        ],
    )


def draw(studies: Iterable[Study], drawn: Drawn) -> None:
    """A figure for each title."""
    found = _with_studies(studies)
    for number, (title, study, lines) in enumerate(found, 1):
        figure = growth(lines)
        epochs = amount(study.setup["epochs"], "epoch")
        trained = f"{study.setup.get('model', 'resnet20')}, {epochs}"
        figure.suptitle(f"{short(title)}\n{trained}", fontsize="medium")
        suffix = f"-{number}" if len(found) > 1 else ""
        drawn.add(f"data-size{suffix}", figure)


def growth(lines: Sequence[Line]) -> Figure:
    """Each run, and the fits; a panel for each noise."""
    noises = sorted({line.noise for line in lines}, key=percent)
    shown = styles(dict.fromkeys(line.label for line in lines))
    figure, (axes,) = panels(len(noises))
    for axis, noise in zip(axes, noises, strict=True):
        for line in lines:
            if line.noise == noise:
                _draw(axis, line, shown[line.label])
        sizes = sorted({size for line in lines for size in line.sizes})
        axis.set_xscale("log")
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
        axis.set_title(f"{percent(noise):g} % noise")
        axis.set(xlabel="training images", ylabel="test accuracy, %")
    handles = []
    for label, style in shown.items():
        counts = [len(line.sizes) for line in lines if line.label == label]
        handles.append(handle(label, counts, style))
    legend(figure, handles)
    return figure


def _draw(axis: Axes, line: Line, style: Style) -> None:
    ends = np.array([min(line.sizes), max(line.sizes)])
    fitted = PERCENT * (line.a + line.b * np.log(ends))
    accuracies = PERCENT * np.array(line.accuracies)
    axis.scatter(line.sizes, accuracies, s=12, color=style.color, marker=style.marker)
    axis.plot(ends, fitted, color=style.color, linestyle=style.linestyle)
