"""The learning rate over a run."""

# The recipe of Keras's CIFAR-10 ResNet: after this many percent of the epochs, this factor.
_STEPS = ((90, 0.0005), (80, 0.001), (60, 0.01), (40, 0.1))


def learning_rate(initial: float, epoch: int, epochs: int) -> float:
    """The rate of `epoch`, counted from 0, out of `epochs`."""
    for percent, factor in _STEPS:
        if 100 * epoch >= percent * epochs:
            return initial * factor
    return initial
