"""InceptionV3 (Szegedy et al. 2015, arXiv 1512.00567) as an encoder."""

from types import ModuleType

from torch import Tensor, nn

_NOT_OF_THE_ENCODER = ("AuxLogits", "avgpool", "dropout", "fc")


def torchvision_models() -> ModuleType:
    """The module torchvision.models; a ValueError where it is missing or of another torch."""
    try:
        from torchvision import models
    except (ImportError, RuntimeError) as error:  # RuntimeError: built for another torch
        raise ValueError(
            "--encoder: got inception_v3, which needs torchvision; "
            "pip install 'noisyq_fast[vision]'"
        ) from error
    return models


class InceptionV3Encoder(nn.Module):
    """torchvision's InceptionV3 up to Mixed_7c, then the maximum over the picture.

    Takes `[B, 3, H, W]` with `H` and `W` from 75, 299 as published; returns `[B, 2048]`.

    Args:
        pretrained: starts from ImageNet weights, which torchvision fetches, 104 MB, unless they are
            in torch's cache. They were trained on pictures scaled from -1 to 1.

    Raises:
        ValueError: as `torchvision_models`.
    """

    features = 2048

    def __init__(self, pretrained: bool) -> None:
        super().__init__()
        models = torchvision_models()
        network = models.inception_v3(init_weights=not pretrained)
        if pretrained:
            weights = models.Inception_V3_Weights.IMAGENET1K_V1
            state = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
            network.load_state_dict(state)
        for name, layer in network.named_children():  # in the order of the forward
            if name not in _NOT_OF_THE_ENCODER:
                self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x.amax((2, 3))
