"""The names that options of the command line take, and the error that every option gives for a
value it does not take."""

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from typing import Annotated as Choice
else:

    class Choice:
        """The type of an option that takes one of the names in a table, `Choice[str, table]`: a
        Literal of them, for the command line. A type checker, which cannot read the table, sees
        text."""

        def __class_getitem__(cls, parameters: tuple[type, Iterable[str]]) -> Any:
            _, names = parameters
            return Literal[tuple(names)]


MOST_EPOCHS = 1_000_000
_LONGEST_NAME = 150  # bytes
_TAKEN_NAMES = ("config.json", "result.json", "runs.zip", "report", "report-table1")
PLAIN_NAME = (
    f"a plain file name of at most {_LONGEST_NAME} bytes: no / or \\, no dot or dash in front, no "
    f"space at its ends, and none of {', '.join(_TAKEN_NAMES)}"
)
"""What a folder can be called."""


def require(option: str, value: object, accepted: bool, takes: str) -> None:
    """Raises a ValueError that names the option, what it got and what it takes."""
    if not accepted:
        got = value if str(value).isprintable() and value != "" else repr(value)
        raise ValueError(f"{flag(option)}: got {got}, takes {takes}")


def is_plain_name(name: str) -> bool:
    """Whether a folder can be called so, and reports find it there."""
    fits = 0 < len(name.encode(errors="surrogateescape")) <= _LONGEST_NAME
    plain = name.isprintable() and name == name.strip() and not {"/", "\\"} & set(name)
    return fits and plain and name[0] not in ".-" and name not in _TAKEN_NAMES


def flag(option: str) -> str:
    """An option as it is on the command line."""
    return "--" + option.replace("_", "-")


def require_choice(option: str, value: object, choices: Collection[str]) -> None:
    """The same for an option that takes one of several names."""
    require(option, value, value in choices, "one of " + ", ".join(choices))


def require_whole(option: str, value: int | None, first: int, last: int) -> None:
    """The same for an option that takes whole numbers; None stands for its default."""
    accepted = value is None or first <= value <= last
    require(option, value, accepted, f"a whole number from {first} to {last:,}")


def require_once(arguments: Iterable[str], **hints: str) -> None:
    """Raises a ValueError for an option that a command line gives twice, of which only the last
    would count; `hints` tell, by the option's name, what to do instead."""
    seen = set()
    for name in option_names(arguments):
        if name in seen:
            hint = f"; {hints[name]}" if name in hints else ""
            raise ValueError(f"--{name}: got it twice, takes it once{hint}")
        seen.add(name)


def option_names(arguments: Iterable[str]) -> list[str]:
    """The options in a command line, without dashes in front and as if all were positive: of
    `--no-augment` that is augment."""
    options = [text[2:].partition("=")[0] for text in arguments if text[:2] == "--"]
    return [name.replace("_", "-").removeprefix("no-") for name in options if name]
