"""Runs as processes on this machine."""

import time
from collections import deque
from collections.abc import Iterator

from experiments.sweeping.engines.task import Task, stop

_INTERVAL = 0.5  # seconds


def run_here(tasks: list[Task], *, jobs: int) -> Iterator[list[tuple[Task, int | OSError]]]:
    """Runs the tasks in their order, `jobs` at a time."""
    waiting, running = deque(tasks), {}
    try:
        while waiting or running:
            ended = []
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                try:
                    running[task] = task.start()
                except OSError as error:
                    ended.append((task, error))
            time.sleep(_INTERVAL)
            over = [task for task, child in running.items() if child.poll() is not None]
            yield ended + [(task, running.pop(task).returncode) for task in over]
    finally:
        stop(list(running.values()))
