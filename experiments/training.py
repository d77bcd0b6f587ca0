"""The training loop."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from experiments import methods
from experiments.config import RunConfig
from experiments.data import Dataset
from experiments.data.augment import Normalize, RandomCropFlip
from experiments.data.noise import NoisyLabels
from experiments.evaluation import accuracy, evaluate
from experiments.models import ResNet20
from experiments.schedule import learning_rate


class NonFiniteLoss(RuntimeError):
    """The loss became infinite or NaN, so that no later step can mend the network."""


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Training accuracies are against the given labels, on the batches as they were
    trained, apart for samples whose label is right (clean) and wrong (flipped: memorised)."""

    epoch: int
    loss: float
    train_accuracy_clean: float | None
    train_accuracy_flipped: float | None
    test_accuracy: float
    test_loss: float
    learning_rate: float
    seconds: float


class Trainer:
    """Trains a network on noisy labels.

    For one seed, every method starts from the same weights and sees the same batches.
    """

    def __init__(self, config: RunConfig, dataset: Dataset, labels: NoisyLabels) -> None:
        self.config = config
        self.dataset = dataset
        self.labels = labels
        self.method = methods.build(config)
        self.model = self._build_model()
        self.optimizer = self.method.optimizer(self.model.parameters(), config.lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.normalize = Normalize.of(dataset.train_images)
        self.images = RandomCropFlip(
            dataset.train_images,
            padding=dataset.crop_padding if config.augment else 0,
            flip=dataset.flip and config.augment,
        )

    def _build_model(self) -> nn.Module:
        torch.manual_seed(self.config.seed)
        model = ResNet20(
            in_channels=self.dataset.train_images.shape[-1],
            num_classes=len(self.dataset.class_names),
        )
        return self.method.model(model).to(memory_format=torch.channels_last)

    def epochs(self) -> Iterator[EpochMetrics]:
        """Trains, and gives the metrics of each epoch as soon as it is over."""
        epochs = self.config.epochs
        total = epochs * len(self.labels.given)
        with tqdm(total=total, unit="img", unit_scale=True, disable=None) as progress:
            for epoch in range(epochs):
                metrics = self._epoch(epoch, progress)
                progress.set_description_str(f"test {metrics.test_accuracy:.2%}")
                progress.write(_line(metrics, epochs))
                yield metrics

    def _epoch(self, epoch: int, progress: tqdm) -> EpochMetrics:
        started = time.perf_counter()
        rate = learning_rate(self.config.lr, epoch, self.config.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        given, flipped = self.labels.given, self.labels.flipped
        hits = torch.zeros(len(given), dtype=torch.bool)
        loss_sum = 0.0
        self.model.train()
        order = torch.randperm(len(given), generator=self.generator)
        for step, batch in enumerate(order.split(self.config.batch_size)):
            logits = self.model(self.normalize(self.images(batch, self.generator)))
            loss = self.method.loss(logits, given[batch])
            value = loss.item()
            if not math.isfinite(value):
                raise NonFiniteLoss(
                    f"the loss is {value} in epoch {epoch + 1}, step {step + 1}, "
                    f"at learning rate {rate:g}"
                )
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            hits[batch] = logits.argmax(1) == given[batch]
            loss_sum += value * len(batch)
            progress.set_postfix_str(f"loss {value:.3f}", refresh=False)
            progress.update(len(batch))
        test_hits, test_loss = evaluate(
            self.model,
            self.dataset.test_images,
            self.dataset.test_labels,
            self.normalize,
        )
        return EpochMetrics(
            epoch=epoch + 1,
            loss=loss_sum / len(given),
            train_accuracy_clean=accuracy(hits[~flipped]),
            train_accuracy_flipped=accuracy(hits[flipped]),
            test_accuracy=accuracy(test_hits),
            test_loss=test_loss,
            learning_rate=rate,
            seconds=time.perf_counter() - started,
        )

    def train_accuracies(self) -> tuple[float | None, float | None]:
        """Accuracy against the given labels, without augmentation: clean and flipped samples."""
        flipped = self.labels.flipped
        hits, _ = evaluate(self.model, self.dataset.train_images, self.labels.given, self.normalize)
        return accuracy(hits[~flipped]), accuracy(hits[flipped])


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
