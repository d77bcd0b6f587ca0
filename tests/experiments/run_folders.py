"""Folders of finished runs with chosen numbers, as run.py writes them."""

import json
from dataclasses import asdict

from experiments.methods import METHODS
from experiments.methods.dropout import Dropout
from experiments.methods.early_stopping import EarlyStopping
from experiments.methods.prune import Prune
from experiments.methods.quant import Quant
from experiments.reporting.action_units.runs import SCORES, ActionUnitRun
from experiments.reporting.finished_run import FinishedRun

SHA256 = "0123456789abcdef" * 4
EPOCHS = 3
AU_EPOCHS = 20
_MADE = {
    "dataset": "digits",
    "noise_kind": "symmetric",
    "epochs": EPOCHS,
    "augment": True,
    "out": "somewhere",
    "threads": 1,
}
_FACES = {
    "dataset": "synthetic-au",
    "noise_kind": "annotators",
    "encoder": "small",
    "au_head": "per-au",
    "au_norm": "per-au",
    "epochs": AU_EPOCHS,
    "out": "somewhere",
}
_SETTINGS = [
    *((name, method().with_defaults()) for name, method in METHODS.items()),
    *(("quant", Quant(*bits)) for bits in ((2, 2), (4, 8), (8, 8))),
    ("dropout", Dropout(0.5)),
    ("prune", Prune(0.25)),
]
OPTIONS = {method.label: {"method": name} | asdict(method) for name, method in _SETTINGS}
OPTIONS["baseline"] = {"method": "baseline"}
"""Those of the method, by its label."""


def write_classification(
    directory, label="baseline", accuracy=0.5, noise=0.4, seed=0, flipped=0.9, **options
):
    coordinates = {"noise": noise, "seed": seed, "noise_seed": seed}
    config = _MADE | coordinates | OPTIONS[label] | options
    result = {
        **dict.fromkeys(FinishedRun.MEASURED, 1.0),
        **_in_both(config, label),
        "method": config["method"],
        "test_accuracy": accuracy,
        "train_accuracy_flipped": flipped if noise else None,
        "test_accuracy_at_best_validation": None,
        "wrong_labels": 0.9 * (noise or 0),
    }
    epochs = [
        {
            "epoch": epoch,
            "loss": 1 / epoch,
            "seconds": 2.0,
            "test_loss": 2.0 if epoch == EPOCHS else None,
            "train_accuracy_flipped": flipped,
            "test_accuracy": accuracy if epoch == EPOCHS else None,
        }
        for epoch in range(1, EPOCHS + 1)
    ]
    name = f"{label}-{noise}-{seed}-{'-'.join(map(str, options.values()))}"
    return _write(directory / name, config, epochs, result)


def write_action_units(
    directory,
    label="baseline",
    f1=0.5,
    seed=0,
    fold=1,
    noise=1.0,
    aus=(1, 2),
    truth=True,
    sha256=SHA256,
    **options,
):
    """F1 goes up by 0.2 from the first AU to the last, and by 0.1 at chosen thresholds; against the
    truth it is 0.05 higher."""
    coordinates = {"seed": seed, "noise_seed": seed, "noise": noise, "fold": fold}
    always = asdict(EarlyStopping(AU_EPOCHS))
    config = _FACES | coordinates | OPTIONS[label] | always | options
    on = [config["method"]] if config["method"] != "baseline" else []
    result = {
        **dict.fromkeys(ActionUnitRun.MEASURED, 1.0),
        **_in_both(config, label),
        "method": "+".join([*on, "early_stopping"]),
        "data_sha256": sha256,
        "wrong_labels": 0.1 if truth else None,
        "train_right_fitted": 0.95 if truth else None,
        "train_wrong_fitted": 0.25 if truth else None,
        "size_in_bits": 16_000,
        "epoch_chosen": 4 + fold,
    }
    for score in SCORES:
        known = truth or "truth" not in score
        average = f1 + 0.1 * score.endswith("chosen") + 0.05 * ("truth" in score)
        step = 0.2 / (len(aus) - 1)
        by_au = {str(au): average - 0.1 + step * place for place, au in enumerate(aus)}
        result |= {score: average if known else None, f"{score}_per_au": by_au if known else None}
    epochs = [
        {"epoch": epoch, "loss": 1 / epoch, "seconds": 2.0} for epoch in range(1, AU_EPOCHS + 1)
    ]
    name = f"{label}-{noise}-{seed}-{fold}-{'-'.join(map(str, options.values()))}"
    return _write(directory / name, config, epochs, result)


def edit(path, **changes):
    """Changes values of a JSON file; those that are `...` go."""
    content = json.loads(path.read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}
    path.write_text(json.dumps(content))


def _in_both(config, label):
    names = ("dataset", "noise", "noise_kind", "seed", "epochs", "fold")
    counts = dict.fromkeys(("parameters", "size_in_bits", "macs"), 1)
    counts |= {"additions": 0, "lookups": None}
    return {
        **{name: config[name] for name in names if name in config},
        **counts,
        "label": label,
        **dict.fromkeys(("epochs_trained", "forward_passes", "backward_passes"), config["epochs"]),
        "seconds": 2.0 * config["epochs"],
        "data_sha256": SHA256,
    }


def _write(folder, config, epochs, result):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    (folder / "result.json").write_text(json.dumps(result))
    return folder
