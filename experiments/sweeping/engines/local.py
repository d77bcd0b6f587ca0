"""Runs as processes on this machine."""

import time
from collections import deque
from collections.abc import Iterator

from experiments.sweeping.engines.task import Task, stop

_INTERVAL = 0.5  # seconds


def run_here(tasks: list[Task], *, jobs: int) -> Iterator[list[tuple[Task, int]]]:
    """Runs the tasks in their order, `jobs` at a time."""
    waiting, running = deque(tasks), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.popleft()
                running[task] = task.start()
            time.sleep(_INTERVAL)
            ended = [task for task, child in running.items() if child.poll() is not None]
            yield [(task, running.pop(task).returncode) for task in ended]
    finally:
        stop(list(running.values()))
