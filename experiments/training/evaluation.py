"""What a network makes of images it does not train on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_BATCH_SIZE = 500
_CALIBRATION_BINS = 15


@torch.inference_mode()
def predict(
    forward: Callable[[Tensor], Tensor], samples: Tensor, inputs: Callable[[Tensor], Tensor]
) -> Tensor:
    """The logits `[N, C]`, in float32, of what `inputs` gives for `samples`."""
    return torch.cat([forward(inputs(batch)).float() for batch in samples.split(_BATCH_SIZE)])


def accuracy(hits: Tensor) -> float | None:
    """The share of hits; None where there is nothing to hit."""
    return hits.sum().item() / len(hits) if len(hits) else None


@dataclass(frozen=True)
class Evaluation:
    """How logits agree with labels."""

    accuracy: float
    loss: float
    """Mean cross-entropy, in nats."""
    calibration_error: float
    """Expected calibration error of the predicted class in 15 bins (Guo et al. 2017, arXiv
    1706.04599): the mean distance between confidence and accuracy."""

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor) -> Evaluation:
        """Compares logits `[N, C]` with labels `[N]`."""
        from torchmetrics.functional.classification import multiclass_calibration_error

        hits = logits.argmax(1) == labels
        return cls(
            accuracy=hits.sum().item() / len(hits),
            loss=F.cross_entropy(logits, labels).item(),
            calibration_error=multiclass_calibration_error(
                logits.softmax(1), labels, logits.shape[1], n_bins=_CALIBRATION_BINS
            ).item(),
        )
