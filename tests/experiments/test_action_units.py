import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from experiments import run, tasks
from experiments.data.au import UNKNOWN, Frames
from experiments.methods import METHODS
from experiments.tasks.action_units import ActionUnits, split
from experiments.tasks.au_loss import au_loss
from experiments.tasks.f1 import best_thresholds, f1
from experiments.training.loop import Trainer
from experiments.training.procedure import batch_sizes

CPU = torch.device("cpu")
TINY = "--dataset synthetic-au --frames-per-subject 32 --image-size 32 --threads 1 --epochs 2"


def config(arguments=""):
    return run.parse(f"{TINY} {arguments}".split()).resolved(gpu=False, threads=1)


def trainer(arguments=""):
    options = config(arguments)
    return Trainer(options, tasks.make(options, options.task.read(options), CPU), CPU)


@pytest.fixture(scope="module")
def frames():
    return ActionUnits.read(config())


# Who is trained on, and who is not.


@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_subject_is_in_two_parts_of_a_fold(frames, fold, seed):
    parts = split(frames, fold, 0.2, seed)
    subjects = {name: set(frames.subject[indices].tolist()) for name, indices in parts.items()}
    assert not subjects["trained"] & subjects["held_out"]
    assert not subjects["trained"] & subjects["test"]
    assert not subjects["held_out"] & subjects["test"]
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(frames.subject)))
    assert frames.part[parts["test"]].unique().tolist() == [3 - fold]
    assert len(subjects["held_out"]) == round(0.2 * (41 - len(subjects["test"])))


def test_every_frame_is_tested_in_one_fold(frames):
    tested = torch.cat([split(frames, fold, 0.2, 0)["test"] for fold in (1, 2, 3)])
    assert sorted(tested.tolist()) == list(range(len(frames.subject)))


def test_seeds_hold_out_other_subjects_of_the_same_fold(frames):
    first, other = (split(frames, 1, 0.2, seed) for seed in (0, 1))
    assert torch.equal(first["test"], other["test"])
    assert not torch.equal(first["held_out"], other["held_out"])


def test_share_that_holds_out_no_subject_is_refused(frames):
    with pytest.raises(ValueError, match=r"--validation: got 0\.01, which holds out 0 of 2. subj"):
        split(frames, 1, 0.01, 0)


def test_methods_hold_out_the_same_subjects_and_start_from_the_same_weights():
    baseline, quant = trainer(), trainer("--method quant")
    for part in ("trained", "held_out", "test"):
        assert torch.equal(baseline.task.parts[part], quant.task.parts[part])
    for expected, actual in zip(baseline.model.parameters(), quant.model.parameters(), strict=True):
        assert torch.equal(expected, actual)


# The loss.


def test_loss_is_its_formula():
    logits = torch.tensor([[0.0, math.log(3)], [-math.log(3), 0.0]])
    labels = torch.tensor([[1.0, 0.0], [torch.nan, 0.5]])
    weights = torch.tensor([2.0, 0.5])

    def of(y, p):
        entropy = -(y * math.log(p) + (1 - y) * math.log(1 - p))
        return entropy + 0.5 * (1 - (2 * y * p + 1) / (y * y + p * p + 1))

    expected = (2 * of(1, 0.5) + 0.5 * of(0, 0.75) + 0.5 * of(0.5, 0.5)) / 4
    assert au_loss(logits, labels, weights).item() == pytest.approx(expected, rel=1e-6)


def test_unknown_labels_have_no_gradient():
    logits = torch.randn(5, 3, requires_grad=True)
    labels = torch.ones(5, 3)
    labels[1, 2] = labels[4, 0] = torch.nan
    au_loss(logits, labels, torch.ones(3)).backward()
    assert ((logits.grad == 0) == labels.isnan()).all()
    assert au_loss(logits, torch.full((5, 3), torch.nan), torch.ones(3)) == 0


def test_losses_of_parts_of_a_batch_add_up():
    logits, labels = torch.randn(7, 3), (torch.rand(7, 3) > 0.5).float()
    labels[0] = torch.nan
    weights = torch.tensor([0.5, 1.0, 1.5])
    parts = [au_loss(logits[part], labels[part], weights) for part in (slice(2), slice(2, 7))]
    whole = au_loss(logits, labels, weights)
    torch.testing.assert_close(parts[0] * 2 / 7 + parts[1] * 5 / 7, whole)


def test_weights_are_those_of_the_training_frames(frames):
    task = trainer("--fold 2").task
    trained = frames.given[task.parts["trained"]].float().mean(0)
    expected = 12 / trained / (1 / trained).sum()
    torch.testing.assert_close(task.weights, expected)


# The scores.


def test_f1_is_its_formula_over_known_labels():
    labels = torch.tensor([[1, 0], [1, 1], [0, UNKNOWN], [1, 0]], dtype=torch.int8)
    probabilities = torch.tensor([[0.5, 0.1], [0.4, 0.2], [0.9, 0.9], [0.8, 0.0]])
    # First: 2 hits, 1 false alarm, 1 miss. Second: 1 miss, and what is unknown does not count.
    assert f1(probabilities, labels).tolist() == pytest.approx([2 / 3, 0.0])
    thresholds = torch.tensor([0.3, 0.2])
    assert f1(probabilities, labels, thresholds).tolist() == pytest.approx([6 / 7, 1.0])


def test_best_thresholds_have_the_highest_f1():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(200, 3, generator=generator)
    labels = (probabilities + 0.3 * torch.randn(200, 3, generator=generator) > 0.6).to(torch.int8)
    labels[torch.rand(200, 3, generator=generator) < 0.1] = UNKNOWN
    chosen = best_thresholds(probabilities, labels)
    best = f1(probabilities, labels, chosen)
    for threshold in torch.linspace(0.01, 0.99, 99):
        assert (f1(probabilities, labels, threshold) <= best + 1e-5).all()


def test_threshold_stays_at_a_half_where_none_is_better():
    labels = torch.zeros(4, 2, dtype=torch.int8)
    assert best_thresholds(torch.rand(4, 2), labels).tolist() == pytest.approx([0.5, 0.5])


def small_frames(truth):
    """Three subjects of two frames and two AUs, a subject in each part, and a second one in the
    first two, so that one can be held out."""
    subject = torch.arange(5).repeat_interleave(2)
    given = torch.tensor([[1, 0], [0, 1]], dtype=torch.int8).repeat(5, 1)
    return Frames(
        name="made up",
        aus=(1, 2),
        images=torch.zeros(10, 32, 32, 3, dtype=torch.uint8)
        + torch.arange(10, dtype=torch.uint8).view(-1, 1, 1, 1),
        row=torch.arange(10),
        given=given,
        truth=truth,
        subject=subject,
        subjects=tuple("abcde"),
        part=torch.tensor([0, 0, 1, 1, 2]).repeat_interleave(2),
        checksum="",
    )


def logits_that_say(answers):
    return (answers.float() - 0.5) * 20


def test_scores_are_against_annotators_and_truth_and_count_what_is_memorised():
    truth = torch.ones(10, 2, dtype=torch.int8)
    task = ActionUnits(config("--validation 0.25"), small_frames(truth), CPU)
    given = {part: task.frames.given[indices] for part, indices in task.parts.items()}
    result = task.result(
        *(logits_that_say(given[part]) for part in ("trained", "held_out", "test"))
    )
    assert result["test_f1"] == result["validation_f1"] == result["train_f1"] == 1
    assert result["test_f1_truth"] == pytest.approx(2 / 3)  # one of two found, no false alarm
    assert result["test_f1_per_au"] == {"1": 1.0, "2": 1.0}
    assert result["wrong_labels"] == 0.5
    assert (result["train_right_fitted"], result["train_wrong_fitted"]) == (1, 1)
    honest = task.result(
        *(logits_that_say(torch.ones_like(given[part])) for part in ("trained", "held_out", "test"))
    )
    assert honest["test_f1_truth"] == 1
    assert (honest["train_right_fitted"], honest["train_wrong_fitted"]) == (1, 0)
    assert honest["test_f1_std"] == 0


def test_without_truth_its_scores_are_none():
    task = ActionUnits(config("--validation 0.25"), small_frames(None), CPU)
    logits = [torch.zeros(task.count(part), 2) for part in ("trained", "held_out", "test")]
    result = task.result(*logits)
    for name in ("wrong_labels", "test_f1_truth", "test_f1_truth_per_au", "train_wrong_fitted"):
        assert result[name] is None
    scores = task.epoch_scores(task.predicted(logits[0]), logits[1], None)
    assert scores["test_f1"] is scores["test_f1_truth"] is scores["train_wrong_fitted"] is None
    assert "true" not in task.label_arrays()


def test_pictures_and_labels_stay_together():
    task = ActionUnits(config("--validation 0.25 --no-augment"), small_frames(None), CPU)
    count = task.count("trained")
    order = torch.arange(count).flip(0)
    views = task.draw(count, torch.Generator())
    for samples, batch in task.batches(order, views, [2, count - 2]):
        images, _, given = batch
        indices = task.parts["trained"][samples]
        assert images[:, 0, 0, 0].tolist() == indices.tolist()
        assert torch.equal(given, task.frames.given[indices])
        inputs, labels = task.pair(*batch)
        assert torch.equal(inputs, task.inputs("trained", samples))
        assert torch.equal(labels, given.float())


def test_empty_part_is_told():
    frames = replace(small_frames(None), part=torch.tensor([0, 0, 1, 1, 1]).repeat_interleave(2))
    with pytest.raises(ValueError, match="--fold: got 1, of which made up has no test frame"):
        split(frames, 1, 0.25, 0)
    with pytest.raises(ValueError, match="--fold: got 2, of which made up has no training frame"):
        split(replace(frames, part=torch.ones(10)), 2, 0.25, 0)


# The whole path.


@pytest.mark.parametrize(
    "method", ["baseline", *(name for name, m in METHODS.items() if "answers" in m.LABELS)]
)
def test_every_method_learns(method):
    work = trainer(f"--method {method} --batch-size 32 --epochs 3")
    losses = [metrics.loss for metrics in work.epochs()]
    assert losses[-1] < losses[0]
    work.finish()
    result = work.result()
    assert 0 < result["test_f1"] < 1
    trained = result.get("float_validation_f1", result["validation_f1"])  # before it is quantized
    assert trained == max(m.validation_score for m in work.history)


@pytest.mark.parametrize(
    "arguments",
    [
        "--au-norm shared",
        "--au-norm folded --weight-bits 8 --activation-bits 8",  # at 4 bits it does not
        "--au-head shared",
        "--noise 0",
    ],
)
def test_every_network_learns_quantized(arguments):
    work = trainer(f"--method quant --batch-size 32 {arguments}")
    first, last = [metrics.loss for metrics in work.epochs()]
    assert last < first


def test_resumed_run_ends_bit_identical():
    options = "--method quant --dropout 0.2 --prune 0.5 --epochs 3"
    whole, interrupted, resumed = (trainer(options) for _ in range(3))
    list(whole.epochs())
    next(interrupted.epochs())
    resumed.load_state_dict(interrupted.state_dict())
    list(resumed.epochs())
    assert [m.scores for m in resumed.history] == [m.scores for m in whole.history]
    assert resumed.finish() == whole.finish()
    assert resumed.result() == whole.result()


def test_decay_of_the_recipe_falls_and_that_of_a_method_stays():
    recipe, method = trainer(), trainer("--method weight_decay")
    for work in (recipe, method):
        list(work.epochs())
    (weights, others), (decayed, _) = (
        recipe.procedure.optimizers[0].param_groups,
        method.procedure.optimizers[0].param_groups,
    )
    assert weights["weight_decay"] == pytest.approx(1e-4 * 0.5)  # half-way along the cosine
    assert others["weight_decay"] == 0
    assert decayed["weight_decay"] == 0.01


def test_annotators_change_with_the_noise_seed_and_the_pictures_do_not():
    (first, other, true) = (
        ActionUnits.read(config(f"--noise {noise} --noise-seed {seed}"))
        for noise, seed in ((1, 0), (1, 1), (0, 0))
    )
    assert torch.equal(first.images, other.images)
    assert torch.equal(first.truth, true.given)
    assert not torch.equal(first.given, other.given)
    assert len({first.checksum, other.checksum, true.checksum}) == 3


@pytest.mark.parametrize("known", [True, False])
def test_the_truth_of_those_that_are_trained_on(known, frames):
    frames = frames if known else replace(frames, truth=None)
    task = ActionUnits(config(), frames, CPU)
    if known:
        assert torch.equal(task.truth(), frames.truth[task.parts["trained"]])
    else:
        assert task.truth() is None


def test_run_writes_labels_scores_and_options(tmp_path):
    prepared = run.prepare(run.parse([*TINY.split(), "--out", str(tmp_path), "--fold", "3"]))
    line = run.execute(prepared, CPU)
    assert line.startswith("test F1 ")
    scores = json.loads(next(tmp_path.glob("*/result.json")).read_text())
    for name, against in (("test_f1", "annotators"), ("test_f1_truth", "truth")):
        assert f"{scores[name]:.2%} against the {against}" in line
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("synthetic-au-baseline-noise1-fold3-epochs2-")
    result = json.loads((folder / "result.json").read_text())
    assert result["fold"] == 3
    assert result["epoch_chosen"] in (1, 2)
    assert list(result["test_f1_per_au"]) == [str(au) for au in prepared.data.aus]
    assert 0.05 < result["wrong_labels"] < 0.2
    assert json.loads((folder / "config.json").read_text())["encoder"] == "small"
    with np.load(folder / "noisy_labels.npz") as arrays:
        assert (arrays["given"] == prepared.data.given.numpy()[arrays["indices"]]).all()
        assert (arrays["true"] == prepared.data.truth.numpy()[arrays["indices"]]).all()
    assert run.execute(prepared, CPU).startswith("finished already, test F1 ")


def test_weights_are_not_tested_on_who_they_were_trained_on(tmp_path):
    options = [*TINY.split(), "--out", str(tmp_path)]
    run.execute(run.prepare(run.parse([*options, "--fold", "2"])), CPU)
    (weights,) = tmp_path.glob("*/model.safetensors")
    evaluate = [*options, "--epochs", "0", "--weights", str(weights)]
    assert run.execute(run.prepare(run.parse([*evaluate, "--fold", "2"])), CPU)
    for other in (["--fold", "1"], ["--fold", "2", "--seed", "1"]):
        with pytest.raises(ValueError, match="would be tested on samples it was trained on"):
            run.execute(run.prepare(run.parse([*evaluate, *other])), CPU)


def test_single_face_that_is_left_joins_the_batch_before():
    assert batch_sizes(9, 4) == [4, 5]
    assert batch_sizes(8, 4) == [4, 4]
    assert batch_sizes(10, 4) == [4, 4, 2]
    assert batch_sizes(1, 4) == [1]
    assert batch_sizes(2, 1) == [1, 1]
    count = trainer().task.count("trained")
    assert len(list(trainer(f"--batch-size {count - 1} --epochs 1").epochs())) == 1


def test_penalty_in_the_loss_takes_the_place_of_the_decay_of_the_recipe():
    work = trainer("--method weight_decay --weight-decay-form loss --epochs 1")
    list(work.epochs())
    assert [group["weight_decay"] for group in work.procedure.optimizers[0].param_groups] == [0, 0]
