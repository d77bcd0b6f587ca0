"""Shows what reuse saves and loses: `python -m experiments.deepcache RUN`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from experiments import run, tasks
from experiments.checks import flag
from experiments.data.au.alignment import cut
from experiments.deepcache.comparison import compare
from experiments.storage.files import read_bytes
from experiments.storage.weights import Weights
from experiments.tasks.action_units import ActionUnits
from experiments.tasks.f1 import f1
from experiments.training.loop import Trainer

_NOT_TAKEN = {"out", "restart", "weights", "tensorboard", "device", "epochs"}
_SUFFIXES = (".jpg", ".jpeg", ".png")
_LARGEST = 1 << 20  # bytes of a config.json


def main(
    folder: Annotated[Path, tyro.conf.Positional],
    frames: Path | None = None,
    thresholds: tuple[float, ...] = (20.0, 25.0, 30.0, 35.0),
    block: int = 8,
    radius: int = 4,
    expires: int = 10,
    count: int = 1024,
) -> None:
    """Compares a trained network on a sequence of frames with itself when it reuses what did not
    change since the frame before: a line for each threshold. Times are those of one CPU thread.

    Args:
        folder: Of a finished run on faces.
        frames: A folder of pictures, in the order of their names, instead of the run's test
            frames. They have no labels: the share of answers that stay the same is told.
        thresholds: In dB; blocks match above it.
        block: The side of a block in pixels.
        radius: How far motions are searched, in pixels.
        expires: Frames that reuse something before one is computed as a whole.
        count: The most frames.
    """
    torch.set_num_threads(1)
    trainer = _trained(folder)
    task = trainer.task
    assert isinstance(task, ActionUnits)
    if frames is None:
        chosen = task.parts["test"][:count]
        pictures, labels = task.frames.images[task.frames.row[chosen]], task.frames.given[chosen]
    else:
        pictures, labels = read_pictures(frames, task.frames.images.shape[1], count), None
    print(f"{len(pictures)} frames of {' x '.join(map(str, pictures.shape[1:3]))} pixels")
    for threshold in thresholds:
        options = {"block": block, "radius": radius, "expires": expires}
        found = compare(trainer.model, task.normalize, pictures, threshold=threshold, **options)
        same = ((found.plain >= 0) == (found.cached >= 0)).double().mean().item()
        print(
            f"threshold {threshold:g} dB: {found.saved:.1%} of the work saved, "
            f"{1e3 * found.plain_seconds:.2f} ms a frame without and "
            f"{1e3 * found.cached_seconds:.2f} ms with reuse, {same:.2%} of the answers the same"
            + ("" if labels is None else _f1(found.plain, found.cached, labels))
        )


def _f1(plain: Tensor, cached: Tensor, labels: Tensor) -> str:
    before, after = (f1(logits.sigmoid(), labels).mean().item() for logits in (plain, cached))
    return f", F1 {before:.2%} without and {after:.2%} with"


def _trained(folder: Path) -> Trainer:
    """The network of a finished run, with its task, on the CPU."""
    config = run.parse(command(folder / "config.json")).resolved(gpu=False, threads=1)
    if config.task is not ActionUnits:
        takes = ", ".join(ActionUnits.OPTIONS.DATASETS)
        raise ValueError(f"{folder}: got a run on {config.dataset}, takes one on {takes}")
    device = torch.device("cpu")
    trainer = Trainer(config, tasks.make(config, config.task.read(config), device), device)
    Weights.read(folder / "model.safetensors").load_into(trainer)
    return trainer


def command(file: Path) -> list[str]:
    """The command line that stands for the options in a run's config.json."""
    options = json.loads(read_bytes(file, _LARGEST))
    standing_for_nothing = {"method": "baseline", "loss": "cross_entropy"}
    arguments = []
    for name, value in options.items():
        if value is None or name in _NOT_TAKEN or standing_for_nothing.get(name) == value:
            continue
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        else:
            values = value if isinstance(value, list) else [value]
            arguments += [flag(name), *map(str, values)]
    return arguments


def read_pictures(folder: Path, size: int, count: int) -> Tensor:
    """Up to `count` pictures of a folder, the first by name, as uint8 `[N, size, size, 3]`."""
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)[:count]
    if not paths:
        raise ValueError(f"--frames: {folder} has no picture, takes {', '.join(_SUFFIXES)}")
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as image:
                pictures.append(cut(image, None, size))
        except OSError as error:
            raise ValueError(f"--frames: {path} cannot be read: {error}") from error
    return torch.from_numpy(np.stack(pictures))


if __name__ == "__main__":
    try:
        tyro.cli(main)
    except (ValueError, OSError) as error:
        sys.exit(run.fail(error, status=2))
