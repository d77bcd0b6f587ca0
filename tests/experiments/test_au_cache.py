"""What is kept of a data set of videos from one start to the next, with BP4D as the example."""

import errno
import fcntl
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch
from au_trees import BP4D, DISFA, SIZE, assert_greys, level, truncate
from PIL import Image

from experiments.data.au import bp4d, decoded, decoding, disfa, index

FIRST = ("F001", "T1")
STRIDE = SIZE * SIZE * 3

pytestmark = pytest.mark.filterwarnings("ignore:not all of BP4D")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 10_000)


@pytest.fixture
def tree(tmp_path):
    return BP4D(tmp_path / "data")


@pytest.fixture
def decodes(monkeypatch):
    """The names of the pictures that are decoded from now on."""
    names = []
    original = decoded.decode

    def decode(jobs, size, file):
        names.extend(f"{job.picture.parent.name}/{job.picture.name}" for job in jobs)
        return original(jobs, size, file)

    monkeypatch.setattr(decoded, "decode", decode)
    return names


@pytest.fixture
def indexes(monkeypatch):
    """Grows with each index that is made from now on."""
    made = []
    original = index.build
    monkeypatch.setattr(index, "build", lambda *args: made.append(args) or original(*args))
    return made


def load(tree, size=SIZE, cache=None):
    return bp4d.load(tree.root, size, False, cache)


def assert_whole(frames, tree):
    assert_greys(frames.images, [level(*key) for key in tree.expected()])


def test_the_second_time_neither_labels_nor_pictures_are_read(tree, decodes, indexes):
    tree.edit(FIRST, 2, "99,", "99 ,5")
    before = load(tree)
    assert len(decodes) == 17
    assert len(indexes) == 1
    faults = tree.cached("faults.txt").read_text()
    tree.cached("faults.txt").unlink()
    after = load(tree)
    assert len(decodes) == 17
    assert len(indexes) == 1
    assert torch.equal(after.images, before.images)
    assert torch.equal(after.given, before.given)
    assert after.checksum == before.checksum
    assert tree.cached("faults.txt").read_text() == faults
    assert "bad label: AUCoding/AU_OCC/F001_T1.csv:2: " in faults


def test_the_pictures_are_mapped(tree):
    """A change of the file is a change of what was read before."""
    images = load(tree).images
    with tree.cached("*.rgb").open("r+b") as file:
        file.write(bytes([1, 2, 3]))
    assert images[0, 0, 0].tolist() == [1, 2, 3]


def test_a_cache_elsewhere(tree, tmp_path):
    cache = tmp_path / "some" / "where"
    assert_whole(load(tree, cache=cache), tree)
    assert not (tree.root / "noisyq_fast").exists()
    assert (cache / "faults.txt").exists()


def test_sizes_have_pictures_of_their_own(tree, decodes, indexes):
    small, large = load(tree), load(tree, size=2 * SIZE)
    assert large.images.shape == (18, 32, 32, 3)
    assert large.checksum != small.checksum
    load(tree)
    assert len(decodes) == 36
    assert len(indexes) == 1


def test_changed_labels_are_seen(tree, indexes):
    before = load(tree)
    au1 = tree.label(*FIRST, 99, 1)
    tree.edit(FIRST, 2, f"99,{au1},", f"99,{1 - au1 % 2},  ")
    after = load(tree)
    assert len(indexes) == 2
    assert after.given[0, 0] == 1 - au1 % 2
    assert torch.equal(after.images, before.images)
    assert after.checksum != before.checksum


def test_an_added_picture_is_seen(tree, decodes, capsys):
    path = tree.picture(*FIRST, 99)
    path.rename(tree.root / "elsewhere.jpg")
    assert len(load(tree).images) == 17
    old = tree.cached("*.rgb")
    (tree.root / "elsewhere.jpg").rename(path)
    assert_whole(load(tree), tree)
    assert len(decodes) == 17 + 18
    assert not old.exists()
    told = capsys.readouterr().out
    assert "bp4d-index.json: the data set has changed" in told
    assert f"{old}: removed" in told


def test_a_copy_has_the_same_checksum(tree, tmp_path):
    before = load(tree)
    shutil.copytree(tree.root, tmp_path / "copy", ignore=shutil.ignore_patterns("noisyq_fast"))
    after = bp4d.load(tmp_path / "copy", SIZE, False, None)
    assert after.checksum == before.checksum


def test_other_bytes_of_a_picture_change_the_checksum(tree):
    before = load(tree)
    path = tree.picture(*FIRST, 99)
    path.unlink()
    Image.effect_noise((SIZE, SIZE), 50).convert("RGB").save(path)
    assert load(tree).checksum != before.checksum


def flip(path):
    blob = bytearray(path.read_bytes())
    blob[len(blob) // 2] ^= 0x40
    path.write_bytes(blob)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-10])


def make_a_list(path):
    path.write_text("[]")


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*-index.parquet", flip),
        ("*-index.parquet", shorten),
        ("*-index.parquet", lambda path: path.unlink()),
        ("*-faults.parquet", flip),
        ("*-index.json", shorten),
        ("*-index.json", make_a_list),
    ],
)
def test_a_damaged_index_is_made_anew(tree, pattern, damage, decodes, indexes, capsys):
    before = load(tree)
    damage(tree.cached(pattern))
    capsys.readouterr()
    after = load(tree)
    assert "bp4d-index.json: damaged" in capsys.readouterr().out
    assert len(indexes) == 2
    assert len(decodes) == 18
    assert torch.equal(after.given, before.given)
    assert after.checksum == before.checksum
    load(tree)
    assert len(indexes) == 2


@pytest.mark.parametrize(
    ("pattern", "damage"),
    [
        ("*.rgb", shorten),
        ("*.rgb", lambda path: path.unlink()),
        ("*.state", shorten),
        ("*.state", lambda path: path.write_bytes(bytes([7]) * 18)),
    ],
)
def test_damaged_pictures_are_decoded_anew(tree, pattern, damage, decodes, capsys):
    load(tree)
    damage(tree.cached(pattern))
    assert_whole(load(tree), tree)
    assert len(decodes) == 36
    assert ".rgb: damaged" in capsys.readouterr().out


def test_goes_on_after_an_interruption(tree, monkeypatch, decodes):
    original = decoded.decode

    def interrupted(jobs, size, file):
        yield from original(jobs[:5], size, file)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(decoded, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            load(tree)
    assert tree.cached("*.state").read_bytes() == bytes([1] * 5 + [0] * 13)
    decodes.clear()
    assert_whole(load(tree), tree)
    assert decodes[0] == "T2/0101.jpg"
    assert len(decodes) == 13


def test_a_row_that_is_not_marked_is_decoded_again(tree, decodes):
    """The process was killed after it had written the pixels, or some of them."""
    load(tree)
    state = bytearray([1] * 18)
    state[4] = 0
    tree.cached("*.state").write_bytes(state)
    with tree.cached("*.rgb").open("r+b") as file:
        file.seek(4 * STRIDE)
        file.write(bytes(STRIDE // 2))
    decodes.clear()
    assert_whole(load(tree), tree)
    assert decodes == ["T2/0100.jpg"]


def test_several_unreadable_pictures(tree):
    """Their rows stay empty."""
    for n in (0, 7, 16):
        truncate(tree.picture(*tree.expected()[n]))
    order = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 17]
    before, after = load(tree), load(tree)
    for frames in (before, after):
        expected = [tree.expected()[n] for n in order]
        assert_greys(frames.images[frames.row], [level(*key) for key in expected])
        assert frames.given[:, 0].tolist() == [tree.label(*key, 1) for key in expected]
    assert after.checksum == before.checksum
    assert len(tree.faults()) == 3


def test_a_mended_picture_is_decoded(tree, decodes):
    """Written over, which the time of its folder does not tell."""
    path = tree.picture(*FIRST, 99)
    whole = path.read_bytes()
    path.write_bytes(b"")
    before = load(tree)
    assert len(before.row) == 17
    shown = before.images[before.row].clone()
    path.write_bytes(whole)
    decodes.clear()
    after = load(tree)
    assert torch.equal(before.images[before.row], shown)  # as a process that still runs sees it
    assert_whole(after, tree)
    assert decodes == ["T1/0099.jpg"]
    assert after.checksum != before.checksum
    assert tree.faults() == []


def test_decodes_in_processes(tree, monkeypatch, decodes):
    monkeypatch.setattr(decoding, "_CHUNK", 5)
    truncate(tree.picture(*FIRST, 99))
    frames = load(tree)
    assert_greys(frames.images[frames.row], [level(*key) for key in tree.expected()[1:]])
    (fault,) = tree.faults()
    assert "image file is truncated" in fault


@pytest.mark.parametrize("there", ["noisyq_fast", "noisyq_fast/.lock"])
def test_a_cache_that_cannot_be_written(tree, there):
    if there.endswith("lock"):
        (tree.root / there).mkdir(parents=True)
    else:
        (tree.root / there).write_text("a file")
    with pytest.raises(OSError, match=r"data/noisyq_fast: the cache cannot be .* --cache-dir"):
        load(tree)


def test_the_lock_of_a_cache_is_no_way_to_other_files(tree, tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tree.root / "noisyq_fast").mkdir()
    (tree.root / "noisyq_fast/.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(
        OSError, match=r"cannot be written there \(.*\.lock: expected .*, got a symbolic link"
    ):
        load(tree)
    assert (tmp_path / "precious").read_text() == "precious"


def test_too_little_space(tree, monkeypatch):
    usage = SimpleNamespace(free=18 * STRIDE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"13,823 bytes are free, .* take 13,824; .* --cache-dir"):
        load(tree)
    usage.free = 18 * STRIDE
    assert_whole(load(tree), tree)
    usage.free = 0
    assert_whole(load(tree), tree)


def test_a_disk_that_fills_up(tree, monkeypatch):
    def decode(jobs, size, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(decoded, "decode", decode)
    with pytest.raises(OSError, match=r"decoded pictures take 13,824; .* --cache-dir"):
        load(tree)


def test_waits_for_another_process(tree, capsys):
    cache = tree.root / "noisyq_fast"
    cache.mkdir()
    found = []
    waiting = threading.Thread(target=lambda: found.append(load(tree)))
    with (cache / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting.start()
        waiting.join(timeout=1)
        assert waiting.is_alive()
        assert not list(cache.glob("*.json"))
    waiting.join()
    assert_whole(found[0], tree)
    assert "waiting for another process" in capsys.readouterr().out


def test_data_sets_can_share_a_cache(tree, tmp_path, decodes, indexes):
    other = DISFA(tmp_path / "other")
    for _ in range(2):
        assert_whole(load(tree, cache=tmp_path), tree)
        assert_whole(disfa.load(other.root, SIZE, False, tmp_path), other)
    assert len(decodes) == 18 + 9
    assert len(indexes) == 2
