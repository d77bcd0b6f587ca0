"""Runs as processes on this machine."""

import subprocess
import time
from collections import deque

from experiments.sweeping.engines.task import Ended, Rounds, Task, stop

_INTERVAL = 0.5  # seconds


def run_here(tasks: list[Task], *, jobs: int) -> Rounds:
    """Runs the tasks in their order, `jobs` at a time."""
    waiting = deque(tasks)
    running: dict[Task, subprocess.Popen] = {}
    try:
        while waiting or running:
            ended: list[Ended] = []
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
