"""Streams of random numbers that are not the same, nor those of the noise."""

import numpy as np

SPLIT, ORDER, STEPS, ANNOTATORS, NETWORK, WIDTHS_OF_STEPS, CALIBRATION = 1, 2, 3, 4, 5, 6, 7


def mixed(*numbers: int) -> int:
    """A seed of its own for every sequence of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
