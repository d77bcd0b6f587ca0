"""One run: parse, build, train, write."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import collections
import dataclasses
import functools
from typing import Any

import torch
import tyro

import noisyq_fast
from experiments import data, distributed
from experiments.allocator import keep_freed_memory
from experiments.checkpoints import Checkpoints
from experiments.config import RunConfig
from experiments.data import cifar10n
from experiments.data.noise import NOISE_KINDS, NoisyLabels
from experiments.output import RunFolder, run_name
from experiments.tensorboard import open_log
from experiments.training import EpochMetrics, NonFiniteLoss, Trainer
from experiments.weights import Weights
from noisyq_fast.backends import AUTO


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run needs, checked."""

    config: RunConfig
    dataset: data.Dataset
    labels: NoisyLabels
    weights: Weights | None
    path: Path


def prepare(config: RunConfig) -> Run:
    """Chooses the backend, reads the data, makes the noise and names the run."""
    if config.backend != AUTO:
        noisyq_fast.use_backend(config.backend)
    dataset = _dataset(config.dataset, config.data_dir, config.download, config.train_size)
    config = config.resolved(
        dataset.default_epochs, dataset.default_threads or torch.get_num_threads()
    )
    weights = Weights.read(config.weights) if config.weights else None
    checksums = {"data": dataset.checksum} | ({"weights": weights.checksum} if weights else {})
    path = config.out / run_name(config, checksums)
    return Run(config, dataset, noisy_labels(config, dataset), weights, path)


@functools.lru_cache(maxsize=4)
def _dataset(
    name: str, data_dir: Path | None, download: bool, train_size: int | None
) -> data.Dataset:
    """Read once by a process that prepares many runs."""
    return data.load(name, data_dir, download).with_train_size(train_size)


def noisy_labels(config: RunConfig, dataset: data.Dataset) -> NoisyLabels:
    """The training labels of the run."""
    if config.noise_kind in NOISE_KINDS:
        return NOISE_KINDS[config.noise_kind](dataset, config.noise, config.noise_seed)
    path = cifar10n.find(config.data_dir, config.download)
    return cifar10n.human(config.noise_kind, path, dataset)


def execute(run: Run, device: torch.device) -> str:
    """Trains on from where an earlier process stopped, writes, and gives the user's last line.

    Of several processes, the first one reads and writes.
    """
    config = run.config
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    folder = RunFolder(run.path) if distributed.is_main() else None
    earlier = _earlier(folder, config.restart) if folder else None
    result, state = distributed.from_main(earlier)
    if result:
        return f"finished already, {_summary(result, run.path)}; --restart runs it again"

    trainer = Trainer(config, run.dataset, run.labels, device)
    if state:
        trainer.load_state_dict(state)
        _tell(f"goes on after epoch {len(trainer.history)}")
    elif run.weights:
        run.weights.load_into(trainer)
    if folder:
        folder.write_config(config.flat())
        folder.write_labels(run.labels)
    _train(trainer, folder, config.tensorboard)

    notes = trainer.finish()
    for line in notes:
        _tell(line)
    result = _result(run, trainer) | {"notes": notes}
    if folder:
        folder.write_model(trainer.model, Weights.metadata(trainer))
        folder.write_result(result)
        Checkpoints(folder.path).remove()
    return _summary(result, run.path)


def _earlier(
    folder: RunFolder, restart: bool
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The result or the checkpoint of an earlier process."""
    if restart:
        folder.clear()
    return folder.result(), Checkpoints(folder.path).load()


def _train(trainer: Trainer, folder: RunFolder | None, tensorboard: bool) -> None:
    if folder is None:
        collections.deque(trainer.epochs(), maxlen=0)
        return
    checkpoints = Checkpoints(folder.path)
    with open_log(folder.path, len(trainer.history), tensorboard) as log:
        for metrics in trainer.epochs():
            checkpoints.save(trainer.state_dict())
            folder.write_metrics(map(dataclasses.asdict, trainer.history))
            log(metrics)


def _result(run: Run, trainer: Trainer) -> dict[str, Any]:
    config, history = run.config, trainer.history
    return {
        "method": "+".join(config.methods) or config.method,
        "label": config.label,
        "dataset": config.dataset,
        "noise": config.noise,
        "noise_kind": config.noise_kind,
        "wrong_labels": run.labels.flipped.double().mean().item(),
        "seed": config.seed,
        "epochs": config.epochs,
        **trainer.result(),
        "test_accuracy_at_best_validation": _at_best_validation(history),
        "seconds": sum(metrics.seconds for metrics in history),
        "device": _device_name(trainer.device),
        "backend": noisyq_fast.current_backend(trainer.device.type),
        "threads": config.threads,
        "processes": distributed.size(),
        "data_sha256": run.dataset.checksum,
        "versions": noisyq_fast.info().versions,
    }


def _at_best_validation(history: list[EpochMetrics]) -> float | None:
    """Of the epochs with both evaluations, the test accuracy of the best on held-out samples."""
    known = [m for m in history if None not in (m.test_accuracy, m.validation_accuracy)]
    best = max(known, key=lambda metrics: metrics.validation_accuracy, default=None)
    return best and best.test_accuracy


def _device_type(wanted: str) -> str:
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ValueError("--device: got cuda, but PyTorch finds no GPU")
    return "cuda" if available and wanted != "cpu" else "cpu"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _summary(result: dict[str, Any], path: Path) -> str:
    return (
        f"test accuracy {result['test_accuracy']:.2%} in {result['seconds']:.1f} s, "
        f"written to {path}"
    )


def parse(arguments: list[str] | None = None) -> RunConfig:
    """The options in `arguments`, or else in the command line."""
    # A partial, because tyro would put a class's own errors into a box.
    parser = functools.partial(RunConfig)
    return tyro.cli(parser, args=arguments, config=(tyro.conf.DisallowNone,))


def main() -> int:
    """Returns the exit status; what a user can mend is told in one line."""
    try:
        run = prepare(parse())
    except (ValueError, OSError, RuntimeError) as error:
        return fail(error, status=2)
    try:
        with distributed.process_group(_device_type(run.config.device)) as device:
            _tell(execute(run, device))
    except (NonFiniteLoss, OSError, ValueError) as error:
        return fail(error, status=1)
    return 0


def _tell(line: str) -> None:
    if distributed.is_main():
        print(line)


def fail(error: Exception, status: int) -> int:
    """Tells the error and gives the exit status back."""
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each epoch at once
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)
