"""Quantization-aware knowledge distillation (Kim et al. 2019, arXiv 1911.12491)."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.checks import require
from experiments.losses import imitation
from experiments.methods.method import Method
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult
from experiments.training.schedules import phases

_SHARES = (30, 100, 70)
_SELF_STUDYING, _CO_STUDYING, _TUTORING = range(3)


@dataclass(frozen=True)
class QKD(Method):
    """A float network teaches the one that is tested and kept, in three phases: both learn from the
    labels alone; then each also imitates the other; then the teacher stays as it is, in evaluation
    mode, and the student goes on.

    With quant, or a quantizer that learns, the student is quantized and the teacher is not, or else
    both are float. The loss is that of the run, and `T^2 KL(p_other || p_own)` with probabilities
    at temperature T. The paper's quantizer learns its intervals: --qil-bits. The phases share
    --epochs as 30, 100 and 70 of 200, at least one each. The teacher, which is trained beforehand
    in the paper, learns during the first phase; it has the student's size, where the paper's may be
    larger (unverified), other initial weights, and all other methods of the run. One optimizer,
    Adam, and one schedule last for all phases. Two forward passes a sample and two backward, one in
    the last phase.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"qkd_temperature": 2.0}
    REPLACES: ClassVar[str] = "procedure"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    LEAST_EPOCHS: ClassVar[int] = len(_SHARES)
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "prune": "which would prune the teacher too",
        "early_stopping": "which can end the run before its last phase",
    }

    qkd_temperature: float | None = None
    """The temperature T of what is imitated, above 0."""

    def __post_init__(self) -> None:
        t = self.qkd_temperature
        require("qkd_temperature", t, t is None or 0 < t <= 1000, "a number above 0, up to 1,000")

    @property
    def label(self) -> str:
        return "qkd" if self.qkd_temperature == 2 else f"qkd-t{self.qkd_temperature:g}"

    def procedure(self, parts: Parts) -> Procedure:
        return Distillation(parts, self.qkd_temperature)


class Distillation(Procedure):
    """The student, and then the teacher."""

    NETWORKS: ClassVar[int] = 2
    PASSES: Passes = Passes(2, 1)
    CHANGES: ClassVar[bool] = True

    def __init__(self, parts: Parts, temperature: float) -> None:
        super().__init__(parts)
        self.temperature = temperature
        self.phase = _SELF_STUDYING

    def network(self, number: int) -> nn.Module:
        if number == 0:
            return self.parts.network()
        methods = self.parts.methods.items()
        float_only = {n: method for n, method in methods if method.REPLACES != "quantizer"}
        return replace(self.parts, methods=float_only).network(number)

    def begin_epoch(self, epoch: int) -> Passes:
        self.phase = bisect_right(phases(self.parts.config.epochs, _SHARES), epoch) - 1
        return super().begin_epoch(epoch)

    def step(self, batch: Batch) -> StepResult:
        teaches = self.phase == _TUTORING
        self.networks[1].train(not teaches)
        with self.parts.autocast():
            student = self.forwards[0](batch.inputs).float()
            with torch.set_grad_enabled(not teaches):
                teacher = self.forwards[1](batch.inputs).float()
            pairs = [(student, teacher)] if teaches else [(student, teacher), (teacher, student)]
            losses = [self._loss(number, *pair, batch) for number, pair in enumerate(pairs)]
        for number, loss in enumerate(losses):
            self.follow(loss * batch.share, number)
        return StepResult(losses[0].detach(), student.detach())

    def _loss(self, number: int, own: Tensor, other: Tensor, batch: Batch) -> Tensor:
        loss = self.losses[number](own, batch.labels, batch.indices)
        if self.phase == _SELF_STUDYING:
            return loss
        return loss + imitation(own, other, self.temperature)

    def end_epoch(self, epoch: int) -> Passes:
        return Passes(0, self.phase != _TUTORING)
