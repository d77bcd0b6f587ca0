"""Every tiling covers its tensor, gives each program work, and can be launched."""

import math
from itertools import product

import pytest

from noisyq_fast.backends.on_triton.tiling import TileLimits, absmax_tiling, map_tiling

SIZES = (1, 2, 3, 15, 16, 17, 1023, 1024, 1025, 4096, 16_384, 16_385, 2**31 - 1, 2**31, 2**33 + 1)
LAYOUTS = [layout for layout in product(SIZES, repeat=3) if math.prod(layout) <= 2**40]
LIMITS = [TileLimits(1), TileLimits(132), TileLimits(4, on_chip=64, streamed=16)]


def is_power_of_2(n):
    return n > 0 and n & (n - 1) == 0


def tiles_along(size, tile):
    return -(-size // tile)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("itemsize", [1, 2, 4])
@pytest.mark.parametrize("tiling_of", [map_tiling, absmax_tiling])
def test_every_layout(tiling_of, itemsize, limits):
    for layout in LAYOUTS:
        tiling = tiling_of(layout, itemsize, limits)
        outer, channels, inner = tiling.layout
        assert math.prod(tiling.layout) == math.prod(layout)
        assert channels == layout[1]

        assert all(map(is_power_of_2, tiling.tile)), tiling
        limit = limits.streamed if tiling.tiles > 1 else limits.on_chip
        assert math.prod(tiling.tile) <= limit, tiling
        assert 1 <= tiling.warps <= 32

        outer_tile, channel_tile, inner_tile = tiling.tile
        assert tiling.channel_tiles == tiles_along(channels, channel_tile)
        assert tiling.tiles == tiles_along(outer, outer_tile) * tiles_along(inner, inner_tile)

        # Every program has a tile. One more for each channel tile would be too many, or idle.
        assert 1 <= tiling.splits <= tiling.tiles
        wanted = 4 * limits.processors
        assert tiling.splits == tiling.tiles or tiling.channel_tiles * (tiling.splits + 1) > wanted
        assert tiling.splits == 1 or tiling.channel_tiles * tiling.splits <= wanted
        # Where programs share channels, each reads the others' results of few channels.
        assert tiling.splits == 1 or channel_tile * itemsize <= 64


@pytest.mark.parametrize("limits", [TileLimits(1), TileLimits(132), TileLimits(1024)], ids=str)
def test_grids_can_be_launched(limits):
    for layout in LAYOUTS:
        x, y = absmax_tiling(layout, 2, limits).grid
        assert x < 2**31
        assert y < 2**16


def test_channels_that_fit_take_one_tile_and_others_do_not():
    limits = TileLimits(132)
    assert absmax_tiling((1, 64, 16_384), 4, limits).tiles == 1
    assert absmax_tiling((1, 64, 16_385), 4, limits).tiles > 1
    assert absmax_tiling((16_384, 1, 1), 4, limits).tiles == 1
    assert absmax_tiling((128, 64, 128), 4, limits).tiles == 1
    assert absmax_tiling((128, 64, 129), 4, limits).tiles > 1


def test_large_channels_that_fill_the_machine_are_not_shared():
    assert absmax_tiling((1, 528, 65_536), 4, TileLimits(132)).splits == 1
    assert absmax_tiling((1, 8, 65_536), 4, TileLimits(132)).splits > 1


def test_tiny_channels_share_a_program():
    """65,536 channels of one element do not take 65,536 programs."""
    tiling = absmax_tiling((1, 65_536, 1), 4, TileLimits(132))
    assert tiling.grid == (512, 1)
    assert tiling.tile == (1, 128, 1)


@pytest.mark.parametrize(("itemsize", "channels"), [(4, 16), (2, 32), (1, 64)])
def test_channels_last_is_read_in_pieces_of_64_bytes(itemsize, channels):
    tiling = map_tiling((2**20, 256, 1), itemsize, TileLimits(132))
    assert tiling.tile[1] == channels
