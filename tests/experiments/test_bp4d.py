import pytest
import torch
from au_trees import BP4D, FRAMES, SIZE, assert_greys, draw, level, truncate

from experiments.data.au import bp4d, decoding
from experiments.data.au.frequency import frequency_weights

# fmt: off
PUBLISHED = (
    {"F001", "F002", "F008", "F009", "F010", "F016", "F018", "F023",
     "M001", "M004", "M007", "M008", "M012", "M014"},
    {"F003", "F005", "F011", "F013", "F020", "F022",
     "M002", "M005", "M010", "M011", "M013", "M016", "M017", "M018"},
    {"F004", "F006", "F007", "F012", "F014", "F015", "F017", "F019", "F021",
     "M003", "M006", "M009", "M015"},
)
# fmt: on
SUBJECTS = sorted(set().union(*PUBLISHED))
TASKS = [f"T{number}" for number in range(1, 9)]
FIRST = ("F001", "T1")
LINE_OF_100 = 3
"""In a label file, whose first line is the header."""
ABSENT = 38 + 3 * 6
"""Subjects and sequences that a small tree has not got."""

pytestmark = pytest.mark.filterwarnings("ignore:not all of BP4D")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 10_000)


@pytest.fixture
def tree(tmp_path):
    return BP4D(tmp_path / "data")


def load(tree, strict=False):
    return bp4d.load(tree.root, SIZE, strict, None)


def without(tree, *left_out):
    """What the tree shows but for some `(subject, task, frame)`."""
    return [key for key in tree.expected() if key not in left_out]


def assert_is(frames, tree, expected):
    """Pictures, labels, subjects and parts of `(subject, task, frame)`."""
    assert_greys(frames.images[frames.row], [level(*key) for key in expected])
    assert frames.given.tolist() == [[tree.label(*key, au) for au in bp4d.AUS] for key in expected]
    assert [frames.subjects[number] for number in frames.subject] == [key[0] for key in expected]
    part_of = {subject: part for part, group in enumerate(PUBLISHED) for subject in group}
    assert frames.part.tolist() == [part_of[key[0]] for key in expected]


def test_parts_are_the_published_ones_and_share_no_subject():
    assert tuple(map(set, bp4d.PARTS)) == PUBLISHED
    assert [len(part) for part in bp4d.PARTS] == [14, 14, 13]
    assert len(set().union(*bp4d.PARTS)) == 41


def test_a_whole_release_has_no_faults(tmp_path, capsys):
    tree = BP4D(tmp_path, SUBJECTS, TASKS, frames=(7,))
    frames = load(tree, strict=True)
    assert_is(frames, tree, tree.expected())
    assert frames.name == "bp4d"
    assert frames.aus == (1, 2, 4, 6, 7, 10, 12, 14, 15, 17, 23, 24)
    assert frames.subjects == tuple(SUBJECTS)
    assert frames.images.shape == (328, SIZE, SIZE, 3)
    assert frames.images.dtype == torch.uint8
    assert frames.given.dtype == torch.int8
    assert frames.subject.dtype == frames.part.dtype == torch.int64
    assert frames.truth is None
    told = capsys.readouterr().out
    assert "41 subjects, 328 sequences, 328 frames (112 + 112 + 104 in the parts)" in told
    assert "fault" not in told
    rows = {line.split()[0]: line.split()[1:] for line in told.splitlines()}
    assert rows["AU"] == [str(au) for au in bp4d.AUS]
    assert rows["positive"] == [str(n) for n in (frames.given == 1).sum(0).tolist()]
    assert rows["unknown"] == [str(n) for n in (frames.given == 9).sum(0).tolist()]


@pytest.mark.parametrize("occurrence", ["AU_OCC", ""])
@pytest.mark.parametrize("recordings", ["Sequences(2D+3D)", ""])
@pytest.mark.parametrize("digits", [0, 3, 4])
def test_layouts(tmp_path, occurrence, recordings, digits):
    tree = BP4D(tmp_path, occurrence=occurrence, recordings=recordings, digits=digits)
    frames = load(tree)
    assert tree.faults() == []
    assert_is(frames, tree, tree.expected())


def test_mixed_padding(tree):
    for zeros, frame in enumerate(FRAMES):
        path = tree.picture(*FIRST, frame)
        path.rename(path.with_name(f"{'0' * zeros}{frame}.jpg"))
    assert_is(load(tree), tree, tree.expected())
    assert tree.faults() == []


def test_other_files_beside_the_pictures(tree):
    folder = tree.picture(*FIRST, 99).parent
    for name in ("0099.obj", "Thumbs.db", ".0099.jpg", "cover.jpg"):
        (folder / name).write_bytes(b"something")
    (folder / "100.JPG").mkdir()
    assert_is(load(tree), tree, tree.expected())
    assert tree.faults() == []


@pytest.mark.parametrize("columns", [range(24, 0, -1), (30, 24, 23, 3, *range(1, 23))])
def test_columns_are_found_by_the_header(tmp_path, columns):
    tree = BP4D(tmp_path, columns=columns)
    assert_is(load(tree), tree, tree.expected())


def test_label_files_of_another_system(tree):
    path = tree.labels(*FIRST)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert_is(load(tree), tree, tree.expected())
    assert tree.faults() == []


def bad_label(tree):
    tree.edit(FIRST, LINE_OF_100, f"100,{tree.label(*FIRST, 100, 1)},", "100,3,")
    return "bad label: AUCoding/AU_OCC/F001_T1.csv:3: got AU1 '3', takes 0, 1 or 9"


def label_without_a_number(tree):
    tree.edit(FIRST, LINE_OF_100, f"100,{tree.label(*FIRST, 100, 1)},", "100,,")
    return "bad label: AUCoding/AU_OCC/F001_T1.csv:3: got AU1 '', takes 0, 1 or 9"


def short_line(tree):
    tree.edit(FIRST, LINE_OF_100, f",{tree.label(*FIRST, 100, 1)}", "")
    return "malformed labels: AUCoding/AU_OCC/F001_T1.csv:3: got 29 cells, takes 30"


def frame_without_a_number(tree):
    tree.edit(FIRST, LINE_OF_100, "100,", "hundred,")
    what = "got the frame 'hundred', takes a number"
    return f"malformed labels: AUCoding/AU_OCC/F001_T1.csv:3: {what}"


def missing_picture(tree):
    tree.picture(*FIRST, 100).unlink()
    what = "frame 100 has no picture in Sequences(2D+3D)/F001/T1"
    return f"missing picture: AUCoding/AU_OCC/F001_T1.csv:3: {what}"


def broken_link(tree):
    fault = missing_picture(tree)
    tree.picture(*FIRST, 100).symlink_to("nowhere.jpg")
    return fault


def repeated_picture(tree):
    draw(tree.picture(*FIRST, 100).with_name("100.jpg"), 0)
    what = "not the only picture of frame 100"
    return f"repeated picture: Sequences(2D+3D)/F001/T1/100.jpg: {what}"


@pytest.mark.parametrize(
    "plant",
    [
        bad_label,
        label_without_a_number,
        short_line,
        frame_without_a_number,
        missing_picture,
        broken_link,
        repeated_picture,
    ],
)
def test_a_fault_costs_its_frame(tree, plant, capsys):
    fault = plant(tree)
    frames = load(tree)
    assert tree.faults() == [fault]
    assert_is(frames, tree, without(tree, (*FIRST, 100)))
    kind, _, rest = fault.partition(": ")
    assert f"{kind}: 1\n    {rest}\n" in capsys.readouterr().out


def test_a_frame_of_two_lines_is_left_out(tree):
    tree.edit(FIRST, LINE_OF_100 + 1, "101,", "100,")
    frames = load(tree)
    what = "frame 100 is in another line too"
    assert tree.faults() == [f"repeated frame: AUCoding/AU_OCC/F001_T1.csv:4: {what}"]
    assert_is(frames, tree, without(tree, (*FIRST, 100), (*FIRST, 101)))


def no_picture(path):
    path.write_bytes(b"no JPEG")
    return "cannot identify image file"


def cut_short(path):
    truncate(path)
    return "image file is truncated"


def empty(path):
    path.write_bytes(b"")
    return "cannot identify image file"


@pytest.mark.parametrize("spoil", [no_picture, cut_short, empty])
def test_an_unreadable_picture_costs_its_frame(tree, spoil):
    why = spoil(tree.picture(*FIRST, 100))
    frames = load(tree)
    (fault,) = tree.faults()
    assert fault.startswith(f"unreadable picture: Sequences(2D+3D)/F001/T1/0100.jpg: {why}")
    first, _, *others = tree.expected()
    assert_is(frames, tree, [first, *others])


def empty_file(tree):
    tree.labels(*FIRST).write_text("")
    return "malformed labels: AUCoding/AU_OCC/F001_T1.csv: empty"


def only_a_header(tree):
    tree.write(*FIRST, [[0, *range(1, 30)]])
    return "malformed labels: AUCoding/AU_OCC/F001_T1.csv: empty"


def no_text(tree):
    tree.labels(*FIRST).write_bytes(b"0,1,2\n\xff\xfe,1,0\n")
    return "malformed labels: AUCoding/AU_OCC/F001_T1.csv: not a readable text: "


def no_column(tree):
    tree.edit(FIRST, 1, ",14,", ",140,")
    tree.edit(FIRST, 1, ",24,", ",AU24,")
    what = "got 0 of AU 14, 0 of AU 24 in the header, takes one column of each AU"
    return f"missing AU: AUCoding/AU_OCC/F001_T1.csv: {what}"


def two_columns(tree):
    tree.edit(FIRST, 1, ",13,", ",14,")
    what = "got 2 of AU 14 in the header, takes one column of each AU"
    return f"missing AU: AUCoding/AU_OCC/F001_T1.csv: {what}"


def no_labels(tree):
    tree.labels(*FIRST).unlink()
    return "missing sequence: AUCoding/AU_OCC/F001_T1.csv: not there"


def no_folder(tree):
    folder = tree.picture(*FIRST, 100).parent
    folder.rename(folder.with_name("T0"))
    return "missing pictures: Sequences(2D+3D)/F001/T1: no such folder"


@pytest.mark.parametrize(
    "plant", [empty_file, only_a_header, no_text, no_column, two_columns, no_labels, no_folder]
)
def test_a_fault_costs_its_sequence(tree, plant):
    fault = plant(tree)
    frames = load(tree)
    (told,) = tree.faults()
    assert told.startswith(fault)
    assert_is(frames, tree, without(tree, *((*FIRST, frame) for frame in FRAMES)))


def test_a_missing_subject_is_one_fault(tree, capsys):
    assert load(tree).subjects == ("F001", "F003", "F004")
    lines = tree.cached("faults.txt").read_text().splitlines()
    assert len(lines) == ABSENT
    assert "missing subject: AUCoding/AU_OCC/M018_T1.csv: M018 has no labels" in lines
    assert "missing sequence: AUCoding/AU_OCC/F004_T8.csv: not there" in lines
    told = capsys.readouterr().out
    assert f"faults, all of them in {tree.cached('faults.txt')}\n" in told
    assert "missing subject: 38\n    AUCoding/AU_OCC/F002_T1.csv: F002 has no labels\n" in told
    assert "M018" not in told


def test_strict_stops_at_faults(tree):
    bad_label(tree)
    with pytest.raises(ValueError, match=f"got {ABSENT + 1} faults: .*F001_T1.csv:3: got AU1 '3'"):
        load(tree, strict=True)
    assert len(tree.cached("faults.txt").read_text().splitlines()) == ABSENT + 1


def test_strict_stops_at_an_unreadable_picture(tmp_path):
    tree = BP4D(tmp_path, SUBJECTS, TASKS, frames=(7,))
    truncate(tree.picture("F004", "T8", 7))
    with pytest.raises(ValueError, match=r"got 1 faults: .*F004/T8/0007.jpg: image file is trunc"):
        load(tree, strict=True)


def test_no_frame_left(tree):
    for sequence in tree.sequences:
        tree.labels(*sequence).write_text("")
    with pytest.raises(ValueError, match=f"no frame can be used, {ABSENT + 6} faults: "):
        load(tree)


def test_no_picture_left(tree):
    for key in tree.expected():
        tree.picture(*key).write_bytes(b"")
    with pytest.raises(ValueError, match=f"no frame can be used, {ABSENT + 18} faults: "):
        load(tree)


def test_without_a_directory():
    with pytest.raises(FileNotFoundError, match=r"--data-dir: .*AU_OCC/F001_T1.csv.* licence"):
        bp4d.load(None, SIZE, False, None)


def test_without_labels(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no labels of bp4d in {tmp_path}, takes"):
        bp4d.load(tmp_path, SIZE, False, None)
    assert list(tmp_path.iterdir()) == []


def test_without_pictures(tree):
    tree.recordings.rename(tree.root / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"no pictures of bp4d in {tree.root}, takes"):
        load(tree)


def test_warns_of_other_frequencies(tree):
    with pytest.warns(UserWarning, match=r"frequency weights of parts 1 and 2 .* AU 1, 2, "):
        load(tree)


@pytest.mark.filterwarnings("error")
def test_does_not_warn_of_the_release(tree, monkeypatch):
    given = [[tree.label(*key, au) for au in bp4d.AUS] for key in tree.expected()[:12]]
    *weights, last = frequency_weights(torch.tensor(given, dtype=torch.int8)).tolist()
    monkeypatch.setattr(bp4d, "WEIGHTS", [*weights, 0.981 * last])
    load(tree)
    monkeypatch.setattr(bp4d, "WEIGHTS", [*weights, 0.979 * last])
    with pytest.warns(UserWarning, match="of the release for AU 24$"):
        load(tree)
