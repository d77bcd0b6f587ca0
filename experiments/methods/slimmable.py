"""Slimmable networks (Yu et al. 2018, arXiv 1812.08928)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from experiments.checks import require, require_whole
from experiments.losses import imitation
from experiments.methods.method import Method
from experiments.models.narrowing import narrowed
from experiments.models.slimmable import make_slimmable_, set_width
from experiments.training import data_parallel
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult

WIDTHS = (0.25, 0.5, 0.75, 1.0)
NOT_WITH = {
    "prune": "which removes channels that other widths share",
    "early_stopping": "which chooses an epoch by one width alone",
}


@dataclass(frozen=True)
class Slimmable(Method):
    """One network that computes at several widths, each with the first channels of every layer. A
    step adds up the gradients of all widths, from the widest down. Each width has batch norms of
    its own and, if it is quantized, ranges of activations; what a quantizer learns of weights is
    shared as the weights are.

    The run is judged at width 1; its result has the scores, size and work of every width under
    "by_width". The channels of ResNet-20's shortcuts are in another order: the first stay first.
    Weights are those of all methods at the start. Other than in the paper, the optimizer is Adam,
    which does not see that the sum of losses makes gradients larger. As many forward and backward
    passes a sample as widths, of which the narrow ones cost less.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"slim_widths": WIDTHS}
    REPLACES: ClassVar[str] = "procedure"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    NOT_WITH: ClassVar[Mapping[str, str]] = NOT_WITH | {
        "elr": "which remembers what a network said at one width"
    }

    slim_widths: tuple[float, ...] | None = None
    """The widths, as shares of the channels, 1 among them (0.25 0.5 0.75 1)."""

    slim_divisor: int = 4
    """Channels come in multiples of it. 8, as in the authors' code, makes widths of the 16 channels
    of ResNet-20 coincide."""

    slim_distillation: bool = False
    """Narrower widths learn from the probabilities of the widest, not from labels."""

    def __post_init__(self) -> None:
        require_widths("slim_widths", self.slim_widths)
        require_whole("slim_divisor", self.slim_divisor, 1, 64)

    @property
    def label(self) -> str:
        parts = ["slimmable"]
        if sorted(self.slim_widths) != list(WIDTHS):
            parts += [f"{width:g}" for width in sorted(self.slim_widths)]
        if self.slim_divisor != 4:
            parts.append(f"by{self.slim_divisor}")
        if self.slim_distillation:
            parts.append("distilled")
        return "-".join(parts)

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        return make_slimmable_(
            model, self.slim_widths, example, private=True, divisor=self.slim_divisor
        )

    def evaluation_options(self) -> dict[str, Any]:
        widths = sorted(self.slim_widths)
        return {"slim_widths": widths, "slim_divisor": self.slim_divisor}

    def procedure(self, parts: Parts) -> Procedure:
        return ManyWidths(parts, self.slim_widths, self.slim_distillation)


def require_widths(option: str, widths: Sequence[float] | None) -> None:
    """Raises an error unless these can be the widths of a network."""
    accepted = widths is None or (
        len(set(widths)) == len(widths) and all(0 < width <= 1 for width in widths) and 1 in widths
    )
    got = "none" if widths == () else " ".join(f"{width:g}" for width in widths or ())
    require(option, got, accepted, "different numbers above 0 up to 1, and 1 itself")


class ManyWidths(Procedure):
    """One network, whose widths all take part in a step; it is left at width 1."""

    def __init__(self, parts: Parts, widths: Sequence[float], distils: bool) -> None:
        super().__init__(parts)
        self.widths = sorted(widths, reverse=True)
        self.distils = distils
        self.PASSES = Passes(len(self.widths_of_step()), len(self.widths_of_step()))

    def widths_of_step(self) -> Sequence[float]:
        """Those that take part in the next step, the widest first."""
        return self.widths

    def step(self, batch: Batch) -> StepResult:
        def logits() -> Tensor:
            with self.parts.autocast():
                return self.forwards[0](batch.inputs).float()

        def loss(logits: Tensor, widest: Tensor | None) -> Tensor:
            if widest is not None and self.distils:
                return imitation(logits, widest)
            return self.losses[0](logits, batch.labels, batch.indices)

        (network,), (optimizer,) = self.networks, self.optimizers
        optimizer.zero_grad()
        first, widest = add_gradients(network, self.widths_of_step(), logits, loss, batch.share)
        data_parallel.sum_gradients_(network)
        optimizer.step()
        return StepResult(first, widest)

    @contextmanager
    def at_width(self, width: float) -> Iterator[nn.Module]:
        network = self.networks[0]
        set_width(network, width)
        try:
            yield narrowed(network, width, self.parts.example())
        finally:
            set_width(network, 1)


def add_gradients(
    model: nn.Module,
    widths: Sequence[float],
    forward: Callable[[], Tensor],
    loss: Callable[[Tensor, Tensor | None], Tensor],
    share: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Adds the gradients of the loss at each width, the widest first, times `share`, to those of
    the parameters; gives loss and logits of the widest. The model is left at width 1.

    Args:
        forward: gives the logits at the width that is set.
        loss: of logits, and of those of the widest without gradient, None for itself.
    """
    first, widest = None, None
    for width in widths:
        set_width(model, width)
        logits = forward()
        value = loss(logits, widest)
        (value * share).backward()
        if widest is None:
            first, widest = value.detach(), logits.detach()
    set_width(model, 1)
    return first, widest
