"""The index of a data set and its faults, kept from one start to the next."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from experiments.data.au import index
from experiments.data.au.faults import Fault, Faults
from experiments.data.au.release import Release
from experiments.storage.files import atomic, read_bytes

_LARGEST = 256 << 20
"""Of a file in the cache. The index of BP4D has a few MB."""
_FAULTS = {"kind": pl.String, "file": pl.String, "line": pl.Int64, "what": pl.String}


@dataclass(frozen=True)
class Index:
    frames: pl.DataFrame
    """As `index.build` makes it."""
    faults: Faults
    fingerprint: str
    """Of the files that it was made of, and of itself."""


def load(release: Release, root: Path, cache: Path) -> Index:
    """The index in `cache`, made anew if the files in `root` have changed or it is damaged."""
    tree = index.fingerprint(release, root)
    store = _Store(cache, release.name)
    tables = store.read(tree)
    if tables is None:
        frames, faults = index.build(release, root)
        tables = frames, pl.DataFrame([vars(fault) for fault in faults.found], schema=_FAULTS)
        store.write(tree, *tables)
    frames, found = tables
    faults = Faults(root, [Fault(**row) for row in found.iter_rows(named=True)])
    return Index(frames, faults, hashlib.sha256((tree + digest(frames)).encode()).hexdigest())


def digest(frames: pl.DataFrame) -> str:
    """SHA-256 of all that an index says."""
    return hashlib.sha256(frames.write_csv().encode()).hexdigest()


class _Store:
    """Two tables, and a manifest that says of which tree they are and what their bytes are."""

    def __init__(self, cache: Path, name: str) -> None:
        self.manifest = cache / f"{name}-index.json"
        self.tables = cache / f"{name}-index.parquet", cache / f"{name}-faults.parquet"

    def read(self, tree: str) -> tuple[pl.DataFrame, ...] | None:
        """None, and a word about why, unless they are whole and of the tree."""
        if not self.manifest.exists():
            return None
        try:
            content = json.loads(read_bytes(self.manifest, _LARGEST))
            if content["tree"] != tree:
                print(f"{self.manifest}: the data set has changed, so the index is made anew")
                return None
            blobs = [read_bytes(path, _LARGEST) for path in self.tables]
            if content["sha256"] != [_sha256(blob) for blob in blobs]:
                raise ValueError("checksum")
            return tuple(pl.read_parquet(io.BytesIO(blob)) for blob in blobs)
        except (OSError, ValueError, KeyError, TypeError, pl.exceptions.PolarsError) as error:
            print(f"{self.manifest}: damaged ({error}), so the index is made anew")
            return None

    def write(self, tree: str, *tables: pl.DataFrame) -> None:
        """The manifest goes last, as it vouches for the rest."""
        sums = []
        for path, table in zip(self.tables, tables, strict=True):
            blob = io.BytesIO()
            table.write_parquet(blob)
            sums.append(_sha256(blob.getvalue()))
            with atomic(path) as temporary:
                temporary.write_bytes(blob.getvalue())
        with atomic(self.manifest) as temporary:
            temporary.write_text(json.dumps({"tree": tree, "sha256": sums}, indent=2) + "\n")


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
