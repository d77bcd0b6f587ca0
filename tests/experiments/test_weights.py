import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments import run, tasks
from experiments.storage.weights import Weights
from experiments.training.loop import Trainer

CPU = torch.device("cpu")
DIGITS = "--threads 1"
FACES = "--dataset synthetic-au --frames-per-subject 32 --threads 1"
FOLDED = "--method quant --au-norm folded"
DROP = "--dropout-test-factor drop"


def trainer(arguments):
    config = run.parse(arguments.split()).resolved(gpu=False, threads=1)
    return Trainer(config, tasks.make(config, config.task.read(config), CPU), CPU)


@pytest.fixture
def save(tmp_path):
    """Writes the weights of a run with some options, and gives the file's path."""

    def save(arguments, metadata=None):
        path = tmp_path / "model.safetensors"
        made = trainer(arguments)
        written = Weights.metadata(made) if metadata is None else metadata
        save_file({k: v.contiguous() for k, v in made.model.state_dict().items()}, path, written)
        return path

    return save


@pytest.mark.parametrize(
    ("dataset", "trained", "evaluated", "message"),
    [
        (
            DIGITS,
            "--method quant --weight-bits 8",
            "--method quant",
            "it was trained with --weight-bits 8; this run has --weight-bits 4",
        ),
        (
            DIGITS,
            "--weight-bits 2 --activation-bits 3",
            "--weight-bits 3 --activation-bits 2",
            "with --weight-bits 2, --activation-bits 3; this run has --weight-bits 3, --activation",
        ),
        (DIGITS, "--method quant", "", "with --weight-bits 4, --activation-bits 4; this run has"),
        (
            DIGITS,
            f"--method dropout {DROP}",
            "--method dropout",
            "--dropout-test-factor drop; this run has no --dropout, no --dropout-where",
        ),
        (
            DIGITS,
            f"--dropout 0.2 {DROP}",
            f"--dropout 0.3 {DROP}",
            "--dropout 0.2; this run has --dropout 0.3",
        ),
        (
            DIGITS,
            f"--dropout 0.2 {DROP}",
            f"--dropout 0.2 {DROP} --dropout-where stages",
            "--dropout-where classifier; this run has --dropout-where stages",
        ),
        (FACES, FOLDED, "--method quant", "--au-norm folded; this run has --au-norm per-au"),
        (FACES, "--image-size 32", "", "--image-size 32; this run has --image-size 64"),
    ],
)
def test_weights_are_refused_where_the_network_computes_something_else(
    save, dataset, trained, evaluated, message
):
    weights = Weights.read(save(f"{dataset} {trained}"))
    with pytest.raises(ValueError, match=r"^--weights: .* does not fit this run.*") as error:
        weights.load_into(trainer(f"{dataset} {evaluated}"))
    assert message in str(error.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ("--method quant", "--method quant --averaging-constant 0.5 --lr 0.1 --noise 0 --seed 3"),
        ("--dropout 0.2 --dropout-where weights", "--label-smoothing 0.1"),
        ("--weight-decay 0.1", "--method dropout --epochs 3 --batch-size 64"),
    ],
)
def test_weights_are_taken_where_only_the_training_differs(save, trained, evaluated):
    weights, there = Weights.read(save(f"{DIGITS} {trained}")), trainer(f"{DIGITS} {evaluated}")
    weights.load_into(there)
    for name, value in weights.tensors.items():
        torch.testing.assert_close(
            there.model.state_dict()[name], value, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ("--train-size 64", "--train-size 65"),  # which is normalized otherwise
        ("--validation 0.1", "--validation 0.1 --seed 1"),  # which holds out other images
        ("", "--validation 0.1"),
    ],
)
def test_weights_are_refused_by_a_run_on_other_training_images(save, trained, evaluated):
    weights = Weights.read(save(f"{DIGITS} {trained}"))
    with pytest.raises(ValueError, match=r"--weights: .* was trained on \{.*\}, takes \{"):
        weights.load_into(trainer(f"{DIGITS} {evaluated}"))


def test_older_weights_are_taken_with_a_warning(save):
    """Those of version 0.1, which has ranges in the layers and tells no bits."""
    path = save(f"{DIGITS} --weight-bits 8", metadata={"methods": '{"quant": {}}'})
    weights = {
        name.replace("input_quantizer.", ""): tensor
        for name, tensor in load_file(path).items()
        if not name.endswith(("_extra_state", "observed"))
    }
    save_file(weights, path, metadata={"methods": '{"quant": {}}'})
    with pytest.warns(UserWarning, match=f"--weights: {path} does not tell the options"):
        read = Weights.read(path)
    read.load_into(trainer(f"{DIGITS} --weight-bits 4"))


def test_weights_tell_their_bits_where_the_metadata_do_not(save):
    path = save(f"{DIGITS} --weight-bits 8", metadata={"methods": '{"quant": {}}'})
    with pytest.warns(UserWarning, match="does not tell the options"):
        read = Weights.read(path)
    with pytest.raises(ValueError, match="the checkpoint has 8 bits, the model 4"):
        read.load_into(trainer(f"{DIGITS} --weight-bits 4"))


@pytest.mark.parametrize(
    "metadata", [{"methods": "[1]"}, {"trained_on": "3"}, {"computed_with": "["}]
)
def test_malformed_metadata_is_told(save, metadata):
    with pytest.raises(ValueError, match=r"^--weights: .* is not a model.safetensors: "):
        Weights.read(save(DIGITS, metadata=metadata))


@pytest.mark.parametrize("removed", [[{"": [0]}], [{"nowhere": [0]}], [{"conv": "x"}], [3], 3])
def test_malformed_shape_of_a_pruned_network_is_told(save, removed):
    shapes = json.dumps({"prune": {"removed": removed}})
    path = save(DIGITS, metadata={"methods": shapes, "computed_with": "{}"})
    with pytest.raises(ValueError, match="does not fit this run's network"):
        Weights.read(path).load_into(trainer(f"{DIGITS} --method prune"))


def test_a_run_writes_the_options_that_change_what_its_network_computes(tmp_path):
    options = f"{DIGITS} --method quant --epochs 1 --train-size 32 --out {tmp_path}"
    run.execute(run.prepare(run.parse(options.split())), CPU)
    (path,) = tmp_path.glob("*/model.safetensors")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["computed_with"]) == {
            "weight_bits": 4,
            "activation_bits": 4,
        }
