"""The walk of the Triton kernels over tiles.

`tiling.Tiling` says which program works on which tiles. ``TILE`` of every kernel is its ``tile``;
``sizes`` are its ``layout`` and the tensor's first program (None if there is only one tensor).
"""

import triton
import triton.language as tl


@triton.jit
def tiles_along(size, tile):
    """Not ``tl.cdiv``, which adds before it divides: a size close to 2^31 would overflow."""
    return (size - 1) // tile + 1


@triton.jit
def channel_tile_of_program(sizes):
    channel_tile = tl.program_id(0)
    if sizes[3] is not None:
        channel_tile -= sizes[3]
    return channel_tile


@triton.jit
def channels_of_program(sizes, TILE: tl.constexpr):
    """The channels of this program, and which of them exist."""
    channel = channel_tile_of_program(sizes).to(tl.int64) * TILE[1] + tl.arange(0, TILE[1])
    return channel, channel < sizes[1]


@triton.jit
def tiles_of_program(sizes, TILE: tl.constexpr):
    """The number of tiles of the channels of this program."""
    return tiles_along(sizes[0], TILE[0]) * tiles_along(sizes[2], TILE[2])


@triton.jit
def elements_of_tile(tile, sizes, TILE: tl.constexpr):
    """Offsets of the elements of a tile, and which of them exist."""
    outer, channels, inner, _ = sizes
    # Triton compiles a size of 1 as a constant. So if outer or inner is 1 these divisions vanish
    # and accesses are wide; the second remainder is taken for that reason.
    outer_tiles, inner_tiles = tiles_along(outer, TILE[0]), tiles_along(inner, TILE[2])
    o = (tile % outer_tiles).to(tl.int64) * TILE[0] + tl.arange(0, TILE[0])
    c, c_exists = channels_of_program(sizes, TILE)
    i = (tile // outer_tiles % inner_tiles).to(tl.int64) * TILE[2] + tl.arange(0, TILE[2])
    offsets = (o[:, None, None] * channels + c[None, :, None]) * inner + i[None, None, :]
    exists = (o < outer)[:, None, None] & c_exists[None, :, None] & (i < inner)[None, None, :]
    return offsets, exists
