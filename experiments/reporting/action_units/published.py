"""Table 1 of arXiv 2303.11803 as published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from experiments.methods import BASELINE
from experiments.reporting.action_units.runs import SCORES, ActionUnitStudy
from experiments.reporting.runs import defaults

PAPER = Path(__file__).parents[1] / "paper_table1.csv"
AVERAGE = "average"
AS_PUBLISHED = SCORES[0]
"""The score of the published figures: against the annotators, at probability 0.5."""


@dataclass(frozen=True)
class Published:
    """F1 on BP4D in percent, of each method at its defaults."""

    f1: dict[str, dict[str, float]]
    """By the method's label, and then by AU or `AVERAGE`."""

    @classmethod
    def of(cls, study: ActionUnitStudy) -> Published | None:
        """None where the study has other AUs."""
        table = pl.read_csv(PAPER, comment_prefix="#")
        if table.columns[1:] != [*map(str, study.aus), AVERAGE]:
            return None
        labels = defaults()
        rows = {row.pop("method"): row for row in table.to_dicts()}
        return cls({labels[name]: row for name, row in rows.items() if name in labels})

    def gain(self, label: str, column: int | str = AVERAGE) -> float | None:
        """Points over the baseline of an AU or the average; None where nothing is published."""
        if label not in self.f1:
            return None
        return self.f1[label][str(column)] - self.f1[BASELINE][str(column)]
