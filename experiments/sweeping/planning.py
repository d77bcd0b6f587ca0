"""From the options of runs to tasks: checked, and with the folder that each will write."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from experiments import run
from experiments.checks import option_names
from experiments.config import RunConfig
from experiments.sweeping.engines import Task
from experiments.sweeping.grid import OWN, Grid, Options

# tyro takes 60 ms for a command line. These are what grids vary most, and need no other option:
# they are parsed apart, once a value.
_APART = ("seed", "noise-seed", "noise")


def tasks(file: Path, grid: Grid, runs: list[Options], out: Path, extra: list[str]) -> list[Task]:
    """The runs, with their options checked and their folders named."""
    given = set(option_names(extra))
    for name in sorted(given):
        if name in grid.varied:
            raise ValueError(f"--{name} after --: the runs of {file} differ in it; see --only")
        if name in OWN:
            raise ValueError(f"--{name} after --: the sweep sets it")
    tasks = {}
    for options in runs:
        options = {name: value for name, value in options.items() if name not in given}
        try:
            task = _task(options, ("--out", str(out), *extra))
        except ValueError as error:
            if str(error).partition(":")[0].removeprefix("--") in given:
                raise  # it is not in the file
            raise ValueError(f"{file}: {error}") from error
        if task.folder in tasks:
            raise ValueError(f"{file}: two of its runs are the same, {task.folder.name}")
        tasks[task.folder] = task
    return list(tasks.values())


def _task(options: Options, extra: tuple[str, ...]) -> Task:
    config = _config(options, extra)
    with _threads(config.threads):
        prepared = run.prepare(config)
    filled = prepared.config
    # What changes the name and can depend on the machine or the process.
    found = {"threads": filled.threads, "device": filled.device}
    own = filled.task_options
    found |= {name: getattr(own, name) for name in own.ON_THE_MACHINE}
    found = {name: value for name, value in found.items() if name not in option_names(extra)}
    return Task(
        arguments=(*_arguments(options | found), *extra),
        folder=prepared.path,
        epochs=filled.epochs,
        threads=filled.threads,
        gpu=filled.device != "cpu",
        script=Path(run.__file__).resolve(),
        directory=Path.cwd(),
        identity=prepared.identity,
    )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """With the run's own threads: more are slow beside other runs, which keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _config(options: Options, extra: tuple[str, ...]) -> RunConfig:
    together = {name: value for name, value in options.items() if name not in _APART}
    config = _parse(_arguments(together) + extra)
    apart = {}
    for name in options.keys() - together.keys():
        attribute = name.replace("-", "_")
        apart[attribute] = getattr(_parse(_arguments({name: options[name]})), attribute)
    return dataclasses.replace(config, **apart)


@functools.cache
def _parse(arguments: tuple[str, ...]) -> RunConfig:
    return run.parse(list(arguments))


def _arguments(options: Options) -> tuple[str, ...]:
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        else:
            arguments += [f"--{name}", str(value)]
    return tuple(arguments)
