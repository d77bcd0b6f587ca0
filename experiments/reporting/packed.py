"""The runs of a study in one file, of which reports are made as of their folders."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from experiments.storage.files import atomic

NAME = "runs.zip"
FILES = ("config.json", "metrics.jsonl", "result.json")
_MOST_FILES = 100_000
_OF_A_MACHINE = {"data_dir": "DIR", "cache_dir": None, "out": "runs"}
"""Options that say where things were, and what stands for them."""

Folder = Path | zipfile.Path


def pack(folders: Iterable[Folder], path: Path) -> None:
    """Writes what reports read of runs into one file: the same bytes for the same runs. Options
    that say where things were on a machine are replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        atomic(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive,
    ):
        for folder, packed_as in _named(folders).items():
            for name in FILES:
                file = folder / name
                if file.exists():
                    member = zipfile.ZipInfo(f"{packed_as}/{name}")  # of 1980, on every machine
                    member.compress_type = zipfile.ZIP_DEFLATED
                    content = file.read_bytes()
                    archive.writestr(member, _anywhere(content) if name == FILES[0] else content)


def _named(folders: Iterable[Folder]) -> dict[Folder, str]:
    """Folders of one name, such as of several directories, by their name and a number."""
    counts: Counter[str] = Counter()
    names = {}
    for folder in sorted(folders, key=lambda folder: (folder.name, str(folder))):
        counts[folder.name] += 1
        count = counts[folder.name]
        names[folder] = folder.name if count == 1 else f"{folder.name}-{count}"
    return names


def _anywhere(config: bytes) -> bytes:
    options = json.loads(config)
    for name, stand_in in _OF_A_MACHINE.items():
        if options.get(name) is not None:
            options[name] = stand_in
    if options.get("weights"):
        options["weights"] = Path(options["weights"]).name
    return (json.dumps(options, indent=2) + "\n").encode()


def folders(directory: Path) -> Iterator[Folder]:
    """Those with a file of a run, anywhere under a directory, also in packed files. A packed file
    that cannot be read is yielded itself."""
    for parent, inner, files in os.walk(directory):
        if not {"config.json", "result.json"}.isdisjoint(inner + files):
            yield Path(parent)
        if NAME in files:
            yield from _folders_in(Path(parent, NAME))


def _folders_in(path: Path) -> Iterator[Folder]:
    try:
        archive = zipfile.ZipFile(path)
        names = archive.namelist()
        if len(names) > _MOST_FILES or len(set(names)) < len(names):
            raise zipfile.BadZipFile
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError):
        yield path
        return
    parents = {name.rpartition("/")[0] for name in names if name.endswith(FILES)}
    for parent in sorted(parents):
        yield zipfile.Path(archive, f"{parent}/" if parent else "")


def read(path: zipfile.Path, limit: int) -> bytes:
    """At most so many bytes of a file in a packed file. A ValueError says that it is damaged."""
    try:
        with path.open("rb") as file:
            return file.read(limit)
    except KeyError as error:
        raise FileNotFoundError(str(path)) from error
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
