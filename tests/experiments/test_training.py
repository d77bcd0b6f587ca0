import io
from dataclasses import asdict, replace

import pytest
import torch

from experiments import run, tasks
from experiments.losses import Loss
from experiments.methods import METHODS
from experiments.tasks.classification import Classification
from experiments.training.loop import NonFiniteLoss, Trainer

EVERY_METHOD = ["baseline", *(name for name, method in METHODS.items() if not method.REPLACES)]
# Losses, procedures and layers, also together with methods that change the network.
EXCHANGED = [
    "--loss gce --gce-threshold 0.5",
    "--loss sce --label-smoothing 0.1",
    "--method mixup --weight-bits 4",
    "--method co_teaching --loss elr --prune 0.5 --patience 2",
    "--method sam --loss elr --weight-bits 4 --dropout 0.1",
    "--method swa --swa-start 0.5 --weight-bits 4 --patience 2",
    "--method snapshot --snapshots 2 --weight-bits 4",
    "--method train_longer --ghost-batch 8 --weight-bits 4 --loss elr",
    "--method mutual_learning --weight-bits 4 --prune 0.5",
    "--method noisy_student --students 1 --weight-bits 4 --dropout 0.1 --loss elr",
    "--method qkd --weight-bits 4",
    "--method hash_knn --hash-bits 12 --hash-agreement 0 --weight-bits 4 --prune 0.5 --loss elr",
    "--method slimmable --weight-bits 4 --slim-widths 1 0.5 --slim-distillation",
    "--method us_slimmable --weight-bits 4 --us-widths 3 --dropout 0.1 --loss elr",
    "--method adder --weight-bits 4 --activation-bits 4",
    "--method hashed --dropout 0.1",
    "--method co_teaching --compression 4 --weight-bits 4",
    "--method lcnn --lcnn-sparsity 0.4 --weight-bits 4 --activation-bits 4",
    "--method swa --swa-start 0.5 --lcnn-dictionary 0.5",
    "--method dfq --patience 2 --dropout 0.1 --loss gce",
]


def trainer(arguments="", device=torch.device("cpu"), **options):  # noqa: B008
    options = {"epochs": 2, "train_size": 256, "threads": 1} | options
    config = replace(run.parse(arguments.split()), **options).resolved(
        gpu=device.type == "cuda", threads=1
    )
    return Trainer(config, tasks.make(config, config.task.read(config), device), device)


def numbers(trainer):
    """What must not depend on the time a run takes."""
    return [asdict(metrics) | {"seconds": None} for metrics in trainer.epochs()]


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_learns_the_digits_despite_wrong_labels(method):
    run = trainer(method=method, epochs=8, batch_size=32, lr=2e-3, train_size=None, noise=0.2)
    metrics = list(run.epochs())
    run.finish()
    assert metrics[-1].scores["test_accuracy"] > 0.85
    assert metrics[-1].scores["test_loss"] < metrics[0].scores["test_loss"]
    result = run.result()
    assert result["train_accuracy_clean"] > 0.85
    assert result["train_accuracy_flipped"] < 0.2
    assert result["flipped_predicted_true"] > 0.7


def test_another_seed_gives_other_numbers():
    assert numbers(trainer(seed=1)) != numbers(trainer())


def test_methods_start_from_the_same_weights():
    baseline, quant = trainer(), trainer(method="quant")
    for (name, expected), actual in zip(
        baseline.model.named_parameters(), quant.model.parameters(), strict=True
    ):
        assert torch.equal(actual, expected), name


def test_memorised_labels_are_counted_apart():
    run = trainer(augment=False, epochs=40, train_size=64, batch_size=16)
    last = list(run.epochs())[-1]
    assert last.scores["train_accuracy_clean"] > 0.95
    assert last.scores["train_accuracy_flipped"] > 0.95
    result = run.result()
    assert result["train_accuracy_clean"] > 0.95
    assert result["train_accuracy_flipped"] > 0.95
    assert result["flipped_predicted_true"] < 0.05
    assert result["accuracy_gap"] == result["train_accuracy"] - result["test_accuracy"] > 0.3
    assert result["loss_gap"] == result["test_loss"] - result["train_loss"] > 1


def test_accuracy_on_wrong_labels_is_none_without_any():
    run = trainer(noise=0.0, epochs=1)
    (metrics,) = run.epochs()
    assert metrics.scores["train_accuracy_flipped"] is None
    assert metrics.scores["train_accuracy_clean"] is not None
    result = run.result()
    assert result["train_accuracy_flipped"] is None
    assert result["train_accuracy_clean"] == result["train_accuracy"]


def test_statistics_move_in_training_steps_only():
    run = trainer(epochs=2, train_size=256, batch_size=128)
    list(run.epochs())
    run.result()
    assert run.model.bn.num_batches_tracked == 4


def test_learning_rate_follows_the_schedule():
    run = trainer(epochs=5, train_size=32, lr=0.01)
    rates = [metrics.learning_rate for metrics in run.epochs()]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-4, 1e-5])
    assert run.procedure.optimizers[0].param_groups[0]["lr"] == rates[-1]


def test_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(
        NonFiniteLoss,
        match=r"the loss is (nan|inf) in epoch 1, step \d+, at learning rate 1e\+30; "
        "last checkpoint: none yet",
    ):
        list(trainer(lr=1e30).epochs())


def test_model_is_channels_last():
    weight = trainer().model.stage2[1].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_loss_that_is_not_finite_names_step_and_checkpoint():
    run = trainer(epochs=3, batch_size=32)
    metrics = run.epochs()
    next(metrics)
    step = run.step
    calls = iter(range(99))

    def poisoned(*args, **kwargs):
        loss, hits = step(*args, **kwargs)
        return (loss * float("nan") if next(calls) == 4 else loss), hits

    run.step = poisoned
    with pytest.raises(NonFiniteLoss, match=r"nan in epoch 2, step 5, .* last checkpoint: epoch 1"):
        next(metrics)


def test_held_out_samples_are_not_trained_on_and_are_the_same_for_every_method():
    baseline, quant = (trainer(method=method, validation=0.25) for method in ("baseline", "quant"))
    assert len(baseline.task.held_out) == 64
    assert len(baseline.task.trained) == 192
    assert set(baseline.task.held_out.tolist()).isdisjoint(baseline.task.trained.tolist())
    assert torch.equal(baseline.task.held_out, quant.task.held_out)
    assert not torch.equal(baseline.task.held_out, trainer(validation=0.25, seed=1).task.held_out)


def test_held_out_samples_are_as_noisy_as_the_others():
    run = trainer(validation=0.5, train_size=None, noise=0.4)
    wrong = (run.task.given != run.task.true).double()
    assert wrong[run.task.held_out].mean() == pytest.approx(0.36, abs=0.05)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "instance"])
def test_noise_over_all_gives_subsets_that_hold_each_other_the_same_wrong_labels(kind):
    small, large, whole = (
        trainer(f"--noise-over all --noise-kind {kind}", train_size=size).task
        for size in (50, 100, None)
    )
    for part, more in ((small, large), (large, whole)):
        there = {index: n for n, index in enumerate(more.dataset.train_indices.tolist())}
        among = [there[index] for index in part.dataset.train_indices.tolist()]
        assert torch.equal(part.train_images, more.train_images[among])
        for name in ("true", "given", "flipped"):
            assert torch.equal(getattr(part.noisy, name), getattr(more.noisy, name)[among]), name
        assert part.noisy.flipped.any()
        redrawn = set(more.noisy.redrawn.tolist())
        assert part.noisy.redrawn.tolist() == [n for n, i in enumerate(among) if i in redrawn]


def test_noise_over_the_subset_is_that_of_before():
    before = trainer(noise=0.4, train_size=100)
    assert before.task.noisy.redrawn.numel() == 40
    assert "noise_over" not in before.config.identity()
    config = trainer("--noise-over all", train_size=100).config
    assert config.identity()["noise_over"] == "all"


def test_share_that_holds_out_nothing_or_everything_is_refused():
    for share in (0.001, 0.999):
        with pytest.raises(ValueError, match=r"--validation: got 0\.\d+, which holds out (0|256)"):
            trainer(validation=share)


def test_test_set_is_evaluated_now_and_then_and_at_the_end():
    run = trainer(epochs=5, evaluate_every=2, train_size=32)
    evaluated = [metrics.scores["test_accuracy"] is not None for metrics in run.epochs()]
    assert evaluated == [False, True, False, True, True]


def saved(state):
    """A checkpoint as another process reads it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "arguments",
    [
        *(f"--method {method}" for method in EVERY_METHOD),
        "--method quant --prune 0.5 --prune-steps 2 --dropout 0.2 --patience 2 --weight-decay 0.1",
    ],
)
def test_resumed_run_ends_bit_identical(arguments):
    ends_bit_identical(arguments, 1, 3, 4, epochs=6, validation=0.1)


@pytest.mark.parametrize("arguments", EXCHANGED)
def test_resumed_run_of_any_loss_and_procedure_ends_bit_identical(arguments):
    ends_bit_identical(arguments, 2, epochs=4, validation=0.1, train_size=64, batch_size=32)


def ends_bit_identical(arguments, *stops, **options):
    """A second run is the same, and so is what goes on from its checkpoint after any of the
    stops."""
    whole = trainer(arguments, **options)
    expected = numbers(whole)
    finished, result = whole.finish(), whole.result()
    interrupted, states = trainer(arguments, **options), {}
    for epoch, metrics in zip(range(1, max(stops) + 1), interrupted.epochs(), strict=False):
        assert asdict(metrics) | {"seconds": None} == expected[epoch - 1]
        if epoch in stops:
            states[epoch] = saved(interrupted.state_dict())
    assert [*states] == [*stops]
    for epoch, state in states.items():
        resumed = trainer(arguments, **options)
        resumed.load_state_dict(state)
        assert numbers(resumed) == expected[epoch:]
        assert resumed.finish() == finished
        assert resumed.passes == whole.passes
        assert resumed.result() == result
        for name, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("arguments", ["--method prune", "--method quant --prune 0.5"])
def test_methods_see_no_image_of_the_test_set(monkeypatch, arguments):
    inputs = Classification.inputs

    def of_many(task, part, samples):
        assert part != "test" or len(samples) > 1
        return inputs(task, part, samples)

    monkeypatch.setattr(Classification, "inputs", of_many)  # the whole test set is evaluated
    run, resumed = trainer(arguments), trainer(arguments)
    list(run.epochs())
    resumed.load_state_dict(saved(run.state_dict()))
    resumed.result()


def test_pruned_network_is_smaller_and_goes_on_learning():
    run = trainer("--method prune --prune 0.5 --schedule constant", epochs=8)
    before = run.result()
    losses = [metrics.loss for metrics in run.epochs()]
    after = run.result()
    assert after["parameters"] < 0.55 * before["parameters"]
    assert after["macs"] < 0.55 * before["macs"]
    assert losses[7] < losses[3]


def test_quantized_network_is_smaller_on_disk_only():
    baseline, quant = trainer().result(), trainer(method="quant", epochs=1)
    list(quant.epochs())
    quant = quant.result()
    assert quant["parameters"] == baseline["parameters"]
    assert quant["macs"] == baseline["macs"]
    assert quant["size_in_bits"] < 0.2 * baseline["size_in_bits"]


class Nothing(Loss):
    def samples(self, logits, labels, indices):
        return 0 * logits.sum(1)


def test_decoupled_decay_is_not_the_decay_in_the_loss():
    """Without a gradient, AdamW still shrinks weights by lr * a; Adam divides the penalty's
    gradient by its own size, and so moves every weight by about lr."""
    no_gradient = trainer("--weight-decay 0.5", lr=0.01)
    no_gradient.procedure.losses[0] = Nothing()
    before, after = weight_before_and_after_a_step(no_gradient)
    torch.testing.assert_close(after, before * (1 - 0.01 * 0.5))

    only_penalty = trainer("--weight-decay 0.5 --weight-decay-form loss", lr=0.01)
    (method,) = only_penalty.methods.values()
    only_penalty.procedure.losses[0] = method.loss(Nothing(), only_penalty.model, only_penalty.task)
    before, after = weight_before_and_after_a_step(only_penalty)
    torch.testing.assert_close(after, before - 0.01 * before.sign(), atol=1e-5, rtol=0)


def weight_before_and_after_a_step(run):
    weight = run.model.stage1[0].conv1.weight
    before = weight.detach().clone()
    run.model.train()
    views = torch.zeros(8, 3, dtype=torch.int64)
    run.step(torch.arange(8), run.task.trained[:8], views, share=1.0)
    return before, weight.detach()


def test_bf16_learns_and_keeps_float32_weights():
    run = trainer(precision="bf16", epochs=4)
    losses = [metrics.loss for metrics in run.epochs()]
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}
    assert losses != [metrics.loss for metrics in trainer(epochs=4).epochs()]


def test_compiled_run_is_close_to_the_plain_one():
    plain, compiled = (trainer(compile=c, epochs=1, train_size=128) for c in (False, True))
    assert [m.loss for m in compiled.epochs()] == pytest.approx(
        [m.loss for m in plain.epochs()], rel=1e-4
    )


@pytest.mark.parametrize(
    ("arguments", "passes"),
    [
        ("", (4, 4)),
        ("--loss gce --gce-threshold 0.5", (7, 4)),  # chooses what it keeps before 3 epochs
        ("--method co_teaching", (8, 8)),
        ("--method sam", (8, 8)),
        ("--method swa --swa-start 0.5", (7, 4)),  # measures statistics after 3 epochs
        ("--method snapshot", (4, 4)),
        ("--method train_longer --ghost-batch 8", (16, 16)),
        ("--method mutual_learning", (8, 8)),
        ("--method noisy_student", (7, 4)),  # three teachers
        ("--method hash_knn", (5, 4)),  # the neighbours vote once
        ("--method slimmable --slim-widths 0.5 1", (8, 8)),
        ("--method us_slimmable --us-widths 3", (12, 12)),
        ("--method qkd", (8, 7)),  # in the last epoch the teacher learns no more
    ],
)
def test_passes_of_a_sample_are_counted(arguments, passes):
    run = trainer(arguments, epochs=4, train_size=64, batch_size=32)
    list(run.epochs())
    result = run.result()
    assert (result["forward_passes"], result["backward_passes"]) == passes


def test_networks_that_learn_from_each_other_differ_and_the_first_is_judged():
    run = trainer("--method co_teaching", epochs=1, train_size=64)
    first, second = (network.conv.weight.detach().clone() for network in run.procedure.networks)
    assert torch.equal(first, trainer().model.conv.weight)
    assert not torch.equal(first, second)
    list(run.epochs())
    logits = run.procedure.predict(run.task.inputs("test", torch.arange(9)))
    assert torch.equal(logits, run.model(run.task.inputs("test", torch.arange(9))))


def test_second_pass_of_sam_moves_no_statistics_and_no_memory():
    sam = trainer("--method sam --sam-rho 1e-30 --loss elr --weight-bits 4", epochs=1)
    plain = trainer("--loss elr --weight-bits 4", epochs=1)
    for each in (sam, plain):
        list(each.epochs())
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, sam.model.state_dict()[name]), name
    assert torch.equal(sam.procedure.losses[0].targets, plain.procedure.losses[0].targets)


def test_a_network_of_another_name_is_trained():
    run = trainer("--model resnet18_cifar", train_size=32, epochs=1)
    assert run.result()["parameters"] > 40 * trainer().result()["parameters"]
