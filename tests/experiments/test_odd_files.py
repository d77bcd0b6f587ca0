"""What is no regular file, is too large or is empty, in every place where the study reads a file.

Each test fails after ten seconds if it waits for a file.
"""

import gzip
import io
import os
import signal
import socket
import tarfile
import zipfile

import pytest
import torch
from au_trees import BP4D, DISFA, SIZE
from PIL import Image
from safetensors.torch import load_file, save_file

from experiments.data import cifar10, cifar10n
from experiments.data.au import bp4d, decoding, disfa, table
from experiments.storage import files
from experiments.storage.weights import Weights
from experiments.sweep import SweepConfig
from experiments.sweeping.grid import Grid

pytestmark = pytest.mark.filterwarnings("ignore:not all of BP4D", "ignore:.*not the official")
FIRST = ("F001", "T1")


@pytest.fixture(autouse=True)
def alarm(monkeypatch):
    def ring(*_):
        pytest.fail("it waits")  # no Exception, so that nothing handles it

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10)
    monkeypatch.setattr(decoding, "_CHUNK", 10_000)  # decodes in this process
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path):
    os.mkfifo(path)
    return "a FIFO"


def link_to_a_fifo(path):
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    return "a FIFO"


def zeros(path):
    path.symlink_to("/dev/zero")
    return "a device"


def unix_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # as the name may have 108 bytes only
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(before)
    return "a socket"


def directory(path):
    path.mkdir()
    return "a directory"


KINDS = [fifo, link_to_a_fifo, zeros, unix_socket, directory]


@pytest.fixture(params=KINDS)
def odd(request):
    """Puts something that is no file at a path; gives what it is to be called."""

    def put(path):
        path.unlink(missing_ok=True)
        return request.param(path)

    return put


@pytest.fixture
def small_tree(tmp_path):
    return BP4D(tmp_path / "data", subjects=("F001", "F003"), tasks=("T1",))


# The reader.


def test_odd_file_is_refused(tmp_path, odd):
    path = tmp_path / "file"
    what = odd(path)
    with pytest.raises(ValueError, match=f"^{path}: expected a regular file, got {what}$"):
        files.read_bytes(path, 100)


def test_reads_up_to_the_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    assert files.read_bytes(path, 1000) == b"x" * 1000
    with pytest.raises(ValueError, match=f"^{path}: got 1,000 bytes, takes at most 999$"):
        files.read_bytes(path, 999)


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        files.read_bytes(tmp_path / "file", 100)


@pytest.mark.parametrize("size", [0, 10, 10_000_000_000])
def test_change_of_size_is_told(tmp_path, monkeypatch, size):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    fstat = os.fstat

    def change(descriptor):
        status = fstat(descriptor)
        os.truncate(path, size)
        return status

    monkeypatch.setattr(files.os, "fstat", change)
    with pytest.raises(ValueError, match=f"^{path}: its size changed while it was read"):
        files.read_bytes(path, 1000)


# CIFAR-10.


def test_odd_archive_is_told(tmp_path, odd):
    path = tmp_path / cifar10.ARCHIVE
    what = odd(path)
    with pytest.raises(ValueError, match=f"{path}: expected a regular file, got {what}"):
        cifar10.load(tmp_path)


@pytest.mark.parametrize("make", [fifo, link_to_a_fifo, zeros, unix_socket])
def test_odd_data_directory_is_told(tmp_path, make):
    path = tmp_path / "data"
    what = make(path)
    with pytest.raises(ValueError, match=f"{path}: expected a regular file, got {what}"):
        cifar10.load(path)


def test_odd_batch_is_told(cifar10_folder, tmp_path, odd):
    for path in cifar10_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    what = odd(tmp_path / "data_batch_2")
    with pytest.raises(ValueError, match=f"data_batch_2: expected a regular file, got {what}"):
        cifar10.load(tmp_path)


def test_odd_batch_alone_is_told(tmp_path, odd):
    what = odd(tmp_path / "data_batch_2")
    with pytest.raises(ValueError, match=f"data_batch_2: expected a regular file, got {what}"):
        cifar10.load(tmp_path)


def enlarge(path, size):
    """Makes a file larger, with a hole that takes no space."""
    with path.open("ab") as file:
        file.truncate(size)


def test_huge_batch_and_huge_archive_are_refused(tmp_path):
    for name in ("data_batch_1", cifar10.ARCHIVE):
        folder = tmp_path / name[:4]
        folder.mkdir()
        enlarge(folder / name, 1 << 40)
        with pytest.raises(ValueError, match=f"{name}: got 1,099,511,627,776 bytes, takes at most"):
            cifar10.load(folder)


def member(name, size=0, **headers):
    info = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
    info.size = size
    info.pax_headers = headers
    return info.tobuf(tarfile.PAX_FORMAT if headers else tarfile.GNU_FORMAT)


def header(kind, size):
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member("data_batch_1", 2 << 30), "data_batch_1' has 2,147,483,648 bytes, takes at most"),
        (member("other", 1 << 60), "other' has 1,152,921,504,606,846,976 bytes, takes at most"),
        (member("data_batch_1", -512), "data_batch_1' has -512 bytes"),
        (member("data_batch_1", size="9999999999"), "data_batch_1' has 9,999,999,999 bytes"),
        (header(tarfile.GNUTYPE_LONGNAME, 1 << 30), "'header' has 1,073,741,824 bytes"),
        (header(tarfile.XHDTYPE, 1 << 30), "'header' has 1,073,741,824 bytes"),
        (header(tarfile.XGLTYPE, -1), "'header' has -1 bytes"),
        (member("data_batch_1") * 2, "has two members data_batch_1"),
        (member("other") * 101, "has more than 100 members"),
        (b"", "empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_hostile_archive_is_refused(tmp_path, content, message):
    path = tmp_path / cifar10.ARCHIVE
    path.write_bytes(gzip.compress(content + bytes(10240)) if content else b"")
    with pytest.raises(ValueError, match=f"{path}: not a readable archive: .*{message}"):
        cifar10.load(path)


def test_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "_LARGEST_UNPACKED", 50_000)
    content = b"".join(member(f"other{n}", 10_240) + bytes(10_240) for n in range(10))
    path = tmp_path / cifar10.ARCHIVE
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match="unpacks to more than 50,000 bytes"):
        cifar10.load(path)


# CIFAR-10N.


def test_odd_human_labels_are_told(tmp_path, odd, monkeypatch):
    path = tmp_path / cifar10n.FILE
    what = odd(path)
    assert cifar10n.find(tmp_path) == path
    with pytest.raises(ValueError, match=f"{path}: expected a regular file, got {what}"):
        cifar10n._read(path)


def archived(size, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(buffer, "w", compression, compresslevel=1) as archive,
        archive.open("archive/data.pkl", "w") as file,
    ):
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))
    return buffer.getvalue()


def test_bomb_of_human_labels_is_refused(tmp_path):
    path = tmp_path / cifar10n.FILE
    bomb = archived(64 << 20)
    lying = bomb.replace((64 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert lying != bomb
    packed = archived(1 << 20, zipfile.ZIP_BZIP2)
    for content, message in (
        (bomb, "its data.pkl has 67,108,864 bytes, takes at most"),
        (lying, "Bad CRC"),
        (packed, "its data.pkl is neither stored nor deflated"),
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=f"{path}: not a readable file of torch.save: {message}"
        ):
            cifar10n._read(path)
    enlarge(path, 1 << 40)
    with pytest.raises(ValueError, match=f"{path}: got 1,099,511,627,776 bytes, takes at most"):
        cifar10n._read(path)


# Weights.


def test_odd_weights_are_told(tmp_path, odd):
    path = tmp_path / "model.safetensors"
    what = odd(path)
    with pytest.raises(ValueError, match=f"--weights: {path}: expected a regular file, got {what}"):
        Weights.read(path)


def test_weights_are_read_whole(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(3), "c": torch.zeros(0, 2)}
    tensors["d"] = torch.randn(5).to(torch.bfloat16)
    save_file(tensors, path, {"methods": '{"prune": {}}'})
    read = Weights.read(path)
    assert read.shapes == {"prune": {}}
    assert read.trained_on == {}
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in load_file(path).items():
        assert read.tensors[name].dtype == tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


@pytest.mark.parametrize("methods", ["[]", "3", "{", "[" * 100_000])
def test_weights_with_other_metadata_are_refused(tmp_path, methods):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"methods": methods})
    with pytest.raises(ValueError, match=f"--weights: {path} is not a model.safetensors"):
        Weights.read(path)


def test_huge_and_empty_weights_are_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ValueError, match=f"--weights: {path} is not a model.safetensors"):
        Weights.read(path)
    enlarge(path, 1 << 40)
    with pytest.raises(ValueError, match=r"--weights: .* got 1,099,511,627,776 bytes, takes at"):
        Weights.read(path)


# Sweeps.


def test_odd_grid_is_told(tmp_path, odd):
    path = tmp_path / "grid.toml"
    what = odd(path)
    assert SweepConfig(str(path)).path == path
    with pytest.raises(ValueError, match=f"{path}: expected a regular file, got {what}"):
        Grid.read(path, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "got an empty file, takes a grid of runs"),
        ("a = " + "[" * 100_000, "maximum recursion depth"),
        ("#" * (2 << 20), "got 2,097,152 bytes, takes at most"),
    ],
    ids=["empty", "deep", "huge"],
)
def test_odd_text_of_a_grid_is_told(tmp_path, text, message):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}: {message}"):
        Grid.read(path, None)


@pytest.mark.parametrize(
    "text",
    [
        "[grid]\nseed = {0}\nnoise-seed = {0}\nlr = {0}",
        "variants = [{{ seed = {0}, noise-seed = {0}, lr = {0} }}]",
        "variants = [{{ seed = {0} }}, {{ lr = {0} }}]\n[grid]\nnoise-seed = {0}\nepochs = {0}",
        "[scales.all]\ngrid = {{ seed = {0}, noise-seed = {0}, lr = {0} }}",
    ],
)
def test_runs_are_counted_before_they_are_made(tmp_path, text):
    path = tmp_path / "grid.toml"
    path.write_text(text.format(list(range(1, 1001))))
    with pytest.raises(ValueError, match=f"{path}: got [12],000,000,000 runs, takes at most 100,"):
        Grid.read(path, None)


def test_runs_up_to_the_limit_are_taken(tmp_path):
    path = tmp_path / "grid.toml"
    path.write_text(f"[grid]\nseed = {list(range(1000))}\nnoise-seed = {list(range(100))}\n")
    assert sum(1 for _ in Grid.read(path, None).runs()) == 100_000


# Faces.


def load(tree):
    return (bp4d if isinstance(tree, BP4D) else disfa).load(tree.root, SIZE, False, None)


def test_odd_labels_cost_their_sequence(small_tree, odd):
    what = odd(small_tree.labels(*FIRST))
    assert load(small_tree).subjects == ("F003",)
    (fault,) = small_tree.faults()
    assert fault.startswith("malformed labels: AUCoding/AU_OCC/F001_T1.csv: not a readable text: ")
    assert fault.endswith(f": expected a regular file, got {what}")


def test_odd_labels_of_disfa_cost_their_subject(tmp_path, odd):
    tree = DISFA(tmp_path)
    what = odd(tree.labels("SN001", 4))
    assert load(tree).subjects == ("SN003", "SN006")
    (fault,) = tree.faults()
    assert fault.startswith("malformed labels: ActionUnit_Labels/SN001/SN001_au4.txt: not a ")
    assert fault.endswith(f": expected a regular file, got {what}")


def test_odd_landmarks_cost_their_sequence(small_tree, odd):
    (small_tree.root / "Landmarks").mkdir()
    what = odd(small_tree.root / "Landmarks" / "F001_T1.csv")
    assert load(small_tree).subjects == ("F003",)
    (fault,) = small_tree.faults()
    assert fault.startswith("malformed landmarks: Landmarks/F001_T1.csv: not a readable text: ")
    assert fault.endswith(f": expected a regular file, got {what}")


def test_landmarks_behind_a_broken_link_cost_their_sequence(small_tree):
    (small_tree.root / "Landmarks").mkdir()
    (small_tree.root / "Landmarks" / "F001_T1.csv").symlink_to("nowhere")
    assert load(small_tree).subjects == ("F003",)
    (fault,) = small_tree.faults()
    assert "No such file or directory" in fault


def test_odd_picture_costs_its_frame(small_tree, odd):
    what = odd(small_tree.picture(*FIRST, 100))
    frames = load(small_tree)
    assert len(frames.row) == 5
    (fault,) = small_tree.faults()
    assert fault.startswith("unreadable picture: Sequences(2D+3D)/F001/T1/0100.jpg: ")
    assert fault.endswith(f": expected a regular file, got {what}")


@pytest.mark.parametrize("make", [fifo, link_to_a_fifo, zeros, unix_socket])
def test_odd_folder_of_pictures_is_told(small_tree, make):
    folder = small_tree.picture(*FIRST, 100).parent
    folder.rename(folder.with_name("T9"))
    what = make(folder)
    load(small_tree)
    assert small_tree.faults() == [
        f"missing pictures: Sequences(2D+3D)/F001/T1: expected a folder, got {what}"
    ]


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "WEBP"])
def test_picture_of_another_format_costs_its_frame(small_tree, kind):
    path = small_tree.picture(*FIRST, 100)
    Image.new("RGB", (SIZE, SIZE)).save(path, kind)
    assert len(load(small_tree).row) == 5
    (fault,) = small_tree.faults()
    assert fault.endswith("0100.jpg: cannot identify image file, takes JPEG or PNG")


@pytest.mark.parametrize("side", [8_000, 10_000, 20_000])
def test_picture_of_too_many_pixels_costs_its_frame(small_tree, side):
    path = small_tree.picture(*FIRST, 100)
    Image.new("1", (side, side)).save(path, "PNG", compress_level=1)
    assert len(load(small_tree).row) == 5
    (fault,) = small_tree.faults()
    assert "0100.jpg: " in fault
    assert "pixels" in fault


def test_huge_picture_costs_its_frame(small_tree):
    enlarge(small_tree.picture(*FIRST, 100), 1 << 40)
    assert len(load(small_tree).row) == 5
    (fault,) = small_tree.faults()
    assert fault.endswith("0100.jpg: got 1,099,511,627,776 bytes, takes at most 67,108,864")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0\n" * 20_001, "got 20,001 lines, takes at most 20,000"),
        (b"," * 10_000, "got a line of 10,001 cells, takes at most 10,000"),
        (None, "got 1,099,511,627,776 bytes, takes at most 67,108,864"),
    ],
)
def test_huge_labels_cost_their_sequence(small_tree, content, message):
    path = small_tree.labels(*FIRST)
    if content is None:
        enlarge(path, 1 << 40)
    else:
        path.write_bytes(content)
    assert load(small_tree).subjects == ("F003",)
    (fault,) = small_tree.faults()
    assert fault.endswith(message)


def test_openface_of_the_longest_video_fits():
    row = ", ".join(["-123.456"] * 714)
    assert (len(row) + 1) * 4845 < table._LARGEST


def test_fifo_in_the_cache_is_not_waited_for(small_tree):
    load(small_tree)
    cache = small_tree.root / "noisyq_fast"
    for pattern in ("*-index.json", "*-index.parquet", "*.state", "*.rgb"):
        (path,) = cache.glob(pattern)
        path.unlink()
        os.mkfifo(path)
        assert len(load(small_tree).row) == 6
        assert path.is_file()
    (cache / ".lock").unlink()
    os.mkfifo(cache / ".lock")
    with pytest.raises(OSError, match=f"{cache}: the cache cannot be written there"):
        load(small_tree)
