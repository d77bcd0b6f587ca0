"""What a training method is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from experiments.losses import Loss

if TYPE_CHECKING:
    from experiments.tasks import Recipe, Task
    from experiments.training.procedure import Parts, Procedure


@dataclass(frozen=True)
class Method:
    """What a method changes in a run, through hooks that change nothing here.

    Its fields are options of the run. Those that are None by default turn the method on when they
    are given; `--method` turns it on with the values of `DEFAULTS`. Several can be on at once.
    The trainer keeps a `state` for each method and network, which it saves in checkpoints: a dict
    of tensors and plain values.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}

    LEGACY: ClassVar[Mapping[str, Any]] = {}
    """Options that the method got later, with the value that gives what it did before. It is left
    out of a run's name, and stays as it is whatever the default becomes."""

    REPLACES: ClassVar[str | None] = None
    """What of a run it exchanges, as only one method can: "loss", "procedure", "layers" or
    "quantizer"."""

    STARTS_FROM_FLOAT: ClassVar[bool] = False
    """Whether --weights takes a float network's too."""

    NOT_WITH: ClassVar[Mapping[str, str]] = {}
    """Methods that it does not combine with, and why."""

    LABELS: ClassVar[frozenset[str]] = frozenset({"classes", "answers"})
    """The kinds of labels that it can learn from: see `Task.LABELS`."""

    LEAST_EPOCHS: ClassVar[int] = 1
    """One for each phase of the training."""

    @property
    def on(self) -> bool:
        """Whether an option that turns the method on was given."""
        return any(getattr(self, name) is not None for name in self.DEFAULTS)

    def with_defaults(self) -> Method:
        """The same with the default of every option that was not given."""
        missing = {k: v for k, v in self.DEFAULTS.items() if getattr(self, k) is None}
        return replace(self, **missing)

    def changed(self) -> list[str]:
        """The options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def without_legacy(self) -> dict[str, Any]:
        """The options by name, but for those at their legacy value."""
        return {
            k: v for k, v in asdict(self).items() if k not in self.LEGACY or v != self.LEGACY[k]
        }

    @property
    def label(self) -> str:
        """The method and its main options, short, for names of runs."""
        raise NotImplementedError

    def recipe(self, recipe: Recipe) -> Recipe:
        """Changes the defaults of a run."""
        return recipe

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """Changes the freshly initialised network. `example` is an input batch of one image."""
        return model

    def loss(self, loss: Loss, model: nn.Module, task: Task) -> Loss:
        """Changes the loss of a network, or replaces it."""
        return loss

    def procedure(self, parts: Parts) -> Procedure | None:
        """How the run trains instead of the usual way, which is `Procedure`."""
        return None

    @property
    def learned_rate(self) -> float | None:
        """The learning rate of what quantizers learn, as a part of that of weights."""
        return None

    def optimizer_options(self) -> dict[str, Any]:
        """Options of `torch.optim.AdamW` for the weights of convolutions and linear layers."""
        return {}

    def evaluation_options(self) -> dict[str, Any]:
        """The options, by name, that change what the network computes outside training and that
        neither its weights nor `shape` tell: --weights takes a file with the same ones only."""
        return {}

    def begin_epoch(
        self, model: nn.Module, state: dict[str, Any], epoch: int, epochs: int, example: Tensor
    ) -> bool:
        """Before `epoch`, counted from 0; tells whether it replaced parameters of the network,
        which the trainer then gives to a new optimizer. `example` is an input batch of one
        image that is trained on.
        """
        return False

    def end_epoch(self, model: nn.Module, state: dict[str, Any], metrics: Any) -> bool:
        """After an epoch; tells whether training stops here."""
        return False

    def finish(self, model: nn.Module, state: dict[str, Any]) -> str | None:
        """After training; gives a line for the user."""
        return None

    def costs(self, model: nn.Module) -> dict[str, int]:
        """What running the network takes, by name, that parameters and multiply-accumulates do not
        tell; for the result."""
        return {}

    def shape(self, state: dict[str, Any]) -> dict[str, Any]:
        """The part of `state`, as plain values, that `restore` needs."""
        return {}

    def restore(self, model: nn.Module, shape: dict[str, Any], example: Tensor) -> None:
        """Gives a freshly built network the shape that this method gave another, so that it can
        take the other's weights."""

    def check(self, model: nn.Module, state: dict[str, Any], history: list[Any]) -> None:
        """Raises an error where a `state` that was read does not belong to `model` and to the
        metrics of the epochs so far, which were read with it."""
