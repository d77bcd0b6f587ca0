"""Stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.checks import require
from experiments.methods.method import Method
from experiments.training.procedure import Parts, Passes, Procedure, copied, fitting
from noisyq_fast import MovingAbsMax


@dataclass(frozen=True)
class SWA(Method):
    """Averages the weights at the end of every epoch from a certain one on, and is judged by the
    average. The statistics of batch norm and the ranges of activations are measured anew for it, in
    another forward pass over the training images, augmented as in the epoch before.

    The rate has a schedule of its own, whatever --schedule says: --lr until half of the start,
    then down along a line to --swa-lr at nine tenths of it. With quant, the float weights are
    averaged, and then quantized. Other than in the paper, the optimizer is Adam.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"swa_start": 0.84}
    REPLACES: ClassVar[str] = "procedure"
    NOT_WITH: ClassVar[Mapping[str, str]] = {"prune": "which leaves weights of several shapes"}

    swa_start: float | None = None
    """The share of the epochs after which averaging begins, above 0 and up to 1 (0.84, as after
    epoch 126 of 150)."""

    swa_lr: float = 0.1
    """The learning rate while weights are averaged, as a share of --lr, above 0."""

    def __post_init__(self) -> None:
        start, lr = self.swa_start, self.swa_lr
        require("swa_start", start, start is None or 0 < start <= 1, "a share above 0, up to 1")
        require("swa_lr", lr, 0 < lr <= 1000, "a number above 0, up to 1,000")

    @property
    def label(self) -> str:
        return f"swa{self.swa_start:g}" + ("" if self.swa_lr == 0.1 else f"-lr{self.swa_lr:g}")

    def procedure(self, parts: Parts) -> Procedure:
        return Averaging(parts, self.swa_start, self.swa_lr)


class Averaging(Procedure):
    """Between epochs the network has the averaged weights, and within them those that are trained;
    `other` are the ones that it has not."""

    def __init__(self, parts: Parts, start: float, lr: float) -> None:
        super().__init__(parts)
        self.start = max(1, round(start * parts.config.epochs))
        self.lr = lr
        self.other: dict[str, Tensor] | None = None

    def schedule(self, epoch: int, step: int) -> float:
        return swa_rate(epoch, self.start, self.lr)

    def begin_epoch(self, epoch: int) -> Passes:
        if self.other is not None:
            average = copied(self.networks[0])
            self.networks[0].load_state_dict(self.other)
            self.other = average
        return super().begin_epoch(epoch)

    def end_epoch(self, epoch: int) -> Passes:
        count = epoch + 1 - self.start
        if count < 0:
            return Passes(0, 0)
        (network,) = self.networks
        average, self.other = self.other, copied(network)
        if average is not None:
            with torch.no_grad():
                for name, weight in network.named_parameters():
                    weight.copy_(averaged_with(average[name], weight, count))
        batches = self.parts.batches(epoch)
        with self.parts.autocast():
            pairs = ((size, self.parts.task.pair(*batch)[0]) for size, _, batch in batches)
            measure_anew_(network, pairs)
        return Passes(1, 0)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.other is None else {"trained": self.other}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        others = dict(state)
        trained = others.pop("trained", None)
        super().load_state_dict(others)
        self.other = None if trained is None else fitting(trained, self.networks[0])


def swa_rate(epoch: int, start: int, lr: float) -> float:
    """The factor of the learning rate in `epoch`, counted from 0."""
    fallen = (epoch / start - 0.5) / 0.4
    return 1 + (lr - 1) * min(max(fallen, 0), 1)


def averaged_with(average: Tensor, weight: Tensor, count: int) -> Tensor:
    """The average of `count` weights and another one."""
    return average + (weight - average) / (count + 1)


@torch.no_grad()
def measure_anew_(
    model: nn.Module,
    batches: Iterable[tuple[int, Tensor]],
    among: Iterable[nn.Module] | None = None,
) -> None:
    """Sets what batch norms and quantizers know of their input to the mean over batches, each with
    its size as the weight. Of several processes, `batches` are the size of all and an own part.
    If `among` is given, only of these modules."""
    modules = list(model.modules() if among is None else among)
    norms = [module for module in modules if isinstance(module, _BatchNorm)]
    ranges = [module for module in modules if isinstance(module, MovingAbsMax)]
    for norm in norms:
        norm.reset_running_stats()
    for quantizer in ranges:
        quantizer.reset()
    # The attributes that are the weight of a batch.
    places: list[tuple[nn.Module, str]] = [(norm, "momentum") for norm in norms]
    places += [(quantizer, "averaging_constant") for quantizer in ranges]
    before = [getattr(*place) for place in places]
    model.train()
    seen = 0
    for size, inputs in batches:
        seen += size
        for place in places:
            setattr(*place, size / seen)
        model(inputs)
    for place, value in zip(places, before, strict=True):
        setattr(*place, value)
