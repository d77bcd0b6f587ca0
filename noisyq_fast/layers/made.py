"""What is made of tensors once, as long as they stay what they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Made:
    """A value, and the tensors and options that it was made of."""

    def __init__(self, value: Any, tensors: Iterable[Tensor | None], options: Any) -> None:
        self.value = value
        self._tensors = [(x, None if x is None else x._version) for x in tensors]
        self._options = options

    def is_of(self, tensors: Iterable[Tensor | None], options: Any) -> bool:
        """Whether the tensors are the same ones, unchanged but through ``x.data``."""
        now = list(tensors)
        return (
            options == self._options
            and len(now) == len(self._tensors)
            and all(
                x is of and (x is None or x._version == version)
                for x, (of, version) in zip(now, self._tensors, strict=True)
            )
        )


def can_be_watched(tensors: Iterable[Tensor | None]) -> bool:
    """Whether changes of the tensors can be seen."""
    return not any(x is not None and x.is_inference() for x in tensors)
