"""How the folders of runs are named, chosen and found again."""

import dataclasses
import json
import sys

import pytest
import torch

from experiments import report, run
from experiments.config import RunConfig
from experiments.methods import METHODS
from experiments.storage.run_names import folder_of, run_name, same_run

QUICK = "--train-size 16 --batch-size 16 --epochs 1 --threads 1"


def resolved(arguments):
    return run.parse(arguments.split()).resolved(gpu=False, threads=1)


def middle(arguments):
    """The name without data set, label, seed and digest."""
    config = resolved(arguments)
    name = run_name(config, {})
    return name.removeprefix(f"{config.dataset}-{config.label}-").rpartition("-seed")[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("", "noise0.4"),
        # As usual, though given.
        ("--epochs 200 --lr 0.001 --schedule steps --batch-size 128 --model resnet20", "noise0.4"),
        ("--noise-kind asymmetric", "asymmetric-noise0.4"),
        ("--noise-kind pair --noise 0.25", "pair-noise0.25"),
        ("--dataset cifar10 --noise-kind worst", "worst"),
        ("--train-size 64 --epochs 3", "noise0.4-images64-epochs3"),
        ("--lr 0.01 --schedule cosine", "noise0.4-lr0.01-schedule-cosine"),
        ("--batch-size 32 --no-augment", "noise0.4-batch32-no-augment"),
        ("--noise-seed 3 --precision bf16", "noise0.4-noise-seed3-precision-bf16"),
        ("--model resnet18_cifar", "noise0.4-model-resnet18_cifar"),
        ("--noise-over all --train-size 64", "noise0.4-images64-noise-over-all"),
        ("--weights w --epochs 0", "noise0.4-weights-epochs0"),
        ("--patience 5", "noise0.4"),
        ("--patience 5 --validation 0.2", "noise0.4-validation0.2"),
        ("--method quant --averaging-constant 0.5", "noise0.4-averaging-constant0.5"),
        ("--weight-bits 2", "noise0.4"),  # in the label
        ("--method hash_knn --hash-suspects tell", "noise0.4"),
        ("--method slimmable --slim-widths 1 0.5", "noise0.4"),
        ("--method adabits --adabits-bits 5 --adabits-most 6", "noise0.4"),
        ("--dataset synthetic-au", "noise1-fold1"),
        ("--dataset synthetic-au --fold 3 --au-norm shared", "noise1-fold3-au-norm-shared"),
        ("--dataset synthetic-au --encoder small --image-size 64", "noise1-fold1"),
        ("--dataset synthetic-au --image-size 32", "noise1-fold1-image-size32"),
        ("--dataset bp4d --strict --cache-dir x", "annotators-fold1"),
        # No numbers depend on these.
        ("--out x --evaluate-every 5 --backend reference --name mine", "noise0.4"),
    ],
)
def test_a_name_tells_what_is_not_as_usual(arguments, told):
    assert middle(arguments) == told


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_a_method_is_in_the_name(name):
    """In the label or behind it."""
    plain = RunConfig(method=name).resolved(gpu=False, threads=1)
    method = plain.methods[name]
    for field in dataclasses.fields(method):
        value = getattr(method, field.name)
        if isinstance(value, bool):
            other = not value
        elif isinstance(value, float) and value > 0:
            other = value * 0.99
        else:
            continue
        try:
            changed = dataclasses.replace(method, **{field.name: other})
        except ValueError:
            continue
        options = dataclasses.replace(plain.options, **{name: changed})
        names = [
            run_name(dataclasses.replace(plain, options=o), {}) for o in (plain.options, options)
        ]
        assert names[0].rpartition("-")[0] != names[1].rpartition("-")[0], field.name


def test_names_are_short_and_plain():
    every = [
        "--noise-kind instance --noise 0.123456 --train-size 1000 --validation 0.25 --epochs 99",
        "--batch-size 77 --lr 0.0123 --schedule constant --no-augment --precision bf16 --compile",
        "--weight-bits 3 --dropout 0.2 --prune 0.5 --label-smoothing 0.3 --weight-decay 0.7",
        "--loss elr --method sam --model resnet18_cifar --noise-seed 12345",
        f"--seed {2**62}",
    ]
    name = run_name(resolved(" ".join(every)), {"data": "x"})
    assert len(name) == 150
    assert name.startswith("digits-quant-w3a4+dropout0.2")
    assert f"-seed{2**62}-" in name
    targets = "--method quantizable --quantizable-targets"
    spaced = run_name(run.parse([*targets.split(), "labels of all"]).resolved(False, 1), {})
    assert " " not in spaced


def test_the_digest_at_the_end_is_the_run():
    assert same_run("anything-89abcdef", "digits-seed0-89abcdef")
    assert not same_run("digits-seed0-89abcdee", "digits-seed0-89abcdef")
    assert not same_run(None, "digits-seed0-89abcdef")


def test_a_run_is_found_under_its_earlier_name(tmp_path):
    asked = run.prepare(run.parse([*QUICK.split(), "--out", str(tmp_path)]))
    assert asked.path.name == asked.identity.name
    digest = asked.identity.name.rpartition("-")[2]
    earlier = tmp_path / f"digits-baseline-noise0.4-seed0-{digest}"
    for folder in (
        earlier,
        tmp_path / f"digits-baseline-noise0.4-seed1-{digest}",
        tmp_path / digest,
    ):
        folder.mkdir()
    assert run.prepare(asked.config).path == earlier
    run.execute(run.prepare(asked.config), torch.device("cpu"))
    assert (earlier / "result.json").exists()
    assert not asked.path.exists()
    assert "finished already" in run.execute(run.prepare(asked.config), torch.device("cpu"))


def test_a_finished_run_of_an_earlier_name_is_believed(tmp_path):
    """As its result has it, and its checkpoint."""
    asked = run.prepare(run.parse([*QUICK.split(), "--out", str(tmp_path)]))
    run.execute(asked, torch.device("cpu"))
    digest = asked.identity.name.rpartition("-")[2]
    earlier = asked.path.rename(tmp_path / f"digits-baseline-noise0.4-seed0-{digest}")
    result = json.loads((earlier / "result.json").read_text())
    (earlier / "result.json").write_text(json.dumps(result | {"run": earlier.name}))
    assert "finished already" in run.execute(run.prepare(asked.config), torch.device("cpu"))


def test_what_is_no_folder_is_no_earlier_run(tmp_path):
    (tmp_path / "a-seed0-12345678").touch()
    assert folder_of(tmp_path, "b-seed0-12345678") == tmp_path / "b-seed0-12345678"
    assert folder_of(tmp_path / "nowhere", "b-seed0-1").name == "b-seed0-1"
    assert folder_of(tmp_path / "a-seed0-12345678", "b-seed0-1").name == "b-seed0-1"


# The user's own names.


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)

    def call(arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *QUICK.split(), *arguments.split()])
        status = run.main()
        shown = capsys.readouterr()
        return status, shown.out, shown.err

    return call


def test_a_name_is_the_folders(main, tmp_path):
    status, output, errors = main("--name mine")
    assert (status, errors) == (0, "")
    assert output.endswith("written to runs/mine\n")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["mine"]
    config = json.loads((tmp_path / "runs/mine/config.json").read_text())
    assert config["name"] == "mine"
    assert "finished already" in main("--name mine")[1]
    status, output, _ = main("")  # not part of the identity
    result, named = (
        json.loads(path.read_text()) for path in sorted(tmp_path.glob("runs/*/result.json"))
    )
    assert result["run"] == named["run"]
    assert main("--name mine --restart")[0] == 0


@pytest.mark.parametrize("restart", ["", "--restart"])
def test_the_name_of_another_run_is_refused(main, tmp_path, restart):
    main("--name mine")
    before = {path.name: path.read_bytes() for path in tmp_path.glob("runs/mine/*.json*")}
    status, _, errors = main(f"--name mine --lr 0.5 --method quant --seed 7 {restart}")
    assert status == 2
    assert errors.startswith("error: --name: runs/mine/config.json: of another run: ")
    for told in ("got 0.001 as lr, takes 0.5", "got 0 as seed, takes 7", "as weight_bits, takes 4"):
        assert told in errors
    assert errors.endswith("; choose another name, or remove that folder\n")
    assert {path.name: path.read_bytes() for path in tmp_path.glob("runs/mine/*.json*")} == before


@pytest.mark.parametrize("restart", ["", "--restart"])
def test_a_folder_that_is_no_runs_is_refused(main, tmp_path, restart):
    theirs = tmp_path / "runs" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_text("precious")
    status, _, errors = main(f"--name theirs {restart}")
    assert status == 2
    assert errors.startswith("error: --name: runs/theirs: is no run's folder: it has model.safet")
    assert (theirs / "model.safetensors").read_text() == "precious"


def test_the_same_options_with_other_data_are_another_run(main, tmp_path):
    main("--name mine")
    path = tmp_path / "runs" / "mine" / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"run": "digits-seed0-00000000"}))
    status, _, errors = main("--name mine --restart")
    assert status == 2
    assert "of another run: got digits-seed0-00000000 as run" in errors


BAD = ["", " ", ".", "..", ".hidden", "a/b", "/tmp/x", "a\\b", "-x", "a\nb", "x" * 151, "ä" * 76]
BAD += ["a ", "config.json", "runs.zip", "result.json", *(kind.folder for kind in report.REPORTS)]


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_plain_name_is_refused(name):
    with pytest.raises(ValueError, match=r"^--name: got .*, takes a ") as error:
        RunConfig(name=name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["mine", "with space", "ä" * 75, "x" * 150, "a.b", "50%", "-".join("ab")]
)
def test_plain_names_are_taken(name):
    assert run.parse([f"--name={name}"]).name == name
