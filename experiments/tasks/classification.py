"""One class an image, from training labels of which some are wrong."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments import data
from experiments.data import Dataset, cifar10n
from experiments.data.augment import Normalize, RandomCropFlip
from experiments.data.noise import NOISE_KINDS, NoisyLabels
from experiments.losses import CrossEntropy, Loss
from experiments.models import MODELS
from experiments.seeds import SPLIT, mixed
from experiments.tasks.classification_options import ClassificationOptions
from experiments.tasks.task import Part, Scores, Task, percent, shards
from experiments.training.evaluation import Evaluation, accuracy

if TYPE_CHECKING:
    from experiments.config import FilledConfig
    from experiments.reporting.report import Report


class Classification(Task):
    """Held-out samples are of the training set, with its noisy labels."""

    OPTIONS = ClassificationOptions
    LABELS = "classes"
    SAMPLES = "images"
    LEGEND = (
        "train clean and flipped: of the images with a right and with a wrong label, how many are "
        "given it; wrong ones are memorised"
    )
    SCORE = "accuracy"

    def __init__(self, config: FilledConfig, dataset: Dataset, device: torch.device) -> None:
        self.dataset = dataset
        model = config.of_tasks.classification.model
        assert model is not None  # filled in
        self.make_network = MODELS[model]
        self.device = device
        self.noisy = noisy_labels(config, dataset)
        self.given = self.noisy.given.to(device)
        self.true = self.noisy.true.to(device)
        self.normalize = Normalize.of(dataset.train_images).to(device)
        self.train_images = dataset.train_images.to(device)
        self.test_images = dataset.test_images.to(device)
        self.test_labels = dataset.test_labels.to(device)
        self.trained, self.held_out = self._split(config)
        self.images = RandomCropFlip(
            self.train_images,
            padding=dataset.crop_padding if config.augment else 0,
            flip=dataset.flip and config.augment,
        )

    def _split(self, config: FilledConfig) -> tuple[Tensor, Tensor]:
        count = len(self.given)
        generator = torch.Generator().manual_seed(mixed(config.seed, SPLIT))
        order = torch.randperm(count, generator=generator)
        held_out = round(config.validation * count)
        if held_out == count or (held_out == 0 and config.validation > 0):
            raise ValueError(
                f"--validation: got {config.validation}, which holds out {held_out} of "
                f"{count} images; takes a share that leaves some on both sides"
            )
        return order[held_out:].to(self.device), order[:held_out].to(self.device)

    @staticmethod
    def read(config: FilledConfig) -> Dataset:
        return _read(config.dataset, config.data_dir, config.download, config.train_size)

    @staticmethod
    def report() -> Report:
        from experiments.reporting.classification import REPORT

        return REPORT

    def count(self, part: Part) -> int:
        return len(self._part(part)[1])

    def network(self) -> nn.Module:
        channels = self.dataset.train_images.shape[-1]
        return self.make_network(channels, self.classes)

    def loss(self) -> Loss:
        return CrossEntropy()

    def labels(self, part: Part) -> Tensor:
        return self._part(part)[1]

    def truth(self) -> Tensor:
        return self.true[self.trained]

    @property
    def classes(self) -> int:
        return len(self.dataset.class_names)

    def wrong_labels(self) -> float:
        return self.noisy.flipped.double().mean().item()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return self.images.draw(count, generator)

    def batches(
        self, order: Tensor, views: Tensor, sizes: list[int]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        for samples, seen in shards(order.to(self.device), views.to(self.device), sizes):
            yield samples, (self.trained[samples], seen)

    def pair(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        indices, views = batch
        return self.normalize(self.images(indices, views)), self.given[indices]

    def inputs(self, part: Part, samples: Tensor) -> Tensor:
        images, _, indices = self._part(part)
        samples = samples.to(self.device)
        return self.normalize(images[samples if indices is None else indices[samples]])

    def predicted(self, logits: Tensor) -> Tensor:
        return logits.argmax(1)

    def epoch_scores(
        self, predicted: Tensor, held_out: Tensor | None, test: Tensor | None
    ) -> Scores:
        given, true = self.given[self.trained], self.true[self.trained]
        hits, flipped = predicted == given, given != true
        validation = self._evaluation("held_out", held_out)
        tested = self._evaluation("test", test)
        return {
            "train_accuracy_clean": accuracy(hits[~flipped]),
            "train_accuracy_flipped": accuracy(hits[flipped]),
            "validation_accuracy": None if validation is None else validation.accuracy,
            "validation_loss": None if validation is None else validation.loss,
            "test_accuracy": None if tested is None else tested.accuracy,
            "test_loss": None if tested is None else tested.loss,
            "test_calibration_error": None if tested is None else tested.calibration_error,
        }

    def result(self, trained: Tensor, held_out: Tensor | None, test: Tensor) -> dict[str, Any]:
        given, true = self.given[self.trained], self.true[self.trained]
        predicted, flipped = trained.argmax(1), given != true
        train = Evaluation.of(trained, given)
        tested = Evaluation.of(test, self.test_labels)
        validation = self._evaluation("held_out", held_out)
        return {
            "wrong_labels": self.wrong_labels(),
            "test_accuracy": tested.accuracy,
            "test_loss": tested.loss,
            "test_calibration_error": tested.calibration_error,
            "validation_accuracy": None if validation is None else validation.accuracy,
            "train_accuracy": train.accuracy,
            "train_loss": train.loss,
            "train_accuracy_clean": accuracy((predicted == given)[~flipped]),
            "train_accuracy_flipped": accuracy((predicted == given)[flipped]),
            "flipped_predicted_true": accuracy((predicted == true)[flipped]),
            "accuracy_gap": train.accuracy - tested.accuracy,
            "loss_gap": tested.loss - train.loss,
        }

    def line(self, scores: Scores) -> str:
        return (
            f"train clean {percent(scores['train_accuracy_clean'])} "
            f"flipped {percent(scores['train_accuracy_flipped'])}  "
            f"test {percent(scores['test_accuracy'])}"
        )

    @staticmethod
    def summary(result: dict[str, Any]) -> str:
        return f"test accuracy {result['test_accuracy']:.2%}"

    def label_arrays(self) -> dict[str, np.ndarray]:
        return {
            "indices": self.noisy.redrawn.numpy(),
            "true": self.noisy.true.numpy(),
            "given": self.noisy.given.numpy(),
        }

    def _part(self, part: Part) -> tuple[Tensor, Tensor, Tensor | None]:
        """Images and labels, and where the part's samples are among the images if not all are."""
        if part == "test":
            return self.test_images, self.test_labels, None
        indices = self.trained if part == "trained" else self.held_out
        return self.train_images, self.given[indices], indices

    def _evaluation(self, part: Part, logits: Tensor | None) -> Evaluation | None:
        return None if logits is None else Evaluation.of(logits, self._part(part)[1])


@functools.lru_cache(maxsize=4)
def _read(name: str, data_dir: Path | None, download: bool, train_size: int | None) -> Dataset:
    """Once in a process that prepares many runs."""
    return data.load(name, data_dir, download).with_train_size(train_size)


def noisy_labels(config: FilledConfig, dataset: Dataset) -> NoisyLabels:
    """The training labels of the run."""
    if config.noise_kind in NOISE_KINDS:
        over = dataset
        if config.of_tasks.classification.noise_over == "all":
            over = _read(config.dataset, config.data_dir, config.download, None)
        noisy = NOISE_KINDS[config.noise_kind](over, config.noise, config.noise_seed)
        return noisy if over is dataset else noisy.of(dataset.train_indices)
    path = cifar10n.find(config.data_dir, config.download)
    return cifar10n.human(config.noise_kind, path, dataset)
