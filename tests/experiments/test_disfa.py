import pytest
from au_trees import DISFA, SIZE, assert_greys, level, replace_in

from experiments.data.au import decoding, disfa

PARTS = (
    "SN001 SN002 SN009 SN010 SN016 SN026 SN027 SN030 SN032",
    "SN006 SN011 SN012 SN013 SN018 SN021 SN024 SN028 SN031",
    "SN003 SN004 SN005 SN007 SN008 SN017 SN023 SN025 SN029",
)
PUBLISHED = tuple(set(part.split()) for part in PARTS)


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 10_000)


@pytest.fixture
def tree(tmp_path):
    return DISFA(tmp_path)


def load(tree, strict=False):
    return disfa.load(tree.root, SIZE, strict, None)


def assert_is(frames, tree, expected):
    """Pictures, labels and subjects of `(subject, frame)`."""
    assert_greys(frames.images[frames.row], [level(*key) for key in expected])
    given = [[int(tree.intensity(*key, au) >= 2) for au in disfa.AUS] for key in expected]
    assert frames.given.tolist() == given
    assert [frames.subjects[number] for number in frames.subject] == [key[0] for key in expected]


def test_parts_are_the_published_ones_and_share_no_subject():
    assert tuple(map(set, disfa.PARTS)) == PUBLISHED
    assert len(set().union(*disfa.PARTS)) == sum(map(len, disfa.PARTS)) == 27


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_whole_release_has_no_faults(tmp_path, suffix, capsys):
    subjects = sorted(set().union(*PUBLISHED))
    tree = DISFA(tmp_path, subjects, suffix=suffix)
    frames = load(tree, strict=True)
    assert_is(frames, tree, tree.expected())
    assert frames.name == "disfa"
    assert frames.aus == (1, 2, 4, 6, 9, 12, 25, 26)
    assert frames.subjects == tuple(subjects)
    assert frames.part.bincount().tolist() == [27, 27, 27]
    told = capsys.readouterr().out
    assert "27 subjects, 27 sequences, 81 frames (27 + 27 + 27 in the parts)" in told


def test_positive_from_two_on(tmp_path):
    tree = DISFA(tmp_path, frames=range(1, 7))
    tree.labels("SN001", 4).write_text("".join(f"{n + 1},{n}\n" for n in range(6)))
    frames = load(tree)
    assert frames.given[:6, 2].tolist() == [0, 0, 1, 1, 1, 1]


def test_the_short_video_is_no_fault(tmp_path):
    tree = DISFA(tmp_path, ("SN001", "SN021"))
    tree.picture("SN021", 2).unlink()
    frames = load(tree)
    assert tree.faults() == []
    assert_is(frames, tree, [key for key in tree.expected() if key != ("SN021", 2)])


def missing_picture(tree):
    tree.picture("SN001", 2).unlink()
    what = "frame 2 has no picture in Images/SN001"
    return [f"missing picture: ActionUnit_Labels/SN001/SN001_au1.txt:2: {what}"]


def bad_intensity(tree):
    tree.labels("SN001", 9).write_text("1,0\n2,6\n3,0\n")
    what = "got AU9 '6', takes 0, 1, 2, 3, 4 or 5"
    return [f"bad label: ActionUnit_Labels/SN001/SN001_au9.txt:2: {what}"]


def missing_line(tree):
    path = tree.labels("SN001", 4)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[2])
    what = "SN001_au4.txt lacks frame 2"
    return [f"differing frames: ActionUnit_Labels/SN001/SN001_au1.txt:2: {what}"]


def other_frame(tree):
    replace_in(tree.labels("SN001", 4), 2, "2,", "20,")
    return [
        "differing frames: ActionUnit_Labels/SN001/SN001_au1.txt:2: SN001_au4.txt lacks frame 2",
        "differing frames: ActionUnit_Labels/SN001/SN001_au4.txt:2: SN001_au1.txt lacks frame 20",
    ]


@pytest.mark.parametrize("plant", [missing_picture, bad_intensity, missing_line, other_frame])
def test_a_fault_costs_its_frame(tree, plant):
    faults = plant(tree)
    frames = load(tree)
    assert tree.faults() == faults
    assert_is_without(frames, tree, ("SN001", 2))


def assert_is_without(frames, tree, left_out):
    expected = [key for key in tree.expected() if key != left_out]
    assert_greys(frames.images[frames.row], [level(*key) for key in expected])
    assert len(frames.given) == len(expected)


def test_repeated_frame(tree):
    replace_in(tree.labels("SN001", 12), 3, "3,", "2,")
    frames = load(tree)
    assert tree.faults() == [
        "differing frames: ActionUnit_Labels/SN001/SN001_au1.txt:3: SN001_au12.txt lacks frame 3",
        "repeated frame: ActionUnit_Labels/SN001/SN001_au12.txt:3: frame 2 is in another line too",
    ]
    assert len(frames.given) == 7


def missing_file(tree):
    tree.labels("SN001", 26).unlink()
    return "missing AU: ActionUnit_Labels/SN001/SN001_au26.txt: not there"


def empty_file(tree):
    tree.labels("SN001", 26).write_text("")
    return "malformed labels: ActionUnit_Labels/SN001/SN001_au26.txt: empty"


def counted_from_zero(tree):
    path = tree.picture("SN001", 1)
    path.rename(path.with_name("00000.jpg"))
    what = "got a picture of frame 0, takes frames from 1"
    return f"wrong numbers: Images/SN001: {what}"


@pytest.mark.parametrize("plant", [missing_file, empty_file, counted_from_zero])
def test_a_fault_costs_its_subject(tree, plant):
    fault = plant(tree)
    frames = load(tree)
    assert tree.faults() == [fault]
    assert_is(frames, tree, [key for key in tree.expected() if key[0] != "SN001"])


def test_a_missing_subject(tree):
    load(tree)
    lines = tree.cached("faults.txt").read_text().splitlines()
    assert len(lines) == 24
    what = "ActionUnit_Labels/SN002/SN002_au1.txt: SN002 has no labels"
    assert lines[0] == f"missing subject: {what}"


def test_without_pictures_tells_how_to_extract_them(tree):
    (tree.root / "Images").rename(tree.root / "pictures")
    with pytest.raises(
        FileNotFoundError, match=r"no pictures of disfa .* `ffmpeg -i .* -start_number 1 "
    ):
        load(tree)


def test_without_a_directory():
    with pytest.raises(FileNotFoundError, match=r"--data-dir: .*SN001_au1.txt.* licence"):
        disfa.load(None, SIZE, False, None)
