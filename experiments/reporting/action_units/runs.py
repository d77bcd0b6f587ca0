"""The runs on action units, and which of them can be compared."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from experiments.data.au import SYNTHETIC
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.options import require_type
from experiments.reporting.reading import COUNT, FINITE, POSITIVE, SHARE, Fields, Number, shown
from experiments.reporting.runs import Study, name_seeds

SCORES = ("test_f1", "test_f1_chosen", "test_f1_truth", "test_f1_truth_chosen")
"""Averages over the AUs: against the annotators or the truth, at probability 0.5 or at thresholds
chosen on held-out training subjects."""
_FOLD = Number(1, 3, "1, 2 or 3", whole=True)


@dataclass(frozen=True)
class ActionUnitRun(FinishedRun):
    """What a run on action units wrote."""

    fold: int
    aus: tuple[int, ...]
    """Ascending."""

    MEASURED: ClassVar[dict[str, Number]] = {
        "wrong_labels": SHARE.or_null,
        "test_f1": SHARE,
        "test_f1_chosen": SHARE,
        "test_f1_truth": SHARE.or_null,
        "test_f1_truth_chosen": SHARE.or_null,
        "validation_f1": SHARE,
        "train_f1": SHARE,
        "test_loss": POSITIVE,
        "train_right_fitted": SHARE.or_null,
        "train_wrong_fitted": SHARE.or_null,
        "epoch_chosen": COUNT,
        "epochs_trained": COUNT,
        "forward_passes": POSITIVE,
        "backward_passes": POSITIVE,
        "parameters": COUNT,
        "size_in_bits": COUNT,
        "macs": COUNT,
        "additions": COUNT.or_null,
        "lookups": COUNT.or_null,
    }
    BY_EPOCH: ClassVar[dict[str, Number]] = {"loss": FINITE}
    VARIED: ClassVar[set[str]] = FinishedRun.VARIED | {"fold", "au_norm"}

    TASK: ClassVar[str] = "action_units"

    @property
    def coordinates(self) -> dict[str, Any]:
        return super().coordinates | {"fold": self.fold}

    @property
    def study(self) -> Hashable:
        return super().study, self.aus

    @classmethod
    def _checked(cls, config: Fields, result: Fields) -> dict[str, Any]:
        checked = super()._checked(config, result)
        config.text("encoder")
        last = checked["measured"]["epochs_trained"]
        chosen = checked["measured"]["epoch_chosen"]
        result.require("epoch_chosen", chosen <= last, f"at most {last}, the epochs trained")
        aus = _aus(result.object(f"{SCORES[0]}_per_au"))
        checked["measured"] |= {
            of_au(score, au): value
            for score in SCORES
            for au, value in _by_au(result, score, aus).items()
        }
        checked["label"] += cls._norm(config)
        if checked["setup"]["dataset"] == SYNTHETIC:
            # Other labels have another checksum; the options tell the pictures.
            del checked["setup"]["data"]
        return checked | {"fold": config.number("fold", _FOLD), "aus": aus}

    @staticmethod
    def _norm(config: Fields) -> str:
        """The norm of the head where it is not the usual, as it stands in a label."""
        require_type(config, "au_norm")
        norm = config.content["au_norm"]
        return "" if norm in (None, "per-au") else f", norm {norm}"

    @classmethod
    def _noise(cls, config: Fields, measured: dict[str, float | None]) -> float | None:
        """How far drawn faces' annotators disagree; None where people were the annotators."""
        if config.content["dataset"] == SYNTHETIC:
            return config.number("noise", POSITIVE)
        config.require("noise", config.value("noise") is None, "null for filmed faces")
        return None


def _aus(by_au: Fields) -> tuple[int, ...]:
    """The action units that have a score."""
    accepted = all(re.fullmatch("[1-9][0-9]?", au) for au in by_au.content)
    if not accepted or not by_au.content:
        raise ValueError(f"{by_au.place}: got {shown(list(by_au.content))}, takes numbers of AUs")
    return tuple(sorted(map(int, by_au.content)))


def _by_au(result: Fields, score: str, aus: tuple[int, ...]) -> dict[int, float | None]:
    """A score of each action unit; None where it was not measured on average either."""
    name = f"{score}_per_au"
    if result.content[score] is None:
        result.require(name, result.value(name) is None, f"null, like {score}")
        return dict.fromkeys(aus)
    by_au = result.object(name)
    if _aus(by_au) != aus:
        got = shown(list(by_au.content))
        raise ValueError(f"{by_au.place}: got {got}, takes the AUs of {SCORES[0]}_per_au")
    return {au: by_au.number(str(au), SHARE) for au in aus}


def of_au(score: str, au: int | str) -> str:
    """The name of an average over the AUs, for one of them."""
    return f"{score}_au{au}"


@dataclass(frozen=True)
class ActionUnitStudy(Study[ActionUnitRun]):
    """Finished runs that differ in method, norm, noise, seed and fold only."""

    @property
    def folds(self) -> list[int]:
        """Those that any run has, ascending."""
        return sorted({run.fold for run in self.runs})

    @property
    def aus(self) -> list[int]:
        """Ascending."""
        return list(self.runs[0].aus)

    @property
    def noise_varies(self) -> bool:
        return len(self.noises) > 1

    def drawn_differently(self) -> bool:
        """Whether data differ where noise and its seed are the same."""
        data: dict[tuple[float | None, int], str] = {}
        return any(data.setdefault((r.noise, r.seeds[1]), r.data) != r.data for r in self.runs)

    def missing(self) -> list[str]:
        """What lacks for every method to have every noise, seed and fold that any has."""
        there = {(run.label, run.noise, run.seeds, run.fold) for run in self.runs}
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
