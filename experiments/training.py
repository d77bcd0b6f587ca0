"""The training loop."""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from experiments import cost, distributed
from experiments.config import RunConfig
from experiments.cuda_graph import GraphedStep
from experiments.data import Dataset
from experiments.data.augment import Normalize, RandomCropFlip
from experiments.data.noise import NoisyLabels
from experiments.evaluation import Evaluation, accuracy, predict
from experiments.methods.weight_decay import decayed
from experiments.models import ResNet20
from experiments.schedule import SCHEDULES

_CPU = torch.device("cpu")
_CHECK_EVERY = 20  # steps: reading a loss makes a GPU wait
_CHECKPOINT_FORMAT = 1
# Streams of random numbers that must not be the same, nor those of the noise.
_SPLIT, _ORDER, _STEPS = 1, 2, 3


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN, so that no later step can mend the network."""


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch.

    Training accuracies are against the given labels, on the batches as they were trained, apart for
    samples whose label is right (clean) and wrong (flipped: memorised). The test set is evaluated
    in some epochs only.
    """

    epoch: int
    loss: float
    train_accuracy_clean: float | None
    train_accuracy_flipped: float | None
    validation_accuracy: float | None
    validation_loss: float | None
    test_accuracy: float | None
    test_loss: float | None
    test_calibration_error: float | None
    learning_rate: float
    seconds: float


class Trainer:
    """Trains a network on noisy labels.

    For one seed, every method starts from the same weights, holds out the same samples and sees the
    same batches. Random numbers of an epoch come from the seed and the epoch alone.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Dataset,
        labels: NoisyLabels,
        device: torch.device = _CPU,
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.device = device
        self.methods = config.methods
        self.states: dict[str, dict[str, Any]] = {name: {} for name in self.methods}
        self.history: list[EpochMetrics] = []
        self.stopped = False

        self.normalize = Normalize.of(dataset.train_images).to(self.device)
        self.train_images = dataset.train_images.to(self.device)
        self.test_images = dataset.test_images.to(self.device)
        self.test_labels = dataset.test_labels.to(self.device)
        self.given = labels.given.to(self.device)
        self.true = labels.true.to(self.device)
        self.trained, self.held_out = self._split(len(labels.given))
        self.images = RandomCropFlip(
            self.train_images,
            padding=dataset.crop_padding if config.augment else 0,
            flip=dataset.flip and config.augment,
        )
        smallest = min(len(self.trained), (len(self.trained) - 1) % config.batch_size + 1)
        if smallest < distributed.size():
            raise ValueError(
                f"--batch-size: got {config.batch_size}, which leaves {smallest} of "
                f"{len(self.trained)} images to the last batch of an epoch; takes a size that "
                f"leaves one for each of {distributed.size()} processes"
            )

        self.model = self._network()
        self._prepare_to_train()

    # What is trained.

    def _split(self, count: int) -> tuple[Tensor, Tensor]:
        """The samples that are trained on and those that are held out."""
        generator = torch.Generator().manual_seed(_mixed(self.config.seed, _SPLIT))
        order = torch.randperm(count, generator=generator)
        held_out = round(self.config.validation * count)
        if held_out == count or (held_out == 0 and self.config.validation > 0):
            raise ValueError(
                f"--validation: got {self.config.validation}, which holds out {held_out} of "
                f"{count} images; takes a share that leaves some on both sides"
            )
        return order[held_out:].to(self.device), order[:held_out].to(self.device)

    def _network(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        model: nn.Module = ResNet20(
            in_channels=self.dataset.train_images.shape[-1],
            num_classes=len(self.dataset.class_names),
        )
        for method in self.methods.values():
            model = method.network(model)
        model = model.to(self.device, memory_format=torch.channels_last)
        return distributed.synchronize_(model)

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
            weight_decay=0.0,  # so it is Adam, but where a method says otherwise
            fused=True,
            capturable=self.config.cuda_graph,
        )
        self.loss = F.cross_entropy
        for method in self.methods.values():
            self.loss = method.loss(self.loss, self.model)
        self.forward = torch.compile(self.model) if self.config.compile else self.model
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

    def _set_rate(self, rate: float) -> None:
        for parameters in self.optimizer.param_groups:
            if self.config.cuda_graph:
                parameters["lr"].fill_(rate)
            else:
                parameters["lr"] = rate

    # One step and one epoch.

    def _step(self, indices: Tensor, views: Tensor, share: float) -> tuple[Tensor, Tensor]:
        """The loss and the hits of a batch, which may be this process's share of a larger one."""
        labels = self.given[indices]
        with self._autocast():
            logits = self.forward(self.normalize(self.images(indices, views))).float()
            loss = self.loss(logits, labels)
        self.optimizer.zero_grad()
        (loss * share).backward()
        distributed.sum_gradients_(self.model)
        self.optimizer.step()
        return loss.detach(), logits.argmax(1) == labels

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
        images = len(self.trained)
        with tqdm(
            total=epochs * images,
            initial=len(self.history) * images,
            unit="img",
            unit_scale=True,
            disable=None if distributed.is_main() else True,
        ) as progress:
            while len(self.history) < epochs and not self.stopped:
                metrics = self._epoch(len(self.history), progress)
                self.history.append(metrics)
                self.stopped = any(
                    [
                        method.end_epoch(self.model, self.states[name], metrics)
                        for name, method in self.methods.items()
                    ]
                )
                if distributed.is_main():
                    progress.write(_line(metrics, epochs))
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
        rate = self.config.lr * SCHEDULES[self.config.schedule](epoch, self.config.epochs)
        self._set_rate(rate)
        loss, hits = self._train(epoch, rate, progress)
        flipped = (self.given != self.true)[self.trained]
        validation = self._evaluate(self.train_images, self.given, self.held_out)
        is_last = epoch + 1 == self.config.epochs
        test = None
        if is_last or (epoch + 1) % self.config.evaluate_every == 0:
            test = self._evaluate(self.test_images, self.test_labels)
        return EpochMetrics(
            epoch=epoch + 1,
            loss=loss,
            train_accuracy_clean=accuracy(hits[~flipped]),
            train_accuracy_flipped=accuracy(hits[flipped]),
            validation_accuracy=validation and validation.accuracy,
            validation_loss=validation and validation.loss,
            test_accuracy=test and test.accuracy,
            test_loss=test and test.loss,
            test_calibration_error=test and test.calibration_error,
            learning_rate=rate,
            seconds=time.perf_counter() - started,
        )

    def _train(self, epoch: int, rate: float, progress: tqdm) -> tuple[float, Tensor]:
        """The mean loss, and whether each sample that is trained on was predicted as labelled."""
        count, size = len(self.trained), self.config.batch_size
        generator = torch.Generator().manual_seed(_mixed(self.config.seed, _ORDER, epoch))
        order = torch.randperm(count, generator=generator).to(self.device)
        views = self.images.draw(count, generator).to(self.device)
        hits = torch.zeros(count, dtype=torch.bool, device=self.device)
        losses = torch.zeros(math.ceil(count / size), device=self.device)
        self.model.train()
        for step, (batch, batch_views) in enumerate(
            zip(order.split(size), views.split(size), strict=True)
        ):
            mine, mine_views = distributed.shard(batch), distributed.shard(batch_views)
            share = len(mine) / len(batch)
            loss, hits[mine] = self.step(self.trained[mine], mine_views, share=share)
            losses[step] = loss * share
            progress.update(len(batch))
            if (step + 1) % _CHECK_EVERY == 0 or step + 1 == len(losses):
                first = step // _CHECK_EVERY * _CHECK_EVERY
                checked = losses[first : step + 1]
                distributed.sum_(checked)
                self._check(checked.tolist(), epoch, first, rate)
                progress.set_postfix_str(f"loss {checked[-1]:.3f}", refresh=False)
        sizes = torch.tensor([len(batch) for batch in order.split(size)], device=self.device)
        hits = distributed.sum_(hits.to(torch.uint8))  # each is one process's
        return (losses @ sizes.float()).item() / count, hits.bool()

    def _check(self, losses: list[float], epoch: int, first: int, rate: float) -> None:
        for step, loss in enumerate(losses, first):
            if not math.isfinite(loss):
                saved = f"epoch {epoch}" if epoch else "none yet"
                raise NonFiniteLoss(
                    f"the loss is {loss} in epoch {epoch + 1}, step {step + 1}, at learning rate "
                    f"{rate:g}; last checkpoint: {saved}"
                )

    def _seed(self, epoch: int) -> None:
        torch.manual_seed(_mixed(self.config.seed, _STEPS, epoch, distributed.rank()))

    def _example(self) -> Tensor:
        return self.normalize(self.test_images[:1])

    # What came of it.

    def _predict(self, images: Tensor) -> Tensor:
        with self._autocast():
            logits = predict(self.model, distributed.shard(images), self.normalize)
        return distributed.gather(logits)

    def _evaluate(
        self, images: Tensor, labels: Tensor, indices: Tensor | None = None
    ) -> Evaluation | None:
        if indices is not None:
            images, labels = images[indices], labels[indices]
        return Evaluation.of(self._predict(images), labels) if len(labels) else None

    def finish(self) -> list[str]:
        """Lets the methods end their work; gives what they tell the user."""
        lines = [method.finish(self.model, self.states[n]) for n, method in self.methods.items()]
        return [line for line in lines if line]

    def result(self) -> dict[str, Any]:
        """The network as it is now, on the samples trained on, held out and of the test set."""
        logits = self._predict(self.train_images[self.trained])
        given, true = self.given[self.trained], self.true[self.trained]
        predicted, flipped = logits.argmax(1), given != true
        train = Evaluation.of(logits, given)
        test = self._evaluate(self.test_images, self.test_labels)
        validation = self._evaluate(self.train_images, self.given, self.held_out)
        return {
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            "test_calibration_error": test.calibration_error,
            "validation_accuracy": validation and validation.accuracy,
            "train_accuracy": train.accuracy,
            "train_loss": train.loss,
            "train_accuracy_clean": accuracy((predicted == given)[~flipped]),
            "train_accuracy_flipped": accuracy((predicted == given)[flipped]),
            "flipped_predicted_true": accuracy((predicted == true)[flipped]),
            "accuracy_gap": train.accuracy - test.accuracy,
            "loss_gap": test.loss - train.loss,
            "epochs_trained": len(self.history),
            "parameters": cost.parameters(self.model),
            "size_in_bits": cost.size_in_bits(self.model),
            "macs": cost.macs(self.model, self._example()),
        }

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """All that the epochs to come depend on."""
        return {
            "format": _CHECKPOINT_FORMAT,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "methods": self.states,
            "history": [dataclasses.asdict(metrics) for metrics in self.history],
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint of the same run."""
        if state["format"] != _CHECKPOINT_FORMAT:
            raise ValueError(
                f"the checkpoint has format {state['format']}, this version takes "
                f"{_CHECKPOINT_FORMAT}; --restart starts anew"
            )
        self.states = state["methods"]
        self.load_weights(state["model"], self.states)
        self.optimizer.load_state_dict(state["optimizer"])
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = self._rate(self.config.lr)  # not where the checkpoint had it
        self.history = [EpochMetrics(**metrics) for metrics in state["history"]]
        self.stopped = state["stopped"]


def _mixed(*numbers: int) -> int:
    """A seed of its own for every sequence of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _line(metrics: EpochMetrics, epochs: int) -> str:
    def percent(share: float | None) -> str:
        return "   -   " if share is None else f"{share:7.2%}"

    return (
        f"epoch {metrics.epoch:{len(str(epochs))}}/{epochs}  loss {metrics.loss:.4f}  "
        f"train clean {percent(metrics.train_accuracy_clean)} "
        f"flipped {percent(metrics.train_accuracy_flipped)}  "
        f"test {percent(metrics.test_accuracy)}  "
        f"lr {metrics.learning_rate:g}  {metrics.seconds:.1f} s"
    )
