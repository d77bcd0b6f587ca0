"""Self-training with noisy student (Xie et al. 2020, arXiv 1911.04252)."""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.checks import require, require_choice, require_whole
from experiments.methods.method import Method
from experiments.training.finite import require_finite
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult
from experiments.training.schedules import SCHEDULES, phases

Form = Literal["soft", "hard"]


@dataclass(frozen=True)
class NoisyStudent(Method):
    """A network is trained, and tells what it sees on the training images, without augmentation
    and in evaluation mode; then a new one, with other initial weights, is trained on that beside
    the given labels, and is the teacher of the next.

    There are no unlabelled images here, so that the teacher labels the training images anew. Where
    its confidence is above a threshold, the student's label is the mean of both, as labels and
    pseudo labels count alike in the paper, or else the given one alone. The noise is the
    augmentation of the run, and with --dropout dropout: no stochastic depth, no RandAugment. The
    student is as large as the teacher. Classes are not balanced. Teacher and students share
    --epochs in equal parts, each with the whole schedule; with fewer epochs than networks, there
    are as many networks as epochs. The threshold of 0.3 is unverified.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"students": 3}
    REPLACES: ClassVar[str] = "procedure"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "prune": "whose network would have to be pruned anew for each student",
        "early_stopping": "which can end the run before its last student",
        **dict.fromkeys(("label_smoothing", "gce"), "which takes labels of a single class"),
    }

    students: int | None = None
    """How many students follow each other."""

    student_confidence: float = 0.3
    """The teacher's least probability of a class for its label to count, from 0; above 1, none
    does."""

    student_given: float = 0.5
    """The share of the given label in the student's, from 0 to 1."""

    student_labels: Form = "soft"
    """The teacher's probabilities, or its most probable class (hard)."""

    def __post_init__(self) -> None:
        require_whole("students", self.students, 1, 1000)
        confidence, share = self.student_confidence, self.student_given
        accepted = 0 <= confidence < math.inf
        require("student_confidence", confidence, accepted, "a finite number from 0")
        require("student_given", share, 0 <= share <= 1, "a share from 0 to 1")
        require_choice("student_labels", self.student_labels, get_args(Form))

    @property
    def label(self) -> str:
        parts = [f"noisy-student{self.students}"]
        if self.student_confidence != 0.3:
            parts.append(f"above{self.student_confidence:g}")
        if self.student_given != 0.5:
            parts.append(f"given{self.student_given:g}")
        if self.student_labels != "soft":
            parts.append(self.student_labels)
        return "-".join(parts)

    def procedure(self, parts: Parts) -> Procedure:
        return Students(parts, self)


class Students(Procedure):
    """One network at a time; `targets` are what the one before makes of the labels, None where
    those are as they were given."""

    CHANGES: ClassVar[bool] = True

    def __init__(self, parts: Parts, options: NoisyStudent) -> None:
        super().__init__(parts)
        self.options = options
        epochs = parts.config.epochs
        self.starts = phases(epochs, [1] * min(options.students + 1, epochs))
        self.targets: Tensor | None = None

    def schedule(self, epoch: int, step: int) -> float:
        config = self.parts.config
        number = bisect_right(self.starts, epoch) - 1
        start, end = [*self.starts, config.epochs][number : number + 2]
        return SCHEDULES[config.schedule](epoch - start, end - start)

    def begin_epoch(self, epoch: int) -> Passes:
        number = self.starts.index(epoch) if epoch in self.starts else 0
        if number > 0:
            self._next(number)
        taken = super().begin_epoch(epoch)
        return taken._replace(forward=taken.forward + (number > 0))

    def _next(self, number: int) -> None:
        """The network becomes the teacher of the next one."""
        (network,) = self.networks
        network.eval()
        logits = self.parts.logits(network, "trained")
        self.targets = targets(logits, self.parts.task.labels("trained"), self.options)
        devices = [logits.device] if logits.is_cuda else []
        with torch.random.fork_rng(devices):
            student = self.parts.network(number)
        network.load_state_dict(student.state_dict())
        self.losses[0] = self.parts.loss(network)
        self.prepare()

    def step(self, batch: Batch) -> StepResult:
        if self.targets is not None:
            batch = replace(batch, labels=self.targets[batch.indices])
        return super().step(batch)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.targets is None else {"targets": self.targets}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        others = dict(state)
        targets = others.pop("targets", None)
        super().load_state_dict(others)
        if targets is not None:
            given = self.parts.task.labels("trained")
            if targets.ndim != 2 or len(targets) != len(given):
                raise ValueError(
                    f"targets: got shape {list(targets.shape)} for {len(given)} labels"
                )
            require_finite([("targets", targets)], "in the checkpoint")
            self.targets = targets.to(given.device)


def targets(logits: Tensor, given: Tensor, options: NoisyStudent) -> Tensor | None:
    """What a student learns, `[N, C]`, from the teacher's logits and the given classes; None if the
    teacher is sure of nothing."""
    probabilities = logits.softmax(1)
    confidence, best = probabilities.max(1)
    sure = confidence > options.student_confidence
    if not sure.any():
        return None
    label = F.one_hot(given, logits.shape[1]).to(logits.dtype)
    told = probabilities
    if options.student_labels == "hard":
        told = F.one_hot(best, logits.shape[1]).to(logits.dtype)
    mean = options.student_given * label + (1 - options.student_given) * told
    return torch.where(sure.unsqueeze(1), mean, label)
