"""What a run says before it begins."""

import dataclasses
import textwrap
from pathlib import Path
from typing import get_args

import noisyq_fast
from experiments.methods import Method
from experiments.tasks import Part
from experiments.terminal import amount
from experiments.training import data_parallel
from experiments.training.loop import Trainer


def header(trainer: Trainer, path: Path) -> str:
    """On what the trainer trains, what it trains, how, and where ``path`` of the run is."""
    config, task, model = trainer.config, trainer.task, trainer.model
    trained, held_out, tested = map(task.count, get_args(Part))
    wrong = task.wrong_labels()
    labels = f"{wrong:.1%} of their labels are wrong" if wrong is not None else "as they were coded"
    parts = [f"{trained:,} {task.SAMPLES} to train on ({labels})"]
    parts += [f"{held_out:,} to validate"] if held_out else []
    parameters = sum(parameter.numel() for parameter in model.parameters())
    steps = len(trainer.parts.sizes)
    processes = data_parallel.size()
    shared = f" in each of {processes} processes" if processes > 1 else ""
    lines = {
        "data": f"{config.dataset}: {', '.join(parts)}, {tested:,} to test",
        "method": ", ".join(map(_described, config.methods.items())) or "baseline: nothing",
        "network": f"{type(model).__name__}, {parameters:,} parameters",
        "training": f"{amount(config.epochs, 'epoch')} of {amount(steps, 'step')} of "
        f"{config.batch_size}, learning rate {config.lr:g} ({config.schedule}), seed {config.seed}",
        "machine": f"{trainer.device}, {amount(config.threads, 'thread')}{shared}, backend "
        f"{noisyq_fast.current_backend(trainer.device.type)}",
        "folder": str(path),
        "shown": task.LEGEND,
    }
    return "\n".join(
        textwrap.fill(
            f"{name + ':':<10}{line}",
            100,
            subsequent_indent=" " * 10,
            break_long_words=False,  # as of a path, which is to be copied
            break_on_hyphens=False,
        )
        for name, line in lines.items()
    )


def _described(item: tuple[str, Method]) -> str:
    """A method and its options."""
    name, method = item
    options = dataclasses.asdict(method)
    given = [f"{key} {value}" for key, value in options.items() if value is not None]
    return f"{name} ({', '.join(given)})" if given else name
