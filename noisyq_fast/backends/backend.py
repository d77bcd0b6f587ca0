"""The description of a backend, and of its functions."""

from collections.abc import Callable
from dataclasses import dataclass, field


class Operators(dict[str, Callable]):
    """Functions by the name of the operator that they compute."""

    def register(self, function: Callable) -> Callable:
        """Decorates the function that computes the operator of the same name. Its arguments have
        been checked; there is ``qmax`` in place of ``bits``, and ``axis`` is ``None`` or counted
        from the front."""
        self[function.__name__] = function
        return function


@dataclass(eq=False)
class Backend:
    """An implementation of all or some of the operators.

    Attributes:
        name: the name for `use_backend` and ``NOISYQ_BACKEND``.
        device_types: the device types on which it computes; ``None``: all.
        unavailable: returns ``None`` if it can be used on this machine, otherwise the reason.
        functions: its functions, by the name of the operator.
        automatic: whether it may be chosen without being requested by name.
    """

    name: str
    device_types: tuple[str, ...] | None
    unavailable: Callable[[], str | None]
    functions: dict[str, Callable] = field(repr=False)
    automatic: bool = True

    def takes(self, device_type: str) -> bool:
        return self.device_types is None or device_type in self.device_types

    def computes(self, operator: str, device_type: str) -> bool:
        return operator in self.functions and self.takes(device_type)
