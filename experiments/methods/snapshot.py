"""Snapshot ensembles (Huang et al. 2017, arXiv 1704.00109)."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from experiments.checks import require_whole
from experiments.methods.method import Method
from experiments.training.procedure import Parts, Passes, Procedure, copied, fitting
from experiments.training.schedules import cosine, phases


@dataclass(frozen=True)
class Snapshot(Method):
    """Lets the learning rate fall from --lr to 0 along a cosine, step by step, several times; the
    networks at the end of each cycle predict together, by the mean of their probabilities.

    The cycles share --epochs: with fewer epochs than cycles, each epoch is one. They have the same
    length where it divides the epochs, as in the paper, or else one epoch more or less. --schedule
    has no effect. Until the first cycle ends, the network itself is judged. Parameters, bits and
    multiplications are reported for all networks of the ensemble, but the weights that the run
    writes are those of its last one. Other than in the paper, the optimizer is Adam.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"snapshots": 5}
    REPLACES: ClassVar[str] = "procedure"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "prune": "which leaves weights of several shapes",
        "early_stopping": "which goes back to a single network",
    }

    snapshots: int | None = None
    """How many cycles, each of which ends with a snapshot."""

    snapshots_used: int | None = None
    """How many of the last snapshots predict, up to --snapshots. If not given: all."""

    def __post_init__(self) -> None:
        require_whole("snapshots", self.snapshots, 1, 1000)
        require_whole("snapshots_used", self.snapshots_used, 1, self.snapshots or 1000)

    @property
    def label(self) -> str:
        used = "" if self.snapshots_used is None else f"-last{self.snapshots_used}"
        return f"snapshot{self.snapshots}{used}"

    def procedure(self, parts: Parts) -> Procedure:
        return SnapshotEnsemble(parts, self.snapshots, self.snapshots_used or self.snapshots)

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str:
        return "scores are of all snapshots together; model.safetensors holds the last network"


class SnapshotEnsemble(Procedure):
    """One network, and copies of it at the end of each cycle."""

    def __init__(self, parts: Parts, cycles: int, used: int) -> None:
        super().__init__(parts)
        epochs = parts.config.epochs
        self.starts = phases(epochs, [1] * min(cycles, epochs))
        self.used = used
        self.snapshots: list[dict[str, Tensor]] = []

    def schedule(self, epoch: int, step: int) -> float:
        steps = len(self.parts.sizes)
        starts = [start * steps for start in self.starts]
        return cyclic_cosine(epoch * steps + step, starts, self.parts.config.epochs * steps)

    def end_epoch(self, epoch: int) -> Passes:
        if epoch + 1 in (*self.starts, self.parts.config.epochs):
            self.snapshots = [*self.snapshots, copied(self.networks[0])][-self.used :]
        return Passes(0, 0)

    @property
    def predicting(self) -> int:
        return max(1, len(self.snapshots))

    def predict(self, inputs: Tensor) -> Tensor:
        (network,) = self.networks
        if not self.snapshots:
            return network(inputs)
        logits = [functional_call(network, snapshot, inputs) for snapshot in self.snapshots]
        return log_mean_softmax(torch.stack(logits).float())

    def state_dict(self) -> dict[str, Any]:
        return {"snapshots": self.snapshots}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        (snapshots,) = state.values()
        self.snapshots = [fitting(weights, self.networks[0]) for weights in snapshots]


def cyclic_cosine(step: int, starts: Sequence[int], end: int) -> float:
    """The factor of the learning rate in a step, counted from 0, of cycles that begin at `starts`,
    the last one of which would end before `end`."""
    cycle = bisect_right(starts, step) - 1
    start, after = [*starts, end][cycle : cycle + 2]
    return cosine(step - start, after - start)


def log_mean_softmax(logits: Tensor) -> Tensor:
    """The logarithm of the mean of the probabilities of networks, from `[M, B, C]` to `[B, C]`."""
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
