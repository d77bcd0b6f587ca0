"""One run: parse, build, train, write."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import collections
import contextlib
import dataclasses
import os
import time
import typing
import warnings
from collections.abc import Iterator
from typing import Any

import torch

import noisyq_fast
from experiments import command_line, tasks, terminal
from experiments.checks import require_once
from experiments.config import FilledConfig, RunConfig
from experiments.header import header
from experiments.methods import BASELINE
from experiments.storage.identity import RunIdentity
from experiments.storage.run_folder import Busy, RunFolder
from experiments.storage.run_names import folder_of
from experiments.storage.weights import Weights
from experiments.training import data_parallel
from experiments.training.allocator import keep_freed_memory
from experiments.training.checkpoints import Checkpoints
from experiments.training.event_log import open_log
from experiments.training.loop import EpochMetrics, NonFiniteLoss, Trainer
from noisyq_fast.backends import AUTO

BUSY = os.EX_TEMPFAIL
"""The exit status where another process is at work on the run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """All that a run needs, checked."""

    identity: RunIdentity
    path: Path
    """Its folder."""
    data: Any
    """As the task reads it."""
    weights: Weights | None

    @property
    def config(self) -> FilledConfig:
        return self.identity.config


def prepare(config: RunConfig) -> Run:
    """Chooses the backend, reads the data and names the run."""
    if config.backend != AUTO:
        try:
            noisyq_fast.use_backend(config.backend)
        except (ValueError, RuntimeError) as error:
            reason = str(error).removeprefix("use_backend: ")
            raise ValueError(f"--backend: got {config.backend}: {reason}") from error
    filled = config.resolved(torch.cuda.is_available(), threads=torch.get_num_threads())
    data = _read(filled)
    weights = Weights.read(filled.weights) if filled.weights else None
    beside = {"data": data.checksum} | ({"weights": weights.checksum} if weights else {})
    if data_parallel.started() > 1:
        beside["processes"] = data_parallel.started()  # whose sums have other last digits
    identity = RunIdentity(filled, beside)
    path = filled.out / filled.name if filled.name else folder_of(filled.out, identity.name)
    return Run(identity, path, data, weights)


def _read(config: FilledConfig) -> Any:
    """The data of the run; what is wrong with them names the option that says where they are."""
    try:
        return config.task.read(config)
    except (ValueError, OSError) as error:
        text = terminal.told(error)
        if text.startswith("--") or config.data_dir is None:
            raise
        place = "" if str(config.data_dir) in text else f"{config.data_dir}: "
        raise ValueError(f"--data-dir: {place}{text}") from error


def execute(run: Run, device: torch.device) -> str:
    """Trains on from where an earlier process stopped, writes, and gives the user's last line.

    Of several processes, the first one reads and writes.
    """
    config = run.config
    keep_freed_memory()
    torch.set_num_threads(config.threads)
    folder = _folder(run) if data_parallel.is_main() else None
    earlier = _earlier(folder, run) if folder else None
    result, state = data_parallel.from_main(earlier)
    if result:
        return f"finished already, {_summary(run, result)}; --restart runs it again"

    trainer = Trainer(config, tasks.make(config, run.data, device), device)
    if state is not None:
        try:
            trainer.load_state_dict(state)
        except ValueError as error:
            raise _checkpoints(run).refused(error) from error
        _tell(f"goes on after epoch {len(trainer.history)}")
    elif run.weights:
        run.weights.load_into(trainer)
        trainer.require_finite(f"in --weights {run.weights.path}")
    if folder:
        folder.write_config(config.flat())
        folder.write_labels(trainer.task.label_arrays())
    _tell(header(trainer, run.path))
    _train(run, trainer, folder)

    counts = map(trainer.task.count, typing.get_args(tasks.Part))
    _tell(f"evaluating the finished network on all {sum(counts):,} {trainer.task.SAMPLES}")
    started = time.perf_counter()
    notes = trainer.finish()
    for line in notes:
        _tell(line)
    result = _result(run, trainer) | {"notes": notes}
    _tell(f"evaluated in {time.perf_counter() - started:.1f} s")
    if folder:
        folder.write_metrics(trainer.history)
        folder.write_model(trainer.model, Weights.metadata(trainer))
        folder.write_result(result)
        _checkpoints(run).remove()
    return _summary(run, result)


def _folder(run: Run) -> RunFolder:
    run.identity.require_own(run.path)
    try:
        return RunFolder(run.path)
    except Busy:
        raise
    except OSError as error:
        raise ValueError(f"--out: {terminal.told(error)}") from error


def _checkpoints(run: Run) -> Checkpoints:
    return Checkpoints(run.path, run.identity.name)


def _earlier(folder: RunFolder, run: Run) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The result or the checkpoint of an earlier process."""
    if run.config.restart:
        folder.clear()
    result = run.identity.result(folder.path)
    if result:
        _checkpoints(run).remove()  # unless that process did
        return result, None
    return None, _checkpoints(run).load()


def _train(run: Run, trainer: Trainer, folder: RunFolder | None) -> None:
    if folder is None:
        collections.deque(trainer.epochs(), maxlen=0)
        return
    checkpoints = _checkpoints(run)
    last = trainer.history[-1:]
    with open_log(folder.path, len(trainer.history) - len(last), run.config.tensorboard) as log:
        for metrics in last:
            # An earlier process may have ended between the checkpoint and these.
            folder.write_metrics(trainer.history)
            log(metrics)
        for metrics in trainer.epochs():
            checkpoints.save(trainer.state_dict())
            folder.write_metrics(trainer.history)
            log(metrics)


def _result(run: Run, trainer: Trainer) -> dict[str, Any]:
    config, history, score = run.config, trainer.history, trainer.task.SCORE
    return {
        "method": "+".join(config.methods) or BASELINE,
        **run.identity.facts(),
        **trainer.result(),
        "epoch_chosen": trainer.states[0].get("early_stopping", {}).get("epoch", len(history)),
        f"test_{score}_at_best_validation": _at_best_validation(history, score),
        "seconds": sum(metrics.seconds for metrics in history),
        "device": _device_name(trainer.device),
        "backend": noisyq_fast.current_backend(trainer.device.type),
        "threads": config.threads,
        "processes": data_parallel.size(),
        "versions": noisyq_fast.info().versions,
    }


def _at_best_validation(history: list[EpochMetrics], score: str) -> float | None:
    """The test score of the best epoch on held-out samples; None unless all had both."""
    test = f"test_{score}"
    if not history or any(metrics.scores[test] is None for metrics in history):
        return None
    scores = [m.validation_score for m in history if m.validation_score is not None]
    if len(scores) < len(history):
        return None
    return history[scores.index(max(scores))].scores[test]


def check_device(wanted: str) -> None:
    """Raises ValueError where this machine lacks it."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but PyTorch finds no GPU")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _summary(run: Run, result: dict[str, Any]) -> str:
    score = run.config.task.summary(result)
    return f"{score} after {result['seconds']:.1f} s of training, written to {run.path}"


def parse(arguments: list[str] | None = None) -> RunConfig:
    """The options in `arguments`, or else in the command line."""
    if arguments is None:
        arguments = sys.argv[1:]
        check_once(arguments)
    return command_line.parse(arguments)


def check_once(arguments: list[str]) -> None:
    """Raises ValueError where a command line gives an option twice."""
    hint = "methods are combined by their options, as in --method quant --dropout 0.1"
    require_once(arguments, method=hint)


def main() -> int:
    """Returns the exit status; what a user can mend is told in one line."""
    try:
        with _told_once():
            config = parse()
            check_device(config.device)
            run = prepare(config)
    except (ValueError, OSError, RuntimeError) as error:
        return terminal.fail(error, terminal.REFUSED)
    try:
        with data_parallel.process_group(run.config.device) as device:
            _tell(execute(run, device))
    except Busy as error:
        return terminal.fail(error, BUSY)
    except (NonFiniteLoss, OSError, ValueError) as error:
        return terminal.fail(error)
    except (RuntimeError, MemoryError) as error:
        if not _out_of_memory(error):
            raise
        hint = "a smaller --batch-size takes less; the same command goes on where it was"
        return terminal.fail(ValueError(f"out of memory; {hint}"), terminal.FAILED)
    return 0


def _out_of_memory(error: Exception) -> bool:
    """Of a GPU or of the machine, for which PyTorch has no kind of error."""
    kinds = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Of several processes, only the first tells what the loaders find."""
    if data_parallel.is_main():
        yield
        return
    with contextlib.redirect_stdout(None), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tell(line: str) -> None:
    if data_parallel.is_main():
        print(line)


if __name__ == "__main__":
    told = "interrupted; the same command goes on from the last checkpoint"
    sys.exit(terminal.run(main, told))
