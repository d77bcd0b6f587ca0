"""The options of one run."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.extras import literal_type_from_choices

from experiments import methods
from experiments.au_options import ActionUnitOptions
from experiments.checks import MOST_EPOCHS, flag, require, require_choice, require_whole
from experiments.data import DATASETS
from experiments.data.au import AU_DATASETS, SYNTHETIC
from experiments.data.cifar10n import HUMAN_LABELS
from experiments.data.noise import NOISE_KINDS
from experiments.methods.early_stopping import EarlyStopping
from experiments.recipes import Recipe, recipe
from experiments.training.schedules import SCHEDULES
from noisyq_fast.backends import AUTO, BACKENDS

ANNOTATORS = "annotators"
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
_CHOICES = {
    "method": (methods.BASELINE, *methods.METHODS),
    "dataset": (*DATASETS, *AU_DATASETS),
    "noise_kind": (*NOISE_KINDS, *HUMAN_LABELS, ANNOTATORS),
    "schedule": tuple(SCHEDULES),
    "device": DEVICES,
    "precision": PRECISIONS,
    "backend": (AUTO, *BACKENDS),
}
_MOST_THREADS = 16 * (os.cpu_count() or 1)
# None of these changes a number in the results; the data are identified by their checksum.
WITHOUT_EFFECT = {
    "backend",
    "cache_dir",
    "data_dir",
    "download",
    "evaluate_every",
    "out",
    "restart",
    "strict",
    "tensorboard",
}


_NO_METHOD = methods.Options()
_NO_FACES = ActionUnitOptions()


def _choice(option: str) -> Any:
    return literal_type_from_choices(_CHOICES[option])


@dataclass(frozen=True)
class RunConfig:
    """Train one network on labels that are partly wrong: a ResNet-20 to tell what is on an image,
    or a network that sees the action units (AUs) in a face.

    Test labels are never changed, and nothing is ever selected on them. Every run writes its
    options, its noisy labels, the metrics of each epoch, the final result and the trained weights
    into a folder of its own, and a checkpoint after each epoch: the same command goes on where it
    was interrupted. The default run needs no download and takes about two minutes on one CPU core.
    """

    method: _choice("method") | None = None
    """What is done against wrong labels; baseline: nothing. Each method's own options follow, with
    its default in parentheses. Giving them beside another method combines the two, as in
    --method quant --weight-decay 0.01. If not given: what the options of methods say, or else
    baseline."""

    options: Annotated[methods.Options, tyro.conf.arg(name="")] = _NO_METHOD

    dataset: _choice("dataset") = "digits"
    """digits: 1,797 images of 8x8 from scikit-learn. cifar10: 60,000 of 32x32. synthetic-au: 10,496
    drawn faces of 64x64, labelled by annotators who disagree. bp4d, disfa: filmed faces with 12 and
    8 coded action units, for who has a licence."""

    data_dir: Path | None = None
    """Where the data are. cifar10: the folder cifar-10-batches-py, the archive
    cifar-10-python.tar.gz or a directory that holds either, and CIFAR-10_human.pt for human labels;
    if not given, the user's cache. bp4d: the directory with AUCoding and the pictures. disfa: the
    one with ActionUnit_Labels and Images."""

    download: bool = False
    """Fetch what is missing into --data-dir: CIFAR-10 (170 MB), the human labels (2 MB)."""

    train_size: int | None = None
    """Train on so many images only, the same for every seed and method. If not given: all. Not for
    faces."""

    validation: float | None = None
    """Share of the training images that is held out, with its noisy labels, to choose an epoch; of
    faces, share of the subjects. If not given: 0.1 for early stopping, 0 without; 0.2 for faces."""

    noise: float | None = None
    """Share of the training labels that noise touches, from 0 to 1 (0.4). synthetic-au: how far
    annotators disagree, from 0; at 1 a ninth of their labels are wrong (1). Human labels come with
    their own."""

    noise_kind: _choice("noise_kind") | None = None
    """symmetric: re-drawn uniformly over all classes, the true one included. symmetric_exclusive:
    the true one excluded. asymmetric: flipped to the class it is most often mistaken for. pair:
    flipped to the next class. instance: flipped by what the image looks like. aggregate, random1,
    random2, random3, worst: CIFAR-10N, what people answered. annotators: what those who coded the
    faces saw. If not given: symmetric; annotators for faces."""

    noise_seed: int = 0
    """Seed of the noise. Runs that differ in --seed only share their wrong labels."""

    epochs: int | None = None
    """Passes over the training set; 0 only evaluates --weights. If not given: as many as suit the
    data set."""

    weights: Path | None = None
    """Start from the model.safetensors of another run. Refused if that one was trained on other
    samples of the same data set or its network computes something else, such as with other bits; an
    older file does not tell its bits, and gives a warning."""

    batch_size: int | None = None
    """Images in a step, over all processes, up to 65,536. If not given: 128; 64 for faces."""

    lr: float | None = None
    """First learning rate. If not given: 0.001; 0.0001 for inception_v3."""

    schedule: _choice("schedule") | None = None
    """steps: the learning rate falls to 0.1, 0.01, 0.001 and 0.0005 of the first after 40, 60, 80
    and 90 % of the epochs. cosine: it falls to 0 along a half cosine. exponential: by 1 % an epoch.
    constant: it stays. If not given: steps; of faces cosine for small, exponential for
    inception_v3."""

    augment: bool = True
    """Random crops, and flips where a mirror image keeps its class; of faces, rotation, zoom and
    flips."""

    evaluate_every: int = 1
    """Epochs from one evaluation on the test set to the next; the last epoch always has one."""

    seed: int = 0
    """Seed of the initial weights, the order of the images and the augmentation."""

    device: _choice("device") = "auto"
    """auto: a GPU where there is one."""

    precision: _choice("precision") = "fp32"
    """bf16: convolutions and linear layers in bfloat16 (autocast); weights stay float32."""

    compile: bool = False
    """Train through torch.compile."""

    cuda_graph: bool = False
    """Record the training step once and replay it: saves the time of launching kernels on a GPU."""

    threads: int | None = None
    """CPU threads, up to 16 for each core of the machine. They can change the last digits. If not
    given: what suits the data set."""

    backend: _choice("backend") = AUTO
    """What computes the quantizer; auto: NOISYQ_BACKEND, or else the fastest. Every choice gives
    the same numbers."""

    tensorboard: bool = False
    """Write the metrics for TensorBoard too (pip install tensorboard)."""

    faces: Annotated[ActionUnitOptions, tyro.conf.arg(name="")] = _NO_FACES

    restart: bool = False
    """Start anew where the run is finished or was interrupted."""

    out: Path = Path("runs")
    """Directory in which the run makes its folder."""

    def __post_init__(self) -> None:
        def check(names: tuple[str, ...], accepted: Any, takes: str) -> None:
            for name in names:
                value = getattr(self, name)
                require(name, value, value is None or accepted(value), takes)

        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), choices)
        if self.detects_action_units:
            check(("noise",), lambda value: 0 <= value <= 1000, "a finite number from 0 to 1,000")
        else:
            check(("noise",), lambda value: 0 <= value <= 1, "a share from 0 to 1")
        check(("validation",), lambda value: 0 <= value < 1, "a share from 0 to less than 1")
        check(("train_size",), lambda value: value >= 1, "a whole number from 1")
        for name, first, last in (
            ("epochs", 0, MOST_EPOCHS),
            ("batch_size", 1, 2**16),
            ("evaluate_every", 1, MOST_EPOCHS),
            ("threads", 1, _MOST_THREADS),
        ):
            require_whole(name, getattr(self, name), first, last)
        check(("seed", "noise_seed"), lambda value: 0 <= value < 2**63, "0 to 2^63-1")
        check(("lr",), lambda value: 0 < value < 3.4e38, "a finite number above 0, below 3.4e38")
        on = self.methods  # refuses options that take no effect
        self._check_baseline(on)
        if self.epochs == 0 and self.weights is None:
            raise ValueError("--epochs: got 0 without --weights, which it would evaluate")
        if self.noise_kind in HUMAN_LABELS and self.dataset != "cifar10":
            raise ValueError(f"--noise-kind: got {self.noise_kind}, which is for --dataset cifar10")
        if self.noise_kind in HUMAN_LABELS and self.noise is not None:
            raise ValueError(f"--noise: got {self.noise} with human labels, which bring their own")
        if self.validation == 0 and (self.recipe.selects_epoch or "early_stopping" in on):
            raise ValueError("--validation: got 0, early stopping takes a share above 0")
        self._check_faces()
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("--cuda-graph: got --device cpu, takes a GPU")

    def _check_baseline(self, on: dict[str, methods.Method]) -> None:
        if self.method != methods.BASELINE:
            return
        for name in on:
            if name == "early_stopping" and self.recipe.selects_epoch:
                continue  # the recipe's own
            given = flag(getattr(self.options, name).changed()[0])
            raise ValueError(
                f"--method: got baseline with {given}, which turns {name} on; leave one of them out"
            )

    def _check_faces(self) -> None:
        if not self.detects_action_units:
            for name in self.faces.given():
                raise ValueError(f"{flag(name)}: takes effect with {', '.join(AU_DATASETS)} only")
            if self.noise_kind == ANNOTATORS:
                takes = f"is for --dataset {', '.join(AU_DATASETS)}"
                raise ValueError(f"--noise-kind: got {ANNOTATORS}, which {takes}")
            return
        if self.noise_kind not in (None, ANNOTATORS):
            raise ValueError(f"--noise-kind: got {self.noise_kind} with faces, takes {ANNOTATORS}")
        if self.train_size is not None:
            raise ValueError(f"--train-size: got {self.train_size} with faces, which are all taken")
        if self.batch_size == 1:
            raise ValueError("--batch-size: got 1 with faces, takes 2 or more, as batch norm needs")
        if self.faces.au_norm == "folded" and "dropout" in self.methods:
            raise ValueError("--au-norm: got folded with dropout, whose zeros it would move")
        made = {
            "noise": self.noise,
            "noise-seed": self.noise_seed or None,
            "frames-per-subject": self.faces.frames_per_subject,
        }
        filmed = {"strict": self.faces.strict or None, "cache-dir": self.faces.cache_dir}
        without_effect = filmed if self.dataset == SYNTHETIC else made
        for name, value in without_effect.items():
            if value is not None:
                takes = f"takes no effect with {self.dataset}"
                raise ValueError(f"--{name}: got {value}, {takes}")

    @property
    def detects_action_units(self) -> bool:
        """Whether the data are faces."""
        return self.dataset in AU_DATASETS

    @property
    def recipe(self) -> Recipe:
        """What suits the data set and the network."""
        return recipe(self.dataset, self.faces.encoder)

    @property
    def methods(self) -> dict[str, methods.Method]:
        """The methods that are on, with their options filled in, by name."""
        return methods.chosen(self.method, self.options)

    @property
    def label(self) -> str:
        """What is done, short, for names of runs."""
        return label_of(self.methods, self.recipe, self.epochs)

    def resolved(self, gpu: bool, threads: int) -> RunConfig:
        """These options, with what was left to a default filled in, for a machine with or without a
        GPU and so many CPU threads."""
        device = self.device
        if device == "auto":
            device = "cuda" if gpu else "cpu"
        if self.cuda_graph and device == "cpu":
            raise ValueError("--cuda-graph: got a machine without a GPU, takes one with")
        on, faces = self.methods, self.faces
        if self.detects_action_units:
            faces = faces.resolved(self.dataset == SYNTHETIC, gpu=device == "cuda")
        suits = recipe(self.dataset, faces.encoder)
        epochs = suits.epochs if self.epochs is None else self.epochs
        if suits.selects_epoch:
            # Trains to the end, unless told otherwise, and goes back to the best epoch.
            whole = max(1, epochs)
            asked = on["early_stopping"].patience if "early_stopping" in on else whole
            on = on | {"early_stopping": EarlyStopping(min(asked, whole))}
        validation = suits.validation or (0.1 if "early_stopping" in on else 0.0)
        noise_kind = self.noise_kind or (ANNOTATORS if self.detects_action_units else "symmetric")
        is_made = noise_kind in NOISE_KINDS or self.dataset == SYNTHETIC
        defaults = {
            "noise": suits.noise if is_made else None,
            "noise_kind": noise_kind,
            "validation": validation,
            "epochs": epochs,
            "batch_size": suits.batch_size,
            "lr": suits.lr,
            "schedule": suits.schedule,
            "threads": suits.threads or threads,
        }
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        options = dataclasses.replace(self.options, **on)
        return dataclasses.replace(self, device=device, options=options, faces=faces, **missing)

    def flat(self) -> dict[str, Any]:
        """All options by name; of methods and faces only where they are on."""
        flat = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        flat["method"] = self.method or methods.BASELINE
        del flat["options"], flat["faces"]
        for options in self.methods.values():
            flat |= dataclasses.asdict(options)
        return flat | (dataclasses.asdict(self.faces) if self.detects_action_units else {})

    def identity(self) -> dict[str, Any]:
        """The options that can change a number in the results."""
        # The methods that are on say what --method does.
        identity = {k: v for k, v in self.flat().items() if k not in WITHOUT_EFFECT | {"method"}}
        if self.device == "cpu":
            # As runs on a CPU have always been written, so that they keep their names.
            identity["device"] = "auto"
        return identity | {"methods": list(self.methods)}


def label_of(on: dict[str, methods.Method], suits: Recipe, epochs: int | None) -> str:
    """The label of a run with these methods, where this recipe suits."""
    stopping = on.get("early_stopping")
    if stopping and suits.selects_epoch and stopping.patience >= (epochs or 1):
        on = {name: method for name, method in on.items() if name != "early_stopping"}  # all do so
    return methods.label(on)
