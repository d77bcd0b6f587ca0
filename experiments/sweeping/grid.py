"""A grid of runs, as a TOML file declares it."""

import dataclasses
import difflib
import itertools
import math
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import methods, tasks
from experiments.config import RunConfig
from experiments.storage.files import read_bytes

Options = dict[str, Any]
"""Options of a run, named as on the command line, without the dashes in front."""

OWN = {"out", "name", "restart"}
"""Options of a run that are the sweep's business."""

_LARGEST = 1 << 20  # bytes of a file
_MOST_RUNS = 100_000

_OWNERS: tuple[type[RunConfig | tasks.TaskOptions | methods.Method], ...] = (
    RunConfig,
    *(task.OPTIONS for task in tasks.TASKS.values()),
    *methods.METHODS.values(),
)
RUN_OPTIONS = {
    option.name.replace("_", "-") for owner in _OWNERS for option in dataclasses.fields(owner)
} - {"options", "of_tasks", *OWN}


@dataclass(frozen=True)
class Grid:
    """What a file declares."""

    base: Options = field(default_factory=dict)
    grid: dict[str, list[Any]] = field(default_factory=dict)
    variants: list[Options] = field(default_factory=lambda: [{}])
    follow: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, scale: str | None) -> "Grid":
        """A ValueError names the file and what is wrong in it."""
        try:
            content = read_bytes(path, _LARGEST)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        try:
            if not content.strip():
                raise ValueError("got an empty file, takes a grid of runs")
            return cls._of(tomllib.loads(content.decode()), scale)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def _of(cls, tables: dict[str, Any], scale: str | None) -> "Grid":
        layers = {
            name: _layer(f"scales.{name}", table, ("base", "grid", "variants"))
            for name, table in _table("scales", tables.pop("scales", {})).items()
        }
        if scale is None:
            scale = next(iter(layers), None)
        elif scale not in layers:
            takes = f"one of {', '.join(layers)}" if layers else "none: it has no scales"
            raise ValueError(f"--scale: got {scale}, takes {takes}")
        layer = _layer("", tables, ("base", "grid", "variants", "follow"))
        for name, content in (layers[scale] if scale else {}).items():
            merge = name != "variants" and name in layer
            layer[name] = layer[name] | content if merge else content
        grid = cls(**layer)
        grid._check()
        return grid

    def _check(self) -> None:
        places = {"base": self.base, "variants": set().union(*self.variants), "grid": self.grid}
        for name, source in self.follow.items():
            if source not in self.base | self.grid:
                raise ValueError(f"follow: {name}: got {source!r}, takes an option of base or grid")
        for name in self.varied:
            found = [place for place, names in places.items() if name in names]
            if name in self.follow:
                found.append("follow")
            if len(found) > 1 and found != ["base", "variants"]:
                raise ValueError(f"{name}: is both in {' and in '.join(found)}")
        count = _combinations_count(self.grid) * sum(map(_combinations_count, self.variants))
        if count > _MOST_RUNS:
            raise ValueError(f"got {count:,} runs, takes at most {_MOST_RUNS:,}")

    @property
    def varied(self) -> set[str]:
        """The options in which runs can differ."""
        return {*self.grid, *self.follow}.union(*self.variants)

    def runs(self) -> Iterator[Options]:
        """In the order in which they are to be done."""
        for point in _combinations(self.grid):
            for variant in self.variants:
                for chosen in _combinations(variant):
                    options = self.base | chosen | point
                    yield options | {name: options[other] for name, other in self.follow.items()}


def _combinations(options: Options) -> Iterator[Options]:
    """One value of each list, in all ways; the last list varies fastest."""
    values = [value if isinstance(value, list) else [value] for value in options.values()]
    for combination in itertools.product(*values):
        yield dict(zip(options, combination, strict=True))


def _combinations_count(options: Options) -> int:
    return math.prod(len(value) for value in options.values() if isinstance(value, list))


def _layer(place: str, tables: Any, sections: tuple[str, ...]) -> dict[str, Any]:
    prefix = f"{place}." if place else ""
    layer: dict[str, Any] = {}
    for name, content in _table(place, tables).items():
        if name not in sections:
            raise ValueError(_unknown(prefix + name, name, (*sections, "scales")))
        if name == "variants":
            if not isinstance(content, list) or not content:
                raise ValueError(f"{prefix}variants: got {content!r}, takes a list of tables")
            layer[name] = [_options(f"{prefix}variants", table) for table in content]
        else:
            layer[name] = _options(prefix + name, content)
    return layer


def _options(place: str, table: Any) -> Options:
    """The table, checked, with names as on the command line."""
    options = {}
    for name, value in _table(place, table).items():
        name = name.replace("_", "-")
        if name in options:
            raise ValueError(f"{place}: {name}: got it twice, with - and with _")
        options[name] = value
    section = place.rpartition(".")[2]
    for name, value in options.items():
        if name not in RUN_OPTIONS:
            raise ValueError(_unknown(f"{place}: {name}", name, RUN_OPTIONS))
        is_list = isinstance(value, list)
        values = value if is_list else [value]
        if section == "grid" and not is_list:
            takes = "a list"
        elif section in ("base", "follow") and is_list:
            takes = "one value"
        elif not values or any(isinstance(v, list | dict) for v in values):
            takes = "a value or a list of values"
        else:
            continue
        raise ValueError(f"{place}: {name}: got {value!r}, takes {takes}")
    return options


def _table(place: str, content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{place}: got {content!r}, takes a table")
    return content


def _unknown(where: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{where}: no such name" + (f", did you mean {close[0]}?" if close else "")


def narrowed(runs: list[Options], only: tuple[str, ...]) -> list[Options]:
    """The runs that fit all of `only`, each an OPTION=VALUE or OPTION=VALUE,VALUE."""
    for text in only:
        name, equals, values = text.partition("=")
        if not equals:
            raise ValueError(f"--only: got {text}, takes OPTION=VALUE, as in method=quant")
        name = name.replace("_", "-")
        known = {str(options[name]) for options in runs if name in options}
        for value in values.split(","):
            if not any(_equal(value, other) for other in known):
                has = f"takes {', '.join(sorted(known))}" if known else "no run sets it"
                raise ValueError(f"--only: got {name}={value}, {has}")
        runs = [
            options
            for options in runs
            if name in options
            and any(_equal(value, str(options[name])) for value in values.split(","))
        ]
    return runs


def _equal(text: str, other: str) -> bool:
    try:
        return float(text) == float(other)
    except ValueError:
        return text.lower() == other.lower()
