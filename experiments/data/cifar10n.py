"""CIFAR-10N: CIFAR-10's training labels as people on Amazon Mechanical Turk gave them.

Source: Wei et al. 2022, "Learning with Noisy Labels Revisited: A Study Using Real-World Human
Annotations", arXiv 2110.12088.
"""

import io
import os
import reprlib
import zipfile
from pathlib import Path

import numpy as np
import pooch
import torch
from torch import Tensor

from experiments.data import unpickle
from experiments.data.dataset import Dataset
from experiments.data.noise import NoisyLabels
from experiments.storage.files import read_bytes

FILE = "CIFAR-10_human.pt"
URL = f"https://github.com/UCSC-REAL/cifar-10-100n/raw/main/data/{FILE}"
SHA256 = "873e69c39cb9b5e97fb6bae2d60bb59b38a5cbc31d2b868f7903dcb2b9dd2310"
HUMAN_LABELS = {
    "aggregate": "aggre_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "worst": "worse_label",
}
"""The kinds, and their keys in the file. Three people labelled each image: `random1` to `random3`
are one of them each, `aggregate` is their majority and `worst` is a wrong one if there is any."""
_TRUE_KEY = "clean_label"
_ROWS, _CLASSES = 50_000, 10
_LARGEST = 16 << 20
"""Of the file and of the pickle in it, which have 2.4 MB."""


def find(data_dir: Path | None = None, download: bool = False) -> Path:
    """The file in `data_dir` or in the user's cache, after fetching it if it may be."""
    cache = Path(pooch.os_cache("noisyq_fast"))
    root = data_dir or cache
    if root.exists() and not root.is_dir():  # the archive of the images
        root = root.parent
    for folder in (root, cache):
        if os.path.lexists(folder / FILE):  # reading it says what it is
            return folder / FILE
    if not download:
        raise FileNotFoundError(
            f"no CIFAR-10N labels: looked for {FILE} in {root} and {cache}; "
            f"put the file of {URL} there, or fetch it with --download"
        )
    path = pooch.retrieve(
        URL, known_hash=f"sha256:{SHA256}", fname=FILE, path=root, progressbar=True
    )
    return Path(path)


def human(kind: str, path: Path, dataset: Dataset) -> NoisyLabels:
    """The human labels `kind` of the images in `dataset`.

    Share of wrong labels: aggregate 9.01 %, random1 to random3 17.23, 18.12 and 17.64 %, worst
    40.21 %.
    """
    if kind not in HUMAN_LABELS:
        raise ValueError(f"human labels: got {kind!r}, takes {', '.join(HUMAN_LABELS)}")
    if dataset.name != "cifar10":
        raise ValueError(f"human labels: got the data set {dataset.name}, takes cifar10")
    columns = _read(path)
    true = _column(columns, _TRUE_KEY, path)[dataset.train_indices]
    given = _column(columns, HUMAN_LABELS[kind], path)[dataset.train_indices]
    # The only link between label and image is their order.
    different = (true != dataset.train_labels).sum().item()
    if different:
        raise ValueError(
            f"{path}: its {_TRUE_KEY} differs from the labels of {dataset.name} for {different} "
            f"of {len(true)} images, so it is in another order or of other images"
        )
    return NoisyLabels(true=true, given=given, redrawn=(given != true).nonzero().flatten())


def _read(path: Path) -> dict:
    """What `torch.save` wrote: a zip archive that has it all, but for tensors, in one pickle."""
    blob = read_bytes(path, _LARGEST)
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith("/data.pkl")]
            if len(members) != 1:
                raise ValueError(f"got {len(members)} members data.pkl, takes one")
            pickled = _read_member(archive, members[0])
    except Exception as error:  # a malformed archive can raise almost anything
        raise ValueError(f"{path}: not a readable file of torch.save: {error}") from error
    columns = unpickle.loads(pickled, str(path))
    if not isinstance(columns, dict):
        raise ValueError(f"{path}: got a {type(columns).__name__}, takes a dict")
    return columns


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("its data.pkl is neither stored nor deflated")  # not read piece by piece
    if member.file_size > _LARGEST:
        got = f"{member.file_size:,} bytes"
        raise ValueError(f"its data.pkl has {got}, takes at most {_LARGEST:,}")
    with archive.open(member) as file:
        return file.read(_LARGEST)  # bounded, as what is deflated can be more than it says


def _column(columns: dict, key: str, path: Path) -> Tensor:
    if key not in columns:
        raise ValueError(f"{path}: got the keys {reprlib.repr(list(columns))}, takes {key!r}")
    labels = columns[key]
    if not isinstance(labels, np.ndarray):
        raise ValueError(f"{path}: got a {type(labels).__name__} as {key}, takes an array")
    if labels.dtype != np.int64 or labels.shape != (_ROWS,):
        raise ValueError(
            f"{path}: got {labels.dtype} {key} of shape {list(labels.shape)}, "
            f"takes int64 of [{_ROWS}]"
        )
    if labels.min() < 0 or labels.max() >= _CLASSES:
        raise ValueError(
            f"{path}: got {key} from {labels.min()} to {labels.max()}, takes 0 to {_CLASSES - 1}"
        )
    return torch.from_numpy(labels.copy())  # a copy, as a pickle's array can be read-only
