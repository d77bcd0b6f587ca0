"""Whatever was done to a run's folder, it is named and left out, and the others are reported."""

import json
import os
import random
import shutil
import sys
import zipfile

import polars as pl
import pytest
from run_folders import AU_EPOCHS, EPOCHS, edit, write_action_units, write_classification

from experiments import report
from experiments.reporting.action_units.runs import ActionUnitRun
from experiments.reporting.finished_run import FinishedRun
from experiments.reporting.reading import Number
from experiments.reporting.runs import find

FIGURES, TABLE1 = report.COMMANDS["figures"], report.COMMANDS["table1"]
KINDS = {
    "figures": (FIGURES, FinishedRun, write_classification, EPOCHS, "summary.csv"),
    "table1": (TABLE1, ActionUnitRun, write_action_units, AU_EPOCHS, "table1.csv"),
}
NESTED = '{"a":' * 100_000


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def result(**changes):
    return lambda folder: edit(folder / "result.json", **changes)


def both(**changes):
    def damage(folder):
        config(**changes)(folder)
        result(**changes)(folder)

    return damage


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def replaced(name, make):
    def damage(folder):
        (folder / name).unlink()
        make(folder / name)

    return damage


def epoch(**changes):
    """Changes the second epoch."""

    def damage(folder):
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines()
        values = json.loads(lines[1]) | changes
        lines[1] = json.dumps({name: value for name, value in values.items() if value is not ...})
        path.write_text("\n".join(lines) + "\n")

    return damage


def lines(change):
    """Changes the list of epochs."""

    def damage(folder):
        path = folder / "metrics.jsonl"
        path.write_text("".join(change(path.read_text().splitlines(keepends=True))))

    return damage


DAMAGES = [
    (lambda f: (f / "metrics.jsonl").unlink(), ": metrics.jsonl is missing"),
    (lambda f: (f / "config.json").unlink(), ": config.json is missing"),
    (text("result.json", "{"), "/result.json: malformed: Expect"),
    (text("result.json", ""), "/result.json: malformed: Expect"),
    (text("result.json", "[]"), "/result.json: malformed: got [], takes an object"),
    (text("result.json", NESTED), "/result.json: malformed: nested too deeply"),
    (text("config.json", NESTED), "/config.json: malformed: nested too deeply"),
    (text("metrics.jsonl", NESTED), "/metrics.jsonl, line 1: malformed: nested too deeply"),
    (text("config.json", "no"), "/config.json: malformed"),
    (text("config.json", '{"a": 1, "a": 2}'), "/config.json: malformed: got 'a' twice"),
    (text("result.json", '{"a": "\\ud800"}'), "/result.json: malformed: "),
    (text("result.json", " " * (2**20 + 1)), "/result.json: got more than 1,048,576 bytes"),
    (lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\n"), "/metrics.jsonl, line 1: malformed"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "/config.json: malformed"),
    (replaced("result.json", os.mkfifo), "/result.json: is not a regular file"),
    (replaced("config.json", os.mkfifo), "/config.json: is not a regular file"),
    (replaced("metrics.jsonl", os.mkdir), "/metrics.jsonl: cannot be read: Is a directory"),
    (replaced("config.json", os.mkdir), "/config.json: cannot be read: Is a directory"),
    (
        replaced("result.json", lambda path: path.symlink_to(path)),
        "/result.json: cannot be read: Too many levels of symbolic links",
    ),
    (replaced("config.json", lambda path: path.symlink_to("/dev/zero")), "is not a regular file"),
    (config(dataset=["digits"]), "/config.json: got ['digits'] as dataset, takes printable text"),
    (config(dataset=""), "/config.json: got '' as dataset, takes printable text of 1 to 200"),
    (config(seed=None), "/config.json: got None as seed, takes a whole number from 0"),
    (config(seed=-1), "/config.json: got -1 as seed"),
    (config(noise_seed=...), "/config.json: lacks noise_seed"),
    (config(method=...), "/config.json: lacks method"),
    (both(noise="0.4"), "/config.json: got '0.4' as noise, takes a "),
    (both(noise=True), "/config.json: got True as noise, takes a "),
    (both(noise=-0.1), "/config.json: got -0.1 as noise"),
    (both(noise=10**400), "as noise, takes a "),
    (both(noise=float("nan")), "/config.json: got nan as noise, takes a "),
    (both(epochs=2.0), "/config.json: got 2.0 as epochs, takes a whole number from 0"),
    (config(augment="yes"), "/config.json: got 'yes' as augment, takes true or false"),
    (config(lr=[0.1]), "/config.json: got [0.1] as lr, takes a finite number"),
    (config(lr="0.1"), "/config.json: got '0.1' as lr, takes a finite number or null"),
    (config(lr=10**400), "as lr, takes a finite number"),
    (config(batch_size=True), "/config.json: got True as batch_size, takes a whole number or null"),
    (
        config(train_size=0),
        "/config.json: got 0 as train_size, takes a whole number from 1 or null",
    ),
    (config(train_size=10**30), "as train_size, takes a whole number from 1 or null"),
    (config(another={"a": []}), "/config.json: got {'a': []} as another, takes a finite number"),
    (config(weight_bits="4"), "/config.json: malformed options: "),
    (config(weight_bits=[[]]), "/config.json: malformed options: "),
    (config(weight_bits=99), "/config.json: malformed options: --weight-bits: got 99, takes"),
    (config(weight_bits=4), "as method, takes quant"),
    (result(label="quant-w4a4"), "/result.json: got 'quant-w4a4' as label, takes baseline as"),
    (result(label=""), "/result.json: got '' as label, takes printable text"),
    (result(label="a\nb"), "/result.json: got 'a\\nb' as label, takes printable text"),
    (result(label=7), "/result.json: got 7 as label"),
    (result(label=...), "/result.json: lacks label"),
    (result(method="prune"), "/result.json: got 'prune' as method, takes "),
    (result(dataset="cifar10"), "/result.json: got 'cifar10' as dataset, takes '"),
    (result(noise=0.25), "/result.json: got 0.25 as noise, takes "),
    (result(noise_kind="pair"), "/result.json: got 'pair' as noise_kind, takes '"),
    (result(seed=1), "/result.json: got 1 as seed, takes 0 as in config.json"),
    (result(epochs=4), "/result.json: got 4 as epochs, takes "),
    (result(epochs_trained=2, epoch_chosen=0), "/metrics.jsonl: got "),
    (
        result(epochs_trained=0, epoch_chosen=0),
        "/result.json: got 0 as epochs_trained, takes 1 to ",
    ),
    (result(seconds=7.0), "/metrics.jsonl: of another run: its epochs took "),
    (result(epochs_trained=99), "/result.json: got 99 as epochs_trained, takes 1 to "),
    (result(data_sha256="+" * 64), "as data_sha256, takes 8 to 64 hexadecimal digits"),
    (result(test_loss=float("nan")), "/result.json: got nan as test_loss, takes a finite number"),
    (result(test_loss=float("inf")), "/result.json: got inf as test_loss"),
    (result(test_loss=-1.0), "/result.json: got -1.0 as test_loss"),
    (result(test_loss=1e300), "/result.json: got 1e+300 as test_loss"),
    (result(parameters=1.5), "/result.json: got 1.5 as parameters, takes a whole number from 0"),
    (result(parameters=2**63), "as parameters, takes a whole number from 0"),
    (result(macs=-1), "/result.json: got -1 as macs"),
    (lines(lambda epochs: epochs[:-1]), "/metrics.jsonl: got "),
    (lines(lambda epochs: []), "/metrics.jsonl: got 0 epochs, takes the "),
    (lines(lambda epochs: epochs + epochs[-1:]), "as epoch, takes "),
    (lines(lambda epochs: epochs[1:]), "/metrics.jsonl, line 1: got 2 as epoch, takes 1"),
    (lines(lambda epochs: epochs[:1] + epochs[2:]), "line 2: got 3 as epoch, takes 2"),
    (lines(lambda epochs: epochs[::-1]), "line 1: got "),
    (lines(lambda epochs: [*epochs, "\n"]), "malformed: Expect"),
    (epoch(epoch="2"), "line 2: got '2' as epoch, takes a whole number from 0"),
    (epoch(epoch=...), "line 2: lacks epoch"),
    (epoch(loss=None), "line 2: got None as loss, takes a finite number"),
    (epoch(loss=float("inf")), "line 2: got inf as loss"),
    (epoch(loss=...), "line 2: lacks loss"),
]
DAMAGES_OF_FIGURES = [
    (result(test_accuracy=float("nan")), "got nan as test_accuracy, takes a number from 0 to 1"),
    (result(test_accuracy=57.0), "got 57.0 as test_accuracy, takes a number from 0 to 1"),
    (result(test_accuracy=-0.1), "got -0.1 as test_accuracy"),
    (result(test_accuracy="high"), "got 'high' as test_accuracy"),
    (result(test_accuracy=True), "got True as test_accuracy"),
    (result(test_accuracy=None), "got None as test_accuracy"),
    (result(test_accuracy=...), "lacks test_accuracy"),
    (
        result(train_accuracy_flipped=1.1),
        "as train_accuracy_flipped, takes a number from 0 to 1 or",
    ),
    (result(accuracy_gap=-1.1), "as accuracy_gap, takes a number from -1 to 1"),
    (epoch(test_accuracy=57.0), "line 2: got 57.0 as test_accuracy"),
    (epoch(test_accuracy=...), "line 2: lacks test_accuracy"),
    (epoch(train_accuracy_flipped=[0.5]), "line 2: got [0.5] as train_accuracy_flipped"),
]
DAMAGES_OF_TABLE1 = [
    (result(test_f1=1.01), "got 1.01 as test_f1, takes a number from 0 to 1"),
    (result(test_f1="high"), "got 'high' as test_f1, takes a number from 0 to 1"),
    (result(test_f1=...), "lacks test_f1"),
    (result(test_f1_per_au=...), "lacks test_f1_per_au"),
    (result(test_f1_per_au=None), "got None as test_f1_per_au, takes an object"),
    (result(test_f1_per_au={}), "test_f1_per_au: got [], takes numbers of AUs"),
    (
        result(test_f1_per_au={"1": 0.5, "=2": 0.5}),
        "test_f1_per_au: got ['1', '=2'], takes numbers",
    ),
    (result(test_f1_per_au={"1": 0.5, "2": 2}), "test_f1_per_au: got 2 as 2, takes a number"),
    (result(test_f1_truth_per_au={"1": 0.5, "4": 0.5}), "takes the AUs of test_f1_per_au"),
    (result(test_f1_truth=None), "as test_f1_truth_per_au, takes null, like test_f1_truth"),
    (result(epoch_chosen=AU_EPOCHS + 1), "as epoch_chosen, takes at most 20"),
    (result(fold=2), "got 2 as fold, takes 1 as in config.json"),
    (both(fold=4), "got 4 as fold, takes 1, 2 or 3"),
    (config(fold=...), "lacks fold"),
    (config(au_norm=[]), "got [] as au_norm, takes"),
    (config(encoder=3), "got 3 as encoder, takes"),
    (both(noise=None), "got None as noise, takes a finite number from 0"),
]
CASES = [
    *((name, *case) for name in KINDS for case in DAMAGES),
    *(("figures", *case) for case in DAMAGES_OF_FIGURES),
    *(("table1", *case) for case in DAMAGES_OF_TABLE1),
]


@pytest.mark.parametrize(("kind", "damage", "reason"), CASES)
def test_damaged_run_is_named_and_left_out(kind, damage, reason, tmp_path):
    _, run, write, *_ = KINDS[kind]
    write(tmp_path, seed=1)
    folder = write(tmp_path)
    damage(folder)
    found = find(tmp_path, run)
    assert [run.seeds for run in found.finished] == [(1, 1)]
    (left_out,) = found.left_out
    assert left_out.startswith(str(folder))
    assert reason in left_out


def test_the_others_are_reported(kind, tmp_path, capsys):
    command, _, write, _, summary = kind
    for seed in (0, 1):
        write(tmp_path, seed=seed)
    result(test_loss=float("nan"))(write(tmp_path, "quant-w4a4"))
    command(tmp_path, tmp_path / "out")
    assert len(pl.read_csv(tmp_path / "out" / summary)) == 1
    reason = f"{tmp_path}/quant-w4a4-"
    assert f"\n## Left out\n\n- {reason}" in (tmp_path / "out" / "report.md").read_text()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out: {reason}")
    assert line.endswith("/result.json: got nan as test_loss, takes a finite number from 0")


def test_packed_runs_are_reported_as_their_folders(kind, tmp_path, capsys):
    command, *_, summary = kind
    runs, packed = tmp_path / "runs", tmp_path / "packed"
    for seed in (0, 1):
        for label in ("baseline", "quant-w4a4"):
            folder = kind[2](runs, label, seed=seed)
            config(data_dir=str(tmp_path))(folder)
    unfinished = kind[2](runs, seed=2)
    (unfinished / "result.json").unlink()
    command(runs, tmp_path / "a")
    report.COMMANDS["pack"](runs, packed / "runs.zip")
    assert "4 runs written" in capsys.readouterr().out
    command(packed, tmp_path / "b")
    names = "report.md", "runs.csv", summary
    of_folders, of_packed = (
        [(tmp_path / out / name).read_text() for name in names] for out in ("a", "b")
    )
    left_out = f"\n## Unfinished runs, left out\n\n- {unfinished.name}\n"
    assert [text.replace(left_out, "") for text in of_folders] == of_packed
    with zipfile.ZipFile(packed / "runs.zip") as archive:
        options = json.loads(archive.read(f"{folder.name}/config.json"))
    assert (options["data_dir"], options["out"]) == ("DIR", "runs")
    report.COMMANDS["pack"](packed, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (packed / "runs.zip").read_bytes()


def test_folders_of_one_name_are_packed(kind, tmp_path):
    _, run, write, *_ = kind
    for seed in (0, 1):
        write(tmp_path / str(seed), seed=seed).rename(tmp_path / str(seed) / "run")
    report.COMMANDS["pack"](tmp_path, tmp_path / "packed" / "runs.zip")
    found = find(tmp_path / "packed", run)
    assert sorted(run.seeds for run in found.finished) == [(0, 0), (1, 1)]


def damaged_zips(content):
    yield b""
    yield b"PK" + bytes(100)
    yield content[: len(content) // 2]
    middle = bytearray(content)
    middle[60:90] = bytes(30)  # in the first file
    yield bytes(middle)


def test_damaged_packed_runs_are_named(kind, tmp_path):
    _, run, write, *_ = kind
    write(tmp_path / "runs")
    report.COMMANDS["pack"](tmp_path / "runs", tmp_path / "runs.zip")
    for content in damaged_zips((tmp_path / "runs.zip").read_bytes()):
        (tmp_path / "runs.zip").write_bytes(content)
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        found = find(tmp_path, run)
        assert not found.finished
        assert len(found.left_out) == 1
        assert found.left_out[0].startswith(str(tmp_path / "runs.zip"))


def test_only_where_nothing_is_left_it_is_an_error(tmp_path, monkeypatch, capsys):
    folder = write_classification(tmp_path)
    result(test_loss=-1.0)(folder)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{folder}/result"):
        report.COMMANDS["figures"](tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "figures", str(tmp_path)])
    assert report.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}: no finished run")


def test_an_evaluation_without_epochs_is_reported_too(kind, tmp_path):
    command, _, write, _, summary = kind
    write(tmp_path)
    for label in ("baseline", "quant-w4a4"):
        folder = write(tmp_path, label, weights="elsewhere/model.safetensors")
        both(epochs=0)(folder)
        result(epochs_trained=0, epoch_chosen=0)(folder)
        (folder / "metrics.jsonl").unlink()
    command(tmp_path, tmp_path / "out")
    assert "Left out" not in (tmp_path / "out" / "report.md").read_text()
    assert len(pl.read_csv(tmp_path / "out" / summary)) == 3


def test_equal_results_of_one_run_count_once(kind, tmp_path):
    _, run, write, *_ = kind
    first, second = (write(tmp_path / name) for name in "ab")
    edit(second / "result.json", backend="reference")
    found = find(tmp_path, run)
    assert [run.folder for run in found.finished] == [first]
    assert found.left_out == [f"{second}: the same run as {first}, with the same numbers"]


@pytest.mark.parametrize("damage", [result(test_loss=0.5), epoch(loss=0.25)])
def test_different_results_of_one_run_are_all_left_out(kind, damage, tmp_path):
    _, run, write, *_ = kind
    first, second, third = (write(tmp_path / name) for name in "abc")
    damage(second)
    write(tmp_path, seed=1)
    found = find(tmp_path, run)
    assert [run.seeds for run in found.finished] == [(1, 1)]
    assert found.left_out == [
        f"{first}, {second}, {third}: the same run with different numbers; keep one"
    ]


def test_runs_on_other_action_units_are_another_study(tmp_path):
    write_action_units(tmp_path)
    write_action_units(tmp_path, seed=1, aus=(1, 2, 4))
    report.COMMANDS["table1"](tmp_path, tmp_path / "out")
    assert len(pl.read_csv(tmp_path / "out" / "table1.csv")) == 2


# Damage at random.

VALUES = [
    *(None, True, False, 0, 1, -1, 3, 0.5, 1.5, -0.0, 1e-320, 1e308, 2**63, 10**400, -(10**400)),
    *(float("nan"), float("inf"), -float("inf"), "", "0.5", "nan", "=1+1", "$x$", "a|b", "\ud800"),
    *("<b>", "\x00", "x" * 5000, "baseline", "quant-w4a4", "cifar10", "bp4d", "pair"),
    *([], [1], {}, {"1": 0.5}, [[[]]], {"a": {"b": None}}),
]
BYTES = [b"", b"\x00", b"\xff", b"{", b"}", b"[" * 5000, b'"', b",", b"\n", b"NaN", b"1e999", b"-"]


def mutate_values(generator, content):
    name = generator.choice([*content, "another"])
    inner = content.get(name)
    if isinstance(inner, dict) and inner and generator.random() < 0.5:
        mutate_values(generator, inner)
    elif generator.random() < 0.15:
        content.pop(name, None)
    elif generator.random() < 0.1 and name in content:
        content[generator.choice(["-1", "=a", "1", "label", "\ud800"])] = content.pop(name)
    else:
        content[name] = generator.choice(VALUES)


def mutate_lines(generator, epochs):
    change = generator.choice(["value", "value", "double", "drop", "swap"])
    place = generator.randrange(len(epochs))
    if change == "value":
        mutate_values(generator, epochs[place])
    elif change == "double":
        epochs.insert(place, epochs[place])
    elif change == "drop":
        del epochs[place]
    else:
        other = generator.randrange(len(epochs))
        epochs[place], epochs[other] = epochs[other], epochs[place]


def mutate_bytes(generator, content):
    for _ in range(generator.choice([1, 1, 2, 8])):
        place = generator.randrange(len(content) + 1)
        end = place + generator.choice([0, 0, 1, 1, 4, 60, len(content)])
        content = content[:place] + generator.choice(BYTES) + content[end:]
    return content


def mutate(generator, folder):
    path = folder / generator.choice(["config.json", "result.json", "metrics.jsonl"])
    if generator.random() < 0.3:
        path.write_bytes(mutate_bytes(generator, path.read_bytes()))
    elif path.name == "metrics.jsonl":
        epochs = [json.loads(line) for line in path.read_text().splitlines()]
        mutate_lines(generator, epochs)
        path.write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    else:
        content = json.loads(path.read_text())
        for _ in range(generator.choice([1, 1, 2])):
            mutate_values(generator, content)
        path.write_text(json.dumps(content))


def assert_valid(run):
    kinds = run.MEASURED | {name: Number(0, 1, "", nullable=True) for name in run.measured}
    kinds |= run.MEASURED
    assert all(kinds[name].accepts(value) for name, value in run.measured.items())
    assert [epoch["epoch"] for epoch in run.epochs] == [*range(1, len(run.epochs) + 1)]
    assert len(run.epochs) == run.measured["epochs_trained"]
    for name, kind in run.BY_EPOCH.items():
        assert all(kind.accepts(epoch[name]) for epoch in run.epochs)
    assert isinstance(run.label, str)
    assert all(isinstance(seed, int) and seed >= 0 for seed in run.seeds)


def fuzz(kind, folder, rounds, whole_reports):
    """Mutates a good run again and again; every so often makes a whole report of many."""
    command, run, write, *_ = kind
    good = write(folder / "good")
    write(folder / "runs", "quant-w4a4")
    accepted = 0
    for number in range(rounds):
        generator = random.Random(number)
        mutated = folder / "runs" / f"run{number % whole_reports}"
        shutil.rmtree(mutated, ignore_errors=True)
        shutil.copytree(good, mutated)
        mutate(generator, mutated)
        finished, unfinished, left_out, others = find(mutated, run)
        assert len(finished) + len(unfinished) + len(left_out) + others == 1
        assert all(reason.startswith(str(mutated)) for reason in left_out)
        for each in finished:
            assert_valid(each)
        accepted += len(finished)
        if number % whole_reports == whole_reports - 1:
            command(folder / "runs", folder / "out")
    assert 0 < accepted < rounds


def test_no_damage_at_random_stops_a_report(kind, tmp_path):
    fuzz(kind, tmp_path, rounds=300, whole_reports=150)
