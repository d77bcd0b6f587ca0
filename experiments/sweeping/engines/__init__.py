"""What carries out the runs of a sweep, by the name that `--engine` takes."""

from collections.abc import Callable

from experiments.sweeping.engines.local import run_here
from experiments.sweeping.engines.on_ray import run_on_ray
from experiments.sweeping.engines.task import Rounds, Task

__all__ = ["ENGINES", "Engine", "Rounds", "Task"]

Engine = Callable[..., Rounds]
"""Takes tasks; yields, about every second, those that have ended since, each with its exit status
or with why it could not be started. Whatever still runs when the iterator is closed is stopped."""

ENGINES: dict[str, Engine] = {"local": run_here, "ray": run_on_ray}
