import pytest
import torch
from sklearn.metrics import average_precision_score
from test_training import trainer
from torch import nn

from experiments import run
from experiments.methods.hash_knn import votes
from experiments.models import ResNet20
from experiments.models.latent_classifier import activations, add_latent_layer_, codes
from experiments.training import retrieval
from experiments.training.retrieval import hamming, mean_average_precision, nearest, packed

SMALL = {"epochs": 4, "train_size": 64, "batch_size": 32}
GENERATOR = torch.Generator().manual_seed(0)


def random_bits(count, bits):
    return torch.rand(count, bits, generator=GENERATOR) < 0.5


def test_bits_of_every_byte_are_counted():
    every = torch.arange(256, dtype=torch.uint8)
    assert retrieval.popcount(every).tolist() == [value.bit_count() for value in range(256)]


@pytest.mark.parametrize("bits", [1, 7, 8, 48, 65])
def test_hamming_distance_of_any_number_of_bits(bits):
    items, queries = random_bits(30, bits), random_bits(5, bits)
    expected = (queries[:, None] != items).sum(2)
    assert torch.equal(hamming(packed(queries), packed(items)).long(), expected)


def one_by_one(items, features, queries, query_features, threshold, count):
    found = []
    for query, wanted in zip(queries, query_features, strict=True):
        distances = [
            (((wanted - feature) ** 2).sum().item(), number)
            for number, (item, feature) in enumerate(zip(items, features, strict=True))
            if (item != query).sum() < threshold
        ]
        best = [number for _, number in sorted(distances)[:count]]
        found.append(best + [-1] * (count - len(best)))
    return found


@pytest.mark.parametrize("portion", [1, 100, 2**18])
def test_nearest_does_not_depend_on_portions(monkeypatch, portion):
    monkeypatch.setattr(retrieval, "_PAIRS", portion)
    items, queries = random_bits(40, 6), random_bits(9, 6)
    # Small whole numbers, so that many are equally far.
    features, query_features = (
        torch.randint(3, (count, 2), generator=GENERATOR).float() for count in (40, 9)
    )
    found = nearest(packed(items), features, packed(queries), query_features, 3, 4)
    assert found.tolist() == one_by_one(items, features, queries, query_features, 3, 4)


def test_an_item_is_left_out_of_its_own_neighbours():
    bits, features = random_bits(20, 4), torch.zeros(20, 3)
    own = torch.arange(20)
    found = nearest(packed(bits), features, packed(bits), features, 5, 20, leave_out=own)
    for number, neighbours in enumerate(found.tolist()):
        assert neighbours == [other for other in range(20) if other != number] + [-1]


@pytest.mark.parametrize("portion", [1, 2**18])
def test_mean_average_precision_is_that_of_scikit_learn(monkeypatch, portion):
    monkeypatch.setattr(retrieval, "_PAIRS", portion)
    # The distance of the n-th item is n: without equal ones the definitions agree.
    items = torch.ones(40, 40).tril(-1).bool()
    queries = torch.zeros(6, 40, dtype=torch.bool)
    labels, query_labels = (torch.randint(4, (n,), generator=GENERATOR) for n in (40, 6))
    expected = [
        average_precision_score((labels == label).numpy(), range(40, 0, -1))
        for label in query_labels
    ]
    ours = mean_average_precision(packed(items), labels, packed(queries), query_labels)
    assert ours == pytest.approx(sum(expected) / 6)
    # A class that no item has does not count.
    query_labels[0] = 9
    ours = mean_average_precision(packed(items), labels, packed(queries), query_labels)
    assert ours == pytest.approx(sum(expected[1:]) / 5)


def test_neighbours_vote_for_a_class_if_enough_agree():
    labels = torch.tensor([0, 0, 1, 1, 2])
    neighbours = torch.tensor([[2, 3, -1], [0, 1, 2], [0, 2, 4], [-1, -1, -1], [0, 2, -1]])
    assert votes(neighbours, labels, 3, 0.5).tolist() == [1, 0, -1, -1, -1]
    assert votes(neighbours, labels, 3, 0.3).tolist() == [1, 0, 0, -1, 0]
    assert votes(neighbours, labels, 3, 0.7).tolist() == [1, -1, -1, -1, -1]


def test_latent_units_are_between_features_and_classifier():
    torch.manual_seed(0)
    model, images = add_latent_layer_(ResNet20(), 12).eval(), torch.randn(3, 3, 8, 8)
    features, latent = activations(model, images)
    assert features.shape == (3, 64)
    assert latent.shape == (3, 12)
    assert torch.equal(model.classifier.classifier(latent), model(images))
    assert torch.equal(codes(latent), model.classifier.latent(features) >= 0)
    with pytest.raises(ValueError, match="model: got Flatten with NoneType as its classifier"):
        add_latent_layer_(nn.Flatten(), 12)


WELL_TRAINED = "--method hash_knn --no-augment --noise-kind symmetric --lr 0.002"


def learned(arguments, **options):
    done = trainer(f"{WELL_TRAINED} {arguments}", **{"epochs": 3, "train_size": None} | options)
    list(done.epochs())
    done.finish()
    return done


def test_votes_find_wrong_labels_and_mend_them():
    done = learned("--hash-after 0.7 --batch-size 32")
    found = done.result()["suspects"]
    assert found["recall"] > 0.5
    assert found["precision"] > 0.6
    assert found["corrected"] > 0.6
    assert done.result()["mean_average_precision"] > 0.5
    given, truth = done.task.labels("trained"), done.task.truth()
    suspect = (done.procedure.votes >= 0) & (done.procedure.votes != given)
    assert found["suspects"] == suspect.sum()
    wrong = given != truth
    assert found["recall"] == (suspect & wrong).sum().item() / wrong.sum().item()


def test_suspect_labels_are_learned_changed_left_out_or_as_they_are():
    seen = {}
    for use in ("relabel", "leave_out", "tell"):
        ours = trainer(f"--method hash_knn --hash-suspects {use}", **SMALL)
        epochs = ours.epochs()
        next(epochs)
        procedure, given = ours.procedure, ours.task.labels("trained")
        procedure._vote = lambda given=given: torch.where(torch.arange(64) < 32, 3, given)
        labels = []
        before = procedure.losses[0].register_forward_pre_hook(
            lambda _, args, to=labels: to.append(args[1:])
        )
        next(epochs)
        before.remove()
        seen[use] = {
            index: label
            for these, indices in labels
            for label, index in zip(these.tolist(), indices.tolist(), strict=True)
        }
    as_given = dict(enumerate(given.tolist()))
    assert seen["tell"] == as_given
    assert seen["relabel"] == {index: 3 if index < 32 else as_given[index] for index in range(64)}
    assert seen["leave_out"] == {}  # the losses of single samples were asked for


def test_a_batch_without_anything_to_learn_changes_no_weight():
    ours = trainer("--method hash_knn --hash-suspects leave_out", **SMALL)
    given = ours.task.labels("trained")
    ours.procedure.votes = (given + 1) % 10
    ours.model.train()
    ours.step(torch.arange(8), ours.task.trained[:8], torch.zeros(8, 3, dtype=int), share=1.0)
    assert all(parameter.grad.abs().max() == 0 for parameter in ours.model.parameters())


@pytest.mark.parametrize("broken", ["short", "class", "type"])
def test_votes_of_another_run_are_refused(broken):
    ours = trainer("--method hash_knn", **SMALL)
    list(ours.epochs())
    state = ours.state_dict()
    voted = state["procedure"]["votes"]
    wrong = {"short": voted[1:], "class": voted.abs() + 10, "type": voted.float()}[broken]
    state["procedure"] = {"votes": wrong}
    with pytest.raises(ValueError, match="votes: got"):
        trainer("--method hash_knn", **SMALL).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method hash_knn --patience 2", "got hash_knn with early_stopping, which can end"),
        ("--method hash_knn --epochs 1", "--epochs: got 1, takes at least 2 with hash_knn"),
        ("--hash-bits 0", "--hash-bits: got 0, takes a whole number from 1"),
        ("--hash-after 0.3", "--hash-after: takes effect with --method hash_knn or --hash-bits"),
        ("--hash-bits 8 --hash-after 1", "--hash-after: got 1.0, takes a share between"),
        ("--hash-bits 8 --dataset synthetic-au", "takes labels that are classes"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        run.parse(arguments.split())
