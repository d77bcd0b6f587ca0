"""The training loop."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import noisyq_fast
from experiments.config import FilledConfig
from experiments.reporting.reading import POSITIVE
from experiments.seeds import STEPS, mixed
from experiments.tasks import Part, Task
from experiments.terminal import bars_off
from experiments.training import data_parallel
from experiments.training.cuda_graph import GraphedStep
from experiments.training.finite import NonFiniteLoss, require_finite, require_finite_scores
from experiments.training.history import EpochMetrics, read_history
from experiments.training.procedure import Batch, Parts, Passes, Procedure
from noisyq_fast.optimizing import learned_parameters

_CHECK_EVERY = 20  # steps: reading a loss makes a GPU wait
QUANTIZER = "_quantizer."
"""In the name of what a quantizer keeps."""
_AT_THE_END = "at the end of the training"


class Trainer:
    """Trains a network for a task.

    For one seed, every method starts from the same weights, holds out the same samples and sees the
    same batches. Random numbers of an epoch come from the seed and the epoch alone.
    """

    def __init__(self, config: FilledConfig, task: Task, device: torch.device) -> None:
        self.config = config
        self.task = task
        self.device = device
        self.methods = config.methods
        self.history: list[EpochMetrics] = []
        self.passes = Passes(0, 0)
        self.before: dict[str, Any] = {}
        """What the network was worth before the procedure finished it, if that changed it."""
        self.by_width: dict[str, dict[str, Any]] = {}
        """Scores, size and work of the finished network at each width of the procedure."""
        self.stopped = False

        self.parts = Parts(config, task, device, self.methods)
        smallest = self.parts.sizes[-1]
        if smallest < data_parallel.size():
            raise ValueError(
                f"--batch-size: got {config.batch_size}, which leaves {smallest} of "
                f"{task.count('trained')} images to the last batch of an epoch; takes a size that "
                f"leaves one for each of {data_parallel.size()} processes"
            )
        exchanged = [method.procedure(self.parts) for method in self.methods.values()]
        self.procedure = next(filter(None, exchanged), None) or Procedure(self.parts)
        self.states: list[dict[str, dict[str, Any]]] = [
            {name: {} for name in self.methods} for _ in self.procedure.networks
        ]
        self.decay = config.recipe.weight_decay  # falls with the rate
        self._record_step()

    @property
    def model(self) -> nn.Module:
        """The network that the run is judged by and leaves."""
        return self.procedure.networks[0]

    def _record_step(self) -> None:
        self.step = GraphedStep(self._step) if self.config.cuda_graph else self._step

    def load_weights(self, state: dict[str, Tensor], shapes: dict[str, dict[str, Any]]) -> None:
        """Takes the weights of another run, in the shape that its methods gave the network."""
        if not any(QUANTIZER in name for name in state):  # those of a float network
            own = self.model.state_dict()
            state = {name: own[name] for name in own if QUANTIZER in name} | state
        self._load_network(self.model, state, shapes)
        self._prepare_to_train()

    def _load_network(
        self, model: nn.Module, state: dict[str, Tensor], shapes: dict[str, dict[str, Any]]
    ) -> None:
        for name, method in self.methods.items():
            method.restore(model, shapes.get(name, {}), self.parts.example())
        model.load_state_dict(state)

    def _prepare_to_train(self) -> None:
        self.procedure.prepare()
        self._record_step()

    def _set_rate(self, factor: float) -> None:
        for optimizer in self.procedure.optimizers:
            for parameters in optimizer.param_groups:
                rate = self.config.lr * factor * parameters.get("rate", 1.0)
                if self.config.cuda_graph:
                    parameters["lr"].fill_(rate)
                else:
                    parameters["lr"] = rate

    def _set_decay(self, factor: float) -> None:
        for optimizer in self.procedure.optimizers:
            if self.decay:
                optimizer.param_groups[0]["weight_decay"] = self.decay * factor

    # One step and one epoch.

    def _step(self, indices: Tensor, *batch: Tensor, share: float) -> tuple[Tensor, Tensor | None]:
        """The loss and the predictions of a batch, which may be this process's share of a larger
        one."""
        done = self.procedure.step(Batch(indices, *self.task.pair(*batch), share))
        return done.loss, None if done.logits is None else self.task.predicted(done.logits)

    def epochs(self) -> Iterator[EpochMetrics]:
        """Trains on, and gives the metrics of each epoch as soon as it is over."""
        epochs = self.config.epochs
        images = self.task.count("trained") * self.procedure.rounds
        with tqdm(
            total=epochs * images,
            initial=len(self.history) * images,
            unit="img",
            unit_scale=True,
            disable=bars_off() if data_parallel.is_main() else True,
        ) as progress:
            while len(self.history) < epochs and not self.stopped:
                metrics = self._epoch(len(self.history), progress)
                require_finite_scores(metrics.flat(), self._where(metrics.epoch))
                self.history.append(metrics)
                ends = [
                    method.end_epoch(model, states[name], metrics)
                    for model, states in self._networks()
                    for name, method in self.methods.items()
                ]
                self.stopped = any(ends)
                if data_parallel.is_main():
                    progress.write(self._line(metrics))
                yield metrics

    def _epoch(self, epoch: int, progress: tqdm) -> EpochMetrics:
        started = time.perf_counter()
        progress.set_description(f"epoch {epoch + 1}/{self.config.epochs}")
        self._seed(epoch)
        replaced = [
            method.begin_epoch(model, states[name], epoch, self.config.epochs, self.parts.example())
            for model, states in self._networks()
            for name, method in self.methods.items()
        ]
        if any(replaced):
            self.procedure.prepare()
        before = self.procedure.begin_epoch(epoch)
        factor = self.procedure.schedule(epoch, step=0)
        self._set_rate(factor)
        self._set_decay(factor)
        if any(replaced) or self.decay or self.procedure.CHANGES:
            self._record_step()  # which has the old numbers in it
        loss, predicted = self._train(epoch, progress)
        after = self.procedure.end_epoch(epoch)
        self._count(before, *[self.procedure.PASSES] * self.procedure.rounds, after)
        self.require_finite(self._where(epoch + 1))
        progress.set_description(f"epoch {epoch + 1}/{self.config.epochs}, evaluating")
        if predicted is None:
            predicted = self.task.predicted(self._logits("trained"))
        is_last = epoch + 1 == self.config.epochs
        tests = is_last or (epoch + 1) % self.config.evaluate_every == 0
        scores = self.task.epoch_scores(
            predicted, self._predict("held_out"), self._predict("test") if tests else None
        )
        return EpochMetrics(
            epoch=epoch + 1,
            loss=loss,
            scores=scores,
            validation_score=scores[f"validation_{self.task.SCORE}"],
            learning_rate=self.config.lr * factor,
            seconds=time.perf_counter() - started,
        )

    def _count(self, *passes: Passes) -> None:
        self.passes = Passes(*map(sum, zip(self.passes, *passes, strict=True)))

    def _networks(self) -> Iterator[tuple[nn.Module, dict[str, dict[str, Any]]]]:
        """Each network, and the states that the methods keep for it."""
        return zip(self.procedure.networks, self.states, strict=True)

    def _train(self, epoch: int, progress: tqdm) -> tuple[float, Tensor | None]:
        """The mean loss, and what was predicted of each sample that is trained on."""
        count = self.task.count("trained")
        rounds = self.procedure.rounds
        sizes = self.parts.sizes * rounds
        losses = torch.zeros(len(sizes), device=self.device)
        self.procedure.networks.train()
        factor = self.procedure.schedule(epoch, step=0)
        for step, (size, samples, batch) in enumerate(self.parts.batches(epoch, rounds)):
            if step % (len(sizes) // rounds) == 0:
                predicted = None  # the last round counts
            if (now := self.procedure.schedule(epoch, step)) != factor:
                factor = now
                self._set_rate(factor)
            share = len(samples) / size
            loss, answers = self.step(samples, *batch, share=share)
            losses[step] = loss * share
            if answers is not None:
                if predicted is None:
                    predicted = answers.new_zeros(count, *answers.shape[1:])
                predicted[samples] = answers
            progress.update(size)
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == len(losses):
                first = step // _CHECK_EVERY * _CHECK_EVERY
                checked = losses[first : step + 1]
                data_parallel.sum_(checked)
                self._check(checked.tolist(), epoch, first)
                progress.set_postfix_str(f"loss {checked[-1]:.3f}", refresh=False)
        mean = (losses @ losses.new_tensor(sizes)).item() / (count * rounds)
        # Each is one process's.
        return mean, None if predicted is None else data_parallel.sum_(predicted)

    def _check(self, losses: list[float], epoch: int, first: int) -> None:
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the loss is {loss} {self._where(epoch + 1, step + 1)}")

    def require_finite(self, where: str) -> None:
        """Raises NonFiniteLoss where a number of a network, a loss or an optimizer is not
        finite."""
        procedure = self.procedure
        numbers: dict[str, Tensor] = {}
        for number, network in enumerate(procedure.networks):
            of = f" of network {number + 1}" if number else ""
            moments = procedure.optimizers[number].state
            numbers |= {name + of: value for name, value in network.state_dict().items()}
            numbers |= {
                f"the optimizer's {key} of {name}{of}": value
                for name, parameter in network.named_parameters()
                for key, value in moments.get(parameter, {}).items()
            }
        numbers |= {f"the loss's {k}": v for k, v in procedure.losses.state_dict().items()}
        require_finite(numbers.items(), where)

    def _where(self, epoch: int, step: int | None = None) -> str:
        rate = self.config.lr * self.procedure.schedule(epoch - 1, (step or 1) - 1)
        saved = f"epoch {epoch - 1}" if epoch > 1 else "none yet"
        where = f"in epoch {epoch}" if step is None else f"in epoch {epoch}, step {step}"
        return f"{where}, at learning rate {rate:g}; last checkpoint: {saved}"

    def _seed(self, epoch: int) -> None:
        torch.manual_seed(mixed(self.config.seed, STEPS, epoch, data_parallel.rank()))

    # What came of it.

    def _predict(self, part: Part) -> Tensor | None:
        """The logits of all samples of a part; None if there are none."""
        return self._logits(part) if self.task.count(part) else None

    def _logits(self, part: Part) -> Tensor:
        self.procedure.networks.eval()
        return self.parts.logits(self.procedure.predict, part)

    def finish(self) -> list[str]:
        """Lets the methods and the procedure end their work; gives what they tell the user."""
        states = self.states[0]
        lines = [method.finish(self.model, states[n]) for n, method in self.methods.items()]
        if self.procedure.DEPLOYS:
            self.before = {f"float_{name}": score for name, score in self._scores().items()}
        self._count(self.procedure.deploy())
        lines += self.procedure.finish()
        for width in self.procedure.widths:
            scores = self.by_width[f"{width:g}"] = self._at_width(width)
            macs = scores["macs"] / 1e6
            lines.append(f"width {width:g}: {self.task.summary(scores)}, {macs:.2f} million MACs")
        return [line for line in lines if line]

    def result(self) -> dict[str, Any]:
        """The network as it is now, on the samples trained on, held out and of the test set."""
        self.require_finite(_AT_THE_END)
        return (
            self._scores()
            | self.before
            | ({"by_width": self.by_width} if self.by_width else {})
            | {
                "epochs_trained": len(self.history),
                "forward_passes": self.passes.forward,
                "backward_passes": self.passes.backward,
            }
            | self._costs(self.procedure.judged)
        )

    def _scores(self) -> dict[str, Any]:
        scores = self.task.result(
            self._logits("trained"), self._predict("held_out"), self._logits("test")
        )
        scores |= self.procedure.result()
        require_finite_scores(scores, _AT_THE_END)
        return scores

    def _at_width(self, width: float) -> dict[str, Any]:
        with self.procedure.at_width(width) as network:
            return self._scores() | self._costs(network)

    def _costs(self, network: nn.Module) -> dict[str, int]:
        """What it takes to store and to run a network of those that are asked."""
        summary = noisyq_fast.summary(network, self.parts.example())
        costs = {
            name: getattr(summary, name)
            for name in ("parameters", "size_in_bits", "macs", "additions")
        }
        for method in self.methods.values():
            costs |= method.costs(network)
        return {name: self.procedure.predicting * count for name, count in costs.items()}

    def _line(self, metrics: EpochMetrics) -> str:
        epochs = self.config.epochs
        return (
            f"epoch {metrics.epoch:{len(str(epochs))}}/{epochs}  loss {metrics.loss:.4f}  "
            f"{self.task.line(metrics.scores)}  "
            f"lr {metrics.learning_rate:g}  {metrics.seconds:.1f} s"
        )

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on, beside the options."""
        procedure = self.procedure
        return {
            "networks": [network.state_dict() for network in procedure.networks],
            "optimizers": [optimizer.state_dict()["state"] for optimizer in procedure.optimizers],
            "losses": procedure.losses.state_dict(),
            "procedure": procedure.state_dict(),
            "methods": self.states,
            "history": [asdict(metrics) for metrics in self.history],
            "passes": list(self.passes),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint of the same run; a ValueError tells what in it does not fit."""
        try:
            self._load(**state)
            self.require_finite("in the checkpoint")
        except torch.OutOfMemoryError:
            raise  # of the device, and not of the checkpoint
        except Exception as error:  # there can be anything in it
            what = f"{type(error).__name__}: {error}".replace("\n", " ")
            raise ValueError(f"does not fit this run ({what:.300})") from error

    def _load(
        self,
        networks: list[dict[str, Tensor]],
        optimizers: list[dict[int, dict[str, Tensor]]],
        losses: dict[str, Tensor],
        procedure: dict[str, Any],
        methods: list[dict[str, dict[str, Any]]],
        history: list[dict[str, Any]],
        passes: list[float],
        stopped: bool,
    ) -> None:
        self.history = read_history(history, self.config.epochs, self.task.SCORE)
        ours = self.procedure
        for model, state, states in zip(ours.networks, networks, methods, strict=True):
            if states.keys() != self.methods.keys():
                raise ValueError(f"got methods {list(states)}, takes {list(self.methods)}")
            self._load_network(model, state, states)
            for name, method in self.methods.items():
                method.check(model, states[name], self.history)
        self.states = methods
        self._prepare_to_train()
        for model, own, moments in zip(ours.networks, ours.optimizers, optimizers, strict=True):
            _load_optimizer(own, moments, model)
        ours.losses.load_state_dict(losses)
        ours.load_state_dict(procedure)
        if len(passes) != 2 or not all(POSITIVE.accepts(count) for count in passes):
            raise ValueError(f"passes: got {passes!r}, takes two numbers from 0")
        self.passes = Passes(*passes)
        if not isinstance(stopped, bool):
            raise TypeError(f"stopped: got {stopped!r}, takes True or False")
        self.stopped = stopped


def _load_optimizer(
    optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]], model: nn.Module
) -> None:
    # The options are those of the configuration, wherever the checkpoint had them.
    options = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": options})
    # What quantizers learn has none before it moves, as at a width that comes later.
    idle = {id(p) for p in learned_parameters(model) if p not in optimizer.state}
    parameters = {name: p for name, p in model.named_parameters() if id(p) not in idle}
    if len(state) != len(parameters):
        raise ValueError(f"the optimizer has {len(state)} of {len(parameters)} states")
    for name, parameter in parameters.items():
        shape = parameter.shape
        takes = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
        moments = optimizer.state[parameter]
        if {k: v.shape for k, v in moments.items()} != takes:
            raise ValueError(f"the optimizer's state of {name} has other names or shapes")
        for key in ("exp_avg", "exp_avg_sq"):
            # The fused step takes them to lie in memory as the parameter does.
            moments[key] = torch.empty_like(parameter, requires_grad=False).copy_(moments[key])
