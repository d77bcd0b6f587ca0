"""The options of one run."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from experiments import methods, tasks
from experiments.checks import (
    MOST_EPOCHS,
    PLAIN_NAME,
    Choice,
    flag,
    is_plain_name,
    require,
    require_choice,
    require_whole,
)
from experiments.methods.early_stopping import EarlyStopping
from experiments.training.schedules import SCHEDULES
from noisyq_fast.backends import AUTO, BACKENDS

DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("fp32", "bf16")
_TASK_OPTIONS = [task.OPTIONS for task in tasks.TASKS.values()]
_METHODS = (methods.BASELINE, *methods.METHODS)
_LOSSES = (methods.OWN_LOSS, *methods.LOSSES)
_DATASETS = tuple(name for options in _TASK_OPTIONS for name in options.DATASETS)
_NOISE_KINDS = tuple(name for options in _TASK_OPTIONS for name in options.NOISE_KINDS)
_SCHEDULES = tuple(SCHEDULES)
_BACKENDS = (AUTO, *BACKENDS)
_CHOICES = {
    "method": _METHODS,
    "loss": _LOSSES,
    "dataset": _DATASETS,
    "noise_kind": _NOISE_KINDS,
    "schedule": _SCHEDULES,
    "device": DEVICES,
    "precision": PRECISIONS,
    "backend": _BACKENDS,
}
_MOST_THREADS = 16 * (os.cpu_count() or 1)
# None of these changes a number in the results; the data are identified by their checksum.
WITHOUT_EFFECT = {
    "backend",
    "cache_dir",
    "data_dir",
    "download",
    "evaluate_every",
    "name",
    "out",
    "restart",
    "strict",
    "tensorboard",
}
# The methods that are on say what these do.
TOLD_BY_METHODS = {"method", "loss"}
LEGACY = {
    name: value
    for legacy in (
        *(options.LEGACY for options in _TASK_OPTIONS),
        *(method.LEGACY for method in methods.METHODS.values()),
    )
    for name, value in legacy.items()
}
"""Options that came later, with the value that older runs had: names of runs leave it out."""

_NO_METHOD = methods.Options()
_NO_TASK = tasks.Options()


@dataclass(frozen=True)
class Data:
    """Which samples a network learns from."""

    dataset: Choice[str, _DATASETS] = "digits"
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


@dataclass(frozen=True)
class Noise:
    """What is wrong with the labels of the training images."""

    noise: float | None = None
    """Share of the training labels that noise touches, from 0 to 1. synthetic-au: how far
    annotators disagree, from 0; at 1 a ninth of their labels are wrong. Human labels come with
    their own. If not given: 0.4; 1 for synthetic-au."""

    noise_kind: Choice[str, _NOISE_KINDS] | None = None
    """symmetric: re-drawn uniformly over all classes, the true one included. symmetric_exclusive:
    the true one excluded. asymmetric: flipped to the class it is most often mistaken for. pair:
    flipped to the next class. instance: flipped by what the image looks like. aggregate, random1,
    random2, random3, worst: CIFAR-10N, what people answered. annotators: what those who coded the
    faces saw. If not given: symmetric; annotators for faces."""

    noise_seed: int = 0
    """Seed of the noise. Runs that differ in --seed only share their wrong labels."""


@dataclass(frozen=True)
class Training:
    """How the network is trained."""

    epochs: int | None = None
    """Passes over the training set; 0 only evaluates --weights. If not given: as many as suit the
    data set."""

    weights: Path | None = None
    """Start from the model.safetensors of another run. Refused if that one was trained on other
    samples of the same data set or its network computes something else, such as with other bits; an
    older file does not tell its bits, and gives a warning. If not given: random weights."""

    batch_size: int | None = None
    """Images in a step, over all processes, up to 65,536. If not given: 128; 64 for faces."""

    lr: float | None = None
    """First learning rate. If not given: 0.001; 0.0001 for inception_v3."""

    schedule: Choice[str, _SCHEDULES] | None = None
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


@dataclass(frozen=True)
class Machine:
    """What computes the run."""

    device: Choice[str, DEVICES] = "auto"
    """auto: a GPU where there is one."""

    precision: Choice[str, PRECISIONS] = "fp32"
    """bf16: convolutions and linear layers in bfloat16 (autocast); weights stay float32."""

    compile: bool = False
    """Train through torch.compile."""

    cuda_graph: bool = False
    """Record the training step once and replay it: saves the time of launching kernels on a GPU."""

    threads: int | None = None
    """CPU threads, up to 16 for each core of the machine. They can change the last digits. If not
    given: what suits the data set."""

    backend: Choice[str, _BACKENDS] = AUTO
    """What computes the quantizer; auto: NOISYQ_BACKEND, or else the fastest. Every choice gives
    the same numbers."""

    tensorboard: bool = False
    """Write the metrics for TensorBoard too (pip install tensorboard)."""


GROUPS = (Data, Noise, Training, Machine)


@dataclass(frozen=True)
class RunConfig(Machine, Training, Noise, Data):
    """Train a network on labels that are partly wrong: one that tells what is on an image, or one
    that sees the action units (AUs: single movements, such as a raised brow) in a face. To see one
    learn 10 digits, 40 % of them with labels at random, and then the same at 4 bits:

        python experiments/run.py
        python experiments/run.py --method quant

    Neither needs a download; each takes about two minutes on one CPU core. The same command again
    goes on where it was interrupted. Test labels are never changed, and nothing is ever selected on
    them. "The paper" is arXiv 2303.11803, beside a method the one where it was published.
    """

    method: Choice[str, _METHODS] | None = None
    """What is done against wrong labels; baseline: nothing. Each method's own options are below;
    given beside another method, they combine the two, as in --method quant --weight-decay 0.01. If
    not given: the methods whose options are given, or else baseline."""

    loss: Choice[str, _LOSSES] | None = None
    """What is minimized. cross_entropy: the usual; of faces weighted, with half a Dice loss. Each
    of the others is a method too, with options of its own: --loss gce is --method gce, but can
    stand beside another --method. If not given: that of the method, or else cross_entropy."""

    options: methods.Options = _NO_METHOD

    of_tasks: tasks.Options = _NO_TASK

    restart: bool = False
    """Start anew where the run is finished or was interrupted."""

    out: Path = Path("runs")
    """Directory in which the run makes its folder."""

    name: str | None = None
    """Name of the run's folder in --out. Given again with the same options it goes on with that
    run; with other options it is refused, also with --restart. If not given: a name made of the
    options, with the seed and a digest of all of them at its end."""

    def __post_init__(self) -> None:
        def check(names: tuple[str, ...], accepted: Any, takes: str) -> None:
            for name in names:
                value = getattr(self, name)
                require(name, value, value is None or accepted(value), takes)

        for name, choices in _CHOICES.items():
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), choices)
        check(("validation",), lambda value: 0 <= value < 1, "a share from 0 to less than 1")
        check(("train_size",), lambda value: value >= 1, "a whole number from 1")
        for name, first, last in (
            ("epochs", 0, MOST_EPOCHS),
            ("batch_size", 1, 2**16),
            ("evaluate_every", 1, MOST_EPOCHS),
            ("threads", 1, _MOST_THREADS),
        ):
            require_whole(name, getattr(self, name), first, last)
        if self.name is not None:
            require("name", self.name, is_plain_name(self.name), PLAIN_NAME)
        check(("seed", "noise_seed"), lambda value: 0 <= value < 2**63, "0 to 2^63-1")
        check(("lr",), lambda value: 0 < value < 3.4e38, "a finite number above 0, below 3.4e38")
        on = self.methods  # refuses options that take no effect
        self._check_baseline(on)
        self._check_loss(on)
        methods.check_together(on, self.task.LABELS, self.dataset)
        for name, method in on.items():
            if self.epochs and self.epochs < method.LEAST_EPOCHS:
                takes = f"at least {method.LEAST_EPOCHS} with {name}, one for each of its phases"
                raise ValueError(f"--epochs: got {self.epochs}, takes {takes}")
        if self.epochs == 0 and self.weights is None:
            raise ValueError("--epochs: got 0 without --weights, which it would evaluate")
        stops = self.task_options.SELECTS_EPOCH or "early_stopping" in on
        if self.validation == 0 and stops:
            raise ValueError("--validation: got 0, early stopping takes a share above 0")
        self._check_task()
        if self.cuda_graph and self.device == "cpu":
            raise ValueError("--cuda-graph: got --device cpu, takes a GPU")

    def _check_loss(self, on: dict[str, methods.Method]) -> None:
        for name in methods.LOSSES:
            if self.loss == methods.OWN_LOSS and name in on:
                given = [flag(option) for option in getattr(self.options, name).changed()]
                how = given[0] if given else f"--method {name}"
                raise ValueError(
                    f"--loss: got {self.loss} with {how}, which turns {name} on; leave one of them "
                    "out"
                )

    def _check_baseline(self, on: dict[str, methods.Method]) -> None:
        if self.method != methods.BASELINE:
            return
        for name in on:
            if name == "early_stopping" and self.task_options.SELECTS_EPOCH:
                continue  # the recipe's own
            given = flag(getattr(self.options, name).changed()[0])
            raise ValueError(
                f"--method: got baseline with {given}, which turns {name} on; leave one of them out"
            )

    def _check_task(self) -> None:
        for name, task in tasks.TASKS.items():
            given = getattr(self.of_tasks, name).given()
            if task is not self.task and given:
                takes = ", ".join(task.OPTIONS.DATASETS)
                raise ValueError(f"{flag(given[0])}: takes effect with {takes} only")
        self.task_options.check(self)
        if self.noise_kind not in (None, *self.task_options.NOISE_KINDS):
            fitting = [o.DATASETS for o in _TASK_OPTIONS if self.noise_kind in o.NOISE_KINDS]
            takes = f"is for --dataset {', '.join(fitting[0])}"
            raise ValueError(f"--noise-kind: got {self.noise_kind}, which {takes}")

    @property
    def task(self) -> type[tasks.Task]:
        """What is learned."""
        return tasks.TASKS[tasks.of_dataset(self.dataset)]

    @property
    def task_options(self) -> tasks.TaskOptions:
        """The task's own options."""
        return getattr(self.of_tasks, tasks.of_dataset(self.dataset))

    @property
    def recipe(self) -> tasks.Recipe:
        """What suits the data set and the network."""
        return self._recipe(self.task_options)

    def _recipe(self, options: tasks.TaskOptions) -> tasks.Recipe:
        recipe = options.recipe(self)
        for method in self.methods.values():
            recipe = method.recipe(recipe)
        return recipe

    @property
    def methods(self) -> dict[str, methods.Method]:
        """The methods that are on, with their options filled in, by name."""
        return methods.chosen({self.method, self.loss}, self.options)

    @property
    def label(self) -> str:
        """What is done, short, for names of runs."""
        return label_of(self.methods, self.task, self.epochs)

    def resolved(self, gpu: bool, threads: int) -> FilledConfig:
        """These options, with what was left to a default filled in, for a machine with or without a
        GPU and so many CPU threads."""
        device = self.device
        if device == "auto":
            device = "cuda" if gpu else "cpu"
        if self.cuda_graph and device == "cpu":
            raise ValueError("--cuda-graph: got a machine without a GPU, takes one with")
        on = self.methods
        options = self.task_options.resolved(self, gpu=device == "cuda")
        epochs = self._recipe(options).epochs if self.epochs is None else self.epochs
        if options.SELECTS_EPOCH:
            # Trains to the end, unless told otherwise, and goes back to the best epoch.
            whole = max(1, epochs)
            on = on | {"early_stopping": EarlyStopping(min(_patience(on) or whole, whole))}
        defaults = self._usual(options, on) | {"threads": self._recipe(options).threads or threads}
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        of_tasks = {tasks.of_dataset(self.dataset): options}
        filled: dict[str, Any] = {
            "device": device,
            "options": dataclasses.replace(self.options, **on),
            "of_tasks": dataclasses.replace(self.of_tasks, **of_tasks),
        }
        return cast("FilledConfig", dataclasses.replace(self, **filled, **missing))

    @property
    def usual(self) -> dict[str, Any]:
        """What options that depend on others are unless they are given."""
        return self._usual(self.task_options, self.methods)

    def _usual(self, options: tasks.TaskOptions, on: dict[str, Any]) -> dict[str, Any]:
        suits = self._recipe(options)
        names = ("noise", "noise_kind", "epochs", "batch_size", "lr", "schedule")
        validation = suits.validation or (0.1 if "early_stopping" in on else 0.0)
        return {name: getattr(suits, name) for name in names} | {"validation": validation}

    def flat(self) -> dict[str, Any]:
        """All options by name; of methods only where they are on, of tasks the run's own."""
        flat = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        on = self.methods
        flat["method"] = self.method or methods.BASELINE
        flat["loss"] = next((name for name in on if name in methods.LOSSES), methods.OWN_LOSS)
        del flat["options"], flat["of_tasks"]
        for options in on.values():
            flat |= dataclasses.asdict(options)
        return flat | dataclasses.asdict(self.task_options)

    def identity(self) -> dict[str, Any]:
        """The options that can change a number in the results, but for those that have the value
        that all runs had before there was such an option."""
        identity = {
            name: value
            for name, value in self.flat().items()
            if name not in WITHOUT_EFFECT | TOLD_BY_METHODS
            and not (name in LEGACY and value == LEGACY[name])
        }
        if self.device == "cpu":
            # As runs on a CPU have always been written, so that they keep their names.
            identity["device"] = "auto"
        return identity | {"methods": list(self.methods)}


if TYPE_CHECKING:

    class FilledConfig(RunConfig):
        noise: float
        noise_kind: str
        validation: float
        epochs: int
        batch_size: int
        lr: float
        schedule: str
        threads: int
else:
    FilledConfig = RunConfig
    """Options whose defaults `RunConfig.resolved` has filled in: to a type checker these are not
    None. (The noise of labels that people gave still is.)"""


def label_of(on: dict[str, methods.Method], task: type[tasks.Task], epochs: int | None) -> str:
    """The label of a run with these methods."""
    patience = _patience(on)
    if patience and task.OPTIONS.SELECTS_EPOCH and patience >= (epochs or 1):
        on = {name: method for name, method in on.items() if name != "early_stopping"}  # all do so
    return methods.label(on)


def _patience(on: dict[str, methods.Method]) -> int | None:
    """Of early stopping, if it is on."""
    stopping = on.get("early_stopping")
    return stopping.patience if isinstance(stopping, EarlyStopping) else None
