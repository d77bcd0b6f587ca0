"""The loss of the action units (Tallec et al. 2022, MONET, arXiv 2202.07435)."""

import torch.nn.functional as F
from torch import Tensor

from experiments.losses import Loss

_DICE_SHARE = 0.5


def au_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted cross-entropy and half a weighted Dice loss, for `y` and `p = sigmoid(logit)`:

        mean of w (BCE(y, p) + (1 - (2 y p + 1) / (y^2 + p^2 + 1)) / 2)

    over all labels of the batch, where unknown ones count as 0. So each known label weighs the same
    in every batch, and parts of a batch add up.

    Args:
        logits: float32 `[B, T]`.
        labels: `[B, T]`, probabilities from 0 to 1, NaN where unknown.
        weights: `[T]`.
    """
    return _elementwise(logits, labels, weights).mean()


class ActionUnitLoss(Loss):
    """The same as a loss of samples, each of which takes the mean over its labels."""

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return au_loss(logits, labels, self.weights)

    def samples(self, logits: Tensor, labels: Tensor, indices: Tensor) -> Tensor:
        return _elementwise(logits, labels, self.weights).mean(1)


def _elementwise(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    known = ~labels.isnan()
    y, p = labels.nan_to_num(0), logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    dice = 1 - (2 * y * p + 1) / (y.square() + p.square() + 1)
    return weights * known * (entropy + _DICE_SHARE * dice)
