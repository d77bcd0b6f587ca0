from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.deepcache.matching import global_offset, psnr, reusable, search
from experiments.deepcache.regions import Rectangle, Window


@pytest.fixture(scope="module")
def oracle():
    with np.load(Path(__file__).with_name("deepcache.npz")) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def frames(oracle):
    return oracle["prev"][None], oracle["cur"][None]


def test_every_block_is_found_where_it_was(oracle):
    block, radius = oracle["block"].item(), oracle["radius"].item()
    offsets, errors = search(*frames(oracle), block, radius)
    assert torch.equal(offsets, oracle["best_offset_dy_dx"])
    torch.testing.assert_close(errors, oracle["best_mse"], rtol=1e-12, atol=0)
    torch.testing.assert_close(psnr(errors), oracle["best_psnr"], rtol=1e-12, atol=0)


def test_motion_of_the_frame_and_the_blocks_that_follow_it(oracle):
    threshold = oracle["threshold_db"].item()
    offset = global_offset(oracle["best_offset_dy_dx"], oracle["best_psnr"], threshold)
    assert list(offset) == oracle["global_offset_dy_dx"].tolist()
    blocks = reusable(*frames(oracle), oracle["block"].item(), offset, threshold)
    assert torch.equal(blocks, oracle["global_reusable"].bool())


def test_rectangles_behind_a_layer(oracle):
    for rectangle, behind in zip(
        oracle["rect_in_x1y1x2y2_inclusive"].tolist(), oracle["rect_out"].tolist(), strict=True
    ):
        for layer, expected in zip(
            oracle["layer_kernel_stride_padding"].tolist(), behind, strict=True
        ):
            window = Window(*((value, value) for value in layer))
            assert window.outputs(Rectangle(*rectangle)) == Rectangle(*expected)
