"""What a network makes of images it does not train on."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.data.augment import Normalize

_BATCH_SIZE = 500


@torch.inference_mode()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, normalize: Normalize
) -> tuple[Tensor, float]:
    """Whether each prediction is the label, and the mean cross-entropy."""
    model.eval()
    hits, loss = [], 0.0
    for batch, expected in zip(images.split(_BATCH_SIZE), labels.split(_BATCH_SIZE), strict=True):
        logits = model(normalize(batch))
        hits.append(logits.argmax(1) == expected)
        loss += F.cross_entropy(logits, expected, reduction="sum").item()
    return torch.cat(hits), loss / len(labels)


def accuracy(hits: Tensor) -> float | None:
    """The share of hits; None where there is nothing to hit."""
    return hits.sum().item() / len(hits) if len(hits) else None
