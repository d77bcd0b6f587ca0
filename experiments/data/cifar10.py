"""CIFAR-10 from its official Python release, as a folder or as the archive."""

import gzip
import hashlib
import io
import os
import reprlib
import tarfile
import warnings
from pathlib import Path

import numpy as np
import pooch
import torch

from experiments.data import unpickle
from experiments.data.dataset import Dataset
from experiments.storage.files import read_bytes

FOLDER = "cifar-10-batches-py"
ARCHIVE = "cifar-10-python.tar.gz"
URL = f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
BATCH_MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
CLASS_NAMES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# Patrini et al. 2017, arXiv 1609.03683.
_ASYMMETRIC_FLIPS = {
    "truck": "automobile",
    "bird": "airplane",
    "cat": "dog",
    "dog": "cat",
    "deer": "horse",
}
_ROWS = 10_000
# The release has 8 members, batches of 31 MB, and is 170 MB packed and 186 MB unpacked. A pickle of
# an older protocol is up to four times as large.
_LARGEST_BATCH = 128 << 20
_LARGEST_ARCHIVE = 512 << 20
_LARGEST_UNPACKED = 1 << 30
_LARGEST_HEADER = 8 << 10
_MOST_MEMBERS = 100


def load(data_dir: Path | None = None, download: bool = False) -> Dataset:
    """Reads the release in `data_dir`; without one, in the user's cache."""
    root = data_dir or Path(pooch.os_cache("noisyq_fast"))
    source = _find(root)
    if source is None and download:
        source = _fetch(root)
    if source is None:
        raise FileNotFoundError(
            f"no CIFAR-10 in {root}: looked for {FOLDER} and {ARCHIVE}; "
            "say where it is with --data-dir, or fetch it with --download"
        )
    is_folder = source.is_dir() and source.name != ARCHIVE
    blobs = _read_folder(source) if is_folder else _read_archive(source)
    missing = BATCH_MD5.keys() - blobs.keys()
    if missing:
        raise FileNotFoundError(
            f"{source}: lacks {', '.join(sorted(missing))}; fetch CIFAR-10 with --download "
            "into another --data-dir"
        )
    batches = [_parse(blobs[name], f"{source}: {name}") for name in BATCH_MD5]
    _warn_of_other_data(source, blobs)
    images = [images for images, _ in batches]
    labels = [labels for _, labels in batches]
    return Dataset(
        name="cifar10",
        train_images=torch.from_numpy(np.concatenate(images[:-1])),
        train_labels=torch.from_numpy(np.concatenate(labels[:-1])),
        train_indices=torch.arange(len(images[:-1]) * _ROWS),
        test_images=torch.from_numpy(images[-1]),
        test_labels=torch.from_numpy(labels[-1]),
        class_names=CLASS_NAMES,
        asymmetric_flips={
            CLASS_NAMES.index(source): CLASS_NAMES.index(target)
            for source, target in _ASYMMETRIC_FLIPS.items()
        },
        crop_padding=4,
        flip=True,
    )


def _find(root: Path) -> Path | None:
    """What is there, even if it is no regular file: reading it says so."""
    is_archive = os.path.lexists(root) and not root.is_dir()
    if is_archive or any(os.path.lexists(root / name) for name in BATCH_MD5):
        return root
    candidates = (root / FOLDER, root / ARCHIVE)
    return next((path for path in candidates if os.path.lexists(path)), None)


def _fetch(root: Path) -> Path:
    path = pooch.retrieve(
        URL, known_hash=f"md5:{ARCHIVE_MD5}", fname=ARCHIVE, path=root, progressbar=True
    )
    return Path(path)


def _read_folder(folder: Path) -> dict[str, bytes]:
    paths = (folder / name for name in BATCH_MD5)
    return {path.name: read_bytes(path, _LARGEST_BATCH) for path in paths if os.path.lexists(path)}


def _read_archive(archive: Path) -> dict[str, bytes]:
    packed = io.BytesIO(read_bytes(archive, _LARGEST_ARCHIVE))
    try:
        with tarfile.open(fileobj=_Unpacked(packed), mode="r|", tarinfo=_Member) as members:
            return _read_members(members)
    except Exception as error:  # a malformed archive can raise almost anything
        raise ValueError(f"{archive}: not a readable archive: {error}") from error


def _read_members(members: tarfile.TarFile) -> dict[str, bytes]:
    blobs = {}
    for count, member in enumerate(members, 1):
        if count > _MOST_MEMBERS:
            raise ValueError(f"it has more than {_MOST_MEMBERS} members")
        assert isinstance(member, _Member)
        member.require_size(_LARGEST_BATCH)  # which another header can have changed
        name = Path(member.name).name
        if name in blobs:
            raise ValueError(f"it has two members {name}")
        if member.isfile() and name in BATCH_MD5:
            file = members.extractfile(member)
            assert file is not None  # as it is one
            blobs[name] = file.read()
    return blobs


class _Member(tarfile.TarInfo):
    """A member whose size is checked before tarfile reads or skips it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        is_file = member.type in tarfile.REGULAR_TYPES
        member.require_size(_LARGEST_BATCH if is_file else _LARGEST_HEADER)
        return member

    def require_size(self, limit: int) -> None:
        if not 0 <= self.size <= limit:
            got = f"{self.name[:80]!r} has {self.size:,} bytes"
            raise ValueError(f"its member {got}, takes at most {limit:,}")


class _Unpacked(gzip.GzipFile):
    """The content of a gzip file, as far as a release can reach."""

    def __init__(self, packed: io.BytesIO) -> None:
        super().__init__(fileobj=packed)

    def read(self, size: int) -> bytes:  # type: ignore[override]  # tarfile always gives a size
        if self.tell() + size > _LARGEST_UNPACKED:
            raise ValueError(f"it unpacks to more than {_LARGEST_UNPACKED:,} bytes")
        return super().read(size)


def _warn_of_other_data(source: Path, blobs: dict[str, bytes]) -> None:
    different = [
        name
        for name, blob in blobs.items()
        if hashlib.md5(blob, usedforsecurity=False).hexdigest() != BATCH_MD5[name]
    ]
    if different:
        warnings.warn(
            f"{source}: not the official release, the checksum differs for {', '.join(different)}",
            stacklevel=3,
        )


def _parse(blob: bytes, source: str) -> tuple[np.ndarray, np.ndarray]:
    """One batch as images `[10000, 32, 32, 3]` and labels `[10000]`."""
    batch = unpickle.loads(blob, source)
    if not isinstance(batch, dict):
        raise ValueError(f"{source}: got a {type(batch).__name__}, takes a dict")
    # Re-packed copies have text keys where the release, written by Python 2, has bytes.
    batch = {
        key.encode(errors="backslashreplace") if isinstance(key, str) else key: value
        for key, value in batch.items()
    }
    if not {b"data", b"labels"} <= batch.keys():
        keys = reprlib.repr(list(batch))
        raise ValueError(f"{source}: got the keys {keys}, takes b'data' and b'labels'")
    return _images(batch[b"data"], source), _labels(batch[b"labels"], source)


def _images(data: object, source: str) -> np.ndarray:
    if not isinstance(data, np.ndarray):
        raise ValueError(f"{source}: got a {type(data).__name__} as data, takes an array")
    if data.dtype != np.uint8 or data.shape != (_ROWS, 3 * 32 * 32):
        raise ValueError(
            f"{source}: got {data.dtype} data of shape {list(data.shape)}, "
            f"takes uint8 of [{_ROWS}, 3072]"
        )
    return np.ascontiguousarray(data.reshape(_ROWS, 3, 32, 32).transpose(0, 2, 3, 1))


def _labels(labels: object, source: str) -> np.ndarray:
    if not isinstance(labels, list) or len(labels) != _ROWS:
        got = f"{len(labels)} labels" if isinstance(labels, list) else type(labels).__name__
        raise ValueError(f"{source}: got {got}, takes a list of {_ROWS} labels")
    classes = range(len(CLASS_NAMES))
    for label in labels:
        if type(label) is not int or label not in classes:
            got = reprlib.repr(label)
            raise ValueError(f"{source}: got the label {got}, takes 0 to {classes[-1]}")
    return np.array(labels, dtype=np.int64)
