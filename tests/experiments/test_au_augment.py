import math

import pytest
import torch

from experiments.data.au.augment import draw, transformed

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def seen(angle=0.0, zoom=1.0, side=1.0):
    return transformed(IMAGES, torch.tensor([[angle, zoom, side]]).expand(2, 3))


def test_plain_view_changes_nothing():
    torch.testing.assert_close(seen(), IMAGES)


def test_mirror_swaps_left_and_right():
    torch.testing.assert_close(seen(side=-1.0), IMAGES.flip(3))


def test_quarter_turn_moves_every_pixel():
    torch.testing.assert_close(seen(math.pi / 2), IMAGES.rot90(1, (2, 3)))
    torch.testing.assert_close(seen(-math.pi / 2), IMAGES.rot90(-1, (2, 3)))


def test_turned_mirror_is_mirrored_after_the_turn():
    torch.testing.assert_close(seen(math.pi / 2, side=-1.0), IMAGES.rot90(1, (2, 3)).flip(3))


def test_zoom_enlarges_the_middle():
    ramp = torch.arange(8.0).expand(1, 1, 8, 8) - 3.5
    large = transformed(ramp, torch.tensor([[0.0, 2.0, 1.0]]))
    torch.testing.assert_close(large, ramp / 2)


def test_views_stay_in_their_limits_and_use_them():
    views = draw(2000, torch.Generator().manual_seed(0))
    angle, zoom, side = views.unbind(1)
    assert angle.abs().max() <= math.radians(10)
    assert angle.abs().max() > math.radians(9.9)
    assert (zoom.min().item(), zoom.max().item()) == pytest.approx((0.9, 1.1), abs=1e-3)
    assert set(side.tolist()) == {-1.0, 1.0}
    assert side.mean().abs() < 0.1
