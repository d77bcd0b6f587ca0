"""Networks that compute at many widths: AdaBits (Jin et al. 2019, arXiv 1912.09666) and Quantizable
DNNs (Du et al. 2020, arXiv 2004.05284)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import noisyq_fast
from experiments.checks import Choice, require, require_choice, require_whole
from experiments.losses import imitation, total
from experiments.methods.learned import ClippedActivations
from experiments.methods.method import Method
from experiments.training import data_parallel
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult
from noisyq_fast import PACT, SAT, ManyWidths, set_bits, single_width, split_norms_
from noisyq_fast.layers.grouped import PER_GROUP
from noisyq_fast.quantizers.sat import ROUNDINGS
from noisyq_fast.widths import FLOAT

TARGETS = ("labels of float", "labels of all", "chain")


class ManyWidthsMethod(Method):
    """What both share. A subclass has the fields ``NAME_bits``, ``NAME_most``, ``NAME_tested``,
    ``NAME_rounding`` and ``NAME_start``."""

    REPLACES: ClassVar[str | None] = "procedure"
    STARTS_FROM_FLOAT: ClassVar[bool] = True
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    NOT_WITH: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("quant", "lsq", "pact", "qil", "dsq", "aqd"), "which has one width"
    ) | {"prune": "whose filters would be those of one width"}
    NAME: ClassVar[str]
    RESCALES: ClassVar[bool]
    FIRST: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        fewest, most, tested = self._options()
        require_whole(f"{self.NAME}_most", most, 2, 8)
        require_whole(f"{self.NAME}_bits", fewest, 2, most)
        fits = tested is None or tested in self.widths(fewest or most, most)
        require(f"{self.NAME}_tested", tested, fits, "one of the widths that are trained")
        require_choice(f"{self.NAME}_rounding", self.rounding, tuple(ROUNDINGS))
        fits = 0 < self.start <= 1000
        require(f"{self.NAME}_start", self.start, fits, "a number above 0, up to 1,000")

    def _options(self) -> tuple[int | None, int, int | None]:
        return tuple(getattr(self, f"{self.NAME}_{name}") for name in ("bits", "most", "tested"))

    @property
    def rounding(self) -> str:
        return getattr(self, f"{self.NAME}_rounding")

    @property
    def start(self) -> float:
        return getattr(self, f"{self.NAME}_start")

    def widths(self, fewest: int, most: int) -> list[int]:
        return [*self.FIRST, *range(most, fewest - 1, -1)]

    @property
    def trained(self) -> list[int]:
        """The widths, the widest first."""
        return self.widths(*self._options()[:2])

    @property
    def label(self) -> str:
        fewest, most, tested = self._options()
        parts = [f"{self.NAME}{most}-{fewest}"]
        parts += [] if tested is None else [f"at{tested}"]
        parts += [] if self.rounding == "modified" else [self.rounding]
        parts += [] if self.start == 8 else [f"start{self.start:g}"]
        return "-".join(parts)

    @property
    def learned_rate(self) -> float:
        """That of clipping levels, as by pact."""
        return ClippedActivations.pact_rate

    def evaluation_options(self) -> dict[str, Any]:
        rounding = f"{self.NAME}_rounding"
        later = {k: v for k, v in self.without_legacy().items() if k == rounding}
        return {f"{self.NAME}_widths": self.trained} | later

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        weight = SAT(4, rounding=self.rounding, rescale=self.RESCALES)
        noisyq_fast.quantize_model_(
            model,
            weight=ManyWidths(weight, self.trained),
            activation=ManyWidths(PACT(4, start=self.start), self.trained),
            example=example,
            input_ranges=getattr(model, "input_ranges", PER_GROUP),
        )
        return split_norms_(model, self.trained)

    def procedure(self, parts: Parts) -> Procedure:
        _, most, tested = self._options()
        return AtEveryWidth(parts, self.trained, tested or most, self.losses)

    def losses(self, logits: Sequence[Tensor], own: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Of each width, by its logits and those of the widths before it."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdaBits(ManyWidthsMethod):
    """One network for several widths: a step adds up the gradients of the loss at each, with
    batch norms and clipping levels of their own and weights that all share.

    Quantizers are those of pact, with the first and the last layer at 8 bits, where the authors
    take the largest width. The sum makes the gradient as many times larger as there are widths;
    Adam, other than their SGD, takes no notice. The authors start from a trained float network
    (--weights). As many passes a sample as widths. The result has the scores and size of every
    width under "by_width".
    """

    NAME: ClassVar[str] = "adabits"
    RESCALES: ClassVar[bool] = True
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"adabits_bits": 3}
    LEGACY: ClassVar[Mapping[str, Any]] = {"adabits_rounding": "modified", "adabits_start": 8.0}

    adabits_bits: int | None = None
    """The smallest width, 2 to 8 bits."""

    adabits_most: int = 5
    """The largest width."""

    adabits_tested: int | None = None
    """The width by which the run is judged; the largest if it is not given. Those of all are in
    result.json."""

    adabits_rounding: Choice[str, ROUNDINGS] = "modified"
    """Of weights, as by pact: modified, the default of the authors' code, is biased, so that few
    bits learn little in a short training; the authors now recommend centered."""

    adabits_start: float = 8.0
    """Where clipping begins; with few bits and short training a smaller one, such as 3."""

    def losses(self, logits: Sequence[Tensor], own: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return [own(logits[-1])]


@dataclass(frozen=True)
class Quantizable(ManyWidthsMethod):
    """One network for several widths and float, which alone learns from the labels; every width
    imitates it: `KL(p_float || p_width)`.

    Only the abstract of the paper was at hand and there is no code: that no width has labels, the
    weight of the imitation (1), its temperature (1), the widths and the quantizers (those of pact,
    with the rounding of DoReFa-Net and without the scale of weights) are unverified. Batch norms
    and clipping levels belong to a width. As many passes a sample as widths. The result has the
    scores and size of every width under "by_width".
    """

    NAME: ClassVar[str] = "quantizable"
    RESCALES: ClassVar[bool] = False
    FIRST: ClassVar[tuple[int, ...]] = (FLOAT,)
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"quantizable_bits": 2}
    LEGACY: ClassVar[Mapping[str, Any]] = {
        "quantizable_rounding": "modified",
        "quantizable_start": 8.0,
    }

    quantizable_bits: int | None = None
    """The smallest width, 2 to 8 bits."""

    quantizable_most: int = 4
    """The largest width beside float."""

    quantizable_tested: int | None = None
    """The width by which the run is judged, 32 for float; the largest beside that if it is not
    given. Those of all are in result.json."""

    quantizable_targets: Choice[str, TARGETS] = TARGETS[0]
    """What widths learn: labels at float only; labels at all of them too; or in a chain, from the
    next wider one, as in any-precision networks (arXiv 1911.07346)."""

    quantizable_rounding: Choice[str, ROUNDINGS] = "original"
    """Of weights, as by pact. With modified, which is biased, the smaller widths learn next to
    nothing from float."""

    quantizable_start: float = 3.0
    """Where clipping begins."""

    @property
    def label(self) -> str:
        targets = {"labels of all": "-labels", "chain": "-chain"}
        return super().label + targets.get(self.quantizable_targets, "")

    def losses(self, logits: Sequence[Tensor], own: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return consistency(logits, own, self.quantizable_targets)


def consistency(
    logits: Sequence[Tensor], own: Callable[[Tensor], Tensor], targets: str
) -> list[Tensor]:
    """What the last of `logits` adds to the loss of Quantizable DNNs; those of wider ones come
    first. `own` is the loss of labels."""
    *wider, last = logits
    if not wider:
        return [own(last)]
    imitated = wider[-1] if targets == "chain" else wider[0]
    losses = [imitation(last, imitated)]
    return [*losses, own(last)] if targets == "labels of all" else losses


class AtEveryWidth(Procedure):
    """A step that goes through the widths, one after the other."""

    def __init__(
        self,
        parts: Parts,
        widths: Sequence[int],
        tested: int,
        losses: Callable[[Sequence[Tensor], Callable[[Tensor], Tensor]], list[Tensor]],
    ) -> None:
        self.bits = list(widths)
        self.widths = self.bits
        self.tested = tested
        self.losses_of = losses
        self.PASSES = Passes(len(self.widths), len(self.widths))
        super().__init__(parts)
        for network in self.networks:
            _stay_at(network, tested)

    def step(self, batch: Batch) -> StepResult:
        own = partial(self.losses[0], labels=batch.labels, indices=batch.indices)
        seen: list[Tensor] = []
        summed = torch.zeros((), device=batch.inputs.device)
        self.optimizers[0].zero_grad()
        for width in self.bits:
            with set_bits(self.networks[0], width):
                with self.parts.autocast():
                    logits = self.forwards[0](batch.inputs).float()
                    loss = total(self.losses_of([*seen, logits], own))
                (loss * batch.share).backward()
            seen.append(logits.detach())
            summed = summed + loss.detach()
        data_parallel.sum_gradients_(self.networks[0])
        self.optimizers[0].step()
        return StepResult(summed, seen[self.bits.index(self.tested)])

    @contextmanager
    def at_width(self, width: float) -> Iterator[nn.Module]:
        network = self.networks[0]
        with set_bits(network, int(width)):
            yield single_width(network, int(width))


def _stay_at(model: nn.Module, width: int) -> None:
    for module in model.modules():
        set_width = getattr(module, "set_width", None)
        if callable(set_width):
            set_width(width)
