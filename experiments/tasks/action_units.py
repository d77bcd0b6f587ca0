"""Which action units (AUs) move a face, from the labels of annotators (arXiv 2303.11803, section
4.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.data import au
from experiments.data.au import UNKNOWN, Frames, augment
from experiments.data.au.frequency import frequency_weights
from experiments.data.au.pool import FramePool
from experiments.data.augment import Normalize
from experiments.losses import Loss
from experiments.models import (
    ActionUnitNetwork,
    InceptionV3Encoder,
    PerAUHead,
    SharedHead,
    SmallEncoder,
)
from experiments.models.inception import torchvision_models
from experiments.seeds import SPLIT, mixed
from experiments.tasks.action_unit_options import ActionUnitOptions
from experiments.tasks.au_loss import ActionUnitLoss, au_loss
from experiments.tasks.f1 import best_thresholds, f1
from experiments.tasks.task import Part, Scores, Task, percent, shards
from experiments.training.evaluation import accuracy

if TYPE_CHECKING:
    from experiments.config import FilledConfig
    from experiments.reporting.report import Report

_SAMPLE = 2000  # pictures to normalize by


class ActionUnits(Task):
    """A fold: tests on the subjects of one part, trains on those of the others, of which some are
    held out to choose the epoch and the thresholds."""

    OPTIONS = ActionUnitOptions
    LABELS = "answers"
    SAMPLES = "pictures"
    LEGEND = (
        "F1: mean over the action units, against the labels that are given, also of test pictures"
    )
    SCORE = "f1"
    OBJECTS = ("thresholds",)

    def __init__(self, config: FilledConfig, frames: Frames, device: torch.device) -> None:
        self.config = config
        self.frames = frames
        self.device = device
        fold = config.of_tasks.action_units.fold
        assert fold is not None  # filled in
        self.parts = split(frames, fold, config.validation, config.seed)
        self.pool = FramePool(frames.images, frames.row, device)
        self.given = frames.given.to(device)
        self.true = None if frames.truth is None else frames.truth.to(device)
        self.weights = frequency_weights(frames.given[self.parts["trained"]]).to(device)
        self.normalize = self._normalize().to(device)

    @staticmethod
    def read(config: FilledConfig) -> Frames:
        options = config.of_tasks.action_units
        if options.encoder == "inception_v3":
            torchvision_models()  # may be missing: told before pictures are decoded for hours
        size = options.image_size
        if config.dataset == au.SYNTHETIC:
            return au.draw(size, options.frames_per_subject, config.noise, config.noise_seed)
        return au.load(config.dataset, config.data_dir, size, options.strict, options.cache_dir)

    @staticmethod
    def report() -> Report:
        from experiments.reporting.action_units import REPORT

        return REPORT

    def _normalize(self) -> Normalize:
        if self.config.of_tasks.action_units.pretrained:
            return Normalize(torch.full((3,), 127.5), torch.full((3,), 127.5))  # as it was trained
        rows = self.frames.row[self.parts["trained"]]
        step = -(-len(rows) // _SAMPLE)
        return Normalize.of(self.frames.images[rows[::step]])

    def count(self, part: Part) -> int:
        return len(self.parts[part])

    def network(self) -> nn.Module:
        options, aus = self.config.of_tasks.action_units, len(self.frames.aus)
        encoder = (
            SmallEncoder() if options.encoder == "small" else InceptionV3Encoder(options.pretrained)
        )
        if options.au_head == "shared":
            return ActionUnitNetwork(encoder, SharedHead(encoder.features, aus))
        assert options.au_norm is not None  # filled in
        return ActionUnitNetwork(encoder, PerAUHead(encoder.features, aus, options.au_norm))

    def loss(self) -> Loss:
        return ActionUnitLoss(self.weights)

    def labels(self, part: Part) -> Tensor:
        return _as_probabilities(self._labels(part)[0])

    def truth(self) -> Tensor | None:
        return self._labels("trained")[1]

    @property
    def classes(self) -> int:
        return len(self.frames.aus)

    def wrong_labels(self) -> float | None:
        given, truth = self._labels("trained")
        if truth is None:
            return None
        known = given != UNKNOWN
        return ((given != truth) & known).sum().item() / known.sum().item()

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        return augment.draw(count, generator)

    def batches(
        self, order: Tensor, views: Tensor, sizes: list[int]
    ) -> Iterator[tuple[Tensor, tuple[Tensor, ...]]]:
        parts = list(shards(order, views, sizes))
        indices = [self.parts["trained"][samples] for samples, _ in parts]
        pictures = self.pool.batches(indices)
        for (samples, seen), frames, images in zip(parts, indices, pictures, strict=True):
            given = self.given[frames.to(self.device)]
            yield samples.to(self.device), (images, seen.to(self.device), given)

    def pair(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        images, views, given = batch
        inputs = self.normalize(images)
        if self.config.augment:
            inputs = augment.transformed(inputs, views)
        return inputs, _as_probabilities(given)

    def inputs(self, part: Part, samples: Tensor) -> Tensor:
        return self.normalize(self.pool(self.parts[part][samples]))

    def predicted(self, logits: Tensor) -> Tensor:
        return (logits.sigmoid() >= 0.5).to(torch.uint8)

    def epoch_scores(
        self, predicted: Tensor, held_out: Tensor | None, test: Tensor | None
    ) -> Scores:
        assert held_out is not None  # split() leaves some
        given, truth = self._labels("trained")
        tested, test_truth = self._labels("test")
        return {
            "train_f1": _mean(f1(predicted, given)),
            **_memorised(predicted, given, truth),
            "validation_f1": _mean(f1(held_out.sigmoid(), self._labels("held_out")[0])),
            "validation_loss": self._loss("held_out", held_out),
            "test_f1": None if test is None else _mean(f1(test.sigmoid(), tested)),
            "test_f1_truth": (
                None
                if test is None or test_truth is None
                else _mean(f1(test.sigmoid(), test_truth))
            ),
            "test_loss": None if test is None else self._loss("test", test),
        }

    def result(self, trained: Tensor, held_out: Tensor | None, test: Tensor) -> dict[str, Any]:
        assert held_out is not None  # split() leaves some
        given, truth = self._labels("trained")
        chosen = best_thresholds(held_out.sigmoid(), self._labels("held_out")[0])
        scores = self._test_scores(test.sigmoid(), chosen)
        by_annotators = scores["test_f1"]
        assert by_annotators is not None
        predicted = self.predicted(trained)
        return {
            "fold": self.config.of_tasks.action_units.fold,
            "wrong_labels": self.wrong_labels(),
            **{name: None if score is None else _mean(score) for name, score in scores.items()},
            "test_f1_std": by_annotators.std().item(),
            "validation_f1": _mean(f1(held_out.sigmoid(), self._labels("held_out")[0])),
            "train_f1": _mean(f1(predicted, given)),
            "test_loss": self._loss("test", test),
            **_memorised(predicted, given, truth),
            **{
                f"{name}_per_au": None if score is None else self._by_au(score)
                for name, score in scores.items()
            },
            "thresholds": self._by_au(chosen),
            "held_out_subjects": sorted(
                {self.frames.subjects[s] for s in self.frames.subject[self.parts["held_out"]]}
            ),
        }

    def line(self, scores: Scores) -> str:
        return (
            f"F1 train {percent(scores['train_f1'])} validation "
            f"{percent(scores['validation_f1'])} test {percent(scores['test_f1'])}"
        )

    @staticmethod
    def summary(result: dict[str, Any]) -> str:
        scores = [f"{result['test_f1']:.2%} against the annotators"]
        if result["test_f1_truth"] is not None:
            scores.append(f"{result['test_f1_truth']:.2%} against the truth")
        return f"test F1 {', '.join(scores)} (means of {len(result['thresholds'])} AUs)"

    def label_arrays(self) -> dict[str, np.ndarray]:
        indices = self.parts["trained"]
        arrays = {"indices": indices.numpy(), "given": self.frames.given[indices].numpy()}
        if self.frames.truth is not None:
            arrays["true"] = self.frames.truth[indices].numpy()
        return arrays

    def _labels(self, part: Part) -> tuple[Tensor, Tensor | None]:
        """Of a part's frames, what the annotators said and what is true."""
        indices = self.parts[part].to(self.device)
        return self.given[indices], None if self.true is None else self.true[indices]

    def _loss(self, part: Part, logits: Tensor) -> float:
        return au_loss(logits, self.labels(part), self.weights).item()

    def _test_scores(self, probabilities: Tensor, chosen: Tensor) -> dict[str, Tensor | None]:
        """F1 by AU against annotators and truth, at 0.5 and at the chosen thresholds."""
        given, truth = self._labels("test")
        scores: dict[str, Tensor | None] = {}
        for name, labels in (("test_f1", given), ("test_f1_truth", truth)):
            ways: tuple[tuple[str, Tensor | float], ...] = (("", 0.5), ("_chosen", chosen))
            for suffix, thresholds in ways:
                scores[name + suffix] = (
                    None if labels is None else f1(probabilities, labels, thresholds)
                )
        return scores

    def _by_au(self, values: Tensor) -> dict[str, float]:
        return dict(zip(map(str, self.frames.aus), values.tolist(), strict=True))


def split(frames: Frames, fold: int, validation: float, seed: int) -> dict[Part, Tensor]:
    """The frames of each part of a fold: fold 1 tests on the last third of the subjects, fold 3 on
    the first. Of the others, `round(validation * n)` of `n` subjects are held out at random."""
    test = frames.part == 3 - fold
    for name, chosen in (("test", test), ("training", ~test)):
        if not chosen.any():
            raise ValueError(f"--fold: got {fold}, of which {frames.name} has no {name} frame here")
    subjects = frames.subject[~test].unique()
    count = round(validation * len(subjects))
    if count in (0, len(subjects)):
        raise ValueError(
            f"--validation: got {validation}, which holds out {count} of {len(subjects)} subjects; "
            "takes a share that leaves some on both sides"
        )
    generator = torch.Generator().manual_seed(mixed(seed, SPLIT))
    order = torch.randperm(len(subjects), generator=generator)
    held_out = torch.isin(frames.subject, subjects[order[:count]]) & ~test
    parts: dict[Part, Tensor] = {"trained": ~test & ~held_out, "held_out": held_out, "test": test}
    return {name: chosen.nonzero().flatten() for name, chosen in parts.items()}


def _as_probabilities(labels: Tensor) -> Tensor:
    return labels.float().masked_fill(labels == UNKNOWN, torch.nan)


def _mean(scores: Tensor) -> float:
    return scores.mean().item()


def _memorised(predicted: Tensor, given: Tensor, truth: Tensor | None) -> Scores:
    """The share of given labels that are predicted, apart for right and wrong ones."""
    if truth is None:
        return {"train_right_fitted": None, "train_wrong_fitted": None}
    known = given != UNKNOWN
    hits, right = (predicted == given)[known], (given == truth)[known]
    return {
        "train_right_fitted": accuracy(hits[right]),
        "train_wrong_fitted": accuracy(hits[~right]),
    }
