import hashlib
import os
import pickle
import tarfile
import warnings
from typing import ClassVar

import numpy as np
import pooch
import pytest

from experiments.data import cifar10, unpickle

pytestmark = pytest.mark.filterwarnings("ignore:.*not the official release")


def assert_holds(dataset, batches):
    assert dataset.train_images.shape == (50_000, 32, 32, 3)
    assert dataset.test_images.shape == (10_000, 32, 32, 3)
    third = batches["data_batch_3"]
    row, y, x, channel = 7, 5, 30, 2
    pixel = third[b"data"][row, channel * 1024 + y * 32 + x]
    assert dataset.train_images[20_000 + row, y, x, channel] == pixel
    assert dataset.train_labels[20_000:30_000].tolist() == third[b"labels"]
    assert dataset.test_labels.tolist() == batches["test_batch"][b"labels"]
    assert dataset.train_indices.tolist() == list(range(50_000))


@pytest.fixture(scope="module")
def archive(cifar10_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / cifar10.ARCHIVE
    with tarfile.open(path, "w:gz", compresslevel=1) as file:
        file.add(cifar10_folder, cifar10.FOLDER)
    return path


@pytest.fixture
def broken(cifar10_folder, tmp_path):
    """A copy of the release whose first batch is what it is called with."""

    def write(content):
        for path in cifar10_folder.iterdir():
            (tmp_path / path.name).symlink_to(path)
        first = tmp_path / "data_batch_1"
        first.unlink()
        first.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content))
        return tmp_path

    return write


def test_reads_the_folder_and_the_directory_above(cifar10_folder, cifar10_batches):
    assert_holds(cifar10.load(cifar10_folder), cifar10_batches)
    assert_holds(cifar10.load(cifar10_folder.parent), cifar10_batches)


def test_asymmetric_flips_are_those_of_patrini(cifar10_folder):
    dataset = cifar10.load(cifar10_folder)
    assert dataset.asymmetric_flips == {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


def test_reads_the_archive_without_extracting_it(archive, cifar10_batches):
    assert_holds(cifar10.load(archive), cifar10_batches)
    assert_holds(cifar10.load(archive.parent), cifar10_batches)
    assert list(archive.parent.iterdir()) == [archive]


def test_missing_data_says_what_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        cifar10.load(tmp_path)
    for part in (str(tmp_path), cifar10.FOLDER, cifar10.ARCHIVE, "--data-dir", "--download"):
        assert part in str(error.value)


def test_missing_file_is_named(cifar10_folder, tmp_path):
    (tmp_path / "test_batch").symlink_to(cifar10_folder / "test_batch")
    with pytest.raises(FileNotFoundError, match="lacks data_batch_1, data_batch_2"):
        cifar10.load(tmp_path)


def test_download_fetches_the_checked_archive_once(archive, tmp_path, monkeypatch, cifar10_batches):
    calls = []

    def retrieve(url, known_hash, fname, path, progressbar):
        calls.append((url, known_hash, progressbar))
        (path / fname).symlink_to(archive)
        return str(path / fname)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for _ in range(2):
        assert_holds(cifar10.load(tmp_path, download=True), cifar10_batches)
    assert calls == [(cifar10.URL, f"md5:{cifar10.ARCHIVE_MD5}", True)]


def test_warns_of_files_that_are_not_those_of_the_release(cifar10_folder, monkeypatch):
    checksums = {
        path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in cifar10_folder.iterdir()
    }
    monkeypatch.setattr(cifar10, "BATCH_MD5", checksums)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cifar10.load(cifar10_folder)
    monkeypatch.setitem(checksums, "data_batch_2", cifar10.ARCHIVE_MD5)
    with pytest.warns(UserWarning, match="the checksum differs for data_batch_2$"):
        cifar10.load(cifar10_folder)


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's `str`, and numpy 1's module names."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self, value):
        value = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)

    dispatch[bytes] = dispatch[str] = save_string

    def save_global(self, value, name=None):
        module = value.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{value.__name__}\n".encode())

    dispatch[type] = save_global


def test_reads_what_python_2_wrote(broken, cifar10_batches, tmp_path_factory):
    path = tmp_path_factory.mktemp("python2") / "batch"
    with path.open("wb") as file:
        Python2Pickler(file, protocol=2).dump(
            {key.decode(): value for key, value in cifar10_batches["data_batch_1"].items()}
        )
    assert b"numpy.core.multiarray" in path.read_bytes()
    dataset = cifar10.load(broken(path.read_bytes()))
    assert_holds(dataset, cifar10_batches)
    assert dataset.train_labels[:10_000].tolist() == cifar10_batches["data_batch_1"][b"labels"]


ZEROS = np.zeros((10_000, 3072), np.uint8)
LABELS = [0] * 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable pickle"),
        (b"garbage", "not a readable pickle"),
        (pickle.dumps({b"data": ZEROS, b"labels": LABELS})[:-100_000], "not a readable pickle"),
        ([ZEROS, LABELS], "got a list, takes a dict"),
        ({b"data": ZEROS}, "takes b'data' and b'labels'"),
        ({b"data": ZEROS[:2].tolist(), b"labels": LABELS}, "got a list as data"),
        ({b"data": ZEROS[:9_999], b"labels": LABELS}, r"of shape \[9999, 3072\]"),
        ({b"data": ZEROS[:, :3071], b"labels": LABELS}, r"of shape \[10000, 3071\]"),
        ({b"data": ZEROS.astype(np.int8), b"labels": LABELS}, "got int8 data"),
        ({b"data": ZEROS, b"labels": LABELS[1:]}, "got 9999 labels"),
        ({b"data": ZEROS, b"labels": np.array(LABELS)}, "got ndarray, takes a list"),
        ({b"data": ZEROS, b"labels": [*LABELS[1:], 10]}, "got the label 10, takes 0 to 9"),
        ({b"data": ZEROS, b"labels": [*LABELS[1:], -1]}, "got the label -1, takes 0 to 9"),
        ({b"data": ZEROS, b"labels": [*LABELS[1:], 0.5]}, "got the label 0.5, takes 0 to 9"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_malformed_batch_is_refused_and_named(broken, content, message):
    with pytest.raises(ValueError, match=f"data_batch_1: .*{message}"):
        cifar10.load(broken(content))


@pytest.mark.parametrize("size", [0, 100, 100_000])
def test_truncated_archive_is_refused_and_named(archive, tmp_path, size):
    truncated = tmp_path / cifar10.ARCHIVE
    truncated.write_bytes(archive.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"{cifar10.ARCHIVE}: not a readable archive"):
        cifar10.load(truncated)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_foreign_code_is_named_and_does_not_run(tmp_path, protocol):
    marker = tmp_path / "ran"
    blob = pickle.dumps({b"data": Malicious(marker)}, protocol=protocol)
    with pytest.raises(ValueError, match=r"some_file: .*posix\.system"):
        unpickle.loads(blob, "some_file")
    assert not marker.exists()
    pickle.loads(blob)
    assert marker.exists()


def test_codecs_encode_serves_only_bytes():
    blob = b"c_codecs\nencode\n(Vtext\nVrot13\ntR."
    assert pickle.loads(blob) == "grkg"
    with pytest.raises(ValueError, match="got 'rot13', takes 'latin1'"):
        unpickle.loads(blob, "some_file")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_unpickles_arrays_and_bytes_of_every_protocol(protocol):
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    value = unpickle.loads(pickle.dumps({b"\xff": array}, protocol=protocol), "some_file")
    np.testing.assert_array_equal(value[b"\xff"], array)
