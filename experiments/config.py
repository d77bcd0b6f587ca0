"""The options of one run."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tyro.extras import literal_type_from_choices

from experiments.data import DATASETS
from experiments.data.noise import NOISE_KINDS
from experiments.methods import METHODS, options
from noisyq_fast.backends import AUTO, BACKENDS

_CHOICES = {
    "method": METHODS,
    "dataset": DATASETS,
    "noise_kind": NOISE_KINDS,
    "backend": (AUTO, *BACKENDS),
}
# None of these changes a number in the results; the data are identified by their checksum.
_WITHOUT_EFFECT = {"data_dir", "download", "backend", "out"}


@dataclass(frozen=True)
class RunConfig:
    """Train one ResNet-20 on images whose training labels are partly wrong.

    The test labels are never changed. Every run writes its options, its noisy labels, the metrics
    of each epoch, the final result and the trained weights into a folder of its own. The default
    run needs no download and takes about a minute on one CPU core.
    """

    method: literal_type_from_choices(METHODS) = "baseline"
    """baseline: plain training. quant: quantization-aware training."""

    dataset: literal_type_from_choices(DATASETS) = "digits"
    """digits: 1,797 images of 8x8 from scikit-learn. cifar10: 60,000 of 32x32."""

    data_dir: Path | None = None
    """Where CIFAR-10 is: the folder cifar-10-batches-py, the archive cifar-10-python.tar.gz or a
    directory that holds either. If not given: the user's cache."""

    download: bool = False
    """Fetch CIFAR-10 (170 MB) into --data-dir if it is not there."""

    train_size: int | None = None
    """Train on so many images only, the same for every seed and method. If not given: all."""

    noise: float = 0.4
    """Share of the training labels that are re-drawn, from 0 to 1."""

    noise_kind: literal_type_from_choices(NOISE_KINDS) = "symmetric"
    """symmetric: re-drawn uniformly over all classes, the true one included."""

    noise_seed: int = 0
    """Seed of the noise. Runs that differ in --seed only share their wrong labels."""

    weight_bits: int = 4
    """quant: bits of the weights, 2 to 8; always 8 in the first and the last layer."""

    activation_bits: int = 4
    """quant: bits of each layer's input, 2 to 8; always 8 in the first and the last layer."""

    epochs: int | None = None
    """Passes over the training set. If not given: as many as suit the data set."""

    batch_size: int = 128
    """Images in a step."""

    lr: float = 1e-3
    """First learning rate. It falls after 40, 60, 80 and 90 % of the epochs."""

    augment: bool = True
    """Random crops, and flips where a mirror image keeps its class."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""

    threads: int | None = None
    """CPU threads. They can change the last digits. If not given: what suits the data set."""

    backend: literal_type_from_choices((AUTO, *BACKENDS)) = AUTO
    """What computes the quantizer; auto: NOISYQ_BACKEND, or else the fastest. Every choice gives
    the same numbers."""

    out: Path = Path("runs")
    """Directory in which the run makes its folder."""

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            takes = "one of " + ", ".join(choices)
            self._require(name, getattr(self, name) in choices, takes)
        self._require("noise", 0 <= self.noise <= 1, "a share from 0 to 1")
        for name in ("weight_bits", "activation_bits"):
            self._require(name, 2 <= getattr(self, name) <= 8, "a whole number from 2 to 8")
        for name in ("train_size", "epochs", "batch_size", "threads"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "a whole number from 1")
        for name in ("seed", "noise_seed"):
            self._require(
                name,
                0 <= getattr(self, name) < 2**63,
                "a whole number from 0 to 2^63-1",
            )
        self._require("lr", 0 < self.lr < math.inf, "a finite number above 0")

    def _require(self, name: str, accepted: bool, takes: str) -> None:
        if not accepted:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option}: got {getattr(self, name)}, takes {takes}")

    def resolved(self, epochs: int, threads: int) -> RunConfig:
        """These options, with what was left to a default filled in."""
        return dataclasses.replace(
            self, epochs=self.epochs or epochs, threads=self.threads or threads
        )

    def identity(self) -> dict[str, Any]:
        """The options that can change a number in the results of this method."""
        unread = set().union(*map(options, METHODS.values())) - set(options(METHODS[self.method]))
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in unread | _WITHOUT_EFFECT
        }
