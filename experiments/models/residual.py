"""Blocks with a shortcut."""

from torch import Tensor, nn


class Residual(nn.Module):
    """A block whose output is the sum of what it computes and of its shortcut.

    Attributes:
        skip: quantizes both before they are added; ``None``: neither.
    """

    skip: nn.Module | None

    def __init__(self) -> None:
        super().__init__()
        self.register_module("skip", None)

    def summand(self, x: Tensor) -> Tensor:
        """`x` as it is added."""
        return x if self.skip is None else self.skip(x)
