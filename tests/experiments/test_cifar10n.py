import dataclasses
import io
import os
import pickle
import zipfile

import numpy as np
import pooch
import pytest
import torch

from experiments import data
from experiments.data import cifar10n

KEYS = {
    "aggregate": "aggre_label",
    "random1": "random_label1",
    "random2": "random_label2",
    "random3": "random_label3",
    "worst": "worse_label",
}


@pytest.fixture(scope="module")
def dataset(cifar10_batches):
    """Images matter only by their number."""
    labels = [cifar10_batches[f"data_batch_{part}"][b"labels"] for part in range(1, 6)]
    return dataclasses.replace(
        data.load("digits"),
        name="cifar10",
        train_images=torch.zeros(50_000, 1, 1, 1, dtype=torch.uint8),
        train_labels=torch.tensor(labels).flatten(),
        train_indices=torch.arange(50_000),
    )


@pytest.fixture(scope="module")
def columns(dataset):
    """A file's content, each kind with another share of wrong labels."""
    generator = np.random.default_rng(0)
    true = dataset.train_labels.numpy()
    content = {"clean_label": true}
    for place, key in enumerate(KEYS.values(), 1):
        wrong = generator.random(50_000) < 0.1 * place
        content[key] = np.where(wrong, (true + place) % 10, true)
    return content


@pytest.fixture
def write(tmp_path):
    def save(content, name=cifar10n.FILE):
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return path

    return save


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(pooch, "os_cache", lambda project: folder)
    return folder


def archived(pickled, member="archive/data.pkl"):
    """The file that `torch.save` would have written round a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, pickled)
    return buffer.getvalue()


def test_kinds_are_those_of_the_paper():
    assert cifar10n.HUMAN_LABELS == KEYS


@pytest.mark.parametrize("kind", KEYS)
def test_reads_each_kind(write, columns, dataset, kind):
    noisy = cifar10n.human(kind, write(columns), dataset)
    assert noisy.given.dtype == torch.int64
    assert noisy.given.tolist() == columns[KEYS[kind]].tolist()
    assert torch.equal(noisy.true, dataset.train_labels)
    assert torch.equal(noisy.redrawn, noisy.flipped.nonzero().flatten())
    assert len(noisy.redrawn) > 0


def test_reads_what_numpy_1_wrote(write, columns, dataset):
    pickled = pickle.dumps(columns, protocol=2).replace(b"numpy._core", b"numpy.core")
    noisy = cifar10n.human("worst", write(archived(pickled)), dataset)
    assert noisy.given.tolist() == columns["worse_label"].tolist()


def test_subset_gets_the_labels_of_its_own_images(write, columns, dataset):
    subset = dataset.with_train_size(5000).with_train_size(300)
    assert torch.equal(subset.train_labels, dataset.train_labels[subset.train_indices])
    noisy = cifar10n.human("worst", write(columns), subset)
    assert noisy.given.tolist() == columns["worse_label"][subset.train_indices].tolist()
    assert torch.equal(noisy.true, subset.train_labels)


def test_other_order_is_refused_with_the_number_of_differences(write, columns, dataset):
    swapped = dataset.train_labels.clone()
    first, second = 5, (swapped != swapped[5]).nonzero()[0].item()
    swapped[[first, second]] = swapped[[second, first]]
    other = dataclasses.replace(dataset, train_labels=swapped)
    with pytest.raises(ValueError, match=r"CIFAR-10_human\.pt: .* for 2 of 50000 images"):
        cifar10n.human("worst", write(columns), other)


def test_other_data_set_is_refused(write, columns):
    with pytest.raises(ValueError, match="got the data set digits, takes cifar10"):
        cifar10n.human("worst", write(columns), data.load("digits"))


def test_unknown_kind_is_refused(write, columns, dataset):
    with pytest.raises(ValueError, match=r"got 'worse_label', takes aggregate, random1, .* worst"):
        cifar10n.human("worse_label", write(columns), dataset)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(50_000, np.int32), "got int32 worse_label"),
        (np.zeros(50_000), "got float64 worse_label"),
        (np.zeros(49_999, np.int64), r"of shape \[49999\], takes int64 of \[50000\]"),
        (np.zeros((50_000, 1), np.int64), r"of shape \[50000, 1\]"),
        (np.full(50_000, 10), "got worse_label from 10 to 10, takes 0 to 9"),
        (np.full(50_000, -1), "got worse_label from -1 to -1"),
        ([0] * 50_000, "got a list as worse_label"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("key", ["worse_label", "clean_label"])
def test_malformed_labels_are_refused_and_named(write, columns, dataset, key, labels, message):
    path = write(columns | {key: labels})
    with pytest.raises(ValueError, match=rf"{path}: .*{message.replace('worse_label', key)}"):
        cifar10n.human("worst", path, dataset)


@pytest.mark.parametrize("key", ["worse_label", "clean_label"])
def test_missing_labels_are_named(write, columns, dataset, key):
    path = write({name: column for name, column in columns.items() if name != key})
    with pytest.raises(ValueError, match=rf"{path}: got the keys \[.*\], takes '{key}'"):
        cifar10n.human("worst", path, dataset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable file"),
        (b"garbage", "not a readable file"),
        (pickle.dumps({}), "not a readable file"),
        (archived(b"", "archive/other"), "got 0 members data.pkl, takes one"),
        (archived(b""), "not a readable pickle"),
        (archived(b"garbage"), "not a readable pickle"),
        (archived(pickle.dumps([])), "got a list, takes a dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_file_is_refused_and_named(write, dataset, content, message):
    path = write(content)
    with pytest.raises(ValueError, match=f"{path}: .*{message}"):
        cifar10n.human("worst", path, dataset)


def test_truncated_or_damaged_file_is_refused_and_named(write, columns, dataset):
    whole = write(columns, "whole.pt").read_bytes()
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (whole[:100], whole[: len(whole) // 2], whole[:-1], bytes(damaged)):
        path = write(content)
        with pytest.raises(ValueError, match=f"{path}: not a readable file"):
            cifar10n.human("worst", path, dataset)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_foreign_code_is_named_and_does_not_run(write, columns, dataset, tmp_path):
    marker = tmp_path / "ran"
    path = write(columns | {"extra": Malicious(marker)})
    with pytest.raises(ValueError, match=rf"{path}: .*posix\.system"):
        cifar10n.human("worst", path, dataset)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_tensors_are_not_needed_and_refused(write, columns, dataset):
    path = write(columns | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=f"{path}: not a readable pickle"):
        cifar10n.human("worst", path, dataset)


def test_finds_the_file_in_the_data_directory_and_then_in_the_cache(cache, tmp_path):
    cached = cache / cifar10n.FILE
    cached.touch()
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.touch()
    assert cifar10n.find() == cifar10n.find(tmp_path) == cifar10n.find(archive) == cached
    own = tmp_path / cifar10n.FILE
    own.touch()
    assert cifar10n.find(tmp_path) == cifar10n.find(archive) == own
    assert cifar10n.find() == cached


def test_missing_file_says_what_was_looked_for_and_how_to_get_it(cache, tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        cifar10n.find(tmp_path, download=False)
    for part in (cifar10n.FILE, str(tmp_path), str(cache), cifar10n.URL, "--download"):
        assert part in str(error.value)


def test_download_fetches_the_checked_file_once(cache, tmp_path, monkeypatch):
    calls = []

    def retrieve(url, known_hash, fname, path, progressbar):
        calls.append((url, known_hash, path))
        (path / fname).touch()
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for _ in range(2):
        assert cifar10n.find(tmp_path, download=True) == tmp_path / cifar10n.FILE
    assert calls == [(cifar10n.URL, f"sha256:{cifar10n.SHA256}", tmp_path)]


def test_failed_download_leaves_nothing_behind(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10n, "URL", "http://127.0.0.1:9/nothing")
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        cifar10n.find(cache, download=True)
    assert list(cache.iterdir()) == []
