"""One run: parse, build, train, write."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import time
from functools import partial

import torch
import tyro

import noisyq_fast
from experiments import data, methods
from experiments.allocator import keep_freed_memory
from experiments.config import RunConfig
from experiments.data.noise import NOISE_KINDS, NoisyLabels
from experiments.output import RunFolder, run_name
from experiments.training import NonFiniteLoss, Trainer
from noisyq_fast.backends import AUTO


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run needs, checked."""

    config: RunConfig
    dataset: data.Dataset
    labels: NoisyLabels
    folder: RunFolder


def prepare(config: RunConfig) -> Run:
    """Chooses the backend, reads the data, draws the noise and opens the folder."""
    if config.backend != AUTO:
        noisyq_fast.use_backend(config.backend)
    dataset = data.load(config.dataset, config.data_dir, config.download)
    dataset = dataset.with_train_size(config.train_size)
    config = config.resolved(
        dataset.default_epochs, dataset.default_threads or torch.get_num_threads()
    )
    labels = NOISE_KINDS[config.noise_kind](
        dataset.train_labels, config.noise, len(dataset.class_names), config.noise_seed
    )
    name = run_name(config, methods.build(config).label, dataset.checksum)
    return Run(config, dataset, labels, RunFolder(config.out / name))


def execute(run: Run) -> None:
    """Trains and writes."""
    config, folder = run.config, run.folder
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    folder.write_config(dataclasses.asdict(config))
    folder.write_labels(run.labels)

    started = time.perf_counter()
    trainer = Trainer(config, run.dataset, run.labels)
    history = []
    for metrics in trainer.epochs():
        history.append(metrics)
        folder.write_metrics(map(dataclasses.asdict, history))
    clean, flipped = trainer.train_accuracies()
    seconds = time.perf_counter() - started

    last = history[-1]
    folder.write_model(trainer.model)
    folder.write_result(
        {
            "method": config.method,
            "dataset": config.dataset,
            "noise": config.noise,
            "noise_kind": config.noise_kind,
            "seed": config.seed,
            "epochs": config.epochs,
            "test_accuracy": last.test_accuracy,
            # Selected on the test set: for reference only.
            "best_test_accuracy": max(metrics.test_accuracy for metrics in history),
            "train_accuracy_clean": clean,
            "train_accuracy_flipped": flipped,
            "seconds": seconds,
            "backend": noisyq_fast.current_backend("cpu"),
            "threads": config.threads,
            "data_sha256": run.dataset.checksum,
            "versions": noisyq_fast.info().versions,
        }
    )
    print(f"test accuracy {last.test_accuracy:.2%} in {seconds:.1f} s, written to {folder.path}")


def main() -> int:
    """Returns the exit status; what a user can mend is told in one line."""
    try:
        # A partial, because tyro would put a class's own errors into a box.
        run = prepare(tyro.cli(partial(RunConfig), config=(tyro.conf.DisallowNone,)))
    except (ValueError, OSError, RuntimeError) as error:
        return fail(error, status=2)
    try:
        execute(run)
    except (NonFiniteLoss, OSError) as error:
        return fail(error, status=1)
    return 0


def fail(error: Exception, status: int) -> int:
    """Tells the error and gives the exit status back."""
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each epoch at once
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
