"""Tilings: how the work on a tensor is divided into tiles and over the programs of a GPU.

Pure functions of sizes. Quantized results do not depend on them: the only reduction is a maximum.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

Box = tuple[int, int, int]

# Programs per processor, at least, so that some load while others compute.
_PROGRAMS_PER_PROCESSOR = 4
# The same for a reduction.
_TILES_PER_PROGRAM = 8
# Bytes that a program reads contiguously, if the layout allows: two sectors of device memory. Not
# more, because all programs of a channel tile read each other's partial absmax of every channel.
_RUN_BYTES = 64


@dataclass(frozen=True)
class TileLimits:
    """Limits of a GPU.

    Attributes:
        processors: the number of multiprocessors.
        on_chip: the most elements that a program keeps in registers between absmax and map.
        streamed: elements of a tile that a program only passes through.
    """

    processors: int
    on_chip: int = 16384
    streamed: int = 4096


@dataclass(frozen=True)
class Tiling:
    """A dense tensor, cut into tiles for a grid of ``(channel_tiles, splits)`` programs.

    Program ``(p, s)`` works on the channels of channel tile ``p``. Of the tiles of these channels
    along outer and inner, it takes every ``splits``-th, starting with the ``s``-th.

    Attributes:
        layout: sizes of the tensor's memory as (outer, channels, inner).
        tile: sizes of a tile in the same order, powers of two. Tiles may reach over the end.
        channel_tiles: tiles along the channels.
        tiles: tiles of one channel tile: along outer times along inner.
        splits: the number of programs that share one channel tile.
    """

    layout: Box
    tile: Box
    channel_tiles: int
    tiles: int
    splits: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.channel_tiles, self.splits

    @property
    def warps(self) -> int:
        """Warps for one program: 16 elements for each of their 32 threads."""
        return max(prod(self.tile) // 512, 1)


@lru_cache(maxsize=4096)
def map_tiling(layout: Box, itemsize: int, limits: TileLimits) -> Tiling:
    """The tiling of a map that needs no reduction before.

    Args:
        layout: (outer, channels, inner), of at least one element.
        itemsize: bytes of an element that is read.
        limits: of the GPU.

    Example:
        >>> map_tiling((128, 64, 1024), 4, TileLimits(processors=132))
        Tiling(layout=(128, 64, 1024), tile=(4, 1, 1024), channel_tiles=64, tiles=32,
               splits=8)
    """
    return _tiling(layout, itemsize, limits, limits.streamed)


@lru_cache(maxsize=4096)
def absmax_tiling(layout: Box, itemsize: int, limits: TileLimits) -> Tiling:
    """The tiling of a map that needs each channel's absmax before.

    One tile per program if channels fit on chip; one program per channel tile if these are enough
    to fill the GPU; otherwise programs share channel tiles, and need a second launch.

    Example:
        >>> absmax_tiling((1, 512, 4608), 4, TileLimits(processors=132))
        Tiling(layout=(1, 512, 4608), tile=(1, 1, 8192), channel_tiles=512, tiles=1,
               splits=1)
    """
    on_chip = _tiling(layout, itemsize, limits, limits.on_chip)
    return on_chip if on_chip.tiles == 1 else map_tiling(layout, itemsize, limits)


@lru_cache(maxsize=4096)
def fewer_splits(tiling: Tiling, limits: TileLimits) -> Tiling:
    """The tiling of a reduction with one partial result per program: no more programs than
    processors, until each has several tiles.

    Example:
        >>> limits = TileLimits(processors=132)
        >>> tiling = map_tiling((128 * 32 * 32, 16, 1), 2, limits)
        >>> tiling.splits, fewer_splits(tiling, limits).splits
        (512, 132)
    """
    programs = max(limits.processors, tiling.channel_tiles * tiling.tiles // _TILES_PER_PROGRAM)
    return replace(tiling, splits=min(tiling.splits, max(programs // tiling.channel_tiles, 1)))


@lru_cache(maxsize=4096)
def product_tile(rows: int, columns: int, terms: int, limits: TileLimits) -> Box:
    """The tile of a matrix product, as (rows, columns, terms): the largest with enough tiles to
    fill the GPU.

    Example:
        >>> product_tile(128 * 32 * 32, 64, 576, TileLimits(processors=132))
        (128, 64, 64)
        >>> product_tile(128, 10, 64, TileLimits(processors=132))
        (16, 16, 64)
    """
    row_tile, column_tile = 128, min(max(_power_of_2(columns), 16), 128)
    while (
        row_tile > 16 and _tiles(rows, row_tile) * _tiles(columns, column_tile) < limits.processors
    ):
        row_tile //= 2
    return row_tile, column_tile, min(max(_power_of_2(terms), 32), 64)


def _tiling(layout: Box, itemsize: int, limits: TileLimits, limit: int) -> Tiling:
    outer, channels, inner = layout
    if channels == 1:
        outer, inner = 1, outer * inner
    programs = _PROGRAMS_PER_PROCESSOR * limits.processors

    inner_tile = min(_power_of_2(inner), limit)
    run = max(_RUN_BYTES // (itemsize * inner_tile), 1)
    channel_tile = min(_power_of_2(channels), run, limit // inner_tile)
    outer_tile = min(_power_of_2(outer), limit // (inner_tile * channel_tile))
    # Channels leave room in the tile, and there are more than enough for all processors.
    while (
        _tiles(channels, channel_tile) > programs
        and inner_tile * channel_tile * outer_tile < limits.streamed
    ):
        channel_tile *= 2

    channel_tiles = _tiles(channels, channel_tile)
    tiles = _tiles(outer, outer_tile) * _tiles(inner, inner_tile)
    return Tiling(
        layout=(outer, channels, inner),
        tile=(outer_tile, channel_tile, inner_tile),
        channel_tiles=channel_tiles,
        tiles=tiles,
        splits=min(tiles, max(programs // channel_tiles, 1)),
    )


def _tiles(size: int, tile: int) -> int:
    return -(-size // tile)


def _power_of_2(size: int) -> int:
    """The smallest power of two that is at least ``size``."""
    return 1 << (size - 1).bit_length()
