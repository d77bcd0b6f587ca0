"""Universally slimmable networks (Yu and Huang 2019, arXiv 1903.05134)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.checks import flag, require, require_whole
from experiments.methods.method import Method
from experiments.methods.slimmable import NOT_WITH, WIDTHS, ManyWidths, require_widths
from experiments.methods.swa import measure_anew_
from experiments.models.slimmable import make_slimmable_, set_width, statistics
from experiments.seeds import WIDTHS_OF_STEPS, mixed
from experiments.training.procedure import Parts, Passes, Procedure

_IMAGES_MEASURED = 5120


@dataclass(frozen=True)
class UniversallySlimmable(Method):
    """One network that computes at any width from a least one, each with the first channels of
    every layer. A step adds up the gradients of the widest, the narrowest and some at random (the
    sandwich rule). The widest learns from labels, the others from its probabilities.

    All widths share the scale and shift of batch norms, and what quantizers learn. Running
    statistics, and with quant ranges of activations, are measured after training for each width
    that is evaluated, as the mean over batches of 5,120 training images. The run is judged at width
    1; its result has the scores, size and work of every evaluated width under "by_width". The
    channels of ResNet-20's shortcuts are in another order: the first stay first. Other than in the
    paper, the optimizer is Adam. As many forward and backward passes a sample as a step has widths,
    of which the narrow ones cost less.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"us_least_width": 0.25}
    REPLACES: ClassVar[str] = "procedure"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    NOT_WITH: ClassVar[Mapping[str, str]] = NOT_WITH

    us_least_width: float | None = None
    """The least width, above 0 and below 1."""

    us_widths: int = 4
    """How many widths a step has, the widest and the narrowest among them."""

    us_evaluated: tuple[float, ...] = WIDTHS
    """The widths that are evaluated, none below the least and 1 among them."""

    us_divisor: int = 4
    """Channels come in multiples of it. 8, as in the authors' code, makes widths of the 16 channels
    of ResNet-20 coincide."""

    def __post_init__(self) -> None:
        least = self.us_least_width
        require("us_least_width", least, least is None or 0 < least < 1, "0 to 1, both excluded")
        require_whole("us_widths", self.us_widths, 2, 64)
        require_widths("us_evaluated", self.us_evaluated)
        narrow = min(self.us_evaluated)
        takes = f"widths from --us-least-width {least} on"
        require("us_evaluated", f"{narrow:g}", least is None or narrow >= least, takes)
        require_whole("us_divisor", self.us_divisor, 1, 64)

    @property
    def label(self) -> str:
        parts = ["us-slimmable"]
        if self.us_least_width != 0.25:
            parts.append(f"from{self.us_least_width:g}")
        if self.us_widths != 4:
            parts.append(f"of{self.us_widths}")
        if sorted(self.us_evaluated) != list(WIDTHS):
            parts += [f"{width:g}" for width in sorted(self.us_evaluated)]
        if self.us_divisor != 4:
            parts.append(f"by{self.us_divisor}")
        return "-".join(parts)

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        measured = {*self.us_evaluated, self.us_least_width}
        return make_slimmable_(
            model, sorted(measured), example, private=False, divisor=self.us_divisor
        )

    def evaluation_options(self) -> dict[str, Any]:
        return {
            "us_least_width": self.us_least_width,
            "us_evaluated": sorted(self.us_evaluated),
            "us_divisor": self.us_divisor,
        }

    def procedure(self, parts: Parts) -> Procedure:
        for option in ("cuda_graph", "compile"):
            if getattr(parts.config, option):
                raise ValueError(
                    f"{flag(option)}: got it with us_slimmable, whose widths differ from step to "
                    "step; leave one of them out"
                )
        return Sandwich(parts, self.us_evaluated, self.us_least_width, self.us_widths)


class Sandwich(ManyWidths):
    """The widest, the narrowest and some widths at random, which every process draws alike."""

    def __init__(self, parts: Parts, widths: Sequence[float], least: float, count: int) -> None:
        self.generator = torch.Generator()
        self.least = least
        self.count = count
        super().__init__(parts, widths, distils=True)

    def begin_epoch(self, epoch: int) -> Passes:
        self.generator.manual_seed(mixed(self.parts.config.seed, WIDTHS_OF_STEPS, epoch))
        return super().begin_epoch(epoch)

    def widths_of_step(self) -> list[float]:
        drawn = torch.rand(self.count - 2, generator=self.generator, dtype=torch.float64)
        return [1.0, self.least, *(self.least + (1 - self.least) * drawn).tolist()]

    def finish(self) -> list[str]:
        """Measures the statistics of each width before it is evaluated."""
        (network,) = self.networks
        torch.manual_seed(self.parts.config.seed)  # of dropout, whatever was trained before
        count = -(-_IMAGES_MEASURED // self.parts.config.batch_size)
        for width in self.widths:
            set_width(network, width)
            batches = self.parts.batches(epoch=0)
            inputs = (
                (size, self.parts.task.pair(*batch)[0])
                for _, (size, _, batch) in zip(range(count), batches, strict=False)
            )
            with self.parts.autocast():
                measure_anew_(network, inputs, statistics(network))
        set_width(network, 1)
        return []
