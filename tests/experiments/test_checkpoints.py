import contextlib
import hashlib
import io
import os

import pytest
import torch

from experiments.training.checkpoints import Checkpoints

FILES = ("checkpoint.pt", "checkpoint-before.pt")


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, "this-run")


def written(path, content):
    """Puts any content under its right checksum."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    path.write_bytes(hashlib.sha256(content).digest() + content)


def test_the_last_one_is_read_and_the_one_before_kept(checkpoints, tmp_path):
    assert checkpoints.load() is None
    for epoch in range(3):
        checkpoints.save({"epoch": epoch, "weights": {"a": torch.full((2,), epoch)}})
    loaded = checkpoints.load()
    assert loaded["epoch"] == 2
    assert loaded["weights"]["a"].tolist() == [2, 2]
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    checkpoints.remove()
    assert checkpoints.load() is None


def damage(path, how):
    path.write_bytes(how(path.read_bytes()))


@pytest.mark.parametrize(
    "how", [lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + b"?" + b[100:]]
)
def test_a_damaged_one_is_told_and_the_one_before_used(checkpoints, capsys, how):
    checkpoints.save({"epoch": 1})
    checkpoints.save({"epoch": 2})
    damage(checkpoints.last, how)
    assert checkpoints.load() == {"epoch": 1}
    assert "checkpoint.pt: damaged (checksum), going back" in capsys.readouterr().err
    damage(checkpoints.last, how)
    assert checkpoints.load() is None


def test_a_kill_between_the_two_files_loses_nothing(checkpoints):
    checkpoints.save({"epoch": 1})
    checkpoints.last.replace(checkpoints.before)
    assert checkpoints.load() == {"epoch": 1}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("calls", range(3))
def test_a_kill_after_going_back_loses_nothing(checkpoints, monkeypatch, calls):
    """The damaged one must not take the place of the one that was gone back to."""
    checkpoints.save({"epoch": 1})
    checkpoints.save({"epoch": 2})
    damage(checkpoints.last, lambda blob: blob[:-1])
    assert checkpoints.load() == {"epoch": 1}
    replace, done = os.replace, []

    def killed(source, target):
        if len(done) == calls:
            raise Killed
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patched, contextlib.suppress(Killed):
        patched.setattr(os, "replace", killed)
        checkpoints.save({"epoch": 2})
    assert len(done) == calls
    assert checkpoints.load() == {"epoch": 2 if calls == 2 else 1}


def test_a_full_disk_leaves_the_last_one(checkpoints, tmp_path, monkeypatch):
    checkpoints.save({"epoch": 1})

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save({"epoch": 2})
    assert checkpoints.load() == {"epoch": 1}


class _Shell:
    def __reduce__(self):
        return print, ("run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"neither a zip nor a pickle", "holds no checkpoint"),
        (b"", "holds no checkpoint"),
        ([], "holds no checkpoint"),
        ({}, "holds no checkpoint"),
        ({"format": 4, "run": "this-run"}, "holds no checkpoint"),
        ({"format": 4, "run": "this-run", "state": None}, "holds NoneType as the state"),
        ({"format": 4, "run": "this-run", "state": [1]}, "holds list as the state"),
        ({"format": 3, "run": "this-run", "state": {"model": {}}}, "holds no state of format 3"),
        ({"format": 2, "model": {}}, "has format 2, this version takes 4"),
        ({"format": 4, "run": "other", "state": {}}, "is of the run other, this one is this-run"),
        ({"format": 4, "run": torch.ones(2), "state": {}}, "is of the run tensor"),
        ({"format": 4, "run": "this-run", "state": {"a": _Shell()}}, "holds no checkpoint"),
    ],
)
@pytest.mark.parametrize("name", FILES)
def test_a_whole_file_that_is_no_checkpoint_of_this_run_is_refused(
    checkpoints, tmp_path, capsys, name, content, message
):
    path = tmp_path / name
    written(path, content)
    with pytest.raises(ValueError, match=f"{name}: {message}.*; --restart starts anew") as error:
        checkpoints.load()
    assert "\n" not in str(error.value)
    assert path.exists()
    assert capsys.readouterr().out == ""


def test_a_link_is_refused(checkpoints, tmp_path):
    checkpoints.save({"epoch": 1})
    checkpoints.last.rename(tmp_path / "elsewhere")
    checkpoints.last.symlink_to("elsewhere")
    with pytest.raises(ValueError, match=r"checkpoint\.pt: expected .*, got a symbolic link"):
        checkpoints.load()
