"""Runs as tasks of Ray (ray.io), on this machine or on several that share their files."""

import dataclasses
import os
from typing import Any

from experiments.sweeping.engines import task as task_module
from experiments.sweeping.engines.task import Rounds, Task


def run_on_ray(tasks: list[Task], *, gpus_per_run: float | None) -> Rounds:
    """Runs the tasks as Ray finds room for them; those of a machine that is lost, on another."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would call home
    try:
        import ray
    except ImportError as error:
        raise ValueError(
            "--engine: got ray, but Ray is missing; pip install 'noisyq_fast[ray]'"
        ) from error
    # The workers' import path is their own.
    ray.cloudpickle.register_pickle_by_value(task_module)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    waiting: dict[ray.ObjectRef, Task] = {}
    try:
        if gpus_per_run is None:
            has_gpu = ray.cluster_resources().get("GPU", 0) > 0
            gpus_per_run = float(has_gpu and any(task.gpu for task in tasks))
        _check_room(ray.nodes(), max(task.threads for task in tasks), gpus_per_run)
        train = ray.remote(lambda task: task.start().wait())
        for task in tasks:
            placed = train.options(
                name=task.folder.name, num_cpus=task.threads, num_gpus=gpus_per_run
            )
            # The workers do not import this project.
            waiting[placed.remote(dataclasses.replace(task, identity=None))] = task
        while waiting:
            ended, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=1)
            yield [(task := waiting.pop(end), _status(task, end)) for end in ended]
    finally:
        # Ends the worker, and with it the run.
        for reference in waiting:
            ray.cancel(reference, force=True)
        ray.shutdown()


def _check_room(nodes: list[dict[str, Any]], cpus: int, gpus: float) -> None:
    """Ray would wait for ever."""
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(r.get("CPU", 0) >= cpus and r.get("GPU", 0) >= gpus for r in resources):
        raise ValueError(
            f"--engine: a run takes {cpus} CPUs and {gpus:g} GPUs, no machine has them"
        )


def _status(task: Task, reference: Any) -> int | OSError:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, OSError):
            return error.cause
        raise error.cause from error
    except ray.exceptions.RayError as error:  # the worker is gone
        with task.open_log() as log:
            log.write(f"error: {error}\n")
        return 1
