import dataclasses
import fcntl
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import data, run, sweep
from experiments.config import RunConfig
from experiments.data import digits
from experiments.methods import BASELINE, METHODS
from experiments.methods.post_training import PostTraining
from experiments.storage.run_folder import RunFolder
from experiments.sweeping.engines import Task
from experiments.sweeping.grid import Grid
from experiments.sweeping.planning import tasks
from experiments.sweeping.progress import Progress, state

EPOCHS = 10
GRID = f"""
variants = [
    {{ method = "baseline", lr = 0.001 }},
    {{ method = "quant", lr = 1e30 }},
    {{ method = "quant", lr = 0.001 }},
]
[base]
train_size = 128
epochs = {EPOCHS}
threads = 1
"""
GOOD = ["--only", "lr=0.001"]
LINE = 'variants = [{ method = "baseline" }, { method = "quant" }]\n'


@pytest.fixture
def grid(tmp_path):
    """Reads a grid, and gives the options of its runs."""

    def read(text, scale=None):
        path = tmp_path / "grid.toml"
        path.write_text(text)
        return list(Grid.read(path, scale).runs())

    return read


@pytest.fixture
def main(monkeypatch, capsys):
    """Runs the command line in this process; gives its status, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *map(str, arguments)])
        status = sweep.main()
        return status, *capsys.readouterr()

    return call


# The grid.


def test_grid_is_multiplied_out_in_order(grid):
    runs = grid("""
        variants = [{ method = "baseline" }, { method = "dropout", dropout = [0.1, 0.2] }]
        [base]
        epochs = 5
        augment = false
        [grid]
        seed = [0, 1]
        noise = [0.2, 0.4]
        [follow]
        noise_seed = "seed"
    """)
    assert len(runs) == 2 * 2 * 3
    assert runs[0] == {
        "epochs": 5,
        "augment": False,
        "method": "baseline",
        "seed": 0,
        "noise": 0.2,
        "noise-seed": 0,
    }
    order = [(r["seed"], r["noise"], r["method"], r.get("dropout")) for r in runs]
    assert order == [
        (0, 0.2, "baseline", None),
        (0, 0.2, "dropout", 0.1),
        (0, 0.2, "dropout", 0.2),
        (0, 0.4, "baseline", None),
        (0, 0.4, "dropout", 0.1),
        (0, 0.4, "dropout", 0.2),
        (1, 0.2, "baseline", None),
        (1, 0.2, "dropout", 0.1),
        (1, 0.2, "dropout", 0.2),
        (1, 0.4, "baseline", None),
        (1, 0.4, "dropout", 0.1),
        (1, 0.4, "dropout", 0.2),
    ]
    assert all(options["noise-seed"] == options["seed"] for options in runs)


def test_scale_replaces_and_the_first_is_the_default(grid):
    text = """
        variants = [{ method = "baseline" }, { method = "quant" }]
        [base]
        epochs = 200
        threads = 1
        [grid]
        seed = [0, 1, 2]
        [scales.tiny]
        base = { epochs = 1 }
        grid = { seed = [7], noise = [0.1, 0.2] }
        variants = [{ method = "prune" }]
        [scales.whole]
    """
    tiny = {"epochs": 1, "threads": 1, "method": "prune", "seed": 7}
    assert grid(text) == [tiny | {"noise": 0.1}, tiny | {"noise": 0.2}]
    assert grid(text, "tiny") == grid(text)
    assert len(grid(text, "whole")) == 2 * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[base", "Expected ']' at the end of a table declaration (at end of document)"),
        ("[bse]", "bse: no such name, did you mean base?"),
        ("[base]\nlabel-smoothing = 0.1\nlabel_smoothing = 0.2", "base: label-smoothing: got it"),
        ("[base]\nnois = 0.1", "base: nois: no such name, did you mean noise?"),
        ("[base]\nout = 'x'", "base: out: no such name"),
        ("[base]\nnoise = [0.1]", "base: noise: got [0.1], takes one value"),
        ("[grid]\nnoise = 0.1", "grid: noise: got 0.1, takes a list"),
        ("[grid]\nnoise = []", "grid: noise: got [], takes a value or a list of values"),
        ("[grid]\nnoise = [[0.1]]", "grid: noise: got [[0.1]], takes a value or a list of values"),
        ("base = 3", "base: got 3, takes a table"),
        ("variants = 3", "variants: got 3, takes a list of tables"),
        ("variants = [3]", "variants: got 3, takes a table"),
        ("[base]\nseed = 0\n[grid]\nseed = [0]", "seed: is both in base and in grid"),
        (
            "variants = [{ noise = 0 }]\n[grid]\nnoise = [0]",
            "noise: is both in variants and in grid",
        ),
        (
            "[base]\nseed = 0\nnoise-seed = 1\n[follow]\nnoise-seed = 'seed'",
            "noise-seed: is both in base and in follow",
        ),
        (
            "[follow]\nnoise-seed = 'sed'",
            "follow: noise-seed: got 'sed', takes an option of base or grid",
        ),
        ("[scales.a]\nbses = 3", "scales.a.bses: no such name, did you mean base?"),
        ("[scales.a]\nbase = { nois = 3 }", "scales.a.base: nois: no such name, did you mean"),
        # What only run.py knows.
        ("[grid]\nseed = [0, 1.5]", "--seed: got 1.5, takes a whole number"),
        ("[base]\nlr = 'fast'", "--lr: got fast, takes a number"),
        ("[base]\nmethod = 'magic'", "--method: got magic, takes one of baseline, "),
        ("[base]\nnoise = true", "--noise: got no value, takes a number"),
        ("[grid]\nnoise = [0, 1.5]", "--noise: got 1.5, takes a share from 0 to 1"),
        ("[base]\nlr = -1", "--lr: got -1.0, takes a finite number above 0"),
        ("[base]\nprune-after = 0.3", "--prune-after: takes effect with --method prune"),
        ("[base]\ntrain-size = 9999", "--train-size: got 9999, takes 1 to 1438 for digits"),
        ("[grid]\nseed = [1, 1]", "two of its runs are the same, digits-baseline-noise0.4-seed1-"),
    ],
)
def test_wrong_grid_is_told_in_one_line_before_anything_runs(main, tmp_path, text, message):
    path = tmp_path / "grid.toml"
    path.write_text(text)
    status, output, errors = main(path, "--out", tmp_path / "out")
    assert (status, output) == (2, "")
    assert errors.startswith(f"error: {path}: {message}")
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "big"], "grid.toml: --scale: got big, takes none"),
        (["--jobs", "0"], "--jobs: got 0, takes a whole number from 1"),
        (["--jobs", "1000000"], "--jobs: got 1000000, takes a whole number from 1 to"),
        (["--engine", "ray", "--gpus-per-run", "inf"], "--gpus-per-run: got inf, takes 0 to 1, or"),
        (["--engine", "ray", "--gpus-per-run", "-1"], "--gpus-per-run: got -1.0, takes 0 to 1"),
        (["--engine", "ray", "--gpus-per-run", "1.5"], "--gpus-per-run: got 1.5, takes 0 to 1"),
        (
            ["--only", "method=quant", "--only", "noise=0"],
            "--only: got it twice, takes it once; all belong to one, as in --only method=quant",
        ),
        (["--", "--seed", "1", "--seed=2"], "--seed: got it twice, takes it once"),
        (["--", "--train-size", "9", "--train_size", "8"], "--train-size: got it twice"),
        (["--", "--weight-decay", "1"], "grid.toml: --method: got baseline with --weight-decay"),
        (["--jobs", "2", "--engine", "ray"], "--jobs: takes effect with --engine local only"),
        (["--gpus-per-run", "1"], "--gpus-per-run: takes effect with --engine ray only"),
        (["--only", "method=prune"], "--only: got method=prune, takes baseline, quant"),
        (["--only", "quant"], "--only: got quant, takes OPTION=VALUE"),
        (["--only", "noise=0.1"], "--only: got noise=0.1, no run sets it"),
        (["--", "--method", "prune"], "--method after --: the runs of grid.toml differ in it"),
        (["--", "--out=x"], "--out after --: the sweep sets it"),
        (["--", "--name=x"], "--name after --: the sweep sets it"),
        (["--", "--lr", "fast"], "--lr: got fast, takes a number"),
        (["--jobs", "many"], "--jobs: got many, takes a whole number"),
        (["--scle", "smoke"], "--scle: there is no such option; did you mean --scale?"),
        (["--scale"], "--scale: got no value, takes a text"),
        (["another"], "got another, which belongs to no option; takes options beside FILE"),
        (["--out", ""], "--out: got '', takes a path"),
        (["--out", "grid.toml"], "--out: got grid.toml, a file, takes a directory"),
        (["--only"], "--only: got no value, takes a text"),
        (["--", "--noise", "2"], "--noise: got 2.0, takes a share from 0 to 1"),
    ],
)
def test_wrong_option_is_told_in_one_line(main, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("grid.toml").write_text(LINE)
    status, output, errors = main("grid.toml", *arguments)
    assert (status, output) == (2, "")
    assert errors.startswith(f"error: {message}")
    assert errors.count("\n") == 1


def test_missing_file_names_what_there_is(main):
    assert main("figure4") == (
        2,
        "",
        "error: FILE: got figure4, no such file; takes one, or a grid that comes along: "
        "au_norm, data_size, figure2, figure3, league, learned, post_training, restricted, "
        "table1\n",
    )


@pytest.mark.parametrize(
    ("name", "scale", "count", "at_first"),
    [
        # The baseline and six methods, times noise levels and seeds.
        ("figure2", "smoke", 7 * 2, 7 * 2),
        ("figure2", "small", 7 * 5 * 3, 7 * 5),
        ("figure2", "full", 7 * 11 * 5, 7 * 11),
        # The baseline, 10 pairs of bits, 5 of p and 4 ratios.
        ("figure3", "smoke", 20, 20),
        ("figure3", "small", 20 * 3, 20),
        ("figure3", "full", 20 * 11 * 5, 20 * 11),
        # In float and quantized: nothing, 29 methods, truncated gce, and nothing in large batches.
        ("league", "smoke", 65, 65),
        ("league", "small", 65 * 3, 65),
        ("league", "full", 65 * 5, 65),
        # In float and quantized: nothing, and six networks that are restricted otherwise.
        ("restricted", "smoke", 14, 14),
        ("restricted", "small", 14 * 2, 14 * 2),
        ("restricted", "full", 14 * 2 * 5, 14 * 2),
    ],
)
def test_shipped_grids(name, scale, count, at_first):
    runs = list(Grid.read(sweep.SHIPPED / f"{name}.toml", scale).runs())
    assert len(runs) == count
    assert {options["seed"] for options in runs[:at_first]} == {0}
    assert at_first == count or runs[at_first]["seed"] == 1
    for options in runs:
        assert options["noise-seed"] == options["seed"]
        validation = None if name == "learned" else 0.1
        assert (options.get("validation"), options["threads"]) == (validation, 1)


def test_shipped_grids_are_valid_and_share_runs(main, monkeypatch):
    small_cifar10 = dataclasses.replace(digits.load(), name="cifar10")
    monkeypatch.setitem(data.DATASETS, "cifar10", lambda data_dir, download: small_cifar10)
    names = {}
    for file in ("figure2", "figure3", "league", "post_training", "restricted"):
        for scale in ("smoke", "small"):
            arguments = (file, "--scale", scale, "--only", "seed=0", "--dry-run", "--")
            status, output, errors = main(*arguments, "--train-size", 64, "--epochs", 4)
            assert status == 0, errors
            *lines, _ = output.splitlines()
            names[file, scale] = {line.split()[-1] for line in lines}
    for scale in ("smoke", "small"):
        both = names["figure2", scale] & names["figure3", scale]
        methods = sorted(name.split("-")[1] for name in both if "noise0.4" in name)
        assert methods == ["baseline", "dropout0.1", "prune0.75", "quant"]
        with_wrong_labels = {name for name in names["restricted", scale] if "noise0.4" in name}
        assert with_wrong_labels <= names["league", scale]
        assert len(with_wrong_labels) == 14


def test_the_league_has_every_method_in_float_and_quantized():
    runs = list(Grid.read(sweep.SHIPPED / "league.toml", "smoke").runs())
    assert {run["method"] for run in runs} == {"baseline", *METHODS}
    quantized = {run["method"] for run in runs if run.get("weight-bits") == 4}
    afterwards = {name for name, method in METHODS.items() if issubclass(method, PostTraining)}
    by_themselves = {name for name, method in METHODS.items() if method.REPLACES == "quantizer"}
    assert quantized == METHODS.keys() - by_themselves - {"adabits", "quantizable"} - afterwards


@pytest.mark.parametrize("scale", ["smoke", "small", "full"])
def test_every_method_of_the_league_is_compared_with_the_baseline_in_its_batches(scale):
    usual = RunConfig().recipe
    by_size = {}
    for options in Grid.read(sweep.SHIPPED / "league.toml", scale).runs():
        method = options["method"]
        recipe = usual if method == BASELINE else METHODS[method]().with_defaults().recipe(usual)
        size = options.get("batch-size", recipe.batch_size)
        by_size.setdefault(size, set()).add(method)
    assert len(by_size) == 2
    assert all({BASELINE, "quant"} <= methods for methods in by_size.values())


@pytest.mark.parametrize(
    ("scale", "count"), [("smoke", 3 * 2 * 2), ("small", 4 * 2 * 2 * 3), ("full", 5 * 5 * 2 * 5)]
)
def test_shipped_grid_of_data_sizes(scale, count):
    runs = list(Grid.read(sweep.SHIPPED / "data_size.toml", scale).runs())
    assert len(runs) == count
    assert {options["noise-over"] for options in runs} == {"all"}
    assert not any("validation" in options for options in runs)


@pytest.mark.parametrize("extra", [[], ["--threads", "1", "--device=cpu"], ["--no-augment"]])
def test_a_run_gets_every_option_once(grid, tmp_path, extra):
    runs = grid(LINE + "[base]\naugment = true")
    todo = tasks(Path("grid.toml"), Grid(), runs, tmp_path, extra)
    for task in todo:
        run.check_once(task.arguments)
        config = run.parse(list(task.arguments))
        assert (config.threads, config.device) == (1, "cpu")
        assert run.prepare(config).path == task.folder


def test_runs_on_a_gpu_that_is_missing_are_refused_before_they_start(main, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "grid.toml"
    path.write_text(LINE)
    status, _, errors = main(path, "--out", tmp_path / "out", "--", "--device", "cuda")
    assert (status, errors) == (2, "error: --device: got cuda, but PyTorch finds no GPU\n")
    assert not (tmp_path / "out").exists()


# The runs.


def metrics(out):
    """Of each run, by folder: its epochs, without the times."""
    return {
        path.parent.name: [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in path.read_text().splitlines()
        ]
        for path in out.glob("*/metrics.jsonl")
    }


def results(out):
    """Of each finished run, by folder: its result, without the times."""
    return {
        path.parent.name: {k: v for k, v in json.loads(path.read_text()).items() if k != "seconds"}
        for path in out.glob("*/result.json")
    }


def start(file, out, *arguments):
    return subprocess.Popen(
        [sys.executable, sweep.__file__, file, "--out", out, *arguments],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("grid") / "grid.toml"
    path.write_text(GRID)
    return path


@pytest.fixture(scope="module")
def swept(file):
    """A sweep that nobody interrupted: its folder, and how it ended."""
    out = file.parent / "swept"
    return out, finish(start(file, out, "--jobs", "2"))


def test_sweep_carries_out_what_it_can(swept):
    out, (status, output, errors) = swept
    assert (status, errors) == (1, "")
    finished = [name.partition("-noise0.4-")[0] for name in sorted(results(out))]
    assert finished == ["digits-baseline", "digits-quant-w4a4"]
    (failed,) = {path.name for path in out.iterdir()} - results(out).keys()
    assert f"failed {out / failed} (exit status 1), its log.txt ends:\n" in output
    assert re.search(
        r"    error: .* in epoch 1, at learning rate 1e\+30; last checkpoint: ", output
    )
    assert output.endswith(
        "finished before      0\n"
        "finished now         2\n"
        "failed               1\n"
        f"    {out / failed}\n"
        "next: the same command again, which tries those that failed\n"
    )
    for name in results(out):
        log = (out / name / "log.txt").read_text()
        assert f"epoch {EPOCHS}/{EPOCHS}" in log
        assert (out / name / "config.json").exists()


def test_runs_are_those_of_run_py(swept, tmp_path):
    out, _ = swept
    arguments = ["--train-size", "128", "--epochs", str(EPOCHS), "--threads", "1"]
    run_by_hand = run.prepare(run.parse([*arguments, "--out", str(tmp_path)]))
    run.execute(run_by_hand, torch.device("cpu"))
    (name,) = metrics(tmp_path)
    assert metrics(tmp_path)[name] == metrics(out)[name]


def test_rerun_skips_the_finished_and_tries_the_failed_again(swept, file, main):
    out, _ = swept
    times = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    status, output, errors = main(file, "--out", out, "--dry-run")
    assert (status, errors) == (0, "")
    assert sorted(line.split("  ")[0] for line in output.splitlines()) == [
        "3 runs, 2 finished",
        "finished",
        "finished",
        "not begun",
    ]
    status, output, _ = main(file, "--out", out)
    assert status == 1
    assert "finished before      2\nfinished now         0\nfailed               1\n" in output
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")} == times
    attempts = {log.parent.name: log.read_text().count("$ ") for log in out.glob("*/log.txt")}
    assert attempts == {name: 1 if name in results(out) else 2 for name in attempts}

    status, output, _ = main(file, "--out", out, *GOOD)
    assert status == 0
    assert f"next: python report.py figures {out}\n" in output


def test_a_run_of_another_process_is_left_to_it(main, file, tmp_path):
    status, output, _ = main(file, "--out", tmp_path, "--only", "method=baseline", "--dry-run")
    name = output.splitlines()[0].split()[-1]
    folder = RunFolder(tmp_path / name)
    status, output, errors = main(file, "--out", tmp_path, "--only", "method=baseline")
    assert (status, errors) == (sweep.LEFT_TO_OTHERS, "")
    assert f"1/1 left to another process {folder.path}\n" in output
    assert output.endswith(
        "finished before      0\n"
        "finished now         0\n"
        "failed               0\n"
        "left to others       1\n"
        f"    {folder.path}\n"
        "next: the same command again, when the others have ended\n"
    )


@pytest.mark.parametrize("result", ["", "null", '{"test_accuracy": 0.9}'])
def test_a_result_that_is_none_is_told(main, file, tmp_path, result):
    only = ("--only", "method=baseline")
    _, output, _ = main(file, "--out", tmp_path, *only, "--dry-run")
    folder = tmp_path / output.splitlines()[0].split()[-1]
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "result.json").write_text(result)
    _, output, _ = main(file, "--out", tmp_path, *only, "--dry-run")
    assert output.startswith(f"error: {folder}/")
    assert output.endswith("1 run, 0 finished\n")


@pytest.mark.parametrize(
    "make", [lambda log: log.symlink_to("../precious"), os.mkfifo, lambda log: log.mkdir()]
)
def test_an_odd_log_fails_its_run_alone(main, file, tmp_path, monkeypatch, make):
    _, output, _ = main(file, "--out", tmp_path, "--dry-run")
    first, *others = [tmp_path / line.split()[-1] for line in output.splitlines()[:-1]]
    first.mkdir()
    (tmp_path / "precious").write_text("precious")
    make(first / "log.txt")
    started = Task.start

    def start(task):
        """Nothing but a log."""
        return started(dataclasses.replace(task, script=tmp_path / "missing.py"))

    monkeypatch.setattr(Task, "start", start)
    status, output, _ = main(file, "--out", tmp_path, "--jobs", "1")
    told = f"failed {first}, which could not be started: {first}/log.txt: expected a regular file"
    assert told in output
    assert status == 1
    assert all("missing.py" in (folder / "log.txt").read_text() for folder in others)
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.fixture
def interrupted(file, tmp_path):
    """Starts a sweep, sends a signal to it alone at a random point, and gives how it ended."""
    out = tmp_path / "out"

    def interrupt(number, *arguments):
        process = start(file, out, *arguments)
        epochs = random.randint(1, EPOCHS - 6)
        deadline = time.monotonic() + 200
        while max(map(len, metrics(out).values()), default=0) < epochs:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(random.random() * 0.2)
        process.send_signal(number)
        return out, finish(process)

    return interrupt


def wait_until_unlocked(folder):
    """Until nobody is at work in the folder of the run."""
    deadline = time.monotonic() + 30
    with (folder / ".lock").open("w") as lock:
        while True:
            try:
                return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                assert time.monotonic() < deadline, f"a process is still at work on {folder}"
                time.sleep(0.02)


def test_killed_sweep_leaves_no_process_and_goes_on(swept, file, interrupted, main):
    out, (status, _, _) = interrupted(signal.SIGKILL, *GOOD, "--jobs", "2")
    assert status == -signal.SIGKILL
    for folder in out.iterdir():
        wait_until_unlocked(folder)
    before = metrics(out)
    assert before
    assert max(map(len, before.values())) < EPOCHS
    assert not results(out)

    status, output, _ = main(file, "--out", out, *GOOD)
    assert status == 0
    assert "finished now         2\n" in output
    reference, _ = swept
    assert results(out) == results(reference)
    assert metrics(out) == {name: metrics(reference)[name] for name in results(reference)}
    for name, epochs in before.items():
        log = (out / name / "log.txt").read_text()
        assert f"goes on after epoch {len(epochs)}" in log or (
            # It was killed between its checkpoint and its metrics.
            f"goes on after epoch {len(epochs) + 1}" in log
        )


def test_help_fits_a_terminal_and_says_what_comes_along(main, capsys):
    with pytest.raises(SystemExit, match="0"):
        main("--help")
    output, _ = capsys.readouterr()
    assert max(map(len, output.splitlines())) <= 80
    for path in sweep.SHIPPED.glob("*.toml"):
        assert f"\n  {path.stem} " in output


@pytest.mark.parametrize("option", ["--data-dir", "--no-augment", "--seed=1"])
def test_options_of_runs_are_sent_behind_the_dashes(main, option):
    status, _, errors = main("figure2", option)
    assert status == 2
    assert "is an option of runs, which come after --, as in: sweep.py figure2 -- --" in errors


def test_ctrl_c_stops_the_runs_in_order(interrupted):
    out, (status, output, errors) = interrupted(signal.SIGINT, "--only", "method=baseline")
    assert (status, output) == (130, "")
    assert errors == "interrupted; the same command goes on after the last finished epochs\n"
    assert not results(out)
    for folder in out.iterdir():
        wait_until_unlocked(folder)
    for name in metrics(out):
        assert (out / name / "log.txt").read_text().splitlines()[-1].startswith("interrupted; ")


def test_ray_gives_the_same(swept, file, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'noisyq_fast[ray]'")
    out = tmp_path / "out"
    status, output, errors = finish(start(file, out, "--engine", "ray", "--only", "method=quant"))
    assert status == 1, errors
    assert "finished now         1\nfailed               1\n" in output
    reference, _ = swept
    assert len(results(out)) == 1
    assert results(out).items() <= results(reference).items()
    assert len(metrics(out)) == 2
    assert metrics(out).items() <= metrics(reference).items()


def test_ray_that_is_missing_is_told(main, file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    status, output, errors = main(file, "--out", tmp_path, "--engine", "ray")
    assert (status, output) == (2, "")
    assert errors == (
        "error: --engine: got ray, but Ray is missing; pip install 'noisyq_fast[ray]'\n"
    )


def test_progress_counts_what_is_done_now(tmp_path):
    def task(name, epochs, done, result=False):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("{}\n" * done)
        identity = SimpleNamespace(result=lambda folder: {"test_accuracy": 1.0} if result else None)
        return Task((), folder, epochs, 1, False, Path(), tmp_path, identity)

    stopped_early, begun, new = tasks = [
        task("a", 20, 5, result=True),
        task("b", 10, 4),
        task("c", 10, 0),
    ]
    progress = Progress(tasks)
    bar = progress.bar
    assert (bar.n, bar.total) == (5 + 4, 5 + 10 + 10)
    (begun.folder / "metrics.jsonl").write_text("{}\n" * 7)
    progress.update()
    assert (bar.n, bar.total) == (5 + 7, 25)
    (new.folder / "metrics.jsonl").write_text("{}\n" * 6)
    progress.end(new, "finished early")
    assert (bar.n, bar.total) == (5 + 7 + 6, 5 + 10 + 6)
    assert state(stopped_early) == "finished"
    assert state(begun) == "7 of 10 epochs"
