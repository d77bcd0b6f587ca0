"""Train longer, generalize better (Hoffer et al. 2017, arXiv 1705.08741)."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import nn

from experiments.checks import require, require_whole
from experiments.methods.method import Method
from experiments.training import data_parallel
from experiments.training.procedure import Batch, Parts, Procedure, StepResult, batch_sizes


@dataclass(frozen=True)
class TrainLonger(Method):
    """Trains with large batches as often as a small one would: an epoch goes over all images
    ceil(B / G) times, for batches of B and ghost batches of G images, and so do the steps of the
    schedule. The rate is sqrt(B / G) times as high, and gradients are clipped to a norm of 5.

    Batch norm, and the ranges of activations, see a ghost batch at a time: each goes through the
    network alone, and their gradients are averaged. --batch-size is B, 4 G unless given. Nothing
    changes where no batch is larger than G. A single image that is left over joins the ghost batch
    before; of several processes each has a part of every ghost batch. Other than in the paper, the
    optimizer is Adam, for which the norm of a gradient matters little.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"ghost_batch": 128}
    REPLACES: ClassVar[str] = "procedure"

    ghost_batch: int | None = None
    """Images of a ghost batch, G, from 2."""

    clip_norm: float = 5.0
    """The largest norm of a gradient, above 0."""

    def __post_init__(self) -> None:
        require_whole("ghost_batch", self.ghost_batch, 2, 2**14)
        clip = self.clip_norm
        require("clip_norm", clip, 0 < clip < math.inf, "a finite number above 0")

    @property
    def label(self) -> str:
        clip = "" if self.clip_norm == 5 else f"-clip{self.clip_norm:g}"
        return f"train-longer{self.ghost_batch}{clip}"

    def recipe(self, recipe: Any) -> Any:
        return replace(recipe, batch_size=4 * self.ghost_batch)

    def procedure(self, parts: Parts) -> Procedure | None:
        size = min(parts.sizes[0], parts.config.batch_size)
        if size <= self.ghost_batch:
            return None
        return LargeBatches(parts, size, self.ghost_batch, self.clip_norm)


class LargeBatches(Procedure):
    """Batches of which the network sees a part at a time."""

    def __init__(self, parts: Parts, size: int, ghost_size: int, clip_norm: float) -> None:
        super().__init__(parts)
        self.rounds = math.ceil(size / ghost_size)
        self.factor = rate_factor(size, ghost_size)
        self.ghost_size = ghost_size
        self.clip_norm = clip_norm
        self._check(parts.sizes)

    def _check(self, sizes: Iterable[int]) -> None:
        processes = data_parallel.size()
        for whole in set(sizes):
            for own in (whole // processes, -(-whole // processes)):
                ends = [0, *ghost_ends(own, whole, self.ghost_size)]
                if any(first == end for first, end in pairwise(ends)):
                    raise ValueError(
                        f"--ghost-batch: got {self.ghost_size}, which leaves a process without an "
                        f"image of a ghost batch; takes a size that gives each of {processes} some"
                    )

    def schedule(self, epoch: int, step: int) -> float:
        return self.factor * super().schedule(epoch, step)

    def step(self, batch: Batch) -> StepResult:
        self.optimizers[0].zero_grad()
        losses, logits = [], []
        for ghost in ghosts(batch, self.ghost_size):
            with self.parts.autocast():
                scores = self.forwards[0](ghost.inputs).float()
                loss = self.losses[0](scores, ghost.labels, ghost.indices) * ghost.share
            loss.backward()
            losses.append(loss.detach())
            logits.append(scores.detach())
        data_parallel.sum_gradients_(self.networks[0])
        nn.utils.clip_grad_norm_(self.networks[0].parameters(), self.clip_norm)
        self.optimizers[0].step()
        return StepResult(torch.stack(losses).sum() / batch.share, torch.cat(logits))


def rate_factor(size: int, ghost_size: int) -> float:
    """By which the learning rate is higher for large batches."""
    return math.sqrt(size / ghost_size)


def ghosts(batch: Batch, size: int) -> list[Batch]:
    """The parts of a batch, of `size` samples over all processes; a last one may be smaller. Their
    shares are of the whole batch."""
    own = len(batch.indices)
    whole = round(own / batch.share)
    ends = ghost_ends(own, whole, size)
    parts = (x.tensor_split(ends[:-1]) for x in (batch.indices, batch.inputs, batch.labels))
    return [
        Batch(indices, inputs, labels, share=len(indices) / whole)
        for indices, inputs, labels in zip(*parts, strict=True)
    ]


def ghost_ends(own: int, whole: int, size: int) -> list[int]:
    """Where the ghost batches end among the `own` samples that a process has of a `whole` batch: as
    many of them in every process."""
    return [round(end * own / whole) for end in accumulate(batch_sizes(whole, size))]
