import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import noisyq_fast
from experiments import run, tasks
from experiments.data.augment import Normalize
from experiments.data.faces import Faces
from experiments.deepcache import CachedInference, matching
from experiments.deepcache.__main__ import (
    FramesConfig,
    command,
    compare_on_frames,
    read_pictures,
)
from experiments.deepcache.comparison import compare
from experiments.deepcache.regions import Rectangle, Reuse, Window, of_blocks
from experiments.models import (
    ActionUnitNetwork,
    PerAUHead,
    ResNet18Cifar,
    ResNet20,
    SharedHead,
    SmallEncoder,
)
from experiments.storage.run_folder import RunFolder

GENERATOR = torch.Generator().manual_seed(0)


def pixels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8, generator=GENERATOR)


def scaled(pictures):
    return pictures.permute(0, 3, 1, 2) / 255


# Rectangles.


def mask(rectangles, size):
    covered = torch.zeros(size, dtype=torch.bool)
    for rectangle in rectangles:
        covered[rectangle.slices] = True
    return covered


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_blocks_become_rectangles_of_reusable_pixels(share):
    blocks = torch.rand(6, 9, generator=GENERATOR) < share
    covered = mask(of_blocks(blocks, 4), (24, 36))
    every = blocks.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert not (covered & ~every).any()
    assert covered.sum() > 0.6 * every.sum()


def test_all_blocks_are_one_rectangle_and_no_blocks_none():
    assert of_blocks(torch.ones(3, 5, dtype=bool), 8) == (Rectangle(0, 0, 39, 23),)
    assert of_blocks(torch.zeros(3, 5, dtype=bool), 8) == ()


def test_a_hole_is_left_out_by_rectangles_that_overlap():
    blocks = torch.ones(5, 5, dtype=torch.bool)
    blocks[2, 2] = False
    found = of_blocks(blocks, 1)
    assert torch.equal(mask(found, (5, 5)), blocks)
    assert sorted(rectangle.area for rectangle in found) == [10, 10, 10, 10]


def test_the_rest_is_what_no_rectangle_covers_and_does_not_overlap():
    for _ in range(30):
        ends = torch.randint(12, (3, 2, 2), generator=GENERATOR).sort(1).values.flatten(1).tolist()
        rectangles = tuple(Rectangle(*end) for end in ends)
        rest = Reuse((12, 13), (0, 0), rectangles).rest()
        counts = torch.zeros(12, 13)
        for rectangle in rest:
            counts[rectangle.slices] += 1
        assert torch.equal(counts, (~mask(rectangles, (12, 13))).float())


WINDOWS = [(3, 1, 1), (3, 2, 1), (5, 1, 2), (2, 2, 0), (1, 1, 0), (1, 2, 0), (4, 3, 1)]


@pytest.mark.parametrize(("kernel", "stride", "padding"), WINDOWS)
@pytest.mark.parametrize("offset", [(0, 0), (0, -6), (6, 0), (-6, 6)])
def test_reuse_behind_a_layer_is_where_outputs_are_the_same(kernel, stride, padding, offset):
    """The picture is numbers that are all different, and the same only inside the rectangle."""
    before = torch.arange(1.0, 1 + 24 * 30).reshape(1, 1, 24, 30)
    inner = Rectangle(6, 6, 20, 15) if any(offset) else Rectangle(0, 0, 20, 15)
    now = -torch.arange(1.0, 1 + 24 * 30).reshape(1, 1, 24, 30)
    there = inner.moved(offset)
    now[(..., *inner.slices)] = before[(..., *there.slices)]
    weight = torch.rand(1, 1, kernel, kernel, dtype=torch.float64, generator=GENERATOR)
    one, two = (F.conv2d(x.double(), weight, None, stride, padding) for x in (before, now))
    window = Window((kernel, kernel), (stride, stride), (padding, padding))
    region = Reuse((24, 30), offset, (inner,)).through(window, tuple(two.shape[2:]))
    moved = tuple(part // stride for part in offset)
    assert region.offset == moved
    down, right = moved
    same = torch.zeros(two.shape[2:], dtype=torch.bool)
    for row in range(two.shape[2]):
        for column in range(two.shape[3]):
            if 0 <= row + down < one.shape[2] and 0 <= column + right < one.shape[3]:
                same[row, column] = two[0, 0, row, column] == one[0, 0, row + down, column + right]
    assert torch.equal(mask(region.rectangles, two.shape[2:]), same)


def test_motion_between_the_outputs_of_a_layer_ends_the_reuse():
    region = Reuse((20, 20), (0, 3), (Rectangle(0, 0, 9, 19),))
    assert region.through(Window((3, 3), (2, 2), (1, 1)), (10, 10)) is None
    assert region.through(Window((3, 3), (3, 3), (1, 1)), (7, 7)).offset == (0, 1)


# Motion.


def test_motion_is_the_mean_without_what_is_far_from_it():
    offsets = torch.tensor([[0, -3]] * 8 + [[4, 4]] + [[5, 5]])
    ratios = torch.tensor([40.0] * 9 + [10.0])
    assert matching.global_offset(offsets, ratios, 30.0) == (0, -3)
    assert matching.global_offset(offsets, ratios, 50.0) is None


def test_among_equal_blocks_the_nearest_counts():
    flat = torch.zeros(1, 16, 16)
    offsets, errors = matching.search(flat, flat, 8, 2)
    assert not offsets.any()
    assert not errors.any()


# Networks.

NETWORKS = {
    "small": lambda: ActionUnitNetwork(SmallEncoder(), SharedHead(128, 5)),
    "per-au": lambda: ActionUnitNetwork(SmallEncoder(), PerAUHead(128, 5, "per-au")),
    "resnet20": ResNet20,
    "resnet18": ResNet18Cifar,
    "pools": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 5, padding=4, dilation=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LazyLinear(7),
    ),
}


def network(name, quantized=False):
    torch.manual_seed(0)
    model = NETWORKS[name]()
    if quantized:
        noisyq_fast.quantize_model_(model, example=torch.zeros(1, 3, 32, 32))
    model.train()
    model(torch.rand(4, 3, 32, 32))
    return model.eval()


def plain(model, frame):
    with torch.no_grad():
        return model(scaled(frame[None]))


@pytest.fixture(params=[*((name, False) for name in NETWORKS), ("small", True), ("resnet20", True)])
def model(request):
    return network(*request.param)


def test_an_unchanged_frame_gives_the_same_bits_and_computes_nothing(model):
    cached = CachedInference(model, scaled, expires=2)
    frame = pixels(32, 32, 3)
    for number in range(5):
        assert torch.equal(cached(frame), plain(model, frame))
        assert cached.last.done == (0 if number else cached.last.total)
    assert cached.last.total == noisyq_fast.summary(model, scaled(frame[None])).macs


def test_frames_without_anything_in_common_are_computed_as_ever(model):
    cached = CachedInference(model, scaled)
    for _ in range(3):
        frame = pixels(32, 32, 3)
        assert torch.equal(cached(frame), plain(model, frame))
    assert cached.work.saved == 0


def changed_in_a_corner(frame):
    frame = frame.clone()
    frame[24:, 24:] = pixels(8, 8, 3)
    return frame


def test_what_did_not_change_is_not_computed_and_all_comes_out_right(model):
    cached = CachedInference(model, scaled, block=4)
    frame = pixels(32, 32, 3)
    cached(frame)
    for _ in range(3):
        frame = changed_in_a_corner(frame)
        torch.testing.assert_close(cached(frame), plain(model, frame), rtol=1e-4, atol=1e-4)
        assert 0.2 < 1 - cached.last.done / cached.last.total < 0.95


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 3), (1, 2, 2), ((3, 1), (1, 2), (1, 2)), (3, 1, 4)]
)
def test_outputs_that_see_padding_alone(kernel, stride, padding):
    model = nn.Sequential(nn.Conv2d(3, 4, kernel, stride, padding)).eval()
    cached = CachedInference(model, scaled, block=4, threshold=100.0)
    frame = pixels(32, 32, 3)
    cached(frame)
    moved = torch.cat([frame[4:], pixels(4, 32, 3)])
    torch.testing.assert_close(cached(moved), plain(model, moved), rtol=1e-4, atol=1e-4)
    assert cached.last.saved > 0


def test_at_an_infinite_threshold_every_bit_is_right(model):
    cached = CachedInference(model, scaled, threshold=float("inf"))
    frame = pixels(32, 32, 3)
    for _ in range(2):
        frame = changed_in_a_corner(frame)
        assert torch.equal(cached(frame), plain(model, frame))
    assert torch.equal(cached(frame), plain(model, frame))
    assert cached.last.done == 0


@pytest.mark.parametrize("motion", [(0, -4), (4, 4)])
def test_a_frame_that_moves_is_reused_where_it_was(motion):
    model = network("resnet20")
    world = pixels(80, 80, 3)
    cached = CachedInference(model, scaled, block=8, radius=5)
    for step in range(4):
        top, left = 16 + step * motion[0], 16 + step * motion[1]
        frame = world[top : top + 48, left : left + 48]
        torch.testing.assert_close(cached(frame), plain(model, frame), rtol=1e-4, atol=1e-4)
        assert step == 0 or cached.last.done < 0.9 * cached.last.total


def test_small_differences_do_not_pile_up_forever():
    """Each frame is one level brighter: nearly the one before, and in the end another picture."""
    model = network("small")
    frame = pixels(32, 32, 3) // 4
    always, now_and_then = (
        CachedInference(model, scaled, threshold=40.0, expires=e) for e in (100, 3)
    )
    computed = []
    for _ in range(9):
        drifted, fresh, right = always(frame), now_and_then(frame), plain(model, frame)
        computed.append(now_and_then.last.done > 0)
        frame = frame + 1
    assert computed == [True, False, False, False] * 2 + [True]
    assert not torch.equal(drifted, right)
    assert torch.equal(fresh, right)


def test_results_that_were_changed_in_place_are_not_reused():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 3)

        def forward(self, x):
            out = self.one(x)
            out.flatten(1).mul_(0.5)  # which changes another tensor too
            return out.mean((2, 3)) + self.two(x).relu_().mean((2, 3))

    model = Adds().eval()
    cached = CachedInference(model, scaled, block=4)
    frame = pixels(16, 16, 3)
    for _ in range(4):
        torch.testing.assert_close(cached(frame), plain(model, frame))
        frame = changed_in_a_corner(torch.cat([frame, frame])[:32].repeat(1, 2, 1))[16:, 16:]


def test_a_result_that_the_caller_changes_is_not_given_again():
    model, frame = network("small"), pixels(32, 32, 3)
    cached = CachedInference(model, scaled)
    cached(frame).zero_()
    assert torch.equal(cached(frame), plain(model, frame))


def test_a_frame_of_another_size_is_computed_as_ever():
    model = network("small")
    cached = CachedInference(model, scaled)
    cached(pixels(32, 32, 3))
    frame = pixels(40, 48, 3)
    assert torch.equal(cached(frame), plain(model, frame))


def test_what_cannot_be_reused_is_refused():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"model: got Branches, which torch\.fx cannot trace: "):
        CachedInference(Branches(), scaled)
    cached = CachedInference(network("small"), scaled)
    with pytest.raises(ValueError, match=r"frame: got torch.float32 \[32, 32\], takes uint8"):
        cached(torch.zeros(32, 32))
    halved = CachedInference(network("small"), lambda x: scaled(x)[..., ::2, ::2])
    with pytest.raises(ValueError, match=r"prepare: got an input of \[1, 3, 16, 16\] for a pict"):
        halved(pixels(32, 32, 3))
    with pytest.raises(ValueError, match="got 0, 4, 10; takes whole numbers from 1, 0 and 1"):
        CachedInference(network("small"), scaled, block=0)


# Faces, and folders of frames.


def test_drawn_faces_save_work_where_little_moves():
    faces = Faces.generate(subjects=1, frames_per_subject=32, size=64)
    prepare = Normalize.of(faces.images)
    model = network("small")
    coarse = compare(model, prepare, faces.images[:12], threshold=18.0)
    exact = compare(model, prepare, faces.images[:12], threshold=float("inf"))
    assert coarse.saved > 0.3
    assert exact.saved == 0
    assert torch.equal(exact.plain, exact.cached)
    assert torch.equal(coarse.plain, exact.plain)
    assert coarse.plain_seconds > 0
    assert coarse.cached_seconds > 0


def test_the_command_of_a_run_is_in_its_options(tmp_path):
    arguments = "--dataset synthetic-au --frames-per-subject 32 --no-augment --weight-bits 4"
    config = run.parse(arguments.split()).resolved(gpu=False, threads=1)
    RunFolder(tmp_path / "run").write_config(config.flat())
    again = run.parse(command(tmp_path / "run" / "config.json")).resolved(gpu=False, threads=1)
    assert again.identity() | {"epochs": 0} == config.identity() | {"epochs": 0}


def test_a_run_on_faces_shows_what_reuse_saves_and_loses(tmp_path, capsys):
    small = "--dataset synthetic-au --frames-per-subject 32 --image-size 32 --epochs 1 --threads 1"
    config = run.parse([*small.split(), "--weight-bits", "4", "--out", str(tmp_path)])
    prepared = run.prepare(config)
    run.execute(prepared, torch.device("cpu"))
    compare_on_frames(FramesConfig(prepared.path, thresholds=(float("inf"), 10.0), count=8))
    exact, coarse = capsys.readouterr().out.splitlines()[-2:]
    assert "inf dB: 0.0% of the work saved" in exact
    assert "100.00% of the answers the same, F1" in exact
    assert "threshold 10 dB: " in coarse
    assert " 0.0% of the work" not in coarse

    folder = tmp_path / "frames"
    folder.mkdir()
    for number in range(3):
        Image.fromarray(np.full((40, 50, 3), 90, dtype=np.uint8)).save(folder / f"{number}.png")
    compare_on_frames(FramesConfig(prepared.path, frames=folder, thresholds=(30.0,)))
    out = capsys.readouterr().out
    assert "3 frames of 32 x 32 pixels" in out
    assert "66.7% of the work saved" in out
    assert "F1" not in out


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no picture, takes \.jpg, \.jpeg, \.png"):
        read_pictures(tmp_path, 32, 5)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"--frames: .*a\.png cannot be read: "):
        read_pictures(tmp_path, 32, 5)


def test_a_run_that_is_not_on_faces_is_refused(tmp_path):
    config = run.parse([]).resolved(gpu=False, threads=1)
    assert config.task is not tasks.TASKS["action_units"]
    RunFolder(tmp_path / "run").write_config(config.flat())
    with pytest.raises(ValueError, match="got a run on digits, takes one on synthetic-au"):
        compare_on_frames(FramesConfig(tmp_path / "run"))
