"""What the epochs of a run gave."""

from dataclasses import asdict, dataclass
from typing import Any

from experiments.reporting.reading import COUNT, FINITE, POSITIVE, SHARE


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch.

    Scores on trained samples are of the batches as they were trained. The test set is evaluated in
    some epochs only; what was not measured is None.
    """

    epoch: int
    loss: float
    scores: dict[str, float | None]
    validation_score: float | None
    """The one of `scores` by which epochs are compared."""
    learning_rate: float
    seconds: float

    def flat(self) -> dict[str, float | None]:
        """All numbers by name."""
        flat = asdict(self)
        del flat["scores"], flat["validation_score"]
        return {"epoch": self.epoch, "loss": self.loss} | self.scores | flat


def read_history(saved: list[dict[str, Any]], epochs: int, score: str) -> list[EpochMetrics]:
    """The epochs so far, out of `epochs`, from their `asdict`; raises an error where they are no
    such thing. `score` is the one by which they are compared."""
    history = [EpochMetrics(**metrics) for metrics in saved]
    numbers = [metrics.epoch for metrics in history]
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) > epochs:
        raise ValueError(f"has the epochs {numbers}, takes 1, 2 and so on up to {epochs}")
    for metrics in history:
        where = f"in epoch {metrics.epoch}"
        optional = metrics.scores
        kinds = {"epoch": COUNT, "seconds": POSITIVE}
        kinds |= dict.fromkeys((f"validation_{score}", f"test_{score}"), SHARE)
        for name, value in metrics.flat().items():
            kind = kinds.get(name, FINITE)
            kind = kind.or_null if name in optional else kind
            if not kind.accepts(value):
                raise ValueError(f"{name} is {value!r:.100} {where}, takes {kind.takes}")
        if optional[f"validation_{score}"] != metrics.validation_score:
            raise ValueError(f"has two scores on held-out samples {where}")
        if f"test_{score}" not in optional or optional.keys() != history[0].scores.keys():
            raise ValueError(f"has other scores {where}")
    return history
