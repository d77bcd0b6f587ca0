"""Shows what reuse saves and loses: `python -m experiments.deepcache RUN`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from experiments import run, tasks, terminal
from experiments.checks import flag, require, require_once, require_whole
from experiments.command_line import filled, paragraphs_of, parse_into
from experiments.data.au.alignment import cut
from experiments.deepcache.comparison import compare
from experiments.storage.files import read_bytes
from experiments.storage.weights import Weights
from experiments.tasks.action_units import ActionUnits
from experiments.tasks.f1 import f1
from experiments.training.loop import Trainer

_NOT_TAKEN = {"out", "name", "restart", "weights", "tensorboard", "device", "epochs"}
_SUFFIXES = (".jpg", ".jpeg", ".png")
_LARGEST = 1 << 20  # bytes of a config.json
_MOST = 1_000_000


@dataclass(frozen=True)
class FramesConfig:
    """Compares a trained network on a sequence of frames with itself when it reuses what did not
    change since the frame before: a line for each threshold. Times are those of one CPU thread.

    Exit status: 0 if it was compared; 2 if an option is wrong or the run or the frames cannot be
    read; 130 after Ctrl-C; 143 after SIGTERM, as of kill.
    """

    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FOLDER")]
    """The folder of a finished run on faces."""

    frames: Path | None = None
    """A folder of pictures, which follow each other in the order of their names. They have no
    labels: only the share of answers that stay the same is told. If not given: the test pictures
    of the run."""

    thresholds: tuple[float, ...] = (20.0, 25.0, 30.0, 35.0)
    """Signal-to-noise ratios in dB, or inf. A block is reused where it and one of the frame before
    are more alike than this."""

    block: int = 8
    """The side of a block in pixels."""

    radius: int = 4
    """How far motions are searched, in pixels."""

    expires: int = 10
    """After so many frames that reuse something, one is computed as a whole."""

    count: int = 1024
    """How many frames at most."""

    def __post_init__(self) -> None:
        shown = " ".join(map(str, self.thresholds)) or "none"
        accepted = bool(self.thresholds) and not any(map(math.isnan, self.thresholds))
        require("thresholds", shown, accepted, "numbers or inf, one or more")
        for name, least in (("block", 1), ("radius", 0), ("expires", 1), ("count", 1)):
            require_whole(name, getattr(self, name), least, _MOST)


def compare_on_frames(config: FramesConfig) -> None:
    """Prints a line for each threshold."""
    torch.set_num_threads(1)
    trainer = _trained(config.folder)
    task = trainer.task
    assert isinstance(task, ActionUnits)
    if config.frames is None:
        chosen = task.parts["test"][: config.count]
        pictures, labels = task.frames.images[task.frames.row[chosen]], task.frames.given[chosen]
    else:
        pictures, labels = (
            read_pictures(config.frames, task.frames.images.shape[1], config.count),
            None,
        )
    print(f"{len(pictures)} frames of {' x '.join(map(str, pictures.shape[1:3]))} pixels")
    options = {name: getattr(config, name) for name in ("block", "radius", "expires")}
    for threshold in config.thresholds:
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
    return f", F1 against the annotators {before:.2%} without and {after:.2%} with"


def _trained(folder: Path) -> Trainer:
    """The network of a finished run, with its task, on the CPU."""
    try:
        arguments = command(folder / "config.json")
    except (OSError, ValueError) as error:
        takes = "the folder of a finished run on faces"
        raise ValueError(f"FOLDER: got {folder}, takes {takes}: {terminal.told(error)}") from error
    config = run.parse(arguments).resolved(gpu=False, threads=1)
    if config.task is not ActionUnits:
        takes = ", ".join(ActionUnits.OPTIONS.DATASETS)
        raise ValueError(f"FOLDER: {folder}: got a run on {config.dataset}, takes one on {takes}")
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
    try:
        files = list(folder.iterdir())
    except OSError as error:
        raise ValueError(f"--frames: {terminal.told(error)}") from error
    paths = sorted(path for path in files if path.suffix.lower() in _SUFFIXES)[:count]
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


def main() -> int:
    """Gives the exit status; what a user can mend is told in one line."""
    try:
        require_once(sys.argv[1:])
        description = filled(paragraphs_of(FramesConfig))
        takes = "the folder of a finished run on faces, in front of --thresholds"
        prog = "python -m experiments.deepcache"
        compare_on_frames(parse_into(FramesConfig, sys.argv[1:], description, takes, prog))
    except (ValueError, OSError) as error:
        return terminal.fail(error, terminal.REFUSED)
    return 0


if __name__ == "__main__":
    sys.exit(terminal.run(main, "interrupted"))
