import pytest
import torch

from experiments.models.resnet20 import BasicBlock, ResNet20


def test_has_the_published_number_of_parameters():
    assert sum(parameter.numel() for parameter in ResNet20().parameters()) == 269_722


@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 32, 10), (1, 8, 10), (2, 13, 7)])
def test_takes_images_of_any_size(channels, size, classes):
    model = ResNet20(channels, classes)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, classes)
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_stages_halve_the_image():
    model, shapes = ResNet20(), []
    for stage in (model.stage1, model.stage2, model.stage3):
        stage.register_forward_hook(lambda _module, _args, out: shapes.append(tuple(out.shape)))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]


def test_shortcut_subsamples_and_pads_with_zeros():
    x = torch.randn(2, 16, 8, 8)
    shortcut = BasicBlock(16, 32, stride=2).shortcut(x)
    assert torch.equal(shortcut[:, 8:24], x[:, :, ::2, ::2])
    assert shortcut[:, :8].count_nonzero() == shortcut[:, 24:].count_nonzero() == 0
    assert BasicBlock(16, 16, stride=1).shortcut(x) is x


def test_initial_weights_keep_the_scale_of_the_signal():
    torch.manual_seed(0)
    weight = ResNet20().stage3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
