import math
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import run
from experiments.config import RunConfig


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("method", "magic", "--method: got magic, takes one of baseline, quant"),
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
        ("--dataset synthetic-au --train-size 9", "--train-size: got 9 with faces"),
        ("--dataset synthetic-au --validation 0", "--validation: got 0"),
        ("--dataset synthetic-au --image-size 16", "--image-size: got 16, takes a whole number"),
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
    given = replace(given, schedule="constant")
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
    faces = resolved(f"--dataset {dataset}", gpu).faces
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
