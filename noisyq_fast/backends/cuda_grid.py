"""How many blocks the CUDA kernels are launched with.

Pure functions of sizes. Results do not depend on what they return: the only reduction is a maximum.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """What one GPU holds.

    Attributes:
        multiprocessors: how many it has.
        kept_bytes: of a tensor, that one block can keep on chip in a cooperative launch; 0 where
            there is none.
        share_bytes: what a block should have to read at least: 256 threads, and four loads of 16
            bytes for each.
    """

    multiprocessors: int
    kept_bytes: int = 0
    share_bytes: int = 256 * 16 * 4


# Blocks of 256 threads that a multiprocessor holds.
_BLOCKS_PER_MULTIPROCESSOR = 8


def splits_per_channel(channel_bytes: int, channels: int, machine: Machine) -> int:
    """How many blocks share the elements of a channel: enough to fill the device, each with work.

    Example:
        >>> splits_per_channel(8 << 20, channels=1, machine=Machine(multiprocessors=132))
        512
        >>> splits_per_channel(8 << 20, channels=64, machine=Machine(multiprocessors=132))
        17
    """
    with_work = -(-channel_bytes // machine.share_bytes)
    to_fill = -(-_BLOCKS_PER_MULTIPROCESSOR * machine.multiprocessors // channels)
    return max(1, min(with_work, to_fill))


def resident_blocks(tensor_bytes: int, machine: Machine) -> int | None:
    """How many blocks keep a tensor on chip: at most one for each multiprocessor, each with work.

    Returns:
        ``None`` where they cannot.

    Example:
        >>> machine = Machine(multiprocessors=132, kept_bytes=226 << 10)
        >>> [resident_blocks(n, machine) for n in (100, 8 << 20, 64 << 20)]
        [1, 132, None]
    """
    # A pack of 16 bytes may be left over for each block.
    if tensor_bytes > machine.multiprocessors * (machine.kept_bytes - 16):
        return None
    return max(1, min(-(-tensor_bytes // machine.share_bytes), machine.multiprocessors))
