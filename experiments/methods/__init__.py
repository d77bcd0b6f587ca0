"""Training methods, by the name that `--method` takes."""

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING

from experiments.checks import flag
from experiments.methods.adder import Adder
from experiments.methods.bitsplit import BitSplit
from experiments.methods.co_teaching import CoTeaching
from experiments.methods.defensive import Defensive
from experiments.methods.dfq import DFQ
from experiments.methods.dropout import Dropout
from experiments.methods.early_stopping import EarlyStopping
from experiments.methods.easyquant import EasyQuant
from experiments.methods.elr import ELR
from experiments.methods.gce import GCE
from experiments.methods.hash_knn import HashKNN
from experiments.methods.hashed import Hashed
from experiments.methods.label_smoothing import LabelSmoothing
from experiments.methods.lcnn import LCNN
from experiments.methods.learned import (
    ClippedActivations,
    ClippedLevels,
    LearnedIntervals,
    LearnedSteps,
    SoftQuant,
)
from experiments.methods.many_widths import AdaBits, Quantizable
from experiments.methods.method import Method
from experiments.methods.mixup import Mixup
from experiments.methods.mutual_learning import MutualLearning
from experiments.methods.noisy_student import NoisyStudent
from experiments.methods.ocs import OCS
from experiments.methods.prune import Prune
from experiments.methods.qkd import QKD
from experiments.methods.quant import Quant
from experiments.methods.sam import SAM
from experiments.methods.sce import SCE
from experiments.methods.slimmable import Slimmable
from experiments.methods.snapshot import Snapshot
from experiments.methods.swa import SWA
from experiments.methods.train_longer import TrainLonger
from experiments.methods.us_slimmable import UniversallySlimmable
from experiments.methods.weight_decay import WeightDecay

__all__ = [
    "BASELINE",
    "LOSSES",
    "METHODS",
    "OWN_LOSS",
    "Method",
    "Options",
    "check_together",
    "chosen",
    "label",
]

BASELINE = "baseline"
"""The task's own loss and recipe: no method at all."""

# In the order in which they change the network, after those that replace its layers.
METHODS: dict[str, type[Method]] = {
    "hash_knn": HashKNN,
    "slimmable": Slimmable,
    "us_slimmable": UniversallySlimmable,
    "quant": Quant,
    "lsq": LearnedSteps,
    "pact": ClippedActivations,
    "qil": LearnedIntervals,
    "dsq": SoftQuant,
    "aqd": ClippedLevels,
    "dropout": Dropout,
    "prune": Prune,
    "weight_decay": WeightDecay,
    "label_smoothing": LabelSmoothing,
    "early_stopping": EarlyStopping,
    "gce": GCE,
    "sce": SCE,
    "elr": ELR,
    "mixup": Mixup,
    "co_teaching": CoTeaching,
    "sam": SAM,
    "swa": SWA,
    "snapshot": Snapshot,
    "train_longer": TrainLonger,
    "mutual_learning": MutualLearning,
    "defensive": Defensive,
    "noisy_student": NoisyStudent,
    "qkd": QKD,
    "adder": Adder,
    "hashed": Hashed,
    "lcnn": LCNN,
    "easyquant": EasyQuant,
    "ocs": OCS,
    "bitsplit": BitSplit,
    "dfq": DFQ,
    "adabits": AdaBits,
    "quantizable": Quantizable,
}
LOSSES = {name: method for name, method in METHODS.items() if method.REPLACES == "loss"}
"""Those that `--loss` takes as well."""
OWN_LOSS = "cross_entropy"
"""The name of the loss that a task has by itself."""

if TYPE_CHECKING:

    @dataclasses.dataclass(frozen=True)
    class Options:
        def __init__(self, **options: Method) -> None: ...
        def __getattr__(self, name: str) -> Method: ...
else:
    Options = dataclasses.make_dataclass(
        "Options",
        [(name, method, method()) for name, method in METHODS.items()],
        frozen=True,
    )
    """The options of all methods, each method's under its name."""


def chosen(names: Collection[str | None], options: Options) -> dict[str, Method]:
    """The methods that are on: those called `names` and those whose options were given."""
    on = {}
    for key in METHODS:
        method = getattr(options, key)
        if key in names or method.on:
            on[key] = method.with_defaults()
        elif method.changed():
            turns_on = " or ".join([f"--method {key}", *map(flag, list(method.DEFAULTS)[:1])])
            raise ValueError(f"{flag(method.changed()[0])}: takes effect with {turns_on} only")
    return on


def check_together(on: dict[str, Method], labels: str, dataset: str) -> None:
    """Raises ValueError for methods that do not go together, or not with such labels."""
    for name, method in on.items():
        if labels not in method.LABELS:
            takes = f"labels that are {' or '.join(sorted(method.LABELS))}"
            raise ValueError(f"--method: got {name} with {dataset}, takes {takes}")
        for other, reason in method.NOT_WITH.items():
            if other in on:
                raise ValueError(f"--method: got {name} with {other}, {reason}")
    for what, one in (
        ("loss", "loss"),
        ("procedure", "procedure"),
        ("layers", "kind of layers"),
        ("quantizer", "quantizer"),
    ):
        found = [name for name, method in on.items() if what == method.REPLACES]
        if len(found) > 1:
            raise ValueError(f"--method: got {' with '.join(found)}, of which a run has one {one}")


def label(methods: dict[str, Method]) -> str:
    """All that is on, short, for names of runs."""
    return "+".join(method.label for method in methods.values()) or BASELINE
