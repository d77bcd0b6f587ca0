"""How far the runs of a sweep are."""

from tqdm import tqdm

from experiments.storage.files import read_bytes
from experiments.sweeping.engines import Task
from experiments.terminal import bars_off

_LARGEST = 2**26  # bytes of metrics


def is_finished(task: Task) -> bool:
    """Whether the run's folder has its result. What is wrong with one, the run itself tells."""
    try:
        return task.identity is not None and task.identity.result(task.folder) is not None
    except (ValueError, OSError):
        return False


def epochs_done(task: Task) -> int:
    """Those of which the run's folder has the metrics."""
    try:
        return read_bytes(task.folder / "metrics.jsonl", _LARGEST).count(b"\n")
    except (ValueError, OSError):
        return 0


def state(task: Task) -> str:
    """How far the run is, or what is wrong with its folder."""
    try:
        if task.identity is not None and task.identity.result(task.folder):
            return "finished"
    except (ValueError, OSError) as error:
        return f"error: {error}"
    done = epochs_done(task)
    return f"{done} of {task.epochs} epochs" if done else "not begun"


class Progress:
    """A bar over the epochs of all runs. Those that were done before do not count as fast ones, and
    those that a run leaves out, as it stops early or fails, do not count at all."""

    def __init__(self, tasks: list[Task]) -> None:
        self.done = {task: epochs_done(task) for task in tasks}
        self.running = [task for task in tasks if not is_finished(task)]
        self.planned = self.done | {task: task.epochs for task in self.running}
        self.bar = tqdm(
            total=sum(self.planned.values()),
            initial=sum(self.done.values()),
            unit="epoch",
            smoothing=0,  # the mean speed, as several runs go on at once
            dynamic_ncols=True,
            disable=bars_off(),
        )

    def update(self) -> None:
        for task in self.running:
            self.done[task] = epochs_done(task)
        self._show()

    def end(self, task: Task, line: str) -> None:
        self.running.remove(task)
        self.planned[task] = self.done[task] = epochs_done(task)
        self.bar.write(f"{len(self.done) - len(self.running)}/{len(self.done)} {line}")
        self._show()

    def _show(self) -> None:
        self.bar.n = sum(self.done.values())
        self.bar.total = sum(self.planned.values())
        self.bar.refresh()
