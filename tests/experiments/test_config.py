import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from experiments import methods, run
from experiments.config import RunConfig
from experiments.storage.run_names import run_name
from experiments.tasks.classification_options import ClassificationOptions


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method", "magic", "--method: got magic, takes one of baseline, .*, quant, "),
        ("dataset", "mnist", "--dataset: got mnist, takes one of digits, cifar10"),
        ("noise_kind", "pink", "--noise-kind: got pink, takes one of symmetric"),
        (
            "schedule",
            "zigzag",
            "--schedule: got zigzag, takes one of steps, cosine, exponential, constant",
        ),
        ("device", "tpu", "--device: got tpu, takes one of auto, cpu, cuda"),
        ("precision", "int8", "--precision: got int8, takes one of fp32, bf16"),
        ("backend", "tpu", "--backend: got tpu, takes one of auto, cpu"),
        ("noise", 1.5, "--noise: got 1.5, takes a share from 0 to 1"),
        ("noise", math.nan, "--noise: got nan"),
        ("validation", 1.0, "--validation: got 1.0, takes a share from 0 to less than 1"),
        ("train_size", 0, "--train-size: got 0, takes a whole number from 1"),
        ("epochs", -1, "--epochs: got -1, takes a whole number from 0"),
        ("epochs", 0, "--epochs: got 0 without --weights"),
        ("batch_size", -1, "--batch-size: got -1"),
        ("evaluate_every", 0, "--evaluate-every: got 0"),
        ("threads", 0, "--threads: got 0"),
        ("seed", -1, "--seed: got -1"),
        ("noise_seed", 2**63, "--noise-seed: got"),
        ("lr", 0.0, "--lr: got 0.0, takes a finite number above 0"),
        ("lr", math.inf, "--lr: got inf"),
        # What no machine can do, or no run needs.
        ("lr", 1e300, r"--lr: got 1e\+300, takes a finite number above 0, below 3.4e38"),
        ("lr", math.nan, "--lr: got nan"),
        ("epochs", 10**12, "--epochs: got 1000000000000, takes a whole number from 0 to 1,000,000"),
        ("batch_size", 10**18, "--batch-size: got 1000000000000000000, takes .* 1 to 65,536"),
        ("evaluate_every", 10**30, "--evaluate-every: got 10*, takes .* 1 to 1,000,000"),
        ("threads", 10**8, f"--threads: got 100000000, takes .* 1 to {16 * os.cpu_count():,}"),
        ("seed", 10**30, "--seed: got 10*, takes 0 to 2"),
        ("validation", math.nan, "--validation: got nan"),
    ],
)
def test_error_names_the_option_what_it_got_and_what_it_takes(option, value, message):
    with pytest.raises(ValueError, match="^" + message):
        RunConfig(**{option: value})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--noise-kind worst", "--noise-kind: got worst, which is for --dataset cifar10"),
        (
            "--dataset cifar10 --noise-kind worst --noise 0.2",
            "--noise: got 0.2 with human labels",
        ),
        ("--method early_stopping --validation 0", "--validation: got 0"),
        ("--patience 3 --validation 0", "--validation: got 0"),
        ("--cuda-graph --device cpu", "--cuda-graph: got --device cpu"),
        ("--dropout-where stages", "--dropout-where: takes effect with --method dropout"),
        ("--method quant --prune-steps 2", "--prune-steps: takes effect with --method prune"),
        ("--weight-bits 1", "--weight-bits: got 1, takes a whole number from 2 to 8"),
        ("--activation-bits 9", "--activation-bits: got 9"),
        ("--averaging-constant 0", "--averaging-constant: got 0"),
        ("--weight-decay -1", "--weight-decay: got -1"),
        ("--label-smoothing 2", "--label-smoothing: got 2"),
        ("--patience 0", "--patience: got 0, takes a whole number from 1"),
        ("--patience 1000001", "--patience: got 1000001, takes a whole number from 1 to 1,000,000"),
        ("--prune 0.5 --prune-steps 101", "--prune-steps: got 101, takes .* from 1 to 100"),
        ("--weight-decay 1e300", r"--weight-decay: got 1e\+300, takes a number from 0 to below"),
        ("--method baseline --weight-bits 4", "--method: got baseline with --weight-bits, which"),
        ("--method baseline --weight-decay 0", "--method: got baseline with --weight-decay"),
        ("--method baseline --patience 3", "--method: got baseline with --patience"),
        (
            "--method baseline --dataset synthetic-au --patience 3 --dropout 0.1",
            "--method: got baseline with --dropout",
        ),
        ("--loss gce --method sce", "--method: got gce with sce, of which a run has one loss"),
        ("--mixup 1 --method sam", "--method: got mixup with sam, of which a run has one proc"),
        ("--loss gce --label-smoothing 0.1", "--method: got gce with label_smoothing, whose"),
        ("--mixup 1 --loss elr", "--method: got mixup with elr, which remembers"),
        ("--dataset synthetic-au --loss sce", "--method: got sce with synthetic-au, takes labels"),
        ("--dataset synthetic-au --model resnet20", "--model: takes effect with digits, cifar10"),
        ("--forget-rate 0.2", "--forget-rate: takes effect with --method co_teaching only"),
        ("--loss cross_entropy --gce-q 0.7", "--loss: got cross_entropy with --gce-q, which"),
        ("--fold 2", "--fold: takes effect with synthetic-au, bp4d, disfa only"),
        ("--dataset disfa --fold 4", "--fold: got 4, takes 1, 2 or 3"),
        ("--dataset bp4d --noise 0.5", "--noise: got 0.5, takes no effect with bp4d"),
        ("--dataset bp4d --frames-per-subject 32", "--frames-per-subject: got 32, takes no"),
        ("--dataset disfa --noise-seed 1", "--noise-seed: got 1, takes no effect with disfa"),
        ("--dataset synthetic-au --strict", "--strict: got True, takes no effect with synthetic"),
        ("--dataset synthetic-au --cache-dir x", "--cache-dir: got x, takes no effect with synth"),
        ("--dataset bp4d --au-norm folded --dropout 0.1", "--au-norm: got folded with dropout"),
        ("--dataset synthetic-au --frames-per-subject 40", "--frames-per-subject: got 40, takes a"),
        ("--dataset synthetic-au --noise-kind pair", "--noise-kind: got pair with faces, takes"),
        ("--dataset synthetic-au --noise -1", "--noise: got -1.0, takes a finite number from 0"),
        ("--dataset synthetic-au --noise 1e300", r"--noise: got 1e\+300, takes .* to 1,000"),
        ("--dataset synthetic-au --train-size 9", "--train-size: got 9 with faces"),
        ("--dataset synthetic-au --batch-size 1", "--batch-size: got 1 with faces, takes 2"),
        ("--dataset synthetic-au --validation 0", "--validation: got 0"),
        ("--dataset synthetic-au --image-size 16", "--image-size: got 16, takes a whole number"),
        ("--dataset bp4d --image-size 1025", "--image-size: got 1025, takes .* from 32 to 1,024"),
        (
            "--dataset bp4d --au-head shared --au-norm folded",
            "--au-norm: got folded with --au-head",
        ),
        ("--dataset bp4d --encoder small --pretrained", "--pretrained: got --encoder small"),
        ("--noise-kind annotators", "--noise-kind: got annotators, which is for --dataset"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(ValueError, match="^" + message):
        run.parse(arguments.split())


def resolved(arguments, gpu=False):
    return run.parse(arguments.split()).resolved(gpu=gpu, threads=3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"epochs": 200, "batch_size": 128, "lr": 1e-3, "schedule": "steps", "threads": 1}),
        ("", {"noise": 0.4, "noise_kind": "symmetric", "validation": 0}),
        ("--dataset cifar10", {"threads": 3}),
        (
            "--dataset synthetic-au",
            {"epochs": 20, "batch_size": 64, "lr": 1e-3, "schedule": "cosine"},
        ),
        ("--dataset synthetic-au", {"noise": 1.0, "noise_kind": "annotators", "validation": 0.2}),
        ("--dataset bp4d --encoder inception_v3", {"epochs": 10, "batch_size": 64, "lr": 1e-4}),
        ("--dataset bp4d", {"noise": None, "noise_kind": "annotators"}),
    ],
)
def test_defaults_suit_the_data(arguments, expected):
    config = resolved(arguments)
    assert {name: getattr(config, name) for name in expected} == expected


def test_defaults_are_filled_in_only_where_nothing_was_said():
    given = RunConfig(
        epochs=5, threads=1, noise=0.0, noise_kind="pair", validation=0.25, batch_size=3, lr=0.1
    )
    given = replace(given, schedule="constant", device="cpu")
    of_tasks = replace(given.of_tasks, classification=ClassificationOptions("resnet18_cifar"))
    given = replace(given, of_tasks=of_tasks)
    assert given.resolved(gpu=False, threads=3) == given
    for dataset in ("digits", "synthetic-au"):
        config = resolved(f"--dataset {dataset} --method quant")
        assert config.resolved(gpu=True, threads=9) == config


@pytest.mark.parametrize(
    ("dataset", "gpu", "encoder", "size"),
    [
        ("synthetic-au", False, "small", 64),
        ("synthetic-au", True, "small", 64),
        ("bp4d", False, "small", 64),
        ("disfa", True, "inception_v3", 299),
    ],
)
def test_encoder_suits_the_faces_and_the_machine(dataset, gpu, encoder, size):
    faces = resolved(f"--dataset {dataset}", gpu).task_options
    assert (faces.encoder, faces.image_size, faces.fold) == (encoder, size, 1)
    assert (faces.au_head, faces.au_norm) == ("per-au", "per-au")


def test_pictures_too_small_for_the_encoder_are_refused():
    with pytest.raises(ValueError, match="--image-size: got 64, takes a whole number from 75"):
        resolved("--dataset synthetic-au --encoder inception_v3 --image-size 64")


def test_best_epoch_on_held_out_subjects_is_kept_whatever_the_method():
    baseline = resolved("--dataset synthetic-au --epochs 7")
    assert baseline.options.early_stopping.patience == 7
    assert baseline.label == "baseline"
    same = resolved("--dataset synthetic-au --epochs 7 --method early_stopping")
    assert same.identity() == baseline.identity()
    stopped = resolved("--dataset synthetic-au --epochs 20 --method early_stopping")
    assert stopped.label == "early-stopping10"
    quant = resolved("--dataset synthetic-au --method quant --patience 3")
    assert quant.label == "quant-w4a4+early-stopping3"


def test_options_of_faces_are_in_the_identity_of_faces_only():
    digits, faces = (resolved(f"--dataset {name}").identity() for name in ("digits", "disfa"))
    of_faces = set(faces) - set(digits)
    assert of_faces == {
        "fold",
        "encoder",
        "pretrained",
        "au_head",
        "au_norm",
        "image_size",
        "frames_per_subject",
        "patience",
    }


def test_recording_steps_takes_a_gpu():
    with pytest.raises(ValueError, match="--cuda-graph: got a machine without a GPU"):
        resolved("--cuda-graph")


def test_human_labels_bring_their_noise():
    assert (
        RunConfig(dataset="cifar10", noise_kind="worst").resolved(gpu=False, threads=1).noise
        is None
    )


def test_early_stopping_holds_samples_out():
    assert RunConfig(method="early_stopping").resolved(gpu=False, threads=1).validation == 0.1


def test_a_given_option_turns_its_method_on_beside_another():
    config = run.parse(["--method", "quant", "--weight-decay", "0.5"])
    assert list(config.methods) == ["quant", "weight_decay"]
    assert config.label == "quant-w4a4+weight-decay0.5"
    assert run.parse([]).label == "baseline"


def test_identity_holds_what_changes_the_numbers():
    baseline, quant = RunConfig().identity(), RunConfig(method="quant").identity()
    assert set(quant) - set(baseline) == {"weight_bits", "activation_bits", "averaging_constant"}
    assert {"seed", "noise", "noise_seed", "threads", "lr", "epochs"} < set(baseline)
    assert not {"out", "backend", "data_dir", "download", "evaluate_every"} & set(quant)


def test_one_combination_has_one_identity():
    by_method = run.parse(["--method", "quant", "--dropout", "0.1", "--out", "here"])
    by_options = run.parse(["--method", "dropout", "--weight-bits", "4", "--out", "there"])
    assert by_method.identity() == by_options.identity()
    assert by_method.out == Path("here")


@pytest.mark.parametrize(
    ("arguments", "method", "on"),
    [
        ("", "baseline", []),
        ("--method baseline", "baseline", []),
        ("--weight-bits 4", "baseline", ["quant"]),
        ("--method quant --dropout 0.1", "quant", ["quant", "dropout"]),
        # Early stopping is part of every run on faces.
        ("--dataset synthetic-au --method baseline", "baseline", ["early_stopping"]),
        ("--dataset synthetic-au --method baseline --patience 3", "baseline", ["early_stopping"]),
    ],
)
def test_baseline_is_what_is_left_where_no_method_is_on(arguments, method, on):
    config = resolved(arguments)
    assert (config.flat()["method"], list(config.methods)) == (method, on)


def test_a_method_without_options_is_on_under_its_name(monkeypatch):
    @dataclass(frozen=True)
    class Plain(methods.Method):
        label = "plain"

    options = SimpleNamespace(plain=Plain())
    monkeypatch.setattr(methods, "METHODS", {"plain": Plain})
    assert methods.chosen({"plain"}, options) == {"plain": Plain()}
    assert methods.chosen({None}, options) == {}


@pytest.mark.parametrize("arguments", ["", "--method quant", "--dataset synthetic-au"])
def test_runs_on_a_gpu_have_another_name(arguments):
    def name(device, gpu):
        config = resolved(f"{arguments} --device {device}", gpu)
        return config.device, run_name(config, {"data": "x"})

    assert name("auto", gpu=False) == name("cpu", gpu=False) == name("cpu", gpu=True)
    assert name("auto", gpu=True) == name("cuda", gpu=True)
    assert (name("auto", gpu=False)[0], name("auto", gpu=True)[0]) == ("cpu", "cuda")
    assert name("auto", gpu=False)[1] != name("auto", gpu=True)[1]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ("", "digits-baseline-noise0.4-seed0-4aa50f78"),
        ("--weight-bits 4", "digits-quant-w4a4-noise0.4-seed0-bc109300"),
        (
            "--method dropout --seed 7 --noise 0.2 --validation 0.1",
            "digits-dropout0.1-noise0.2-validation0.1-seed7-3d975715",
        ),
        ("--dataset bp4d --threads 2", "bp4d-baseline-annotators-fold1-seed0-af17911a"),
    ],
)
def test_runs_on_a_cpu_keep_their_digests_for_ever(arguments, name):
    """Or else nobody finds the results that there are."""
    assert run_name(resolved(arguments), {"data": "x"}) == name


def test_an_option_that_came_later_is_left_out_at_its_legacy_value():
    """And only there: whatever the default becomes, the names of older runs stay."""
    plain = resolved("--weight-bits 4")
    assert plain.flat()["model"] == "resnet20"
    assert "model" not in plain.identity()
    assert resolved("--weight-bits 4 --model resnet20").identity() == plain.identity()
    other = resolved("--weight-bits 4 --model resnet18_cifar").identity()
    assert other == plain.identity() | {"model": "resnet18_cifar"}


def test_a_loss_and_the_method_of_its_name_are_the_same_run():
    by_loss, by_method, by_option = (
        resolved(o) for o in ("--loss gce", "--method gce", "--gce-q 0.7")
    )
    assert by_loss.identity() == by_method.identity() == by_option.identity()
    assert {c.flat()["loss"] for c in (by_loss, by_method, by_option)} == {"gce"}
    assert resolved("--loss cross_entropy").identity() == resolved("").identity()
