"""The error that every option of the command line gives for a value it does not take."""


def require(option: str, value: object, accepted: bool, takes: str) -> None:
    """Raises a ValueError that names the option, what it got and what it takes."""
    if not accepted:
        raise ValueError(f"--{option.replace('_', '-')}: got {value}, takes {takes}")
