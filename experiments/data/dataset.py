"""What the trainer knows of a data set."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_SUBSET_SEED = 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images as uint8 `[N, H, W, C]`, true labels as int64 `[N]`, and how to train on them."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    train_indices: Tensor
    """Where each training image stands in the full training set."""
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]
    asymmetric_flips: dict[int, int]
    """The class that each easily mistaken class is mistaken for; may be empty."""
    crop_padding: int
    flip: bool

    def with_train_size(self, size: int | None) -> Dataset:
        """The same data set with `size` training images, a larger subset holding the smaller."""
        if size is None:
            return self
        available = len(self.train_labels)
        if size > available:
            raise ValueError(f"--train-size: got {size}, takes 1 to {available} for {self.name}")
        order = torch.randperm(available, generator=torch.Generator().manual_seed(_SUBSET_SEED))
        kept = order[:size]
        return dataclasses.replace(
            self,
            train_images=self.train_images[kept],
            train_labels=self.train_labels[kept],
            train_indices=self.train_indices[kept],
        )

    @cached_property
    def checksum(self) -> str:
        """Identifies the pixels and labels, so that results tell which copy they come from."""
        digest = hashlib.sha256()
        for tensor in (
            self.train_images,
            self.train_labels,
            self.test_images,
            self.test_labels,
        ):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()
