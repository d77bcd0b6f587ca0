import itertools

import pytest
import torch
from PIL import Image

from experiments.data.faces import (
    AUS,
    DRAWN_AUS,
    Faces,
    Identity,
    Parameters,
    Pose,
    Scene,
    contact_sheet,
    render,
)
from experiments.data.faces.__main__ import main
from experiments.data.faces.action_units import RATES
from experiments.data.faces.annotators import annotate
from experiments.data.faces.canvas import SPAN
from experiments.data.faces.expressions import THRESHOLD, intensities

SIZE = 64
SMALL = {"subjects": 6, "frames_per_subject": 32, "sequence_frames": 16, "size": 32}
REGIONS = {
    1: (-0.9, 0.0),
    2: (-0.9, 0.0),
    4: (-0.9, 0.1),
    6: (-0.36, 0.35),
    7: (-0.36, 0.1),
    10: (0.05, 0.85),
    12: (0.1, 0.85),
    14: (0.4, 0.75),
    15: (0.4, 0.95),
    17: (0.4, 1.1),
    23: (0.3, 0.85),
    24: (0.3, 0.85),
    25: (0.3, 0.95),
}
"""Between which heights, in face units, each action unit may change the middle face."""

MEAN, STD, POSITIVE, WRONG = (116.6, 102.8, 90.0), (47.0, 42.5, 41.5), 821, 249
"""Of `faces`: levels per channel, and labels."""

every_au = pytest.mark.parametrize("au", DRAWN_AUS)


@pytest.fixture(scope="module")
def faces():
    return Faces.generate(**SMALL, seed=3)


@pytest.fixture(scope="module")
def many():
    """Intensities of 80,000 frames, `[subjects, sequences, frames, 13]`, without pictures."""
    return intensities(500, 10, 16, torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def coded(many):
    """Intensities `[N, 12]`, truth and given labels of the same frames."""
    return many[..., :12].flatten(0, 2), *labels(many, 1.0)


def labels(many, disagreement):
    subject = torch.arange(many.shape[0]).repeat_interleave(many.shape[1] * many.shape[2])
    sequence = torch.arange(many.shape[0] * many.shape[1]).repeat_interleave(many.shape[2])
    intensity = many[..., :12].flatten(0, 2)
    generator = torch.Generator().manual_seed(1)
    truth = (intensity > THRESHOLD).to(torch.int8)
    return truth, annotate(intensity, subject % 4, sequence, disagreement, generator)


def middle_faces(intensity):
    """Pictures of the middle face, frontal and evenly lit, with `intensity` `[N, 13]`."""
    count = len(intensity)
    traits = (kind.middle(count) for kind in (Identity, Pose, Scene))
    return render(Parameters(*traits, intensity), SIZE).float()


def growing(*aus, steps=5):
    """Intensities `[steps, 13]` from 0 to 1 of `aus`."""
    acting = torch.tensor([float(au in aus) for au in DRAWN_AUS])
    return torch.linspace(0, 1, steps)[:, None] * acting


def test_shapes_and_types(faces):
    assert faces.images.shape == (192, 32, 32, 3)
    assert faces.images.dtype == torch.uint8
    assert faces.truth.shape == faces.given.shape == faces.intensity.shape == (192, 12)
    assert faces.truth.dtype == faces.given.dtype == torch.int8
    assert torch.equal(faces.truth, (faces.intensity > THRESHOLD).to(torch.int8))
    assert faces.sequence.tolist() == [n // 16 for n in range(192)]
    assert faces.subject.tolist() == [n // 32 for n in range(192)]
    assert faces.part.tolist() == [n // 64 for n in range(192)]


def test_same_seed_same_bytes(faces):
    again = Faces.generate(**SMALL, seed=3)
    for name, value in vars(faces).items():
        assert torch.equal(value, getattr(again, name)), name


def test_seed_matters(faces):
    other = Faces.generate(**SMALL, seed=4)
    assert not torch.equal(other.images, faces.images)
    assert not torch.equal(other.truth, faces.truth)
    assert not torch.equal(other.given, faces.given)


def test_stays_as_it_was(faces):
    """Coarse enough for another processor's rounding; a change of the pictures shows here."""
    mean, std = faces.images.float().mean((0, 1, 2)), faces.images.float().std((0, 1, 2))
    assert mean.tolist() == pytest.approx(MEAN, abs=0.1)
    assert std.tolist() == pytest.approx(STD, abs=0.1)
    assert faces.truth.sum().item() == pytest.approx(POSITIVE, abs=2)
    assert (faces.truth != faces.given).sum().item() == pytest.approx(WRONG, abs=2)


def test_a_picture_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    traits = [
        kind.of(torch.randn(40, kind.count(), generator=generator))
        for kind in (Identity, Pose, Scene)
    ]
    parameters = Parameters(*traits, torch.rand(40, 13, generator=generator))
    together = render(parameters, 48).int()
    alone = torch.cat([render(parameters[n : n + 1], 48) for n in range(40)]).int()
    assert (together - alone).abs().max() <= 1
    assert together.float().std(0).mean() > 10


@every_au
def test_an_action_unit_changes_its_region_only(au):
    neutral, full = middle_faces(growing(au, steps=2))
    changed = (neutral - full).abs().amax((1, 2))
    height = (torch.arange(SIZE) - (SIZE - 1) / 2) * SPAN / SIZE
    top, bottom = REGIONS[au]
    inside = (height > top) & (height < bottom)
    assert changed[inside].max() > 15
    assert changed[~inside].max() == 0


@every_au
def test_more_intensity_changes_more(au):
    pictures = middle_faces(growing(au))
    change = (pictures - pictures[0]).abs().mean((1, 2, 3))
    assert (change.diff() > 0.02).all(), change


def test_raised_brows_are_higher_and_lowered_ones_lower():
    for aus, sign in (((1, 2), -1), ((4,), 1)):
        pictures = middle_faces(growing(*aus, steps=3)).mean(3)
        one_side = pictures[:, 15:30, 39:43]
        is_brow = one_side < 0.65 * one_side.amax((1, 2), keepdim=True)
        edge = is_brow.float().argmax(1).float().mean(1)
        assert (sign * edge.diff() > 0.5).all(), (aus, edge)


def test_corners_of_the_mouth_go_up_in_a_smile_and_down_in_a_frown():
    for au, sign in ((12, -1), (15, 1)):
        one_corner = middle_faces(growing(au, steps=3)).mean(3)[:, 40:56, 36:40]
        darkest = one_corner.argmin(1).float().mean(1)
        assert (sign * darkest.diff() > 0.5).all(), (au, darkest)


def test_base_rates(many):
    occurring = (many > THRESHOLD).float().mean((0, 1, 2))
    assert (occurring - RATES).abs().max() < 0.02
    assert RATES[DRAWN_AUS.index(10)] == pytest.approx(0.59)


@pytest.mark.parametrize(
    ("first", "second", "least"),
    [
        (1, 2, 2.5),
        (4, 7, 1.2),
        (6, 7, 1.3),
        (6, 10, 1.3),
        (6, 12, 1.45),
        (15, 17, 1.6),
        (23, 24, 2),
    ],
)
def test_what_occurs_together(many, first, second, least):
    assert lift(many, first, second) > least


def test_what_excludes_each_other(many):
    assert lift(many, 12, 24) < 0.85
    assert lift(many, 1, 12) == pytest.approx(1, abs=0.06)


def lift(many, first, second):
    """`P(both) / (P(first) P(second))`."""
    occurring = (many > THRESHOLD).float().flatten(0, 2)
    one, other = occurring[:, DRAWN_AUS.index(first)], occurring[:, DRAWN_AUS.index(second)]
    return ((one * other).mean() / (one.mean() * other.mean())).item()


def test_intensities_move_smoothly_within_a_sequence(many):
    steps = many.diff(dim=2).abs().mean()
    jumps = (many[:, 1:, 0] - many[:, :-1, -1]).abs().mean()
    assert 0 < steps < 0.3 * jumps


def test_a_sequence_moves(many):
    spans = many.amax(2) - many.amin(2)
    assert (spans > 0.5).float().mean() > 0.2


def test_wrong_labels_are_near_the_threshold(coded):
    intensity, truth, given = coded
    wrong, distance = (truth != given).float(), (intensity - THRESHOLD).abs()
    assert 0.05 < wrong.mean() < 0.2
    assert wrong[distance < 0.1].mean() > 8 * wrong[distance > 0.4].mean()


def test_wrong_labels_differ_by_action_unit(coded):
    _, truth, given = coded
    wrong = (truth != given).float().mean(0)
    assert wrong[AUS.index(14)] > 2 * wrong[AUS.index(12)]
    assert wrong.min() > 0.02


def test_disagreement_sets_how_many_labels_are_wrong(many):
    shares = []
    for disagreement in (0.0, 0.5, 1.0, 2.0):
        truth, given = labels(many, disagreement)
        shares.append((truth != given).float().mean().item())
    assert shares[0] == 0
    assert all(less + 0.02 < more for less, more in itertools.pairwise(shares))


def test_each_annotator_has_habits(coded):
    """The share of positives that an annotator adds differs more than chance lets it."""
    _, truth, given = coded
    excess = (given - truth).float().view(-1, 4, 160, 12).mean((0, 2))
    assert excess.std(0).mean() > 0.01


def test_disagreement_leaves_the_pictures_alone(faces):
    clean = Faces.generate(**SMALL, seed=3, disagreement=0.0)
    assert torch.equal(clean.images, faces.images)
    assert torch.equal(clean.given, clean.truth)
    assert not torch.equal(faces.given, faces.truth)


def test_subjects_differ_and_stay_the_same(faces):
    """By how green the middle of the face is, which the light changes little."""
    skin = faces.images[:, 8:22, 12:20].float().mean((1, 2))
    hue = (skin[:, 1] / skin[:, 0]).view(6, 32)
    assert hue.std(1).max() < 0.4 * hue.mean(1).std()


def test_parts_are_those_of_bp4d():
    faces = Faces.generate(41, 1, sequence_frames=1, size=8)
    assert torch.bincount(faces.part).tolist() == [14, 14, 13]


@pytest.mark.parametrize("frames", [0, 17])
def test_frames_fill_sequences(frames):
    with pytest.raises(ValueError, match=f"frames_per_subject: got {frames}"):
        Faces.generate(2, frames, sequence_frames=16)


def test_contact_sheet():
    sheet = contact_sheet(subjects=2, size=16, enlarge=1)
    assert sheet.height > 32
    assert len(sheet.getcolors(100_000)) > 100


def test_command_draws_the_contact_sheet(tmp_path, monkeypatch):
    out = tmp_path / "docs" / "faces.png"
    monkeypatch.setattr("sys.argv", ["faces", str(out), "--subjects", "1", "--size", "16"])
    assert main() == 0
    with Image.open(out) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width % 16 == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "FILE: got none"),
        (["sheet.xyz"], 2, "FILE: got sheet.xyz, takes the name of a PNG file"),
        (["sheet.png", "--subjects", "0"], 2, "--subjects: got 0"),
        (["sheet.png", "--size", "1"], 2, "--size: got 1"),
        (["file/sheet.png", "--subjects", "1", "--size", "16"], 1, "file: "),
    ],
)
def test_command_that_cannot_draw_says_why(
    tmp_path, monkeypatch, capsys, arguments, status, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["faces", *arguments])
    assert main() == status
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1
