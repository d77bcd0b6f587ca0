import pytest
import torch

from experiments.checkpoints import Checkpoints

FILES = ("checkpoint.pt", "checkpoint-before.pt")


def test_the_last_one_is_read_and_the_one_before_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load() is None
    for epoch in range(3):
        checkpoints.save({"epoch": epoch, "weights": {"a": torch.full((2,), epoch)}})
    loaded = checkpoints.load()
    assert loaded["epoch"] == 2
    assert loaded["weights"]["a"].tolist() == [2, 2]
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)
    checkpoints.remove()
    assert checkpoints.load() is None


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:99] + b"?" + b[100:]]
)
def test_a_damaged_one_is_told_and_the_one_before_used(tmp_path, capsys, damage):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"epoch": 1})
    checkpoints.save({"epoch": 2})
    path = tmp_path / FILES[0]
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoints.load() == {"epoch": 1}
    assert "checkpoint.pt: damaged (checksum), going back" in capsys.readouterr().err
    path = tmp_path / FILES[1]
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoints.load() is None


def test_a_kill_between_the_two_files_loses_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"epoch": 1})
    checkpoints.last.replace(checkpoints.before)
    assert checkpoints.load() == {"epoch": 1}


def test_a_full_disk_leaves_the_last_one(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
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


def test_a_hostile_one_runs_nothing(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save({"epoch": _Shell()})
    with pytest.raises(Exception, match="Weights only load failed"):
        checkpoints.load()
    assert capsys.readouterr().out == ""
