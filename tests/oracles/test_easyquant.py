import re
from pathlib import Path

import numpy as np
import pytest
import torch

from noisyq_fast.calibration.easyquant import (
    RATIOS,
    cosine,
    first_scale,
    input_cosines,
    to_grid,
    weight_cosines,
)


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("easyquant.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def is_best(index, cosines):
    """An index is the first of the largest, where that is no matter of rounding."""
    best = cosines.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    close(best, cosines.amax(-1))


def test_ratios(oracle):
    close(torch.tensor(RATIOS, dtype=torch.float64), oracle["ratios"])


def test_one_layer(oracle):
    x, weight = oracle["x"], oracle["w"]
    output = x @ weight.T
    widths = [int(m[1]) for m in (re.match(r"b(\d+)_cos_w", name) for name in oracle) if m]
    assert widths
    for bits in widths:
        expected = {
            name.removeprefix(f"b{bits}_"): value
            for name, value in oracle.items()
            if name.startswith(f"b{bits}_")
        }
        scale, scale_x = first_scale(weight, bits), first_scale(x.flatten(), bits)
        close(scale, expected["step_w0"])
        close(scale_x, expected["step_x0"])
        rounded = to_grid(x.flatten(), scale_x, bits).view_as(x)
        ours = weight_cosines(output, rounded, weight, scale, bits)
        close(ours, expected["cos_w"])
        is_best(ours.argmax(-1), expected["cos_w"])

        chosen = expected["best_w"]
        scale_w = scale / oracle["ratios"][chosen]
        close(scale_w, expected["step_w"])
        better = to_grid(weight, scale_w, bits)
        candidates = (to_grid(x.flatten(), scale_x / r, bits).view_as(x) for r in RATIOS)
        ours = input_cosines(output, candidates, better)
        close(ours, expected["cos_x"])
        is_best(ours.argmax(-1), expected["cos_x"])
        best = expected["best_x"]
        close(scale_x / oracle["ratios"][best], expected["step_x"])

        before = rounded @ to_grid(weight, scale, bits).T
        close(cosine(output.flatten(), before.flatten()), expected["cos_before"])
        close(ours[best], expected["cos_after"])
        assert expected["cos_after"] >= expected["cos_before"]


def test_an_output_of_zeros_has_no_direction():
    assert cosine(torch.zeros(3), torch.ones(3)) == 0
