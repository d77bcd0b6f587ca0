"""Many runs: a grid of options, worked off on this machine or on a cluster."""

import sys
from pathlib import Path

if not __package__:
    # Run as a script: import from the project root, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import contextlib
import dataclasses
import os
import shlex
import shutil
import textwrap
from dataclasses import dataclass
from typing import Annotated

import tyro

from experiments import run, terminal
from experiments.checks import Choice, option_names, require, require_once, require_whole
from experiments.command_line import filled, paragraphs_of, parse_into, require_known
from experiments.sweeping.engines import ENGINES, Rounds, Task
from experiments.sweeping.grid import RUN_OPTIONS, Grid, narrowed
from experiments.sweeping.planning import tasks
from experiments.sweeping.progress import Progress, is_finished, state

LOG_LINES = 5
MOST_JOBS = 16 * (os.cpu_count() or 1)
LEFT_TO_OTHERS = 3  # exit status
SHIPPED = Path(__file__).with_name("sweeps")


@dataclass(frozen=True)
class SweepConfig:
    """Train every run of a grid. To see what would run, and then run it:

        python experiments/sweep.py figure2 --dry-run
        python experiments/sweep.py figure2

    Each run is what run.py makes of its options, in a folder of its own, with what it printed in
    log.txt there. The same command again skips the finished runs, goes on with the interrupted ones
    after their last epoch and tries the failed ones again; Ctrl-C is safe at any time. What comes
    after -- goes to every run:

        python experiments/sweep.py figure2 --scale full -- --data-dir DATA

    A run at which another process is at work, such as another sweep in the same directory, is left
    to that one.

    Exit status: 0 if all runs are finished; 1 if some failed; 2 if the grid or an option is wrong
    and nothing was begun; 3 if none failed, but some were left to other processes; 130 after
    Ctrl-C; 143 after SIGTERM, as of kill. The runs of a sweep end with it.
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """A grid that comes along (see above), or a TOML file like theirs, which are in
    experiments/sweeps."""

    scale: str | None = None
    """Which scale of the file. smoke: minutes, on digits or a few drawn faces. small: hours of a
    CPU, on a part of CIFAR-10 or drawn faces. full: for GPUs; table1 and au_norm then take the
    data after --. If not given: the file's first one, smoke."""

    only: tuple[str, ...] = ()
    """Only the runs with these options, as in --only method=quant,baseline seed=0."""

    out: Path = Path("runs")
    """Directory in which the runs make their folders."""

    engine: Choice[str, ENGINES] = "local"
    """local: processes on this machine. ray: tasks of Ray (pip install 'noisyq_fast[ray]'), on the
    cluster that RAY_ADDRESS names or that runs on this machine, or else on a new one of this
    machine alone. Several machines must share, under the same paths, --out, the data, this project
    and its Python environment. Where only others than this one have GPUs, give --device cuda after
    --."""

    jobs: int | None = None
    """local: how many runs at a time, up to 16 for each CPU core. If not given: as many as fit on
    the cores with their --threads, or 1 with a GPU."""

    gpus_per_run: float | None = None
    """ray: GPUs of each run, such as 0.25 for four runs on one. If not given: 1 where there are
    any, 0 with --device cpu."""

    dry_run: bool = False
    """List the runs and how far they are, and end."""

    def __post_init__(self) -> None:
        require_whole("jobs", self.jobs, 1, MOST_JOBS)
        gpus = self.gpus_per_run
        accepted = gpus is None or 0 <= gpus <= 1 or gpus in range(1001)
        require("gpus_per_run", gpus, accepted, "0 to 1, or a whole number up to 1,000")
        if self.jobs is not None and self.engine != "local":
            raise ValueError(f"--jobs: takes effect with --engine local only, got {self.engine}")
        if gpus is not None and self.engine != "ray":
            raise ValueError(
                f"--gpus-per-run: takes effect with --engine ray only, got {self.engine}"
            )

    @property
    def path(self) -> Path:
        shipped = {path.stem: path for path in SHIPPED.glob("*.toml")}
        if self.file not in shipped and not os.path.lexists(self.file):
            raise ValueError(
                f"FILE: got {self.file}, no such file; takes one, or a grid that comes along: "
                f"{', '.join(sorted(shipped))}"
            )
        return shipped.get(self.file, Path(self.file))


def sweep(config: SweepConfig, extra: list[str]) -> int:
    """Gives the exit status."""
    with contextlib.suppress(ValueError):  # such as of options that need those of the grid
        run.parse(extra)
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out: got {config.out}, a file, takes a directory")
    grid = Grid.read(config.path, config.scale)
    runs = narrowed(list(grid.runs()), config.only)
    todo = tasks(config.path, grid, runs, config.out, extra)
    if config.dry_run:
        for task in todo:
            print(f"{state(task):<18}  {task.folder.name}")
        print(f"{terminal.amount(len(todo), 'run')}, {sum(map(is_finished, todo))} finished")
        return 0
    before = sum(map(is_finished, todo))
    failed, busy = carry_out(config, todo)
    print(f"finished before {before:6}")
    print(f"finished now    {len(todo) - before - len(failed) - len(busy):6}")
    _list("failed", failed)
    if busy:
        _list("left to others", busy)
    if failed:
        print("next: the same command again, which tries those that failed")
        return 1
    if busy:
        print("next: the same command again, when the others have ended")
        return LEFT_TO_OTHERS
    script = Path(sys.argv[0]).with_name("report.py")
    for report in sorted({report_of(task) for task in todo}):
        print(f"next: python {script} {report} {shlex.quote(str(config.out))}")
    return 0


def _list(what: str, tasks: list[Task]) -> None:
    print(f"{what:<16}{len(tasks):6}")
    for task in tasks:
        print(f"    {task.folder}")


def report_of(task: Task) -> str:
    """The command of report.py that compares such runs as this finished one."""
    assert task.identity is not None
    return task.identity.config.task.report().command


def carry_out(config: SweepConfig, todo: list[Task]) -> tuple[list[Task], list[Task]]:
    """Runs what is not finished; gives the tasks that failed and those that other processes run."""
    failed: list[Task] = []
    busy: list[Task] = []
    left = [task for task in todo if not is_finished(task)]
    if not left:
        return failed, busy
    progress = Progress(todo)
    with contextlib.closing(progress.bar), contextlib.closing(_engine(config, left)) as rounds:
        for ended in rounds:
            for task, status in ended:
                if status in (0, run.BUSY) and is_finished(task):
                    progress.end(task, f"finished {task.folder.name}")
                elif status == run.BUSY:
                    busy.append(task)
                    progress.end(task, f"left to another process {task.folder}")
                else:
                    failed.append(task)
                    progress.end(task, _failure(task, status))
            progress.update()
    return failed, [task for task in busy if not is_finished(task)]  # by now


def _engine(config: SweepConfig, tasks: list[Task]) -> Rounds:
    if config.engine == "ray":
        return ENGINES["ray"](tasks, gpus_per_run=config.gpus_per_run)
    jobs = config.jobs
    if any(task.gpu for task in tasks):
        run.check_device("cuda")
        jobs = jobs or 1
    cores = len(os.sched_getaffinity(0))
    jobs = jobs or max(1, cores // max(task.threads for task in tasks))
    return ENGINES["local"](tasks, jobs=jobs)


def _failure(task: Task, status: int | OSError) -> str:
    if isinstance(status, OSError):
        return f"failed {task.folder}, which could not be started: {status}"
    how = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
    try:
        lines = task.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    except OSError as error:
        lines = [str(error)]
    return "\n    ".join([f"failed {task.folder} ({how}), its log.txt ends:", *lines])


def main() -> int:
    """Gives the exit status; what a user can mend is told in one line."""
    own, extra = _split(sys.argv[1:])
    try:
        require_once(own, only="all belong to one, as in --only method=quant seed=0")
        run.check_once(extra)
        _require_own(own)
        require_known(extra)
        takes = "a grid, such as figure2 (see --help), in front of --only"
        return sweep(parse_into(SweepConfig, own, _description(), takes), extra)
    except (ValueError, OSError, RuntimeError) as error:
        return terminal.fail(error, terminal.REFUSED)


def _require_own(arguments: list[str]) -> None:
    """Raises a ValueError for an option of runs."""
    own = {field.name.replace("_", "-") for field in dataclasses.fields(SweepConfig)}
    for name in option_names(arguments):
        if name in RUN_OPTIONS - own:
            raise ValueError(
                f"--{name}: is an option of runs, which come after --, as in: sweep.py figure2 -- "
                f"--{name} ..."
            )


def _description() -> str:
    """What a sweep does, and which grids come along."""
    width = shutil.get_terminal_size().columns - 1
    grids = "\n".join(
        textwrap.fill(
            f"{path.stem:<14}{_about(path)}",
            width,
            initial_indent="  ",
            subsequent_indent=" " * 16,
        )
        for path in sorted(SHIPPED.glob("*.toml"))
    )
    return filled([*paragraphs_of(SweepConfig), "These grids come along:", grids])


def _about(path: Path) -> str:
    """The comment at the head of a file, in one line."""
    head, _, _ = path.read_text().partition("\n\n")
    return " ".join(line.removeprefix("# ") for line in head.splitlines())


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """What is for the sweep and, after --, for the runs."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:end], arguments[end + 1 :]


if __name__ == "__main__":
    told = "interrupted; the same command goes on after the last finished epochs"
    sys.exit(terminal.run(main, told))
