"""Metrics for TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from experiments.training.loop import EpochMetrics


@contextmanager
def open_log(
    folder: Path, epochs_done: int, wanted: bool
) -> Iterator[Callable[[EpochMetrics], None]]:
    """A function that logs an epoch in `folder`, or does nothing unless `wanted`. Of a run that
    goes on, later epochs in an older log are dropped."""
    if not wanted:
        yield lambda metrics: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            "--tensorboard: TensorBoard is missing; pip install 'noisyq_fast[tensorboard]'"
        ) from error
    writer = SummaryWriter(folder / "tensorboard", purge_step=epochs_done + 1)

    def log(metrics: EpochMetrics) -> None:
        for name, value in metrics.flat().items():
            if name != "epoch" and value is not None:
                writer.add_scalar(name, value, metrics.epoch)
        writer.flush()

    try:
        yield log
    finally:
        writer.close()
