"""Votes of nearest neighbours by binary codes (Lin et al. 2015) on the labels."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.checks import require, require_choice, require_whole
from experiments.methods.method import Method
from experiments.models.latent_classifier import activations, add_latent_layer_, codes
from experiments.training.evaluation import accuracy
from experiments.training.procedure import Batch, Parts, Passes, Procedure, StepResult
from experiments.training.retrieval import mean_average_precision, nearest, packed

if TYPE_CHECKING:
    from experiments.tasks import Part

Use = Literal["relabel", "leave_out", "tell"]


@dataclass(frozen=True)
class HashKNN(Method):
    """Adds a layer of sigmoids before the classifier, whose signs are a binary code of an image.
    Once, early in the training, before wrong labels are memorised, the neighbours of each training
    image vote on its label: the images nearest by their features, among those whose codes differ
    in few bits, and never the image itself. Where they agree on another class, the label is
    suspect, and for the rest of the epochs their class is learned instead.

    The network is trained by the run's loss alone, as in the paper; the vote is not from there. The
    result has, under "suspects", the share of the wrong labels that were found (recall) and of the
    suspects that are wrong (precision), and the mean average precision of retrieval, where test
    images ask for training images of their true class by the Hamming distance of the final codes.
    Other than in the paper, the network starts from random weights and the optimizer is Adam.
    """

    DEFAULTS: ClassVar[Mapping[str, Any]] = {"hash_bits": 48}
    REPLACES: ClassVar[str] = "procedure"
    LABELS: ClassVar[frozenset[str]] = frozenset({"classes"})
    LEAST_EPOCHS: ClassVar[int] = 2
    NOT_WITH: ClassVar[Mapping[str, str]] = {
        "early_stopping": "which can end the run before the neighbours vote"
    }

    hash_bits: int | None = None
    """Bits of a code."""

    hash_after: float = 0.1
    """The share of the epochs before the vote, above 0 and below 1, but one epoch at least. Late,
    what was memorised votes: images with wrong labels sit among the wrong class."""

    hash_neighbours: int = 20
    """How many neighbours vote at most."""

    hash_threshold: int | None = None
    """Neighbours differ in fewer bits than this. If not given: a quarter of the bits."""

    hash_agreement: float = 0.5
    """The share of the voters of one class above which they are heard, from 0 to below 1."""

    hash_suspects: Use = "relabel"
    """relabel: suspect labels become those of the neighbours. leave_out: they are not learned any
    more. tell: they are only counted."""

    def __post_init__(self) -> None:
        require_whole("hash_bits", self.hash_bits, 1, 4096)
        after, agreement = self.hash_after, self.hash_agreement
        require("hash_after", after, 0 < after < 1, "a share between 0 and 1, both excluded")
        require_whole("hash_neighbours", self.hash_neighbours, 1, 10_000)
        require_whole("hash_threshold", self.hash_threshold, 1, 4097)
        require("hash_agreement", agreement, 0 <= agreement < 1, "a share from 0 to below 1")
        require_choice("hash_suspects", self.hash_suspects, get_args(Use))

    @property
    def label(self) -> str:
        parts = [f"hash-knn{self.hash_bits}"]
        if self.hash_after != 0.1:
            parts.append(f"after{self.hash_after:g}")
        if self.hash_neighbours != 20:
            parts.append(f"of{self.hash_neighbours}")
        if self.hash_threshold is not None:
            parts.append(f"below{self.hash_threshold}")
        if self.hash_agreement != 0.5:
            parts.append(f"above{self.hash_agreement:g}")
        if self.hash_suspects != "relabel":
            parts.append(self.hash_suspects.replace("_", "-"))
        return "-".join(parts)

    def network(self, model: nn.Module, example: Tensor | None = None) -> nn.Module:
        return add_latent_layer_(model, self.hash_bits)

    def procedure(self, parts: Parts) -> Procedure:
        return HashVotes(parts, self)


class HashVotes(Procedure):
    """One network; `votes` are the classes for which the neighbours of each training image voted,
    -1 where they were not heard, and None before the vote."""

    CHANGES: ClassVar[bool] = True

    def __init__(self, parts: Parts, options: HashKNN) -> None:
        super().__init__(parts)
        self.options = options
        self.votes_before = max(1, int(options.hash_after * parts.config.epochs))
        self.votes: Tensor | None = None
        self.retrieved: float | None = None

    def begin_epoch(self, epoch: int) -> Passes:
        if epoch != self.votes_before:
            return super().begin_epoch(epoch)
        self.votes = self._vote()
        taken = super().begin_epoch(epoch)
        return taken._replace(forward=taken.forward + 1)

    def _vote(self) -> Tensor:
        options, given = self.options, self.parts.task.labels("trained")
        features, bits = self._described("trained")
        threshold = options.hash_threshold or max(1, options.hash_bits // 4)
        neighbours = nearest(
            *(bits, features, bits, features),
            threshold=threshold,
            count=options.hash_neighbours,
            leave_out=torch.arange(len(given), device=given.device),
        )
        return votes(neighbours, given, self.parts.task.classes, options.hash_agreement)

    def _described(self, part: "Part") -> tuple[Tensor, Tensor]:
        """The features and the packed codes of all samples of a part."""
        network = self.networks[0].eval()
        both = self.parts.logits(lambda inputs: torch.cat(activations(network, inputs), 1), part)
        features, latent = both.tensor_split([-self.options.hash_bits], 1)
        return features, packed(codes(latent))

    def step(self, batch: Batch) -> StepResult:
        if self.votes is None or self.options.hash_suspects == "tell":
            return super().step(batch)
        votes = self.votes[batch.indices]
        suspect = suspects(votes, batch.labels)
        if self.options.hash_suspects == "relabel":
            return super().step(replace(batch, labels=torch.where(suspect, votes, batch.labels)))
        with self.parts.autocast():
            logits = self.forwards[0](batch.inputs).float()
            losses = self.loss().samples(logits, batch.labels, batch.indices)
        loss = torch.where(suspect, 0.0, losses).mean()
        self.follow(loss * batch.share)
        return StepResult(loss.detach(), logits.detach())

    def finish(self) -> list[str]:
        task = self.parts.task
        items, queries = (self._described(part)[1] for part in ("trained", "test"))
        truth = task.truth()
        labels = task.labels("trained") if truth is None else truth
        self.retrieved = mean_average_precision(items, labels, queries, task.labels("test"))
        found = self.found()
        line = f"mean average precision of retrieval {self.retrieved:.2%}"
        if found:
            known = {"precision": found["precision"], "recall": found["recall"]}
            told = [f"{name} {value:.2%}" for name, value in known.items() if value is not None]
            line = f"{found['suspects']} suspect labels, {', '.join([*told, line])}"
        return [line]

    def found(self) -> dict[str, Any]:
        """What became of the vote: which labels were suspect, and how many of them are wrong."""
        if self.votes is None:
            return {}
        given, truth = self.parts.task.labels("trained"), self.parts.task.truth()
        suspect = suspects(self.votes, given)
        told = {"suspects": int(suspect.sum()), "heard": (self.votes >= 0).double().mean().item()}
        if truth is None:
            return told | dict.fromkeys(("precision", "recall", "corrected"))
        wrong = given != truth
        return told | {
            "precision": accuracy(wrong[suspect]),
            "recall": accuracy(suspect[wrong]),
            "corrected": accuracy((self.votes == truth)[suspect]),
        }

    def result(self) -> dict[str, Any]:
        if self.retrieved is None:
            return {}
        return {"suspects": self.found(), "mean_average_precision": self.retrieved}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.votes is None else {"votes": self.votes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        others = dict(state)
        votes = others.pop("votes", None)
        super().load_state_dict(others)
        if votes is None:
            return
        given, classes = self.parts.task.labels("trained"), self.parts.task.classes
        if votes.dtype != given.dtype or votes.shape != given.shape:
            raise ValueError(f"votes: got shape {list(votes.shape)} for {len(given)} labels")
        if ((votes < -1) | (votes >= classes)).any():
            raise ValueError(f"votes: got other classes than 0 to {classes - 1}")
        self.votes = votes.to(given.device)


def votes(neighbours: Tensor, labels: Tensor, classes: int, agreement: float) -> Tensor:
    """The class that more than a share `agreement` of the neighbours have, of several the first;
    -1 where there is none, or no neighbour.

    Args:
        neighbours: indices of the samples that vote for each, `[N, K]`; -1 where there is none.
        labels: those of all samples, `[N]`.
    """
    there = neighbours >= 0
    ballots = F.one_hot(labels[neighbours.clamp(min=0)], classes) * there[..., None]
    most, winner = ballots.sum(1).max(1)
    return torch.where(most > agreement * there.sum(1), winner, -1)


def suspects(votes: Tensor, given: Tensor) -> Tensor:
    """Which labels the neighbours voted against."""
    return (votes >= 0) & (votes != given)
