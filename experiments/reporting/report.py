"""What is made of the finished runs of a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import polars as pl

from experiments.reporting.drawing import Drawn
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.runs import Study

S = TypeVar("S", bound=Study)


@dataclass(frozen=True)
class Report(Generic[S]):
    """How runs that can stand in one report are read, compared and shown."""

    command: str
    """Of report.py."""
    help: str
    name: str
    """What the runs are on."""
    run: type[FinishedRun]
    study: type[S]
    summary: Callable[[S], pl.DataFrame]
    section: Callable[[str, S, pl.DataFrame], str]
    across: Callable[[list[S]], list[str]]
    """The sections on several studies together."""
    draw: Callable[[list[tuple[str, S, pl.DataFrame]], Path], Drawn]
    score: tuple[str, str]
    """The title and the name of the main one."""
    folder: str
    """Where it is written, in the directory of the runs."""
    csv: str
    """File of the summaries."""
    more: Mapping[str, Callable[[S], pl.DataFrame]] = field(default_factory=dict)
    """Files of other tables, which are written where they have rows."""
