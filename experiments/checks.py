"""The error that every option of the command line gives for a value it does not take."""

from collections.abc import Collection


def require(option: str, value: object, accepted: bool, takes: str) -> None:
    """Raises a ValueError that names the option, what it got and what it takes."""
    if not accepted:
        raise ValueError(f"--{option.replace('_', '-')}: got {value}, takes {takes}")


def require_choice(option: str, value: object, choices: Collection[str]) -> None:
    """The same for an option that takes one of several names."""
    require(option, value, value in choices, "one of " + ", ".join(choices))
