"""F1 scores of action units, over the frames whose label is known."""

import torch
from torch import Tensor

from experiments.data.au import UNKNOWN

_THRESHOLDS = 99
_TIE = 1e-6


def f1(probabilities: Tensor, labels: Tensor, thresholds: Tensor | float = 0.5) -> Tensor:
    """`2 TP / (2 TP + FP + FN)` for each AU, float32 `[T]`; 0 where all three are 0.

    Args:
        probabilities: `[N, T]`; an AU is seen where its own reaches the threshold.
        labels: int8 `[N, T]`, 0, 1 or `UNKNOWN`.
        thresholds: one for all, or one for each AU, `[T]`.
    """
    from torchmetrics.functional.classification import multilabel_f1_score

    return multilabel_f1_score(
        (probabilities >= thresholds).long(),
        labels.long(),
        num_labels=labels.shape[1],
        average="none",
        ignore_index=UNKNOWN,
    ).float()


def best_thresholds(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Of 0.01, 0.02 .. 0.99, the threshold of the highest F1 for each AU, the nearest to 0.5 among
    equals, float32 `[T]`. Arguments are as for `f1`."""
    from torchmetrics.functional.classification import multilabel_precision_recall_curve

    candidates = torch.linspace(0.01, 0.99, _THRESHOLDS, device=probabilities.device)
    precision, recall, _ = multilabel_precision_recall_curve(
        probabilities,
        labels.long(),
        num_labels=labels.shape[1],
        thresholds=candidates,
        ignore_index=UNKNOWN,
    )
    assert isinstance(precision, Tensor)  # as there are thresholds
    assert isinstance(recall, Tensor)
    precision, recall = precision[:, :-1], recall[:, :-1]  # the last stands for no threshold
    scores = (2 * precision * recall / (precision + recall)).nan_to_num(0)
    return candidates[(scores - _TIE * (candidates - 0.5).abs()).argmax(1)]
