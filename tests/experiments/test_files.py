import errno
import os

import pytest

from experiments.storage.files import atomic, open_lock, remove_temporaries


def test_the_new_file_and_its_name_are_on_the_disk(tmp_path, monkeypatch):
    """In this order: the bytes, the old file's new name, the name, the folder."""
    done = []
    sync, replace = os.fsync, os.replace

    def synced(descriptor):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        sync(descriptor)

    def replaced(source, target):
        done.append((str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    path, before = tmp_path / "a", tmp_path / "b"
    path.write_text("old")
    with atomic(path, before) as temporary:
        temporary.write_text("new")
    assert done == [
        str(temporary),
        (str(path), str(before)),
        (str(temporary), str(path)),
        str(tmp_path),
    ]
    assert (path.read_text(), before.read_text()) == ("new", "old")


def test_what_a_killed_process_of_the_same_number_left_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / f".a.{os.getpid()}").symlink_to("precious")
    with atomic(tmp_path / "a") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "a").is_symlink()


def test_a_full_disk_is_told_with_the_file(tmp_path):
    with pytest.raises(OSError, match=r"No space left on device: '.*/a'"), atomic(tmp_path / "a"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_only_temporaries_of_the_given_files_are_removed(tmp_path):
    for name in (".a.1", ".a.99", ".b.1", ".a.b.1", ".a.txt", "a.1", ".a."):
        (tmp_path / name).touch()
    (tmp_path / ".a.5").mkdir()
    (tmp_path / ".a.6").symlink_to(".b.1")
    remove_temporaries(tmp_path, ["a"])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".b.1", ".a.b.1", ".a.txt", "a.1", ".a.", ".a.5"}


@pytest.mark.parametrize("target", ["precious", "nowhere"])
def test_a_link_is_no_lock_and_its_target_kept(tmp_path, target):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(OSError, match="/lock: expected a regular file, got a symbolic link"):
        open_lock(tmp_path / "lock")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_pipe_is_no_lock_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="/pipe: expected a regular file, got a FIFO"):
        open_lock(tmp_path / "pipe")


def test_a_lock_keeps_what_is_in_the_file(tmp_path):
    (tmp_path / "lock").write_text("precious")
    open_lock(tmp_path / "lock").close()
    assert (tmp_path / "lock").read_text() == "precious"
    open_lock(tmp_path / "new").close()
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o644
