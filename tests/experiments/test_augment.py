import torch
import torch.nn.functional as F

from experiments.data.augment import Normalize, RandomCropFlip

IMAGES = torch.randint(
    256, (6, 5, 4, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_gives_every_crop_and_mirror_image_and_nothing_else():
    draws = 2000
    augment = RandomCropFlip(IMAGES, padding=1, flip=True)
    views = augment.draw(draws, torch.Generator().manual_seed(0))
    batch = augment(torch.full((draws,), 2), views)
    padded = F.pad(IMAGES[2], (0, 0, 1, 1, 1, 1))
    crops = [padded[y : y + 5, x : x + 4] for y in range(3) for x in range(3)]
    seen = torch.zeros(draws, dtype=torch.int)
    for expected in crops + [crop.flip(1) for crop in crops]:
        matches = (batch == expected).flatten(1).all(1)
        assert matches.double().mean().item() > 0.5 / 18
        seen += matches
    assert seen.eq(1).all()


def test_without_padding_and_flip_the_images_stay_as_they_are():
    indices = torch.tensor([5, 0, 0, 3])
    augment = RandomCropFlip(IMAGES, padding=0, flip=False)
    batch = augment(indices, augment.draw(4, torch.Generator()))
    assert torch.equal(batch, IMAGES[indices])


def test_generator_decides():
    augment = RandomCropFlip(IMAGES, padding=2, flip=True)
    first, again, other = (
        augment.draw(60, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_normalizes_each_channel():
    batch = Normalize.of(IMAGES)(IMAGES)
    assert batch.shape == (6, 3, 5, 4)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    pixels = batch.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(pixels.mean(1), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels.std(1, correction=0), torch.ones(3).double())
