"""Cached values that are valid while the tensors they were computed from do not change."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor


class Made:
    """A value, with the tensors and options that it was computed from."""

    def __init__(self, value: Any, tensors: Iterable[Tensor | None], options: Any) -> None:
        self.value = value
        self._tensors = [(x, None if x is None else x._version) for x in tensors]
        self._options = options

    def is_of(self, tensors: Iterable[Tensor | None], options: Any) -> bool:
        """Whether the tensors and options are the same and unchanged. Changes through ``x.data``
        are not seen."""
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
    """Whether changes of the tensors can be detected: inference tensors have no version."""
    return not any(x is not None and x.is_inference() for x in tensors)
