"""Evaluation on the CPU, of frozen weights: an image alone, and a batch."""

import copy

import onnxruntime_peer
import pytest
import torch
from comparison import compare
from training_step import ACTION_UNITS, CLASSIFICATION, FORMS, FUSED, INTEGER, OURS, in_format

from noisyq_fast import freeze_weights_


@pytest.mark.parametrize("size", [1, 128])
@pytest.mark.parametrize(
    "work", [CLASSIFICATION, ACTION_UNITS], ids=["classification", "action_units"]
)
def test_evaluation(benchmark, work, size, compiled_afresh, tmp_path):
    model = work.network()
    seen, images = (in_format(work.batch(n)[0]) for n in (work.size, size))

    def of(name):
        made = FORMS[name](copy.deepcopy(model), work.example())
        with torch.no_grad():
            made.to(memory_format=torch.channels_last).train()(seen)  # gives it its ranges
        return made.eval() if name == "float" else freeze_weights_(made.eval())

    def evaluation(network):
        def run():
            with torch.inference_mode():
                return network(images)

        return run

    networks = {name: of(name) for name in ("float", OURS, INTEGER, FUSED)}
    candidates = {
        **{name: evaluation(network) for name, network in networks.items()},
        "torch.compile, float": evaluation(torch.compile(of("float"))),
        **onnxruntime_peer.evaluations(networks["float"], seen, images, tmp_path),
        **onnxruntime_peer.exported(FUSED, networks[FUSED], seen, images, tmp_path),
    }
    title = f"{work.subject}, evaluation, batch {size}"
    compare(benchmark, title, candidates, rounds=30, ours="float")
