"""The command line of a run: its options in groups, each explained once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shutil
import textwrap
import typing
from collections.abc import Mapping
from typing import Annotated, Any

import docstring_parser
import tyro

from experiments import methods, tasks
from experiments.config import GROUPS, RunConfig

_OPTIONS = {
    **{group.__name__.lower(): group for group in GROUPS},
    **{name: task.OPTIONS for name, task in tasks.TASKS.items()},
    **methods.METHODS,
}
"""The groups of options, by the titles that they have in --help."""
_OWN = ("method", "loss", "out", "restart")
"""The options of a run that are in no group."""


def parse(arguments: list[str] | None = None) -> RunConfig:
    """The options in `arguments`, or else in the command line. Ends the program with status 2 for
    those that there are not; a ValueError tells those that do not go together."""
    command: Any = tyro.cli(
        _command(),
        args=arguments,
        description=_description(),
        config=(tyro.conf.DisallowNone, tyro.conf.OmitArgPrefixes),
    )
    given = {name: vars(getattr(command, name)) for name in _OPTIONS}
    of_run = {name: getattr(command, name) for name in _OWN}
    for group in GROUPS:
        of_run |= given[group.__name__.lower()]
    of_methods = {name: method(**given[name]) for name, method in methods.METHODS.items()}
    of_tasks = {name: task.OPTIONS(**given[name]) for name, task in tasks.TASKS.items()}
    return RunConfig(
        **of_run, options=methods.Options(**of_methods), of_tasks=tasks.Options(**of_tasks)
    )


def _description() -> str:
    """What a run does, and what the methods do that have no options and so no group."""
    paragraphs = _paragraphs(RunConfig)
    for name, method in methods.METHODS.items():
        if not dataclasses.fields(method):
            first, *others = _paragraphs(method)
            paragraphs += [f"--method {name}: {first}", *others]
    return filled(paragraphs)


def filled(paragraphs: list[str]) -> str:
    """As wide as the terminal; but for what is indented, which stays as it is."""
    width = shutil.get_terminal_size().columns - 1
    # tyro joins lines, but for those that begin with a space.
    return "\n\n".join(
        text
        if text.startswith("  ")
        else textwrap.fill(text, width, initial_indent=" ", subsequent_indent=" ")
        for text in paragraphs
    )


def _paragraphs(documented: type) -> list[str]:
    """Of its docstring, each in one line."""
    return [" ".join(text.split()) for text in (inspect.getdoc(documented) or "").split("\n\n")]


@functools.cache
def _command() -> type:
    groups = {name: _explained(options) for name, options in _OPTIONS.items()}
    fields = _explained_fields(RunConfig, _OWN)
    fields += [(name, group, group()) for name, group in groups.items()]
    return dataclasses.make_dataclass("Command", fields)


def _explained(options: type) -> type:
    """Of a dataclass, one without checks of its own, for tyro to make: the errors of those should
    not stand in a box."""
    names = [field.name for field in dataclasses.fields(options)]
    made = dataclasses.make_dataclass(
        options.__name__, _explained_fields(options, names), frozen=True
    )
    made.__doc__ = "\n\n".join(_paragraphs(options))
    return made


def _explained_fields(options: type, names: typing.Iterable[str]) -> list[tuple[str, Any, Any]]:
    types = typing.get_type_hints(options, include_extras=True)
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    told = defaults | dict(getattr(options, "DEFAULTS", {}))
    texts = _texts(options)
    return [
        (
            name,
            Annotated[
                types[name],
                tyro.conf.arg(
                    help=texts[name],
                    # Of an option that is None if not given, the text tells what that stands for.
                    help_behavior_hint=""
                    if told[name] is None
                    else f"(default: {_shown(told[name])})",
                ),
            ],
            defaults[name],
        )
        for name in names
    ]


def _texts(options: type) -> Mapping[str, str]:
    """What stands below each field of a dataclass and its bases, in one paragraph."""
    return {
        parameter.arg_name: " ".join(parameter.description.split())
        for base in reversed(options.__mro__)
        if dataclasses.is_dataclass(base)
        for parameter in docstring_parser.parse_from_object(base).params
        if parameter.description
    }


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
