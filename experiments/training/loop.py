"""The training loop."""

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from experiments import cost
from experiments.config import RunConfig
from experiments.methods.weight_decay import decayed
from experiments.seeds import ORDER, STEPS, mixed
from experiments.tasks import Part, Task
from experiments.training import data_parallel
from experiments.training.cuda_graph import GraphedStep
from experiments.training.evaluation import predict
from experiments.training.finite import NonFiniteLoss, require_finite, require_finite_scores
from experiments.training.history import EpochMetrics, read_history
from experiments.training.schedules import SCHEDULES

_CHECK_EVERY = 20  # steps: reading a loss makes a GPU wait
_AT_THE_END = "at the end of the training"


class Trainer:
    """Trains a network for a task.

    For one seed, every method starts from the same weights, holds out the same samples and sees the
    same batches. Random numbers of an epoch come from the seed and the epoch alone.
    """

    def __init__(self, config: RunConfig, task: Task, device: torch.device) -> None:
        self.config = config
        self.task = task
        self.device = device
        self.methods = config.methods
        self.states: dict[str, dict[str, Any]] = {name: {} for name in self.methods}
        self.history: list[EpochMetrics] = []
        self.stopped = False

        count = task.count("trained")
        smallest = batch_sizes(count, config.batch_size)[-1]
        if smallest < data_parallel.size():
            raise ValueError(
                f"--batch-size: got {config.batch_size}, which leaves {smallest} of "
                f"{count} images to the last batch of an epoch; takes a size that "
                f"leaves one for each of {data_parallel.size()} processes"
            )
        self.model = self._network()
        self._prepare_to_train()

    # What is trained.

    def _network(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        model = self.task.network()
        for method in self.methods.values():
            model = method.network(model, self._example().cpu())
        model = model.to(self.device, memory_format=torch.channels_last)
        return data_parallel.synchronize_(model)

    def _prepare_to_train(self) -> None:
        """Makes what refers to the network's parameters; anew when those were replaced."""
        weights = decayed(self.model)
        is_weight = {id(parameter) for parameter in weights}
        others = [p for p in self.model.parameters() if id(p) not in is_weight]
        options: dict[str, Any] = {}
        for method in self.methods.values():
            options |= method.optimizer_options()
        self.optimizer = torch.optim.AdamW(
            [{"params": weights, **options}, {"params": others}],
            lr=self._rate(self.config.lr),
            weight_decay=0.0,  # without one it is Adam
            fused=True,
            capturable=self.config.cuda_graph,
        )
        # The recipe's falls with the rate.
        self.decay = 0.0 if "weight_decay" in self.methods else self.config.recipe.weight_decay
        self.loss = self.task.loss
        for method in self.methods.values():
            self.loss = method.loss(self.loss, self.model)
        self.forward = torch.compile(self.model) if self.config.compile else self.model
        self._record_step()

    def _record_step(self) -> None:
        self.step = GraphedStep(self._step) if self.config.cuda_graph else self._step

    def load_weights(self, state: dict[str, Tensor], shapes: dict[str, dict[str, Any]]) -> None:
        """Takes the weights of another run, in the shape that its methods gave the network."""
        for name, method in self.methods.items():
            method.restore(self.model, shapes.get(name, {}), self._example())
        self.model.load_state_dict(state)
        self._prepare_to_train()

    def _rate(self, rate: float) -> float | Tensor:
        """What the optimizer takes: a graph reads the rate from memory."""
        return torch.tensor(rate, device=self.device) if self.config.cuda_graph else rate

    def _set_rate(self, factor: float) -> None:
        for parameters in self.optimizer.param_groups:
            if self.config.cuda_graph:
                parameters["lr"].fill_(self.config.lr * factor)
            else:
                parameters["lr"] = self.config.lr * factor
        if self.decay:
            self.optimizer.param_groups[0]["weight_decay"] = self.decay * factor
            self._record_step()  # which has the old one in it

    # One step and one epoch.

    def _step(self, *batch: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The loss and the predictions of a batch, which may be this process's share of a larger
        one."""
        inputs, labels = self.task.pair(*batch)
        with self._autocast():
            logits = self.forward(inputs).float()
            loss = self.loss(logits, labels)
        self.optimizer.zero_grad()
        (loss * share).backward()
        data_parallel.sum_gradients_(self.model)
        self.optimizer.step()
        return loss.detach(), self.task.predicted(logits.detach())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type,
            torch.bfloat16,
            enabled=self.config.precision == "bf16",
            cache_enabled=not self.config.cuda_graph,
        )

    def epochs(self) -> Iterator[EpochMetrics]:
        """Trains on, and gives the metrics of each epoch as soon as it is over."""
        epochs = self.config.epochs
        images = self.task.count("trained")
        with tqdm(
            total=epochs * images,
            initial=len(self.history) * images,
            unit="img",
            unit_scale=True,
            disable=None if data_parallel.is_main() else True,
        ) as progress:
            while len(self.history) < epochs and not self.stopped:
                metrics = self._epoch(len(self.history), progress)
                require_finite_scores(metrics.flat(), self._where(metrics.epoch))
                self.history.append(metrics)
                self.stopped = any(
                    [
                        method.end_epoch(self.model, self.states[name], metrics)
                        for name, method in self.methods.items()
                    ]
                )
                if data_parallel.is_main():
                    progress.write(self._line(metrics))
                yield metrics

    def _epoch(self, epoch: int, progress: tqdm) -> EpochMetrics:
        started = time.perf_counter()
        self._seed(epoch)
        replaced = [
            method.begin_epoch(
                self.model, self.states[name], epoch, self.config.epochs, self._example()
            )
            for name, method in self.methods.items()
        ]
        if any(replaced):
            self._prepare_to_train()
        factor = self._factor(epoch)
        self._set_rate(factor)
        loss, predicted = self._train(epoch, progress)
        self.require_finite(self._where(epoch + 1))
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

    def _train(self, epoch: int, progress: tqdm) -> tuple[float, Tensor]:
        """The mean loss, and what was predicted of each sample that is trained on."""
        count = self.task.count("trained")
        generator = torch.Generator().manual_seed(mixed(self.config.seed, ORDER, epoch))
        order = torch.randperm(count, generator=generator)
        views = self.task.draw(count, generator)
        sizes = batch_sizes(count, self.config.batch_size)
        losses = torch.zeros(len(sizes), device=self.device)
        predicted = None
        self.model.train()
        for step, (samples, batch) in enumerate(self.task.batches(order, views, sizes)):
            share = len(samples) / sizes[step]
            loss, answers = self.step(*batch, share=share)
            losses[step] = loss * share
            if predicted is None:
                predicted = answers.new_zeros(count, *answers.shape[1:])
            predicted[samples] = answers
            progress.update(sizes[step])
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == len(losses):
                first = step // _CHECK_EVERY * _CHECK_EVERY
                checked = losses[first : step + 1]
                data_parallel.sum_(checked)
                self._check(checked.tolist(), epoch, first)
                progress.set_postfix_str(f"loss {checked[-1]:.3f}", refresh=False)
        mean = (losses @ losses.new_tensor(sizes)).item() / count
        return mean, data_parallel.sum_(predicted)  # each is one process's

    def _check(self, losses: list[float], epoch: int, first: int) -> None:
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                raise NonFiniteLoss(f"the loss is {loss} {self._where(epoch + 1, step + 1)}")

    def require_finite(self, where: str) -> None:
        """Raises NonFiniteLoss where a number of the network or the optimizer is not finite."""
        kept = {
            f"the optimizer's {key} of {name}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        require_finite((self.model.state_dict() | kept).items(), where)

    def _where(self, epoch: int, step: int | None = None) -> str:
        rate = self.config.lr * self._factor(epoch - 1)
        saved = f"epoch {epoch - 1}" if epoch > 1 else "none yet"
        where = f"in epoch {epoch}" if step is None else f"in epoch {epoch}, step {step}"
        return f"{where}, at learning rate {rate:g}; last checkpoint: {saved}"

    def _factor(self, epoch: int) -> float:
        return SCHEDULES[self.config.schedule](epoch, self.config.epochs)

    def _seed(self, epoch: int) -> None:
        torch.manual_seed(mixed(self.config.seed, STEPS, epoch, data_parallel.rank()))

    def _example(self) -> Tensor:
        return self.task.inputs("trained", torch.tensor([0]))

    # What came of it.

    def _predict(self, part: Part) -> Tensor | None:
        """The logits of all samples of a part; None if there are none."""
        count = self.task.count(part)
        if count == 0:
            return None
        samples = data_parallel.shard(torch.arange(count))
        with self._autocast():
            logits = predict(self.model, samples, lambda batch: self.task.inputs(part, batch))
        return data_parallel.gather(logits)

    def finish(self) -> list[str]:
        """Lets the methods end their work; gives what they tell the user."""
        lines = [method.finish(self.model, self.states[n]) for n, method in self.methods.items()]
        return [line for line in lines if line]

    def result(self) -> dict[str, Any]:
        """The network as it is now, on the samples trained on, held out and of the test set."""
        self.require_finite(_AT_THE_END)
        scores = self.task.result(
            self._predict("trained"), self._predict("held_out"), self._predict("test")
        )
        require_finite_scores(scores, _AT_THE_END)
        return scores | {
            "epochs_trained": len(self.history),
            "parameters": cost.parameters(self.model),
            "size_in_bits": cost.size_in_bits(self.model),
            "macs": cost.macs(self.model, self._example()),
        }

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
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict()["state"],
            "methods": self.states,
            "history": [asdict(metrics) for metrics in self.history],
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
        model: dict[str, Tensor],
        optimizer: dict[int, dict[str, Tensor]],
        methods: dict[str, dict[str, Any]],
        history: list[dict[str, Any]],
        stopped: bool,
    ) -> None:
        if methods.keys() != self.methods.keys():
            raise ValueError(f"got methods {list(methods)}, takes {list(self.methods)}")
        self.states = methods
        self.load_weights(model, methods)
        self.history = read_history(history, self.config.epochs, self.task.SCORE)
        for name, method in self.methods.items():
            method.check(self.model, methods[name], self.history)
        # The options are those of the configuration, wherever the checkpoint had them.
        options = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": optimizer, "param_groups": options})
        parameters = dict(self.model.named_parameters())
        if len(optimizer) != len(parameters):
            raise ValueError(f"the optimizer has {len(optimizer)} of {len(parameters)} states")
        for name, parameter in parameters.items():
            shape = parameter.shape
            takes = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
            state = self.optimizer.state[parameter]
            if {k: v.shape for k, v in state.items()} != takes:
                raise ValueError(f"the optimizer's state of {name} has other names or shapes")
            for key in ("exp_avg", "exp_avg_sq"):
                # The fused step takes them to lie in memory as the parameter does.
                state[key] = torch.empty_like(parameter, requires_grad=False).copy_(state[key])
        if not isinstance(stopped, bool):
            raise TypeError(f"stopped: got {stopped!r}, takes True or False")
        self.stopped = stopped


def batch_sizes(count: int, size: int) -> list[int]:
    """The sizes of an epoch's batches: `size`, and what is left in a last one. A single sample that
    is left joins the batch before, as batch norm needs two."""
    sizes = [size] * (count // size) + [count % size] * (count % size > 0)
    if sizes[-1] == 1 < size and len(sizes) > 1:
        sizes[-2:] = [size + 1]
    return sizes
