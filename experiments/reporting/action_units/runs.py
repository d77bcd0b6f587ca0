"""The runs on action units, and which of them can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.data.au import AU_DATASETS, SYNTHETIC
from experiments.reporting.runs import FinishedRun, Study, name_seeds

SCORES = ("test_f1", "test_f1_chosen", "test_f1_truth", "test_f1_truth_chosen")
"""Averages over the AUs: against the annotators or the truth, at probability 0.5 or at thresholds
chosen on held-out training subjects."""


@dataclass(frozen=True)
class ActionUnitRun(FinishedRun):
    """What a run on action units wrote."""

    MEASURED: ClassVar[tuple[str, ...]] = (
        "wrong_labels",
        *SCORES,
        "validation_f1",
        "train_f1",
        "test_loss",
        "train_right_fitted",
        "train_wrong_fitted",
        "epoch_chosen",
        "epochs_trained",
        "parameters",
        "size_in_bits",
        "macs",
    )
    VARIED: ClassVar[set[str]] = FinishedRun.VARIED | {"fold", "au_norm"}

    @staticmethod
    def is_on(dataset: str | None) -> bool:
        return dataset in AU_DATASETS

    @property
    def label(self) -> str:
        """The methods and their settings, and the norm of the head where it is not the usual."""
        norm = self.option("au_norm")
        return super().label + ("" if norm in (None, "per-au") else f", norm {norm}")

    @property
    def noise(self) -> float | None:
        """How far drawn faces' annotators disagree; None where people were the annotators."""
        return self.option("noise")

    @property
    def coordinates(self) -> dict[str, Any]:
        return super().coordinates | {"fold": self.option("fold")}

    @property
    def setup(self) -> dict[str, Any]:
        setup = super().setup
        if self.option("dataset") == SYNTHETIC:
            del setup["data"]  # other labels have another checksum; the options tell the pictures
        return setup

    def measured(self) -> dict[str, float | None]:
        """The numbers that are compared, those of single AUs as in `of_au`."""
        single = {
            of_au(score, au): self.number(of_au(score, au), value)
            for score in SCORES
            for au, value in (self.of_result(f"{score}_per_au") or {}).items()
        }
        return super().measured() | single


def of_au(score: str, au: int | str) -> str:
    """The name of an average over the AUs, for one of them."""
    return f"{score}_au{au}"


@dataclass(frozen=True)
class ActionUnitStudy(Study):
    """Finished runs that differ in method, norm, noise, seed and fold only."""

    @property
    def folds(self) -> list[int]:
        """Those that any run has, ascending."""
        return sorted({run.option("fold") for run in self.runs})

    @property
    def aus(self) -> list[int]:
        """Ascending."""
        return sorted(map(int, self.runs[0].of_result(f"{SCORES[0]}_per_au")))

    @property
    def noise_varies(self) -> bool:
        return len(self.noises) > 1

    def drawn_differently(self) -> bool:
        """Whether data differ where noise and its seed are the same."""
        data: dict[tuple[float | None, int], str] = {}
        return any(data.setdefault((r.noise, r.seeds[1]), r.data) != r.data for r in self.runs)

    def missing(self) -> list[str]:
        """What lacks for every method to have every noise, seed and fold that any has."""
        there = {(run.label, run.noise, run.seeds, run.option("fold")) for run in self.runs}
        lines = []
        for label in self.labels:
            for noise in self.noises:
                at = f", noise {noise:g}" if self.noise_varies else ""
                for seeds in self.seeds:
                    lacking = [f for f in self.folds if (label, noise, seeds, f) not in there]
                    if lacking:
                        folds = ", ".join(map(str, lacking))
                        lines.append(f"{label}{at}, {name_seeds(*seeds)}: fold {folds}")
        return lines
