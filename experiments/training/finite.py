"""A training whose numbers are not finite any more."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class NonFiniteLoss(RuntimeError):
    """The loss, the network or a score became infinite or NaN, and no later step can mend it."""


def require_finite(tensors: Iterable[tuple[str, Tensor]], where: str) -> None:
    """Names the first tensor that has other numbers. A device is waited for only once."""
    floats = {name: tensor for name, tensor in tensors if tensor.is_floating_point()}
    flags = [(~tensor.isfinite()).any() for tensor in floats.values()]
    for name, bad in zip(floats, torch.stack(flags).tolist(), strict=True):
        if bad:
            raise NonFiniteLoss(f"{name} has numbers that are not finite {where}")


def require_finite_scores(scores: dict[str, Any], where: str) -> None:
    """Names the first score that is another number; those of single AUs are in dicts of their
    own."""
    for name, value in scores.items():
        if isinstance(value, dict):
            require_finite_scores({f"{name} {key}": v for key, v in value.items()}, where)
        elif isinstance(value, float) and not math.isfinite(value):
            raise NonFiniteLoss(f"{name} is {value} {where}")
