"""Command lines that cannot be understood: each is refused in one line, which names the option,
what it got and what it takes."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

_HELP = {"-h", "--help"}
_TAKES = {int: "a whole number", float: "a number", Path: "a path", str: "a text"}
_LONGEST = 80  # characters of a value in a message


def require_understood(
    arguments: Sequence[str],
    options: Mapping[str, Any],
    positional: str | None = None,
    required: str | None = None,
) -> None:
    """Raises a ValueError for an option that there is not, one whose value is missing or of another
    type, and for words that belong to no option, but for one that is called `positional`; that is
    `required` where this tells what it takes.

    `options` has the type of each, by its name with underscores.
    """
    if not _HELP.isdisjoint(arguments):
        return
    known = {name.replace("_", "-"): _Values.of(kind) for name, kind in options.items()}
    free = []
    name, values, got = "", _Values(bool), 0  # no option yet, which takes no value
    for word in [*arguments, None]:  # None: the end
        if word is not None and not _is_option(word):
            if values.flag or (got and not values.many):
                free.append(word)
            else:
                values.require(name, word)
                got += 1
            continue
        if not (got or values.flag):
            raise ValueError(f"--{name}: got no value, takes {values.takes}")
        if word is None:
            break
        option, equals, value = word.partition("=")
        name = option.removeprefix("--").replace("_", "-")
        values, got = _known(option, name, known), 0
        if equals:
            values.require(name, value)
            got = 1
    if required and not free:
        raise ValueError(f"{positional}: got none, takes {required}")
    if "" in free:
        raise ValueError(f"{positional}: got '', takes a path")
    if len(free) > (positional is not None):
        beside = f" beside {positional}" if positional else ""
        raise ValueError(
            f"got {_shown(free[-1])}, which belongs to no option; takes options{beside}, each with "
            "its value behind it, as in --seed 1 (see --help)"
        )


class _Values(NamedTuple):
    """What an option takes: nothing, one value, or several."""

    kind: Any
    many: bool = False

    @classmethod
    def of(cls, annotation: Any) -> _Values:
        """Those of a field with this annotation."""
        origin, members = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is Annotated:
            return cls.of(members[0])
        if origin in (types.UnionType, typing.Union):
            return cls.of(next(member for member in members if member is not types.NoneType))
        if origin is tuple:
            return cls(members[0], many=True)
        return cls(annotation)

    @property
    def flag(self) -> bool:
        return self.kind is bool

    @property
    def choices(self) -> tuple[str, ...]:
        is_choice = typing.get_origin(self.kind) is Literal
        return typing.get_args(self.kind) if is_choice else ()

    @property
    def takes(self) -> str:
        return "one of " + ", ".join(self.choices) if self.choices else _TAKES[self.kind]

    def require(self, name: str, value: str) -> None:
        if self.flag:
            got = _shown(value)
            raise ValueError(f"--{name}: got {got}, takes no value; --no-{name} switches it off")
        if self.choices:
            accepted = value in self.choices
        elif self.kind in (int, float):
            accepted = _is_number(value, self.kind)
        else:
            accepted = value != ""
        if not accepted:
            raise ValueError(f"--{name}: got {_shown(value)}, takes {self.takes}")


def _known(option: str, name: str, known: Mapping[str, _Values]) -> _Values:
    """Of an option, the kind of its values."""
    if name in known:
        return known[name]
    positive = known.get(name.removeprefix("no-"))
    if positive is not None and positive.flag:
        return positive
    chosen = [n for n, values in known.items() if name.replace("-", "_") in values.choices]
    close = [f"{n} {name.replace('-', '_')}" for n in chosen]
    close += difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{close[0]}?" if close else "--help lists them"
    raise ValueError(f"{_shown(option)}: there is no such option; {hint}")


def _is_option(word: str) -> bool:
    return word[:1] == "-" and word != "-" and not _is_number(word, float)


def _is_number(text: str, kind: type) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _shown(value: str) -> str:
    """As it was typed, shortened; an empty one in quotes."""
    return value if 0 < len(value) <= _LONGEST else repr(value[:_LONGEST])
