"""What a training method is."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from noisyq_fast import GroupedLinear

LAYERS = nn.Conv2d | nn.Linear | GroupedLinear
"""Modules whose weights are trained as weights: the others are norms."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""From logits to the mean loss of the batch: `[B, C]` with classes `[B]`, or probabilities of
them `[B, C]`; or `[B, T]` with the probability of each of `T` answers, NaN where it is unknown."""


@dataclass(frozen=True)
class Method:
    """What a method changes in a run, through hooks that change nothing here.

    Its fields are options of the run. Those that are None by default turn the method on when they
    are given; `--method` turns it on with the values of `DEFAULTS`. Several can be on at once.
    The trainer keeps a `state` for each method, which it saves in checkpoints: a dict of tensors
    and plain values.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {}
    ADDED_LATER: ClassVar[tuple[str, ...]] = ()
    """Options that runs had not at first: at their defaults they are in no name of a run and in no
    file, so that those runs keep theirs."""

    @property
    def on(self) -> bool:
        """Whether an option that turns the method on was given."""
        return any(getattr(self, name) is not None for name in self.DEFAULTS)

    def with_defaults(self) -> "Method":
        """The same with the default of every option that was not given."""
        missing = {k: v for k, v in self.DEFAULTS.items() if getattr(self, k) is None}
        return replace(self, **missing)

    def changed(self) -> list[str]:
        """The options that differ from their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]

    def flat(self) -> dict[str, Any]:
        """The options by name, as they are written."""
        left_out = set(self.ADDED_LATER) - set(self.changed())
        return {k: v for k, v in asdict(self).items() if k not in left_out}

    @property
    def label(self) -> str:
        """The method and its main options, short, for names of runs."""
        raise NotImplementedError

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        """Changes the freshly initialised network. `example` is an input batch of one image."""
        return model

    def loss(self, loss: Loss, model: nn.Module) -> Loss:
        """Changes the loss of a training batch."""
        return loss

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

    def shape(self, state: dict[str, Any]) -> dict[str, Any]:
        """The part of `state`, as plain values, that `restore` needs."""
        return {}

    def restore(self, model: nn.Module, shape: dict[str, Any], example: Tensor) -> None:
        """Gives a freshly built network the shape that this method gave another, so that it can
        take the other's weights."""

    def check(self, model: nn.Module, state: dict[str, Any], history: list[Any]) -> None:
        """Raises an error where a `state` that was read does not belong to `model` and to the
        metrics of the epochs so far, which were read with it."""
