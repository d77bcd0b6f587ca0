"""What single procedures promise, beyond their oracles."""

import pytest
import torch
from test_training import ends_bit_identical, numbers, trainer

from experiments import run
from experiments.methods.noisy_student import NoisyStudent, targets
from experiments.methods.train_longer import LargeBatches, ghosts
from experiments.training import data_parallel
from experiments.training.procedure import Batch
from experiments.training.schedules import phases

SMALL = {"epochs": 4, "train_size": 64, "batch_size": 32}


def trained(arguments, **options):
    """A run whose epochs are over, and what it told of them."""
    done = trainer(arguments, **SMALL | options)
    return done, numbers(done)


@pytest.mark.parametrize(
    ("epochs", "shares", "starts"),
    [
        (200, [30, 100, 70], [0, 30, 130]),
        (3, [30, 100, 70], [0, 1, 2]),
        (7, [1] * 5, [0, 1, 3, 4, 6]),
        (5, [97, 1, 1, 1], [0, 2, 3, 4]),
        (5, [1, 1, 1, 97], [0, 1, 2, 3]),
    ],
)
def test_phases_share_the_epochs(epochs, shares, starts):
    assert phases(epochs, shares) == starts


@pytest.mark.parametrize("method", ["swa --swa-start 0.25", "snapshot --snapshots 2", "qkd"])
def test_resumed_within_any_phase_ends_bit_identical(method):
    ends_bit_identical(f"--method {method}", 1, 3, **SMALL)


# SWA.


def test_swa_leaves_the_mean_of_the_weights_of_its_epochs():
    ours = trainer("--method swa --swa-start 0.5 --weight-bits 4", **SMALL)
    weights = []
    end_epoch = ours.procedure.end_epoch

    def seen(epoch):
        weights.append(ours.model.conv.weight.detach().clone())
        return end_epoch(epoch)

    ours.procedure.end_epoch = seen
    list(ours.epochs())
    mean = torch.stack(weights[1:]).mean(0)
    torch.testing.assert_close(ours.model.conv.weight.detach(), mean)
    # Two batches were seen after the last epoch, with the weights as they are.
    assert ours.model.bn.num_batches_tracked == 2
    assert ours.model.conv.input_quantizer.averaging_constant == 0.01


def test_swa_trains_on_as_if_nothing_were_averaged():
    ours, constant = (
        trained(arguments)[1]
        for arguments in ("--method swa --swa-lr 1 --swa-start 0.5", "--schedule constant")
    )
    assert [epoch["loss"] for epoch in ours] == [epoch["loss"] for epoch in constant]
    assert ours[0] == constant[0]
    assert ours[3]["scores"]["test_loss"] != constant[3]["scores"]["test_loss"]


# Snapshots.


def test_ensemble_of_snapshots_is_the_mean_of_the_networks_that_end_cycles():
    ours = trainer("--method snapshot --snapshots 2", **SMALL)
    inputs = ours.task.inputs("test", torch.arange(50))
    expected = []
    for metrics in ours.epochs():
        if metrics.epoch in (2, 4):
            with torch.inference_mode():
                expected.append(ours.model.eval()(inputs).softmax(1))
    with torch.inference_mode():
        ensemble = ours.procedure.predict(inputs).exp()
    torch.testing.assert_close(ensemble, torch.stack(expected).mean(0))
    assert ours.result()["parameters"] == 2 * trainer().result()["parameters"]


def test_one_cycle_and_one_snapshot_are_a_cosine_step_by_step():
    ours = trainer("--method snapshot --snapshots 1", **SMALL)
    rates = []
    step = ours.step

    def seen(*args, **kwargs):
        rates.append(ours.procedure.optimizers[0].param_groups[0]["lr"])
        return step(*args, **kwargs)

    ours.step = seen
    list(ours.epochs())
    steps = torch.arange(8, dtype=torch.float64)
    expected = 1e-3 * (1 + torch.cos(torch.pi * steps / 8)) / 2
    assert rates == pytest.approx(expected.tolist())


# Large batches.


def test_batches_no_larger_than_a_ghost_batch_change_nothing():
    ours, baseline = (
        trained(arguments) for arguments in ("--method train_longer --ghost-batch 32", "")
    )
    assert ours[1] == baseline[1]
    assert ours[0].passes == baseline[0].passes


def test_large_batches_train_as_often_as_small_ones():
    options = {"epochs": 2, "train_size": 96, "batch_size": 96}
    ours = trainer("--method train_longer --ghost-batch 32 --lr 0.001", **options)
    list(ours.epochs())
    assert ours.passes == (6, 6)
    assert ours.procedure.optimizers[0].param_groups[0]["lr"] == pytest.approx(
        1e-3 * 3**0.5 * 0.1  # the schedule falls once in two epochs
    )
    assert ours.model.bn.num_batches_tracked == 2 * 3 * 3
    states = ours.procedure.optimizers[0].state.values()
    assert {state["step"].item() for state in states} == {6}


def test_every_process_needs_a_part_of_every_ghost_batch(monkeypatch):
    options = SMALL | {"train_size": 33, "batch_size": 16}  # the last one has 17
    for processes, size in ((2, 2), (3, 4), (4, 8)):
        monkeypatch.setattr(data_parallel, "size", lambda processes=processes: processes)
        ours = trainer(f"--method train_longer --ghost-batch {size}", **options)
        batch = torch.arange(17)
        shares = [
            [len(ghost.indices) for ghost in ghosts(Batch(own, own, own, len(own) / 17), size)]
            for own in batch.tensor_split(processes)
        ]
        assert len({len(of_rank) for of_rank in shares}) == 1
        assert min(map(min, shares)) > 0
        assert isinstance(ours.procedure, LargeBatches)
    with pytest.raises(ValueError, match="--ghost-batch: got 2, which leaves a process without"):
        trainer("--method train_longer --ghost-batch 2", **options)


def test_default_batch_of_train_longer_is_larger_than_its_ghosts():
    config = run.parse(["--method", "train_longer"]).resolved(gpu=False, threads=1)
    assert config.batch_size == 512


# Noisy student.

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.1, 0.0, 0.0]])
GIVEN = torch.tensor([1, 2])


def test_student_learns_what_the_teacher_is_sure_of_beside_the_given_labels():
    options = NoisyStudent(student_confidence=0.5)
    soft = targets(LOGITS, GIVEN, options)
    p = LOGITS[0].softmax(0)
    expected = [[p[0] / 2, p[1] / 2 + 0.5, p[2] / 2], [0, 0, 1]]
    torch.testing.assert_close(soft, torch.tensor(expected))
    hard = targets(LOGITS, GIVEN, NoisyStudent(student_labels="hard", student_given=0.25))
    assert hard.tolist() == [[0.75, 0.25, 0], [0.75, 0, 0.25]]


def test_students_take_any_loss_that_takes_probabilities():
    ours, _ = trained("--method noisy_student --student-confidence 0 --loss sce")
    assert ours.procedure.targets.max() < 1


def test_student_of_a_teacher_that_is_sure_of_nothing_trains_as_usual():
    assert targets(LOGITS, GIVEN, NoisyStudent(student_confidence=1.01)) is None
    ours = trainer("--method noisy_student --students 1 --student-confidence 1.01", **SMALL)
    plain = trainer("", **SMALL | {"epochs": 2})
    assert numbers(ours)[:2] == numbers(plain)
    assert ours.procedure.targets is None


def test_student_is_a_new_network_and_its_labels_stay_as_the_teacher_told_them():
    ours = trainer("--method noisy_student --students 1", **SMALL)
    epochs = ours.epochs()
    next(epochs), next(epochs)
    teacher = {name: w.clone() for name, w in ours.model.state_dict().items()}
    next(epochs)
    told = ours.procedure.targets.clone()
    next(epochs)
    assert torch.equal(ours.procedure.targets, told)
    ours.model.load_state_dict(teacher)
    again = targets(
        ours._predict("trained"), ours.task.labels("trained"), ours.methods["noisy_student"]
    )
    assert torch.equal(again, told)
    # Two epochs of two steps: the optimizer was new.
    assert ours.procedure.optimizers[0].state[ours.model.conv.weight]["step"] == 4


# QKD.


def test_only_the_student_is_quantized_and_the_teacher_stays_in_the_end():
    ours = trainer("--method qkd --weight-bits 4", **SMALL)
    student, teacher = ours.procedure.networks
    assert hasattr(student.conv, "weight_quantizer")
    assert not hasattr(teacher.conv, "weight_quantizer")
    epochs = ours.epochs()
    for _ in range(3):
        next(epochs)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    next(epochs)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_both_study_by_themselves_first():
    ours = trained("--method qkd --weight-bits 4", epochs=3)
    alone = trained("--method quant", epochs=3)
    assert ours[1][0] == alone[1][0]
    assert ours[1][1]["loss"] != alone[1][1]["loss"]


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method qkd --epochs 2", "--epochs: got 2, takes at least 3 with qkd, one for each"),
        ("--method qkd --patience 2", "--method: got qkd with early_stopping, which can end"),
        ("--method swa --prune 0.5", "--method: got swa with prune, which leaves weights of"),
        ("--method snapshot --swa-start 0.5", "of which a run has one procedure"),
        ("--method defensive --weight-decay 0.1", "got defensive with weight_decay, which draws"),
        ("--method noisy_student --loss gce", "got noisy_student with gce, which takes labels of"),
        ("--snapshots 2 --snapshots-used 3", "-used: got 3, takes a whole number from 1 to 2"),
        ("--method snapshot --snapshots-used 6", "-used: got 6, takes a whole number from 1 to 5"),
        ("--method mutual_learning --dataset synthetic-au", "takes labels that are classes"),
        ("--swa-lr 2", "--swa-lr: takes effect with --method swa or --swa-start only"),
        ("--swa-start 0", "--swa-start: got 0.0, takes a share above 0, up to 1"),
        ("--ghost-batch 1", "--ghost-batch: got 1, takes a whole number from 2"),
        ("--students 2 --student-given 1.5", "--student-given: got 1.5, takes a share from 0 to"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run.parse(arguments.split())
