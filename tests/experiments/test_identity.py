"""A finished run is believed by the run and by a sweep, or refused by both with one error."""

import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from experiments import run
from experiments.storage.run_names import folder_of
from experiments.sweeping.engines import Task
from experiments.sweeping.progress import is_finished, state

RESULTS = Path(__file__).parents[2] / "results" / "digits-figure3" / "runs.zip"
OPTIONS = "--epochs 2 --train-size 64 --evaluate-every 2 --threads 1"


def prepared(options=OPTIONS):
    return run.prepare(run.parse(options.split()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished runs, by seed."""
    out = tmp_path_factory.mktemp("finished")
    runs = [prepared(f"{OPTIONS} --seed {seed} --out {out}") for seed in range(2)]
    for each in runs:
        run.execute(each, torch.device("cpu"))
    return runs


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the first one's folder."""
    return shutil.copytree(finished[0].path, tmp_path / "copy")


def task(folder, identity):
    return Task((), folder, 2, 1, False, Path(), Path(), identity)


def test_a_finished_run_is_believed(finished, folder):
    identity = finished[0].identity
    assert identity.result(folder)["run"] == identity.name
    assert is_finished(task(folder, identity))


def edited(name, **changes):
    def edit(folder, other):
        content = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps(content))

    return edit


def replaced(name, text):
    return lambda folder, other: (folder / name).write_text(text)


def without(name, key):
    def edit(folder, other):
        content = json.loads((folder / name).read_text())
        del content[key]
        (folder / name).write_text(json.dumps(content))

    return edit


def missing(name):
    return lambda folder, other: (folder / name).unlink()


def copied(*names):
    def copy(folder, other):
        for name in names:
            shutil.copy(other / name, folder / name)

    return copy


def copied_of_an_older_version(folder, other):
    copied("result.json", "metrics.jsonl")(folder, other)
    without("result.json", "run")(folder, other)


def torn(name, left):
    def tear(folder, other):
        (folder / name).write_bytes((folder / name).read_bytes()[:left])

    return tear


def twice(folder, other):
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() * 2)


def linked(name):
    def link(folder, other):
        (folder / name).rename(folder / "elsewhere")
        (folder / name).symlink_to("elsewhere")

    return link


def pipe(name):
    def make(folder, other):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


RESULT, METRICS, CONFIG = "result.json", "metrics.jsonl", "config.json"
FILES = (RESULT, METRICS, CONFIG)
FILE = "a regular file"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (replaced(RESULT, ""), "/result.json: malformed: Expecting value"),
        (replaced(RESULT, "null"), "/result.json: malformed: got None, takes an object"),
        (replaced(RESULT, "[]"), r"/result.json: malformed: got \[\], takes an object"),
        (replaced(RESULT, "[" * 100_000), "/result.json: malformed: nested too deeply"),
        (torn(RESULT, 100), "/result.json: malformed: "),
        (replaced(RESULT, "{}"), "/result.json: of another run: .*got nothing as label"),
        (edited(RESULT, test_loss=float("nan")), "/result.json: got nan as test_loss"),
        (edited(RESULT, per_au={"1": float("inf")}), "/result.json, per_au: got inf as 1"),
        (edited(RESULT, test_accuracy="high"), "/result.json: got 'high' as test_accuracy"),
        (edited(RESULT, test_accuracy=None), "/result.json: got None as test_accuracy"),
        (edited(RESULT, test_accuracy=True), "/result.json: got True as test_accuracy"),
        (without(RESULT, "seconds"), "/result.json: lacks seconds"),
        (edited(RESULT, seconds=10**400), "/result.json: got 1000.* as seconds"),
        (edited(RESULT, epochs_trained=10**12), "/metrics.jsonl: got 2 epochs, result.json has 10"),
        (edited(RESULT, run="other"), "/result.json: of another run: got other as run"),
        (edited(RESULT, seed=7), "/result.json: of another run: got 7 as seed, takes 0"),
        (edited(RESULT, noise=0.3), "/result.json: of another run: got 0.3 as noise"),
        (edited(RESULT, data_sha256="0"), "/result.json: of another run: got 0 as data_sha256"),
        (copied(RESULT), "/result.json: of another run: got digits-baseline-.*-seed1-"),
        (copied_of_an_older_version, "/result.json: of another run: got 1 as seed, takes 0"),
        (copied(RESULT, METRICS, CONFIG), "/config.json: of another run: got 1 as seed, takes 0"),
        (copied(CONFIG), "/config.json: of another run: got 1 as seed, takes 0"),
        (edited(CONFIG, lr=0.1), "/config.json: of another run: got 0.1 as lr, takes 0.001"),
        (without(CONFIG, "lr"), "/config.json: of another run: got nothing as lr"),
        (edited(CONFIG, weight_bits=4), "/config.json: .* got 4 as weight_bits, takes nothing"),
        (missing(CONFIG), ": config.json is missing"),
        (replaced(CONFIG, ""), "/config.json: malformed: "),
        (copied(METRICS), "/metrics.jsonl: of another run: its epochs took "),
        (missing(METRICS), "/metrics.jsonl: got 0 epochs, result.json has 2"),
        (replaced(METRICS, ""), "/metrics.jsonl: got 0 epochs, result.json has 2"),
        (torn(METRICS, 200), "/metrics.jsonl, line 1: malformed: "),
        (replaced(METRICS, '{"epoch": 2}\n'), "/metrics.jsonl, line 1: got 2 as epoch, takes 1"),
        (replaced(METRICS, '{"epoch": 1}\n{"epoch": 2}\n'), "/metrics.jsonl, .*: lacks seconds"),
        (twice, "/metrics.jsonl, line 3: got 1 as epoch, takes 3"),
        *((linked(name), f"/{name}: expected {FILE}, got a symb") for name in FILES),
        *((pipe(name), f"/{name}: is not {FILE}") for name in FILES),
    ],
)
def test_a_faulty_or_foreign_one_is_told(finished, folder, fault, message):
    first, second = finished
    fault(folder, second.path)
    with pytest.raises(ValueError, match=f"^{folder}{message}.*; --restart runs it anew$") as error:
        first.identity.result(folder)
    assert "\n" not in str(error.value)
    assert not is_finished(task(folder, first.identity))
    assert state(task(folder, first.identity)) == f"error: {error.value}"


@pytest.mark.parametrize("options", ["--epochs 3", "--method quant", "--noise 0.3", "--lr 0.002"])
def test_the_run_refuses_the_folder_of_another_one(finished, tmp_path, options):
    asked = prepared(f"{OPTIONS} --out {tmp_path} {options}")
    shutil.copytree(finished[0].path, asked.path)
    with pytest.raises(ValueError, match=r"\.json: of another run"):
        run.execute(asked, torch.device("cpu"))
    (asked.path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        run.execute(asked, torch.device("cpu"))
    (asked.path / "result.json").unlink()
    assert "test accuracy" in run.execute(asked, torch.device("cpu"))


@pytest.mark.parametrize("changed", ["out", "evaluate_every", "backend", "device", "method"])
def test_what_changes_no_number_may_differ(finished, folder, changed):
    edited("config.json", **{changed: "other"})(folder, None)
    assert finished[0].identity.result(folder)


@pytest.mark.parametrize("name", ["baseline", "quant-w8a4", "dropout0.3", "prune0.9-after0.5"])
def test_results_of_an_older_version_are_believed(name, tmp_path):
    """They do not say which run they are of."""
    with zipfile.ZipFile(RESULTS) as archive:
        archive.extractall(tmp_path)
    (folder,) = tmp_path.glob(f"digits-{name}-noise0.4-seed0-*")
    options = json.loads((folder / "config.json").read_text())
    arguments = []
    for option, value in options.items():
        flag = option.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            arguments += [f"--{flag}", str(value)]
    identity = run.prepare(run.parse(arguments)).identity
    assert folder_of(tmp_path, identity.name) == folder
    assert "run" not in identity.result(folder)
    assert state(task(folder, identity)) == "finished"
