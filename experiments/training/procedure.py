"""How a run trains: its networks and optimizers, and what a step does with a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from experiments.losses import Loss
from experiments.models.layers import decayed
from experiments.seeds import NETWORK, ORDER, mixed
from experiments.training import data_parallel
from experiments.training.evaluation import predict
from experiments.training.finite import require_finite
from experiments.training.schedules import SCHEDULES
from noisyq_fast import constrain_
from noisyq_fast.optimizing import learned_parameters

if TYPE_CHECKING:
    from experiments.config import FilledConfig
    from experiments.methods import Method
    from experiments.tasks import Part, Task


@dataclass(frozen=True)
class Batch:
    """What a step trains on."""

    indices: Tensor
    """Of the samples, among those trained on."""
    inputs: Tensor
    labels: Tensor
    share: float
    """How much of the whole batch this is: less than 1 where processes divide it."""


@dataclass(frozen=True)
class StepResult:
    """What a step gives, without gradients."""

    loss: Tensor
    """The mean over the batch."""
    logits: Tensor | None
    """By which the samples are scored while they are trained on. None where those of the step do
    not tell, such as of mixed inputs: they are then scored in a pass of their own after the epoch.
    """


class Passes(NamedTuple):
    """Passes through a network: how many a sample takes."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Parts:
    """What procedures are built of, as the options say."""

    config: FilledConfig
    task: Task
    device: torch.device
    methods: Mapping[str, Method]

    def network(self, number: int = 0) -> nn.Module:
        """Freshly initialised. The first one is the same for all methods; others differ."""
        seed = self.config.seed
        torch.manual_seed(mixed(seed, NETWORK, number) if number else seed)
        model = self.task.network()
        # One that replaces the layers comes before those that change them.
        for method in sorted(self.methods.values(), key=lambda method: method.REPLACES != "layers"):
            model = method.network(model, self.example().cpu())
        model = model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        return data_parallel.synchronize_(model)

    def loss(self, model: nn.Module) -> Loss:
        """What is minimized by this network."""
        loss = self.task.loss()
        # One that replaces the loss comes before those that change it.
        for method in sorted(self.methods.values(), key=lambda method: method.REPLACES != "loss"):
            loss = method.loss(loss, model, self.task)
        return loss.to(self.device)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Adam, with the decoupled decay of a method in its first group, which has the weights.
        What quantizers learn is in the last one, with its own part of the learning rate."""
        weights = decayed(model)
        is_weight = {id(parameter) for parameter in weights}
        learned = learned_parameters(model)
        is_special = is_weight | {id(parameter) for parameter in learned}
        others = [p for p in model.parameters() if id(p) not in is_special]
        options: dict[str, Any] = {}
        rate = 1.0
        for method in self.methods.values():
            options |= method.optimizer_options()
            rate *= method.learned_rate or 1.0
        groups = [{"params": weights, **options}, {"params": others}]
        if learned:
            groups.append({"params": learned, "lr": self._rate(), "rate": rate})
        optimizer = torch.optim.AdamW(
            groups,
            lr=self._rate(),
            weight_decay=0.0,  # without one it is Adam
            fused=True,
            capturable=self.config.cuda_graph,
        )
        if learned:
            constrain_(model, optimizer)
        return optimizer

    def _rate(self) -> float | Tensor:
        """A graph reads the rate from memory."""
        lr = self.config.lr
        return torch.tensor(lr, device=self.device) if self.config.cuda_graph else lr

    def batches(
        self, epoch: int, rounds: int = 1
    ) -> Iterator[tuple[int, Tensor, tuple[Tensor, ...]]]:
        """Those of `epoch`, which goes over all samples so often: the size of each whole batch,
        this process's samples of it, and what `Task.pair` takes."""
        count = self.task.count("trained")
        generator = torch.Generator().manual_seed(mixed(self.config.seed, ORDER, epoch))
        for _ in range(rounds):
            order = torch.randperm(count, generator=generator)
            views = self.task.draw(count, generator)
            batches = self.task.batches(order, views, self.sizes)
            for size, (samples, batch) in zip(self.sizes, batches, strict=True):
                yield size, samples, batch

    @property
    def sizes(self) -> list[int]:
        """Those of the batches in which all samples are trained on once."""
        return batch_sizes(self.task.count("trained"), self.config.batch_size)

    def example(self) -> Tensor:
        """An input batch of one sample that is trained on."""
        return self.task.inputs("trained", torch.tensor([0]))

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.precision == "bf16",
            cache_enabled=not self.config.cuda_graph,
        )

    def logits(self, model: Any, part: Part) -> Tensor:
        """Of all samples of a part, as they are, in evaluation mode."""
        samples = data_parallel.shard(torch.arange(self.task.count(part)))
        with self.autocast():
            logits = predict(model, samples, lambda batch: self.task.inputs(part, batch))
        return data_parallel.gather(logits)


class Procedure:
    """One network and one optimizer, which follows the gradient of the loss.

    Others are subclasses, which a method names in its hook `procedure`.

    Attributes:
        networks: the first one is what the run leaves.
        losses: one for each network.
        optimizers: one for each network.
        widths: those at which the run is scored as well, the widest first: bits, from 2, or shares
            of the channels, up to 1. `at_width` computes at one of them.
        rounds: how often an epoch goes over all samples.
    """

    NETWORKS: ClassVar[int] = 1
    PASSES: Passes = Passes(1, 1)
    """Those of a step, of all networks together."""
    CHANGES: ClassVar[bool] = False
    """Whether a step has numbers in it that `begin_epoch` changes, other than in tensors."""
    DEPLOYS: ClassVar[bool] = False
    """Whether `finish` changes what is judged: the run is scored before it as well."""

    widths: Sequence[float] = ()
    rounds: int = 1

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.networks = nn.ModuleList(self.network(number) for number in range(self.NETWORKS))
        self.losses = nn.ModuleList(map(parts.loss, self.networks))
        self.prepare()

    def network(self, number: int) -> nn.Module:
        """One of the networks, freshly initialised."""
        return self.parts.network(number)

    def loss(self, number: int = 0) -> Loss:
        """That of one of the networks."""
        loss = self.losses[number]
        assert isinstance(loss, Loss)
        return loss

    def prepare(self) -> None:
        """Makes what refers to the networks' parameters; anew when those were replaced."""
        self.optimizers = list(map(self.parts.optimizer, self.networks))
        compiled = self.parts.config.compile
        self.forwards = [torch.compile(n) if compiled else n for n in self.networks]

    def begin_epoch(self, epoch: int) -> Passes:
        """Before `epoch`, counted from 0; gives the passes that it took."""
        count = 0
        for number, model in enumerate(self.networks):

            def trained(model: nn.Module = model) -> tuple[Tensor, Tensor]:
                model.eval()
                return self.parts.logits(model, "trained"), self.parts.task.labels("trained")

            count += self.loss(number).begin_epoch(epoch, self.parts.config.epochs, trained)
        return Passes(count, 0)

    def schedule(self, epoch: int, step: int) -> float:
        """The factor of the first learning rate in a step of `epoch`, both counted from 0."""
        return SCHEDULES[self.parts.config.schedule](epoch, self.parts.config.epochs)

    def step(self, batch: Batch) -> StepResult:
        """Trains on a batch. Can be recorded in a CUDA graph."""
        with self.parts.autocast():
            logits = self.forwards[0](batch.inputs).float()
            loss = self.losses[0](logits, batch.labels, batch.indices)
        self.follow(loss * batch.share)
        return StepResult(loss.detach(), logits.detach())

    def follow(self, loss: Tensor, number: int = 0) -> None:
        """A step of an optimizer down the gradient of this process's share of the loss."""
        self.gradients(loss, number)
        self.optimizers[number].step()

    def gradients(self, loss: Tensor, number: int = 0) -> None:
        """The gradients of this process's share of the loss, summed over processes."""
        self.optimizers[number].zero_grad()
        loss.backward()
        data_parallel.sum_gradients_(self.networks[number])

    def predict(self, inputs: Tensor) -> Tensor:
        """The logits by which the run is judged, in evaluation mode."""
        return self.networks[0](inputs)

    @property
    def predicting(self) -> int:
        """How many networks `predict` asks."""
        return 1

    def at_width(self, width: float) -> AbstractContextManager[nn.Module]:
        """A context in which `predict` computes at one of `widths`. Gives a network of this width
        alone, whose size and work are reported."""
        raise NotImplementedError

    def end_epoch(self, epoch: int) -> Passes:
        """After `epoch`, before it is evaluated; gives the passes that it took."""
        return Passes(0, 0)

    def deploy(self) -> Passes:
        """After training, makes the network that is judged of the trained one, such as a quantized
        one; gives the passes that it took. Only where `DEPLOYS`."""
        return Passes(0, 0)

    @property
    def judged(self) -> nn.Module:
        """The network whose size and work are reported."""
        return self.networks[0]

    def finish(self) -> list[str]:
        """After training, before the network is evaluated for the last time; gives lines for the
        user."""
        return []

    def result(self) -> dict[str, Any]:
        """What `finish` found, for the run's result."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the epochs to come depend on, beside networks, losses and optimizers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes what `state_dict` gave; raises an error where it is something else."""
        if state:
            raise ValueError(f"procedure: got {list(state)}, takes nothing")


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a network, as they are now."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def fitting(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers that were read from a checkpoint, on the device of `model`. Raises an
    error where they are not those of such a network."""
    own = model.state_dict()
    if {name: w.shape for name, w in weights.items()} != {name: w.shape for name, w in own.items()}:
        raise ValueError("weights: got other names or shapes than those of the network")
    require_finite(weights.items(), "in the checkpoint")
    return {name: weights[name].to(own[name]) for name in own}


def batch_sizes(count: int, size: int) -> list[int]:
    """The sizes of an epoch's batches: `size`, and what is left in a last one. A single sample that
    is left joins the batch before, as batch norm needs two."""
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    if sizes[-1] == 1 < size and len(sizes) > 1:
        sizes[-2:] = [size + 1]
    return sizes
