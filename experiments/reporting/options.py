"""The types of the options in config.json."""

import types
import typing
from typing import Any

from experiments import tasks
from experiments.config import RunConfig
from experiments.reporting.reading import Fields, is_plain

_TYPES = typing.get_type_hints(RunConfig)
for _task in tasks.TASKS.values():
    _TYPES |= typing.get_type_hints(_task.OPTIONS)
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    types.NoneType: "null",
}
_TEXT = "text"  # a path, or one of several names


def require_type(config: Fields, name: str) -> None:
    """Refuses an option that a run of this version would not write; one that this version does not
    have can be a number, true, false, null or text."""
    value = config.value(name)
    config.require(name, is_plain(value), "a finite number, true, false, null or printable text")
    if name in _TYPES:
        taken = {_NAMES.get(kind, _TEXT) for kind in _members(_TYPES[name])}
        got = {_NAMES.get(type(value), _TEXT)} | ({_NAMES[float]} if type(value) is int else set())
        config.require(name, not taken.isdisjoint(got), " or ".join(sorted(taken)))


def _members(kind: Any) -> tuple[Any, ...]:
    is_union = typing.get_origin(kind) in (types.UnionType, typing.Union)
    return typing.get_args(kind) if is_union else (kind,)
