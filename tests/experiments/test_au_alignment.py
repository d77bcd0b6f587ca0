import math

import numpy as np
import pytest
import torch
from au_trees import BP4D, SIZE, assert_greys, draw, level, replace_in
from PIL import Image, ImageDraw

from experiments.data.au import bp4d, decoding
from experiments.data.au.alignment import Crop, crops, cut, read_crops
from experiments.data.au.faults import Faults

FIRST = ("F001", "T1")
NAMES = ["frame", *(f"{axis}_{point}" for axis in "xy" for point in range(68))]

pytestmark = pytest.mark.filterwarnings("ignore:not all of BP4D")


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setattr(decoding, "_CHUNK", 10_000)


def face(angle=0.0, centre=(0.0, 0.0), scale=1.0):
    """68 points whose eyes are at -1 and 1 of the width and 1 above the middle of a box that is 6
    wide and 4 high, turned clockwise on the picture about `centre`."""
    points = np.zeros((68, 2))
    points[0], points[16] = (-3, -2), (3, 2)
    points[36:42], points[42:48] = (-1, -1), (1, -1)
    points[36:42, 0] += np.linspace(-0.2, 0.2, 6)
    points[42:48, 0] += np.linspace(-0.2, 0.2, 6)
    cos, sin = math.cos(angle), math.sin(angle)
    return scale * points @ np.array([[cos, sin], [-sin, cos]]) + centre


def write_landmarks(path, points, blank=" "):
    """A file as OpenFace's, of `{frame: [68, 2]}`, with other columns around the points."""
    header = ["frame", "success", *NAMES[1:], "X_0"]
    lines = [f",{blank}".join(header)]
    for frame, shape in points.items():
        numbers = [frame, 1, *shape.T.reshape(-1), 0]
        lines.append(f",{blank}".join(map(str, numbers)))
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("angle", [0, 0.3, -1.2, 2.5])
def test_crop_of_a_face(angle):
    (square,) = crops(face(angle, centre=(50, 40), scale=5)[None])
    assert square == pytest.approx([angle, 50, 40, 1.45 * 30])


def test_the_box_counts_and_not_the_middle_of_the_points():
    points = face()
    points[0] = (-7, -2)
    (square,) = crops(points[None])
    assert square == pytest.approx([0, -2, 0, 1.45 * 10])


@pytest.mark.parametrize("spoiled", [np.zeros((68, 2)), np.full((68, 2), np.nan)])
def test_no_face_has_no_crop(spoiled):
    squares = crops(np.stack([face(), spoiled]))
    assert np.isfinite(squares[0]).all()
    assert np.isnan(squares[1]).all()


def picture_of_a_face(angle, centre, scale):
    """Black, with a white box in a grey background and red eyes."""
    image = Image.new("RGB", (160, 120), (90, 90, 90))
    pen = ImageDraw.Draw(image)

    def place(corners):
        cos, sin = math.cos(angle), math.sin(angle)
        turn = np.array([[cos, sin], [-sin, cos]])
        return [tuple(point) for point in scale * np.array(corners) @ turn + centre]

    pen.polygon(place([(-3, -2), (3, -2), (3, 2), (-3, 2)]), fill=(255, 255, 255))
    for side in (-1, 1):
        x, y = side, -1
        eye = [(x - 0.3, y - 0.3), (x + 0.3, y - 0.3), (x + 0.3, y + 0.3), (x - 0.3, y + 0.3)]
        pen.polygon(place(eye), fill=(255, 0, 0))
    return image


@pytest.mark.parametrize("angle", [0, 0.4, -0.7])
@pytest.mark.parametrize("size", [32, 87, 200])
def test_eyes_are_level_and_the_box_has_its_margin(angle, size):
    """The square is 8.7 wide, so that the box of 6 by 4 takes 0.69 by 0.46 of it."""
    where = {"angle": angle, "centre": (82, 63), "scale": 10}
    (square,) = crops(face(**where)[None])
    shown = cut(picture_of_a_face(**where), Crop(*square), size).astype(float)
    assert shown.shape == (size, size, 3)

    def centre_of(mask):
        return [(rows.mean() + 0.5) / size for rows in np.nonzero(mask)]

    red = (shown[..., 0] > 200) & (shown[..., 1] < 100)
    left, right = red.copy(), red.copy()
    left[:, size // 2 :] = right[:, : size // 2] = False
    across, down = 1 / 8.7, 0.5 - 1 / 8.7
    assert centre_of(left) == pytest.approx([down, 0.5 - across], abs=0.02)
    assert centre_of(right) == pytest.approx([down, 0.5 + across], abs=0.02)
    box = (shown[..., 0] > 200).nonzero()
    height, width = (np.ptp(rows) + 1 for rows in box)
    assert [height / size, width / size] == pytest.approx([4 / 8.7, 6 / 8.7], abs=0.02 + 1 / size)


def test_outside_of_the_picture_is_black():
    image = Image.new("RGB", (20, 20), (200, 200, 200))
    shown = cut(image, Crop(0, 0, 10, 20), 20)
    assert (shown[:, :9] == 0).all()
    assert (shown[:, 11:] == 200).all()


def test_a_square_picture_of_the_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    np.testing.assert_array_equal(cut(Image.fromarray(pixels), None, 24), pixels)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_other_pictures_show_their_middle(shape):
    pixels = np.random.default_rng(0).integers(256, size=(*shape, 3), dtype=np.uint8)
    top, left = ((side - 24) // 2 for side in shape)
    expected = pixels[top : top + 24, left : left + 24]
    np.testing.assert_array_equal(cut(Image.fromarray(pixels), None, 24), expected)


def test_all_pixels_of_a_large_picture_count():
    """Of stripes a pixel wide, an average is left."""
    pixels = np.zeros((96, 96, 3), dtype=np.uint8)
    pixels[:, ::6] = 240
    shown = cut(Image.fromarray(pixels), None, 16)
    assert (shown == 40).all()


def test_a_grey_picture_has_three_channels():
    shown = cut(Image.new("L", (16, 16), 77), None, 16)
    assert (shown == 77).all()
    assert shown.shape == (16, 16, 3)


@pytest.mark.parametrize("blank", ["", " "])
def test_reads_landmarks(tmp_path, blank):
    path = tmp_path / "landmarks.csv"
    write_landmarks(path, {7: face(0.1), 9: face(0.2, scale=2)}, blank)
    faults = Faults(tmp_path)
    found = read_crops(path, faults)
    assert faults.found == []
    assert found["line"].to_list() == [2, 3]
    assert found["frame"].to_list() == [7, 9]
    assert found["angle"].to_list() == pytest.approx([0.1, 0.2])
    assert found["side"].to_list() == pytest.approx([8.7, 17.4])


def landmarks(tree):
    return tree.root / "Landmarks/F001_T1.csv"


@pytest.fixture
def tree(tmp_path):
    """In its first sequence, each face is a square of its own on another background."""
    tree = BP4D(tmp_path)
    for n, frame in enumerate(tree.frames):
        path = tree.picture(*FIRST, frame)
        draw(path, 255, size=(120, 90))
        with Image.open(path) as image:
            centre = 40 + 10 * n
            shown = level(*FIRST, frame)
            box = (centre - 20, 20, centre + 20, 60)
            ImageDraw.Draw(image).rectangle(box, fill=(shown,) * 3)
            image.save(path, quality=95)
    points = {
        frame: face(centre=(40 + 10 * n, 40), scale=30 / 8.7) for n, frame in enumerate(tree.frames)
    }
    write_landmarks(landmarks(tree), points)
    return tree


def load(tree):
    return bp4d.load(tree.root, SIZE, False, None)


def test_pictures_are_cut_by_their_landmarks(tree, capsys):
    frames = load(tree)
    assert tree.faults() == []
    assert_greys(frames.images, [level(*key) for key in tree.expected()])
    assert ", 3 of them with landmarks" in capsys.readouterr().out


def without_a_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[i] for i in (0, 1, 3)))
    return "missing landmarks: Landmarks/F001_T1.csv: frame 100 has none"


def without_a_number(path):
    replace_in(path, 3, "100, 1, ", "100, 1, nothing")
    return "malformed landmarks: Landmarks/F001_T1.csv:3: frame 100 has none of a face, or several"


def twice(path):
    path.write_text(path.read_text() + path.read_text().splitlines()[2])
    return "malformed landmarks: Landmarks/F001_T1.csv:3: frame 100 has none of a face, or several"


@pytest.mark.parametrize("plant", [without_a_line, without_a_number, twice])
def test_a_frame_without_landmarks_is_left_out(tree, plant):
    fault = plant(landmarks(tree))
    frames = load(tree)
    assert tree.faults() == [fault]
    expected = [key for key in tree.expected() if key != (*FIRST, 100)]
    assert_greys(frames.images, [level(*key) for key in expected])


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("x_67", "x", "its header has no x_67"),
        ("frame", "number", "its header has no frame"),
    ],
)
def test_a_landmark_file_without_a_column_costs_its_sequence(tree, old, new, fault):
    replace_in(landmarks(tree), 1, old, new)
    frames = load(tree)
    assert tree.faults() == [f"malformed landmarks: Landmarks/F001_T1.csv: {fault}"]
    assert len(frames.images) == 15


def test_other_landmarks_are_other_pictures(tree):
    before = load(tree)
    replace_in(landmarks(tree), 1, "success", "confidence")
    same = load(tree)
    assert same.checksum == before.checksum
    points = {frame: face(centre=(40, 40), scale=1) for frame in tree.frames}
    write_landmarks(landmarks(tree), points)
    after = load(tree)
    assert after.checksum != before.checksum
    assert not torch.equal(after.images, before.images)
    landmarks(tree).unlink()
    assert len({load(tree).checksum, after.checksum, before.checksum}) == 3
