"""The command line of a run: its options in groups, each explained once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import shutil
import textwrap
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import docstring_parser
import tyro

from experiments import methods, tasks
from experiments.arguments import require_understood
from experiments.config import GROUPS, RunConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
_OPTIONS = {
    **{group.__name__.lower(): group for group in GROUPS},
    **{name: task.OPTIONS for name, task in tasks.TASKS.items()},
    **methods.METHODS,
}
"""The groups of options, by the titles that they have in --help."""
_OWN = ("method", "loss", "out", "name", "restart")
"""The options of a run that are in no group."""


def parse(arguments: list[str]) -> RunConfig:
    """The options in `arguments`; a ValueError tells those that there are not, and those that do
    not go together."""
    require_known(arguments)
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


def require_known(arguments: list[str]) -> None:
    """Raises a ValueError for what is no option of a run, or no value of it."""
    require_understood(arguments, _types())


def parse_into(
    options: type[T], arguments: list[str], description: str, required: str, prog: str | None = None
) -> T:
    """The options of a command that are the fields of a dataclass, of which the first one has no
    dashes in front; `required` tells what that takes."""
    types = typing.get_type_hints(options, include_extras=True)
    first = dataclasses.fields(options)[0].name
    del types[first]
    require_understood(arguments, types, positional=first.upper(), required=required)
    parsed: Any = tyro.cli(
        _explained(options),
        prog=prog,
        args=arguments,
        description=description,
        config=(tyro.conf.DisallowNone,),
    )
    return options(**vars(parsed))


@functools.cache
def _types() -> dict[str, Any]:
    """The type of each option."""
    of_run = typing.get_type_hints(RunConfig, include_extras=True)
    types = {name: of_run[name] for name in _OWN}
    for options in _OPTIONS.values():
        hints = typing.get_type_hints(options, include_extras=True)
        types |= {field.name: hints[field.name] for field in dataclasses.fields(options)}
    return types


_FOLDER = """\
  config.json        the options
  noisy_labels.npz   the labels as given, and the true ones where they are known
  metrics.jsonl      a line for each epoch: loss, scores, learning rate, seconds
  checkpoint.pt      where the same command goes on, until the run is finished
  model.safetensors  the trained weights, for --weights
  result.json        the scores of the finished network; written last"""
_SCORES = [
    'What is printed after each epoch, with images: "train clean" is the share of the training '
    'images with a right label for which the network gives this label, "flipped" that of those '
    'with a wrong label for which it gives the wrong one, as it has memorised it. "test" is the '
    "accuracy on the test images, by their true labels.",
    "With faces: F1, the mean over the action units, by the labels that annotators gave, for "
    "training, held-out and test pictures. Where the truth is known, the last line and result.json "
    "have F1 by that too (test_f1_truth). experiments/README.md explains all files and scores.",
]
_STATUSES = (
    "Exit status: 0 if the run is finished; 1 if it failed, such as by a loss that is not finite; "
    "2 if an option is wrong or the data cannot be read; 75 if another process is at work on the "
    "run; 130 after Ctrl-C; 143 after SIGTERM, as of kill. The same command goes on from the last "
    "checkpoint. A run whose output nobody reads any more, as behind head, trains to its end."
)


def _description() -> str:
    """What a run does, writes and prints, and what the methods do that have no options and so no
    group."""
    paragraphs = paragraphs_of(RunConfig)
    paragraphs += ["Each run has a folder of its own in --out:", _FOLDER, *_SCORES, _STATUSES]
    for name, method in methods.METHODS.items():
        if not dataclasses.fields(method):
            first, *others = paragraphs_of(method)
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


def paragraphs_of(documented: type) -> list[str]:
    """Of its docstring, each in one line, but for those that are indented."""
    paragraphs = (inspect.getdoc(documented) or "").split("\n\n")
    return [text if text.startswith("  ") else " ".join(text.split()) for text in paragraphs]


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
    made.__doc__ = "\n\n".join(paragraphs_of(options))
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
                    if told[name] in (None, ())
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
